//! Stacks for threads of vCPUs, many to one mapping.
//!
//! The kernel locks each mapping of a process when that process makes a VM (`mm_take_all_locks`), and whoever makes or
//! changes a mapping holds up all others that do: with hundreds of machines in one process that is most of what a new
//! one costs. A thread of std has four mappings (stack, signal stack, a guard each); of these stacks sixteen have one.
//!
//! Invariants: a slot belongs to one [`Stack`] at a time; its lowest pages fault when touched, so that a stack that is
//! too deep ends the process and does not reach its neighbour; what a thread left on its stack is gone before another
//! gets it. Blocks are never unmapped: there are as many as were once needed at the same time.

use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// Usable and guarded bytes of one stack: as many as a thread of std has.
const SLOT: usize = 2 << 20;
/// Of them guarded: more than any frame that is not probed.
const GUARD: usize = 64 << 10;
/// Slots of one mapping.
const BLOCK: usize = 16;

/// Linux 6.13: pages that fault, without a mapping of their own.
const MADV_GUARD_INSTALL: libc::c_int = 102;

/// Slots that nobody has.
static FREE: Mutex<Vec<Slot>> = Mutex::new(Vec::new());

/// Lowest address of a slot.
struct Slot(NonNull<u8>);

// SAFETY: an address of memory that is never unmapped and that only the owner of the value uses.
unsafe impl Send for Slot {}

/// A stack that no other thread has.
pub(super) struct Stack(Slot);

impl Stack {
    /// Takes one, if need be of a new mapping.
    pub(super) fn take() -> std::io::Result<Self> {
        let mut free = FREE.lock().unwrap_or_else(PoisonError::into_inner);
        if free.is_empty() {
            *free = map()?;
        }
        free.pop().map(Self).ok_or_else(|| std::io::ErrorKind::OutOfMemory.into())
    }

    /// Lowest address of what may be used, and its size.
    pub(super) fn usable(&self) -> (*mut libc::c_void, usize) {
        (self.0.0.as_ptr().wrapping_add(GUARD).cast(), SLOT - GUARD)
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        let (at, size) = self.usable();
        // SAFETY: the whole pages of this slot, which no thread runs on: who has the value knows that its thread has
        // ended. They read as zeroes afterwards.
        let cleared = unsafe { libc::madvise(at, size, libc::MADV_DONTNEED) } == 0;
        if cleared {
            let slot = Slot(self.0.0);
            FREE.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        } else {
            // Not used again.
            tracing::warn!(error = %std::io::Error::last_os_error(), "a thread's stack could not be cleared");
        }
    }
}

fn map() -> std::io::Result<Vec<Slot>> {
    // SAFETY: a new private mapping at an address of the kernel's choice; checked below.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            BLOCK * SLOT,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    let slots: Vec<Slot> =
        (0..BLOCK).filter_map(|n| NonNull::new(base.cast::<u8>().wrapping_add(n * SLOT))).map(Slot).collect();
    for slot in &slots {
        if let Err(error) = guard(slot) {
            // SAFETY: the mapping made above; nobody has any of it yet.
            unsafe { libc::munmap(base, BLOCK * SLOT) };
            return Err(error);
        }
    }
    Ok(slots)
}

/// Makes the lowest pages of a slot fault. Kernels before 6.13 need a mapping of its own for that.
fn guard(slot: &Slot) -> std::io::Result<()> {
    let at = slot.0.as_ptr().cast();
    // SAFETY: whole pages of a mapping that was just made and that nobody uses.
    let done = unsafe {
        libc::madvise(at, GUARD, MADV_GUARD_INSTALL) == 0 || libc::mprotect(at, GUARD, libc::PROT_NONE) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
