//! Whether a worker lives, why it died, and how it is let go or ended.
//!
//! Invariants: dead means that its process is seen to have ended, or its threads, or that none of them can run any more
//! ([`WorkerLink::depart`]), never that it does not answer nor that it was told to end; its resources are given back only
//! after that, or once ending it was in vain.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::WorkerLink;
use super::wire::{self, Way, unary};
use crate::capacity::Grant;
use crate::status::ApiError;
use crate::worker_process::{Processes, WorkerProcess};

/// How long a process whose connection broke may take to end.
const GONE: Duration = Duration::from_secs(2);

/// What a broken connection looks like: the worker itself would have given a reason.
const BROKEN: [&str; 5] = [
    "WORKER_UNAVAILABLE",
    "WORKER_UNKNOWN",
    "WORKER_CANCELLED",
    "WORKER_INTERNAL",
    // HTTP/2's word to a client that gave up too many calls, as of a worker that was frozen meanwhile.
    "WORKER_RESOURCE_EXHAUSTED",
];

/// Whether an error of a call to a process has no words of the worker's own.
pub(super) fn is_mute(error: &ApiError) -> bool {
    error.reason() == super::SILENT || BROKEN.contains(&error.reason())
}

impl WorkerLink {
    /// Whether its machine goes on when the daemon ends: at an upgrade every process does.
    pub fn outlives_daemon(&self, upgrading: bool) -> bool {
        self.inner.process.is_some() && (self.inner.outlives || upgrading)
    }

    /// The daemon ends: the worker goes on without it.
    pub fn keep(&self) {
        // One that is seen to its end has nothing that goes on.
        if let Some(process) = self.inner.process.as_ref().filter(|_| !self.has_departed()) {
            process.keep();
        }
    }

    /// Whether its process has ended; false in thread isolation.
    pub async fn is_dead(&self) -> bool {
        let Some(process) = &self.inner.process else { return false };
        tokio::time::timeout(GONE, process.exited()).await.is_ok()
    }

    /// Returns once nothing of it can run any more: its process has ended or, in thread isolation, it was ended and its
    /// threads are gone.
    pub async fn died(&self) {
        match (&self.inner.process, &self.inner.way) {
            (Some(process), _) => process.exited().await,
            (None, Way::Here(worker)) => worker.over().await,
            (None, Way::There(_)) => std::future::pending().await,
        }
    }

    /// Whether a call failed because its process has ended: then the error has no words of the worker's own.
    pub async fn died_of(&self, error: &ApiError) -> bool {
        BROKEN.contains(&error.reason()) && self.is_dead().await
    }

    /// Whether an error has no words of the worker's own while it may live: that says as little as silence. Waits a little
    /// for the process's end, so that asking again needs no pause.
    pub async fn may_live(&self, error: &ApiError) -> bool {
        match &self.inner.process {
            Some(_) if BROKEN.contains(&error.reason()) => !self.is_dead().await,
            _ => error.reason() == super::SILENT,
        }
    }

    /// Why a call failed: the end of the worker's process, if that is why.
    pub async fn cause(&self, error: ApiError) -> ApiError {
        if !self.died_of(&error).await {
            return error;
        }
        let inner = Arc::clone(&self.inner);
        let words = tokio::task::spawn_blocking(move || {
            inner.process.as_ref().map(WorkerProcess::last_words).unwrap_or_default()
        });
        let words = words.await.unwrap_or_default();
        let why = self.obituary().await;
        ApiError::internal(why.reason(), format!("{}; {words}", why.message()))
    }

    /// Why its process, which has ended, ended.
    pub async fn obituary(&self) -> ApiError {
        let end = self.death("it died").await.end.unwrap_or_default();
        let (_, reason) = crate::vm::actor::ended_state(&end, true);
        ApiError::internal(reason, end.detail)
    }

    /// Ends the machine and returns its last PMU images; then ends the worker and gives its resources back.
    pub async fn shutdown(&self) -> Result<Vec<PmuImage>, ApiError> {
        if let Some(process) = &self.inner.process {
            process.will_end();
        }
        let answer = unary!(self, self.inner.command, shutdown, ShutdownRequest { fence: self.fence() });
        self.end().await;
        Ok(answer?.pmu)
    }

    /// Ends the worker without asking it anything; its threads are joined. Says whether nothing of it can run any more:
    /// one of which that is not known may live until [`Self::died`] says otherwise.
    pub async fn end(&self) -> bool {
        self.end_by(async |process| process.end().await).await
    }

    /// The same of one whose machine is another's for good: a process is killed, it has nothing to put in order.
    pub async fn release(&self) -> bool {
        self.end_by(async |process| process.release().await).await
    }

    /// [`Self::release`] of one that has handed its memory over: a process is seen to its end aside, once nothing of it can
    /// run any more, unless it has cores that this daemon's threads keep off: those are free only then.
    pub async fn depart(&self, processes: &Processes) -> bool {
        let Some(process) = &self.inner.process else { return self.release().await };
        let house = {
            let grant = self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner);
            grant.as_ref().map(Grant::housekeeping).unwrap_or_default()
        };
        let shares = self.cores().iter().all(|core| house.contains(core));
        if !shares || !process.halt(house).await {
            return self.release().await;
        }
        self.inner.departed.store(true, Ordering::Release);
        let this = self.clone();
        processes.departing.see_off(&self.inner.fence.vm_uid, async move {
            if let Some(process) = &this.inner.process {
                process.exited().await;
                process.release().await;
            }
        });
        drop(self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner).take());
        true
    }

    /// Whether it is past running and is seen to its end.
    pub fn has_departed(&self) -> bool {
        self.inner.departed.load(Ordering::Acquire)
    }

    async fn end_by(&self, end: impl AsyncFnOnce(&WorkerProcess) -> bool) -> bool {
        if self.has_departed() {
            return true;
        }
        if let Some(thread) = self.inner.thread.lock().await.take() {
            thread.join().await;
        }
        let gone = match &self.inner.process {
            Some(process) => end(process).await,
            None => self.died().now_or_never().is_some(),
        };
        drop(self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner).take());
        gone
    }
}
