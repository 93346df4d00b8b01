//! What the destination's machine orders, done.

use std::time::{Duration, Instant};

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::peer::destination_message::{
    Aborted, Entered, Failed, Message as FromDestination, Ready, Returned,
};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::worker_status;

use super::destination::{Incoming, arriving};
use super::hold;
use super::record::{Written, write};
use super::source::micros;
use crate::handover::destination::{Effect, Event, Outcome};
use crate::handover::step::HandoverStep;
use crate::status::ApiError;
use crate::vm::command::{Arrival, Command, Outcome as Ended};

/// How long the guest is given to measure its own hole.
const GAP: Duration = Duration::from_secs(2);
/// A worker that refuses this many grants is ended.
const GRANTS: u32 = 3;

impl Incoming {
    pub(super) async fn execute(&mut self, effect: Effect) {
        let step = HandoverStep::of_destination(&effect);
        hold::at(&self.daemon.hold_at, false, step);
        match effect {
            Effect::Persist(record) if record.phase() == Phase::Incoming => self.announce(record).await,
            Effect::Persist(record) => self.persist(record).await,
            Effect::StartWorker => self.start_worker().await,
            Effect::SendReady { epoch, digest } => {
                let ready = self.work.ready.clone().unwrap_or_default();
                let ready = Ready { state_digest: digest.to_vec(), ..ready };
                self.send(epoch, FromDestination::Ready(ready)).await;
                self.ask_worker();
            }
            Effect::SendEntered { epoch } => self.send_entered(epoch).await,
            Effect::SendReturned { epoch } => {
                let reason = self.why("the copy cannot be started here").to_string();
                self.work.farewell.push_back((epoch, FromDestination::Returned(Returned { reason })));
            }
            Effect::SendFailed => self.send_failed().await,
            Effect::SendAborted { epoch } => {
                if self.work.farewell.is_empty() {
                    self.work.farewell.push_back((epoch, FromDestination::Aborted(Aborted {})));
                }
            }
            Effect::AskSource => self.ask_source(),
            Effect::Grant { epoch, run } => self.grant(epoch, run).await,
            Effect::SealWorker { epoch } => self.seal(epoch).await,
            Effect::EndWorker => {
                if self.end_worker().await {
                    self.worker = None;
                }
            }
            Effect::Done(_) => {}
        }
        // Returned is only queued by now.
        hold::at(&self.daemon.hold_at, true, step.filter(|s| *s != HandoverStep::DestinationSendReturned));
    }

    fn why(&self, otherwise: &str) -> ApiError {
        self.work.why.clone().unwrap_or_else(|| ApiError::internal("DESTINATION_FAILED", otherwise))
    }

    /// Admits it and journals Incoming: the actor's, which owns what the journal says of the machine before.
    async fn announce(&mut self, record: OwnershipRecord) {
        self.ownership = record.clone();
        let announced = Box::new(self.record.clone());
        let told =
            self.handle.ask(|reply| Command::Receive { record: announced, ownership: record, reply }).await;
        match told {
            Ok(()) => self.work.events.push_back(Event::Persisted(Phase::Incoming)),
            Err(error) => self.fail(Event::PersistRefused, error),
        }
    }

    async fn persist(&mut self, mut record: OwnershipRecord) {
        self.work.ear.note(&mut record);
        let (phase, epoch) = (record.phase(), record.epoch);
        match write(&self.daemon.store, record).await {
            Written::Durable(record) => {
                if phase == Phase::Entered {
                    self.work.persist_us = micros(self.work.go_at.elapsed());
                }
                self.work.backoff.reset();
                self.ownership = record;
                if phase == Phase::Entered {
                    self.notice_death().await;
                }
                self.work.events.push_back(Event::Persisted(phase));
            }
            Written::InDoubt(error) => {
                tracing::error!(vm = %self.handle.name, ?phase, epoch, %error, "a decision is not durable yet; trying again");
                self.retry(Event::PersistFailed).await;
            }
            Written::Refused(error) => {
                tracing::error!(vm = %self.handle.name, ?phase, epoch, %error, "an ownership record was refused");
                self.fail(Event::PersistRefused, error);
            }
        }
    }

    /// A worker that died while Entered was being written was never granted: the machine hears that first.
    async fn notice_death(&mut self) {
        let Some(worker) = self.worker.clone() else { return };
        // Not a time-out of zero: tokio's clock ticks in milliseconds, and this is the blackout.
        if !self.work.death_heard && worker.died().now_or_never().is_some() {
            self.work.death_heard = true;
            let why = worker.obituary().await;
            self.fail(Event::WorkerDied, why);
        }
    }

    async fn start_worker(&mut self) {
        match self.build().await {
            Ok(response) => {
                if let Some(worker) = self.worker.clone() {
                    self.daemon.migrations.arriving().insert(self.id, worker);
                }
                let (door, streams) = mpsc::channel(1);
                self.daemon.migrations.incoming().insert(self.id, door);
                self.work.streams = Some(streams);
                self.work.lease = Some(tokio::time::Instant::now() + self.daemon.limits.lease);
                if let Some(prepared) = self.work.prepared.take() {
                    let _ = prepared.send(Ok(response));
                }
            }
            Err(error) => self.fail(Event::WorkerFailed, error),
        }
    }

    /// Before the source knows of a copy here it is told when everything is cleaned up, so that it can try again at
    /// once; later at once.
    async fn send_failed(&mut self) {
        let why = self.why("the copy did not arrive");
        let failed = FromDestination::Failed(Failed {
            reason: why.reason().to_owned(),
            message: why.message().to_owned(),
        });
        let epoch = self.work.machine.handover.epoch;
        if self.work.ready.is_some() {
            self.send(epoch, failed).await;
        } else {
            self.work.farewell.push_back((epoch, failed));
        }
    }

    async fn send(&mut self, epoch: u64, message: FromDestination) {
        let message = self.message(epoch, message);
        let sent = match &self.work.talk {
            Some(talk) => tokio::time::timeout(self.daemon.limits.send, talk.to.send(Ok(message))).await,
            None => return self.work.events.push_back(Event::SourceLost),
        };
        if !matches!(sent, Ok(Ok(()))) {
            self.source_lost();
        }
    }

    async fn grant(&mut self, epoch: u64, run: bool) {
        let Some(worker) = self.worker.clone() else {
            return self.work.events.push_back(Event::WorkerDied);
        };
        let granting = Instant::now();
        let error = match worker.grant(epoch, run).await {
            Ok(running_monotonic_ns) => {
                self.work.entered = Entered {
                    running_monotonic_ns,
                    boot_id: self.daemon.host.boot_id.clone(),
                    persist_us: self.work.persist_us,
                    resume_us: micros(granting.elapsed()),
                    probe: None,
                };
                return self.work.events.push_back(Event::Granted);
            }
            Err(error) => error,
        };
        tracing::error!(vm = %self.handle.name, epoch, %error, "the machine entered but its worker does not run it");
        if worker.may_live(&error).await {
            // With the only copy: it is asked until it answers or its death is seen.
            return self.retry(Event::GrantFailed).await;
        }
        self.work.failed_grants += 1;
        let status = worker.status().await;
        if status.is_ok_and(|s| s.state() == worker_status::State::Ended) {
            // The guest has ended by itself: nothing of it can run any more.
            self.work.lost.get_or_insert(error);
            self.work.events.push_back(Event::WorkerDied);
        } else if self.work.failed_grants < GRANTS {
            self.retry(Event::GrantFailed).await;
        } else {
            self.work.lost.get_or_insert(error);
            self.end_worker().await;
        }
    }

    /// Ends the worker. That is its death only once it is seen, which [`Incoming::next`] waits for if ending it took too
    /// long: nothing else proves that it does not run. Says whether it is seen.
    async fn end_worker(&mut self) -> bool {
        let gone = match &self.worker {
            Some(worker) => worker.end().await,
            None => true,
        };
        (self.work.death_heard, self.work.ending) = (gone, !gone);
        if gone {
            self.work.events.push_back(Event::WorkerDied);
        } else {
            tracing::error!(vm = %self.handle.name, "a worker was ended and may still live; waiting");
        }
        gone
    }

    async fn seal(&mut self, epoch: u64) {
        self.work.why.get_or_insert_with(|| {
            ApiError::internal(
                "STATE_DIGEST_MISMATCH",
                "the source committed another state than this copy has",
            )
        });
        if let Some(worker) = self.worker.clone()
            && worker.seal(&self.id.to_string(), epoch).await.is_ok()
        {
            return self.work.events.push_back(Event::WorkerSealed);
        }
        // Its end is as good a proof that it never runs.
        if self.end_worker().await {
            self.worker = None;
        }
    }

    /// It runs: says so, then makes the records follow and tells the source the hole as the guest saw it.
    async fn send_entered(&mut self, epoch: u64) {
        let entered = self.work.entered.clone();
        self.send(epoch, FromDestination::Entered(entered)).await;
        if self.work.adopted {
            return;
        }
        self.adopt().await;
        if self.work.talk.is_some() {
            self.tell_gap(epoch).await;
        }
        // Nothing is left to be said on the stream; a source that has not heard it asks.
        self.source_lost();
    }

    async fn adopt(&mut self) {
        self.work.adopted = true;
        let Some(worker) = self.worker.clone() else { return };
        let mut record = self.record.clone();
        let told = self.work.go.take().and_then(|go| go.vm);
        if let Some(vm) =
            told.filter(|vm| vm.uid == self.handle.uid && vm.name == self.handle.name.to_string())
        {
            record.vm = Some(arriving(vm));
        }
        let ready = self.work.ready.take().unwrap_or_default();
        // What was lost on an earlier way is lost still.
        if let (Some(vm), Some(restored)) = (&mut record.vm, ready.pmu_restored) {
            vm.pmu_restored = Some(Box::new(restored));
        }
        let arrival = Arrival {
            record,
            worker,
            ownership: self.ownership.clone(),
            images: ready.pmu,
            paused: !self.work.machine.handover.run,
            lost: self.work.lost.take(),
        };
        let adopted = self.handle.ask(|reply| Command::Adopt { arrival: Box::new(arrival), reply }).await;
        if let Err(error) = adopted {
            tracing::error!(vm = %self.handle.name, %error, "the arrived machine's records are incomplete");
        }
    }

    /// Tells the source the hole as the guest saw it, once the guest has.
    async fn tell_gap(&mut self, epoch: u64) {
        let mut entered = self.work.entered.clone();
        let probed = self.record.vm.as_ref().and_then(|vm| vm.spec.as_ref()).and_then(|s| s.boot.as_ref());
        if let Some(worker) = self.worker.clone()
            && self.work.machine.handover.run
            && matches!(probed, Some(Boot::Probe(_)))
        {
            let deadline = Instant::now() + GAP;
            loop {
                let report = worker.probe_report().await.ok();
                let seen = report
                    .as_ref()
                    .is_some_and(|r| !r.vcpus.is_empty() && r.vcpus.iter().all(|v| v.last_gap_ns > 0));
                if seen || Instant::now() > deadline || self.daemon.shutdown.is_cancelled() {
                    entered.probe = report;
                    break;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
        self.send(epoch, FromDestination::Entered(entered)).await;
    }

    /// The end: what did not stay is forgotten here, then the source is told.
    pub(super) async fn over(&mut self, outcome: Outcome) {
        let why = self.work.why.as_ref().map(ToString::to_string);
        tracing::info!(vm = %self.handle.name, migration = %self.id, ?outcome, why, "an arrival ended");
        match outcome {
            // From its record on it is owned here as if it had entered.
            Outcome::Forced => self.adopt().await,
            Outcome::ForcedDead => {
                if let Some(worker) = self.worker.take() {
                    worker.end().await;
                }
                let (ownership, lost) = (self.ownership.clone(), Some(super::force::fresh()));
                let outcome = Ended::Stayed { ownership, lost };
                let _ = self.handle.ask(|reply| Command::EndMigration { outcome, reply }).await;
            }
            _ => {}
        }
        if matches!(outcome, Outcome::Dropped | Outcome::Returned | Outcome::Superseded) {
            if let Some(worker) = self.worker.take() {
                worker.end().await;
            }
            let ownership = self.ownership.clone();
            let _ = self.handle.ask(|reply| Command::DropIncoming { ownership, reply }).await;
        }
        if let Some(prepared) = self.work.prepared.take() {
            let _ = prepared.send(Err(self.why("the copy was not prepared")));
        }
        while let Some((epoch, message)) = self.work.farewell.pop_front() {
            let returned = matches!(message, FromDestination::Returned(_));
            let step = returned.then_some(HandoverStep::DestinationSendReturned);
            self.send(epoch, message).await;
            hold::at(&self.daemon.hold_at, true, step);
        }
    }
}
