//! The record that each state waits for: the one place that says what it is, so that a repeated write is the same.

use super::{Destination, Effect, State, Step};
use vpmu_proto::store::ownership_record::Phase;

impl Destination {
    pub(super) fn saving(&self, state: State) -> Step {
        (state, self.outstanding(state))
    }

    pub(super) fn saving_with(&self, state: State, effect: Effect) -> Step {
        let mut effects = self.outstanding(state);
        effects.push(effect);
        (state, effects)
    }

    /// The record that a state waits for.
    pub(super) fn outstanding(&self, state: State) -> Vec<Effect> {
        use State as S;
        let h = &self.handover;
        let record = match state {
            S::Preparing { .. } => h.record(Phase::Incoming, h.epoch, &h.peer_host, None),
            S::Entering { digest, .. } => h.record(Phase::Entered, h.decided(), &h.host, Some(digest)),
            S::Owning { .. } => h.record(Phase::Owned, h.decided(), &h.host, None),
            S::Returning => h.record(Phase::Returned, h.returned(), &h.peer_host, None),
            S::Forcing { epoch, .. } => h.record(Phase::Owned, epoch, &h.host, None),
            S::Dropping { epoch } => h.record(Phase::Aborted, epoch, &h.peer_host, None),
            S::SavingSuperseded { epoch } => h.record(Phase::Superseded, epoch, &h.peer_host, None),
            _ => return vec![],
        };
        vec![Effect::Persist(record)]
    }
}
