//! Calls that confine a worker: closing what it inherited, and the signal that a forbidden system call raises.

use std::fs::File;
use std::io;
use std::os::fd::IntoRawFd as _;
use std::sync::atomic::{AtomicI32, Ordering};

/// Where a violation is written; standard error until it is set.
static REPORT: AtomicI32 = AtomicI32::new(2);

/// Exit code of a worker that made a forbidden call: 128 + SIGSYS.
const EXIT: libc::c_int = 128 + libc::SIGSYS;

/// Closes every descriptor from 3 up. To be called first of all: nothing of this process may be open yet.
pub(crate) fn close_all_but_standard() -> io::Result<()> {
    // SAFETY: called at the start of a worker's process, before anything was opened: what is there was inherited and has
    // no owner here.
    let ret = unsafe { libc::close_range(3, libc::c_uint::MAX, 0) };
    if ret == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        // Linux before 5.9: everything of the daemon is closed on exec anyway.
        error if error.raw_os_error() == Some(libc::ENOSYS) => Ok(()),
        error => Err(error),
    }
}

/// Blocks, on the calling thread, the signals that are sent to the process as a whole and have a handler in its runtime.
/// Not those of [`super::kick`]: they are what gets a vCPU out of the guest.
pub(crate) fn leave_signals_to_others() -> io::Result<()> {
    // SAFETY: a zeroed sigset_t is storage for sigemptyset, which makes it valid; all pointers outlive the calls.
    let error = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT, libc::SIGCHLD] {
            libc::sigaddset(&raw mut set, signal);
        }
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut())
    };
    if error == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(error)) }
}

/// Makes SIGSYS write `number thread-name` to `report` and end the process.
pub(crate) fn report_violations(report: Option<File>) -> io::Result<()> {
    if let Some(file) = report {
        // Open until the process ends.
        REPORT.store(file.into_raw_fd(), Ordering::Relaxed);
    }
    // SAFETY: an all-zero sigaction is a valid value of the C structure.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = on_violation as extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void)
        as libc::sighandler_t;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler makes only async-signal-safe calls; `action` outlives the call.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// siginfo_t of SIGSYS (sigaction(2)): signal, errno, code, padding; call address; number; architecture.
#[repr(C)]
struct Violation {
    head: [libc::c_int; 4],
    address: u64,
    number: libc::c_int,
    arch: u32,
}

const _: () = assert!(size_of::<Violation>() <= size_of::<libc::siginfo_t>());

extern "C" fn on_violation(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a siginfo_t, of which this structure is a prefix (asserted), aligned to 8.
    let number = unsafe { (*info.cast::<Violation>()).number };
    let mut line = [0u8; 48];
    let mut at = decimal(number.unsigned_abs(), &mut line);
    line[at] = b' ';
    at += 1;
    // SAFETY: PR_GET_NAME writes at most 16 bytes, for which there is room behind the number (at most 10) and the space.
    unsafe { libc::prctl(libc::PR_GET_NAME, line[at..].as_mut_ptr()) };
    let name = line[at..].iter().position(|byte| *byte == 0).unwrap_or(0);
    at += name;
    line[at] = b'\n';
    // SAFETY: the bytes are this array's. Nothing can be done about a failure.
    unsafe { libc::write(REPORT.load(Ordering::Relaxed), line.as_ptr().cast(), at + 1) };
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(EXIT) };
}

/// Writes a number and returns its length. Allocates nothing.
fn decimal(mut number: u32, to: &mut [u8; 48]) -> usize {
    let mut digits = [0u8; 10];
    let mut from = digits.len();
    loop {
        from -= 1;
        digits[from] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 || from == 0 {
            break;
        }
    }
    let length = digits.len() - from;
    to[..length].copy_from_slice(&digits[from..]);
    length
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_written_without_allocating() {
        for (number, text) in [(0, "0"), (7, "7"), (41, "41"), (u32::MAX, "4294967295")] {
            let mut line = [0u8; 48];
            let length = decimal(number, &mut line);
            assert_eq!(&line[..length], text.as_bytes());
        }
    }
}
