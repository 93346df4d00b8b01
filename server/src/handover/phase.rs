//! Which ownership record may follow which: the last guard before the journal, so that no bug above it can write two
//! decisions for one epoch or go back in time.
//!
//! ```text
//!  source       Owned(e) ─▶ Open(e) ─▶ Quiesced(e) ─▶ [Committing(e)] ─▶ HandedOver(e+1) ─▶ Released(e+1)
//!                  ▲           │            │                 │                 │ Returned received
//!                  └───────────┴──── abort: Owned(e+1) ───────┘                 ▼
//!                  ◀───────────────────────────────────────────────────── Owned(e+2)
//!  destination  Incoming(e) ─▶ [Ready(e)] ─▶ Entered(e+1) ─▶ Owned(e+1)
//!                  │               ├─▶ Aborted(e or e+1)
//!                  └───────────────┴─▶ Returned(e+2) ◀─ Entered(e+1), never granted
//! ```

use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// Why a record may not follow.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The epoch would go back.
    #[error("{vm_uid}: epoch {next:?} after {held:?}")]
    StaleEpoch {
        /// The machine.
        vm_uid: String,
        /// Epoch that holds.
        held: u64,
        /// Epoch that was to follow.
        next: u64,
    },
    /// No such step.
    #[error("{vm_uid}: {next:?} at epoch {next_epoch} may not follow {held:?} at epoch {held_epoch}")]
    Step {
        /// The machine.
        vm_uid: String,
        /// Phase that holds; unspecified for none.
        held: Phase,
        /// Its epoch.
        held_epoch: u64,
        /// Phase that was to follow.
        next: Phase,
        /// Its epoch.
        next_epoch: u64,
    },
}

impl Refusal {
    /// A stable code for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::StaleEpoch { .. } => "STALE_EPOCH",
            Self::Step { .. } => "OWNERSHIP_STEP",
        }
    }
}

/// A migration of the machine is not over: nothing but that migration may change who owns it.
pub fn is_open(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Open
            | Phase::Quiesced
            | Phase::Committing
            | Phase::HandedOver
            | Phase::Incoming
            | Phase::Ready
    )
}

/// The host that wrote this record may run the machine at the record's epoch.
pub fn may_run(phase: Phase) -> bool {
    matches!(phase, Phase::Owned | Phase::Open | Phase::Entered)
}

/// Whether `next` may follow `held` in one host's journal.
///
/// # Errors
/// [`Refusal`] naming both.
pub fn may_follow(held: Option<&OwnershipRecord>, next: &OwnershipRecord) -> Result<(), Refusal> {
    let (phase, epoch) = held.map_or((Phase::Unspecified, 0), |h| (h.phase(), h.epoch));
    if next.epoch < epoch {
        return Err(Refusal::StaleEpoch { vm_uid: next.vm_uid.clone(), held: epoch, next: next.epoch });
    }
    let delta = next.epoch - epoch;
    let same_migration = held.is_some_and(|h| h.migration_id == next.migration_id);
    use Phase as P;
    let allowed = match (phase, next.phase()) {
        (_, P::Unspecified) => false,
        // Of an unsettled machine nothing is written but by force, which takes two epochs, or by giving it up.
        (P::Uncertain, P::Superseded | P::Deleted | P::Uncertain) => true,
        (P::Uncertain, _) => delta >= 2,
        (_, P::Uncertain | P::Superseded) => true,
        (P::Unspecified, P::Owned | P::Incoming) => next.epoch >= 1,
        // The same state again: another incarnation, or a repeated write.
        (a, b) if a == b && delta == 0 => same_migration || matches!(a, P::Owned | P::Incoming | P::Aborted),
        (P::Owned, P::Owned | P::Open) => delta == 0 || next.phase() == P::Owned,
        (P::Entered, P::Owned | P::Open) => delta == 0 || (next.phase() == P::Owned && delta >= 2),
        (P::Owned | P::Entered, P::Deleted) => true,
        (P::Open, P::Quiesced) | (P::Quiesced, P::Committing) => delta == 0 && same_migration,
        (P::Quiesced | P::Committing, P::HandedOver) => delta == 1 && same_migration,
        (P::Open | P::Quiesced | P::Committing, P::Owned) => delta >= 1,
        (P::HandedOver, P::Released) => delta == 0 && same_migration,
        (P::HandedOver, P::Owned) => (delta == 1 && same_migration) || delta >= 2,
        (P::Incoming, P::Ready) => delta == 0 && same_migration,
        (P::Incoming | P::Ready, P::Entered) => delta == 1 && same_migration,
        (P::Incoming | P::Ready, P::Aborted) => delta <= 1 && same_migration,
        (P::Incoming | P::Ready, P::Returned) => delta == 2 && same_migration,
        // Entered, and its worker had died before it was granted.
        (P::Entered, P::Returned) => delta == 1 && same_migration,
        (P::Incoming | P::Ready, P::Owned) => delta >= 2,
        (P::Released | P::Aborted | P::Returned | P::Superseded | P::Deleted, P::Incoming) => true,
        (P::Released | P::Aborted | P::Returned | P::Superseded, P::Deleted) => true,
        (P::Released | P::Aborted | P::Returned | P::Superseded, P::Owned) => delta >= 2,
        _ => false,
    };
    if allowed {
        return Ok(());
    }
    Err(Refusal::Step {
        vm_uid: next.vm_uid.clone(),
        held: phase,
        held_epoch: epoch,
        next: next.phase(),
        next_epoch: next.epoch,
    })
}
