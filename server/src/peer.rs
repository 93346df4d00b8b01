//! The source's way to another vpmud.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use vpmu_proto::peer::migration_peer_service_client::MigrationPeerServiceClient;
use vpmu_proto::peer::*;

use crate::config::Address;
use crate::migration::limits::Limits;
use crate::status::ApiError;

/// Version of the peer protocol that this daemon speaks.
pub const VERSION: u32 = 1;

/// Another vpmud.
#[derive(Clone)]
pub struct Peer {
    /// Its address.
    pub address: Address,
    client: MigrationPeerServiceClient<Channel>,
    /// Bound on one call.
    bound: Duration,
}

impl Peer {
    /// Connects.
    pub async fn connect(address: &Address, limits: &Limits) -> Result<Self, ApiError> {
        let endpoint = Endpoint::from_static("http://peer.invalid")
            .connect_timeout(limits.connect)
            .http2_keep_alive_interval(limits.keep_alive)
            .keep_alive_timeout(limits.keep_alive)
            .keep_alive_while_idle(true);
        let target = address.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let target = target.clone();
            async move { dial(target).await }
        });
        let unreachable = |why: String| {
            ApiError::unavailable(
                "DESTINATION_UNREACHABLE",
                format!(
                    "no vpmud answers at {address}: {why}; check the address and that its --peer-listen is up"
                ),
            )
            .with("destination", address)
        };
        match tokio::time::timeout(limits.connect, endpoint.connect_with_connector(connector)).await {
            Ok(Ok(channel)) => {
                let client = MigrationPeerServiceClient::new(channel).max_decoding_message_size(16 << 20);
                Ok(Self { address: address.clone(), client, bound: limits.call })
            }
            Ok(Err(error)) => Err(unreachable(root_cause(&error))),
            Err(_) => Err(unreachable(format!("no connection within {:?}", limits.connect))),
        }
    }

    /// Finds out who the other is.
    pub async fn negotiate(&self, host_id: &str) -> Result<NegotiateResponse, ApiError> {
        let request = NegotiateRequest { versions: vec![VERSION], host_id: host_id.to_owned() };
        let mut client = self.client.clone();
        let answer = call(self.bound, client.negotiate(request)).await?;
        if answer.version == VERSION {
            return Ok(answer);
        }
        Err(ApiError::precondition(
            "VERSION",
            &self.address.to_string(),
            format!(
                "{} speaks peer protocol {}, this host {VERSION}; upgrade one of them",
                self.address, answer.version
            ),
        ))
    }

    /// Names what does not fit.
    pub async fn check(&self, requirements: Requirements) -> Result<CheckResponse, ApiError> {
        let request = CheckRequest { version: VERSION, requirements: Some(requirements) };
        let mut client = self.client.clone();
        call(self.bound, client.check(request)).await
    }

    /// Reserves.
    pub async fn prepare(&self, request: PrepareRequest) -> Result<PrepareResponse, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.prepare(request)).await
    }

    /// Opens the stream of one migration.
    pub async fn handover(
        &self,
        messages: tokio::sync::mpsc::Receiver<SourceMessage>,
    ) -> Result<tonic::Streaming<DestinationMessage>, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.handover(tokio_stream::wrappers::ReceiverStream::new(messages))).await
    }

    /// Asks for a decision.
    pub async fn resolve(&self, request: ResolveRequest) -> Result<ResolveResponse, ApiError> {
        let mut client = self.client.clone();
        call(self.bound, client.resolve(request)).await
    }
}

async fn dial(address: Address) -> std::io::Result<TokioIo<Duplex>> {
    Ok(TokioIo::new(match address {
        Address::Unix(path) => Duplex::Unix(tokio::net::UnixStream::connect(path).await?),
        Address::Tcp(addr) => {
            let stream = tokio::net::TcpStream::connect(addr).await?;
            stream.set_nodelay(true)?;
            Duplex::Tcp(stream)
        }
    }))
}

/// Either kind of connection.
enum Duplex {
    Unix(tokio::net::UnixStream),
    Tcp(tokio::net::TcpStream),
}

macro_rules! delegate {
    ($self:ident, $inner:ident => $call:expr) => {
        match $self.get_mut() {
            Duplex::Unix($inner) => $call,
            Duplex::Tcp($inner) => $call,
        }
    };
}

impl tokio::io::AsyncRead for Duplex {
    fn poll_read(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        delegate!(self, s => std::pin::Pin::new(s).poll_read(cx, buf))
    }
}

impl tokio::io::AsyncWrite for Duplex {
    fn poll_write(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        delegate!(self, s => std::pin::Pin::new(s).poll_write(cx, buf))
    }

    fn poll_flush(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        delegate!(self, s => std::pin::Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        delegate!(self, s => std::pin::Pin::new(s).poll_shutdown(cx))
    }
}

async fn call<T>(
    bound: Duration,
    future: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(bound, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(ApiError::from_status("destination", &status)),
        Err(_) => Err(ApiError::unavailable(
            "DESTINATION_TIMEOUT",
            format!("the destination did not answer within {bound:?}; look at its log and try again"),
        )),
    }
}

fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    cause.to_string()
}
