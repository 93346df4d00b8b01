//! Getting a thread out of KVM_RUN by a signal, without a race.
//!
//! The handler marks the thread (a thread-local flag) and, if the thread is in or about to be in KVM_RUN, sets
//! `immediate_exit` in its run page. A signal that comes before the page is published is found by the flag, one that
//! comes after by `immediate_exit` or by EINTR; none is lost.
//!
//! SIGUSR1 kicks and SIGUSR2 ticks. Real-time signals would do as well but fail with EAGAIN, or turn into a deadly
//! SIGIO, when the user's queue of pending signals is full; standard signals merge instead.

use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering};

/// Sent by kicks.
pub(crate) const KICK_SIGNAL: libc::c_int = libc::SIGUSR1;
/// Sent by the tick timer.
pub(crate) const TICK_SIGNAL: libc::c_int = libc::SIGUSR2;

thread_local! {
    // Constant initialisers and no destructors: plain thread-local words, which a signal handler may touch.
    static IMMEDIATE_EXIT: AtomicPtr<u8> = const { AtomicPtr::new(std::ptr::null_mut()) };
    static SIGNALLED: AtomicBool = const { AtomicBool::new(false) };
}

extern "C" fn on_signal(_: libc::c_int) {
    SIGNALLED.with(|flag| flag.store(true, Ordering::Relaxed));
    IMMEDIATE_EXIT.with(|page| {
        let page = page.load(Ordering::Relaxed);
        if !page.is_null() {
            // SAFETY: non-null only while this thread is inside `Published`, whose run page is mapped.
            unsafe { AtomicU8::from_ptr(page) }.store(1, Ordering::Relaxed);
        }
    });
}

/// Installs the handler for both signals, once a process, and unblocks them on this thread.
pub(crate) fn prepare_thread() -> std::io::Result<()> {
    static INSTALLED: Once = Once::new();
    let mut failure = None;
    INSTALLED.call_once(|| {
        for signal in [KICK_SIGNAL, TICK_SIGNAL] {
            // SAFETY: an all-zero sigaction is a valid value of the C structure.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as usize;
            // No SA_RESTART: KVM_RUN must return EINTR.
            action.sa_flags = 0;
            // SAFETY: the handler only touches thread-local words and a mapped page; `action` outlives the call.
            if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } != 0 {
                failure = Some(std::io::Error::last_os_error());
            }
        }
    });
    if let Some(error) = failure {
        return Err(error);
    }
    // SAFETY: a zeroed sigset_t is storage for sigemptyset, which makes it valid; all pointers outlive the calls.
    let ret = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, KICK_SIGNAL);
        libc::sigaddset(&raw mut set, TICK_SIGNAL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &raw const set, std::ptr::null_mut())
    };
    if ret == 0 { Ok(()) } else { Err(std::io::Error::from_raw_os_error(ret)) }
}

/// Thread id of the caller.
pub(crate) fn thread_id() -> libc::pid_t {
    // SAFETY: gettid has no preconditions.
    unsafe { libc::gettid() }
}

/// Sends a signal to one thread of this process. The caller knows that the thread still exists.
pub(crate) fn signal_thread(tid: libc::pid_t, signal: libc::c_int) {
    // SAFETY: tgkill has no memory preconditions; it cannot fail for a standard signal to a living thread of ours.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
}

/// While it lives, signals to this thread set `immediate_exit` at the given place.
pub(super) struct Published;

impl Published {
    /// # Safety
    /// `immediate_exit` stays mapped until the value is dropped, which happens on this thread.
    pub(super) unsafe fn new(immediate_exit: *mut u8) -> Self {
        IMMEDIATE_EXIT.with(|page| page.store(immediate_exit, Ordering::Relaxed));
        // The handler runs on this very thread: only the compiler must keep the order.
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
        Self
    }
}

impl Drop for Published {
    fn drop(&mut self) {
        IMMEDIATE_EXIT.with(|page| page.store(std::ptr::null_mut(), Ordering::Relaxed));
        std::sync::atomic::compiler_fence(Ordering::SeqCst);
    }
}

/// Whether a signal came to this thread since the last call.
pub(super) fn take_signalled() -> bool {
    // No exchange: only this thread's handler writes it too, and that runs before the load, whose true stands for it, or
    // after it, when nothing is stored.
    SIGNALLED.with(|flag| {
        let signalled = flag.load(Ordering::Relaxed);
        if signalled {
            flag.store(false, Ordering::Relaxed);
        }
        signalled
    })
}

/// Forgets signals that came to this thread so far.
pub(crate) fn clear_signalled() {
    take_signalled();
}
