//! What overrules a migration: a later owner, and this host's own force.
//!
//! Invariants
//! - Force takes two epochs (`e+2` at least): less is stale or made up, but for `e+1` of a source that went on by itself.
//! - The worker is sealed before Superseded is written.

use super::super::force::Claim;
use super::{Destination, Effect, State, Step};

impl Destination {
    pub(super) fn superseded(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Over(_) | S::Yielding { .. } | S::SavingSuperseded { .. } => (self.state, vec![]),
            // Its own force is above every other decision that it can have met.
            S::Forcing { .. } | S::ForceGranting { .. } => (self.state, vec![]),
            // The source has gone on at `e+1` without having committed this migration.
            S::Receiving | S::Ready { .. } | S::CopyLost if epoch == self.handover.decided() => {
                self.aborted(epoch)
            }
            _ if epoch < self.handover.returned() => self.source_lost(false),
            _ => (S::Yielding { epoch }, vec![Effect::SealWorker { epoch }]),
        }
    }

    /// Only where the source must be asked: a copy that is not complete is worth nothing.
    pub(super) fn forced(&self, claim: Claim) -> Step {
        use State as S;
        let copy = match self.state {
            _ if claim.epoch < self.handover.returned() => return (self.state, vec![]),
            S::Ready { digest } => claim.copy && claim.sealed.is_none_or(|sealed| sealed == digest),
            S::CopyLost => false,
            _ => return (self.state, vec![]),
        };
        self.saving(S::Forcing { epoch: claim.epoch, copy })
    }
}
