//! The stream of commands against a worker's own service, behind a Unix socket.

use std::sync::Arc;

use hyper_util::rt::TokioIo;
use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Endpoint, Server, Uri};
use vcpu_worker::cores::HostCores;
use vcpu_worker::service::{Worker, WorkerOptions};
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::api::{ProbeBoot, VirtualMachineSpec};
use vpmu_proto::worker::worker_service_server::WorkerServiceServer;
use vpmu_proto::worker::{
    AttachRequest, CreateVmRequest, Fence, FinishMigrationRequest, GrantRequest, PauseRequest, RunRequest,
};

use super::*;

const LONG: Duration = Duration::from_secs(60);
const MODEL: &str = "intel:v5:8+4:48";

/// A worker behind a Unix socket, with a simulated machine that runs.
struct Host {
    client: WorkerServiceClient<Channel>,
    lane: Arc<Lane>,
    ended: CancellationToken,
    _dir: tempfile::TempDir,
}

#[expect(clippy::unnecessary_wraps, reason = "every request has it as an optional message")]
fn fence() -> Option<Fence> {
    Some(Fence { vm_uid: "vm".to_owned(), incarnation: 1, term: 1 })
}

fn run() -> Command {
    Command::Run(RunRequest { fence: fence() })
}

fn pause() -> Command {
    Command::Pause(PauseRequest { fence: fence() })
}

fn connect(dir: &std::path::Path) -> (UnixListenerStream, Channel) {
    let socket = dir.join("worker.sock");
    let listener = UnixListener::bind(&socket).expect("listening");
    let connect = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://worker.invalid").connect_with_connector_lazy(connect);
    (UnixListenerStream::new(listener), channel)
}

impl Host {
    async fn start() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let (incoming, channel) = connect(dir.path());
        let cores = Arc::new(HostCores::new(MODEL.parse().expect("a shape"), &[0]));
        let worker = Worker::new(WorkerOptions::new(cores, CancellationToken::new()));
        let ended = worker.ended();
        tokio::spawn(
            Server::builder()
                .add_service(WorkerServiceServer::new(worker))
                .serve_with_incoming_shutdown(incoming, ended.clone().cancelled_owned()),
        );
        let mut client = WorkerServiceClient::new(channel);
        let attach =
            AttachRequest { store_id: "store".to_owned(), vm_uid: "vm".to_owned(), incarnation: 1, term: 1 };
        client.attach(attach).await.expect("attached");
        let spec = VirtualMachineSpec {
            vcpus: 1,
            memory_bytes: 16 << 20,
            boot: Some(Boot::Probe(ProbeBoot::default())),
            ..VirtualMachineSpec::default()
        };
        let create = CreateVmRequest {
            fence: fence(),
            vm_name: "vm".to_owned(),
            vcpu_cores: vec![0],
            spec: Some(spec),
            hypervisor: "simulated".to_owned(),
            pmu_mode: "model".to_owned(),
            model_pmu: MODEL.to_owned(),
            ..CreateVmRequest::default()
        };
        client.create_vm(create).await.expect("created");
        let grant = GrantRequest { fence: fence(), epoch: 1, seq: 1, deadline_boottime_ns: 0, run: true };
        client.grant(grant).await.expect("granted");
        Self { client, lane: Arc::default(), ended, _dir: dir }
    }

    async fn open(&self) {
        self.lane.open(self.client.clone(), LONG);
        settled(&self.lane).await;
        assert!(matches!(*self.lane.lock(), State::Open(_)));
    }

    async fn is_running(&mut self) -> bool {
        let status = vpmu_proto::worker::GetStatusRequest { fence: fence() };
        let status = self.client.get_status(status).await.expect("status").into_inner();
        status.state() == vpmu_proto::worker::worker_status::State::Running
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.ended.cancel();
    }
}

/// Waits until it is known whether it can be opened.
async fn settled(lane: &Lane) {
    let opening = async {
        while matches!(*lane.lock(), State::Opening) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, opening).await.expect("opened or refused");
}

#[tokio::test]
async fn commands_do_what_calls_do() {
    let mut host = Host::start().await;
    assert!(host.lane.command(LONG, &pause()).await.is_none(), "nothing is open");
    host.open().await;
    for _ in 0..20 {
        let paused = host.lane.command(LONG, &pause()).await.expect("by the stream").expect("paused");
        assert!(matches!(&paused, Outcome::Pause(answer) if answer.pmu.len() == 1), "{paused:?}");
        assert!(!host.is_running().await);
        let running = host.lane.command(LONG, &run()).await.expect("by the stream").expect("runs");
        assert!(matches!(running, Outcome::Run(_)), "{running:?}");
        assert!(host.is_running().await);
    }
}

#[tokio::test]
async fn a_refusal_is_the_one_of_the_call_and_the_stream_goes_on() {
    let mut host = Host::start().await;
    host.open().await;
    let fence = Some(Fence { term: 0, ..fence().unwrap_or_default() });
    let stale = PauseRequest { fence };
    let by_call = host.client.pause(stale.clone()).await.expect_err("a former term");
    let by_call = ApiError::from_status("worker", &by_call);
    let refused = host.lane.command(LONG, &Command::Pause(stale)).await.expect("by the stream");
    let refused = refused.expect_err("a former term");
    assert_eq!(
        (refused.code(), refused.reason(), refused.message()),
        (by_call.code(), by_call.reason(), by_call.message())
    );
    assert!(!refused.reason().is_empty());
    let paused = host.lane.command(LONG, &pause()).await.expect("still open").expect("paused");
    assert!(matches!(paused, Outcome::Pause(_)));
}

#[tokio::test]
async fn a_grant_and_the_end_of_a_migration_go_the_same_way() {
    let host = Host::start().await;
    host.open().await;
    let grant = GrantRequest { fence: fence(), epoch: 2, seq: 2, deadline_boottime_ns: 0, run: true };
    let granted = host.lane.command(LONG, &Command::Grant(grant)).await.expect("by the stream");
    assert!(matches!(&granted, Ok(Outcome::Grant(answer)) if answer.running_monotonic_ns > 0), "{granted:?}");
    let finish = FinishMigrationRequest { fence: fence(), migration_id: "none such".to_owned(), epoch: 2 };
    let refused = host.lane.command(LONG, &Command::Finish(finish)).await.expect("by the stream");
    let refused = refused.expect_err("there is none");
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(!refused.reason().is_empty() && !refused.reason().starts_with("WORKER_"), "{refused}");
}

#[tokio::test]
async fn an_answer_that_nobody_waited_for_is_nobodys() {
    let mut host = Host::start().await;
    for _ in 0..20 {
        host.open().await;
        {
            let lane = Arc::clone(&host.lane);
            let command = pause();
            let mut given_up = std::pin::pin!(lane.command(LONG, &command));
            assert!(given_up.as_mut().now_or_never().is_none(), "it takes a while");
            assert!(host.lane.command(LONG, &run()).await.is_none(), "the stream is in use");
        }
        assert!(matches!(*host.lane.lock(), State::Closed));
        host.open().await;
        // Of whichever came first, the answer is that of the one that was asked.
        let running = host.lane.command(LONG, &run()).await.expect("by the stream").expect("runs");
        assert!(matches!(running, Outcome::Run(_)), "{running:?}");
        let paused = host.lane.command(LONG, &pause()).await.expect("by the stream").expect("paused");
        assert!(matches!(&paused, Outcome::Pause(answer) if answer.pmu.len() == 1), "{paused:?}");
        host.client.run(RunRequest { fence: fence() }).await.expect("runs");
    }
}

#[tokio::test]
async fn a_stream_that_has_ended_is_seen_to_be_closed() {
    let host = Host::start().await;
    host.open().await;
    host.ended.cancel();
    let closed = async {
        while host.lane.command(LONG, &pause()).await.is_some_and(|answer| answer.is_ok()) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LONG, closed).await.expect("the worker's end is seen");
    assert!(matches!(*host.lane.lock(), State::Closed));
}

#[tokio::test]
async fn a_command_that_the_worker_does_not_know_is_left_undone_and_the_stream_goes_on() {
    let mut host = Host::start().await;
    let (commands, sent) = mpsc::channel(2);
    for command in [None, Some(pause())] {
        commands.send(CommandRequest { command }).await.expect("sent");
    }
    let mut answers = host.client.command(ReceiverStream::new(sent)).await.expect("opened").into_inner();
    let unknown = answers.message().await.expect("answered").expect("goes on").outcome;
    assert!(
        matches!(&unknown, Some(Outcome::Error(error)) if error.code == i32::from(Code::Unimplemented)),
        "{unknown:?}"
    );
    let paused = answers.message().await.expect("answered").expect("goes on").outcome;
    assert!(matches!(paused, Some(Outcome::Pause(_))), "{paused:?}");
}

#[tokio::test]
async fn a_worker_that_knows_no_such_stream_is_asked_once() {
    let dir = tempfile::tempdir().expect("a directory");
    let (incoming, channel) = connect(dir.path());
    let served =
        Server::builder().add_routes(tonic::service::Routes::default()).serve_with_incoming(incoming);
    let served = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(served));
    let lane = Arc::new(Lane::default());
    for _ in 0..2 {
        lane.open(WorkerServiceClient::new(channel.clone()), LONG);
        settled(&lane).await;
        assert!(matches!(*lane.lock(), State::Unknown));
        assert!(lane.command(LONG, &pause()).await.is_none());
    }
    drop(served);
}
