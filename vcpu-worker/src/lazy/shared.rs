//! What the threads of one lazy memory share: pages are placed here, and the end is made here, once.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};

use super::pages::Pages;
use super::{LazyError, LazyStats, OnEnd};
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::sys::uffd::{Progress, Uffd};

#[derive(Default)]
pub(super) struct Counts {
    pub(super) faults: AtomicU64,
    pub(super) demanded: AtomicU64,
    pub(super) prefetched: AtomicU64,
    pub(super) placed: AtomicU64,
    pub(super) late: AtomicU64,
    pub(super) zero: AtomicU64,
}

pub(super) enum End {
    Complete,
    Failed(LazyError),
}

pub(super) struct Shared {
    pub(super) memory: GuestMemory,
    pub(super) uffd: Uffd,
    pub(super) stop: std::os::fd::OwnedFd,
    pub(super) pages: Mutex<Pages>,
    pub(super) counts: Counts,
    pub(super) on_end: Mutex<Option<OnEnd>>,
    pub(super) end: OnceLock<End>,
    /// The end, with the memory released and `on_end` done.
    pub(super) ended: Mutex<bool>,
    pub(super) changed: Condvar,
}

impl Shared {
    pub(super) fn stats(&self) -> LazyStats {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let c = &self.counts;
        LazyStats {
            faults: get(&c.faults),
            demanded: get(&c.demanded),
            prefetched: get(&c.prefetched),
            placed: get(&c.placed),
            late: get(&c.late),
            zero: get(&c.zero),
            missing: self.pages.lock().left(),
        }
    }

    pub(super) fn address(&self, page: u64) -> u64 {
        self.memory.address() + page * PAGE_SIZE
    }

    pub(super) fn place(&self, first: u64, bytes: Option<&[u8]>, pages: u64) -> Result<(), LazyError> {
        let problem = |page: u64, problem: String| LazyError::Place { page, problem };
        let within = first.checked_add(pages).is_some_and(|end| end <= self.memory.pages());
        if !within || bytes.is_some_and(|b| b.len() as u64 != pages * PAGE_SIZE) {
            let length = bytes.map_or(pages * PAGE_SIZE, |b| b.len() as u64);
            return Err(problem(first, format!("{length} bytes there are no whole pages of this guest")));
        }
        let end = first + pages;
        let mut at = first;
        let mut placed = 0;
        while at < end && self.end.get().is_none() {
            let Some((run, len)) = self.pages.lock().missing_run(at, end) else { break };
            let progress = match bytes {
                Some(bytes) => {
                    let (from, to) = ((run - first) * PAGE_SIZE, (run + len - first) * PAGE_SIZE);
                    self.uffd.copy(self.address(run), &bytes[from as usize..to as usize])
                }
                None => self.uffd.zero(self.address(run), len * PAGE_SIZE),
            };
            at = run + self.arrived(run, &progress, &mut placed)?;
        }
        self.counts.late.fetch_add(pages - placed, Ordering::Relaxed);
        Ok(())
    }

    /// Notes what a call placed; how many pages on the next one begins.
    fn arrived(&self, run: u64, progress: &Progress, placed: &mut u64) -> Result<u64, LazyError> {
        let done = progress.done / PAGE_SIZE;
        *placed += done;
        self.counts.placed.fetch_add(done, Ordering::Relaxed);
        let errno = progress.error.as_ref().and_then(std::io::Error::raw_os_error);
        let there = match errno {
            // Partly done, or the address space is changing: again.
            None | Some(libc::EAGAIN) => done,
            Some(libc::EEXIST) => {
                // Another thread was faster. Who waits was woken by it; once more does no harm.
                drop(self.uffd.wake(self.address(run + done), PAGE_SIZE));
                done + 1
            }
            // Unregistered meanwhile: the end came in between.
            Some(_) if self.end.get().is_some() => done,
            Some(errno) => {
                let error = std::io::Error::from_raw_os_error(errno);
                return Err(LazyError::Place { page: run + done, problem: error.to_string() });
            }
        };
        if there > 0 && self.pages.lock().there(run, there) == 0 {
            self.complete();
        }
        Ok(there)
    }

    /// All is there.
    pub(super) fn complete(&self) {
        if self.end.set(End::Complete).is_ok() {
            self.finish(Ok(()));
        }
    }

    pub(super) fn fail(&self, error: LazyError) {
        if self.end.set(End::Failed(error.clone())).is_ok() {
            tracing::error!(%error, "lazy memory");
            self.finish(Err(error));
        }
    }

    /// Tells the owner, then releases the memory and ends the threads.
    fn finish(&self, how: Result<(), LazyError>) {
        if how.is_ok() {
            self.release();
        }
        let on_end = self.on_end.lock().take();
        let failed = how.is_err();
        if let Some(on_end) = on_end {
            on_end(how.map(|()| self.stats()));
        }
        if failed {
            self.release();
        }
        *self.ended.lock() = true;
        self.changed.notify_all();
        // The counter of an eventfd does not overflow with a handful of ones.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
    }

    fn release(&self) {
        if let Err(error) = self.uffd.unregister(self.memory.address(), self.memory.bytes()) {
            // The descriptor's end does the same.
            tracing::error!(%error, "UFFDIO_UNREGISTER");
        }
    }
}
