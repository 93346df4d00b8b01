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
//! Group commit: what arrives while a commit is under way shares the next one. Where several wait already there are more
//! on their way, and those are waited for, up to twice as long as a commit takes: a commit costs the processors as much for one
//! as for ten. One that writes alone never waits.

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
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot};
use vpmu_proto::store::HostRecord;

/// Requests that share a commit at most.
const MAX_GROUP: usize = 512;
/// What is waited at most for others, where several wait already: each commit that is saved is processor time for those who
/// would wait for it.
const WINDOW: Duration = Duration::from_millis(1);
/// For each that waits beside the first, one part in so many of what the last commit took.
const WINDOW_PART: u32 = 3;
/// So many parts at most: a crowd that keeps every core busy loses less by waiting than each of its commits takes from it.
const MAX_PARTS: u32 = 2 * WINDOW_PART;
/// A sleep that is shorter would take longer than it says.
const LEAST_WINDOW: Duration = Duration::from_micros(50);

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
        // By the last commit.
        let mut took = Duration::ZERO;
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
            take_waiting(&mut requests, &mut group);
            if let Some(window) = window(group.len(), took) {
                std::thread::sleep(window);
                take_waiting(&mut requests, &mut group);
            }
            let begin = Instant::now();
            self.commit(group);
            took = begin.elapsed();
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

fn take_waiting(requests: &mut mpsc::Receiver<Request>, group: &mut Vec<Request>) {
    while group.len() < MAX_GROUP {
        match requests.try_recv() {
            Ok(request) => group.push(request),
            Err(_) => break,
        }
    }
}

/// How long those that wait already wait for others.
fn window(waiting: usize, commit: Duration) -> Option<Duration> {
    let parts = u32::try_from(waiting.saturating_sub(1)).unwrap_or(u32::MAX).min(MAX_PARTS);
    let window = (commit / WINDOW_PART).saturating_mul(parts).min(WINDOW);
    (window >= LEAST_WINDOW && waiting < MAX_GROUP).then_some(window)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_crowd_waits_and_no_longer_than_two_commits_take() {
        let us = Duration::from_micros;
        let cases = [
            (0, us(3_000), None),
            (1, us(3_000), None),
            (2, us(600), Some(us(200))),
            (4, us(600), Some(us(600))),
            (2, us(149), None),
            (2, us(150), Some(us(50))),
            (2, Duration::ZERO, None),
            (7, us(300), Some(us(600))),
            (9, us(300), Some(us(600))),
            (9, us(600), Some(us(1_000))),
            (9, us(6_000), Some(us(1_000))),
            (2, us(60_000_000), Some(us(1_000))),
            (MAX_GROUP - 1, Duration::MAX, Some(us(1_000))),
            (MAX_GROUP, Duration::MAX, None),
        ];
        for (waiting, commit, expected) in cases {
            assert_eq!(window(waiting, commit), expected, "{waiting} wait, {commit:?}");
        }
    }
}
