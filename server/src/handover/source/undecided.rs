//! Before the decision: what ends a migration, and what decides it.
//!
//! Invariants
//! - An abort waits for the record that is being written; it is heard until `Committing`.
//! - It is decided on equal digests; without the worker's, on a digest from the destination and the worker's proven
//!   death. From then on the destination's copy may be the last one, and only its word that it has none aborts.

use super::super::{Digest, PeerAnswer};
use super::{Cause, Effect, Event, Outcome, Source, State, Step, over};
use vpmu_proto::store::ownership_record::Phase;

impl Source {
    /// An event that ends a migration if it comes in time.
    pub(super) fn hear_abort(&self, event: Event, cause: Cause) -> Step {
        use State as S;
        match self.state {
            // Waits for the record that is being written; a death outweighs other causes.
            S::Opening { abort } if abort.is_none() || event == Event::WorkerDied => {
                (S::Opening { abort: Some(cause) }, vec![])
            }
            S::Quiescing { abort } if abort.is_none() || event == Event::WorkerDied => {
                (S::Quiescing { abort: Some(cause) }, vec![])
            }
            S::Idle => over(Outcome::NotOpened),
            S::Preparing | S::Precopy => self.abort(cause, event == Event::WorkerDied),
            S::Opening { .. } | S::Quiescing { .. } => (self.state, vec![]),
            // The copy at the destination may be the last one.
            S::Stopping { dead: true, .. } => match event {
                Event::PeerFailed => self.abort(Cause::WorkerDied, true),
                Event::CancelRequested => (self.state, vec![Effect::RefuseCancel]),
                Event::PeerLost => (self.state, vec![Effect::AskPeer]),
                _ => (self.state, vec![]),
            },
            S::Stopping { .. } if event == Event::WorkerDied => self.stopping(event),
            S::Stopping { .. } => self.abort(cause, false),
            _ if event == Event::CancelRequested => (self.state, vec![Effect::RefuseCancel]),
            _ => self.decided(event),
        }
    }

    pub(super) fn stopping(&self, event: Event) -> Step {
        use Event as E;
        let State::Stopping { mut sealed, mut ready, mut pmu, mut dead } = self.state else {
            return (self.state, vec![]);
        };
        let mut effects = Vec::new();
        match event {
            E::Sealed(digest) if sealed.is_none() => {
                sealed = Some(digest);
                effects.push(Effect::PersistPmu);
            }
            E::ReadyReceived(digest) | E::PeerAnswered(PeerAnswer::Ready(digest)) => ready = Some(digest),
            E::PmuPersisted => pmu = true,
            E::WorkerDied if !dead => {
                dead = true;
                // What it had not reported cannot be stored any more.
                pmu |= sealed.is_none();
                effects.push(Effect::AskPeer);
            }
            E::PeerAnswered(PeerAnswer::Aborted) if dead => return self.abort(Cause::WorkerDied, true),
            E::PeerAnswered(PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Returned) => {
                return self.doubt();
            }
            E::PeerAnswered(_) if dead => effects.push(Effect::AskPeer),
            _ => {}
        }
        let (state, more) = match (sealed, ready) {
            // With a dead worker there is no good copy left; else it goes on here.
            (Some(ours), Some(theirs)) if ours != theirs => self.abort(Cause::DigestMismatch, dead),
            (Some(_), Some(digest)) => self.commit(digest, pmu, dead),
            // A dead worker was sealed before it sent its state, and the destination checked that state's own digest.
            (None, Some(digest)) if dead => self.commit(digest, pmu, dead),
            _ => (State::Stopping { sealed, ready, pmu, dead }, vec![]),
        };
        effects.extend(more);
        (state, effects)
    }

    /// Cases (a) to (d) of handover.md section 3.
    pub(super) fn resolve(&self, dead: bool, answer: PeerAnswer) -> Step {
        match (answer, dead) {
            // It claims a commit that this journal does not have: records were lost here.
            (PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Returned, _) => self.doubt(),
            (_, false) => self.abort(Cause::Restarted, false),
            (PeerAnswer::Ready(digest), true) => self.commit(digest, true, true),
            (PeerAnswer::Aborted, true) => self.abort(Cause::WorkerDied, true),
            _ => (State::Resolving { dead }, vec![Effect::AskPeer]),
        }
    }

    pub(super) fn late_abort(&self, cause: Cause) -> Step {
        self.abort(cause, cause == Cause::WorkerDied)
    }

    pub(super) fn abort(&self, cause: Cause, dead: bool) -> Step {
        let record = self.handover.record(Phase::Owned, self.handover.decided(), &self.handover.host, None);
        (State::Aborting { cause, dead }, vec![Effect::Persist(record)])
    }

    fn commit(&self, digest: Digest, pmu: bool, dead: bool) -> Step {
        let next = self.handover.record(
            Phase::HandedOver,
            self.handover.decided(),
            &self.handover.peer_host,
            Some(digest),
        );
        (State::Committing { digest, pmu, dead }, vec![Effect::Persist(next)])
    }
}

pub(super) fn abort_cause(event: Event) -> Option<Cause> {
    Some(match event {
        Event::CancelRequested => Cause::Cancelled,
        Event::TimedOut => Cause::TimedOut,
        Event::PeerLost => Cause::PeerLost,
        Event::PeerFailed => Cause::PeerFailed,
        Event::CopyFailed => Cause::CopyFailed,
        Event::PmuFailed => Cause::StoreFailed,
        Event::WorkerDied => Cause::WorkerDied,
        _ => return None,
    })
}
