//! Where the worker's threads are.

use vpmu_proto::worker::UpdatePlacementRequest;

use super::Inner;
use crate::error::WorkerError;
use crate::host::affinity;
use crate::machine::build;

/// Most cores that are taken from outside.
const MAX_CORES: usize = 8192;

/// Moves every thread of this process that runs no vCPU.
pub(super) async fn housekeeping(cores: Vec<u32>) -> Result<u32, WorkerError> {
    let set = tokio::task::spawn_blocking(move || move_housekeeping(&cores));
    set.await
        .map_err(|e| WorkerError::Thread { thread: "moving threads".to_owned(), problem: e.to_string() })?
}

/// The same; blocks for some system calls for each thread.
pub(super) fn move_housekeeping(cores: &[u32]) -> Result<u32, WorkerError> {
    let invalid = |remedy: String| WorkerError::invalid("cores", format!("{cores:?}"), remedy);
    if cores.is_empty() || cores.len() > MAX_CORES {
        return Err(invalid("give 1 to 8192 cores".to_owned()));
    }
    match affinity::set_housekeeping(cores) {
        Ok(threads) => Ok(u32::try_from(threads).unwrap_or(u32::MAX)),
        Err(error) => Err(invalid(format!("{error}; give cores that this process may use"))),
    }
}

/// Gives the vCPUs other cores.
pub(super) async fn update(inner: &Inner, request: &UpdatePlacementRequest) -> Result<Vec<u32>, WorkerError> {
    let _control = inner.control.lock().await;
    let machine = inner.machine()?;
    let fifo = build::fifo(request.fifo_priority)?;
    let slots = build::slots(&request.vcpu_cores, machine.cores().len(), &inner.cores)?;
    machine.place(slots.into_iter().map(|slot| (slot, fifo)).collect(), &inner.cores).await
}
