//! `vpmu.v1.VirtualMachinesService`.

use std::sync::Arc;

use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status, Streaming};
use vpmu_proto::api::virtual_machines_service_server::VirtualMachinesService;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::Operation;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use super::{BoxStream, INLINE_WAIT, operation, page};
use crate::daemon::Daemon;
use crate::names::{self, VmName};
use crate::ops::{now, pack};
use crate::status::ApiError;
use crate::validate;
use crate::vm::command::Command;
use crate::vm::view::whole;

/// The service.
#[derive(Clone)]
pub struct Vms {
    daemon: Arc<Daemon>,
}

impl Vms {
    /// Over the daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    async fn create(&self, request: CreateVirtualMachineRequest) -> Result<Operation, ApiError> {
        let daemon = &self.daemon;
        let project = names::parse_project("parent", &request.parent)?;
        let name = VmName::new(&project, &request.virtual_machine_id)?;
        let (spec, start) = validate::new_machine(&request)?;
        let spec = validate::spec(spec, &daemon.host, daemon.capacity.memory_bytes())?;
        if let Some(placement) = &spec.placement {
            let field = "virtual_machine.spec.placement";
            crate::placement::validate(field, placement, spec.vcpus, &daemon.capacity)?;
        }
        validate::pmu_on_host(&spec, &daemon.host)?;
        let mut vm = VirtualMachine {
            name: name.to_string(),
            uid: uuid::Uuid::new_v4().to_string(),
            spec: Some(spec),
            hypervisor: daemon.host.hypervisor.to_owned(),
            pmu_mode: daemon.host.pmu_mode.to_owned(),
            ..VirtualMachine::default()
        };
        vm.set_observed_state(virtual_machine::State::Creating);
        if request.validate_only {
            return Ok(Operation {
                name: format!("operations/{}", uuid::Uuid::nil()),
                metadata: Some(metadata(&name, "create")),
                done: true,
                result: Some(vpmu_proto::longrunning::operation::Result::Response(pack(
                    "VirtualMachine",
                    &vm,
                ))),
            });
        }
        operation(
            daemon,
            "CreateVirtualMachine",
            &request.request_id,
            &request,
            metadata(&name, "create"),
            INLINE_WAIT,
            |seed| async {
                let record = VmRecord { vm: Some(vm), pmu_shape: None };
                let handle =
                    daemon.registry.insert(daemon, &name, record, OwnershipRecord::default(), false)?;
                handle.ask(|reply| Command::Create { seed, start, reply }).await
            },
        )
        .await
    }

    async fn act(
        &self,
        verb: &'static str,
        name: &str,
        request_id: &str,
        request: &impl prost::Message,
        command: impl FnOnce(crate::ops::Seed, crate::vm::command::Reply<uuid::Uuid>) -> Command,
    ) -> Result<Operation, ApiError> {
        let name = VmName::parse("name", name, "")?;
        operation(&self.daemon, verb, request_id, request, metadata(&name, verb), INLINE_WAIT, |seed| async {
            self.daemon.registry.get(&name)?.ask(|reply| command(seed, reply)).await
        })
        .await
    }

    fn list(&self, request: &ListVirtualMachinesRequest) -> Result<ListVirtualMachinesResponse, ApiError> {
        let project = names::parse_project("parent", &request.parent)?;
        let size = validate::page_size(request.page_size, 500)?;
        if !request.page_token.is_empty() {
            VmName::parse("page_token", &request.page_token, "")?;
        }
        let full = match VirtualMachineView::try_from(request.view) {
            Ok(VirtualMachineView::Full) => true,
            Ok(VirtualMachineView::Unspecified | VirtualMachineView::Basic) => false,
            Err(_) => {
                return Err(ApiError::invalid(
                    "view",
                    request.view,
                    "UNKNOWN_VIEW",
                    "is no view",
                    "use BASIC or FULL",
                ));
            }
        };
        let all = self.daemon.registry.list(Some(&project));
        let (page, next_page_token) =
            page(all, size, &request.page_token, |h| h.name.to_string(), |key, token| key > token);
        let virtual_machines = page
            .iter()
            .map(crate::vm::registry::VmHandle::view)
            .map(|view| if full { whole(view.vm.clone()) } else { basic(&view.vm) })
            .collect();
        Ok(ListVirtualMachinesResponse { virtual_machines, next_page_token })
    }
}

/// A copy without what [`VirtualMachineView::Basic`] leaves out, which is not copied first.
fn basic(vm: &VirtualMachine) -> VirtualMachine {
    VirtualMachine {
        cpuid_differences: Vec::new(),
        name: vm.name.clone(),
        uid: vm.uid.clone(),
        etag: vm.etag.clone(),
        spec: vm.spec.clone(),
        desired_state: vm.desired_state,
        observed_state: vm.observed_state,
        reason: vm.reason.clone(),
        message: vm.message.clone(),
        create_time: vm.create_time,
        update_time: vm.update_time,
        epoch: vm.epoch,
        incarnation: vm.incarnation,
        worker_pid: vm.worker_pid,
        hypervisor: vm.hypervisor.clone(),
        pmu_mode: vm.pmu_mode.clone(),
        vcpu_cores: vm.vcpu_cores.clone(),
        migration: vm.migration.clone(),
        moved_to: vm.moved_to.clone(),
        sandbox: vm.sandbox.clone(),
        restart_count: vm.restart_count,
        next_restart_time: vm.next_restart_time,
        restart_row: vm.restart_row,
        last_start_time: vm.last_start_time,
        pmu_restored: vm.pmu_restored.clone(),
    }
}

pub(super) fn metadata(name: &VmName, verb: &str) -> prost_types::Any {
    let metadata = OperationMetadata {
        target: name.to_string(),
        verb: verb.to_owned(),
        create_time: Some(now()),
        end_time: None,
        ..OperationMetadata::default()
    };
    pack("OperationMetadata", &metadata)
}

#[tonic::async_trait]
impl VirtualMachinesService for Vms {
    async fn get_virtual_machine(
        &self,
        request: Request<GetVirtualMachineRequest>,
    ) -> Result<Response<VirtualMachine>, Status> {
        let name = VmName::parse("name", &request.get_ref().name, "")?;
        Ok(Response::new(whole(self.daemon.registry.get(&name)?.view().vm.clone())))
    }

    async fn get_virtual_machine_stats(
        &self,
        request: Request<GetVirtualMachineStatsRequest>,
    ) -> Result<Response<VirtualMachineStats>, Status> {
        let name = VmName::parse("name", &request.get_ref().name, "")?;
        let view = self.daemon.registry.get(&name)?.view();
        let worker = view.worker.clone().ok_or_else(|| {
            ApiError::precondition(
                "VM_HAS_NO_WORKER",
                &name.to_string(),
                format!("{name} has figures while it runs or is paused; start it"),
            )
        })?;
        let mut stats = worker.stats().await?;
        stats.name = name.to_string();
        Ok(Response::new(stats))
    }

    async fn list_virtual_machines(
        &self,
        request: Request<ListVirtualMachinesRequest>,
    ) -> Result<Response<ListVirtualMachinesResponse>, Status> {
        Ok(Response::new(self.list(request.get_ref())?))
    }

    async fn create_virtual_machine(
        &self,
        request: Request<CreateVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        Ok(Response::new(self.create(request.into_inner()).await?))
    }

    async fn delete_virtual_machine(
        &self,
        request: Request<DeleteVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        let r = request.into_inner();
        let etag = r.etag.clone();
        let command = |seed, reply| Command::Delete { etag, seed, reply };
        Ok(Response::new(self.act("delete", &r.name, &r.request_id, &r, command).await?))
    }

    async fn start_virtual_machine(
        &self,
        request: Request<StartVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        let r = request.into_inner();
        let command = |seed, reply| Command::Start { seed, reply };
        Ok(Response::new(self.act("start", &r.name, &r.request_id, &r, command).await?))
    }

    async fn stop_virtual_machine(
        &self,
        request: Request<StopVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        let r = request.into_inner();
        let command = |seed, reply| Command::Stop { seed, reply };
        Ok(Response::new(self.act("stop", &r.name, &r.request_id, &r, command).await?))
    }

    async fn pause_virtual_machine(
        &self,
        request: Request<PauseVirtualMachineRequest>,
    ) -> Result<Response<VirtualMachine>, Status> {
        let name = VmName::parse("name", &request.get_ref().name, "")?;
        let vm = self.daemon.registry.get(&name)?.ask(|reply| Command::Pause { reply }).await?;
        Ok(Response::new(whole(vm)))
    }

    async fn resume_virtual_machine(
        &self,
        request: Request<ResumeVirtualMachineRequest>,
    ) -> Result<Response<VirtualMachine>, Status> {
        let name = VmName::parse("name", &request.get_ref().name, "")?;
        let vm = self.daemon.registry.get(&name)?.ask(|reply| Command::Resume { reply }).await?;
        Ok(Response::new(whole(vm)))
    }

    async fn snapshot_virtual_machine(
        &self,
        request: Request<SnapshotVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        Ok(Response::new(super::snapshots::take(&self.daemon, request.get_ref()).await?))
    }

    async fn restore_virtual_machine(
        &self,
        request: Request<RestoreVirtualMachineRequest>,
    ) -> Result<Response<Operation>, Status> {
        Ok(Response::new(super::snapshots::restore(&self.daemon, request.get_ref()).await?))
    }

    async fn update_vcpu_placement(
        &self,
        request: Request<UpdateVcpuPlacementRequest>,
    ) -> Result<Response<VirtualMachine>, Status> {
        let UpdateVcpuPlacementRequest { name, placement, etag } = request.into_inner();
        let name = VmName::parse("name", &name, "")?;
        let handle = self.daemon.registry.get(&name)?;
        let placement = placement.ok_or_else(|| {
            let remedy =
                "say where the vCPUs are to be; an empty one means shared cores that the host chooses";
            ApiError::invalid("placement", "", "FIELD_REQUIRED", "is missing", remedy)
        })?;
        let vcpus = handle.view().vm.spec.as_ref().map_or(0, |spec| spec.vcpus);
        crate::placement::validate("placement", &placement, vcpus, &self.daemon.capacity)?;
        let vm = handle.ask(|reply| Command::Place { placement, etag, reply }).await?;
        Ok(Response::new(whole(vm)))
    }

    type WatchVirtualMachinesStream = BoxStream<WatchVirtualMachinesResponse>;

    async fn watch_virtual_machines(
        &self,
        request: Request<WatchVirtualMachinesRequest>,
    ) -> Result<Response<Self::WatchVirtualMachinesStream>, Status> {
        let only = match request.get_ref().name.as_str() {
            "" => None,
            name => Some(VmName::parse("name", name, "")?),
        };
        // Subscribe before listing: what changes in between is seen twice rather than never.
        let mut events = self.daemon.events.subscribe();
        let existing: Vec<VirtualMachine> = if let Some(name) = &only {
            vec![self.daemon.registry.get(name)?.view().vm.clone()]
        } else {
            let all = self.daemon.registry.list(Some(names::DEFAULT_PROJECT));
            all.iter().map(|h| h.view().vm.clone()).collect()
        };
        let sequence = self.daemon.events.sequence();
        let shutdown = self.daemon.shutdown.clone();
        let prefix = format!("projects/{}/virtualMachines/", names::DEFAULT_PROJECT);
        let only = only.map(|n| n.to_string());
        let step = move |kind: Kind, virtual_machine, sequence| {
            Ok(WatchVirtualMachinesResponse { kind: kind as i32, virtual_machine, sequence })
        };
        let stream = async_stream::stream! {
            for vm in existing {
                yield step(Kind::Existing, Some(whole(vm)), sequence);
            }
            yield step(Kind::Synced, None, sequence);
            loop {
                let event = tokio::select! {
                    () = shutdown.cancelled() => {
                        yield Err(ApiError::shutting_down().into());
                        return;
                    }
                    event = events.recv() => event,
                };
                match event {
                    Ok(mut event) => {
                        let name = event.virtual_machine.as_ref().map_or("", |vm| vm.name.as_str());
                        let wanted = only.as_ref().map_or_else(|| name.starts_with(&prefix), |only| only == name);
                        if wanted {
                            event.virtual_machine = event.virtual_machine.map(whole);
                            yield Ok(event);
                        }
                    }
                    Err(RecvError::Lagged(_)) => yield step(Kind::Lagged, None, 0),
                    Err(RecvError::Closed) => return,
                }
            }
        };
        Ok(Response::new(Box::pin(stream)))
    }

    type AttachConsoleStream = BoxStream<AttachConsoleResponse>;

    async fn attach_console(
        &self,
        request: Request<Streaming<AttachConsoleRequest>>,
    ) -> Result<Response<Self::AttachConsoleStream>, Status> {
        let stream = super::console::attach(&self.daemon, request.into_inner()).await?;
        Ok(Response::new(stream))
    }
}
