//! The ownership journal: the authority on who may run a machine (handover.md section 1).
//!
//! Append-only, fdatasynced, beside sled and independent of it. One thread writes; records that wait at the same moment
//! share one fdatasync. `append` returns when the record is durable, or says that it is refused, or that it is *in
//! doubt*: then append the same record again until it succeeds, and let nothing follow from it before.
//!
//! Files: [`files`] the file interface, `frame` one record on disk, `recover` what a crash left, `log` the files'
//! rules, `index` the records that hold.

mod error;
mod files;
mod frame;
mod index;
mod log;
mod recover;

#[cfg(test)]
mod crash;
#[cfg(test)]
mod tests;

pub use error::JournalError;
pub use index::Index;
pub use recover::Recovery;

use files::{Dir, RealDir};
use log::{Log, Options};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use tokio::sync::{mpsc, oneshot};
use vpmu_proto::store::OwnershipRecord;

/// Appends that share a sync at most.
const MAX_GROUP: usize = 128;
/// Appends that wait at most.
const QUEUE: usize = 1024;

struct Request {
    record: OwnershipRecord,
    reply: oneshot::Sender<Result<OwnershipRecord, JournalError>>,
}

/// The journal's thread and what readers need.
#[derive(Debug)]
pub struct Journal {
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    index: Index,
    recovery: Recovery,
    syncs: Arc<AtomicU64>,
}

impl Journal {
    /// Opens or makes the journal in a directory. Blocking.
    ///
    /// # Errors
    /// [`JournalError::Open`] if a file cannot be read or made durable. Damage is no error: see [`Journal::recovery`].
    pub fn open(dir: &Path) -> Result<Self, JournalError> {
        RealDir::open(dir)
            .and_then(|files| Log::open(files, Options::default()))
            .and_then(Self::start)
            .map_err(|e| JournalError::Open { path: dir.to_owned(), message: e.to_string() })
    }

    fn start<D: Dir>(log: Log<D>) -> std::io::Result<Self>
    where
        D::File: 'static,
    {
        let (index, recovery) = (log.index().clone(), log.recovery().clone());
        let syncs = Arc::new(AtomicU64::new(0));
        let (sender, receiver) = mpsc::channel(QUEUE);
        let counter = Arc::clone(&syncs);
        let thread = std::thread::Builder::new()
            .name("vpmu-journal".to_owned())
            .spawn(move || run(log, receiver, &counter))?;
        Ok(Self {
            requests: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            index,
            recovery,
            syncs,
        })
    }

    /// Makes a record durable and returns it with its lsn. Dropping the future does not take the record back.
    ///
    /// # Errors
    /// [`JournalError::Refused`] if it may not follow the record that holds, [`JournalError::InDoubt`] if it is not
    /// known to be durable, [`JournalError::NoSpace`], [`JournalError::BadField`], [`JournalError::Closed`].
    pub async fn append(&self, record: OwnershipRecord) -> Result<OwnershipRecord, JournalError> {
        let sender = self.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sender = sender.ok_or(JournalError::Closed)?;
        let vm_uid = record.vm_uid.clone();
        let (reply, answer) = oneshot::channel();
        sender.send(Request { record, reply }).await.map_err(|_| JournalError::Closed)?;
        drop(sender);
        let lost = |_| JournalError::InDoubt { vm_uid, cause: "the journal's thread ended".to_owned() };
        answer.await.map_err(lost)?
    }

    /// The records that hold.
    pub fn index(&self) -> &Index {
        &self.index
    }

    /// What was found at open.
    pub fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// fdatasync calls for appended records so far; with many callers at once fewer than appends.
    pub fn syncs(&self) -> u64 {
        self.syncs.load(Ordering::Relaxed)
    }

    /// Lets what waits finish and ends the thread. Blocking.
    pub fn close(&self) {
        drop(self.requests.lock().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = thread.join();
        }
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.close();
    }
}

fn run<D: Dir>(mut log: Log<D>, mut requests: mpsc::Receiver<Request>, syncs: &AtomicU64) {
    while let Some(first) = requests.blocking_recv() {
        let mut group = vec![first];
        while group.len() < MAX_GROUP {
            match requests.try_recv() {
                Ok(request) => group.push(request),
                Err(_) => break,
            }
        }
        let (records, replies): (Vec<_>, Vec<_>) = group.into_iter().map(|r| (r.record, r.reply)).unzip();
        let answers = log.append(records);
        syncs.store(log.syncs(), Ordering::Relaxed);
        for (reply, answer) in replies.into_iter().zip(answers) {
            let _ = reply.send(answer);
        }
        if let Err(error) = log.maintain() {
            tracing::warn!(%error, "journal maintenance failed; tried again after the next record");
        }
    }
}
