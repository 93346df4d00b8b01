//! For tests that put daemons under load: operations on a host that may be lost at any moment, a small generator of random
//! numbers, and the worker processes of a host as /proc shows them.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use tonic::Status;
use tonic::transport::{Channel, Endpoint, Uri};
use vcpu_worker::process::Identity;
use vpmu_proto::api::migration_spec::Mode;
use vpmu_proto::api::migrations_service_client::MigrationsServiceClient;
use vpmu_proto::api::virtual_machines_service_client::VirtualMachinesServiceClient;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::operations_client::OperationsClient;
use vpmu_proto::longrunning::{Operation, WaitOperationRequest, operation};

use super::{create, name};

/// A number from the environment.
pub fn number(variable: &str) -> Option<u64> {
    let text = std::env::var(variable).ok()?;
    Some(text.parse().unwrap_or_else(|e| panic!("{variable}={text:?}: {e}")))
}

/// xorshift64*: the same seed, the same numbers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A seed that was not used before.
    pub fn seed() -> u64 {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).expect("a clock");
        u64::try_from(now.as_nanos() >> 8).unwrap_or(1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 33) % bound
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[usize::try_from(self.below(from.len() as u64)).expect("small")]
    }
}

/// One host as a client that may lose it sees it. Every call is `Ok` only if it was done and acknowledged.
#[derive(Clone)]
pub struct Api {
    socket: PathBuf,
    peer: String,
}

impl Api {
    pub fn of(host: &super::Host) -> Self {
        Self { socket: host.socket(), peer: host.peer() }
    }

    async fn channel(&self) -> Result<Channel, Status> {
        let socket = self.socket.clone();
        Endpoint::from_static("http://vpmud.invalid")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await
            .map_err(|e| Status::unavailable(e.to_string()))
    }

    pub async fn vms(&self) -> Result<VirtualMachinesServiceClient<Channel>, Status> {
        Ok(VirtualMachinesServiceClient::new(self.channel().await?))
    }

    async fn done(&self, mut now: Operation) -> Result<(), Status> {
        let mut client = OperationsClient::new(self.channel().await?);
        while !now.done {
            let timeout = Some(prost_types::Duration { seconds: 5, nanos: 0 });
            now = client.wait_operation(WaitOperationRequest { name: now.name, timeout }).await?.into_inner();
        }
        match now.result {
            Some(operation::Result::Response(_)) => Ok(()),
            Some(operation::Result::Error(error)) => {
                Err(Status::unknown(format!("[{}] {}", super::reason_of(&error), error.message)))
            }
            None => Err(Status::internal("a done operation without a result")),
        }
    }

    pub async fn create(&self, id: &str, spec: VirtualMachineSpec) -> Result<(), Status> {
        let operation = self.vms().await?.create_virtual_machine(create(id, spec)).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn start(&self, id: &str) -> Result<(), Status> {
        let request = StartVirtualMachineRequest { name: name(id), request_id: String::new() };
        let operation = self.vms().await?.start_virtual_machine(request).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn stop(&self, id: &str) -> Result<(), Status> {
        let request = StopVirtualMachineRequest { name: name(id), request_id: String::new() };
        let operation = self.vms().await?.stop_virtual_machine(request).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn delete(&self, id: &str) -> Result<(), Status> {
        let request =
            DeleteVirtualMachineRequest { name: name(id), ..DeleteVirtualMachineRequest::default() };
        let operation = self.vms().await?.delete_virtual_machine(request).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn pause(&self, id: &str) -> Result<(), Status> {
        let request = PauseVirtualMachineRequest { name: name(id) };
        self.vms().await?.pause_virtual_machine(request).await.map(drop)
    }

    pub async fn resume(&self, id: &str) -> Result<(), Status> {
        let request = ResumeVirtualMachineRequest { name: name(id) };
        self.vms().await?.resume_virtual_machine(request).await.map(drop)
    }

    pub async fn place(&self, id: &str, placement: CpuPlacement) -> Result<(), Status> {
        let request = UpdateVcpuPlacementRequest {
            name: name(id),
            placement: Some(placement),
            ..UpdateVcpuPlacementRequest::default()
        };
        self.vms().await?.update_vcpu_placement(request).await.map(drop)
    }

    pub async fn snapshot(&self, id: &str, file: &str) -> Result<(), Status> {
        let request =
            SnapshotVirtualMachineRequest { name: name(id), file: file.to_owned(), ..Default::default() };
        let operation = self.vms().await?.snapshot_virtual_machine(request).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn restore(&self, id: &str, file: &str, lazy: bool) -> Result<(), Status> {
        let request = RestoreVirtualMachineRequest {
            virtual_machine_id: id.to_owned(),
            file: file.to_owned(),
            lazy,
            ..Default::default()
        };
        let operation = self.vms().await?.restore_virtual_machine(request).await?;
        self.done(operation.into_inner()).await
    }

    pub async fn migrate(&self, id: &str, to: &Self, mode: Mode) -> Result<(), Status> {
        let spec =
            MigrationSpec { destination: to.peer.clone(), mode: mode.into(), ..MigrationSpec::default() };
        let request = CreateMigrationRequest {
            parent: name(id),
            spec: Some(spec),
            ..CreateMigrationRequest::default()
        };
        let operation = MigrationsServiceClient::new(self.channel().await?).create_migration(request).await?;
        self.done(operation.into_inner()).await
    }
}

/// Worker processes of a host, by their command lines: also those without a runtime directory.
pub fn workers(dir: &Path) -> BTreeSet<u32> {
    let run = dir.join("state/run").display().to_string();
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("vpmud\0worker\0") && line.contains(&run) && Identity::of(pid).is_ok() {
            found.insert(pid);
        }
    }
    found
}

/// Ends every worker process of these hosts when it is dropped, also in a panic.
pub struct Reaper(pub Vec<PathBuf>);

impl Drop for Reaper {
    fn drop(&mut self) {
        for pid in self.0.iter().flat_map(|dir| workers(dir)) {
            let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}
