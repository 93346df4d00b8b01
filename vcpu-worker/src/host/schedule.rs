//! How threads are scheduled: vCPUs ordinarily, or by SCHED_FIFO on a core of their own; threads that answer calls with a
//! short slice.
//!
//! Under SCHED_FIFO nothing of ordinary priority runs on the core while the vCPU wants to, but for what the kernel keeps
//! for it (sched_rt_runtime_us: 5 % by default).
//!
//! A computing guest uses its slice up (3 ms by default) before EEVDF lets another thread onto its core, unless that one
//! asks for shorter slices: then it runs at once (Linux 6.12, sched_setattr(2), `sched_runtime` of a fair thread; older
//! kernels ignore it). A thread that answers a call needs tens of microseconds and its share of time stays the same. The
//! slice is inherited by new threads and processes, so that a vCPU thread has to give it back. A thread that has just had
//! more than its share waits until the guest has caught up, however short its slice; a higher weight (nice -10) makes
//! that wait short too. It takes CAP_SYS_NICE, and is left alone where the operator has chosen another priority.
//!
//! Where sessions have shares of their own (sched(7), autogroup), a priority weighs within its session alone, and each worker
//! process begins one: beside fifty that compute the daemon had a fifty-first of the processors, however urgent its threads,
//! and other hosts took it for gone. So its session's share is raised by as much ([`answer_before_other_sessions`]).
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::time::Duration;

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

/// Slice of a thread that answers calls: the least that the kernel takes.
const SHORT_SLICE: Duration = Duration::from_micros(100);

/// Priority of a thread that answers calls, where it may have one.
const ANSWERING: i32 = -10;

/// `struct sched_attr` of the first version (include/uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Default)]
struct Attributes {
    size: u32,
    policy: u32,
    flags: u64,
    nice: i32,
    priority: u32,
    runtime: u64,
    deadline: u64,
    period: u64,
}

const _: () = assert!(size_of::<Attributes>() == 48);

/// Gives the calling thread, and those that it will start, short slices; see the module's head. Changes nothing of a
/// thread that is not scheduled ordinarily.
///
/// # Errors
/// If the kernel refuses.
pub fn answer_quickly() -> Result<()> {
    slice(Some(SHORT_SLICE), |nice| if nice == 0 { ANSWERING } else { nice })
}

/// Where the kernel keeps a session's share; absent without CONFIG_SCHED_AUTOGROUP.
const SESSION: &str = "/proc/self/autogroup";

/// Raises the share of this process's session as [`answer_quickly`] does a thread's weight. Without effect where shares are by
/// cgroup; nothing changes where the session is somebody else's (a shell's, with all that it runs), where the operator has
/// chosen another share, or where the kernel has none.
///
/// # Errors
/// If the kernel refuses: it takes CAP_SYS_NICE, not too many changes at once (CAP_SYS_ADMIN has no bound), and a session
/// that is not the first of the system.
pub fn answer_before_other_sessions() -> Result<()> {
    if !leads_its_session() {
        return Ok(());
    }
    match std::fs::read_to_string(SESSION) {
        Ok(text) if session_nice(&text) == Some(0) => std::fs::write(SESSION, ANSWERING.to_string()),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Whether this process began its session. A container's processes may be in a session begun outside of it, whose number the
/// kernel gives as 0 there: no process's, and nothing that rustix's `Pid` can hold (1.1.6 asserts, or is undefined).
fn leads_its_session() -> bool {
    // SAFETY: takes no pointer; 0 is the caller, which has a session.
    let session = unsafe { libc::getsid(0) };
    // SAFETY: takes nothing and cannot fail.
    let process = unsafe { libc::getpid() };
    session == process
}

/// `/autogroup-25 nice 0`.
fn session_nice(text: &str) -> Option<i32> {
    text.trim_end().rsplit_once(" nice ")?.1.parse().ok()
}

/// Gives the calling thread the weight of a guest and leaves its slices short: it carries much, in turns with a thread that
/// waits for it.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn carry() -> Result<()> {
    slice(Some(SHORT_SLICE), usual)
}

/// Gives the calling thread slices of the usual length.
///
/// # Errors
/// If the kernel refuses.
pub(crate) fn compute() -> Result<()> {
    slice(None, usual)
}

/// Nice value of a thread that need not answer.
fn usual(nice: i32) -> i32 {
    if nice == ANSWERING { 0 } else { nice }
}

fn slice(wanted: Option<Duration>, nice: impl Fn(i32) -> i32) -> Result<()> {
    let mut attributes = attributes()?;
    if attributes.policy != libc::SCHED_OTHER as u32 {
        return Ok(());
    }
    attributes.runtime = wanted.map_or(0, |slice| slice.as_nanos() as u64);
    (attributes.deadline, attributes.period) = (0, 0);
    let before = attributes.nice;
    attributes.nice = nice(before);
    match set(&attributes) {
        // Not allowed to: the slice alone.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied && attributes.nice < before => {
            attributes.nice = before;
            set(&attributes)
        }
        done => done,
    }
}

fn set(attributes: &Attributes) -> Result<()> {
    // SAFETY: thread 0 is the caller; the structure is read only and says its own size.
    let ret = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, std::ptr::from_ref(attributes), 0) };
    if ret == 0 { Ok(()) } else { Err(Error::last_os_error()) }
}

fn attributes() -> Result<Attributes> {
    let mut got = Attributes::default();
    // SAFETY: thread 0 is the caller; the kernel writes at most as much as it is told, which is the structure's size.
    let ret = unsafe {
        libc::syscall(libc::SYS_sched_getattr, 0, &raw mut got, size_of::<Attributes>() as libc::c_uint, 0)
    };
    if ret == 0 { Ok(got) } else { Err(Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether this kernel has slices of a thread's own: those before 6.12 take the value and show 0.
    fn has_slices() -> bool {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("osrelease");
        crate::host::kernel_version(&release) >= (6, 12)
    }

    #[test]
    fn a_slice_is_inherited_and_given_back() {
        if !has_slices() {
            println!("skipped: this kernel has no slices of a thread's own (Linux 6.12)");
            return;
        }
        let read = || attributes().expect("reads").runtime;
        std::thread::spawn(move || {
            let usual = read();
            answer_quickly().expect("shorter");
            assert_eq!(read(), 100_000, "ns");
            let child = std::thread::spawn(move || {
                let inherited = read();
                compute().expect("longer");
                (inherited, read())
            });
            assert_eq!(child.join().expect("thread"), (100_000, usual));
            assert_eq!(read(), 100_000, "the parent's is its own");
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn answering_goes_before_computing_unless_the_operator_chose_otherwise() {
        std::thread::spawn(|| {
            let nice = || attributes().expect("reads").nice;
            let usual = nice();
            answer_quickly().expect("shorter");
            let answering = nice();
            if usual != 0 {
                assert_eq!(answering, usual, "chosen by who started this");
                return;
            }
            // Without the privilege it stays as it is.
            assert!(answering == ANSWERING || answering == usual, "{answering}");
            compute().expect("longer");
            assert_eq!(nice(), usual);
        })
        .join()
        .expect("thread");
    }

    #[test]
    fn the_share_of_a_session_is_read() {
        assert_eq!(session_nice("/autogroup-25 nice 0\n"), Some(0));
        assert_eq!(session_nice("/autogroup-36147 nice -10\n"), Some(-10));
        assert_eq!(session_nice("/\n"), None);
        assert_eq!(session_nice(""), None);
    }

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
