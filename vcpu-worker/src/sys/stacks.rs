//! Stacks for threads of vCPUs, many to one mapping.
//!
//! The kernel locks each mapping of a process when that process makes a VM (`mm_take_all_locks`), and whoever makes or
//! changes a mapping holds up all others that do: with hundreds of machines in one process that is most of what a new
//! one costs. A thread of std has four mappings (stack, signal stack, a guard each); of these stacks up to sixteen have
//! one. Before Linux 6.13 each has one more, because a guard is a mapping there.
//!
//! Invariants: a slot belongs to one [`Stack`] at a time; its lowest pages fault when touched, so that a stack that is
//! too deep ends the process and does not reach its neighbour; what a thread left on its stack is gone before another
//! gets it. Blocks are never unmapped: there are as many as were once needed at the same time.

use std::ptr::NonNull;
use std::sync::{Mutex, PoisonError};

/// Bytes of one stack with its guard: what a thread of std has without.
const SLOT: usize = 2 << 20;
/// Of them guarded: more than any frame that is not probed.
const GUARD: usize = 64 << 10;
/// Slots of one mapping at most. The first has one, each next twice as many: a process of one machine needs few.
const MOST: usize = 16;

/// Linux 6.13: pages that fault, without a mapping of their own.
const MADV_GUARD_INSTALL: libc::c_int = 102;

static POOL: Mutex<Pool> = Mutex::new(Pool { free: Vec::new(), fresh: Vec::new(), next: 1 });

struct Pool {
    /// Slots that somebody had.
    free: Vec<Slot>,
    /// Slots that nobody had yet, and that have no guard.
    fresh: Vec<Slot>,
    /// Slots of the next mapping.
    next: usize,
}

/// Lowest address of a slot.
struct Slot(NonNull<u8>);

// SAFETY: an address of memory that is never unmapped and that only the owner of the value uses.
unsafe impl Send for Slot {}

/// A stack that no other thread has.
pub(super) struct Stack(Slot);

impl Stack {
    /// Takes one, if need be of a new mapping.
    pub(super) fn take() -> std::io::Result<Self> {
        let mut pool = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = pool.free.pop() {
            return Ok(Self(slot));
        }
        if pool.fresh.is_empty() {
            pool.fresh = map(pool.next)?;
            pool.next = MOST.min(pool.next * 2);
        }
        let slot = pool.fresh.pop().ok_or(std::io::ErrorKind::OutOfMemory)?;
        if let Err(error) = guard(&slot) {
            pool.fresh.push(slot);
            return Err(error);
        }
        Ok(Self(slot))
    }

    /// Lowest address of what may be used, and its size.
    pub(super) fn usable(&self) -> (*mut libc::c_void, usize) {
        (self.0.0.as_ptr().wrapping_add(GUARD).cast(), SLOT - GUARD)
    }

    /// What a thread left there is gone: it reads as zeroes.
    fn clear(&mut self) -> std::io::Result<()> {
        let (at, size) = self.usable();
        // SAFETY: whole pages of this slot, which no thread runs on: who has the value knows that its thread has ended.
        if unsafe { libc::madvise(at, size, libc::MADV_DONTNEED) } == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        match self.clear() {
            Ok(()) => POOL.lock().unwrap_or_else(PoisonError::into_inner).free.push(Slot(self.0.0)),
            Err(error) => {
                tracing::warn!(%error, "a thread's stack could not be cleared and is not used again");
            }
        }
    }
}

fn map(slots: usize) -> std::io::Result<Vec<Slot>> {
    // SAFETY: a new private mapping at an address of the kernel's choice; checked below.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            slots * SLOT,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(std::io::Error::last_os_error());
    }
    // From the lowest to the highest: the last is taken first.
    let each = (0..slots).filter_map(|n| NonNull::new(base.cast::<u8>().wrapping_add(n * SLOT)));
    Ok(each.map(Slot).collect())
}

/// Makes the lowest pages of a slot fault. Kernels before 6.13 need a mapping of its own for that.
fn guard(slot: &Slot) -> std::io::Result<()> {
    let at = slot.0.as_ptr().cast();
    // SAFETY: whole pages of a slot that nobody has had yet.
    let done = unsafe {
        libc::madvise(at, GUARD, MADV_GUARD_INSTALL) == 0 || libc::mprotect(at, GUARD, libc::PROT_NONE) == 0
    };
    if done { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn below_a_stack_nothing_can_be_written() {
        let stack = Stack::take().expect("stack");
        let zero = std::fs::File::open("/dev/zero").expect("zero");
        let lowest = stack.usable().0;
        let read = |at: *mut libc::c_void| {
            // SAFETY: where it may be written, the memory is the slot's own, which no thread runs on.
            unsafe { libc::read(std::os::fd::AsRawFd::as_raw_fd(&zero), at, 16) }
        };
        assert_eq!(read(lowest), 16);
        for below in [16, GUARD] {
            assert_eq!(read(lowest.wrapping_byte_sub(below)), -1, "{below} bytes below");
            assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(libc::EFAULT));
        }
    }

    #[test]
    fn nothing_of_one_thread_is_left_for_the_next() {
        let mut stack = Stack::take().expect("stack");
        let (at, size) = stack.usable();
        // SAFETY: the slot's own memory, which no thread runs on.
        unsafe { std::ptr::write_bytes(at.cast::<u8>(), 0x5e, size) };
        stack.clear().expect("cleared");
        // SAFETY: as above.
        let memory = unsafe { std::slice::from_raw_parts(at.cast::<u8>(), size) };
        assert!(memory.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn no_two_have_the_same_place() {
        let stacks: Vec<_> = (0..3 * MOST).map(|_| Stack::take().expect("stack")).collect();
        let mut at: Vec<_> = stacks.iter().map(|stack| stack.usable().0.addr()).collect();
        at.sort_unstable();
        assert!(at.windows(2).all(|two| two[1] - two[0] >= SLOT));
    }
}
