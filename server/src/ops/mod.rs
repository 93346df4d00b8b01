//! Long-running operations (AIP-151): durable records, request-id idempotency (AIP-155), waiting.
//!
//! ```text
//! admit(request id) -> Seed --begin() durable--> Running --finish() durable--> done
//!                 \-> the operation that the same request id made before
//! ```
//! Invariants: an operation is durable before its work begins and its result is durable before anybody sees it done;
//! one request id makes at most one operation; a refusal before `begin` leaves no operation behind.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message;
use prost_types::Any;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vpmu_proto::longrunning::{Operation, operation};
use vpmu_proto::store::OperationRecord;

use crate::status::ApiError;
use crate::store::{Batch, Store, StoreError};

/// Operations of this daemon.
pub struct Ops {
    store: Store,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    /// Unfinished operations.
    running: HashMap<Uuid, watch::Receiver<Operation>>,
    /// Those of them that stop when they are asked to.
    cancellable: HashMap<Uuid, CancellationToken>,
    /// Request ids between `admit` and `begin` or refusal; closed when that is decided.
    pending: HashMap<Uuid, watch::Receiver<()>>,
    /// What could not be stored and is to be, oldest first; with the operation that is shown from memory until then.
    unsaved: VecDeque<(Option<Uuid>, Batch)>,
}

/// Answer of [`Ops::admit`].
pub enum Admission {
    /// Nothing is known of this request.
    New(Seed),
    /// The same request made this operation.
    Existing(Uuid),
}

/// The right to begin one operation.
pub struct Seed {
    ops: Arc<Ops>,
    request_id: Option<Uuid>,
    digest: Vec<u8>,
    metadata: Any,
    _decided: watch::Sender<()>,
}

/// An operation that is under way.
pub struct Running {
    ops: Arc<Ops>,
    record: OperationRecord,
    id: Uuid,
    view: watch::Sender<Operation>,
    finished: bool,
}

impl Ops {
    /// Over the store; operations that an earlier daemon left unfinished end as aborted.
    pub async fn open(store: Store) -> Result<Arc<Self>, ApiError> {
        let ops = Arc::new(Self { store, live: Mutex::default() });
        for mut record in ops.store.list_operations() {
            let Some(operation) = record.operation.as_mut().filter(|o| !o.done) else { continue };
            operation.done = true;
            let error = ApiError::aborted(
                "HOST_RESTARTED",
                &operation.name,
                "vpmud ended before this operation did; look at the resource's state and ask again if it is still wanted",
            );
            operation.result = Some(operation::Result::Error(error.to_rpc()));
            ops.store.put_operation(&record).await?;
        }
        Ok(ops)
    }

    /// Judges a request: new, or known by its request id.
    pub async fn admit(
        self: &Arc<Self>,
        method: &str,
        request_id: Option<Uuid>,
        request: &impl Message,
        metadata: Any,
    ) -> Result<Admission, ApiError> {
        let mut hasher = Sha256::new();
        hasher.update(method.as_bytes());
        hasher.update([0]);
        hasher.update(request.encode_to_vec());
        let digest = hasher.finalize().to_vec();
        let (decided, receiver) = watch::channel(());
        if let Some(id) = request_id {
            loop {
                let mut pending = {
                    let mut live = self.live();
                    if let Some(receiver) = live.pending.get(&id) {
                        receiver.clone()
                    } else {
                        if let Some(known) = self.store.operation_by_request(&id.to_string()) {
                            return existing(&known, &digest, id);
                        }
                        live.pending.insert(id, receiver);
                        break;
                    }
                };
                // Ends with an error when the first request is decided, which is what we wait for.
                let _ = pending.changed().await;
            }
        }
        Ok(Admission::New(Seed { ops: Arc::clone(self), request_id, digest, metadata, _decided: decided }))
    }

    /// Latest state of an operation.
    pub fn get(&self, id: Uuid) -> Result<Operation, ApiError> {
        if let Some(view) = self.live().running.get(&id) {
            return Ok(view.borrow().clone());
        }
        self.store.get_operation(&id.to_string()).and_then(|record| record.operation).ok_or_else(|| {
            ApiError::not_found("Operation", &format!("operations/{id}"), "list the operations")
        })
    }

    /// All operations, newest first.
    pub fn list(&self) -> Vec<Operation> {
        let mut records = self.store.list_operations();
        records.sort_by_key(|r| {
            let time = r.create_time.unwrap_or_default();
            (std::cmp::Reverse((time.seconds, time.nanos)), r.operation.as_ref().map(|o| o.name.clone()))
        });
        let live = self.live();
        records
            .into_iter()
            .filter_map(|r| r.operation)
            .map(|o| {
                let id = o.name.strip_prefix("operations/").and_then(|id| Uuid::try_parse(id).ok());
                id.and_then(|id| live.running.get(&id)).map_or(o, |view| view.borrow().clone())
            })
            .collect()
    }

    /// Waits until it is done or `timeout` has passed.
    pub async fn wait(&self, id: Uuid, timeout: Duration) -> Result<Operation, ApiError> {
        let view = self.live().running.get(&id).cloned();
        if let Some(mut view) = view {
            let _ = tokio::time::timeout(timeout, view.wait_for(|o| o.done)).await;
        }
        self.get(id)
    }

    /// Asks an operation to stop; false if it is none that does.
    pub fn cancel(&self, id: Uuid) -> bool {
        let token = self.live().cancellable.get(&id).cloned();
        token.inspect(CancellationToken::cancel).is_some()
    }

    /// Removes a finished operation's record.
    pub async fn delete(&self, id: Uuid) -> Result<(), ApiError> {
        if !self.get(id)?.done {
            let name = format!("operations/{id}");
            return Err(ApiError::precondition(
                "OPERATION_RUNNING",
                &name,
                format!("{name} is not done; wait for it or cancel it first"),
            ));
        }
        Ok(self.store.delete_operation(&id.to_string()).await?)
    }

    /// Remembers, within a bound, what is to be stored once the store takes writes again.
    pub fn keep(&self, id: Option<Uuid>, batch: Batch) {
        let mut live = self.live();
        if live.unsaved.len() >= crate::store::OPERATION_HISTORY
            && let Some((Some(oldest), _)) = live.unsaved.pop_front()
        {
            live.running.remove(&oldest);
        }
        live.unsaved.push_back((id, batch));
    }

    /// Stores what could not be; what fails again is kept for the next time.
    pub async fn store_again(&self) {
        loop {
            let Some((id, batch)) = self.live().unsaved.pop_front() else { return };
            if let Err(error) = self.store.commit(batch.clone()).await {
                tracing::error!(%error, "what had ended meanwhile could not be stored again");
                if is_failing(&error) {
                    self.live().unsaved.push_front((id, batch));
                    return;
                }
            }
            if let Some(id) = id {
                self.forget(id);
            }
        }
    }

    fn forget(&self, id: Uuid) {
        let mut live = self.live();
        live.running.remove(&id);
        live.cancellable.remove(&id);
    }

    fn live(&self) -> std::sync::MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the disk, not the record, is the reason.
pub fn is_failing(error: &StoreError) -> bool {
    matches!(error, StoreError::ReadOnly { .. } | StoreError::Io { .. })
}

fn existing(known: &OperationRecord, digest: &[u8], request_id: Uuid) -> Result<Admission, ApiError> {
    if known.request_digest != digest {
        return Err(ApiError::invalid(
            "request_id",
            request_id,
            "REQUEST_ID_REUSED",
            "was used for another request",
            "send a fresh random UUID with every new request",
        ));
    }
    let name = known.operation.as_ref().map_or("", |o| o.name.as_str());
    crate::names::parse_operation("name", name).map(Admission::Existing)
}

impl Seed {
    /// With other metadata than it was admitted with.
    #[must_use]
    pub fn with_metadata(mut self, metadata: Any) -> Self {
        self.metadata = metadata;
        self
    }

    /// Makes the operation durable.
    pub async fn begin(self) -> Result<Running, ApiError> {
        self.begin_with(Batch::new()).await
    }

    /// Makes the operation durable, and with it, or not at all, what else belongs to its beginning.
    pub async fn begin_with(self, batch: Batch) -> Result<Running, ApiError> {
        let id = Uuid::new_v4();
        let operation = Operation {
            name: format!("operations/{id}"),
            metadata: Some(self.metadata.clone()),
            done: false,
            result: None,
        };
        let record = OperationRecord {
            operation: Some(operation.clone()),
            request_id: self.request_id.map(|id| id.to_string()).unwrap_or_default(),
            request_digest: self.digest.clone(),
            create_time: Some(now()),
        };
        self.ops.store.commit(batch.put_operation(&record)?).await?;
        let (view, receiver) = watch::channel(operation);
        self.ops.live().running.insert(id, receiver);
        Ok(Running { ops: Arc::clone(&self.ops), record, id, view, finished: false })
    }
}

impl Drop for Seed {
    fn drop(&mut self) {
        if let Some(id) = self.request_id {
            self.ops.live().pending.remove(&id);
        }
    }
}

impl Running {
    /// Its id.
    pub fn id(&self) -> Uuid {
        self.id
    }

    /// Lets it be cancelled: the token says when somebody asked for that.
    pub fn cancellable(&self) -> CancellationToken {
        self.ops.live().cancellable.entry(self.id).or_default().clone()
    }

    /// Shows progress; not durable.
    pub fn progress(&self, metadata: Any) {
        self.view.send_modify(|o| o.metadata = Some(metadata));
    }

    /// Ends it, durably.
    pub async fn finish(self, result: Result<Any, ApiError>) {
        // Its own record's failure is logged there, and there is no other.
        let _ = self.finish_with(Batch::new(), result).await;
    }

    /// Ends it in one durable write with other records; says whether that could be done. It is seen to be done in any case.
    pub async fn finish_with(
        mut self,
        batch: Batch,
        result: Result<Any, ApiError>,
    ) -> Result<(), StoreError> {
        let stored = match self.record_end(batch, result) {
            Ok(batch) => self.ops.store.commit(batch).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &stored {
            let name = self.view.borrow().name.clone();
            tracing::error!(operation = %name, %error, "the end of an operation could not be made durable");
            if is_failing(error)
                && let Ok(batch) = Batch::new().put_operation(&self.record)
            {
                // Shown from memory until it is stored.
                self.finished = true;
                if let Some(operation) = self.record.operation.clone() {
                    self.view.send_replace(operation);
                }
                self.ops.keep(Some(self.id), batch);
                return stored;
            }
        }
        self.show_end();
        stored
    }

    /// Adds its end to a batch. Nobody sees it before [`Self::show_end`].
    ///
    /// # Errors
    /// Those of [`Batch::put_operation`].
    pub fn record_end(&mut self, batch: Batch, result: Result<Any, ApiError>) -> Result<Batch, StoreError> {
        let mut operation = self.view.borrow().clone();
        operation.done = true;
        operation.result = Some(match result {
            Ok(response) => operation::Result::Response(response),
            Err(error) => operation::Result::Error(error.to_rpc()),
        });
        self.record.operation = Some(operation);
        batch.put_operation(&self.record)
    }

    /// Lets everybody see the end that was recorded.
    pub fn show_end(mut self) {
        self.finished = true;
        if let Some(operation) = self.record.operation.clone() {
            self.view.send_replace(operation);
        }
        self.ops.forget(self.id);
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // The task that did the work was dropped: the daemon is ending.
        self.view.send_modify(|o| {
            o.done = true;
            o.result = Some(operation::Result::Error(ApiError::shutting_down().to_rpc()));
        });
        self.ops.forget(self.id);
    }
}

/// Packs a message of package vpmu.v1 for an operation.
pub fn pack(type_name: &str, message: &impl Message) -> Any {
    Any { type_url: format!("type.googleapis.com/vpmu.v1.{type_name}"), value: message.encode_to_vec() }
}

/// `google.protobuf.Empty` for an operation.
pub fn pack_empty() -> Any {
    Any { type_url: "type.googleapis.com/google.protobuf.Empty".to_owned(), value: Vec::new() }
}

/// The time now.
pub fn now() -> prost_types::Timestamp {
    std::time::SystemTime::now().into()
}
