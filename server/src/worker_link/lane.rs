//! A stream that carries the commands to a worker that a guest or a caller waits for: a message each way. A call of
//! HTTP/2 sends its headers and its body apart, each of which wakes the worker, and passes more tasks on either side.
//!
//! ```text
//!   Closed ──open──► Opening ──► Open ◄──answered──► Busy     one command at a time; another goes as a call
//!      ▲                │                              │
//!      ├──── failed ────┘                              │      Opening ──► Unknown: a worker of a former version
//!      └─ the stream has ended, or nobody waits for the answer
//! ```
//!
//! Invariant: what is read from an open stream answers the command that was sent last. A stream whose answer was not
//! waited for is closed, which gives the command up as a call that is dropped.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vpmu_proto::worker::command_request::Command;
use vpmu_proto::worker::command_response::Outcome;
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;
use vpmu_proto::worker::{CommandError, CommandRequest, CommandResponse};

use super::wire;
use crate::status::ApiError;

/// Of one worker, in another process.
#[derive(Default)]
pub(super) struct Lane(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    Closed,
    Opening,
    Open(Box<Stream>),
    Busy,
    /// The worker has no such stream.
    Unknown,
}

struct Stream {
    commands: mpsc::Sender<CommandRequest>,
    answers: Streaming<CommandResponse>,
}

impl Stream {
    /// Nothing is on its way, so that whatever it has to say is its end.
    fn is_open(&mut self) -> bool {
        !self.commands.is_closed() && self.answers.message().now_or_never().is_none()
    }
}

/// An open stream that is used. It is open again only if its answer was waited for.
struct Use<'a> {
    lane: &'a Lane,
    next: State,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.lane.set(mem::take(&mut self.next));
    }
}

impl Lane {
    /// What came of the command; none if it has to go as a call: no stream is open, it is in use, or the worker does not
    /// know the command.
    pub(super) async fn command(
        &self,
        deadline: Duration,
        command: &Command,
    ) -> Option<Result<Outcome, ApiError>> {
        let mut stream = self.take()?;
        let mut used = Use { lane: self, next: State::Closed };
        if !stream.is_open() {
            return None;
        }
        // There is room for one, and none is on its way.
        stream.commands.try_send(CommandRequest { command: Some(command.clone()) }).ok()?;
        let answer = tokio::time::timeout(deadline, stream.answers.message()).await;
        let answer = match wire::answered(deadline, answer) {
            Ok(Some(answer)) => answer,
            Ok(None) => return Some(Err(gone())),
            Err(error) => return Some(Err(error)),
        };
        let outcome = match (command, answer.outcome) {
            (_, Some(Outcome::Error(error))) => Err(status(error)),
            (Command::Run(_), Some(outcome @ Outcome::Run(_)))
            | (Command::Pause(_), Some(outcome @ Outcome::Pause(_)))
            | (Command::Grant(_), Some(outcome @ Outcome::Grant(_)))
            | (Command::Finish(_), Some(outcome @ Outcome::Finish(_))) => Ok(outcome),
            // Of a stream that answers something else nothing more is believed.
            _ => return Some(Err(confused())),
        };
        used.next = State::Open(stream);
        match outcome {
            Ok(outcome) => Some(Ok(outcome)),
            // A worker of a former version does not know the command, and has done nothing.
            Err(status) if status.code() == Code::Unimplemented => None,
            Err(status) => Some(Err(ApiError::from_status("worker", &status))),
        }
    }

    /// Opens it if it is not, behind the caller's back.
    pub(super) fn open(self: &Arc<Self>, mut client: WorkerServiceClient<Channel>, deadline: Duration) {
        {
            let mut state = self.lock();
            if !matches!(*state, State::Closed) {
                return;
            }
            *state = State::Opening;
        }
        let lane = Arc::downgrade(self);
        tokio::spawn(async move {
            let (commands, sent) = mpsc::channel(1);
            let opened = tokio::time::timeout(deadline, client.command(ReceiverStream::new(sent))).await;
            let state = match opened {
                Ok(Ok(answers)) => State::Open(Box::new(Stream { commands, answers: answers.into_inner() })),
                Ok(Err(status)) if status.code() == Code::Unimplemented => State::Unknown,
                Ok(Err(status)) => {
                    tracing::debug!(%status, "no stream of commands");
                    State::Closed
                }
                Err(_) => State::Closed,
            };
            // Who has let the worker go needs none.
            if let Some(lane) = lane.upgrade() {
                lane.set(state);
            }
        });
    }

    fn take(&self) -> Option<Box<Stream>> {
        let mut state = self.lock();
        match mem::replace(&mut *state, State::Busy) {
            State::Open(stream) => Some(stream),
            other => {
                *state = other;
                None
            }
        }
    }

    fn set(&self, state: State) {
        *self.lock() = state;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn status(error: CommandError) -> Status {
    Status::with_details(Code::from_i32(error.code), error.message, error.details.into())
}

/// As with a call whose connection breaks.
fn gone() -> ApiError {
    ApiError::from_status(
        "worker",
        &Status::unavailable("it closed the stream of commands before it answered"),
    )
}

/// Of an answer that is none to what was asked.
pub(super) fn confused() -> ApiError {
    ApiError::internal(
        "WORKER_ANSWER",
        "the worker answered something else than it was asked; stop the machine",
    )
}

#[cfg(test)]
mod tests {
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
            let attach = AttachRequest {
                store_id: "store".to_owned(),
                vm_uid: "vm".to_owned(),
                incarnation: 1,
                term: 1,
            };
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
        assert!(
            matches!(&granted, Ok(Outcome::Grant(answer)) if answer.running_monotonic_ns > 0),
            "{granted:?}"
        );
        let finish =
            FinishMigrationRequest { fence: fence(), migration_id: "none such".to_owned(), epoch: 2 };
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
}
