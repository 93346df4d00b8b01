//! What happens on this host: records that become durable, the worker's progress, its grant and its death.
//!
//! Invariant: the grant follows a durable Entered, or a durable Owned where it was forced; a worker that dies before its
//! grant was sent makes the machine go back, one that dies after it does not.

use super::{Destination, Effect, Event, Outcome, State, Step, end};
use vpmu_proto::store::ownership_record::Phase;

impl Destination {
    /// Events of this host.
    pub(super) fn local(&self, event: Event) -> Step {
        use Event as E;
        use State as S;
        let decided = self.handover.decided();
        match (self.state, event) {
            (S::Idle, E::Begin) => {
                (S::Preparing { abort: false }, self.outstanding(S::Preparing { abort: false }))
            }
            (S::Preparing { .. }, E::PersistRefused) => {
                (S::Over(Outcome::NotPrepared), vec![Effect::SendFailed, Effect::Done(Outcome::NotPrepared)])
            }
            (S::Preparing { abort: false }, E::Persisted(Phase::Incoming)) => {
                (S::Receiving, vec![Effect::StartWorker])
            }
            (S::Preparing { abort: true }, E::Persisted(Phase::Incoming)) => {
                self.saving(S::Dropping { epoch: self.handover.epoch })
            }
            (S::Receiving, E::WorkerReady(digest)) => {
                (S::Ready { digest }, vec![Effect::SendReady { epoch: self.handover.epoch, digest }])
            }
            (S::Receiving, E::LeaseExpired) => end(self.handover.epoch, true),
            (S::Entering { dead: false, .. }, E::Persisted(Phase::Entered)) => {
                (S::Granting, vec![Effect::Grant { epoch: decided, run: self.handover.run }])
            }
            // It died before it could be granted: nothing has run, and the source's copy is as new.
            (S::Entering { dead: true, .. }, E::Persisted(Phase::Entered)) => self.saving(S::Returning),
            // A later truth is in the journal; nothing was granted.
            (S::Entering { .. }, E::PersistRefused) => self.superseded(self.handover.returned()),
            (S::Granting, E::Granted) => {
                (S::Entered { dead: false }, vec![Effect::SendEntered { epoch: decided }])
            }
            (S::Granting, E::GrantFailed) => {
                (S::Granting, vec![Effect::Grant { epoch: decided, run: self.handover.run }])
            }
            (S::Entered { dead }, E::ReleasedReceived) => self.saving(S::Owning { dead }),
            (S::Owning { dead }, E::Persisted(Phase::Owned)) => {
                let outcome = if dead { Outcome::ArrivedDead } else { Outcome::Arrived };
                (S::Over(outcome), vec![Effect::Done(outcome)])
            }
            (S::Sealing, E::WorkerSealed) => self.saving(S::Returning),
            (S::Returning, E::Persisted(Phase::Returned)) => (
                S::Over(Outcome::Returned),
                vec![
                    Effect::SendReturned { epoch: self.handover.returned() },
                    Effect::EndWorker,
                    Effect::Done(Outcome::Returned),
                ],
            ),
            (S::Dropping { epoch }, E::Persisted(Phase::Aborted)) => (
                S::Over(Outcome::Dropped),
                vec![Effect::SendAborted { epoch }, Effect::Done(Outcome::Dropped)],
            ),
            (S::Yielding { epoch }, E::WorkerSealed) => self.saving(S::SavingSuperseded { epoch }),
            (S::SavingSuperseded { .. }, E::Persisted(Phase::Superseded)) => {
                (S::Over(Outcome::Superseded), vec![Effect::EndWorker, Effect::Done(Outcome::Superseded)])
            }
            (S::Forcing { epoch, copy: true }, E::Persisted(Phase::Owned)) => {
                (S::ForceGranting { epoch }, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            (S::Forcing { .. }, E::Persisted(Phase::Owned)) => {
                (S::Over(Outcome::ForcedDead), vec![Effect::EndWorker, Effect::Done(Outcome::ForcedDead)])
            }
            (S::ForceGranting { .. }, E::Granted) => {
                (S::Over(Outcome::Forced), vec![Effect::Done(Outcome::Forced)])
            }
            (S::ForceGranting { epoch }, E::GrantFailed) => {
                (self.state, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            // A write that is in doubt is repeated until it is durable.
            (state, E::PersistFailed) => (state, self.outstanding(state)),
            (state, _) => (state, vec![]),
        }
    }

    pub(super) fn worker_lost(&self, dead: bool) -> Step {
        use State as S;
        match self.state {
            S::Receiving if dead => {
                self.saving_with(S::Dropping { epoch: self.handover.epoch }, Effect::SendFailed)
            }
            S::Receiving => end(self.handover.epoch, true),
            S::Ready { .. } if dead => (S::CopyLost, vec![Effect::SendFailed, Effect::AskSource]),
            S::Entering { digest, .. } if dead => (S::Entering { digest, dead: true }, vec![]),
            S::Granting if dead => {
                (S::Entered { dead: true }, vec![Effect::SendEntered { epoch: self.handover.decided() }])
            }
            S::Entered { .. } if dead => (S::Entered { dead: true }, vec![]),
            S::Owning { .. } if dead => (S::Owning { dead: true }, vec![]),
            S::Sealing if dead => self.saving(S::Returning),
            S::Ending { epoch } if dead => self.saving(S::Dropping { epoch }),
            S::Yielding { epoch } if dead => self.saving(S::SavingSuperseded { epoch }),
            S::Forcing { epoch, .. } if dead => (S::Forcing { epoch, copy: false }, vec![]),
            S::ForceGranting { .. } if dead => {
                (S::Over(Outcome::ForcedDead), vec![Effect::Done(Outcome::ForcedDead)])
            }
            _ => (self.state, vec![]),
        }
    }
}
