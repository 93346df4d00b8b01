//! A machine whose memory comes while it runs.
//!
//! When the memory's source is lost the machine ends as FAILED with the reason in its detail: every vCPU is asked to
//! pause and kicked, and only when they are out (or are stuck in KVM's emulator with their kick pending) is the memory
//! released. Since the guest has ended, none enters again.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use vpmu_proto::worker::{GuestEnd, guest_end};

use super::{Lifecycle, Machine};
use crate::bitmap::PageBitmap;
use crate::error::WorkerError;
use crate::lazy::{Faults, LazyError, LazyMemory, LazyStats, OnEnd, PageSource, Placer};
use crate::vcpu::state::State;
use crate::vcpu::{Left, Listener as _};

/// How long a failure waits for vCPUs to come out before it releases what they wait for.
const OUT: Duration = Duration::from_secs(2);

impl Machine {
    /// Lets `missing` pages come from `source`; see [`LazyMemory::begin`]. Before the first entry.
    pub fn begin_lazy(
        &self,
        missing: PageBitmap,
        source: Arc<dyn PageSource>,
        prefetch: Option<u64>,
    ) -> Result<(), WorkerError> {
        let lazy = LazyMemory::begin(&self.memory, missing, source, prefetch, self.lazy_end())?;
        *self.lazy.lock().unwrap_or_else(PoisonError::into_inner) = Some(lazy);
        Ok(())
    }

    /// Lets the rest of a machine that has moved come from its source, through `faults`. `told` hears first whether all of
    /// it came. Before the state is set, which may touch pages already.
    pub fn begin_postcopy(
        &self,
        faults: Faults,
        missing: PageBitmap,
        source: Arc<dyn PageSource>,
        told: Box<dyn FnOnce(bool) + Send>,
    ) -> Result<Placer, WorkerError> {
        let end = self.ends_as(guest_end::Kind::PostcopySourceLost);
        let on_end: OnEnd = Box::new(move |how| {
            told(how.is_ok());
            end(how);
        });
        let lazy = LazyMemory::begin_with(faults, &self.memory, missing, source, None, on_end)?;
        let placer = lazy.placer();
        *self.lazy.lock().unwrap_or_else(PoisonError::into_inner) = Some(lazy);
        Ok(placer)
    }

    /// What ends this machine when its memory does not come.
    pub fn lazy_end(&self) -> OnEnd {
        self.ends_as(guest_end::Kind::WorkerError)
    }

    fn ends_as(&self, lost: guest_end::Kind) -> OnEnd {
        let lifecycle = Arc::clone(&self.lifecycle);
        let name = self.name.clone();
        let states: Vec<_> = self.vcpus.iter().map(crate::vcpu::VcpuHandle::watcher).collect();
        Box::new(move |how| match how {
            Ok(stats) => tracing::info!(vm = %name, ?stats, "all of the memory is there"),
            Err(error) => {
                lifecycle.fail(lost, &error);
                let until = Instant::now() + OUT;
                while states.iter().any(|state| state() == State::Running) && Instant::now() < until {
                    std::thread::park_timeout(Duration::from_millis(1));
                }
            }
        })
    }

    /// Figures of memory that comes or came lazily; none if it did not.
    pub fn lazy_stats(&self) -> Option<LazyStats> {
        self.lazy.lock().unwrap_or_else(PoisonError::into_inner).as_ref().map(LazyMemory::stats)
    }

    /// Refuses what needs all of the memory while some is yet to come.
    pub fn memory_is_here(&self, what: &'static str) -> Result<(), WorkerError> {
        match self.lazy_stats() {
            Some(LazyStats { missing, .. }) if missing > 0 => Err(WorkerError::State {
                what,
                state: format!("MEMORY_ARRIVING ({missing} pages are yet to come)"),
                remedy: "wait until its memory is there and ask again",
            }),
            _ => Ok(()),
        }
    }

    /// Gives up on memory that has not come, so that no vCPU waits for it. Blocks for a moment.
    pub(super) fn end_lazy(&self) {
        let lazy = self.lazy.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(lazy) = lazy {
            lazy.abandon("the machine is being stopped");
        }
    }
}

impl Lifecycle {
    /// The guest cannot go on, for a reason that no vCPU has met.
    pub(super) fn fail(&self, lost: guest_end::Kind, error: &LazyError) {
        let detail = format!("{}: {error}", error.reason());
        let kind =
            if matches!(error, LazyError::Source { .. }) { lost } else { guest_end::Kind::WorkerError };
        let end = GuestEnd { kind: kind.into(), vcpu: 0, detail };
        // As if a vCPU that does not exist had met it: all others, that is every one, are paused.
        self.left(u32::MAX, Left::Ended(end));
    }
}
