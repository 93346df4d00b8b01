//! The destination after a restart of its daemon in the middle of a migration.
//!
//! Invariant: what may have been promised by Ready is kept: then only the source knows whether it has committed, and it
//! is asked. A copy that was never complete was never promised.

use super::super::Handover;
use super::super::recovery::Worker;
use super::{Destination, Effect, State, end};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

impl Destination {
    /// A migration in the middle of which the daemon was restarted, by the record that holds and the worker's
    /// condition, with the first effects. `None` where [`crate::handover::recovery::decide`] says something else than
    /// going on.
    pub fn recovered(
        handover: Handover,
        record: &OwnershipRecord,
        worker: Worker,
    ) -> Option<(Self, Vec<Effect>)> {
        let mut machine = Self::new(handover);
        let epoch = machine.handover.decided();
        let (state, effects) = match (record.phase(), worker) {
            (_, Worker::Unreachable) => return None,
            (Phase::Incoming | Phase::Ready, Worker::Complete { digest }) => {
                (State::Ready { digest }, vec![Effect::AskSource])
            }
            // Ready may have been promised before the worker died: only the source knows whether it has committed.
            (Phase::Incoming | Phase::Ready, Worker::Dead | Worker::Sealed { .. }) => {
                (State::CopyLost, vec![Effect::AskSource])
            }
            // Nor is there anything else to do if its guest ended before it ran, for want of memory that was to follow.
            (Phase::Incoming | Phase::Ready, Worker::Ended) => {
                (State::CopyLost, vec![Effect::EndWorker, Effect::AskSource])
            }
            (Phase::Incoming | Phase::Ready, Worker::Receiving | Worker::Paused { epoch: 0 }) => {
                end(machine.handover.epoch, false)
            }
            (Phase::Entered, Worker::Dead | Worker::Ended) => {
                (State::Entered { dead: true }, vec![Effect::SendEntered { epoch }])
            }
            (Phase::Entered, Worker::Running { epoch: at }) if at <= epoch => {
                (State::Entered { dead: false }, vec![Effect::SendEntered { epoch }])
            }
            (Phase::Entered, Worker::Complete { .. } | Worker::Paused { .. }) => {
                (State::Granting, vec![Effect::Grant { epoch, run: machine.handover.run }])
            }
            _ => return None,
        };
        machine.state = state;
        Some((machine, effects))
    }
}
