//! The control plane's end of one worker: a `vpmu.worker.v1` client, the fence that every command carries, and the
//! resources that the worker holds.
//!
//! In thread isolation it is the service itself, in this process and without a wire; in process isolation a process of
//! its own serves the same over a Unix socket. Nothing here relies on which but what starts, adopts and ends it, and the
//! stream of commands that only a socket needs.
//!
//! | module | what |
//! |---|---|
//! | `launch` | how a worker comes to be held: started, or taken over from a former daemon |
//! | `wire` | how a call reaches it: directly or over gRPC, always with a deadline |
//! | `lane` | a stream for the commands that are to be quick |
//! | `calls` | commands to its machine, and questions about it |
//! | `console` | console output and input, and what is left of it |
//! | `migrating` | commands of a migration, at its source and at its destination |
//! | `watching` | its events, held weakly, and what the end of that stream means |
//! | `ending` | whether it lives, why it died, and how it is let go or ended |
//!
//! Invariants: every call has a deadline, so that no worker can hang an actor; every command carries the fence; the
//! resources (the grant of cores and memory) are given back by [`WorkerLink::end`], once the worker is gone, or by
//! [`WorkerLink::depart`].

mod calls;
mod console;
mod ending;
mod lane;
mod launch;
mod migrating;
mod watching;
mod wire;

use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use vpmu_proto::worker::Fence;

use crate::capacity::Grant;
use crate::worker_process::WorkerProcess;
use wire::Way;

pub use console::ConsoleHistory;
pub use launch::{Launch, WorkerFactory};
pub use watching::WeakWorker;
pub(crate) use wire::{ACQUAINTED, acquaint};
pub use wire::{SILENT, Told};

/// A worker; cloned freely, ended by [`WorkerLink::end`] or with its last clone.
#[derive(Clone)]
pub struct WorkerLink {
    inner: Arc<Inner>,
}

struct Inner {
    way: Way,
    lane: Arc<lane::Lane>,
    /// It attaches in the call that has its machine built.
    attaches_with_build: bool,
    fence: Fence,
    seq: AtomicU64,
    cores: Mutex<Arc<[u32]>>,
    thread: tokio::sync::Mutex<Option<vcpu_worker::in_process::InProcessWorker>>,
    process: Option<WorkerProcess>,
    outlives: bool,
    /// It is past running, and is seen to its end.
    departed: AtomicBool,
    /// Deadline of an ordinary command.
    command: Duration,
    /// What must be asked of it before anything else.
    first: Option<launch::First>,
    /// After what uses it, so that the last clone's drop ends that first.
    grant: Mutex<Option<Grant>>,
}

impl WorkerLink {
    /// Which start of its machine it is.
    pub fn incarnation(&self) -> u64 {
        self.inner.fence.incarnation
    }

    /// Process id in process isolation, else 0.
    pub fn pid(&self) -> u32 {
        self.inner.process.as_ref().map_or(0, WorkerProcess::pid)
    }

    /// How its process is confined; empty in thread isolation.
    pub fn sandbox(&self) -> &str {
        self.inner.process.as_ref().map_or("", WorkerProcess::sandbox)
    }

    /// Host core of each vCPU.
    pub fn cores(&self) -> Arc<[u32]> {
        Arc::clone(&self.inner.cores.lock().unwrap_or_else(PoisonError::into_inner))
    }

    #[expect(clippy::unnecessary_wraps, reason = "every request has it as an optional message")]
    fn fence(&self) -> Option<Fence> {
        Some(self.inner.fence.clone())
    }
}
