//! A worker in this process over gRPC, as a daemon uses one in another, with the waits that tests need.
#![allow(
    dead_code,
    unreachable_pub,
    unused_qualifications,
    clippy::unnecessary_wraps,
    clippy::map_unwrap_or,
    reason = "each test binary uses its part"
)]

use std::sync::Arc;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vcpu_worker::cores::HostCores;
use vcpu_worker::in_process::InProcessWorker;
use vcpu_worker::service::{Worker, WorkerOptions};
use vpmu_proto::api::{self, ProbeReport, virtual_machine_spec::Boot};
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;
use vpmu_proto::worker::worker_service_server::WorkerServiceServer;
use vpmu_proto::worker::*;

pub const MODEL: &str = "intel:v5:8+4:48";

/// Bound on every wait in tests.
pub const PATIENCE: Duration = Duration::from_secs(90);

/// Hypervisors to test on; without /dev/kvm it says so, or fails if KVM is required.
pub fn hypervisors() -> Vec<&'static str> {
    if kvm() { vec!["kvm", "simulated"] } else { vec!["simulated"] }
}

pub fn kvm() -> bool {
    let there = std::fs::File::options().read(true).write(true).open("/dev/kvm").is_ok();
    if !there {
        assert!(
            std::env::var("VPMU_REQUIRE_KVM").as_deref() != Ok("1"),
            "VPMU_REQUIRE_KVM=1, and /dev/kvm cannot be opened"
        );
        println!("skipped: no /dev/kvm");
    }
    there
}

pub fn host_cores() -> Arc<HostCores> {
    let n = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    Arc::new(HostCores::new(MODEL.parse().expect("a shape"), &(0..n).collect::<Vec<_>>()))
}

/// A gRPC connection to a worker, over a pair of in-memory pipes.
fn serve(worker: Worker) -> Channel {
    let (connections, accepted) = tokio::sync::mpsc::channel::<DuplexStream>(1);
    let ended = worker.ended().cancelled_owned();
    let router = Server::builder().add_service(WorkerServiceServer::new(worker));
    let incoming = ReceiverStream::new(accepted).map(Ok::<_, std::io::Error>);
    tokio::spawn(router.serve_with_incoming_shutdown(incoming, ended));
    let connect = tower::service_fn(move |_: Uri| {
        let connections = connections.clone();
        async move {
            let (near, far) = tokio::io::duplex(256 << 10);
            let gone = |_| std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            connections.send(far).await.map_err(gone)?;
            Ok::<_, std::io::Error>(TokioIo::new(near))
        }
    });
    Endpoint::from_static("http://worker.invalid").connect_with_connector_lazy(connect)
}

/// One worker and the daemon's view of it.
pub struct Host {
    pub client: WorkerServiceClient<Channel>,
    pub worker: InProcessWorker,
    pub fence: Fence,
}

impl Host {
    pub fn new(cores: &Arc<HostCores>, vm_uid: &str) -> Self {
        let options = WorkerOptions::new(Arc::clone(cores), CancellationToken::new());
        Self::with(options, vm_uid)
    }

    pub fn with(options: WorkerOptions, vm_uid: &str) -> Self {
        let (service, worker) = InProcessWorker::start(options).expect("in-process worker");
        let fence = Fence { vm_uid: vm_uid.to_owned(), incarnation: 1, term: 1 };
        Self { client: WorkerServiceClient::new(serve(service)), worker, fence }
    }

    pub fn fence(&self) -> Option<Fence> {
        Some(self.fence.clone())
    }

    pub async fn attach(&mut self) {
        let request = AttachRequest {
            store_id: "store".to_owned(),
            vm_uid: self.fence.vm_uid.clone(),
            incarnation: self.fence.incarnation,
            term: self.fence.term,
        };
        self.client.attach(request).await.expect("attach");
    }

    pub fn create_request(
        &self,
        hypervisor: &str,
        spec: api::VirtualMachineSpec,
        incoming: bool,
    ) -> CreateVmRequest {
        let n = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        CreateVmRequest {
            fence: self.fence(),
            vm_name: "probe".to_owned(),
            vcpu_cores: (0..spec.vcpus).map(|v| v % n).collect(),
            spec: Some(spec),
            hypervisor: hypervisor.to_owned(),
            pmu_mode: "model".to_owned(),
            model_pmu: MODEL.to_owned(),
            incoming,
            ..Default::default()
        }
    }

    pub async fn create(
        &mut self,
        hypervisor: &str,
        spec: api::VirtualMachineSpec,
        incoming: bool,
    ) -> CreateVmResponse {
        let request = self.create_request(hypervisor, spec, incoming);
        self.client.create_vm(request).await.expect("create").into_inner()
    }

    pub async fn grant(&mut self, epoch: u64, seq: u64, run: bool) -> Result<u64, Status> {
        let request = GrantRequest { fence: self.fence(), epoch, seq, deadline_boottime_ns: 0, run };
        self.client.grant(request).await.map(|r| r.into_inner().running_monotonic_ns)
    }

    pub async fn run(&mut self) -> Result<(), Status> {
        self.client.run(RunRequest { fence: self.fence() }).await.map(drop)
    }

    pub async fn pause(&mut self) -> Vec<PmuImage> {
        self.client.pause(PauseRequest { fence: self.fence() }).await.expect("pause").into_inner().pmu
    }

    pub async fn pmu(&mut self) -> Vec<PmuImage> {
        self.client.get_pmu(GetPmuRequest { fence: self.fence() }).await.expect("get_pmu").into_inner().pmu
    }

    pub async fn status(&mut self) -> WorkerStatus {
        self.client.get_status(GetStatusRequest { fence: self.fence() }).await.expect("status").into_inner()
    }

    pub async fn state(&mut self) -> worker_status::State {
        self.status().await.state()
    }

    pub async fn report(&mut self) -> ProbeReport {
        let request = GetProbeReportRequest { fence: self.fence() };
        self.client.get_probe_report(request).await.expect("probe report").into_inner()
    }

    pub async fn console(&mut self) -> Vec<u8> {
        let request = ReadConsoleRequest { fence: self.fence(), offset: 0, follow: false };
        let mut stream = self.client.read_console(request).await.expect("console").into_inner();
        let mut all = Vec::new();
        while let Some(chunk) = stream.message().await.expect("console") {
            all.extend(chunk.data);
        }
        all
    }

    /// Asks for reports until one satisfies `good`.
    pub async fn report_until(&mut self, what: &str, good: impl Fn(&ProbeReport) -> bool) -> ProbeReport {
        let until = Instant::now() + PATIENCE;
        loop {
            let report = self.report().await;
            if good(&report) {
                return report;
            }
            if Instant::now() > until {
                let (status, pmu) = (self.status().await, self.pmu().await);
                panic!("not within {PATIENCE:?}: {what}: {report:?}\n{status:?}\n{pmu:x?}");
            }
            tokio::task::yield_now().await;
        }
    }

    pub async fn shutdown(mut self) -> Vec<PmuImage> {
        let request = ShutdownRequest { fence: self.fence() };
        let images = self.client.shutdown(request).await.expect("shutdown").into_inner().pmu;
        self.worker.join().await;
        images
    }
}

/// A probe VM with a small working set.
pub fn probe_spec(vcpus: u32, memory_mib: u64) -> api::VirtualMachineSpec {
    api::VirtualMachineSpec {
        vcpus,
        memory_bytes: memory_mib << 20,
        boot: Some(Boot::Probe(api::ProbeBoot {
            working_set_bytes: 1 << 20,
            dirty_pages_per_second: 2000,
            overflow_period: 20_000_000,
            fill_bytes: 8 << 20,
            gap_threshold_us: 0,
        })),
        pmu: Some(api::PmuSpec { gp_counters: 8, fixed_counters: 3, ..Default::default() }),
        ..Default::default()
    }
}

/// The reason code of a status.
pub fn reason(status: &Status) -> String {
    status.get_details_error_info().map(|info| info.reason).unwrap_or_default()
}

pub fn refused(answer: Result<impl std::fmt::Debug, Status>, code: Code, why: &str) {
    let status = answer.expect_err(why);
    assert_eq!((status.code(), reason(&status).as_str()), (code, why), "{status:?}");
}

/// A register's value.
pub fn register(image: &PmuImage, msr: u32) -> u64 {
    image
        .registers
        .iter()
        .find(|r| r.msr == msr)
        .map(|r| r.value)
        .unwrap_or_else(|| panic!("{msr:#x}: {image:x?}"))
}

/// Sum of everything that counted.
pub fn sum(image: &PmuImage) -> u128 {
    image
        .registers
        .iter()
        .filter(|r| matches!(r.msr, 0xc1..=0xc8 | 0x309..=0x30c))
        .map(|r| u128::from(r.value))
        .sum()
}

/// Names of this process's threads that belong to vCPUs or migrations.
pub fn worker_threads() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir("/proc/self/task")
        .expect("/proc/self/task")
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .filter(|name| name.starts_with("vm-") || name.starts_with("vpmud-"))
        .collect();
    names.sort();
    names
}
