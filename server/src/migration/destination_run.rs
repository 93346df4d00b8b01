//! The destination's driver: owns a [`Machine`] of `handover::destination`, tells it what happens and does what it says
//! (`destination_effects`). Invariants as in `source`: one task, short effects at once.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::AbortOnDropHandle;
use tonic::Status;
use vpmu_proto::peer::destination_message::{Entered, Message as FromDestination, Ready};
use vpmu_proto::peer::source_message::{Go, Message as FromSource};
use vpmu_proto::peer::{DestinationMessage, PrepareResponse, SourceMessage};
use vpmu_proto::worker::{IncomingProgress, WorkerStatus, worker_status};

use super::answer::Voice;
use super::destination::{Conversation, Incoming};
use super::force::{Ear, Order};
use super::record::Backoff;
use super::source::next_of;
use crate::awake::Hold;
use crate::handover::destination::{Destination as Machine, Effect, Event, State};
use crate::handover::{self, PeerAnswer};
use crate::status::ApiError;
use crate::worker_link::{Told, WorkerLink};

/// How old what the worker said of itself may be when Entered is written.
const FRESH: Duration = Duration::from_millis(200);

/// What a driver has in its hands.
pub(super) struct Work {
    pub(super) machine: Machine,
    pub(super) voice: Voice,
    pub(super) events: VecDeque<Event>,
    /// Answers Prepare, once.
    pub(super) prepared: Option<oneshot::Sender<Result<PrepareResponse, ApiError>>>,
    /// Streams from the source come in here once it is prepared.
    pub(super) streams: Option<mpsc::Receiver<Conversation>>,
    /// Until the first stream: when the reservation ends.
    pub(super) lease: Option<tokio::time::Instant>,
    pub(super) talk: Option<Conversation>,
    pub(super) progress: Option<Told<IncomingProgress>>,
    pub(super) jobs: FuturesUnordered<BoxFuture<'static, PeerAnswer>>,
    pub(super) backoff: Backoff,
    pub(super) asking: bool,
    /// Why it failed or goes back.
    pub(super) why: Option<ApiError>,
    /// Why the worker is gone after Entered.
    pub(super) lost: Option<ApiError>,
    /// The daemon ends and the rest is for the next one.
    pub(super) left: bool,
    shutdown_heard: bool,
    pub(super) death_heard: bool,
    /// The worker was ended and is not seen to be dead.
    pub(super) ending: bool,
    pub(super) failed_grants: u32,
    pub(super) ready: Option<Ready>,
    pub(super) go: Option<Go>,
    /// The worker's answer to how it is, and since when that is asked.
    asked: Option<(Instant, AbortOnDropHandle<Result<WorkerStatus, ApiError>>)>,
    pub(super) go_at: Instant,
    pub(super) persist_us: u64,
    /// Set by the grant; told by the first Entered.
    pub(super) entered: Entered,
    pub(super) adopted: bool,
    /// Orders to take the machine by force.
    pub(super) ear: Ear,
    /// While it begins, and from Ready on, no processor sleeps.
    pub(super) awake: Option<Hold>,
    /// Messages that are sent when everything here is cleaned up.
    pub(super) farewell: VecDeque<(u64, FromDestination)>,
}

impl Work {
    pub(super) fn new(
        machine: Machine,
        voice: Voice,
        prepared: oneshot::Sender<Result<PrepareResponse, ApiError>>,
        ear: Ear,
    ) -> Self {
        Self {
            ear,
            machine,
            voice,
            events: VecDeque::from([Event::Begin]),
            prepared: Some(prepared),
            streams: None,
            lease: None,
            talk: None,
            progress: None,
            jobs: FuturesUnordered::new(),
            backoff: Backoff::new(),
            asking: false,
            why: None,
            lost: None,
            left: false,
            shutdown_heard: false,
            death_heard: false,
            ending: false,
            failed_grants: 0,
            ready: None,
            go: None,
            asked: None,
            go_at: Instant::now(),
            persist_us: 0,
            entered: Entered::default(),
            adopted: false,
            awake: None,
            farewell: VecDeque::new(),
        }
    }
}

impl Work {
    /// Of an arrival that goes on after a restart of the daemon.
    pub(super) fn resumed(
        machine: Machine,
        voice: Voice,
        ready: Ready,
        streams: mpsc::Receiver<Conversation>,
        ear: Ear,
    ) -> Self {
        let (unheard, _) = oneshot::channel();
        Self {
            events: VecDeque::new(),
            prepared: None,
            streams: Some(streams),
            ready: Some(ready),
            ..Self::new(machine, voice, unheard, ear)
        }
    }
}

/// Returns once a worker's process has ended.
async fn died(worker: Option<&WorkerLink>) {
    match worker {
        Some(worker) => worker.died().await,
        None => std::future::pending().await,
    }
}

impl Incoming {
    pub(super) async fn run(mut self) {
        while let Some(event) = self.next().await {
            let before = self.work.machine.state();
            let effects = self.apply(event).await;
            tracing::debug!(vm = %self.handle.name, ?event, state = ?self.work.machine.state(), "destination");
            self.work.voice.say(self.work.machine.answer());
            let idle = effects.is_empty();
            for effect in effects {
                self.execute(effect).await;
            }
            if let Some(outcome) = self.work.machine.outcome() {
                self.over(outcome).await;
                break;
            }
            if event == Event::PersistRefused && idle && before == self.work.machine.state() {
                // This state has no other way than its record.
                self.retry(Event::PersistFailed).await;
            }
        }
        self.daemon.migrations.arriving().remove(&self.id);
        // If it is not over, the journal says where it stands and the next daemon asks the source.
        if let Some(worker) = self.worker.take().filter(|_| !self.work.adopted) {
            let upgrading = self.daemon.upgrading.load(std::sync::atomic::Ordering::SeqCst);
            if self.work.left && worker.outlives_daemon(upgrading) {
                // Its copy may have been promised.
                worker.keep();
            } else {
                worker.end().await;
            }
        }
        self.remove_data_socket();
        self.daemon.migrations.incoming().remove(&self.id);
    }

    /// Applies an event. A worker that is not well is noticed before Entered is written: then the machine goes back. One
    /// that says nothing has the copy that was promised: the event waits for its answer.
    async fn apply(&mut self, event: Event) -> Vec<Effect> {
        let ready = matches!(self.work.machine.state(), State::Ready { .. });
        if ready && matches!(self.work.machine.step(event).0, State::Entering { .. }) {
            match self.well().await {
                Some(true) => self.work.backoff.reset(),
                Some(false) => {
                    self.work.events.push_front(event);
                    return self.work.machine.apply(Event::WorkerDied);
                }
                None => {
                    self.retry(event).await;
                    return Vec::new();
                }
            }
        }
        self.work.machine.apply(event)
    }

    /// Asks the worker how it is while the source decides, so that nobody waits for the answer in the blackout.
    pub(super) fn ask_worker(&mut self) {
        let Some(worker) = self.worker.clone() else { return };
        let asked = tokio::spawn(async move { worker.status().await });
        self.work.asked = Some((Instant::now(), AbortOnDropHandle::new(asked)));
    }

    /// Whether the worker could run the copy; one that could not is ended, so that it never will. None: it does not say,
    /// and may live.
    async fn well(&mut self) -> Option<bool> {
        let Some(worker) = self.worker.clone() else { return Some(false) };
        let asked = self.work.asked.take().filter(|(at, _)| at.elapsed() < FRESH);
        let status = match asked {
            Some((_, answer)) => match answer.await {
                Ok(status) => status,
                Err(_) => worker.status().await,
            },
            None => worker.status().await,
        };
        let problem = match status {
            Ok(status) if status.state() != worker_status::State::Ended => return Some(true),
            Ok(_) => "its guest has ended".to_owned(),
            Err(error) if worker.may_live(&error).await => {
                tracing::warn!(vm = %self.handle.name, %error, "the worker with the copy does not answer; it is asked again");
                return None;
            }
            Err(error) => error.to_string(),
        };
        let text = format!("the worker cannot run the copy: {problem}");
        self.work.why.get_or_insert(ApiError::internal("WORKER_FAILED", text));
        // It was never granted: it does not run, whether or not it is seen to end.
        worker.end().await;
        self.worker = None;
        Some(false)
    }

    /// The next thing that happens; none if the daemon ends and nothing is left to be done before.
    async fn next(&mut self) -> Option<Event> {
        loop {
            if self.work.left {
                return None;
            }
            if let Some(event) = self.work.events.pop_front() {
                return Some(event);
            }
            // Once it has been adopted, its death is its actor's to see; unless it is ended here.
            let work = &self.work;
            let heeded = !work.death_heard && (!work.adopted || work.ending);
            let worker = self.worker.clone().filter(|_| heeded);
            let work = &mut self.work;
            let lease = work.lease.unwrap_or_else(tokio::time::Instant::now);
            let (listening, leased) = (work.talk.is_some(), work.lease.is_some());
            tokio::select! {
                message = next_of(work.talk.as_mut().map(|t| &mut t.from)) => self.hear(message),
                progress = next_of(work.progress.as_mut()) => self.received(progress),
                talk = next_stream(work.streams.as_mut()), if !listening => self.opened(talk).await,
                Some(answer) = work.jobs.next(), if !work.jobs.is_empty() => self.answered(answer),
                order = work.ear.hear() => self.forced(order),
                () = died(worker.as_ref()), if worker.is_some() => {
                    (self.work.death_heard, self.work.ending) = (true, false);
                    if let Some(worker) = worker {
                        let why = worker.obituary().await;
                        self.work.lost.get_or_insert_with(|| why.clone());
                        self.fail(Event::WorkerDied, why);
                    }
                }
                () = tokio::time::sleep_until(lease), if leased => {
                    tracing::info!(vm = %self.handle.name, "a reservation ended without a migration");
                    self.work.lease = None;
                    self.work.events.push_back(Event::LeaseExpired);
                }
                () = self.daemon.shutdown.cancelled(), if !work.shutdown_heard || work.ending => {
                    self.work.shutdown_heard = true;
                    if matches!(self.work.machine.state(), State::Receiving) && !self.work.ending {
                        self.fail(Event::WorkerFailed, ApiError::shutting_down());
                    } else {
                        self.work.left = true;
                    }
                }
            }
        }
    }

    fn forced(&mut self, order: Order) {
        let machine = &self.work.machine;
        let heeds = machine.step(Event::Forced(order.claim)).0 != machine.state();
        if let Some(claim) = self.work.ear.answer(order, heeds) {
            self.work.events.push_back(Event::Forced(claim));
        }
    }

    pub(super) fn fail(&mut self, event: Event, why: ApiError) {
        self.work.why.get_or_insert(why);
        self.work.events.push_back(event);
    }

    /// The source has opened its stream: from here on its copy is awaited.
    async fn opened(&mut self, talk: Conversation) {
        if talk.vm_uid != self.handle.uid {
            tracing::error!(vm = %self.handle.name, migration = %self.id, "a stream for another machine is refused");
            let error = ApiError::invalid(
                "vm_uid",
                &talk.vm_uid,
                "OTHER_MACHINE",
                "is not the machine of this migration",
                "open the stream of its own",
            );
            let _ = talk.to.try_send(Err(error.into()));
            return;
        }
        self.work.talk = Some(talk);
        self.work.lease = None;
        let receiving = matches!(self.work.machine.state(), State::Receiving);
        if let Some(worker) = self.worker.clone().filter(|_| receiving && self.work.progress.is_none()) {
            match worker.watch_incoming(&self.id.to_string()).await {
                Ok(progress) => self.work.progress = Some(progress),
                Err(error) => self.fail(Event::WorkerFailed, error),
            }
        }
    }

    fn received(&mut self, progress: Result<Option<IncomingProgress>, Status>) {
        let error = match progress {
            Ok(Some(p)) if p.ready => match handover::digest(&p.state_digest) {
                Some(digest) => {
                    self.work.progress = None;
                    self.work.awake = Some(self.daemon.awake.hold());
                    self.work.ready = Some(Ready {
                        pmu_restored: self.pmu_restored(p.pmu_losses, p.pmu_losses_total),
                        state_digest: p.state_digest,
                        pmu: p.pmu,
                        restore_us: p.restore_us,
                        vcpu_cores: self.worker.as_ref().map(|w| w.cores().to_vec()).unwrap_or_default(),
                    });
                    self.work.events.push_back(Event::WorkerReady(digest));
                    return;
                }
                None => ApiError::internal("BAD_DIGEST", "the worker's digest has not 32 bytes"),
            },
            Ok(Some(p)) => {
                let message = self
                    .message(self.work.machine.handover.epoch, FromDestination::Received(p.bytes_received));
                if let Some(talk) = &self.work.talk {
                    // Progress may be dropped.
                    let _ = talk.to.try_send(Ok(message));
                }
                return;
            }
            Ok(None) => {
                ApiError::internal("WORKER_STREAM_ENDED", "the worker ended the copy without a reason")
            }
            Err(status) => ApiError::from_status("worker", &status),
        };
        self.work.progress = None;
        self.fail(Event::WorkerFailed, error);
    }

    /// A message of the source, or the end of its stream.
    fn hear(&mut self, message: Result<Option<SourceMessage>, Status>) {
        match message {
            Ok(Some(m)) if m.migration_id != self.id.to_string() || m.vm_uid != self.handle.uid => {
                self.refuse("vm_uid", &m.vm_uid, "OTHER_MACHINE", "is not of this stream's migration");
            }
            Ok(Some(SourceMessage {
                epoch,
                message: Some(FromSource::Go(_) | FromSource::Abort(_)),
                ..
            })) if epoch != self.work.machine.handover.epoch + 1 => {
                self.refuse("epoch", epoch, "WRONG_EPOCH", "is not that of this migration's decision");
            }
            Ok(Some(SourceMessage { epoch, message: Some(FromSource::Go(go)), .. })) => {
                self.work.go_at = Instant::now();
                self.work.machine.handover.run = !go.keep_paused;
                // One that cannot be read is none that this copy has: it goes back.
                let digest = handover::digest(&go.state_digest).unwrap_or_default();
                self.work.go = Some(go);
                self.work.events.push_back(Event::GoReceived { epoch, digest });
            }
            Ok(Some(SourceMessage { epoch, message: Some(FromSource::Abort(abort)), .. })) => {
                let text = format!("the source gave up: {}", crate::status::clip(&abort.reason, 64));
                let why = ApiError::cancelled("ABORTED_BY_SOURCE", text);
                self.fail(Event::AbortReceived { epoch }, why);
            }
            // Released needs no answer, and Entered is enough to own it: the actor may have written later records.
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => self.source_lost(),
        }
    }

    /// What says something else than its migration can is not heard, and neither is what follows it.
    fn refuse(&mut self, field: &str, value: impl ToString, reason: &str, problem: &str) {
        let remedy = "ask with Resolve what holds";
        let error = ApiError::invalid(field, value, reason, problem, remedy);
        tracing::error!(vm = %self.handle.name, migration = %self.id, %error, "a message of the source is refused");
        if let Some(talk) = &self.work.talk {
            let _ = talk.to.try_send(Err(error.into()));
        }
        self.source_lost();
    }

    pub(super) fn source_lost(&mut self) {
        self.work.talk = None;
        self.work.events.push_back(Event::SourceLost);
    }

    fn answered(&mut self, answer: PeerAnswer) {
        self.work.asking = false;
        if matches!(answer, PeerAnswer::Committed(_)) {
            self.work.go_at = Instant::now();
        }
        self.work.events.push_back(Event::SourceAnswered(answer));
    }

    /// Asks the source what it has decided, unless there is a stream on which it will say so.
    pub(super) fn ask_source(&mut self) {
        if self.work.asking || self.work.talk.is_some() {
            return;
        }
        self.work.asking = true;
        let (handover, peering) = (self.work.machine.handover.clone(), self.daemon.peering.clone());
        self.work.jobs.push(Box::pin(async move {
            tokio::time::sleep(peering.limits.ask).await;
            super::answer::ask(&handover, &peering).await
        }));
    }

    pub(super) fn message(&self, epoch: u64, message: FromDestination) -> DestinationMessage {
        DestinationMessage { migration_id: self.id.to_string(), epoch, message: Some(message) }
    }

    /// Waits, then tells the machine that it must do it again; not if the daemon ends.
    pub(super) async fn retry(&mut self, event: Event) {
        if self.work.backoff.pause(&self.daemon.shutdown).await {
            self.work.events.push_back(event);
        } else {
            self.work.left = true;
        }
    }
}

async fn next_stream(streams: Option<&mut mpsc::Receiver<Conversation>>) -> Conversation {
    if let Some(streams) = streams
        && let Some(talk) = streams.recv().await
    {
        return talk;
    }
    std::future::pending().await
}
