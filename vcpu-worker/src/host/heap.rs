//! The allocator of a process that holds many machines.
//!
//! Each machine of a process is told of every change to that process's address space (MMU notifiers), and a change takes
//! the lock that page faults take too. glibc changes it whenever a heap grows by a few pages or is trimmed: with 500
//! machines that was more than half of the time that it took to make them (`vpmud bench many`). So heaps grow in large
//! steps and are not trimmed. Only address space is taken: a page that was never touched costs nothing.
#![allow(unsafe_code)]

/// Bytes by which a heap grows: glibc's largest heap of a thread.
const STEP: libc::c_int = 64 << 20;
/// Free bytes at the end of a heap that are given back.
const TRIM: libc::c_int = 1 << 30;

/// Heaps of a confined process: what glibc has at once on a small host.
const ARENAS: libc::c_int = 8;
/// Smallest block that gets a mapping of its own in a confined process, in bytes. Told one of these numbers glibc leaves all
/// as they are, and would map and unmap each block of 128 KiB.
const MAPPED: libc::c_int = 4 << 20;

/// To be called once, before other threads allocate. glibc otherwise reads a file to know how many heaps there may be, in
/// whichever thread needs the ninth, and one to know whether it may shrink a heap, in whichever thread first frees the end
/// of one: a thread that may not open files (`sandbox`) would end the process by that. Has no effect with another allocator.
pub(crate) fn without_files() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in
        [(libc::M_ARENA_MAX, ARENAS), (libc::M_TRIM_THRESHOLD, TRIM), (libc::M_MMAP_THRESHOLD, MAPPED)]
    {
        // SAFETY: mallopt takes two numbers; it locks the arena that it changes.
        let taken = unsafe { libc::mallopt(parameter, value) };
        if taken != 1 {
            tracing::warn!(parameter, value, "the allocator may open files, which ends a confined worker");
        }
    }
}

/// To be called once, before other threads allocate. Has no effect with another allocator than glibc's.
pub fn grow_in_large_steps() {
    #[cfg(target_env = "gnu")]
    for (parameter, value) in [(libc::M_TOP_PAD, STEP), (libc::M_TRIM_THRESHOLD, TRIM)] {
        // SAFETY: mallopt takes two numbers; it locks the arena that it changes.
        let taken = unsafe { libc::mallopt(parameter, value) };
        if taken != 1 {
            tracing::debug!(parameter, value, "the allocator keeps its own steps");
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn what_is_allocated_afterwards_is_whole() {
        super::grow_in_large_steps();
        let made = std::thread::spawn(|| (0..1000_usize).map(|n| vec![n; 100]).collect::<Vec<_>>());
        let made = made.join().expect("thread");
        assert!(made.iter().enumerate().all(|(n, block)| block.iter().all(|v| *v == n)));
    }
}
