//! A worker's events, and what the end of their stream means.
//!
//! Invariant: who watches a worker does not keep it; a worker that does not answer may live, and is asked again.

use std::sync::Arc;

use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::wire::{self, streaming};
use super::{Inner, Told, WorkerLink};
use crate::status::ApiError;

/// A worker as who watches it holds it.
pub struct WeakWorker(std::sync::Weak<Inner>);

impl WeakWorker {
    /// Its events, asked for until it answers in some way. Whoever lets it go meanwhile ends this.
    pub async fn watch_until_answered(&self) -> Result<Told<WorkerEvent>, ApiError> {
        loop {
            let Some(inner) = self.0.upgrade() else {
                return Err(ApiError::internal("WORKER_GONE", "the worker was let go before it answered"));
            };
            let worker = WorkerLink { inner };
            // Each call waits for its deadline, or for the process to end: there is no need to pause between them.
            match worker.watch_events().await {
                Err(error) if worker.may_live(&error).await => {}
                answer => return answer,
            }
        }
    }

    /// What to make of its event stream's end.
    pub async fn death(&self, detail: &str) -> WorkerEvent {
        match self.0.upgrade() {
            Some(inner) => WorkerLink { inner }.death(detail).await,
            None => crate::vm::actor::worker_died(detail),
        }
    }
}

impl WorkerLink {
    /// Does not keep it.
    pub fn downgrade(&self) -> WeakWorker {
        WeakWorker(Arc::downgrade(&self.inner))
    }

    /// State changes that the guest or KVM caused.
    pub async fn watch_events(&self) -> Result<Told<WorkerEvent>, ApiError> {
        let request = WatchEventsRequest { fence: self.fence() };
        streaming!(self, watch_events, request)
    }

    /// What to make of a worker whose event stream broke: how its guest had ended, or that it died.
    pub async fn death(&self, detail: &str) -> WorkerEvent {
        let mut event = crate::vm::actor::worker_died(detail);
        if let Some(process) = &self.inner.process
            && self.is_dead().await
        {
            event = crate::vm::actor::worker_died(&format!("its process {} ended: {detail}", process.pid()));
            let inner = Arc::clone(&self.inner);
            let told = tokio::task::spawn_blocking(move || inner.process.as_ref()?.guest_end()).await;
            let told = told.unwrap_or_else(|error| {
                tracing::error!(pid = self.pid(), %error, "how its guest ended cannot be read");
                None
            });
            event.end = told.or(event.end);
        }
        event
    }
}
