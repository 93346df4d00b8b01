//! What overrules a migration: a later owner, this host's own force, and a peer whose words this journal cannot explain.
//!
//! Invariants
//! - Force takes two epochs (`e+2` at least): less is stale or made up.
//! - The worker is sealed before Superseded or Uncertain is written.

use super::super::PeerAnswer;
use super::super::force::Claim;
use super::{Effect, Event, Source, State, Step};
use vpmu_proto::store::ownership_record::Phase;

impl Source {
    pub(super) fn superseded(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Over(_) | S::Yielding { .. } | S::SavingSuperseded { .. } => (self.state, vec![]),
            // Its own force is above every other decision that it can have met.
            S::Forcing { .. } | S::Discarding { .. } => (self.state, vec![]),
            S::Granting { epoch: own, .. } if epoch <= own => (self.state, vec![]),
            S::HandedOver { .. } if epoch == self.handover.decided() => {
                self.handed_over(Event::PeerAnswered(PeerAnswer::Superseded(epoch)))
            }
            // Force takes two epochs: a lower one is stale or made up, and no answer.
            _ if epoch < self.handover.returned() => self.step(Event::PeerAnswered(PeerAnswer::Unknown)),
            _ => (S::Yielding { epoch }, vec![Effect::SealWorker { epoch }]),
        }
    }

    /// Only where this host cannot decide by itself; it must not be late, either.
    pub(super) fn forced(&self, claim: Claim) -> Step {
        use State as S;
        let dead = match self.state {
            _ if claim.epoch < self.handover.returned() => return (self.state, vec![]),
            S::Resolving { dead } | S::HandedOver { dead, entered: false, .. } => dead,
            _ => return (self.state, vec![]),
        };
        let state = S::Forcing { epoch: claim.epoch, copy: claim.copy && !dead, dead };
        let record = self.handover.record(Phase::Owned, claim.epoch, &self.handover.host, None);
        (state, vec![Effect::Persist(record)])
    }

    pub(super) fn doubt(&self) -> Step {
        (State::Doubting, vec![Effect::SealWorker { epoch: self.handover.decided() }])
    }
}
