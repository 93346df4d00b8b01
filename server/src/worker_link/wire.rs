//! How a call reaches a worker: of the service itself where that is in this process, else over gRPC.
//!
//! Invariants: a call ends, with its answer or at its deadline; that one alone is [`SILENT`], and says nothing about
//! the worker. A stream has a deadline for its beginning only: who reads it decides how long to wait.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_stream::{Stream, StreamExt as _};
use tonic::transport::Channel;
use tonic::{Response, Status};
use vcpu_worker::service::Worker;
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;

use crate::status::ApiError;

/// The reason of an error that says nothing about the worker but that it did not answer in time: it may live.
pub const SILENT: &str = "WORKER_TIMEOUT";
/// Largest message that is taken from a worker, in bytes.
const MAX_ANSWER: usize = 16 << 20;

/// A call with one answer: of the service itself where that is in this process, else over the wire.
macro_rules! unary {
    ($link:expr, $deadline:expr, $method:ident, $request:expr) => {
        match &$link.inner.way {
            wire::Way::Here(worker) => {
                wire::call($deadline, worker.$method(tonic::Request::new($request))).await
            }
            wire::Way::There(client) => wire::call($deadline, client.clone().$method($request)).await,
        }
    };
}

/// The same for a call that is answered by a stream.
macro_rules! streaming {
    ($link:expr, $method:ident, $request:expr) => {{
        let within = $link.inner.command;
        Ok(match &$link.inner.way {
            wire::Way::Here(worker) => {
                wire::Told(wire::call(within, worker.$method(tonic::Request::new($request))).await?)
            }
            wire::Way::There(client) => {
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

pub(super) fn client(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

pub(super) async fn call<T>(
    deadline: Duration,
    future: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(deadline, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(ApiError::from_status("worker", &status)),
        Err(_) => Err(ApiError::unavailable(
            SILENT,
            format!("the worker did not answer within {deadline:?}; stop the machine if this persists"),
        )),
    }
}
