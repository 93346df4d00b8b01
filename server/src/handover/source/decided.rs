//! From the decision on, be it a commit or an abort: to the end. The diagram is at the head of [`super`].
//!
//! Invariants
//! - Nothing here goes back behind a record that may be durable: a write in doubt is repeated, a lost peer asked again.
//! - Go, Abort, a grant and the end of the worker follow the durable record that they need.

use super::super::PeerAnswer;
use super::{Cause, Effect, Event, Outcome, Source, State, Step, over};
use vpmu_proto::store::ownership_record::Phase;

impl Source {
    /// From the decision on, and what ends a migration.
    pub(super) fn decided(&self, event: Event) -> Step {
        use Event as E;
        use State as S;
        match (self.state, event) {
            (S::Committing { digest, pmu, dead }, _) => match event {
                E::Persisted(Phase::HandedOver) => {
                    self.go(S::HandedOver { digest, pmu, dead, entered: false, drained: false })
                }
                // The store has a later truth; it must not be overruled from here.
                E::PersistRefused => self.doubt(),
                E::PmuPersisted => (S::Committing { digest, pmu: true, dead }, vec![]),
                E::WorkerDied => (S::Committing { digest, pmu, dead: true }, vec![]),
                _ => self.repeat(event),
            },
            (S::Resolving { .. }, E::WorkerDied) => (S::Resolving { dead: true }, vec![Effect::AskPeer]),
            (S::HandedOver { .. }, _) => self.handed_over(event),
            (S::Releasing, E::WorkerDied) => (S::SavingReleased, self.persist(Phase::Released)),
            (S::SavingReleased, E::Persisted(Phase::Released)) => (
                S::Over(Outcome::Moved),
                vec![Effect::SendReleased { epoch: self.handover.decided() }, Effect::Done(Outcome::Moved)],
            ),
            (S::Aborting { cause, dead }, E::Persisted(Phase::Owned)) => {
                let epoch = self.handover.decided();
                let abort = Effect::SendAbort { epoch, cause };
                if dead {
                    let outcome = Outcome::Failed(cause);
                    return (S::Over(outcome), vec![abort, Effect::Done(outcome)]);
                }
                let grant = Effect::Grant { epoch, run: self.handover.run };
                let granting = S::Granting { epoch, outcome: Outcome::Aborted(cause) };
                (granting, vec![grant, Effect::CancelCopy, abort])
            }
            (S::Aborting { cause, .. }, E::WorkerDied) => (S::Aborting { cause, dead: true }, vec![]),
            (S::TakingBack { dead: true }, E::Persisted(Phase::Owned)) => {
                over(Outcome::Failed(Cause::WorkerDied))
            }
            (S::TakingBack { dead: false }, E::Persisted(Phase::Owned)) => {
                let epoch = self.handover.returned();
                let grant = Effect::Grant { epoch, run: self.handover.run };
                (S::Granting { epoch, outcome: Outcome::Returned }, vec![grant, Effect::CancelCopy])
            }
            (S::TakingBack { .. }, E::WorkerDied) => (S::TakingBack { dead: true }, vec![]),
            (S::Forcing { epoch, copy: true, dead: false }, E::Persisted(Phase::Owned)) => {
                let grant = Effect::Grant { epoch, run: self.handover.run };
                (S::Granting { epoch, outcome: Outcome::Forced }, vec![grant, Effect::CancelCopy])
            }
            (S::Forcing { epoch, dead: false, .. }, E::Persisted(Phase::Owned)) => {
                (S::Discarding { epoch }, vec![Effect::EndWorker])
            }
            (S::Forcing { .. }, E::Persisted(Phase::Owned)) | (S::Discarding { .. }, E::WorkerDied) => {
                over(Outcome::Failed(Cause::Forced))
            }
            (S::Forcing { epoch, .. }, E::WorkerDied) => {
                (S::Forcing { epoch, copy: false, dead: true }, vec![])
            }
            (S::Granting { outcome, .. }, E::Granted) => over(outcome),
            (S::Granting { .. }, E::WorkerDied) => over(Outcome::Failed(Cause::WorkerDied)),
            (S::Granting { epoch, .. }, E::GrantFailed) => {
                (self.state, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            (S::Yielding { epoch }, E::WorkerSealed | E::WorkerDied) => {
                let record = self.handover.record(Phase::Superseded, epoch, &self.handover.peer_host, None);
                (S::SavingSuperseded { epoch }, vec![Effect::Persist(record)])
            }
            (S::SavingSuperseded { .. }, E::Persisted(Phase::Superseded)) => {
                (S::Over(Outcome::Superseded), vec![Effect::EndWorker, Effect::Done(Outcome::Superseded)])
            }
            (S::Doubting, E::WorkerSealed | E::WorkerDied) => {
                (S::SavingUncertain, self.persist(Phase::Uncertain))
            }
            (S::SavingUncertain, E::Persisted(Phase::Uncertain) | E::PersistRefused) => {
                over(Outcome::Uncertain)
            }
            _ => self.repeat(event),
        }
    }

    pub(super) fn handed_over(&self, event: Event) -> Step {
        use Event as E;
        let State::HandedOver { digest, mut pmu, mut dead, mut entered, mut drained } = self.state else {
            return (self.state, vec![]);
        };
        match event {
            // A peer that has gone on at `e+1` has entered.
            E::EnteredReceived
            | E::PeerAnswered(PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Superseded(_)) => {
                entered = true;
            }
            E::PmuPersisted => pmu = true,
            E::WorkerDied => dead = true,
            E::Drained => drained = true,
            E::ReturnedReceived | E::PeerAnswered(PeerAnswer::Returned) if !entered => {
                let record =
                    self.handover.record(Phase::Owned, self.handover.returned(), &self.handover.host, None);
                return (State::TakingBack { dead }, vec![Effect::Persist(record)]);
            }
            // Whatever it held when the link broke: the decision is sent again.
            E::PeerAnswered(PeerAnswer::Ready(_) | PeerAnswer::Undecided | PeerAnswer::Aborted)
                if !entered =>
            {
                return self.go(self.state);
            }
            E::PeerLost | E::PeerAnswered(_) if !entered => return (self.state, vec![Effect::AskPeer]),
            E::PmuFailed => return (self.state, vec![Effect::PersistPmu]),
            _ => {}
        }
        // Pages that a dead worker has not served are nowhere.
        let served = drained || dead || !self.postcopy;
        match (entered && pmu && served, dead) {
            (true, false) => (State::Releasing, vec![Effect::EndWorker]),
            (true, true) => (State::SavingReleased, self.persist(Phase::Released)),
            _ => (State::HandedOver { digest, pmu, dead, entered, drained }, vec![]),
        }
    }

    fn go(&self, state: State) -> Step {
        let State::HandedOver { digest, .. } = state else { return (state, vec![]) };
        (state, vec![Effect::SendGo { epoch: self.handover.decided(), digest }])
    }
}
