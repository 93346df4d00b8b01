//! How a call reaches a worker: of the service itself where that is in this process, else over gRPC.
//!
//! Invariants: a call ends, with its answer or at its deadline; that one alone is [`SILENT`], and says nothing about
//! the worker. A stream has a deadline for its beginning only: who reads it decides how long to wait. A service in this
//! process that panics fails the call, as one in another does, and not who called it.

use std::any::Any;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{FutureExt as _, StreamExt as _};
use tokio::time::error::Elapsed;
use tokio_stream::Stream;
use tokio_util::task::AbortOnDropHandle;
use tonic::transport::Channel;
use tonic::{Response, Status};
use vcpu_worker::service::Worker;
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;

use crate::status::ApiError;

/// The reason of an error that says nothing about the worker but that it did not answer in time: it may live.
pub const SILENT: &str = "WORKER_TIMEOUT";
/// How long a worker without a machine may take to refuse a call.
pub(crate) const ACQUAINTED: Duration = Duration::from_secs(5);
/// Largest message that is taken from a worker, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A call with one answer: of the service itself where that is in this process, else over the wire.
macro_rules! unary {
    ($link:expr, $deadline:expr, $method:ident, $request:expr) => {
        match &$link.inner.way {
            wire::Way::Here(worker) => {
                wire::call($deadline, wire::guarded(worker.$method(tonic::Request::new($request)))).await
            }
            wire::Way::There(client) => match $link.attached().await {
                Ok(()) => wire::call($deadline, client.clone().$method($request)).await,
                Err(error) => Err(error),
            },
        }
    };
}

/// The same for a call that is answered by a stream. In a task of its own: what of it does not await does not hold up
/// who gives the call up.
macro_rules! streaming {
    ($link:expr, $method:ident, $request:expr) => {{
        let within = $link.inner.command;
        Ok(match &$link.inner.way {
            wire::Way::Here(worker) => {
                let (worker, request) = (worker.clone(), tonic::Request::new($request));
                let apart = wire::apart(async move { worker.$method(request).await });
                wire::Told(wire::guarded_stream(wire::call(within, apart).await?))
            }
            wire::Way::There(client) => {
                $link.attached().await?;
                wire::Told(Box::pin(wire::call(within, client.clone().$method($request)).await?))
            }
        })
    }};
}

pub(super) use {streaming, unary};

/// What a worker tells one after the other, until it ends.
pub struct Told<T>(pub(super) Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>);

impl<T> Told<T> {
    /// The next message, as [`tonic::Streaming::message`] has it.
    ///
    /// # Errors
    /// What the worker ended the stream with, or the connection.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        self.next().await.transpose()
    }
}

impl<T> Stream for Told<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}

/// Where the service is.
pub(super) enum Way {
    /// In this process.
    Here(Worker),
    /// In another, over gRPC.
    There(WorkerServiceClient<Channel>),
}

/// What the service was doing ends with it; nobody else does.
fn panicked(panic: &(dyn Any + Send)) -> Status {
    let words = panic.downcast_ref::<&str>().copied();
    let words = words.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("no words");
    tracing::error!(panic = words, "a worker in this process panicked in a call");
    let text = format!("it panicked: {}; stop the machine if this persists", crate::status::clip(words, 200));
    ApiError::internal("WORKER_PANICKED", text).into()
}

/// A call of a service in this process, whose panic is its error.
pub(super) async fn guarded<T>(call: impl Future<Output = Result<T, Status>>) -> Result<T, Status> {
    AssertUnwindSafe(call).catch_unwind().await.unwrap_or_else(|panic| Err(panicked(&*panic)))
}

/// The same in a task of its own, which ends with this.
pub(super) async fn apart<T: Send + 'static>(
    call: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    let task = AbortOnDropHandle::new(tokio::spawn(guarded(call)));
    // It is aborted by nobody but the runtime's end.
    task.await.unwrap_or_else(|error| Err(Status::cancelled(error.to_string())))
}

/// What a service in this process tells; its panic is the last of it.
pub(super) fn guarded_stream<T: 'static>(
    stream: impl Stream<Item = Result<T, Status>> + Send + 'static,
) -> Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>> {
    let told = AssertUnwindSafe(stream).catch_unwind();
    Box::pin(told.map(|told| told.unwrap_or_else(|panic| Err(panicked(&*panic)))))
}

pub(super) fn client(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

/// Makes the connection to a worker that has no machine yet, and has a call served over it: the first one costs
/// milliseconds on either side. It is refused, since it does not say who asks. Says whether it was answered.
pub(crate) async fn acquaint(channel: Channel) -> bool {
    let mut client = client(channel);
    let asked = client.get_status(vpmu_proto::worker::GetStatusRequest::default());
    let answer = tokio::time::timeout(ACQUAINTED, asked).await;
    tracing::debug!(?answer, "a spare worker was asked");
    // Who has no fence is told so; what tonic says of a connection that is not there is Unavailable.
    answer
        .is_ok_and(|answer| answer.map_or_else(|status| status.code() != tonic::Code::Unavailable, |_| true))
}

pub(super) async fn call<T>(
    deadline: Duration,
    future: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, ApiError> {
    let answer = tokio::time::timeout(deadline, future).await;
    answered(deadline, answer).map(Response::into_inner)
}

/// What a worker answered, or that it did not in time.
pub(super) fn answered<T>(
    deadline: Duration,
    answer: Result<Result<T, Status>, Elapsed>,
) -> Result<T, ApiError> {
    match answer {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(status)) => Err(ApiError::from_status("worker", &status)),
        Err(_) => Err(ApiError::unavailable(
            SILENT,
            format!("the worker did not answer within {deadline:?}; stop the machine if this persists"),
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    const LONG: Duration = Duration::from_secs(60);

    #[tokio::test]
    async fn a_panic_fails_the_call_and_not_the_caller() {
        let broken = async { panic!("on purpose: {}", 7) };
        let error = call::<()>(LONG, guarded(broken)).await.expect_err("panicked");
        assert_eq!((error.code(), error.reason()), (tonic::Code::Internal, "WORKER_PANICKED"));
        assert!(error.message().contains("on purpose: 7"), "{error}");
        let broken = async { panic!("apart") };
        let error = call::<()>(LONG, apart(broken)).await.expect_err("panicked");
        assert_eq!(error.reason(), "WORKER_PANICKED");
        assert_eq!(call(LONG, apart(async { Ok(Response::new(7)) })).await.expect("the next one"), 7);
    }

    #[tokio::test]
    async fn a_panic_ends_a_stream() {
        let numbers = tokio_stream::iter([1, 0]).map(|n| Ok(1 / n));
        let mut told = Told(guarded_stream(numbers));
        assert_eq!(told.message().await.expect("told"), Some(1));
        let error = ApiError::from_status("worker", &told.message().await.expect_err("panicked"));
        assert_eq!(error.reason(), "WORKER_PANICKED");
        assert_eq!(told.message().await.expect("over"), None);
    }

    /// The call is inside something that does not await: whoever gives it up goes on at once.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn giving_up_a_call_apart_waits_for_nothing() {
        let (inside, begun) = tokio::sync::oneshot::channel();
        let (go_on, wait) = mpsc::channel::<()>();
        let (ended, end) = tokio::sync::oneshot::channel();
        let busy = async move {
            inside.send(()).expect("awaited");
            wait.recv().expect("told to go on");
            ended.send(()).expect("awaited");
            std::future::pending().await
        };
        tokio::select! {
            _ = call::<()>(LONG, apart(busy)) => panic!("it does not end"),
            begun = begun => begun.expect("begun"),
        }
        go_on.send(()).expect("still inside");
        end.await.expect("it was not cut short in the middle");
    }
}
