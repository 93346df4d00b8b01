//! A worker in this process (isolation = thread): the same service that one in a process of its own serves over gRPC, called
//! without a wire.
//!
//! Invariant: who drops it, ends it: every stream, every migration and every vCPU thread.

use std::io;

use crate::service::{Worker, WorkerOptions};

/// A worker in this process. Dropping it ends it in the background; [`InProcessWorker::join`] waits for the end.
#[derive(Debug)]
pub struct InProcessWorker {
    worker: Option<Worker>,
}

impl InProcessWorker {
    /// Starts one. Must be called on a runtime.
    ///
    /// # Errors
    /// If there is no runtime.
    pub fn start(options: WorkerOptions) -> io::Result<(Worker, Self)> {
        tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
        let worker = Worker::new(options);
        Ok((worker.clone(), Self { worker: Some(worker) }))
    }

    /// Ends the worker and waits until none of its threads is left.
    pub async fn join(mut self) {
        if let Some(worker) = self.worker.take() {
            end(worker).await;
        }
    }

    /// Whether it has ended.
    pub fn is_ended(&self) -> bool {
        self.worker.as_ref().is_none_or(|worker| worker.ended().is_cancelled())
    }
}

impl Drop for InProcessWorker {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(end(worker))),
                // The runtime is gone or going: its tasks end with it, the vCPU threads with the machine.
                Err(_) => worker.ended().cancel(),
            }
        }
    }
}

async fn end(worker: Worker) {
    if let Err(error) = worker.close().await {
        tracing::warn!(%error, "ending a worker");
    }
}
