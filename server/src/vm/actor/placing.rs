//! Gives a machine's vCPUs other host cores.
//!
//! Order: the new cores are granted beside the old ones, the worker moves its threads and says where they are, the old
//! cores are given back, the record follows. A worker that fails has moved everything back, and so does the grant.

use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::api::{CpuPlacement, VirtualMachine};

use super::Actor;
use crate::placement::Wanted;
use crate::status::ApiError;
use crate::vm::transitions::Action;

impl Actor {
    pub(super) async fn place(
        &mut self,
        placement: CpuPlacement,
        etag: &str,
    ) -> Result<VirtualMachine, ApiError> {
        let state = self.admit(Action::Place)?;
        self.check_etag(etag)?;
        let vcpus = self.vm.spec.as_ref().map_or(0, |spec| spec.vcpus);
        if matches!(state, State::Running | State::Paused) {
            let worker = self.worker.clone().ok_or_else(|| self.refuse(Action::Place))?;
            let cores = worker.place(&Wanted::new(vcpus, &placement), placement.fifo_priority).await?;
            tracing::info!(vm = %self.name, ?cores, "its vCPUs are on other cores");
        }
        let (reason, message) = (self.vm.reason.clone(), self.vm.message.clone());
        let edit = |vm: &mut VirtualMachine| {
            if let Some(spec) = &mut vm.spec {
                spec.placement = Some(placement);
            }
        };
        self.change(state, &reason, &message, Kind::Updated, edit).await?;
        Ok(self.vm.clone())
    }
}
