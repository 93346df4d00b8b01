//! What a daemon does at start, for each machine: a total function of the journal's record and the worker's condition
//! (the table of handover.md section 3). Nothing is done that is not in this table.

use super::Digest;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// A worker as a starting daemon finds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Worker {
    /// Proven dead: its exit was seen, its cgroup is empty, or the machine has another boot id. A daemon whose workers
    /// are threads has only dead ones at start.
    Dead,
    /// It did not answer: not known to be dead.
    Unreachable,
    /// vCPUs run under a grant of this epoch.
    Running {
        /// The grant's epoch.
        epoch: u64,
    },
    /// vCPUs are out of the guest; the last grant had this epoch, 0 for none.
    Paused {
        /// The grant's epoch.
        epoch: u64,
    },
    /// Sealed up to this epoch, with its copy.
    Sealed {
        /// The sealed epoch.
        epoch: u64,
    },
    /// A destination that has not everything.
    Receiving,
    /// A destination that only lacks the grant.
    Complete {
        /// Digest of its state.
        digest: Digest,
    },
    /// The guest ended by itself; the worker waits to be collected.
    Ended,
}

/// What is known of the store beside the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Records {
    /// The worker was started from this store, and the journal is whole.
    Whole,
    /// The journal has lost records.
    Holed,
    /// The store was imported; the worker belongs to another store's life.
    Imported,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Action {
    /// Nothing is running and nothing should be by itself: moved, given back, dropped or deleted.
    Rest,
    /// It runs rightly: attach and go on.
    Adopt,
    /// It may run: grant this epoch. `run` as the user wants.
    Grant {
        /// Epoch of the grant.
        epoch: u64,
    },
    /// It is owned here and its worker is dead: Failed with the reason, then the restart policy.
    Fail,
    /// Go on as the source: [`super::source::Source::recovered`].
    ResumeSource,
    /// Go on as the destination: [`super::destination::Destination::recovered`].
    ResumeDestination,
    /// A worker runs what was handed over: end it, raise a critical event, then go on as the source.
    EndRunaway,
    /// End a worker whose machine is not (or no longer) here.
    EndWorker,
    /// Records were lost: seal the worker and leave the machine Uncertain.
    SealUncertain,
    /// Leave it Uncertain: neither start nor end anything.
    LeaveUncertain,
    /// Keep the worker and list it as Unadopted.
    KeepUnadopted,
    /// The worker's condition must be known first: go on asking, start nothing.
    AwaitWorker,
}

/// The table. `record` is the one that holds, `None` if the journal knows no such machine.
pub fn decide(record: Option<&OwnershipRecord>, worker: Worker, records: Records) -> Action {
    let Some(record) = record else {
        return match (records, worker) {
            (_, Worker::Dead) => Action::Rest,
            (Records::Imported, _) => Action::KeepUnadopted,
            (Records::Holed, _) => Action::LeaveUncertain,
            (Records::Whole, _) => Action::EndWorker,
        };
    };
    match record.phase() {
        Phase::Uncertain | Phase::Unspecified => Action::LeaveUncertain,
        Phase::Owned => owned(record.epoch, worker),
        Phase::Open | Phase::Quiesced | Phase::Committing => migrating_out(record.epoch, worker),
        Phase::HandedOver => match worker {
            Worker::Unreachable => Action::AwaitWorker,
            Worker::Running { epoch } if epoch > record.epoch => Action::SealUncertain,
            Worker::Running { .. } => Action::EndRunaway,
            _ => Action::ResumeSource,
        },
        Phase::Incoming | Phase::Ready => match worker {
            Worker::Unreachable => Action::AwaitWorker,
            // It has run without Entered: the record was lost.
            Worker::Running { .. } => Action::SealUncertain,
            Worker::Paused { epoch } if epoch > 0 => Action::SealUncertain,
            _ => Action::ResumeDestination,
        },
        Phase::Entered => match worker {
            Worker::Unreachable => Action::AwaitWorker,
            Worker::Running { epoch } | Worker::Paused { epoch } | Worker::Sealed { epoch }
                if epoch > record.epoch =>
            {
                Action::SealUncertain
            }
            Worker::Sealed { epoch } if epoch == record.epoch => Action::SealUncertain,
            Worker::Sealed { .. } => Action::Grant { epoch: record.epoch },
            // Entered without a whole copy cannot have been written.
            Worker::Receiving => Action::SealUncertain,
            _ => Action::ResumeDestination,
        },
        Phase::Released | Phase::Returned | Phase::Aborted | Phase::Superseded | Phase::Deleted => {
            match worker {
                Worker::Dead => Action::Rest,
                Worker::Unreachable => Action::AwaitWorker,
                Worker::Running { epoch } if epoch > record.epoch => Action::SealUncertain,
                _ => Action::EndWorker,
            }
        }
    }
}

fn owned(owned: u64, worker: Worker) -> Action {
    match worker {
        Worker::Dead | Worker::Ended => Action::Fail,
        Worker::Unreachable => Action::AwaitWorker,
        Worker::Running { epoch } | Worker::Paused { epoch } if epoch > owned => Action::SealUncertain,
        Worker::Running { epoch } if epoch == owned => Action::Adopt,
        // The right was raised by an abort or a return and the worker has not heard of it.
        Worker::Running { .. } => Action::Grant { epoch: owned },
        Worker::Paused { epoch } if epoch == owned => Action::Adopt,
        Worker::Paused { .. } => Action::Grant { epoch: owned },
        Worker::Sealed { epoch } if epoch < owned => Action::Grant { epoch: owned },
        Worker::Sealed { .. } => Action::SealUncertain,
        // A copy that never arrived as a whole, of a machine that is owned here: not the machine.
        Worker::Receiving => Action::SealUncertain,
        // Complete and owned: Released was recorded before the grant was seen to be given.
        Worker::Complete { .. } => Action::Grant { epoch: owned },
    }
}

fn migrating_out(held: u64, worker: Worker) -> Action {
    match worker {
        Worker::Unreachable => Action::AwaitWorker,
        Worker::Running { epoch } | Worker::Paused { epoch } | Worker::Sealed { epoch } if epoch > held => {
            Action::SealUncertain
        }
        _ => Action::ResumeSource,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(phase: Phase, epoch: u64) -> OwnershipRecord {
        OwnershipRecord { epoch, phase: phase.into(), ..OwnershipRecord::default() }
    }

    /// The table as it stands in handover.md, at epoch 5.
    #[test]
    fn the_rows_of_the_table() {
        use Action as A;
        use Phase as P;
        use Worker as W;
        let complete = W::Complete { digest: [1; 32] };
        let rows = [
            (P::HandedOver, W::Paused { epoch: 4 }, A::ResumeSource),
            (P::HandedOver, W::Sealed { epoch: 4 }, A::ResumeSource),
            (P::HandedOver, W::Running { epoch: 4 }, A::EndRunaway),
            (P::HandedOver, W::Running { epoch: 5 }, A::EndRunaway),
            (P::HandedOver, W::Dead, A::ResumeSource),
            (P::Quiesced, W::Sealed { epoch: 5 }, A::ResumeSource),
            (P::Quiesced, W::Paused { epoch: 5 }, A::ResumeSource),
            (P::Quiesced, W::Dead, A::ResumeSource),
            (P::Owned, W::Running { epoch: 5 }, A::Adopt),
            (P::Owned, W::Running { epoch: 6 }, A::SealUncertain),
            (P::Owned, W::Sealed { epoch: 4 }, A::Grant { epoch: 5 }),
            (P::Owned, W::Dead, A::Fail),
            (P::Incoming, complete, A::ResumeDestination),
            (P::Ready, complete, A::ResumeDestination),
            (P::Incoming, W::Dead, A::ResumeDestination),
            (P::Entered, W::Paused { epoch: 5 }, A::ResumeDestination),
            (P::Entered, W::Dead, A::ResumeDestination),
            (P::Uncertain, W::Running { epoch: 5 }, A::LeaveUncertain),
        ];
        for (phase, worker, action) in rows {
            assert_eq!(
                decide(Some(&record(phase, 5)), worker, Records::Whole),
                action,
                "{phase:?} {worker:?}"
            );
        }
        assert_eq!(decide(None, W::Running { epoch: 1 }, Records::Whole), A::EndWorker);
        assert_eq!(decide(None, W::Running { epoch: 1 }, Records::Imported), A::KeepUnadopted);
        assert_eq!(decide(None, W::Running { epoch: 1 }, Records::Holed), A::LeaveUncertain);
    }

    /// Every cell: nothing unreachable is acted upon, nothing runs without a record of this host's ownership, and where
    /// the table says to go on there is a machine that does.
    #[test]
    fn every_cell_is_sound() {
        use crate::handover::{Handover, destination::Destination, source::Source};
        let workers = |e: u64| {
            [e - 1, e, e + 1]
                .into_iter()
                .flat_map(|epoch| {
                    [Worker::Running { epoch }, Worker::Paused { epoch }, Worker::Sealed { epoch }]
                })
                .chain([Worker::Dead, Worker::Unreachable, Worker::Receiving, Worker::Ended])
                .chain([Worker::Complete { digest: [3; 32] }, Worker::Paused { epoch: 0 }])
        };
        for phase in (0..=14).filter_map(|n| Phase::try_from(n).ok()) {
            for worker in workers(5) {
                let record = record(phase, 5);
                let action = decide(Some(&record), worker, Records::Whole);
                let cell = format!("{phase:?} {worker:?}: {action:?}");
                let owner = matches!(phase, Phase::Owned | Phase::Entered);
                if matches!(action, Action::Adopt | Action::Grant { .. }) {
                    assert!(owner, "{cell}");
                }
                if worker == Worker::Unreachable {
                    assert!(matches!(action, Action::AwaitWorker | Action::LeaveUncertain), "{cell}");
                }
                if matches!(worker, Worker::Running { epoch: 6 }) {
                    let alarmed = [Action::SealUncertain, Action::LeaveUncertain];
                    assert!(alarmed.contains(&action), "{cell}");
                }
                let handover = Handover::of(&record, "here", true);
                match action {
                    Action::ResumeSource => {
                        assert!(Source::recovered(handover, &record, worker).is_some(), "{cell}");
                    }
                    Action::ResumeDestination => {
                        assert!(Destination::recovered(handover, &record, worker).is_some(), "{cell}");
                    }
                    _ => {}
                }
            }
        }
    }
}
