//! What everybody but the actor sees of a machine: a snapshot that is replaced whole, so that reading never waits.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio_util::sync::CancellationToken;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::{PmuShape, VirtualMachine};

use crate::worker_link::{ConsoleHistory, WorkerLink};

/// Snapshot of one machine.
#[derive(Clone, Default)]
pub struct VmView {
    /// The public record.
    pub vm: VirtualMachine,
    /// PMU that the guest got; none before its first start.
    pub pmu_shape: Option<PmuShape>,
    /// Its worker, if it has one.
    pub worker: Option<WorkerLink>,
    /// Console of its last run, once that has ended.
    pub console: Arc<ConsoleHistory>,
    /// The open migration.
    pub migration: Option<ActiveMigration>,
    /// The actor is gone.
    pub deleted: bool,
}

impl VmView {
    /// Its state.
    pub fn state(&self) -> State {
        self.vm.observed_state()
    }
}

/// An open migration away from here.
#[derive(Clone)]
pub struct ActiveMigration {
    /// Full name.
    pub name: String,
    /// Asks it to stop; obeyed until the commit.
    pub cancel: CancellationToken,
    /// Set right before the commit is written: from then on it cannot be cancelled.
    pub committed: Arc<AtomicBool>,
}
