//! Real vpmud processes for tests: own state directory, Unix sockets, the public API as any client has it.
#![allow(dead_code, reason = "each test file uses its part")]
#![allow(missing_docs, unreachable_pub)]

pub mod ca;
pub mod guest;
pub mod load;
pub mod netns;
pub mod threads;
pub mod wire;
pub mod workers;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vpmu_proto::api::migrations_service_client::MigrationsServiceClient;
use vpmu_proto::api::pmu_service_client::PmuServiceClient;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::virtual_machines_service_client::VirtualMachinesServiceClient;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::operations_client::OperationsClient;
use vpmu_proto::longrunning::{Operation, WaitOperationRequest, operation};

/// Every wait ends here.
pub const DEADLINE: Duration = Duration::from_secs(60);

/// One vpmud.
pub struct Host {
    pub dir: PathBuf,
    pub child: Child,
    pub ready: serde_json::Value,
    options: Vec<String>,
    /// What it is started by; empty: the test itself.
    under: Vec<String>,
}

/// Whether KVM tests run. Says so if not; VPMU_REQUIRE_KVM=1 makes that a failure.
pub fn have_kvm() -> bool {
    if vcpu_worker::host::probe().kvm.is_ok() {
        return true;
    }
    assert!(std::env::var_os("VPMU_REQUIRE_KVM").is_none_or(|v| v != "1"), "KVM is required and not there");
    println!("skipped: no /dev/kvm");
    false
}

impl Host {
    pub async fn start(dir: &Path, options: &[&str]) -> Self {
        Self::start_in(dir, "", options).await
    }

    /// In a network namespace.
    pub async fn start_in(dir: &Path, netns: &str, options: &[&str]) -> Self {
        Self::start_under(dir, &in_netns(netns), options).await
    }

    /// By a command that becomes vpmud.
    pub async fn start_under(dir: &Path, under: &[String], options: &[&str]) -> Self {
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        std::fs::create_dir_all(dir).expect("state directory's parent");
        let (child, ready) = spawn_under(dir, under, &options).await.expect("vpmud is ready");
        Self { dir: dir.to_owned(), child, ready, options, under: under.to_vec() }
    }

    /// Where userfaultfd is refused, as without privileges; not to be restarted.
    pub async fn start_without_userfaultfd(dir: &Path, options: &[&str]) -> Self {
        let mut under = vec!["setpriv", "--bounding-set", "-sys_ptrace", "--inh-caps", "-sys_ptrace"];
        if Path::new("/dev/userfaultfd").exists() {
            let hide = "mount --bind /dev/null /dev/userfaultfd && exec \"$@\"";
            under.splice(0..0, ["unshare", "--mount", "sh", "-c", hide, "sh"]);
        }
        let under: Vec<String> = under.iter().map(ToString::to_string).collect();
        Self::start_under(dir, &under, options).await
    }

    /// In a mount namespace of its own, in which a shell has run `prepare` first; none, and it says so, where that
    /// cannot be.
    pub async fn start_with_mounts(dir: &Path, prepare: &str, options: &[&str]) -> Option<Self> {
        let tried = Command::new("unshare").args(["--mount", "sh", "-c", prepare]).output().await;
        let failed = match tried {
            Ok(done) if done.status.success() => None,
            Ok(done) => Some(String::from_utf8_lossy(&done.stderr).trim().to_owned()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(why) = failed {
            println!("skipped: mounts of its own cannot be made: {why}");
            return None;
        }
        let script = format!("{prepare} && exec \"$@\"");
        let under = ["unshare", "--mount", "sh", "-c", &script, "sh"].map(str::to_owned);
        Some(Self::start_under(dir, &under, options).await)
    }

    pub fn socket(&self) -> PathBuf {
        self.dir.join("api.sock")
    }

    pub fn peer(&self) -> String {
        format!("unix:{}", self.dir.join("peer.sock").display())
    }

    pub async fn kill(&mut self) {
        self.child.start_kill().expect("SIGKILL");
        self.child.wait().await.expect("reaped");
    }

    pub async fn restart(&mut self) {
        let (child, ready) =
            spawn_under(&self.dir, &self.under, &self.options).await.expect("vpmud is ready again");
        (self.child, self.ready) = (child, ready);
    }

    /// Waits until the process has stopped itself at its `--hold-at` point, and kills it there.
    pub async fn kill_at_hold(&mut self) {
        self.until_held().await;
        self.kill().await;
    }

    /// Waits until the process has stopped itself at its `--hold-at` point.
    pub async fn until_held(&self) {
        let begin = Instant::now();
        while !self.is_held() {
            assert!(begin.elapsed() < DEADLINE, "the hold point is not reached");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Whether the process has stopped itself.
    pub fn is_held(&self) -> bool {
        let stat = format!("/proc/{}/stat", self.child.id().expect("running"));
        let text = std::fs::read_to_string(&stat).expect("a process of ours");
        // The state follows the name, which is in parentheses.
        text.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    }

    /// Sends the daemon a signal.
    pub fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_raw(self.child.id().expect("running").cast_signed());
        rustix::process::kill_process(pid.expect("a pid"), signal).expect("signalled");
    }

    /// Starts it again with other options.
    pub async fn restart_with(&mut self, options: &[&str]) {
        self.options = options.iter().map(ToString::to_string).collect();
        self.restart().await;
    }

    /// SIGTERM; returns the exit code.
    pub async fn terminate(&mut self) -> i32 {
        let pid =
            rustix::process::Pid::from_raw(self.child.id().expect("running").cast_signed()).expect("pid");
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        let status =
            tokio::time::timeout(DEADLINE, self.child.wait()).await.expect("ends in time").expect("reaped");
        status.code().expect("no signal")
    }

    pub async fn channel(&self) -> Channel {
        let socket = self.socket();
        Endpoint::from_static("http://vpmud.invalid")
            .connect_with_connector(tower::service_fn(move |_: Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
            }))
            .await
            .expect("connects")
    }

    pub async fn vms(&self) -> VirtualMachinesServiceClient<Channel> {
        VirtualMachinesServiceClient::new(self.channel().await)
    }

    pub async fn pmu(&self) -> PmuServiceClient<Channel> {
        PmuServiceClient::new(self.channel().await)
    }

    pub async fn migrations(&self) -> MigrationsServiceClient<Channel> {
        MigrationsServiceClient::new(self.channel().await)
    }

    pub async fn operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel().await)
    }

    /// Waits for an operation's end.
    pub async fn finish(
        &self,
        operation: Operation,
    ) -> Result<prost_types::Any, Box<vpmu_proto::google::rpc::Status>> {
        let mut client = self.operations().await;
        let begin = Instant::now();
        let mut now = operation;
        while !now.done {
            assert!(begin.elapsed() < DEADLINE, "operation {} does not end: {now:?}", now.name);
            let timeout = Some(prost_types::Duration { seconds: 10, nanos: 0 });
            now = client
                .wait_operation(WaitOperationRequest { name: now.name, timeout })
                .await
                .expect("waits")
                .into_inner();
        }
        match now.result.expect("a done operation has a result") {
            operation::Result::Response(any) => Ok(any),
            operation::Result::Error(error) => Err(Box::new(error)),
        }
    }

    pub async fn create(&self, id: &str, spec: VirtualMachineSpec) -> VirtualMachine {
        let operation =
            self.vms().await.create_virtual_machine(create(id, spec)).await.expect("created").into_inner();
        unpack(&self.finish(operation).await.expect("created"))
    }

    pub async fn start_vm(&self, id: &str) -> VirtualMachine {
        self.try_start_vm(id).await.expect("started")
    }

    /// Err: the reason.
    pub async fn try_start_vm(&self, id: &str) -> Result<VirtualMachine, String> {
        let request = StartVirtualMachineRequest { name: name(id), request_id: String::new() };
        let operation = self.vms().await.start_virtual_machine(request).await.expect("accepted").into_inner();
        self.finish(operation).await.map(|any| unpack(&any)).map_err(|status| reason_of(&status))
    }

    /// Waits until the host has logged that, so often at least; the log.
    pub async fn until_logged(&self, what: &str, times: usize) -> String {
        let begin = Instant::now();
        loop {
            let log = std::fs::read_to_string(self.dir.join("log")).expect("log");
            if log.matches(what).count() >= times {
                return log;
            }
            assert!(begin.elapsed() < DEADLINE, "{what:?} is not said {times} times: {log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    pub async fn stop_vm(&self, id: &str) -> VirtualMachine {
        let request = StopVirtualMachineRequest { name: name(id), request_id: String::new() };
        let operation = self.vms().await.stop_virtual_machine(request).await.expect("accepted").into_inner();
        unpack(&self.finish(operation).await.expect("stopped"))
    }

    /// Deletes a machine.
    pub async fn delete(&self, id: &str) {
        let request =
            DeleteVirtualMachineRequest { name: name(id), ..DeleteVirtualMachineRequest::default() };
        let operation =
            self.vms().await.delete_virtual_machine(request).await.expect("accepted").into_inner();
        self.finish(operation).await.expect("deleted");
    }

    /// A migration to this host, with nothing else asked for.
    pub fn arrival(&self) -> MigrationSpec {
        MigrationSpec { destination: self.peer(), ..MigrationSpec::default() }
    }

    /// Begins a migration.
    pub async fn migrate(&self, id: &str, spec: MigrationSpec) -> Operation {
        let request = CreateMigrationRequest {
            parent: name(id),
            spec: Some(spec),
            ..CreateMigrationRequest::default()
        };
        self.migrations().await.create_migration(request).await.expect("accepted").into_inner()
    }

    pub async fn get(&self, id: &str) -> VirtualMachine {
        self.vms()
            .await
            .get_virtual_machine(GetVirtualMachineRequest { name: name(id) })
            .await
            .expect("there")
            .into_inner()
    }

    pub async fn list(&self) -> Vec<VirtualMachine> {
        self.vms()
            .await
            .list_virtual_machines(ListVirtualMachinesRequest::default())
            .await
            .expect("lists")
            .into_inner()
            .virtual_machines
    }

    pub async fn live_pmu(&self, id: &str) -> Pmu {
        let begin = Instant::now();
        loop {
            match self.pmu().await.get_pmu(GetPmuRequest { name: name(id) }).await {
                Ok(pmu) => return pmu.into_inner(),
                // A busy machine may be slower than a deadline that a test has made short.
                Err(status)
                    if begin.elapsed() < DEADLINE
                        && status.get_error_details().error_info().map(|info| &*info.reason)
                            == Some("WORKER_TIMEOUT") => {}
                Err(status) => panic!("live PMU: {status:?}"),
            }
        }
    }

    pub async fn stored_pmu(&self, id: &str) -> Result<PmuState, Status> {
        Ok(self.pmu().await.get_pmu_state(GetPmuStateRequest { name: name(id) }).await?.into_inner())
    }

    /// Waits until the machine is as wanted.
    pub async fn until(
        &self,
        id: &str,
        what: &str,
        wanted: impl Fn(&VirtualMachine) -> bool,
    ) -> VirtualMachine {
        let begin = Instant::now();
        loop {
            let vm = self.get(id).await;
            if wanted(&vm) {
                return vm;
            }
            assert!(begin.elapsed() < DEADLINE, "{id} does not become {what}: {vm:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until the guest has counted something, and returns its PMU.
    pub async fn until_counting(&self, id: &str) -> Pmu {
        let begin = Instant::now();
        loop {
            let pmu = self.live_pmu(id).await;
            let all = pmu.vcpus.iter().all(|v| v.counters.iter().any(|c| c.live && c.value > 0));
            if all && !pmu.vcpus.is_empty() {
                return pmu;
            }
            assert!(begin.elapsed() < DEADLINE, "{id} does not count: {pmu:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// Spawns without expecting success: the ready line, or the exit code and what it said.
pub async fn spawn(
    dir: &Path,
    options: &[String],
) -> Result<(Child, serde_json::Value), (Option<i32>, String)> {
    spawn_in(dir, "", options).await
}

/// The same in a network namespace.
pub async fn spawn_in(
    dir: &Path,
    netns: &str,
    options: &[String],
) -> Result<(Child, serde_json::Value), (Option<i32>, String)> {
    spawn_under(dir, &in_netns(netns), options).await
}

fn in_netns(netns: &str) -> Vec<String> {
    if netns.is_empty() {
        return Vec::new();
    }
    vec!["nsenter".to_owned(), format!("--net=/run/netns/{netns}")]
}

/// The same by a command that becomes vpmud, so that the child is vpmud itself.
pub async fn spawn_under(
    dir: &Path,
    under: &[String],
    options: &[String],
) -> Result<(Child, serde_json::Value), (Option<i32>, String)> {
    // Another build of the same, e.g. an optimised one, may be tested in place of cargo's.
    let vpmud = std::env::var_os("VPMU_TEST_VPMUD").unwrap_or_else(|| env!("CARGO_BIN_EXE_vpmud").into());
    let mut command = match under.split_first() {
        None => Command::new(vpmud),
        Some((first, rest)) => {
            let mut command = Command::new(first);
            command.args(rest).arg(vpmud);
            command
        }
    };
    command
        .arg("serve")
        .arg("--state-dir")
        .arg(dir.join("state"))
        .arg("--listen")
        .arg(format!("unix:{}", dir.join("api.sock").display()))
        .arg("--peer-listen")
        .arg(format!("unix:{}", dir.join("peer.sock").display()))
        .args(options)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::from(std::fs::File::create(dir.join("log")).expect("log")))
        .kill_on_drop(true);
    // Hosts of a test stand for different machines, so that memory is copied unless a test asks for mode local.
    if !options.iter().any(|option| option == "--local-migration") {
        command.args(["--local-migration", "asked"]);
    }
    let mut child = command.spawn().expect("spawns");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let line =
        tokio::time::timeout(DEADLINE, lines.next_line()).await.expect("ready in time").expect("readable");
    if let Some(line) = line {
        return Ok((child, serde_json::from_str(&line).expect("JSON")));
    }
    let status = child.wait().await.expect("reaped");
    Err((status.code(), std::fs::read_to_string(dir.join("log")).expect("log")))
}

/// `vpmud store fence`: the token, or what it said.
pub fn fence(dir: &Path, more: &[&str]) -> Result<String, String> {
    let vpmud = std::env::var_os("VPMU_TEST_VPMUD").unwrap_or_else(|| env!("CARGO_BIN_EXE_vpmud").into());
    let mut command = std::process::Command::new(vpmud);
    command.args(["store", "fence", "--vm", "vm", "--state-dir"]).arg(dir.join("state")).args(more);
    let done = command.output().expect("runs");
    if done.status.success() {
        return Ok(String::from_utf8(done.stdout).expect("text").trim().to_owned());
    }
    assert_eq!(done.status.code(), Some(1));
    Err(String::from_utf8(done.stderr).expect("text"))
}

pub fn name(id: &str) -> String {
    format!("projects/default/virtualMachines/{id}")
}

/// A probe guest that counts, takes overflows and dirties some memory.
pub fn probe_spec(vcpus: u32, memory_mib: u64) -> VirtualMachineSpec {
    VirtualMachineSpec {
        vcpus,
        memory_bytes: memory_mib << 20,
        boot: Some(virtual_machine_spec::Boot::Probe(ProbeBoot {
            dirty_pages_per_second: 200,
            ..ProbeBoot::default()
        })),
        pmu: None,
        ..Default::default()
    }
}

pub fn create(id: &str, spec: VirtualMachineSpec) -> CreateVirtualMachineRequest {
    CreateVirtualMachineRequest {
        parent: String::new(),
        virtual_machine_id: id.to_owned(),
        virtual_machine: Some(VirtualMachine { spec: Some(spec), ..VirtualMachine::default() }),
        request_id: String::new(),
        validate_only: false,
    }
}

pub fn unpack<M: Message + Default>(any: &prost_types::Any) -> M {
    M::decode(any.value.as_slice()).expect("decodes")
}

/// Checks an error's code and reason, and that it has details and says something.
#[track_caller]
pub fn expect_error<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, reason: &str) -> Status {
    let status = result.expect_err("must be refused");
    assert_eq!(status.code(), code, "{status:?}");
    let details = status.get_error_details();
    let info = details.error_info().unwrap_or_else(|| panic!("no ErrorInfo in {status:?}"));
    assert_eq!((info.reason.as_str(), info.domain.as_str()), (reason, "vpmud"), "{status:?}");
    assert!(!status.message().is_empty());
    if code == Code::InvalidArgument && info.metadata.contains_key("field") {
        let bad = details.bad_request().expect("BadRequest");
        assert_eq!(bad.field_violations[0].field, info.metadata["field"]);
    }
    status
}

pub fn reason_of(error: &vpmu_proto::google::rpc::Status) -> String {
    let status =
        Status::with_details(Code::from_i32(error.code), &error.message, error.encode_to_vec().into());
    status.get_error_details().error_info().map(|i| i.reason.clone()).unwrap_or_default()
}

pub fn is(state: State) -> impl Fn(&VirtualMachine) -> bool {
    move |vm| vm.observed_state() == state
}
