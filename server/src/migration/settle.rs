//! What a restart interrupted is brought to its end by the same machines, without a worker (in thread isolation that died
//! with its daemon) or, at a source that had handed over, with the one that outlived it. With nothing to wait for but the
//! other host, or a worker that still serves pages after a post-copy, one effect is done after the other.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::Code;
use vpmu_proto::api::virtual_machine::DesiredState;
use vpmu_proto::peer::SourceMessage;
use vpmu_proto::peer::destination_message::Message as FromDestination;
use vpmu_proto::peer::source_message::{Go, Message as FromSource, Open};
use vpmu_proto::store::OwnershipRecord;

use super::answer::ask;
use super::force::Ear;
use super::record::{Backoff, Written, write};
use crate::daemon::Daemon;
use crate::handover::force::Claim;
use crate::handover::recovery::Worker;
use crate::handover::step::HandoverStep;
use crate::handover::{Digest, Handover, PeerAnswer, destination, source};
use crate::peer::Peer;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// What both sides need.
struct Settler {
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    backoff: Backoff,
    asked: bool,
    ear: Ear,
}

/// What became of a record, without the phase.
enum Saved {
    Yes,
    Failed,
    Refused,
}

impl Settler {
    async fn save(&mut self, mut record: OwnershipRecord) -> Saved {
        self.ear.note(&mut record);
        match write(&self.daemon.store, record).await {
            Written::Durable(record) => {
                self.held = record;
                self.backoff.reset();
                Saved::Yes
            }
            Written::InDoubt(error) => {
                tracing::error!(uid = %self.held.vm_uid, %error, "settling a migration: not durable yet");
                self.backoff.pause(&self.daemon.shutdown).await;
                Saved::Failed
            }
            Written::Refused(error) => {
                tracing::error!(uid = %self.held.vm_uid, %error, "settling a migration: a record was refused");
                self.backoff.pause(&self.daemon.shutdown).await;
                Saved::Refused
            }
        }
    }

    /// Asks at once the first time, then with pauses.
    async fn ask(&mut self, handover: &Handover) -> PeerAnswer {
        let pause =
            if std::mem::replace(&mut self.asked, true) { self.daemon.limits.ask } else { Duration::ZERO };
        tokio::select! {
            answer = async { tokio::time::sleep(pause).await; ask(handover, &self.daemon.peering).await } => answer,
            () = self.daemon.shutdown.cancelled() => PeerAnswer::Unreachable,
        }
    }
}

/// Goes on as the source; none if the daemon ends before it is over, and a worker that can outlives it then. The worker
/// comes back if it runs, or is paused, under a grant.
pub(super) async fn source(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    worker: Option<WorkerLink>,
) -> Option<Settled> {
    let mut copy = Copy { worker, id: held.migration_id.clone(), unserved: None };
    let settled = settle_source(Arc::clone(&daemon), held, &mut copy).await;
    if settled.is_none()
        && let Some(worker) = copy.worker.as_ref().filter(|worker| {
            worker.outlives_daemon(daemon.upgrading.load(std::sync::atomic::Ordering::SeqCst))
        })
    {
        worker.keep();
    }
    settled.map(|(outcome, held)| Settled { outcome, held, worker: copy.worker, unserved: copy.unserved })
}

/// How the source's side ended.
pub(super) struct Settled {
    pub(super) outcome: source::Outcome,
    pub(super) held: OwnershipRecord,
    /// It runs, or is paused, under a grant.
    pub(super) worker: Option<WorkerLink>,
    /// Post-copy: why not all of the memory has followed.
    pub(super) unserved: Option<ApiError>,
}

/// A worker that outlived its daemon, until it is ended.
struct Copy {
    worker: Option<WorkerLink>,
    id: String,
    unserved: Option<ApiError>,
}

impl Copy {
    /// Ends it, and waits until that is seen: nothing else proves that it does not run. None if the daemon ends first.
    async fn end(&mut self, daemon: &Daemon) -> Option<source::Event> {
        if let Some(worker) = &self.worker
            && !worker.end().await
        {
            tracing::error!(migration = %self.id, pid = worker.pid(), "a worker was ended and may still live; waiting");
            tokio::select! {
                () = worker.died() => drop(worker.end().await),
                () = daemon.shutdown.cancelled() => return None,
            }
        }
        self.worker = None;
        Some(source::Event::WorkerDied)
    }

    /// Until it has served every page; none if the daemon ends first.
    async fn follow(&mut self, daemon: &Daemon) -> Option<source::Event> {
        loop {
            let Some(worker) = &self.worker else { return Some(source::Event::WorkerDied) };
            let answer = tokio::select! {
                answer = worker.wait_drained(&self.id) => answer,
                () = worker.died() => {
                    let why = worker.obituary().await;
                    self.unserved = Some(super::source_end::source_lost(why.message()));
                    return self.end(daemon).await;
                }
                () = daemon.shutdown.cancelled() => return None,
            };
            match answer {
                Ok(answer) if answer.over => {
                    self.unserved =
                        (!answer.problem.is_empty()).then(|| super::source_end::unserved(&answer.problem));
                    return Some(source::Event::Drained);
                }
                Ok(_) => {}
                // It had ended before this daemon began, or is of a build that has no post-copy.
                Err(error) if matches!(error.code(), Code::FailedPrecondition | Code::Unimplemented) => {
                    return Some(source::Event::Drained);
                }
                Err(error) => {
                    tracing::warn!(migration = %self.id, %error, "a worker does not say how far it is with serving pages");
                    tokio::time::sleep(daemon.limits.ask).await;
                }
            }
        }
    }

    async fn seal(&mut self, daemon: &Daemon, epoch: u64) -> Option<source::Event> {
        let Some(worker) = &self.worker else { return Some(source::Event::WorkerDied) };
        match until_answered(daemon, worker, || worker.seal(&self.id, epoch)).await? {
            Ok(()) => Some(source::Event::WorkerSealed),
            Err(error) => {
                tracing::error!(migration = %self.id, %error, "a worker cannot be sealed and is ended");
                self.end(daemon).await
            }
        }
    }

    async fn grant(&mut self, daemon: &Daemon, epoch: u64, run: bool) -> Option<source::Event> {
        let Some(worker) = &self.worker else { return Some(source::Event::WorkerDied) };
        if let Err(error) = worker.cancel_migration(&self.id).await {
            tracing::info!(migration = %self.id, %error, "the copy had ended already");
        }
        match until_answered(daemon, worker, || worker.grant(epoch, run)).await? {
            Ok(_) => Some(source::Event::Granted),
            Err(error) => {
                tracing::error!(migration = %self.id, %error, "a worker does not run on and is ended");
                self.end(daemon).await
            }
        }
    }
}

/// The answer of a worker that may hold the only copy: one that is silent is asked again, each time for a command's
/// deadline, until it answers or is seen to have ended. None if the daemon ends first.
async fn until_answered<T, F>(
    daemon: &Daemon,
    worker: &WorkerLink,
    call: impl Fn() -> F,
) -> Option<Result<T, ApiError>>
where
    F: Future<Output = Result<T, ApiError>>,
{
    loop {
        let answer = tokio::select! {
            answer = call() => answer,
            () = daemon.shutdown.cancelled() => return None,
        };
        match answer {
            Err(error) if worker.may_live(&error).await => {
                tracing::warn!(%error, "a worker with a copy is asked again");
            }
            answer => return Some(answer),
        }
    }
}

async fn settle_source(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    copy: &mut Copy,
) -> Option<(source::Outcome, OwnershipRecord)> {
    use source::{Effect, Event, State as S};
    let wanted = daemon.registry.by_uid(&held.vm_uid).map(|h| h.view().vm.desired_state());
    let handover = Handover::of(&held, &daemon.host.host_id, wanted != Some(DesiredState::Paused));
    let condition =
        if copy.worker.is_some() { Worker::Sealed { epoch: handover.epoch } } else { Worker::Dead };
    let (mut machine, first) = source::Source::recovered(handover, &held, condition)?;
    // It knows by itself whether it serves pages.
    machine.postcopy = copy.worker.is_some();
    let voice = daemon.migrations.answers.voice(&held.migration_id, machine.answer());
    let ear = Ear::of(&daemon, &held.vm_uid);
    let mut settler = Settler { daemon, held, backoff: Backoff::new(), asked: false, ear };
    let (mut effects, mut events) = (first, VecDeque::new());
    loop {
        for effect in effects {
            match effect {
                Effect::Persist(record) => {
                    let phase = record.phase();
                    let step = HandoverStep::of_source(&Effect::Persist(record.clone()));
                    super::hold::at(&settler.daemon.hold_at, false, step);
                    events.push_back(match settler.save(record).await {
                        Saved::Yes => Event::Persisted(phase),
                        Saved::Failed => Event::PersistFailed,
                        Saved::Refused => Event::PersistRefused,
                    });
                    super::hold::at(&settler.daemon.hold_at, true, step);
                }
                Effect::AskPeer => {
                    events.push_back(Event::PeerAnswered(settler.ask(&machine.handover).await));
                }
                Effect::SendGo { epoch, digest } => {
                    events.push_back(go(&settler.daemon, &machine.handover, epoch, digest).await);
                }
                // What the last daemon had not stored of it died with that.
                Effect::SealWorker { epoch } => events.push_back(copy.seal(&settler.daemon, epoch).await?),
                Effect::EndWorker => events.push_back(copy.end(&settler.daemon).await?),
                Effect::Grant { epoch, run } => {
                    events.push_back(copy.grant(&settler.daemon, epoch, run).await?);
                }
                Effect::PersistPmu => events.push_back(Event::PmuPersisted),
                // Without a stream: a destination that waits asks. The others begin a migration, or answer a user
                // who cannot reach this one.
                Effect::SendAbort { .. }
                | Effect::SendReleased { .. }
                | Effect::CancelCopy
                | Effect::Prepare
                | Effect::StartCopy
                | Effect::FinishCopy { .. }
                | Effect::RefuseCancel => {}
                Effect::Done(outcome) => return Some((outcome, settler.held)),
            }
        }
        if settler.daemon.shutdown.is_cancelled() {
            return None;
        }
        if events.is_empty() && machine.is_followed() {
            events.push_back(copy.follow(&settler.daemon).await?);
        }
        let event = tokio::select! {
            biased;
            claim = forced(&mut settler.ear, &machine), if matches!(machine.state(), S::Resolving { .. } | S::HandedOver { .. }) => {
                Event::Forced(claim)
            }
            event = next(&settler.daemon, &mut events) => event?,
        };
        effects = machine.apply(event);
        voice.say(machine.answer());
        if event == Event::PersistRefused && effects.is_empty() {
            events.push_back(Event::PersistFailed);
        }
    }
}

/// The claim of an order that the machine heeds.
async fn forced(ear: &mut Ear, machine: &source::Source) -> Claim {
    loop {
        let order = ear.hear().await;
        let heeds = machine.step(source::Event::Forced(order.claim)).0 != machine.state();
        if let Some(claim) = ear.answer(order, heeds) {
            return claim;
        }
    }
}

/// Goes on as the destination; none if the daemon ends before it is over.
pub(super) async fn destination(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
) -> Option<(destination::Outcome, OwnershipRecord)> {
    use destination::{Effect, Event};
    let handover = Handover::of(&held, &daemon.host.host_id, false);
    let (mut machine, first) = destination::Destination::recovered(handover, &held, Worker::Dead)?;
    let voice = daemon.migrations.answers.voice(&held.migration_id, machine.answer());
    let ear = Ear::of(&daemon, &held.vm_uid);
    let mut settler = Settler { daemon, held, backoff: Backoff::new(), asked: false, ear };
    let (mut effects, mut events) = (first, VecDeque::new());
    loop {
        for effect in effects {
            match effect {
                Effect::Persist(record) => {
                    let phase = record.phase();
                    events.push_back(match settler.save(record).await {
                        Saved::Yes => Event::Persisted(phase),
                        Saved::Failed => Event::PersistFailed,
                        Saved::Refused => Event::PersistRefused,
                    });
                }
                Effect::AskSource => {
                    events.push_back(Event::SourceAnswered(settler.ask(&machine.handover).await));
                }
                Effect::SealWorker { .. } | Effect::EndWorker | Effect::Grant { .. } => {
                    events.push_back(Event::WorkerDied);
                }
                // Without a stream: the source asks. Two begin an arrival, which this one has behind it.
                Effect::SendEntered { .. } => events.push_back(Event::SourceLost),
                Effect::SendReturned { .. }
                | Effect::SendFailed
                | Effect::SendAborted { .. }
                | Effect::StartWorker
                | Effect::SendReady { .. } => {}
                Effect::Done(outcome) => return Some((outcome, settler.held)),
            }
        }
        if settler.daemon.shutdown.is_cancelled() {
            return None;
        }
        let event = next(&settler.daemon, &mut events).await?;
        effects = machine.apply(event);
        voice.say(machine.answer());
        if event == Event::PersistRefused && effects.is_empty() {
            events.push_back(Event::PersistFailed);
        }
    }
}

/// The next event; with none left there is nothing to do but to wait for the daemon's end.
async fn next<E>(daemon: &Daemon, events: &mut VecDeque<E>) -> Option<E> {
    if let Some(event) = events.pop_front() {
        return Some(event);
    }
    daemon.shutdown.cancelled().await;
    None
}

/// Sends Go on a new stream and waits for the answer.
async fn go(daemon: &Daemon, handover: &Handover, epoch: u64, digest: Digest) -> source::Event {
    let vm = daemon.registry.by_uid(&handover.vm_uid).map(|h| h.view().vm.clone());
    let keep_paused = vm.as_ref().is_some_and(|vm| vm.desired_state() == DesiredState::Paused);
    let message = |epoch, message| SourceMessage {
        migration_id: handover.migration_id.clone(),
        vm_uid: handover.vm_uid.clone(),
        epoch,
        message: Some(message),
    };
    let open = message(handover.epoch, FromSource::Open(Open {}));
    let order = message(epoch, FromSource::Go(Go { state_digest: digest.to_vec(), vm, keep_paused }));
    let answered = async {
        let peer = Peer::connect(&handover.peer_address.parse().ok()?, &daemon.peering).await.ok()?;
        let (to, outbox) = mpsc::channel(2);
        to.try_send(open).ok()?;
        to.try_send(order).ok()?;
        let mut from = peer.handover(outbox).await.ok()?;
        while let Ok(Some(m)) = from.message().await {
            match m.message {
                Some(FromDestination::Entered(_)) if m.epoch == epoch => {
                    return Some(source::Event::EnteredReceived);
                }
                Some(FromDestination::Returned(_)) if m.epoch == epoch + 1 => {
                    return Some(source::Event::ReturnedReceived);
                }
                _ => {}
            }
        }
        None
    };
    let answered = tokio::select! {
        answered = tokio::time::timeout(daemon.limits.go, answered) => answered.ok().flatten(),
        () = daemon.shutdown.cancelled() => None,
    };
    answered.unwrap_or(source::Event::PeerLost)
}
