//! The one thread that writes.
//!
//! ```text
//!   requests ──▶ take one, then all that wait ──▶ one sled batch ──▶ flush ──▶ fdatasync ──▶ view ──▶ answers
//!                                                      │ any failure
//!                                                      ▼
//!                              read-only ──▶ wait ──▶ room? ──▶ open sled anew ──▶ a write is durable ──▶ as before
//!                                              ▲        │no          │no                  │no
//!                                              └────────┴────────────┴────────────────────┘ waits double
//! ```
//!
//! Group commit without a timer: what arrives while a commit is under way shares the next one.

use super::batch::Op;
use super::books::{Books, Plan};
use super::disk::Disk;
use super::disk::Reader;
use super::error::StoreError;
use super::lock::DirLock;
use super::reopen::Retry;
use super::view::View;
use crate::journal::Index;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Instant;
use tokio::sync::{mpsc, oneshot};
use vpmu_proto::store::HostRecord;

/// Requests that share a commit at most.
const MAX_GROUP: usize = 512;

pub(crate) struct Request {
    pub(crate) ops: Vec<Op>,
    pub(crate) reply: oneshot::Sender<Result<(), StoreError>>,
}

/// What the writer and its callers share.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) view: RwLock<View>,
    pub(crate) failure: RwLock<Option<String>>,
    /// None while the database is not open: see [`super::reopen`].
    pub(crate) reader: RwLock<Option<Reader>>,
    /// Times that writes became possible again.
    pub(crate) recoveries: AtomicU64,
    pub(crate) commits: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) fdatasyncs: AtomicU64,
}

impl Shared {
    pub(crate) fn failed(&self) -> Option<String> {
        self.failure.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn fail(&self, cause: &StoreError) {
        tracing::error!(%cause, "the store is read-only until the disk takes writes again");
        let mut failure = self.failure.write().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert_with(|| cause.to_string());
    }
}

pub(crate) struct Writer {
    /// None while it could not be opened anew.
    pub(crate) disk: Option<Disk>,
    /// The state directory.
    pub(crate) dir: PathBuf,
    pub(crate) host: HostRecord,
    /// Records that were damaged at open.
    pub(crate) damaged: usize,
    pub(crate) retry: Option<Retry>,
    /// For waits with an end.
    pub(crate) clock: tokio::runtime::Runtime,
    pub(crate) books: Books,
    pub(crate) shared: Arc<Shared>,
    pub(crate) ownership: Index,
    /// Released when the writer has ended, so that the next store finds everything on disk.
    pub(crate) _lock: Arc<DirLock>,
}

impl Writer {
    /// Runs until every sender is gone.
    pub(crate) fn run(mut self, mut requests: mpsc::Receiver<Request>) {
        loop {
            let first = match &mut self.retry {
                None => requests.blocking_recv(),
                Some(retry) if Instant::now() >= retry.next() => {
                    retry.later();
                    self.try_again();
                    continue;
                }
                Some(retry) => {
                    let next = retry.next().into();
                    match self.clock.block_on(async { tokio::time::timeout_at(next, requests.recv()).await })
                    {
                        Ok(first) => first,
                        Err(_due) => continue,
                    }
                }
            };
            let Some(first) = first else { return };
            let mut group = vec![first];
            while group.len() < MAX_GROUP {
                match requests.try_recv() {
                    Ok(request) => group.push(request),
                    Err(_) => break,
                }
            }
            self.commit(group);
        }
    }

    fn commit(&mut self, group: Vec<Request>) {
        if let Some(cause) = self.shared.failed() {
            for request in group {
                let _ = request.reply.send(Err(StoreError::ReadOnly { cause: cause.clone() }));
            }
            return;
        }
        let mut plan = Plan::default();
        let mut waiting = Vec::with_capacity(group.len());
        let ownership = |uid: &str| self.ownership.latest(uid).map(|r| (r.epoch, r.incarnation));
        for request in group {
            match self.books.admit(&request.ops) {
                Ok(()) => {
                    for op in request.ops {
                        self.books.plan(op, &ownership, &mut plan);
                    }
                    waiting.push(request.reply);
                }
                Err(refused) => drop(request.reply.send(Err(refused))),
            }
        }
        if waiting.is_empty() {
            return;
        }
        let Some(disk) = &self.disk else { return };
        let result = disk.commit(plan.batch);
        match &result {
            Ok(synced) => {
                self.shared.commits.fetch_add(1, Ordering::Relaxed);
                self.shared.requests.fetch_add(waiting.len() as u64, Ordering::Relaxed);
                self.shared.fdatasyncs.fetch_add(*synced, Ordering::Relaxed);
                let mut view = self.shared.view.write().unwrap_or_else(PoisonError::into_inner);
                for change in plan.changes {
                    view.apply(change);
                }
            }
            Err(cause) => {
                self.shared.fail(cause);
                self.retry = Some(Retry::default());
            }
        }
        for reply in waiting {
            let _ = reply.send(result.as_ref().map(|_| ()).map_err(Clone::clone));
        }
    }
}
