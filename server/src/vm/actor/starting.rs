//! A machine gets a worker, which builds it and runs it.
//!
//! ```text
//!   opened, attached ──▶ builds ──▶ built ──▶ followed
//!                          │          ▲
//!            granted ──────┘──────────┘  what the grant waits for is durable, as a rule, before the machine is built
//! ```
//! Invariant: a worker is granted nothing before its ownership record is durable and its runtime directory has the machine's
//! name. It may run, and be read from, before this
//! daemon has heard that the machine is built; one that is not built ends.

use std::future::Future;

use vpmu_proto::api::VirtualMachineSpec;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::worker::{CreateVmResponse, RestoreFrom};

use super::Actor;
use crate::capacity::Grant;
use crate::status::ApiError;
use crate::worker_link::{Launch, WorkerLink};

/// A worker that has built its machine.
pub(super) struct Launched {
    pub(super) worker: WorkerLink,
    built: CreateVmResponse,
    /// It has been granted the right to run already, and does.
    pub(super) runs: bool,
}

impl Actor {
    /// Gets a worker and gives it the right to run; `run` says whether it does at once.
    pub(super) async fn launch_and_run(
        &mut self,
        grant: Grant,
        spec: &VirtualMachineSpec,
        restore: Option<RestoreFrom>,
        run: bool,
    ) -> Result<(), ApiError> {
        let _awake = self.daemon.awake.hold();
        let next = OwnershipRecord { incarnation: self.ownership.incarnation + 1, ..self.owned() };
        self.ownership = self.daemon.store.append_ownership(next).await?;
        self.forget_dead().await;
        // What is read from a file first takes long.
        let at_once = (run && restore.is_none()).then_some(self.ownership.epoch);
        let plan = self.plan(self.ownership.incarnation, spec, restore);
        let launched = self.launch(grant, plan, async { at_once }).await?;
        let runs = launched.runs;
        self.take_worker(launched);
        self.let_run(run, runs).await
    }

    /// Gets a worker and has it build the machine. It is granted the epoch that `permitted` says, if any, and runs; if that
    /// fails, it is still to be granted.
    pub(super) async fn launch(
        &self,
        grant: Grant,
        plan: Launch<'_>,
        permitted: impl Future<Output = Option<u64>>,
    ) -> Result<Launched, ApiError> {
        let factory = &self.daemon.workers;
        let worker = WorkerLink::open(factory, grant, &plan).await?;
        let granted = async {
            // It has been asked to build. Who waits for its console reads from the first byte on.
            self.publish_opening(&worker);
            let Some(epoch) = permitted.await else { return Ok(false) };
            // It must not run where nobody would look for it; that it does not get there ends the build, in order.
            if worker.claimed().await.is_err() {
                return Ok(false);
            }
            // A worker that has not been asked to build yet, or takes too long, refuses; nothing is lost.
            Ok(worker.grant(epoch, true).await.is_ok())
        };
        let (built, runs) = tokio::try_join!(biased; Box::pin(worker.build(factory, plan)), granted)?;
        Ok(Launched { worker, built, runs })
    }

    pub(super) fn plan<'a>(
        &'a self,
        incarnation: u64,
        spec: &'a VirtualMachineSpec,
        restore: Option<RestoreFrom>,
    ) -> Launch<'a> {
        let (vm_uid, vm_name) = (self.vm.uid.as_str(), self.name.vm());
        Launch {
            vm_uid,
            vm_name,
            incarnation,
            spec,
            incoming: false,
            pmu_shape: None,
            restore,
            beside: false,
            first: false,
        }
    }

    pub(super) fn take_worker(&mut self, Launched { worker, built, .. }: Launched) {
        for warning in &built.warnings {
            tracing::warn!(vm = %self.name, %warning);
        }
        self.worker = Some(worker);
        self.shape = built.pmu_shape;
        self.vm.pmu_restored = None;
        self.vm.cpuid_differences = built.cpuid_differences;
        crate::vm::view::brief(&mut self.vm);
        self.console = std::sync::Arc::default();
        self.daemon.host.hypervisor.clone_into(&mut self.vm.hypervisor);
        self.daemon.host.pmu_mode.clone_into(&mut self.vm.pmu_mode);
        // Who has attached to the console already reads it from now on.
        self.publish_view();
    }

    /// Follows what the worker says, and gives it its right if it `runs` not yet; both at once, each is a call.
    pub(super) async fn let_run(&self, run: bool, runs: bool) -> Result<(), ApiError> {
        let Some(worker) = self.worker.clone() else { return Ok(()) };
        let granted = async { if runs { Ok(0) } else { worker.grant(self.ownership.epoch, run).await } };
        let (followed, granted) = tokio::join!(self.follow_worker(&worker), granted);
        followed?;
        granted.map(drop)
    }
}
