//! Pages that this process writes while a guest is tracked.
//!
//! A page is marked after it was written: a collector that comes in between finds the mark the next time, by when the
//! data is there.

use std::sync::atomic::{AtomicBool, Ordering, fence};

use parking_lot::Mutex;

use super::PAGE_SIZE;
use crate::bitmap::PageBitmap;

/// See the module.
#[derive(Default)]
pub(super) struct HostWrites {
    tracking: AtomicBool,
    pages: Mutex<Option<PageBitmap>>,
}

impl HostWrites {
    pub(super) fn track(&self, on: bool, pages: u64) {
        let mut guard = self.pages.lock();
        *guard = on.then(|| PageBitmap::new(pages));
        self.tracking.store(on, Ordering::SeqCst);
    }

    /// `len` bytes at a memfd offset were written.
    pub(super) fn mark(&self, offset: u64, len: u64) {
        // The write before the look: whoever turns tracking on later copies everything after that.
        fence(Ordering::SeqCst);
        if len == 0 || !self.tracking.load(Ordering::SeqCst) {
            return;
        }
        if let Some(pages) = self.pages.lock().as_mut() {
            let first = offset / PAGE_SIZE;
            pages.set_range(first, (offset + len).div_ceil(PAGE_SIZE) - first);
        }
    }

    pub(super) fn take(&self, into: &mut PageBitmap) {
        if let Some(pages) = self.pages.lock().as_mut() {
            into.union(pages);
            pages.clear_all();
        }
    }
}
