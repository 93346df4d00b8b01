//! Where receiver threads meet at the end of a round, and where the first error ends all of them.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::{Condvar, Mutex};

use super::super::address::DataStream;
use super::super::error::DataplaneError;

#[derive(Default)]
struct Inner {
    arrived: usize,
    passed: u64,
    error: Option<DataplaneError>,
}

pub(super) struct Gate {
    streams: Vec<Arc<DataStream>>,
    inner: Mutex<Inner>,
    moved: Condvar,
    failed: AtomicBool,
}

impl Gate {
    /// For one thread a stream.
    pub(super) fn new(streams: Vec<Arc<DataStream>>) -> Self {
        Self { streams, inner: Mutex::default(), moved: Condvar::new(), failed: AtomicBool::new(false) }
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// Notes an error; the first one counts. Wakes every thread: those at the gate, and those that read. The sockets
    /// stay open for writing, so that the source can be told.
    pub(super) fn fail(&self, error: DataplaneError) {
        let mut inner = self.inner.lock();
        inner.error.get_or_insert(error);
        self.failed.store(true, Ordering::Relaxed);
        self.moved.notify_all();
        drop(inner);
        for stream in &self.streams {
            stream.shutdown(Shutdown::Read);
        }
    }

    /// Waits for all threads; false if one failed. No deadline of its own: every other thread's read has one.
    pub(super) fn meet(&self) -> bool {
        let mut inner = self.inner.lock();
        inner.arrived += 1;
        if inner.arrived == self.streams.len() {
            inner.arrived = 0;
            inner.passed += 1;
            self.moved.notify_all();
        } else {
            let round = inner.passed;
            while inner.passed == round && inner.error.is_none() {
                self.moved.wait(&mut inner);
            }
        }
        inner.error.is_none()
    }

    pub(super) fn into_error(self) -> Option<DataplaneError> {
        self.inner.into_inner().error
    }
}
