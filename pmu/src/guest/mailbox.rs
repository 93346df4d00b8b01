//! How an evicted guest gets its values back.
//!
//! A load on one thread may evict a lazy resident whose [`super::GuestPmu`] belongs to another thread. The evicting
//! core reads the resident's counters and leaves them here; the resident takes them over before it looks at its image
//! again. One slot suffices: a guest is resident on one core at a time, and is not again before it took over. The slot
//! is made with the guest, so load and put allocate nothing.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::registers::{MAX_FIXED, MAX_GP};

/// What was read from hardware for one guest.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Readout {
    /// General-purpose counters that were read.
    pub(crate) gp_read: u64,
    /// Fixed counters that were read.
    pub(crate) fixed_read: u64,
    /// Their values.
    pub(crate) gp: [u64; MAX_GP],
    /// Their values.
    pub(crate) fixed: [u64; MAX_FIXED],
    /// Overflow bits of the guest's counters.
    pub(crate) status: u64,
}

/// One slot.
#[derive(Debug, Default)]
pub(crate) struct Mailbox {
    full: AtomicBool,
    slot: Mutex<Readout>,
}

impl Mailbox {
    /// Something waits.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.full.load(Ordering::Acquire)
    }

    /// Leaves a readout.
    pub(crate) fn leave(&self, readout: &Readout) {
        *self.slot.lock().unwrap_or_else(PoisonError::into_inner) = *readout;
        self.full.store(true, Ordering::Release);
    }

    /// Takes the readout, if one waits.
    pub(crate) fn take(&self) -> Option<Readout> {
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        self.full.swap(false, Ordering::AcqRel).then_some(*slot)
    }

    /// Looks at the readout, if one waits.
    pub(crate) fn peek(&self) -> Option<Readout> {
        let slot = self.slot.lock().unwrap_or_else(PoisonError::into_inner);
        self.full.load(Ordering::Acquire).then_some(*slot)
    }
}
