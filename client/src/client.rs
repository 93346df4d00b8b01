//! The connection to one host and how a call is made on it: every call has a deadline, which the server is told too.

use crate::endpoint::Endpoint;
use crate::error::ClientError;
use hyper_util::rt::TokioIo;
use std::future::Future;
use std::time::{Duration, Instant};
use tokio::net::UnixStream;
use tonic::transport::Channel;
use tonic::{Code, Request, Response, Status};
use vpmu_proto::api::migrations_service_client::MigrationsServiceClient;
use vpmu_proto::api::pmu_service_client::PmuServiceClient;
use vpmu_proto::api::virtual_machines_service_client::VirtualMachinesServiceClient;
use vpmu_proto::longrunning::operations_client::OperationsClient;

/// Deadline of one unary call unless [`Client::with_call_deadline`] says otherwise.
pub const DEFAULT_CALL_DEADLINE: Duration = Duration::from_secs(30);

/// Time between two pings, and for the answer to one.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// Largest answer that is accepted, in bytes: a migration's result with the PMU of 256 vCPUs fits many times over.
const MAX_ANSWER: usize = 16 << 20;

/// What a host may send of one answer before it hears that some has been read: a whole page of a list, as far as that
/// is usual. HTTP/2's own 64 KiB would cost a long list many round trips.
const STREAM_WINDOW: u32 = 2 << 20;
/// The same for all answers of a connection together.
const CONNECTION_WINDOW: u32 = 8 << 20;

/// A connection to one host. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub struct Client {
    channel: Channel,
    endpoint: Endpoint,
    call_deadline: Duration,
}

impl Client {
    /// Connects within `deadline`.
    ///
    /// # Errors
    /// [`ClientError::Connect`] when nothing answers, [`ClientError::Deadline`] when the time is over.
    pub async fn connect(endpoint: &Endpoint, deadline: Duration) -> Result<Self, ClientError> {
        let refused =
            |problem: String| ClientError::Connect { endpoint: Box::new(endpoint.clone()), problem };
        let connecting = async {
            match endpoint {
                Endpoint::Tcp(address) => {
                    tonic::transport::Endpoint::from_shared(format!("http://{address}"))
                        .map_err(|error| refused(deepest(&error)))?
                        .tcp_nodelay(true)
                        .initial_stream_window_size(STREAM_WINDOW)
                        .initial_connection_window_size(CONNECTION_WINDOW)
                        .connect()
                        .await
                        .map_err(|error| refused(deepest(&error)))
                }
                Endpoint::Unix(path) => {
                    let path = path.clone();
                    // The authority of a Unix socket means nothing; HTTP/2 wants one all the same.
                    alive(tonic::transport::Endpoint::from_static("http://localhost"))
                        .connect_with_connector(tower::service_fn(move |_| {
                            let path = path.clone();
                            async move { UnixStream::connect(path).await.map(TokioIo::new) }
                        }))
                        .await
                        .map_err(|error| refused(deepest(&error)))
                }
            }
        };
        let channel = tokio::time::timeout(deadline, connecting).await.map_err(|_| {
            ClientError::Deadline { what: format!("connecting to {endpoint}"), waited: deadline }
        })??;
        Ok(Self { channel, endpoint: endpoint.clone(), call_deadline: DEFAULT_CALL_DEADLINE })
    }

    /// The same connection with another deadline for each unary call.
    #[must_use]
    pub fn with_call_deadline(mut self, deadline: Duration) -> Self {
        self.call_deadline = deadline;
        self
    }

    /// Where it is connected to.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Deadline of one unary call.
    pub fn call_deadline(&self) -> Duration {
        self.call_deadline
    }

    /// The generated client of `VirtualMachinesService`, for what the typed methods do not cover.
    pub fn raw_vms(&self) -> VirtualMachinesServiceClient<Channel> {
        VirtualMachinesServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// The generated client of `PmuService`.
    pub fn raw_pmu(&self) -> PmuServiceClient<Channel> {
        PmuServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// The generated client of `MigrationsService`.
    pub fn raw_migrations(&self) -> MigrationsServiceClient<Channel> {
        MigrationsServiceClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// The generated client of `google.longrunning.Operations`.
    pub fn raw_operations(&self) -> OperationsClient<Channel> {
        OperationsClient::new(self.channel.clone()).max_decoding_message_size(MAX_ANSWER)
    }

    /// A request with this client's deadline in its metadata.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.set_timeout(self.call_deadline);
        request
    }

    /// Runs one unary call under the deadline. The client's own clock is a little more patient than the deadline that
    /// the server was told, so that the server's answer wins where there is one.
    pub(crate) async fn call<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, ClientError> {
        let patience = self.call_deadline + Duration::from_millis(500);
        let begin = Instant::now();
        match tokio::time::timeout(patience, call).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            // tonic says CANCELLED where a deadline has passed, on both ends.
            Ok(Err(status)) if status.code() == Code::Cancelled && begin.elapsed() >= self.call_deadline => {
                Err(ClientError::Deadline { what: what.to_owned(), waited: self.call_deadline })
            }
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(ClientError::Deadline { what: what.to_owned(), waited: patience }),
        }
    }
}

/// Pings while calls are open, so that a stream from a host that hangs ends with an error and not never.
fn alive(endpoint: tonic::transport::Endpoint) -> tonic::transport::Endpoint {
    endpoint
        .http2_keep_alive_interval(KEEP_ALIVE)
        .keep_alive_timeout(KEEP_ALIVE)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
}

/// A fresh id for idempotent requests.
pub(crate) fn request_id() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The innermost cause: what the operating system said, without the layers of transport around it.
fn deepest(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
