//! What a living source answers to Resolve. Without one the record answers: [`crate::handover::answer`].
//!
//! Invariant: the answer says nothing that a crash could take back: `Committed` is said only once HandedOver is durable.

use super::super::PeerAnswer;
use super::{Cause, Outcome, Source, State};

impl Source {
    /// What it answers to Resolve.
    pub fn answer(&self) -> PeerAnswer {
        use State as S;
        match self.state {
            S::HandedOver { digest, .. } => PeerAnswer::Committed(Some(digest)),
            S::Releasing | S::SavingReleased | S::TakingBack { .. } => PeerAnswer::Committed(None),
            S::Over(Outcome::Moved) => PeerAnswer::Committed(None),
            S::Granting { epoch, outcome: Outcome::Forced } | S::Discarding { epoch } => {
                PeerAnswer::Superseded(epoch)
            }
            S::Over(Outcome::Forced | Outcome::Failed(Cause::Forced)) => {
                PeerAnswer::Superseded(self.handover.returned())
            }
            S::Granting { .. } => PeerAnswer::Owned,
            S::Over(Outcome::Aborted(_) | Outcome::Returned | Outcome::Failed(_)) => PeerAnswer::Owned,
            S::Yielding { epoch } | S::SavingSuperseded { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Superseded) => PeerAnswer::Superseded(self.handover.returned()),
            S::Over(Outcome::NotOpened | Outcome::Uncertain) | S::Doubting | S::SavingUncertain => {
                PeerAnswer::Unknown
            }
            S::Idle
            | S::Opening { .. }
            | S::Preparing
            | S::Precopy
            | S::Quiescing { .. }
            | S::Stopping { .. } => PeerAnswer::Undecided,
            S::Committing { .. } | S::Aborting { .. } | S::Resolving { .. } | S::Forcing { .. } => {
                PeerAnswer::Undecided
            }
        }
    }
}
