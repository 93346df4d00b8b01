//! A host with scripted answers on a real Unix socket: what the client does with them is what is tested, wire included.
//! It exists for answers that a real host does not give on demand: an operation that fails late, a call that hangs.
#![allow(dead_code)]

use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::UnixListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};
use vpmu_client::Endpoint;
use vpmu_proto::api::migrations_service_server::{MigrationsService, MigrationsServiceServer};
use vpmu_proto::api::pmu_service_server::{PmuService, PmuServiceServer};
use vpmu_proto::api::virtual_machines_service_server::{
    VirtualMachinesService, VirtualMachinesServiceServer,
};
use vpmu_proto::api::*;
use vpmu_proto::google::rpc;
use vpmu_proto::longrunning::operations_server::{Operations, OperationsServer};
use vpmu_proto::longrunning::*;

type Answer<T> = Result<Response<T>, Status>;
type Items<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// A running fake; it ends when this is dropped.
pub(crate) struct FakeHost {
    directory: tempfile::TempDir,
    typed: Arc<Mutex<Vec<u8>>>,
    runtime: Option<tokio::runtime::Runtime>,
}

impl FakeHost {
    /// Serves on a socket in a directory of its own.
    pub(crate) fn serve() -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        // A runtime of its own, so that dropping the host ends its connections too.
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .expect("a runtime");
        let guard = runtime.enter();
        let listener = UnixListener::bind(directory.path().join("s")).expect("a socket");
        drop(guard);
        let script = Script::default();
        let typed = Arc::clone(&script.typed);
        let server = tonic::transport::Server::builder()
            .add_service(VirtualMachinesServiceServer::new(script.clone()))
            .add_service(PmuServiceServer::new(script.clone()))
            .add_service(MigrationsServiceServer::new(script.clone()))
            .add_service(OperationsServer::new(script))
            .serve_with_incoming(UnixListenerStream::new(listener));
        runtime.spawn(async move { server.await.expect("serves") });
        Self { directory, typed, runtime: Some(runtime) }
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    /// What was typed at its consoles, as far as it has read.
    pub(crate) fn typed(&self) -> Vec<u8> {
        self.typed.lock().expect("not poisoned").clone()
    }

    pub(crate) fn endpoint(&self) -> Endpoint {
        Endpoint::unix(&self.socket()).expect("short enough")
    }
}

impl Drop for FakeHost {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// The answers.
#[derive(Clone, Default)]
struct Script {
    /// Waits that an operation has seen.
    waits: Arc<AtomicU32>,
    /// What was typed at the consoles.
    typed: Arc<Mutex<Vec<u8>>>,
}

fn machine(name: &str) -> VirtualMachine {
    VirtualMachine {
        name: name.to_owned(),
        uid: "uid".to_owned(),
        spec: Some(VirtualMachineSpec { vcpus: 2, memory_bytes: 256 << 20, ..VirtualMachineSpec::default() }),
        desired_state: virtual_machine::DesiredState::Running.into(),
        observed_state: virtual_machine::State::Running.into(),
        hypervisor: "simulated".to_owned(),
        pmu_mode: "model".to_owned(),
        vcpu_cores: vec![0, 1],
        epoch: 1,
        ..VirtualMachine::default()
    }
}

fn pack<M: prost::Message>(name: &str, message: &M) -> prost_types::Any {
    prost_types::Any { type_url: format!("type.googleapis.com/{name}"), value: message.encode_to_vec() }
}

fn migration(state: migration::State, round: u32) -> Migration {
    let vcpus = vec![VcpuPmu { digest: "d".to_owned(), ..VcpuPmu::default() }];
    Migration {
        name: "projects/default/virtualMachines/a/migrations/m".to_owned(),
        state: state.into(),
        phase: state.as_str_name().to_lowercase(),
        progress: Some(MigrationProgress { round, memory_bytes: 1 << 20, ..MigrationProgress::default() }),
        result: (state == migration::State::Succeeded).then(|| MigrationResult {
            total_us: 1_500,
            blackout_us: 250,
            guest_gap_us: Some(300),
            bytes: 77,
            rounds: round,
            mode: "precopy".to_owned(),
            transport: "unix".to_owned(),
            pmu_at_stop: vcpus.clone(),
            pmu_at_resume: vcpus,
            ..MigrationResult::default()
        }),
        ..Migration::default()
    }
}

fn running(name: &str) -> Operation {
    Operation { name: name.to_owned(), done: false, ..Operation::default() }
}

fn no_such_vm(name: &str) -> Status {
    let metadata = HashMap::from([
        ("name".to_owned(), name.to_owned()),
        ("remedy".to_owned(), "see `vpmuctl vm list`".to_owned()),
    ]);
    let details = ErrorDetails::with_error_info("VM_NOT_FOUND", "vpmud", metadata);
    Status::with_error_details(Code::NotFound, format!("{name} does not exist here"), details)
}

fn unscripted<T>() -> Answer<T> {
    Err(Status::unimplemented("not in the script"))
}

#[tonic::async_trait]
impl VirtualMachinesService for Script {
    async fn get_virtual_machine(&self, r: Request<GetVirtualMachineRequest>) -> Answer<VirtualMachine> {
        let name = r.into_inner().name;
        if name.ends_with("/nobody") {
            return Err(no_such_vm(&name));
        }
        Ok(Response::new(machine(&name)))
    }

    async fn list_virtual_machines(
        &self,
        r: Request<ListVirtualMachinesRequest>,
    ) -> Answer<ListVirtualMachinesResponse> {
        let first = r.into_inner().page_token.is_empty();
        Ok(Response::new(ListVirtualMachinesResponse {
            virtual_machines: vec![machine(&vpmu_client::names::vm(if first { "a" } else { "b" }))],
            next_page_token: if first { "more".to_owned() } else { String::new() },
        }))
    }

    async fn create_virtual_machine(&self, r: Request<CreateVirtualMachineRequest>) -> Answer<Operation> {
        let request = r.into_inner();
        assert_eq!(request.request_id.len(), 36, "a request id is a UUID");
        let vcpus = request.virtual_machine.and_then(|vm| vm.spec).map_or(0, |spec| spec.vcpus);
        if vcpus > 256 {
            let mut details = ErrorDetails::with_error_info("VCPUS_OUT_OF_RANGE", "vpmud", HashMap::new());
            details.add_bad_request_violation("spec.vcpus", format!("{vcpus} is not in 1..=256"));
            return Err(Status::with_error_details(Code::InvalidArgument, "vcpus is out of range", details));
        }
        Ok(Response::new(running("operations/create")))
    }

    async fn start_virtual_machine(&self, r: Request<StartVirtualMachineRequest>) -> Answer<Operation> {
        let fails = r.into_inner().name.ends_with("/nocores");
        Ok(Response::new(running(if fails { "operations/fails" } else { "operations/create" })))
    }

    async fn delete_virtual_machine(&self, _: Request<DeleteVirtualMachineRequest>) -> Answer<Operation> {
        Ok(Response::new(running("operations/never")))
    }

    async fn stop_virtual_machine(&self, _: Request<StopVirtualMachineRequest>) -> Answer<Operation> {
        unscripted()
    }

    async fn pause_virtual_machine(&self, _: Request<PauseVirtualMachineRequest>) -> Answer<VirtualMachine> {
        unscripted()
    }

    async fn resume_virtual_machine(
        &self,
        _: Request<ResumeVirtualMachineRequest>,
    ) -> Answer<VirtualMachine> {
        unscripted()
    }

    async fn get_virtual_machine_stats(
        &self,
        _: Request<GetVirtualMachineStatsRequest>,
    ) -> Answer<VirtualMachineStats> {
        unscripted()
    }

    async fn snapshot_virtual_machine(&self, _: Request<SnapshotVirtualMachineRequest>) -> Answer<Operation> {
        unscripted()
    }

    async fn restore_virtual_machine(&self, _: Request<RestoreVirtualMachineRequest>) -> Answer<Operation> {
        unscripted()
    }

    async fn update_vcpu_placement(&self, _: Request<UpdateVcpuPlacementRequest>) -> Answer<VirtualMachine> {
        unscripted()
    }

    type WatchVirtualMachinesStream = Items<WatchVirtualMachinesResponse>;

    async fn watch_virtual_machines(
        &self,
        _: Request<WatchVirtualMachinesRequest>,
    ) -> Answer<Self::WatchVirtualMachinesStream> {
        use watch_virtual_machines_response::Kind;
        let events = [
            WatchVirtualMachinesResponse {
                kind: Kind::Existing.into(),
                virtual_machine: Some(machine(&vpmu_client::names::vm("a"))),
                sequence: 1,
            },
            WatchVirtualMachinesResponse { kind: Kind::Synced.into(), virtual_machine: None, sequence: 1 },
        ];
        Ok(Response::new(Box::pin(tokio_stream::iter(events.map(Ok)))))
    }

    type AttachConsoleStream = Items<AttachConsoleResponse>;

    /// Says hello, then says everything again in capitals; `ends` up to a ^D, `late` begins to read a moment later, `deaf`
    /// never reads what is typed, and `floods` speaks without an end.
    async fn attach_console(
        &self,
        r: Request<Streaming<AttachConsoleRequest>>,
    ) -> Answer<Self::AttachConsoleStream> {
        let mut messages = r.into_inner();
        let first = messages.message().await?.ok_or_else(|| Status::invalid_argument("no first message"))?;
        let kind = first.name.rsplit('/').next().unwrap_or_default();
        if kind == "deaf" {
            let deaf = tokio_stream::pending().map(move |piece| (&messages, piece).1);
            return Ok(Response::new(Box::pin(deaf)));
        }
        if kind == "floods" {
            let piece = || Ok(AttachConsoleResponse { offset: 0, data: vec![b'#'; 4096] });
            return Ok(Response::new(Box::pin(tokio_stream::iter(std::iter::repeat_with(piece)))));
        }
        let hello = AttachConsoleResponse { offset: 0, data: b"hello\n".to_vec() };
        let hello = tokio_stream::iter([Ok(hello)]);
        if first.history_only {
            return Ok(Response::new(Box::pin(hello)));
        }
        let heard = Arc::clone(&self.typed);
        let echo = messages.map(move |message| {
            if let Ok(message) = &message {
                heard.lock().expect("not poisoned").extend_from_slice(&message.data);
            }
            message
                .map(|message| AttachConsoleResponse { offset: 6, data: message.data.to_ascii_uppercase() })
        });
        if kind == "ends" {
            let more = |piece: &Result<AttachConsoleResponse, Status>| {
                piece.as_ref().is_ok_and(|piece| !piece.data.ends_with(b"\x04"))
            };
            return Ok(Response::new(Box::pin(hello.chain(echo.take_while(more)))));
        }
        let late = Duration::from_millis(if kind == "late" { 300 } else { 0 });
        // Within the stream: the client is attached, and sends, meanwhile.
        let pause = tokio_stream::once(()).then(move |()| tokio::time::sleep(late)).filter_map(|()| None);
        // The host never ends the stream by itself: a client that sees its end has lost the host.
        Ok(Response::new(Box::pin(hello.chain(pause).chain(echo).chain(tokio_stream::pending()))))
    }
}

#[tonic::async_trait]
impl PmuService for Script {
    /// Never answers.
    async fn get_pmu(&self, _: Request<GetPmuRequest>) -> Answer<Pmu> {
        std::future::pending().await
    }

    async fn audit_pmu(&self, _: Request<AuditPmuRequest>) -> Answer<PmuAudit> {
        unscripted()
    }

    async fn get_pmu_state(&self, r: Request<GetPmuStateRequest>) -> Answer<PmuState> {
        Ok(Response::new(PmuState {
            name: format!("{}/pmuState", r.into_inner().name),
            mode: "model".to_owned(),
            vcpus: vec![VcpuPmu {
                registers: vec![PmuRegister { msr: 0x38f, name: "R".to_owned(), value: u64::MAX }],
                ..VcpuPmu::default()
            }],
            ..PmuState::default()
        }))
    }

    async fn get_host_pmu_capabilities(
        &self,
        _: Request<GetHostPmuCapabilitiesRequest>,
    ) -> Answer<HostPmuCapabilities> {
        unscripted()
    }
}

#[tonic::async_trait]
impl MigrationsService for Script {
    async fn check_migration(&self, _: Request<CheckMigrationRequest>) -> Answer<CheckMigrationResponse> {
        Ok(Response::new(CheckMigrationResponse {
            compatible: false,
            mismatches: vec![MigrationMismatch {
                rule: "C2".to_owned(),
                message: "8 counters here, 4 there".to_owned(),
                remedy: "choose a host with 8".to_owned(),
                warning: false,
            }],
            destination_host: "h".to_owned(),
        }))
    }

    async fn create_migration(&self, r: Request<CreateMigrationRequest>) -> Answer<Operation> {
        let spec = r.into_inner().spec.unwrap_or_default();
        assert_eq!(spec.max_blackout, Some(prost_types::Duration { seconds: 0, nanos: 20_000_000 }));
        let fails = spec.destination.ends_with("nowhere");
        Ok(Response::new(Operation {
            metadata: Some(pack("vpmu.v1.Migration", &migration(migration::State::Preparing, 0))),
            ..running(if fails { "operations/fails" } else { "operations/migrate" })
        }))
    }

    async fn get_migration(&self, _: Request<GetMigrationRequest>) -> Answer<Migration> {
        unscripted()
    }

    async fn list_migrations(&self, _: Request<ListMigrationsRequest>) -> Answer<ListMigrationsResponse> {
        unscripted()
    }

    type WatchMigrationStream = Items<Migration>;

    async fn watch_migration(&self, _: Request<WatchMigrationRequest>) -> Answer<Self::WatchMigrationStream> {
        use migration::State;
        let states = [(State::Precopy, 1), (State::Stopped, 2), (State::Committed, 2), (State::Succeeded, 2)];
        Ok(Response::new(Box::pin(tokio_stream::iter(
            states.map(|(state, round)| Ok(migration(state, round))),
        ))))
    }

    async fn cancel_migration(&self, _: Request<CancelMigrationRequest>) -> Answer<()> {
        unscripted()
    }

    async fn force_owner(&self, _: Request<ForceOwnerRequest>) -> Answer<VirtualMachine> {
        unscripted()
    }
}

#[tonic::async_trait]
impl Operations for Script {
    async fn list_operations(&self, _: Request<ListOperationsRequest>) -> Answer<ListOperationsResponse> {
        unscripted()
    }

    async fn get_operation(&self, _: Request<GetOperationRequest>) -> Answer<Operation> {
        unscripted()
    }

    async fn delete_operation(&self, _: Request<DeleteOperationRequest>) -> Answer<()> {
        unscripted()
    }

    async fn cancel_operation(&self, _: Request<CancelOperationRequest>) -> Answer<()> {
        unscripted()
    }

    /// Not done at the first wait; from the second on as the name says.
    async fn wait_operation(&self, r: Request<WaitOperationRequest>) -> Answer<Operation> {
        let request = r.into_inner();
        let name = request.name.as_str();
        if name == "operations/never" {
            let timeout = request.timeout.and_then(|timeout| timeout.try_into().ok());
            tokio::time::sleep(timeout.unwrap_or_default()).await;
            return Ok(Response::new(running(name)));
        }
        if self.waits.fetch_add(1, Ordering::Relaxed) == 0 {
            return Ok(Response::new(running(name)));
        }
        let result = match name {
            "operations/fails" => {
                let details = ErrorDetails::with_error_info("NO_CORES", "vpmud", HashMap::new());
                let status =
                    Status::with_error_details(Code::ResourceExhausted, "no cores are free", details);
                let status: rpc::Status =
                    prost::Message::decode(status.details()).expect("a google.rpc.Status");
                operation::Result::Error(status)
            }
            "operations/migrate" => operation::Result::Response(pack(
                "vpmu.v1.Migration",
                &migration(migration::State::Succeeded, 2),
            )),
            _ => operation::Result::Response(pack(
                "vpmu.v1.VirtualMachine",
                &machine(&vpmu_client::names::vm("a")),
            )),
        };
        Ok(Response::new(Operation {
            name: name.to_owned(),
            done: true,
            result: Some(result),
            metadata: None,
        }))
    }
}
