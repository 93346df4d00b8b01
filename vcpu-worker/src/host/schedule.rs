//! The scheduling class of a vCPU thread: ordinary, or SCHED_FIFO on a core of its own.
//!
//! Under SCHED_FIFO nothing of ordinary priority runs on the core while the vCPU wants to, but for what the kernel keeps
//! for it (sched_rt_runtime_us: 5 % by default).
#![allow(unsafe_code)]

use std::io::{Error, Result};

/// Puts the calling thread under SCHED_FIFO at this priority (1 to 99), or back under the ordinary scheduler, and reads
/// back that it is so.
///
/// # Errors
/// If the kernel refuses: no CAP_SYS_NICE, RLIMIT_RTPRIO, or a cgroup without real-time time.
pub fn set_current(fifo: Option<u8>) -> Result<()> {
    let policy = if fifo.is_some() { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
    let wanted = libc::sched_param { sched_priority: fifo.unwrap_or(0).into() };
    // SAFETY: pid 0 is the calling thread; the parameter is read only.
    if unsafe { libc::sched_setscheduler(0, policy, &raw const wanted) } != 0 {
        return Err(Error::last_os_error());
    }
    match current()? {
        got if got == fifo => Ok(()),
        got => Err(Error::other(format!("the kernel runs the thread at {got:?} instead of {fifo:?}"))),
    }
}

/// SCHED_FIFO priority of the calling thread; none under any other scheduler.
///
/// # Errors
/// None that is known of: pid 0 always exists.
pub fn current() -> Result<Option<u8>> {
    // SAFETY: pid 0 is the calling thread.
    let policy = unsafe { libc::sched_getscheduler(0) };
    if policy < 0 {
        return Err(Error::last_os_error());
    }
    let mut got = libc::sched_param { sched_priority: 0 };
    // SAFETY: pid 0 is the calling thread; the kernel writes the parameter, which outlives the call.
    if unsafe { libc::sched_getparam(0, &raw mut got) } != 0 {
        return Err(Error::last_os_error());
    }
    // Bit 30 is SCHED_RESET_ON_FORK.
    let fifo = policy & !libc::SCHED_RESET_ON_FORK == libc::SCHED_FIFO;
    Ok(fifo.then(|| u8::try_from(got.sched_priority).unwrap_or(u8::MAX)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_is_set_read_back_and_undone() {
        std::thread::spawn(|| {
            assert_eq!(current().expect("reads"), None);
            match set_current(Some(5)) {
                Ok(()) => {
                    assert_eq!(current().expect("reads"), Some(5));
                    set_current(None).expect("back");
                    assert_eq!(current().expect("reads"), None);
                }
                // Without the privilege it is refused and nothing has changed.
                Err(error) => {
                    assert_eq!(error.kind(), std::io::ErrorKind::PermissionDenied, "{error}");
                    assert_eq!(current().expect("reads"), None);
                }
            }
            assert!(set_current(Some(100)).is_err(), "99 is the highest");
        })
        .join()
        .expect("thread");
    }
}
