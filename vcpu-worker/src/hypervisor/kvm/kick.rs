//! Kicks: a flag that says so, and a signal that makes the thread look.
//!
//! Invariant: a signal is sent only while the vCPU exists, hence (it is dropped on its own thread) while its thread
//! does: the lock is held over the look and the signal, and the vCPU's end takes it too.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

use crate::hypervisor::Kick;
use crate::sys::kick as signals;

/// Shared by a vCPU and everyone who kicks it.
pub(super) struct Kicker {
    kicked: AtomicBool,
    /// The vCPU's thread; 0 before `bind` and after `unbind`.
    thread: Mutex<libc::pid_t>,
}

impl Kicker {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self { kicked: AtomicBool::new(false), thread: Mutex::new(0) })
    }

    /// Kicks go to the calling thread from here on.
    pub(super) fn bind(&self) {
        *self.thread.lock() = signals::thread_id();
    }

    /// No signal is sent after this returns.
    pub(super) fn unbind(&self) {
        *self.thread.lock() = 0;
    }

    pub(super) fn kicked(&self) -> bool {
        self.kicked.load(Ordering::Acquire)
    }

    pub(super) fn clear(&self) {
        self.kicked.store(false, Ordering::SeqCst);
    }
}

impl Kick for Kicker {
    fn kick(&self) {
        // Whoever finds the flag set can rely on the signal of the one who set it.
        if self.kicked.swap(true, Ordering::SeqCst) {
            return;
        }
        let thread = self.thread.lock();
        if *thread != 0 {
            signals::signal_thread(*thread, signals::KICK_SIGNAL);
        }
    }
}
