//! Records that their phase alone tells, and the repeated write of whichever record is in doubt.
//!
//! Invariant: a repeated record is the same one. The state that waits for it tells all of it.

use super::{Effect, Event, Source, State, Step};
use vpmu_proto::store::ownership_record::Phase;

impl Source {
    pub(super) fn persist(&self, phase: Phase) -> Vec<Effect> {
        let h = &self.handover;
        let record = match phase {
            Phase::Released => h.record(phase, h.decided(), &h.peer_host, None),
            Phase::Uncertain => h.record(phase, h.decided(), "", None),
            _ => h.record(phase, h.epoch, &h.host, None),
        };
        vec![Effect::Persist(record)]
    }

    /// A write that is in doubt is repeated until it is durable; everything else changes nothing.
    pub(super) fn repeat(&self, event: Event) -> Step {
        let effects = if event == Event::PersistFailed { self.outstanding() } else { vec![] };
        (self.state, effects)
    }

    /// The record that the present state waits for.
    fn outstanding(&self) -> Vec<Effect> {
        use State as S;
        let h = &self.handover;
        match self.state {
            S::Opening { .. } => self.persist(Phase::Open),
            S::Quiescing { .. } => self.persist(Phase::Quiesced),
            S::Committing { digest, .. } => {
                vec![Effect::Persist(h.record(Phase::HandedOver, h.decided(), &h.peer_host, Some(digest)))]
            }
            S::SavingReleased => self.persist(Phase::Released),
            S::Forcing { epoch, .. } => vec![Effect::Persist(h.record(Phase::Owned, epoch, &h.host, None))],
            S::Aborting { .. } => vec![Effect::Persist(h.record(Phase::Owned, h.decided(), &h.host, None))],
            S::TakingBack { .. } => {
                vec![Effect::Persist(h.record(Phase::Owned, h.returned(), &h.host, None))]
            }
            S::SavingSuperseded { epoch } => {
                vec![Effect::Persist(h.record(Phase::Superseded, epoch, &h.peer_host, None))]
            }
            S::SavingUncertain => self.persist(Phase::Uncertain),
            _ => vec![],
        }
    }
}
