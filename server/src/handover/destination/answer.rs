//! What a living destination answers to Resolve. Without one the record answers: [`crate::handover::answer`].
//!
//! Invariant: the answer says nothing that a crash could take back: before Entered is durable it does not claim it.

use super::super::PeerAnswer;
use super::{Destination, Outcome, State};

impl Destination {
    /// What it answers to Resolve.
    pub fn answer(&self) -> PeerAnswer {
        use State as S;
        match self.state {
            S::Ready { digest } => PeerAnswer::Ready(digest),
            // Before Entered is durable there is nothing to say, and the source has committed already.
            S::Idle | S::Preparing { .. } | S::Receiving | S::Entering { .. } => PeerAnswer::Undecided,
            S::Sealing | S::Returning | S::Ending { .. } | S::Dropping { .. } => PeerAnswer::Undecided,
            S::Forcing { .. } => PeerAnswer::Undecided,
            S::ForceGranting { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Forced | Outcome::ForcedDead) => {
                PeerAnswer::Superseded(self.handover.returned())
            }
            S::Granting | S::Entered { .. } | S::Owning { .. } => PeerAnswer::Committed(None),
            S::Over(Outcome::Arrived | Outcome::ArrivedDead) => PeerAnswer::Committed(None),
            S::CopyLost | S::Over(Outcome::Dropped) => PeerAnswer::Aborted,
            S::Over(Outcome::Returned) => PeerAnswer::Returned,
            S::Over(Outcome::NotPrepared) => PeerAnswer::Unknown,
            S::Yielding { epoch } | S::SavingSuperseded { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Superseded) => PeerAnswer::Superseded(self.handover.returned()),
        }
    }
}
