//! What a host answers to Resolve about a migration of which it has no living machine: a total function of the record
//! that holds. With a living machine, ask `Source::answer` or `Destination::answer`.
//!
//! Invariant: the answer says nothing that a crash could take back; where the record tells nothing about the migration,
//! it is `Unknown`, which is no answer.

use super::{PeerAnswer, digest};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// The seat of the host that answers, in the migration that is asked about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Seat {
    /// It was its destination.
    Destination,
    /// It was its source, and this is what it came to.
    Source(Ended),
}

/// What a migration came to at its source.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Its record does not say.
    Open,
    /// The machine went.
    Moved,
    /// The machine stayed.
    Stayed,
}

/// A question.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// UUID of the migration.
    pub migration_id: &'a str,
    /// The source's epoch `e`; 0 if the asker did not say.
    pub epoch: u64,
    /// Who is asked.
    pub seat: Seat,
    /// Who asks.
    pub asker: &'a str,
}

impl PeerAnswer {
    /// The answer of the record that holds.
    pub fn from_record(held: Option<&OwnershipRecord>, asked: &Asked<'_>) -> Self {
        let Some(held) = held else { return Self::Unknown };
        if matches!(held.phase(), Phase::Uncertain | Phase::Unspecified) {
            return Self::Unknown;
        }
        // A directory that was fenced for the asker has nothing to tell it: it owns the machine once it is forced.
        if held.phase() == Phase::Superseded && !asked.asker.is_empty() && held.owner_host == asked.asker {
            return Self::Unknown;
        }
        // Force takes two epochs: whoever deals with that migration is overruled.
        let forced = asked.epoch > 0 && held.epoch > asked.epoch.saturating_add(1);
        if held.migration_id != asked.migration_id {
            return match asked.seat {
                Seat::Source(Ended::Stayed) if !forced => Self::Aborted,
                Seat::Source(_) => Self::Superseded(held.epoch),
                // What came after that migration came after its end: a start of the machine, or a later migration.
                Seat::Destination if asked.epoch > 0 && held.epoch > asked.epoch => {
                    Self::Superseded(held.epoch)
                }
                Seat::Destination => Self::Unknown,
            };
        }
        match held.phase() {
            // Without a living machine there is no copy that could be ready.
            Phase::Open | Phase::Quiesced | Phase::Committing | Phase::Incoming | Phase::Ready => {
                Self::Undecided
            }
            Phase::Owned if forced => Self::Superseded(held.epoch),
            Phase::Owned if matches!(asked.seat, Seat::Source(_)) => Self::Aborted,
            Phase::HandedOver | Phase::Released | Phase::Entered | Phase::Owned => {
                Self::Committed(digest(&held.digest))
            }
            Phase::Returned => Self::Returned,
            Phase::Aborted => Self::Aborted,
            Phase::Superseded | Phase::Deleted => Self::Superseded(held.epoch),
            Phase::Uncertain | Phase::Unspecified => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(phase: Phase, epoch: u64, migration: &str) -> OwnershipRecord {
        OwnershipRecord {
            epoch,
            migration_id: migration.into(),
            phase: phase.into(),
            ..OwnershipRecord::default()
        }
    }

    #[test]
    fn the_same_phase_means_different_things_at_the_two_ends() {
        let source = Asked { migration_id: "m", epoch: 4, seat: Seat::Source(Ended::Open), asker: "A" };
        let destination = Asked { seat: Seat::Destination, ..source };
        let answer = |h: &OwnershipRecord, asked| PeerAnswer::from_record(Some(h), asked);
        assert_eq!(answer(&held(Phase::Owned, 5, "m"), &source), PeerAnswer::Aborted);
        assert_eq!(answer(&held(Phase::Owned, 5, "m"), &destination), PeerAnswer::Committed(None));
        assert_eq!(answer(&held(Phase::Owned, 6, "m"), &destination), PeerAnswer::Superseded(6));
        assert_eq!(answer(&held(Phase::Owned, 6, "m"), &source), PeerAnswer::Superseded(6));
        assert_eq!(answer(&held(Phase::Ready, 4, "m"), &destination), PeerAnswer::Undecided);
        assert_eq!(answer(&held(Phase::Deleted, 5, "m"), &destination), PeerAnswer::Superseded(5));
        assert_eq!(PeerAnswer::from_record(None, &destination), PeerAnswer::Unknown);
        let stayed = Asked { seat: Seat::Source(Ended::Stayed), ..source };
        assert_eq!(answer(&held(Phase::Open, 5, "n"), &stayed), PeerAnswer::Aborted);
    }

    /// It entered there, was started again without its migration or went on, before its source had heard of it.
    #[test]
    fn what_came_after_a_migration_tells_that_it_is_over() {
        let asked = Asked { migration_id: "m", epoch: 4, seat: Seat::Destination, asker: "A" };
        for phase in [Phase::Owned, Phase::Open, Phase::HandedOver, Phase::Released, Phase::Deleted] {
            for migration in ["", "n"] {
                let answer = |epoch| PeerAnswer::from_record(Some(&held(phase, epoch, migration)), &asked);
                assert_eq!(answer(5), PeerAnswer::Superseded(5), "{phase:?} {migration:?}");
                assert_eq!(answer(4), PeerAnswer::Unknown, "{phase:?} {migration:?}");
            }
        }
        let silent = Asked { epoch: 0, ..asked };
        assert_eq!(PeerAnswer::from_record(Some(&held(Phase::Owned, 5, "")), &silent), PeerAnswer::Unknown);
        let fenced =
            |owner: &str| OwnershipRecord { owner_host: owner.into(), ..held(Phase::Superseded, 6, "m") };
        assert_eq!(PeerAnswer::from_record(Some(&fenced("C")), &asked), PeerAnswer::Superseded(6));
        assert_eq!(PeerAnswer::from_record(Some(&fenced("A")), &asked), PeerAnswer::Unknown);
        let lost = held(Phase::Uncertain, 5, "m");
        assert_eq!(PeerAnswer::from_record(Some(&lost), &asked), PeerAnswer::Unknown);
    }
}
