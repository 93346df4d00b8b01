//! A flag that ends blocking waits: it is set once, wakes sleepers and shuts down the sockets registered with it.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

/// Something that a cancel can wake.
pub(crate) trait Interrupt: Send + Sync {
    /// Makes present and future waits on it return; must not block.
    fn interrupt(&self);
}

#[derive(Default)]
struct Inner {
    cancelled: AtomicBool,
    registered: Mutex<Vec<Weak<dyn Interrupt>>>,
    wake: Condvar,
}

/// Shared by whoever drives a migration and the threads that do its work. Cancelling cannot be undone.
#[derive(Clone, Default)]
pub struct CancelFlag(Arc<Inner>);

impl std::fmt::Debug for CancelFlag {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("CancelFlag").field(&self.is_cancelled()).finish()
    }
}

impl CancelFlag {
    /// Not cancelled.
    pub fn new() -> Self {
        Self::default()
    }

    /// Cancels; never blocks for long, may be called from any thread, also an async one.
    pub fn cancel(&self) {
        let registered = {
            let mut registered = self.0.registered.lock();
            self.0.cancelled.store(true, Ordering::SeqCst);
            self.0.wake.notify_all();
            std::mem::take(&mut *registered)
        };
        for target in registered.iter().filter_map(Weak::upgrade) {
            target.interrupt();
        }
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Sleeps for `time`, less if cancelled; returns whether it is.
    pub fn wait(&self, time: Duration) -> bool {
        let deadline = std::time::Instant::now() + time;
        let mut guard = self.0.registered.lock();
        while !self.is_cancelled() {
            if self.0.wake.wait_until(&mut guard, deadline).timed_out() {
                break;
            }
        }
        self.is_cancelled()
    }

    /// Interrupts `target` on cancel, now if it happened already.
    pub(crate) fn register(&self, target: &Arc<impl Interrupt + 'static>) {
        let mut registered = self.0.registered.lock();
        if self.is_cancelled() {
            drop(registered);
            target.interrupt();
            return;
        }
        registered.retain(|known| known.strong_count() > 0);
        let weak: Weak<dyn Interrupt> = Arc::downgrade(target) as Weak<dyn Interrupt>;
        registered.push(weak);
    }
}
