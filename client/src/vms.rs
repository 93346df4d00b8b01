//! Typed methods of `VirtualMachinesService`. Names are short (`web-1`) or full.

use crate::client::{Client, request_id};
use crate::error::ClientError;
use crate::names;
use tonic::Streaming;
use vpmu_proto::api::{
    CpuPlacement, CreateVirtualMachineRequest, DeleteVirtualMachineRequest, GetVirtualMachineRequest,
    GetVirtualMachineStatsRequest, ListVirtualMachinesRequest, PauseVirtualMachineRequest,
    RestoreVirtualMachineRequest, ResumeVirtualMachineRequest, SnapshotVirtualMachineRequest,
    StartVirtualMachineRequest, StopVirtualMachineRequest, UpdateVcpuPlacementRequest, VirtualMachine,
    VirtualMachineSpec, VirtualMachineStats, VirtualMachineView, WatchVirtualMachinesRequest,
    WatchVirtualMachinesResponse,
};
use vpmu_proto::longrunning::Operation;

impl Client {
    /// Gets one virtual machine.
    pub async fn get_vm(&self, name: &str) -> Result<VirtualMachine, ClientError> {
        let request = self.request(GetVirtualMachineRequest { name: names::vm(name) });
        self.call("GetVirtualMachine", self.raw_vms().get_virtual_machine(request)).await
    }

    /// Figures of a machine that runs or is paused.
    pub async fn vm_stats(&self, name: &str) -> Result<VirtualMachineStats, ClientError> {
        let request = self.request(GetVirtualMachineStatsRequest { name: names::vm(name) });
        self.call("GetVirtualMachineStats", self.raw_vms().get_virtual_machine_stats(request)).await
    }

    /// Lists all virtual machines, by name, over as many pages as it takes.
    pub async fn list_vms(&self) -> Result<Vec<VirtualMachine>, ClientError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.request(ListVirtualMachinesRequest {
                parent: names::DEFAULT_PROJECT.to_owned(),
                page_size: 0,
                page_token,
                view: VirtualMachineView::Basic as i32,
            });
            let page =
                self.call("ListVirtualMachines", self.raw_vms().list_virtual_machines(request)).await?;
            all.extend(page.virtual_machines);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Starts the creation of a virtual machine; it is created stopped.
    pub async fn create_vm(&self, name: &str, spec: VirtualMachineSpec) -> Result<Operation, ClientError> {
        self.create_vm_with(CreateVirtualMachineRequest {
            parent: names::DEFAULT_PROJECT.to_owned(),
            virtual_machine_id: names::short(name).to_owned(),
            virtual_machine: Some(VirtualMachine { spec: Some(spec), ..VirtualMachine::default() }),
            request_id: request_id(),
            validate_only: false,
        })
        .await
    }

    /// Starts the creation that `request` describes in full.
    pub async fn create_vm_with(
        &self,
        request: CreateVirtualMachineRequest,
    ) -> Result<Operation, ClientError> {
        let request = self.request(request);
        self.call("CreateVirtualMachine", self.raw_vms().create_virtual_machine(request)).await
    }

    /// Starts the deletion of a virtual machine.
    pub async fn delete_vm(&self, name: &str) -> Result<Operation, ClientError> {
        let request = self.request(DeleteVirtualMachineRequest {
            name: names::vm(name),
            etag: String::new(),
            request_id: request_id(),
        });
        self.call("DeleteVirtualMachine", self.raw_vms().delete_virtual_machine(request)).await
    }

    /// Asks for a start; the operation is done when every vCPU has entered the guest.
    pub async fn start_vm(&self, name: &str) -> Result<Operation, ClientError> {
        let request =
            self.request(StartVirtualMachineRequest { name: names::vm(name), request_id: request_id() });
        self.call("StartVirtualMachine", self.raw_vms().start_virtual_machine(request)).await
    }

    /// Asks for a stop.
    pub async fn stop_vm(&self, name: &str) -> Result<Operation, ClientError> {
        let request =
            self.request(StopVirtualMachineRequest { name: names::vm(name), request_id: request_id() });
        self.call("StopVirtualMachine", self.raw_vms().stop_virtual_machine(request)).await
    }

    /// Pauses a virtual machine; on return its PMU state is durable.
    pub async fn pause_vm(&self, name: &str) -> Result<VirtualMachine, ClientError> {
        let request = self.request(PauseVirtualMachineRequest { name: names::vm(name) });
        self.call("PauseVirtualMachine", self.raw_vms().pause_virtual_machine(request)).await
    }

    /// Resumes a paused virtual machine.
    pub async fn resume_vm(&self, name: &str) -> Result<VirtualMachine, ClientError> {
        let request = self.request(ResumeVirtualMachineRequest { name: names::vm(name) });
        self.call("ResumeVirtualMachine", self.raw_vms().resume_virtual_machine(request)).await
    }

    /// Starts writing a machine to `file` in the host's snapshot directory; the response is a `Snapshot`.
    pub async fn snapshot_vm(&self, name: &str, file: &str) -> Result<Operation, ClientError> {
        let request = self.request(SnapshotVirtualMachineRequest {
            name: names::vm(name),
            file: file.to_owned(),
            request_id: request_id(),
        });
        self.call("SnapshotVirtualMachine", self.raw_vms().snapshot_virtual_machine(request)).await
    }

    /// Starts making a new machine from `file`; `lazy` lets it run before its memory is read, `paused` leaves it paused.
    pub async fn restore_vm(
        &self,
        name: &str,
        file: &str,
        lazy: bool,
        paused: bool,
    ) -> Result<Operation, ClientError> {
        let request = self.request(RestoreVirtualMachineRequest {
            parent: names::DEFAULT_PROJECT.to_owned(),
            virtual_machine_id: names::short(name).to_owned(),
            file: file.to_owned(),
            lazy,
            paused,
            request_id: request_id(),
        });
        self.call("RestoreVirtualMachine", self.raw_vms().restore_virtual_machine(request)).await
    }

    /// Gives a machine's vCPUs other host cores; a running one is moved without being stopped.
    pub async fn update_placement(
        &self,
        name: &str,
        placement: CpuPlacement,
    ) -> Result<VirtualMachine, ClientError> {
        let request = self.request(UpdateVcpuPlacementRequest {
            name: names::vm(name),
            placement: Some(placement),
            etag: String::new(),
        });
        self.call("UpdateVcpuPlacement", self.raw_vms().update_vcpu_placement(request)).await
    }

    /// Streams the present state, then every change, of one machine or (with `None`) of all.
    pub async fn watch_vms(
        &self,
        name: Option<&str>,
    ) -> Result<Streaming<WatchVirtualMachinesResponse>, ClientError> {
        let request = WatchVirtualMachinesRequest { name: name.map(names::vm).unwrap_or_default() };
        self.call("WatchVirtualMachines", self.raw_vms().watch_virtual_machines(request)).await
    }
}
