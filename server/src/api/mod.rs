//! The public services: they validate and translate, nothing else.

pub mod console;
pub mod details;
pub mod migrations;
pub mod operations;
pub mod peer;
pub mod pmu;
pub(crate) mod snapshots;
pub mod vms;

use std::pin::Pin;
use std::time::Duration;

use futures_util::Stream;
use prost::Message;
use prost_types::Any;
use tonic::Status;
use uuid::Uuid;
use vpmu_proto::longrunning::Operation;

use crate::daemon::Daemon;
use crate::ops::{Admission, Seed};
use crate::status::ApiError;

/// How long a call waits for its own operation, so that quick ones come back done.
pub(crate) const INLINE_WAIT: Duration = Duration::from_secs(2);

/// A server stream.
pub(crate) type BoxStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Runs an operation: known requests get their first answer; new ones are begun by `start`, which returns their id.
pub(crate) async fn operation<F>(
    daemon: &Daemon,
    method: &str,
    request_id: &str,
    request: &impl Message,
    metadata: Any,
    wait: Duration,
    start: impl FnOnce(Seed) -> F,
) -> Result<Operation, ApiError>
where
    F: Future<Output = Result<Uuid, ApiError>>,
{
    if daemon.shutdown.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    let request_id = crate::names::parse_request_id(request_id)?;
    let id = match daemon.ops.admit(method, request_id, request, metadata).await? {
        Admission::Existing(id) => id,
        Admission::New(seed) => start(seed).await?,
    };
    daemon.ops.wait(id, wait).await
}

/// One page of an ordered list: the items after `token`, and the token of the next page.
///
/// The token is the last key of the page before, so that it stays right while items come and go.
pub(crate) fn page<T>(
    items: Vec<T>,
    size: usize,
    token: &str,
    key: impl Fn(&T) -> String,
    found: impl Fn(&str, &str) -> bool,
) -> (Vec<T>, String) {
    let start = if token.is_empty() {
        0
    } else {
        items.iter().position(|i| found(&key(i), token)).unwrap_or(items.len())
    };
    let more = items.len() > start + size;
    let page: Vec<T> = items.into_iter().skip(start).take(size).collect();
    let next = if more { page.last().map(&key).unwrap_or_default() } else { String::new() };
    (page, next)
}
