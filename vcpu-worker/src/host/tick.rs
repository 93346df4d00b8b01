//! A timer that runs on the calling thread's own CPU time and interrupts KVM_RUN on it.
//!
//! The software event `cpu-clock` of perf, bound to the thread, sends SIGUSR2 at each period: unlike a wall-clock
//! timer it stands still while the thread does not run, which is what modelled counters count by (switch rules,
//! section 8). Where perf is refused (perf_event_paranoid, seccomp) a POSIX timer on the thread's CPU clock does the
//! same with the kernel's tick as its grain.
//!
//! The first event of a host that is bound to a thread waits for RCU grace periods (kernel/events/core.c,
//! `account_event`): 6 to 24 ms, measured at the start of a machine. A [`PerfReady`] is that first event.
//!
//! Invariant: a timer is used on the thread that made it only (it is not `Send`).
#![allow(unsafe_code)]

use std::io::Error;
use std::marker::PhantomData;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::time::Duration;

use crate::sys::kick::{TICK_SIGNAL, prepare_thread, thread_id};

/// No period is shorter: perf's own floor is 10 microseconds.
const MIN_PERIOD: Duration = Duration::from_micros(50);
/// Nor longer.
const MAX_PERIOD: Duration = Duration::from_secs(60);

const PERF_TYPE_SOFTWARE: u64 = 1;
const PERF_COUNT_SW_CPU_CLOCK: u64 = 0;
const PERF_FLAG_FD_CLOEXEC: libc::c_ulong = 8;
const PERF_EVENT_IOC_ENABLE: libc::c_ulong = 0x2400;
const PERF_EVENT_IOC_DISABLE: libc::c_ulong = 0x2401;
const PERF_EVENT_IOC_PERIOD: libc::c_ulong = 0x4008_2404;
const F_SETSIG: libc::c_int = 10;
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

#[repr(C)]
struct OwnerEx {
    kind: libc::c_int,
    pid: libc::pid_t,
}

/// An event that never counts: while it lives, opening a [`TickTimer`] takes microseconds.
#[derive(Debug)]
pub struct PerfReady(#[allow(dead_code, reason = "held open")] OwnedFd);

impl PerfReady {
    /// Bound to the calling thread, and kept when that ends; every context switch of the host costs the kernel a look
    /// meanwhile. Takes as long as the module says, if it is the first.
    ///
    /// # Errors
    ///
    /// Perf is refused here; timers are POSIX timers then.
    pub fn hold() -> std::io::Result<Self> {
        open_event(MAX_PERIOD).map(Self)
    }
}

enum Source {
    Perf(OwnedFd),
    Posix(libc::timer_t),
}

/// See the module.
pub struct TickTimer {
    source: Source,
    period: Duration,
    armed: bool,
    /// Raw pointers are not `Send`.
    thread: PhantomData<*mut ()>,
}

impl std::fmt::Debug for TickTimer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "TickTimer({}, {:?}, armed {})", self.source(), self.period, self.armed)
    }
}

impl TickTimer {
    /// A timer for the calling thread, not armed. Periods are bounded to 50 us to 60 s.
    pub fn new(period: Duration) -> std::io::Result<Self> {
        prepare_thread()?;
        let period = period.clamp(MIN_PERIOD, MAX_PERIOD);
        let source = match open_perf(period) {
            Ok(fd) => Source::Perf(fd),
            Err(refused) => Source::Posix(create_posix().map_err(|e| {
                Error::other(format!("neither perf_event_open ({refused}) nor timer_create ({e}) is allowed"))
            })?),
        };
        Ok(Self { source, period, armed: false, thread: PhantomData })
    }

    /// The same on the POSIX timer, whatever perf says.
    #[doc(hidden)]
    pub fn new_posix(period: Duration) -> std::io::Result<Self> {
        prepare_thread()?;
        let period = period.clamp(MIN_PERIOD, MAX_PERIOD);
        Ok(Self { source: Source::Posix(create_posix()?), period, armed: false, thread: PhantomData })
    }

    /// "perf cpu-clock" or "posix thread clock".
    pub fn source(&self) -> &'static str {
        match self.source {
            Source::Perf(_) => "perf cpu-clock",
            Source::Posix(_) => "posix thread clock",
        }
    }

    /// Time between ticks.
    pub fn period(&self) -> Duration {
        self.period
    }

    /// Changes the period; the running one begins anew.
    pub fn set_period(&mut self, period: Duration) -> std::io::Result<()> {
        let period = period.clamp(MIN_PERIOD, MAX_PERIOD);
        if period == self.period {
            return Ok(());
        }
        self.period = period;
        if let Source::Perf(fd) = &self.source {
            let ns = nanoseconds(period);
            perf_ioctl(fd, PERF_EVENT_IOC_PERIOD, Some(&ns))?;
        }
        if self.armed {
            self.armed = false;
            self.arm()?;
        }
        Ok(())
    }

    /// Ticks from here on; nothing if it is armed.
    pub fn arm(&mut self) -> std::io::Result<()> {
        if self.armed {
            return Ok(());
        }
        match &self.source {
            Source::Perf(fd) => perf_ioctl(fd, PERF_EVENT_IOC_ENABLE, None)?,
            Source::Posix(timer) => set_posix(*timer, self.period)?,
        }
        self.armed = true;
        Ok(())
    }

    /// It ticks.
    #[inline]
    pub fn is_armed(&self) -> bool {
        self.armed
    }

    /// No tick is sent after this returns; one may be on its way to the thread still.
    pub fn disarm(&mut self) -> std::io::Result<()> {
        if !self.armed {
            return Ok(());
        }
        match &self.source {
            Source::Perf(fd) => perf_ioctl(fd, PERF_EVENT_IOC_DISABLE, None)?,
            Source::Posix(timer) => set_posix(*timer, Duration::ZERO)?,
        }
        self.armed = false;
        Ok(())
    }
}

impl Drop for TickTimer {
    fn drop(&mut self) {
        if let Source::Posix(timer) = self.source {
            // SAFETY: made by timer_create in this value and deleted once.
            unsafe { libc::timer_delete(timer) };
        }
    }
}

fn nanoseconds(period: Duration) -> u64 {
    u64::try_from(period.as_nanos()).unwrap_or(u64::MAX)
}

fn check(ret: libc::c_int) -> std::io::Result<()> {
    if ret < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn perf_ioctl(fd: &OwnedFd, request: libc::c_ulong, argument: Option<&u64>) -> std::io::Result<()> {
    let pointer = argument.map_or(std::ptr::null(), std::ptr::from_ref);
    // SAFETY: ENABLE and DISABLE take no argument (null is flags 0), PERIOD reads the u64 pointed to.
    check(unsafe { libc::ioctl(fd.as_raw_fd(), request, pointer) })
}

/// A disabled event of the calling thread.
fn open_event(period: Duration) -> std::io::Result<OwnedFd> {
    // struct perf_event_attr, PERF_ATTR_SIZE_VER5 (112 bytes), as words: type and size, config, sample_period,
    // sample_type, read_format, flag bits (0: disabled), wakeup_events, ...
    let mut attr = [0u64; 14];
    attr[0] = PERF_TYPE_SOFTWARE | (size_of_val(&attr) as u64) << 32;
    attr[1] = PERF_COUNT_SW_CPU_CLOCK;
    attr[2] = nanoseconds(period);
    attr[5] = 1;
    attr[6] = 1;
    // SAFETY: perf_event_open reads as many bytes of the attribute as its size field says, which is its length.
    let fd =
        unsafe { libc::syscall(libc::SYS_perf_event_open, attr.as_ptr(), 0, -1, -1, PERF_FLAG_FD_CLOEXEC) };
    if fd < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: just returned by the kernel and owned by nobody else; descriptors fit c_int.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as libc::c_int) })
}

fn open_perf(period: Duration) -> std::io::Result<OwnedFd> {
    let fd = open_event(period)?;
    let owner = OwnerEx { kind: F_OWNER_TID, pid: thread_id() };
    // SAFETY: F_SETOWN_EX reads the structure, alive over the call; the others take integers.
    unsafe {
        check(libc::fcntl(fd.as_raw_fd(), F_SETSIG, TICK_SIGNAL))?;
        check(libc::fcntl(fd.as_raw_fd(), F_SETOWN_EX, &raw const owner))?;
        check(libc::fcntl(fd.as_raw_fd(), libc::F_SETFL, libc::O_ASYNC))?;
    }
    Ok(fd)
}

fn create_posix() -> std::io::Result<libc::timer_t> {
    // SAFETY: an all-zero sigevent is a valid value of the C structure.
    let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
    event.sigev_notify = libc::SIGEV_THREAD_ID;
    event.sigev_signo = TICK_SIGNAL;
    event.sigev_notify_thread_id = thread_id();
    let mut timer: libc::timer_t = std::ptr::null_mut();
    // SAFETY: both pointers are to living locals; the kernel keeps neither.
    check(unsafe { libc::timer_create(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut event, &raw mut timer) })?;
    Ok(timer)
}

/// A zero period stops it.
fn set_posix(timer: libc::timer_t, period: Duration) -> std::io::Result<()> {
    let each = libc::timespec {
        tv_sec: libc::time_t::try_from(period.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: period.subsec_nanos().into(),
    };
    let spec = libc::itimerspec { it_interval: each, it_value: each };
    // SAFETY: `timer` is ours and exists; `spec` is read; the old value is not asked for.
    check(unsafe { libc::timer_settime(timer, 0, &raw const spec, std::ptr::null_mut()) })
}
