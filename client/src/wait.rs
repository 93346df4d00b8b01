//! Follows a long-running operation to its end.

use crate::client::Client;
use crate::error::ClientError;
use std::time::{Duration, Instant};
use tonic::Request;
use vpmu_proto::longrunning::{Operation, WaitOperationRequest, operation};

/// How long one `WaitOperation` call waits on the server: short enough for progress, long enough to cost nothing.
const TURN: Duration = Duration::from_millis(500);

impl Client {
    /// Waits until `operation` is done, at most `deadline`. `progress` sees every state on the way, the last included.
    ///
    /// # Errors
    /// The operation's own failure as [`ClientError::Refused`], or [`ClientError::Deadline`]; the operation itself goes
    /// on in that case.
    pub async fn wait_operation(
        &self,
        operation: Operation,
        deadline: Duration,
        mut progress: impl FnMut(&Operation),
    ) -> Result<Operation, ClientError> {
        let begin = Instant::now();
        let mut latest = operation;
        loop {
            progress(&latest);
            if latest.done {
                return match &latest.result {
                    Some(operation::Result::Error(status)) => Err(ClientError::from_operation(status)),
                    Some(operation::Result::Response(_)) => Ok(latest),
                    None => Err(ClientError::Protocol {
                        what: format!("{} is done with neither error nor response", latest.name),
                    }),
                };
            }
            let left = deadline.saturating_sub(begin.elapsed());
            if left.is_zero() {
                return Err(ClientError::Deadline { what: latest.name, waited: deadline });
            }
            let turn = TURN.min(left);
            let mut request = Request::new(WaitOperationRequest {
                name: latest.name.clone(),
                timeout: Some(prost_types::Duration {
                    seconds: 0,
                    nanos: i32::try_from(turn.subsec_nanos()).unwrap_or(i32::MAX),
                }),
            });
            request.set_timeout(turn + self.call_deadline());
            latest = self.call(&latest.name, self.raw_operations().wait_operation(request)).await?;
        }
    }

    /// Waits for an operation and decodes its response.
    pub async fn wait_for<M: prost::Message + Default>(
        &self,
        operation: Operation,
        deadline: Duration,
    ) -> Result<M, ClientError> {
        let done = self.wait_operation(operation, deadline, |_| {}).await?;
        response(&done)
    }
}

/// The response of an operation that succeeded.
pub fn response<M: prost::Message + Default>(operation: &Operation) -> Result<M, ClientError> {
    match &operation.result {
        Some(operation::Result::Response(any)) => unpack(any),
        Some(operation::Result::Error(status)) => Err(ClientError::from_operation(status)),
        None => Err(ClientError::Protocol { what: format!("{} has no response", operation.name) }),
    }
}

/// Decodes a `google.protobuf.Any` whose type the API fixes.
pub fn unpack<M: prost::Message + Default>(any: &prost_types::Any) -> Result<M, ClientError> {
    M::decode(any.value.as_slice())
        .map_err(|error| ClientError::Protocol { what: format!("{} does not decode: {error}", any.type_url) })
}
