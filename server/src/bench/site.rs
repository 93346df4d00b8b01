//! Where measurements happen: a directory, the measured guest in it, and hosts.
//!
//! The guest (`guest/`, a PVH ELF of our own; `guest/build.sh` makes it) writes `A` to the serial port as its first act and `R`
//! when it is set up; then it spins, dirties memory or halts as its command line says.

use std::path::PathBuf;
use std::time::Duration;

use vpmu_client::{Client, Endpoint};
use vpmu_proto::api::virtual_machine::DesiredState;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::api::{CreateVirtualMachineRequest, KernelBoot, PmuSpec, VirtualMachine, VirtualMachineSpec};

use super::error::{BenchError, Step as _};
use crate::demo::host::Host;
use crate::demo::workdir::WorkDir;

const GUEST: &[u8] = include_bytes!("guest/payload.elf");
/// For an operation; a busy machine may take long.
pub(super) const OPERATION: Duration = Duration::from_secs(60);

/// A directory with the guest in it.
#[derive(Debug)]
pub(super) struct Site {
    dir: WorkDir,
    kernel: PathBuf,
}

impl Site {
    /// Makes it.
    pub(super) fn new() -> Result<Self, BenchError> {
        let dir = WorkDir::new(false)?;
        let kernel = dir.path().join("guest.elf");
        std::fs::write(&kernel, GUEST).map_err(|e| BenchError::io("write the measured guest", e))?;
        Ok(Self { dir, kernel })
    }

    /// The measured guest with a command line.
    pub(super) fn kernel(&self, cmdline: &str) -> KernelBoot {
        KernelBoot {
            path: self.kernel.display().to_string(),
            initrd_path: String::new(),
            cmdline: cmdline.to_owned(),
        }
    }

    /// A host that keeps its machines in threads or in processes of their own.
    pub(super) async fn host(&self, name: &'static str, isolation: &str) -> Result<Host, BenchError> {
        let peer = Endpoint::unix(&self.dir.path().join(format!("{name}-peer.sock")))?;
        let options = ["--isolation", isolation, "--stop-vms"];
        Ok(Host::start_with(name, self.dir.path(), "kvm", peer, &options).await?)
    }

    /// A host with a process for each machine, one of them made ahead, as the systemd unit has it.
    pub(super) async fn host_with_spare(&self, name: &'static str) -> Result<Host, BenchError> {
        let peer = Endpoint::unix(&self.dir.path().join(format!("{name}-peer.sock")))?;
        let options = ["--isolation", "process", "--spare-workers", "1", "--stop-vms"];
        Ok(Host::start_with(name, self.dir.path(), "kvm", peer, &options).await?)
    }

    /// The same with a peer listener on TCP, without TLS. A process is made ahead, as the systemd unit has it, and as
    /// another tool's destination is there before its migration begins.
    pub(super) async fn tcp_host(&self, name: &'static str, isolation: &str) -> Result<Host, BenchError> {
        let peer: Endpoint = format!("tcp:127.0.0.1:{}", free_port()?).parse()?;
        let spares = if isolation == "process" { "1" } else { "0" };
        let options = ["--isolation", isolation, "--spare-workers", spares, "--stop-vms"];
        Ok(Host::start_with(name, self.dir.path(), "kvm", peer, &options).await?)
    }

    /// The directory.
    pub(super) fn path(&self) -> &std::path::Path {
        self.dir.path()
    }

    /// One vCPU that runs the measured guest.
    pub(super) fn spec(&self, memory_mib: u64, cmdline: &str) -> VirtualMachineSpec {
        VirtualMachineSpec {
            vcpus: 1,
            memory_bytes: memory_mib << 20,
            boot: Some(Boot::Kernel(self.kernel(cmdline))),
            ..VirtualMachineSpec::default()
        }
    }
}

/// Without a PMU.
pub(super) fn without_pmu(spec: VirtualMachineSpec) -> VirtualMachineSpec {
    VirtualMachineSpec { pmu: Some(PmuSpec { disabled: true, ..PmuSpec::default() }), ..spec }
}

/// A request that creates and starts a machine.
pub(super) fn create_and_start(name: &str, spec: VirtualMachineSpec) -> CreateVirtualMachineRequest {
    let mut vm = VirtualMachine { spec: Some(spec), ..VirtualMachine::default() };
    vm.set_desired_state(DesiredState::Running);
    CreateVirtualMachineRequest {
        parent: "projects/default".to_owned(),
        virtual_machine_id: name.to_owned(),
        virtual_machine: Some(vm),
        request_id: uuid::Uuid::new_v4().to_string(),
        validate_only: false,
    }
}

/// Creates and starts a machine and waits until it runs.
pub(super) async fn launch(client: &Client, name: &str, spec: VirtualMachineSpec) -> Result<(), BenchError> {
    let operation = client.create_vm_with(create_and_start(name, spec)).await.step("create a machine")?;
    client.wait_operation(operation, OPERATION, |_| {}).await.step("start a machine").map(drop)
}

/// Deletes a machine and waits until it is gone.
pub(super) async fn delete(client: &Client, name: &str) -> Result<(), BenchError> {
    let operation = client.delete_vm(name).await.step("delete a machine")?;
    client.wait_operation(operation, OPERATION, |_| {}).await.step("delete a machine").map(drop)
}

/// A port of loopback that nobody had a moment ago.
pub(super) fn free_port() -> Result<u16, BenchError> {
    let port = std::net::TcpListener::bind(("127.0.0.1", 0)).and_then(|l| l.local_addr());
    port.map(|address| address.port()).map_err(|e| BenchError::io("find a free port", e))
}

/// Milliseconds, as figures have them.
pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
