//! What a live worker in a migration is worth, by the journal's phase and by what it says: rows of the table at the head
//! of [`super`], as a total function.

use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{WorkerStatus, worker_status};

/// What to do with a worker in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worth {
    /// It has a copy that may be, or become, the machine: kept.
    Copy,
    /// Its guest has ended before anything was decided: its machine's task shows how.
    Ended,
    /// It runs what was handed over: ended.
    Runaway,
    /// It was granted what the journal does not know: sealed, Uncertain.
    Unrecorded,
    /// Nothing that could run: ended.
    Nothing,
}

/// Of a source's worker from Quiesced on, and of a destination's before Entered.
pub fn worth(phase: Phase, status: &WorkerStatus) -> Worth {
    use worker_status::State as S;
    let arriving = matches!(phase, Phase::Incoming | Phase::Ready);
    match status.state() {
        // A copy that is complete was perhaps promised; one that is not is of no use.
        _ if arriving && status.granted_epoch > 0 => Worth::Unrecorded,
        S::Ready if arriving => Worth::Copy,
        _ if arriving => Worth::Nothing,
        S::Running | S::Ended if phase == Phase::Quiesced => {
            if status.state() == S::Ended {
                Worth::Ended
            } else {
                Worth::Copy
            }
        }
        S::Running => Worth::Runaway,
        S::Paused | S::Sealed => Worth::Copy,
        S::Ended | S::Empty | S::Incoming | S::Ready | S::Unspecified => Worth::Nothing,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use worker_status::State as S;

    #[test]
    fn the_rows_of_the_table() {
        let worth = |phase, state: S, granted_epoch| {
            worth(phase, &WorkerStatus { state: state.into(), granted_epoch, ..WorkerStatus::default() })
        };
        let rows = [
            (Phase::Quiesced, S::Running, 4, Worth::Copy),
            (Phase::Quiesced, S::Sealed, 0, Worth::Copy),
            (Phase::Quiesced, S::Ended, 4, Worth::Ended),
            (Phase::Quiesced, S::Incoming, 0, Worth::Nothing),
            (Phase::HandedOver, S::Sealed, 0, Worth::Copy),
            (Phase::HandedOver, S::Paused, 4, Worth::Copy),
            (Phase::HandedOver, S::Running, 4, Worth::Runaway),
            (Phase::HandedOver, S::Ended, 0, Worth::Nothing),
            (Phase::Committing, S::Sealed, 0, Worth::Copy),
            (Phase::Ready, S::Ready, 0, Worth::Copy),
            (Phase::Incoming, S::Ready, 0, Worth::Copy),
            (Phase::Incoming, S::Incoming, 0, Worth::Nothing),
            (Phase::Incoming, S::Running, 5, Worth::Unrecorded),
            (Phase::Ready, S::Ready, 5, Worth::Unrecorded),
        ];
        for (phase, state, granted, what) in rows {
            assert_eq!(worth(phase, state, granted), what, "{phase:?} {state:?}");
        }
    }
}
