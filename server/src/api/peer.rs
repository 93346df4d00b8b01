//! `vpmu.peer.v1.MigrationPeerService`: what other hosts ask of this one.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use vpmu_proto::peer::migration_peer_service_server::MigrationPeerService;
use vpmu_proto::peer::source_message::Message as FromSource;
use vpmu_proto::peer::*;

use super::details::explain;
use crate::daemon::Daemon;
use crate::duplex::Caller;
use crate::migration::destination::{self, Conversation, Way};
use crate::migration::{check, resolve};
use crate::peer::VERSION;
use crate::status::ApiError;

/// A source must open its stream within this time.
const OPEN: Duration = Duration::from_secs(10);
/// Messages on the way to the source.
const OUTBOX: usize = 16;
const METHOD: &str = "/vpmu.peer.v1.MigrationPeerService/Handover";

/// The service.
#[derive(Clone)]
pub struct PeerApi {
    daemon: Arc<Daemon>,
}

impl PeerApi {
    /// Over the daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    async fn open(
        &self,
        mut from: Streaming<SourceMessage>,
    ) -> Result<ReceiverStream<Result<DestinationMessage, Status>>, Status> {
        let first = match tokio::time::timeout(OPEN, from.message()).await {
            Ok(Ok(Some(first))) => first,
            Ok(Err(status)) => return Err(explain(&status, METHOD)),
            Ok(Ok(None)) | Err(_) => {
                return Err(ApiError::invalid(
                    "message",
                    "",
                    "OPEN_REQUIRED",
                    "did not come",
                    "send Open first",
                )
                .into());
            }
        };
        if !matches!(first.message, Some(FromSource::Open(_))) {
            return Err(
                ApiError::invalid("message", "", "OPEN_REQUIRED", "is not Open", "send Open first").into()
            );
        }
        let unknown = || {
            ApiError::not_found(
                "IncomingMigration",
                &first.migration_id,
                "call Prepare first, or Resolve if it had one",
            )
        };
        let id = uuid::Uuid::try_parse(&first.migration_id).map_err(|_| unknown())?;
        let door = self.daemon.migrations.incoming().get(&id).cloned().ok_or_else(unknown)?;
        let (to, outbox) = mpsc::channel(OUTBOX);
        let vm_uid = first.vm_uid.clone();
        door.try_send(Conversation { vm_uid, from, to }).map_err(|_| {
            ApiError::aborted(
                "STREAM_OPEN",
                &first.migration_id,
                "this migration has a stream already; close it first",
            )
        })?;
        Ok(ReceiverStream::new(outbox))
    }
}

#[tonic::async_trait]
impl MigrationPeerService for PeerApi {
    async fn negotiate(
        &self,
        request: Request<NegotiateRequest>,
    ) -> Result<Response<NegotiateResponse>, Status> {
        if !request.get_ref().versions.contains(&VERSION) {
            let versions = format!("{:?}", request.get_ref().versions.iter().take(16).collect::<Vec<_>>());
            return Err(ApiError::invalid(
                "versions",
                versions,
                "VERSION",
                "has no version that this host speaks (1)",
                "upgrade the older host",
            )
            .into());
        }
        Ok(Response::new(NegotiateResponse {
            version: VERSION,
            host_id: self.daemon.host.host_id.clone(),
            capabilities: Some(self.daemon.capabilities()),
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
            boot_id: self.daemon.host.boot_id.clone(),
            wall_clock_us: check::wall_clock_us(),
        }))
    }

    async fn check(&self, request: Request<CheckRequest>) -> Result<Response<CheckResponse>, Status> {
        let needs = request.into_inner().requirements.unwrap_or_default();
        Ok(Response::new(CheckResponse { mismatches: check::mismatches(&self.daemon, &needs) }))
    }

    async fn prepare(&self, request: Request<PrepareRequest>) -> Result<Response<PrepareResponse>, Status> {
        let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
        tracing::info!(?caller, migration = %crate::status::clip(&request.get_ref().migration_id, 64), "a machine is announced");
        let way = caller.local.map_or(Way::Unix, Way::Tcp);
        // In a task of its own: a source that goes away in the middle must not leave half a reservation.
        let daemon = Arc::clone(&self.daemon);
        let request = request.into_inner();
        let prepared = tokio::spawn(async move { destination::prepare(&daemon, request, way).await }).await;
        let prepared = prepared
            .map_err(|e| ApiError::internal("TASK_FAILED", format!("the request's task failed: {e}")))?;
        Ok(Response::new(prepared?))
    }

    type HandoverStream = ReceiverStream<Result<DestinationMessage, Status>>;

    async fn handover(
        &self,
        request: Request<Streaming<SourceMessage>>,
    ) -> Result<Response<Self::HandoverStream>, Status> {
        Ok(Response::new(self.open(request.into_inner()).await?))
    }

    async fn resolve(&self, request: Request<ResolveRequest>) -> Result<Response<ResolveResponse>, Status> {
        Ok(Response::new(resolve::resolve(&self.daemon, request.get_ref())?))
    }
}
