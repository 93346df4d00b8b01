//! What a restart interrupted is brought to its end by the same machines, without a worker (in thread isolation that died
//! with its daemon) or, at a source, with the one that outlived it (`kept`). With nothing to wait for but the other host,
//! or a worker that still serves pages after a post-copy, one effect is done after the other; a worker that has not
//! said what it is, or owes its seal, keeps nothing else waiting. Once it is granted, or serves pages, its answer is.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vpmu_proto::api::virtual_machine::DesiredState;
use vpmu_proto::peer::SourceMessage;
use vpmu_proto::peer::destination_message::Message as FromDestination;
use vpmu_proto::peer::source_message::{Go, Message as FromSource, Open};
use vpmu_proto::store::OwnershipRecord;

use super::answer::ask;
use super::force::Ear;
use super::kept::Kept;
use super::record::{Backoff, Written, write};
use crate::adopt::Holder;
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
    holder: Option<Holder>,
) -> Option<Settled> {
    let mut kept = Kept::new(&daemon, holder, &held.migration_id, held.phase());
    let Some((outcome, held)) = settle_source(daemon, held, &mut kept).await else {
        kept.leave();
        return None;
    };
    let (died, unserved) = (kept.died, kept.unserved.take());
    Some(Settled { outcome, held, worker: kept.into_worker(), died, unserved })
}

/// How the source's side ended.
pub(super) struct Settled {
    pub(super) outcome: source::Outcome,
    pub(super) held: OwnershipRecord,
    /// It runs, or is paused, under a grant.
    pub(super) worker: Option<WorkerLink>,
    /// The worker was dead before its machine was released.
    pub(super) died: bool,
    /// Post-copy: why not all of the memory has followed.
    pub(super) unserved: Option<ApiError>,
}

async fn settle_source(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    kept: &mut Kept,
) -> Option<(source::Outcome, OwnershipRecord)> {
    use source::{Effect, Event, State as S};
    let wanted = daemon.registry.by_uid(&held.vm_uid).map(|h| h.view().vm.desired_state());
    let handover = Handover::of(&held, &daemon.host.host_id, wanted != Some(DesiredState::Paused));
    // As long as it has not answered nothing is decided that depends on it.
    let condition = if kept.is_there() { Worker::Sealed { epoch: handover.epoch } } else { Worker::Dead };
    let (mut machine, first) = source::Source::recovered(handover, &held, condition)?;
    // It knows by itself whether it serves pages.
    machine.postcopy = kept.is_there();
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
                // What the answer means depends on the worker: it is asked for once that is known.
                Effect::AskPeer if kept.is_asked() && matches!(machine.state(), S::Resolving { .. }) => {}
                Effect::AskPeer => {
                    events.push_back(Event::PeerAnswered(settler.ask(&machine.handover).await));
                }
                Effect::SendGo { epoch, digest } => {
                    events.push_back(go(&settler.daemon, &machine.handover, epoch, digest).await);
                }
                // What the last daemon had not stored of it died with that.
                Effect::SealWorker { epoch } => kept.seal(epoch),
                Effect::EndWorker => events.push_back(kept.end().await?),
                Effect::Grant { epoch, run } => events.push_back(kept.grant(epoch, run).await?),
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
        // What it was asked before is heard first.
        if events.is_empty() && machine.is_followed() && !kept.is_asked() {
            events.push_back(kept.follow().await?);
        }
        let event = tokio::select! {
            biased;
            claim = forced(&mut settler.ear, &machine), if matches!(machine.state(), S::Resolving { .. } | S::HandedOver { .. }) => {
                Event::Forced(claim)
            }
            answer = kept.answer(), if kept.is_asked() => {
                let Some(event) = kept.heard(answer?).await? else {
                    // The question that waited for it.
                    effects = vec![Effect::AskPeer];
                    continue;
                };
                event
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
