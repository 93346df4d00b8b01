//! The worker as a process of its own: the same service on a Unix socket, ended by Shutdown or by SIGTERM.

mod worker_common;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use tonic::transport::{Channel, Endpoint, Uri};
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

/// Ends the process if the test fails.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

async fn start(socket: &Path) -> (Process, WorkerServiceClient<Channel>) {
    let child = Command::new(env!("CARGO_BIN_EXE_vcpu-worker"))
        .args(["--cores", "0", "--socket"])
        .arg(socket)
        .stderr(Stdio::null())
        .spawn()
        .expect("vcpu-worker starts");
    let process = Process(child);
    let until = Instant::now() + PATIENCE;
    loop {
        let path = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        match Endpoint::from_static("http://worker.invalid").connect_with_connector(connect).await {
            Ok(channel) => return (process, WorkerServiceClient::new(channel)),
            Err(error) => assert!(Instant::now() < until, "{error:?}"),
        }
        tokio::task::yield_now().await;
    }
}

async fn exited(process: &mut Process) -> std::process::ExitStatus {
    let until = Instant::now() + PATIENCE;
    loop {
        if let Some(status) = process.0.try_wait().expect("wait") {
            return status;
        }
        assert!(Instant::now() < until, "it does not end");
        tokio::task::yield_now().await;
    }
}

/// Whether the thread of that name blocks a signal (proc(5), `SigBlk`); none if there is no such thread.
fn blocks(pid: u32, name: &str, signal: rustix::process::Signal) -> Option<bool> {
    std::fs::read_dir(format!("/proc/{pid}/task")).expect("tasks").flatten().find_map(|task| {
        let status = std::fs::read_to_string(task.path().join("status")).ok()?;
        let field = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).map(str::trim);
        let blocked = u64::from_str_radix(field("SigBlk:")?, 16).ok()?;
        (field("Name:")? == name).then_some(blocked & 1 << (signal.as_raw() - 1) != 0)
    })
}

/// Waits until the thread of that name does not block a signal: while a signal's handler runs, the kernel blocks it.
async fn lets_through(pid: u32, name: &str, signal: rustix::process::Signal) {
    let until = Instant::now() + PATIENCE;
    while blocks(pid, name, signal).expect("the thread is there") {
        assert!(Instant::now() < until, "{name} blocks {signal:?}");
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn it_serves_and_ends() {
    let hypervisor = hypervisors()[0];
    let dir = tempfile::tempdir().expect("tempdir");
    for by_signal in [false, true] {
        let socket = dir.path().join("worker");
        let (mut process, mut client) = start(&socket).await;
        let fence = Fence { vm_uid: "vm-p".to_owned(), incarnation: 3, term: 7 };
        let attach = AttachRequest {
            store_id: "store".to_owned(),
            vm_uid: fence.vm_uid.clone(),
            incarnation: fence.incarnation,
            term: fence.term,
        };
        let status = client.attach(attach).await.expect("attach").into_inner().status.expect("status");
        assert_eq!((status.state(), status.pid), (State::Empty, process.0.id()));
        let request = CreateVmRequest {
            fence: Some(fence.clone()),
            vm_name: "p".to_owned(),
            spec: Some(probe_spec(1, 32)),
            vcpu_cores: vec![0],
            hypervisor: hypervisor.to_owned(),
            pmu_mode: "model".to_owned(),
            model_pmu: MODEL.to_owned(),
            incoming: false,
            ..CreateVmRequest::default()
        };
        client.create_vm(request).await.expect("create");
        let grant =
            GrantRequest { fence: Some(fence.clone()), epoch: 1, seq: 1, deadline_boottime_ns: 0, run: true };
        client.grant(grant).await.expect("grant");
        // A stream that is open does not hold the end up.
        let follow = ReadConsoleRequest { fence: Some(fence.clone()), offset: 0, follow: true };
        let mut follow = client.read_console(follow).await.expect("console").into_inner();
        assert!(follow.message().await.expect("output").is_some(), "the probe prints");
        if by_signal {
            // The handler does what a vCPU thread's filter forbids: it must run on another.
            assert_eq!(blocks(process.0.id(), "vm-p/0", rustix::process::Signal::TERM), Some(true));
            // A kick and a tick must get it out of the guest.
            lets_through(process.0.id(), "vm-p/0", rustix::process::Signal::USR1).await;
            lets_through(process.0.id(), "vm-p/0", rustix::process::Signal::USR2).await;
            let pid = rustix::process::Pid::from_child(&process.0);
            rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("SIGTERM");
        } else {
            let ended =
                client.shutdown(ShutdownRequest { fence: Some(fence) }).await.expect("shutdown").into_inner();
            assert_eq!(ended.pmu.len(), 1);
        }
        let status = exited(&mut process).await;
        assert!(status.success(), "by_signal {by_signal}: {status:?}");
        assert!(!socket.exists(), "its socket is left behind");
    }
}
