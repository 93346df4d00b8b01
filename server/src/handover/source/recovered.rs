//! The source after a restart of its daemon in the middle of a migration.
//!
//! Invariant: nothing that the former daemon may have promised is taken back. A migration that is only
//! open is aborted; from Quiesced on the destination is asked first. With HandedOver the worker is sealed again, and Go
//! is repeated without waiting for that: HandedOver is written only after the worker's seal, which is for good, or its
//! proven death.

use super::super::Handover;
use super::super::recovery::Worker;
use super::{Cause, Effect, Source, State};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

impl Source {
    /// A migration in the middle of which the daemon was restarted, by the record that holds and the worker's
    /// condition, with the first effects. `None` where [`crate::handover::recovery::decide`] says something else than
    /// going on.
    pub fn recovered(
        handover: Handover,
        record: &OwnershipRecord,
        worker: Worker,
    ) -> Option<(Self, Vec<Effect>)> {
        let mut machine = Self::new(handover);
        let dead = match worker {
            Worker::Unreachable => return None,
            Worker::Dead => true,
            _ => false,
        };
        let (state, effects) = match record.phase() {
            Phase::Open if dead => machine.abort(Cause::WorkerDied, true),
            Phase::Open => machine.abort(Cause::Restarted, false),
            Phase::Quiesced | Phase::Committing => (State::Resolving { dead }, vec![Effect::AskPeer]),
            Phase::HandedOver => {
                // A commit whose digest cannot be read matches no copy, so the destination gives the machine back.
                let digest = super::super::digest(&record.digest).unwrap_or_default();
                let (entered, drained) = (false, false);
                let state = State::HandedOver { digest, pmu: true, dead, entered, drained };
                let seal = (!dead).then_some(Effect::SealWorker { epoch: machine.handover.epoch });
                (state, seal.into_iter().chain([Effect::AskPeer]).collect())
            }
            _ => return None,
        };
        machine.state = state;
        Some((machine, effects))
    }
}
