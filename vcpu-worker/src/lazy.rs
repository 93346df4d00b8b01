//! Guest memory that comes while the guest runs already: pages are fetched when they are touched, and in the background.
//!
//! Post-copy migration and the lazy restore of a snapshot are two [`PageSource`]s of it. The missing pages of the memfd
//! are registered with userfaultfd: whoever touches one (a vCPU in KVM, a device, this process) sleeps until it is
//! placed.
//!
//! ```text
//!   begin ──► fetching ──(last page placed)──► complete   memory is unregistered and like any other
//!                │
//!                └──(source fails, abandon, drop)──► failed   vCPUs are got out, then the memory is released
//! ```
//!
//! Invariants:
//! - A page is placed at most once, and never over one that is there: neither our bitmap nor the kernel (EEXIST) lets
//!   a late copy overwrite what the guest has written.
//! - A page is asked of the source at most once (`asked`), whoever wants it.
//! - A page that is not in the missing set and was never touched is zero, and is served as such.
//! - After a failure no guest instruction may run: missing pages would read as zero. `on_end` gets the vCPUs out before
//!   the memory is released; KVM gives up the fault of a kicked vCPU, and one that waits inside KVM's emulator, which
//!   cannot give up, comes out at the release with its kick pending.

mod error;
mod pages;
mod serve;
mod shared;
#[cfg(test)]
mod tests;

use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::bitmap::PageBitmap;
use crate::memory::{GuestMemory, PAGE_SIZE};
use crate::sys::uffd::{FEATURE_MISSING_SHMEM, Uffd};
pub use error::LazyError;
use pages::Pages;
use shared::{Counts, End, Shared};

/// Where missing pages come from.
pub trait PageSource: Send + Sync {
    /// Pages `first..first+pages` (memfd offsets in 4 KiB) are wanted, `urgent`ly if somebody waits for the first of
    /// them. They are given to `into`, before this returns (a file) or later from another thread (a network: ask
    /// here, place where the answer arrives). Called from one thread for urgent pages and from another for the
    /// background; an error ends the guest.
    fn fetch(&self, first: u64, pages: u64, urgent: bool, into: &Placer) -> Result<(), String>;
}

/// Figures; all monotonic but `missing`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LazyStats {
    /// Faults that were served.
    pub faults: u64,
    /// Pages asked of the source because of a fault.
    pub demanded: u64,
    /// Pages asked of the source in the background.
    pub prefetched: u64,
    /// Pages placed with content or as zero.
    pub placed: u64,
    /// Pages given that were there already (dropped).
    pub late: u64,
    /// Pages outside of the missing set that were touched for the first time.
    pub zero: u64,
    /// Pages yet to come.
    pub missing: u64,
}

/// What faults come through. Opened where files may be opened (see `sandbox`), used later.
#[derive(Debug)]
pub struct Faults(Uffd);

impl Faults {
    /// Opens it.
    ///
    /// # Errors
    /// `Unsupported` where this host cannot do it.
    pub fn open() -> Result<Self, LazyError> {
        let unsupported = |problem: String| LazyError::Unsupported { problem };
        let uffd = Uffd::new().map_err(|e| unsupported(format!("userfaultfd: {e}")))?;
        if uffd.features() & FEATURE_MISSING_SHMEM == 0 {
            return Err(unsupported("this kernel's userfaultfd does not serve memory files".to_owned()));
        }
        Ok(Self(uffd))
    }
}

/// Called once at the end. With an error it must get all vCPUs out of the guest for good (mark the machine failed, kick)
/// and wait, bounded, until they are, because the memory is released when it returns.
pub type OnEnd = Box<dyn FnOnce(Result<LazyStats, LazyError>) + Send>;

/// Gives pages to lazy memory; cheap to clone. Does not keep it alive.
#[derive(Clone)]
pub struct Placer {
    shared: Weak<Shared>,
}

impl std::fmt::Debug for Placer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Placer")
    }
}

impl Placer {
    /// Places whole pages from `first` on; those that are there already keep their content. Fine from several threads at
    /// once, and after the end (nothing happens).
    pub fn place(&self, first: u64, bytes: &[u8]) -> Result<(), LazyError> {
        match self.shared.upgrade() {
            Some(shared) => shared.place(first, Some(bytes), bytes.len() as u64 / PAGE_SIZE),
            None => Ok(()),
        }
    }

    /// Places zero pages likewise.
    pub fn place_zero(&self, first: u64, pages: u64) -> Result<(), LazyError> {
        self.shared.upgrade().map_or(Ok(()), |shared| shared.place(first, None, pages))
    }

    /// Whether a page is yet to come.
    pub fn is_missing(&self, page: u64) -> bool {
        self.shared.upgrade().is_some_and(|s| s.pages.lock().is_missing(page))
    }

    /// Pages yet to come.
    pub fn missing(&self) -> PageBitmap {
        self.shared.upgrade().map_or_else(|| PageBitmap::new(0), |s| s.pages.lock().missing().clone())
    }

    /// The source is lost: ends the guest.
    pub fn fail(&self, error: LazyError) {
        if let Some(shared) = self.shared.upgrade() {
            shared.fail(error);
        }
    }
}

/// Lazy memory of one guest; see the module. Dropping it before the end fails it.
pub struct LazyMemory {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl std::fmt::Debug for LazyMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "LazyMemory({:?})", self.stats())
    }
}

impl LazyMemory {
    /// Empties the missing pages (whatever they hold is stale) and begins to serve them. No vCPU runs yet. With
    /// `prefetch`, a background thread asks for runs of up to that many pages, beginning behind the last fault, until
    /// nothing is missing; a source that sends by itself goes without.
    pub fn begin(
        memory: &GuestMemory,
        missing: PageBitmap,
        source: Arc<dyn PageSource>,
        prefetch: Option<u64>,
        on_end: OnEnd,
    ) -> Result<Self, LazyError> {
        Self::begin_with(Faults::open()?, memory, missing, source, prefetch, on_end)
    }

    /// [`Self::begin`] with faults that were opened before.
    ///
    /// # Errors
    /// As there.
    pub fn begin_with(
        faults: Faults,
        memory: &GuestMemory,
        missing: PageBitmap,
        source: Arc<dyn PageSource>,
        prefetch: Option<u64>,
        on_end: OnEnd,
    ) -> Result<Self, LazyError> {
        let Faults(uffd) = faults;
        let unsupported = |problem: String| LazyError::Unsupported { problem };
        if missing.pages() != memory.pages() {
            let problem = format!("{} pages are not the guest's {}", missing.pages(), memory.pages());
            return Err(LazyError::Memory(problem));
        }
        if memory.is_hugetlb() {
            return Err(LazyError::Memory(
                "pages of 2 MiB do not come one by one; use ordinary pages".to_owned(),
            ));
        }
        let stop = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC)
            .map_err(|e| unsupported(format!("eventfd: {e}")))?;
        for (first, len) in missing.runs() {
            memory.discard(first * PAGE_SIZE, len * PAGE_SIZE)?;
        }
        uffd.register_missing(memory.address(), memory.bytes())
            .map_err(|e| unsupported(format!("UFFDIO_REGISTER: {e}")))?;
        let shared = Arc::new(Shared {
            memory: memory.clone(),
            uffd,
            stop,
            pages: Mutex::new(Pages::new(missing)),
            counts: Counts::default(),
            on_end: Mutex::new(Some(on_end)),
            end: OnceLock::new(),
            ended: Mutex::new(false),
            changed: Condvar::new(),
        });
        let mut lazy = Self { shared: Arc::clone(&shared), threads: Vec::new() };
        if shared.pages.lock().left() == 0 {
            shared.complete();
            return Ok(lazy);
        }
        let spawn = |name: &str, body: Box<dyn FnOnce() + Send>| {
            std::thread::Builder::new()
                .name(name.to_owned())
                .spawn(body)
                .map_err(|e| unsupported(format!("thread {name}: {e}")))
        };
        let (for_faults, for_source) = (Arc::clone(&shared), Arc::clone(&source));
        let faults = spawn("lazy-faults", Box::new(move || serve::faults(&for_faults, &*for_source)))?;
        lazy.threads.push(faults);
        if let Some(chunk) = prefetch {
            let body = Box::new(move || serve::prefetch(&shared, &*source, chunk.max(1)));
            lazy.threads.push(spawn("lazy-prefetch", body)?);
        }
        Ok(lazy)
    }

    /// A handle that pages are given to.
    pub fn placer(&self) -> Placer {
        Placer { shared: Arc::downgrade(&self.shared) }
    }

    /// Figures so far.
    pub fn stats(&self) -> LazyStats {
        self.shared.stats()
    }

    /// Pages yet to come.
    pub fn missing(&self) -> PageBitmap {
        self.shared.pages.lock().missing().clone()
    }

    /// How it ended, with all of the end's work done; None while pages are missing.
    pub fn outcome(&self) -> Option<Result<(), LazyError>> {
        if !*self.shared.ended.lock() {
            return None;
        }
        match self.shared.end.get() {
            Some(End::Failed(error)) => Some(Err(error.clone())),
            _ => Some(Ok(())),
        }
    }

    /// Waits for the end; None if it does not come within `at_most`. Blocks.
    pub fn wait(&self, at_most: Duration) -> Option<Result<(), LazyError>> {
        let until = Instant::now() + at_most;
        let mut ended = self.shared.ended.lock();
        while !*ended {
            if self.shared.changed.wait_until(&mut ended, until).timed_out() && !*ended {
                return None;
            }
        }
        drop(ended);
        self.outcome()
    }

    /// Gives up: the guest ends as after a failure of the source. Nothing happens after the end.
    pub fn abandon(&self, why: &str) {
        let left = self.shared.pages.lock().left();
        self.shared.fail(LazyError::Abandoned { left, why: why.to_owned() });
    }
}

impl Drop for LazyMemory {
    fn drop(&mut self) {
        self.abandon("its owner is gone");
        for thread in self.threads.drain(..) {
            // `on_end` may own the last handle: a thread does not wait for itself.
            if thread.thread().id() != std::thread::current().id() {
                // A panic there was reported by the panic hook.
                drop(thread.join());
            }
        }
    }
}
