//! What is heard of the source: that it has committed, that it has aborted, or nothing any more.
//!
//! Invariant: a copy that was promised is dropped on the source's abort only, and run on its commit to this very copy
//! only. Silence decides nothing once Ready was said.

use super::super::Digest;
use super::{Destination, Effect, Outcome, State, Step, end};

impl Destination {
    /// The source has committed; the digest that it has sealed, if it was told.
    pub(super) fn went(&self, sealed: Option<Digest>) -> Step {
        use State as S;
        match self.state {
            S::Ready { digest } if sealed == Some(digest) => self.saving(S::Entering { digest, dead: false }),
            // Committed to something else than what is here: give it back instead of running it.
            S::Ready { .. } => (S::Sealing, vec![Effect::SealWorker { epoch: self.handover.returned() }]),
            S::CopyLost => self.saving(S::Returning),
            // A repeated Go is answered again.
            S::Entered { .. } | S::Owning { .. } | S::Over(Outcome::Arrived | Outcome::ArrivedDead) => {
                (self.state, vec![Effect::SendEntered { epoch: self.handover.decided() }])
            }
            S::Over(Outcome::Returned) => {
                (self.state, vec![Effect::SendReturned { epoch: self.handover.returned() }])
            }
            _ => (self.state, vec![]),
        }
    }

    pub(super) fn aborted(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Preparing { .. } => (S::Preparing { abort: true }, vec![]),
            S::Receiving | S::Ready { .. } => end(epoch, false),
            S::CopyLost => self.saving(S::Dropping { epoch }),
            S::Over(Outcome::Dropped) => (self.state, vec![Effect::SendAborted { epoch }]),
            _ => (self.state, vec![]),
        }
    }

    pub(super) fn source_lost(&self, first: bool) -> Step {
        use State as S;
        match self.state {
            // Nothing was promised.
            S::Preparing { .. } if first => (S::Preparing { abort: true }, vec![]),
            S::Receiving if first => end(self.handover.epoch, false),
            S::Ready { .. } | S::CopyLost => (self.state, vec![Effect::AskSource]),
            // The source asks again when it needs the answer; Entered is enough to own it.
            S::Entered { dead } if first => {
                let outcome = if dead { Outcome::ArrivedDead } else { Outcome::Arrived };
                (S::Over(outcome), vec![Effect::Done(outcome)])
            }
            _ => (self.state, vec![]),
        }
    }
}
