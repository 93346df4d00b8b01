//! The source's driver: owns a [`Machine`] of `handover::source`, tells it what happens and does what it says.
//!
//! ```text
//!   events: cancel, stream, worker, jobs ──▶ machine.apply ──▶ effects, in their order (`source_effects`)
//!      ▲                                                            │
//!      └────────────────── answers of the effects ◀─────────────────┘      until Done, then `source_end`
//! ```
//! Invariants: one task owns all of it; short effects (records, messages, grants) are done at once, so that nothing
//! lies between an event of the blackout and what follows from it; long ones are jobs polled by the same task.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, watch};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::{Status, Streaming};
use uuid::Uuid;
use vpmu_proto::api::migration::State as Shown;
use vpmu_proto::api::{Migration, MigrationAction, MigrationProgress, MigrationSpec};
use vpmu_proto::peer::destination_message::{Entered, Message as FromDestination, Ready};
use vpmu_proto::peer::source_message::Message as FromSource;
use vpmu_proto::peer::{DestinationMessage, PrepareResponse, Requirements, SourceMessage};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::worker::{FinishMigrationResponse, MigrateOutProgress, WaitDrainedResponse};

use super::answer::Voice;
use super::force::{Ear, Order};
use super::record::Backoff;
use crate::awake::Hold;
use crate::daemon::Daemon;
use crate::handover::source::{Effect, Event, Source as Machine, State};
use crate::handover::{self, PeerAnswer};
use crate::ops::{Running, pack};
use crate::peer::Peer;
use crate::status::ApiError;
use crate::vm::command::Lease;
use crate::vm::registry::VmHandle;
use crate::worker_link::Told;

/// The stream to the destination.
pub(super) struct Conversation {
    pub(super) to: mpsc::Sender<SourceMessage>,
    pub(super) from: Streaming<DestinationMessage>,
}

/// The end of an effect that takes its time.
pub(super) enum Job {
    Prepared(Result<(PrepareResponse, Conversation), ApiError>),
    Copying(Result<Told<MigrateOutProgress>, ApiError>),
    Finished(Result<FinishMigrationResponse, ApiError>),
    /// Post-copy: how far the worker is with serving pages, or that it does not any more.
    Followed(Result<WaitDrainedResponse, ApiError>),
    Answered(PeerAnswer),
}

/// A bound on what is waited for.
pub(super) struct Bound {
    pub(super) at: tokio::time::Instant,
    pub(super) why: ApiError,
}

/// One migration away from here.
pub(super) struct Source {
    pub(super) daemon: Arc<Daemon>,
    pub(super) handle: VmHandle,
    pub(super) lease: Lease,
    /// The record that holds.
    pub(super) ownership: OwnershipRecord,
    pub(super) peer: Peer,
    pub(super) requirements: Requirements,
    pub(super) id: Uuid,
    pub(super) spec: MigrationSpec,
    /// Memory is handed over instead of copied.
    pub(super) local: bool,
    /// What was done before copying began, and why.
    pub(super) said: Vec<MigrationAction>,
    pub(super) accepted: Instant,
    pub(super) cancel: CancellationToken,
    pub(super) committed: Arc<AtomicBool>,
    pub(super) progress: watch::Sender<Migration>,
    pub(super) running: Running,
    pub(super) work: Work,
}

/// What a driver has in its hands.
pub(super) struct Work {
    pub(super) machine: Machine,
    pub(super) voice: Voice,
    pub(super) events: VecDeque<Event>,
    pub(super) talk: Option<Conversation>,
    pub(super) prepared: Option<PrepareResponse>,
    pub(super) copying: Option<Told<MigrateOutProgress>>,
    pub(super) jobs: FuturesUnordered<BoxFuture<'static, Job>>,
    pub(super) bound: Option<Bound>,
    pub(super) backoff: Backoff,
    /// The worker has begun to copy and has not been told to give up.
    pub(super) copies: bool,
    pub(super) asking: bool,
    cancel_heard: bool,
    /// Nothing of the worker can run any more, by itself or by this driver.
    pub(super) death_heard: bool,
    /// Why it was aborted, in words.
    pub(super) why: Option<ApiError>,
    /// Why the worker is gone.
    pub(super) lost: Option<ApiError>,
    /// The daemon ends and the rest is for the next one.
    pub(super) left: Option<ApiError>,
    pub(super) failed_grants: u32,
    pub(super) finish: Option<FinishMigrationResponse>,
    /// The PMU state at the stop is not stored yet.
    pub(super) pmu_due: bool,
    /// The worker is asked when it has served every page.
    following: bool,
    /// Post-copy: why not all of the memory has followed.
    pub(super) unserved: Option<ApiError>,
    pub(super) ready: Option<Ready>,
    pub(super) deciding: Option<Instant>,
    pub(super) decide_us: u64,
    pub(super) entered: Option<(Entered, u64)>,
    pub(super) source_cores: Vec<u32>,
    pub(super) total_us: u64,
    pub(super) guest_gap_us: Option<u64>,
    /// Orders to take the machine by force.
    pub(super) ear: Ear,
    /// While it begins, and from the end of copying on, no processor sleeps.
    awake: Hold,
}

impl Work {
    pub(super) fn new(machine: Machine, voice: Voice, ear: Ear, awake: Hold) -> Self {
        Self {
            ear,
            awake,
            machine,
            voice,
            events: VecDeque::from([Event::Begin]),
            talk: None,
            prepared: None,
            copying: None,
            jobs: FuturesUnordered::new(),
            bound: None,
            backoff: Backoff::new(),
            copies: false,
            asking: false,
            cancel_heard: false,
            death_heard: false,
            why: None,
            lost: None,
            left: None,
            failed_grants: 0,
            finish: None,
            pmu_due: false,
            following: false,
            unserved: None,
            ready: None,
            deciding: None,
            decide_us: 0,
            entered: None,
            source_cores: Vec::new(),
            total_us: 0,
            guest_gap_us: None,
        }
    }
}

impl Source {
    pub(super) async fn run(mut self) {
        let ended = loop {
            let Some(event) = self.next().await else { break self.leave() };
            let before = self.work.machine.state();
            let effects = self.apply(event);
            tracing::debug!(vm = %self.handle.name, ?event, state = ?self.work.machine.state(), "source");
            self.work.voice.say(self.work.machine.answer());
            let idle = effects.is_empty();
            for effect in effects {
                self.execute(effect).await;
            }
            if let Some(outcome) = self.work.machine.outcome() {
                break self.over(outcome);
            }
            if event == Event::PersistRefused && idle && before == self.work.machine.state() {
                // This state has no other way than its record.
                self.retry(Event::PersistFailed).await;
            }
            if self.work.pmu_due
                && matches!(self.work.machine.state(), State::HandedOver { entered: true, .. })
            {
                self.store_pmu().await;
            }
            if self.work.machine.is_followed() && !std::mem::replace(&mut self.work.following, true) {
                self.show(Shown::Postcopy, "runs on the destination; the rest of its memory follows");
                self.follow();
            }
        };
        self.end(ended).await;
    }

    /// Applies an event; a cancel that came before the commit goes first.
    fn apply(&mut self, event: Event) -> Vec<Effect> {
        let machine = &self.work.machine;
        if machine.can_cancel() && matches!(machine.step(event).0, State::Committing { .. }) {
            self.committed.store(true, Ordering::SeqCst);
            if self.cancel.is_cancelled() || self.daemon.shutdown.is_cancelled() {
                self.committed.store(false, Ordering::SeqCst);
                self.work.cancel_heard = true;
                self.blame(self.cancelled());
                return self.work.machine.apply(Event::CancelRequested);
            }
        }
        let effects = self.work.machine.apply(event);
        if matches!(self.work.machine.state(), State::Aborting { .. }) {
            self.work.jobs.clear();
            (self.work.copying, self.work.bound, self.work.asking) = (None, None, false);
        }
        effects
    }

    /// The next thing that happens; none if the daemon ends and nothing is left to be done before.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.work.left.is_some() {
                return None;
            }
            if let Some(event) = self.work.events.pop_front() {
                return Some(event);
            }
            let work = &mut self.work;
            let (stoppable, lives) = (!work.cancel_heard, !work.death_heard);
            let worker = self.lease.worker.clone();
            let bound = work.bound.as_ref().map_or_else(tokio::time::Instant::now, |b| b.at);
            tokio::select! {
                message = next_of(work.talk.as_mut().map(|t| &mut t.from)) => self.hear(message),
                progress = next_of(work.copying.as_mut()) => self.copied(progress).await,
                Some(job) = work.jobs.next(), if !work.jobs.is_empty() => self.done(job).await,
                () = worker.died(), if lives => self.worker_died().await,
                order = work.ear.hear() => self.forced(order),
                () = self.cancel.cancelled(), if stoppable => self.stop(),
                () = self.daemon.shutdown.cancelled(), if stoppable => self.stop(),
                () = self.daemon.shutdown.cancelled(), if !work.machine.can_cancel() => {
                    self.work.left = Some(ApiError::shutting_down());
                }
                () = tokio::time::sleep_until(bound), if work.bound.is_some() => {
                    if let Some(bound) = self.work.bound.take() {
                        self.fail(Event::TimedOut, bound.why);
                    }
                }
            }
        }
    }

    fn forced(&mut self, order: Order) {
        let machine = &self.work.machine;
        let heeds = machine.step(Event::Forced(order.claim)).0 != machine.state();
        if let Some(claim) = self.work.ear.answer(order, heeds) {
            self.work.why = Some(super::force::fresh());
            self.work.lost = Some(super::force::fresh());
            self.work.events.push_back(Event::Forced(claim));
        }
    }

    fn stop(&mut self) {
        self.work.cancel_heard = true;
        let why = self.cancelled();
        self.fail(Event::CancelRequested, why);
    }

    /// An event that ends the migration if it comes in time, and what to tell the user then.
    pub(super) fn fail(&mut self, event: Event, why: ApiError) {
        self.blame(why);
        self.work.events.push_back(event);
    }

    /// The first cause before the commit is the one that is told.
    pub(super) fn blame(&mut self, why: ApiError) {
        if self.work.machine.can_cancel() {
            self.work.why.get_or_insert(why);
        }
    }

    /// Its process has ended: nothing but a copy that is complete at the destination is left.
    async fn worker_died(&mut self) {
        if !std::mem::replace(&mut self.work.death_heard, true) {
            let why = self.lease.worker.obituary().await;
            self.work.lost.get_or_insert_with(|| why.clone());
            if self.work.machine.owes_pages() {
                self.work.unserved.get_or_insert_with(|| super::source_end::source_lost(why.message()));
            }
            self.fail(Event::WorkerDied, why);
        }
    }

    /// The copy failed; because of the worker's death, if it is that.
    async fn copy_failed(&mut self, error: ApiError) {
        if self.lease.worker.died_of(&error).await {
            self.worker_died().await;
        } else {
            self.fail(Event::CopyFailed, error);
        }
    }

    async fn done(&mut self, job: Job) {
        match job {
            Job::Prepared(Ok((prepared, talk))) => {
                self.work.prepared = Some(prepared);
                self.work.talk = Some(talk);
                self.work.events.push_back(Event::PrepareAccepted);
            }
            Job::Prepared(Err(error)) => self.fail(Event::PeerFailed, error),
            Job::Copying(Ok(stream)) => self.work.copying = Some(stream),
            Job::Copying(Err(error)) | Job::Finished(Err(error)) => self.copy_failed(error).await,
            Job::Finished(Ok(finish)) => self.sealed(finish),
            Job::Followed(answer) => self.followed(answer).await,
            Job::Answered(answer) => {
                self.work.asking = false;
                if matches!(answer, PeerAnswer::Committed(_) | PeerAnswer::Owned) {
                    self.work.entered.get_or_insert((Entered::default(), vcpu_worker::host::monotonic_ns()));
                }
                self.work.events.push_back(Event::PeerAnswered(answer));
            }
        }
    }

    async fn copied(&mut self, progress: Result<Option<MigrateOutProgress>, Status>) {
        let error = match progress {
            Ok(Some(p)) => {
                let said = &self.said;
                self.progress.send_modify(|m| {
                    m.progress = Some(MigrationProgress {
                        round: p.round,
                        bytes_sent: p.bytes_sent,
                        memory_bytes: p.memory_bytes,
                        bytes_remaining: p.bytes_remaining,
                        bytes_per_second: p.bytes_per_second,
                        dirty_bytes_per_second: p.dirty_bytes_per_second,
                        predicted_blackout_us: p.predicted_blackout_us,
                        throttle_percent: p.throttle_percent,
                        missing_pages: 0,
                    });
                    m.actions = said.iter().cloned().chain(p.actions).collect();
                });
                self.report();
                if p.converged {
                    self.work.copying = None;
                    self.work.bound = None;
                    self.work.awake = self.daemon.awake.hold();
                    self.work.events.push_back(Event::Converged);
                }
                return;
            }
            Ok(None) => {
                ApiError::internal("WORKER_STREAM_ENDED", "the worker ended the copy without a reason")
            }
            Err(status) => ApiError::from_status("worker", &status),
        };
        self.work.copying = None;
        self.copy_failed(error).await;
    }

    /// A message of the destination, or the end of its stream.
    fn hear(&mut self, message: Result<Option<DestinationMessage>, Status>) {
        let message = match message {
            Ok(Some(message)) if message.migration_id != self.id.to_string() => return,
            Ok(Some(message)) => message,
            Ok(None) => return self.peer_lost("it closed the stream"),
            Err(status) => return self.peer_lost(status.message()),
        };
        let handover = &self.work.machine.handover;
        match message.message {
            Some(FromDestination::Ready(ready)) => match handover::digest(&ready.state_digest) {
                Some(digest) => {
                    self.work.ready.get_or_insert(ready);
                    self.work.events.push_back(Event::ReadyReceived(digest));
                }
                None => self.fail(Event::PeerFailed, super::source_end::mismatch()),
            },
            Some(FromDestination::Failed(failed)) => {
                let reason = if failed.reason.is_empty() { "DESTINATION_FAILED" } else { &failed.reason };
                let text = format!("the destination failed: {}", crate::status::clip(&failed.message, 400));
                let error = ApiError::internal(&crate::status::clip(reason, 64), text);
                self.fail(Event::PeerFailed, error);
            }
            Some(FromDestination::Entered(entered)) if message.epoch == handover.epoch + 1 => {
                // The second one tells the hole as the guest saw it; after a post-copy the stream is gone by the end.
                let gap = entered.probe.as_ref().and_then(super::outcome::guest_gap_us);
                self.work.guest_gap_us = self.work.guest_gap_us.or(gap);
                self.work.entered.get_or_insert((entered, vcpu_worker::host::monotonic_ns()));
                self.work.events.push_back(Event::EnteredReceived);
            }
            Some(FromDestination::Returned(_)) if message.epoch == handover.epoch + 2 => {
                self.work.events.push_back(Event::ReturnedReceived);
            }
            Some(FromDestination::Entered(_) | FromDestination::Returned(_)) => {
                tracing::error!(vm = %self.handle.name, epoch = message.epoch, "an answer of another epoch is not heard");
            }
            Some(FromDestination::Received(_) | FromDestination::Aborted(_)) | None => {}
        }
    }

    pub(super) fn peer_lost(&mut self, why: &str) {
        self.work.talk = None;
        self.fail(Event::PeerLost, lost(why));
    }

    pub(super) fn cancelled(&self) -> ApiError {
        if self.daemon.shutdown.is_cancelled() {
            return ApiError::shutting_down();
        }
        ApiError::cancelled("CANCELLED", "the migration was cancelled by request; the machine stays here")
    }

    pub(super) fn message(&self, epoch: u64, message: FromSource) -> SourceMessage {
        SourceMessage {
            migration_id: self.id.to_string(),
            vm_uid: self.handle.uid.clone(),
            epoch,
            message: Some(message),
        }
    }

    pub(super) fn show(&self, state: Shown, phase: &str) {
        self.progress.send_modify(|m| {
            m.set_state(state);
            phase.clone_into(&mut m.phase);
        });
        self.report();
    }

    pub(super) fn report(&self) {
        let migration = self.progress.borrow().clone();
        self.running.progress(pack("Migration", &migration));
    }

    /// Waits, then tells the machine that it must do it again; not if the daemon ends.
    pub(super) async fn retry(&mut self, event: Event) {
        if self.work.backoff.pause(&self.daemon.shutdown).await {
            self.work.events.push_back(event);
        } else {
            self.work.left = Some(ApiError::shutting_down());
        }
    }
}

/// The next message of a stream that may not be open.
pub(super) async fn next_of<T>(
    stream: Option<&mut (impl Stream<Item = Result<T, Status>> + Unpin)>,
) -> Result<Option<T>, Status> {
    match stream {
        Some(stream) => stream.next().await.transpose(),
        None => std::future::pending().await,
    }
}

pub(super) fn lost(why: &str) -> ApiError {
    let why = crate::status::clip(why, 200);
    ApiError::unavailable(
        "DESTINATION_LOST",
        format!("the destination went away: {why}; look at its log and try again"),
    )
}

pub(super) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
