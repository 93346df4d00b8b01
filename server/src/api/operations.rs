//! `google.longrunning.Operations`.

use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tonic::{Request, Response, Status};
use vpmu_proto::longrunning::operations_server::Operations;
use vpmu_proto::longrunning::*;

use super::page;
use crate::daemon::Daemon;
use crate::names;
use crate::status::ApiError;
use crate::validate;

/// Longest wait of one call.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// The service.
#[derive(Clone)]
pub struct OperationsApi {
    daemon: Arc<Daemon>,
}

impl OperationsApi {
    /// Over the daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    fn cancel(&self, name: &str) -> Result<(), ApiError> {
        let id = names::parse_operation("name", name)?;
        let operation = self.daemon.ops.get(id)?;
        if operation.done || self.daemon.ops.cancel(id) {
            return Ok(());
        }
        let migration = operation
            .metadata
            .filter(|m| m.type_url.ends_with("/vpmu.v1.Migration"))
            .and_then(|m| vpmu_proto::api::Migration::decode(m.value.as_slice()).ok());
        match migration {
            Some(migration) => crate::migration::cancel(&self.daemon, &migration.name),
            None => Err(ApiError::unimplemented(
                "OPERATION_NOT_CANCELLABLE",
                format!("{} acts at once and cannot be cancelled; wait for it", operation.name),
            )),
        }
    }
}

#[tonic::async_trait]
impl Operations for OperationsApi {
    async fn list_operations(
        &self,
        request: Request<ListOperationsRequest>,
    ) -> Result<Response<ListOperationsResponse>, Status> {
        let r = request.into_inner();
        if !r.filter.is_empty() {
            return Err(ApiError::invalid(
                "filter",
                r.filter,
                "FILTER_UNAVAILABLE",
                "is not supported yet",
                "leave it empty",
            )
            .into());
        }
        if !matches!(r.name.as_str(), "" | "operations") {
            return Err(ApiError::invalid(
                "name",
                r.name,
                "BAD_RESOURCE_NAME",
                "is no collection",
                "leave it empty",
            )
            .into());
        }
        let size = validate::page_size(r.page_size, 100)?;
        let start = if r.page_token.is_empty() { String::new() } else { r.page_token };
        if !start.is_empty() {
            names::parse_operation("page_token", &start)?;
        }
        let (operations, next_page_token) = page_after(self.daemon.ops.list(), size, &start);
        Ok(Response::new(ListOperationsResponse { operations, next_page_token }))
    }

    async fn get_operation(
        &self,
        request: Request<GetOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let id = names::parse_operation("name", &request.get_ref().name)?;
        Ok(Response::new(self.daemon.ops.get(id)?))
    }

    async fn delete_operation(
        &self,
        request: Request<DeleteOperationRequest>,
    ) -> Result<Response<()>, Status> {
        let id = names::parse_operation("name", &request.get_ref().name)?;
        self.daemon.ops.delete(id).await?;
        Ok(Response::new(()))
    }

    async fn cancel_operation(
        &self,
        request: Request<CancelOperationRequest>,
    ) -> Result<Response<()>, Status> {
        self.cancel(&request.get_ref().name)?;
        Ok(Response::new(()))
    }

    async fn wait_operation(
        &self,
        request: Request<WaitOperationRequest>,
    ) -> Result<Response<Operation>, Status> {
        let r = request.into_inner();
        let id = names::parse_operation("name", &r.name)?;
        let timeout = match r.timeout {
            None => MAX_WAIT,
            Some(d) => Duration::try_from(d)
                .map_err(|_| {
                    ApiError::invalid(
                        "timeout",
                        format!("{}s", d.seconds),
                        "DURATION_OUT_OF_RANGE",
                        "is negative",
                        "use 0 to 60 s",
                    )
                })?
                .min(MAX_WAIT),
        };
        let operation = tokio::select! {
            operation = self.daemon.ops.wait(id, timeout) => operation?,
            () = self.daemon.shutdown.cancelled() => self.daemon.ops.get(id)?,
        };
        Ok(Response::new(operation))
    }
}

/// Newest first has no order in the key itself, so the page begins after the token's item.
fn page_after(all: Vec<Operation>, size: usize, token: &str) -> (Vec<Operation>, String) {
    let start = if token.is_empty() {
        0
    } else {
        all.iter().position(|o| o.name == token).map_or(all.len(), |i| i + 1)
    };
    let rest: Vec<_> = all.into_iter().skip(start).collect();
    page(rest, size, "", |o| o.name.clone(), |_, _| true)
}
