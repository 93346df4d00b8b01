//! Which threads of this process may run where.
//!
//! Two kinds: vCPU threads, each pinned to one core by itself, and all others (the runtime's, migration's, blocking
//! helpers), which stay on the *housekeeping* cores: those that are dedicated to no machine.
//!
//! Invariant: a registered vCPU thread is never touched by [`set_housekeeping`]. A thread registers before it pins
//! itself, under the lock that the other holds while it works, so that neither can undo the other. A new thread inherits
//! its maker's affinity, and makers are never vCPU threads.

use std::collections::BTreeSet;
use std::io::{Error, ErrorKind, Result};
use std::sync::{Mutex, PoisonError};

use rustix::thread::{CpuSet, Pid, sched_getaffinity, sched_setaffinity};

use crate::sys::kick::thread_id;

static VCPU_THREADS: Mutex<BTreeSet<i32>> = Mutex::new(BTreeSet::new());

fn vcpu_threads() -> std::sync::MutexGuard<'static, BTreeSet<i32>> {
    VCPU_THREADS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the calling thread out of housekeeping until it is dropped, on the same thread.
#[derive(Debug)]
pub struct VcpuThread(i32);

impl VcpuThread {
    /// Registers the calling thread.
    #[must_use]
    pub fn register() -> Self {
        let tid = thread_id();
        vcpu_threads().insert(tid);
        Self(tid)
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        vcpu_threads().remove(&self.0);
    }
}

fn set_of(cores: &[u32]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for core in cores {
        let core = *core as usize;
        if core >= CpuSet::MAX_CPU {
            let message =
                format!("core {core} is beyond the {} that an affinity mask holds", CpuSet::MAX_CPU);
            return Err(Error::new(ErrorKind::InvalidInput, message));
        }
        set.set(core);
    }
    Ok(set)
}

fn cores_of(set: &CpuSet) -> Vec<u32> {
    (0..CpuSet::MAX_CPU)
        .filter(|core| set.is_set(*core))
        .filter_map(|core| u32::try_from(core).ok())
        .collect()
}

/// Pins the calling thread to one core and reads back that it is so. After an error it is where it was.
///
/// # Errors
/// If the kernel refuses (no such core, offline, outside of the cpuset), or puts it elsewhere.
pub fn pin_current_thread(core: u32) -> Result<()> {
    let before = sched_getaffinity(None)?;
    let wanted = set_of(&[core])?;
    sched_setaffinity(None, &wanted)?;
    let got = sched_getaffinity(None)?;
    if got == wanted {
        return Ok(());
    }
    sched_setaffinity(None, &before)?;
    let shown = super::topology::show_list(&cores_of(&got));
    Err(Error::other(format!("the kernel put the thread on cores {shown} instead of core {core} alone")))
}

/// Core that the calling thread is pinned to, as the kernel says; none if it may run on several.
#[must_use]
pub fn pinned_core() -> Option<u32> {
    match cores_of(&sched_getaffinity(None).ok()?)[..] {
        [core] => Some(core),
        _ => None,
    }
}

/// Which of `candidates` a thread of this process could be pinned to: isolated cores are not in a process's ordinary
/// affinity but may be asked for, those outside of its cpuset may not.
#[must_use]
pub fn pinnable(candidates: &[u32]) -> Vec<u32> {
    let try_all = || candidates.iter().copied().filter(|core| pin_current_thread(*core).is_ok()).collect();
    // On a thread of its own: this one stays where it is.
    std::thread::scope(|scope| scope.spawn(try_all).join()).unwrap_or_default()
}

/// Moves every thread of this process that runs no vCPU to `cores`; returns how many it set. Threads that end meanwhile
/// or that the kernel pins itself are passed over.
///
/// # Errors
/// If /proc cannot be read, or the kernel refuses the set for the calling thread.
pub fn set_housekeeping(cores: &[u32]) -> Result<usize> {
    if cores.is_empty() {
        return Err(Error::new(ErrorKind::InvalidInput, "no core is left for threads that run no vCPU"));
    }
    let wanted = set_of(cores)?;
    let registered = vcpu_threads();
    if !registered.contains(&thread_id()) {
        sched_setaffinity(None, &wanted)?;
    }
    move_all("/proc/self/task", &wanted, &registered)
}

/// Moves every thread of another process of ours, which runs no vCPU, to `cores`; returns how many it set.
///
/// # Errors
/// If it is gone, or a core is beyond what a mask holds.
pub fn set_process(pid: u32, cores: &[u32]) -> Result<usize> {
    move_all(&format!("/proc/{pid}/task"), &set_of(cores)?, &BTreeSet::new())
}

fn move_all(tasks: &str, wanted: &CpuSet, except: &BTreeSet<i32>) -> Result<usize> {
    let mut done = BTreeSet::new();
    // Until a pass finds no new thread: one may have been made, by a thread that had not been moved yet, in between.
    loop {
        let before = done.len();
        for task in std::fs::read_dir(tasks)? {
            let name = task?.file_name();
            let Some(tid) = name.to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
            if except.contains(&tid) || !done.insert(tid) {
                continue;
            }
            if let Err(error) = sched_setaffinity(Pid::from_raw(tid), wanted) {
                tracing::debug!(tid, %error, "affinity of a thread");
            }
        }
        if done.len() == before {
            return Ok(done.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::allowed_cores;

    #[test]
    fn pinning_is_read_back() {
        let core = *allowed_cores().last().expect("a core");
        std::thread::spawn(move || {
            pin_current_thread(core).expect("pinned");
            assert_eq!((allowed_cores(), pinned_core()), (vec![core], Some(core)));
            assert!(pin_current_thread(1023).is_err());
            assert_eq!(pin_current_thread(99_999).expect_err("no").kind(), ErrorKind::InvalidInput);
            assert_eq!(allowed_cores(), [core], "a refused pin changes nothing");
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn cores_that_are_not_there_are_not_pinnable() {
        let allowed = allowed_cores();
        let asked: Vec<u32> = allowed.iter().copied().chain([1020, 90_000]).collect();
        assert_eq!(pinnable(&asked), allowed);
        assert_eq!(allowed_cores(), allowed, "the asking thread stays where it was");
    }

    /// In one test because both kinds of threads are the process's: `tests/` has the same with a whole worker.
    #[test]
    fn no_core_is_no_housekeeping() {
        assert_eq!(set_housekeeping(&[]).expect_err("none").kind(), ErrorKind::InvalidInput);
        assert!(set_housekeeping(&[1021]).is_err());
    }
}
