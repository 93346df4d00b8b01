//! The dirty ring of a vCPU (KVM_CAP_DIRTY_LOG_RING): a shared array in which KVM notes each page that the vCPU dirties.
//!
//! KVM owns an entry until it sets bit 0 of its flags; user space reads it then and sets bit 1, upon which
//! KVM_RESET_DIRTY_RINGS takes it back and protects the page again.
//!
//! Invariant: `base..base+entries` is mapped from `map` to drop; entries are accessed by atomics only.

use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use kvm_bindings::*;

use super::{ioc, last_os};
use crate::hypervisor::HvError;

/// Bytes of an entry.
const ENTRY: usize = 16;
const DIRTY: u32 = 1;
const RESET: u32 = 2;
const KVM_RESET_DIRTY_RINGS: libc::c_ulong = ioc(0, 0xc7, 0);

const _: () = {
    assert!(KVM_RESET_DIRTY_RINGS == 0xaec7);
    assert!(size_of::<kvm_dirty_gfn>() == ENTRY);
    assert!(
        std::mem::offset_of!(kvm_dirty_gfn, slot) == 4 && std::mem::offset_of!(kvm_dirty_gfn, offset) == 8
    );
};

/// A mapped ring.
pub(crate) struct Ring {
    base: NonNull<u8>,
    entries: u32,
    next: u32,
}

// SAFETY: the mapping is not tied to a thread; all access is by atomics.
unsafe impl Send for Ring {}

impl Ring {
    /// Maps the ring of a vCPU; `entries` is what the VM was given.
    pub(crate) fn map(vcpu: &impl AsRawFd, entries: u32) -> Result<Self, HvError> {
        let offset = libc::off_t::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a new shared mapping at an address of the kernel's choice; checked below.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                entries as usize * ENTRY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                vcpu.as_raw_fd(),
                offset,
            )
        };
        match NonNull::new(base.cast::<u8>()) {
            Some(base) if base.as_ptr().cast() != libc::MAP_FAILED => Ok(Self { base, entries, next: 0 }),
            _ => Err(last_os("mmap of the dirty ring")),
        }
    }

    /// Takes every entry that is there: (slot, page within the slot). Returns how many.
    pub(crate) fn harvest(&mut self, mut each: impl FnMut(u32, u64)) -> u32 {
        let mut taken = 0;
        while taken < self.entries {
            let at = (self.next % self.entries) as usize * ENTRY;
            // SAFETY: inside the mapping, which is aligned to a page, for as long as self lives; KVM writes the flags
            // after the rest (release), and does not touch an entry again before it was reset.
            let (flags, slot, offset) = unsafe {
                let entry = self.base.as_ptr().add(at);
                (
                    AtomicU32::from_ptr(entry.cast()),
                    AtomicU32::from_ptr(entry.add(4).cast()),
                    AtomicU64::from_ptr(entry.add(8).cast()),
                )
            };
            if flags.load(Ordering::Acquire) & (DIRTY | RESET) != DIRTY {
                break;
            }
            each(slot.load(Ordering::Relaxed), offset.load(Ordering::Relaxed));
            flags.store(RESET, Ordering::Release);
            self.next = self.next.wrapping_add(1);
            taken += 1;
        }
        taken
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `map`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.entries as usize * ENTRY) };
    }
}

/// Gives harvested entries of all rings back to KVM and protects their pages again.
pub(crate) fn reset(vm: &impl AsRawFd) -> Result<(), HvError> {
    // SAFETY: takes no argument; KVM touches its rings and page tables only.
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_RESET_DIRTY_RINGS, 0) };
    if ret < 0 { Err(last_os("KVM_RESET_DIRTY_RINGS")) } else { Ok(()) }
}
