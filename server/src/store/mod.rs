//! The embedded store of one host: machines, PMU states, migrations, operations, and the ownership journal.
//!
//! ```text
//!   DIR/lock      one vpmud a directory                DIR/journal/   ownership: the authority
//!   DIR/sled/     everything else, by the rules of `disk`
//!
//!   callers ──bounded queue──▶ writer thread ──durable──▶ view (in memory) ──▶ readers, without waiting
//! ```
//!
//! Invariants
//! - A write that returned `Ok` was flushed and fdatasynced; a read sees durable values only.
//! - `epoch` and `incarnation` of a machine's record come from the journal on every write and read. A stored epoch
//!   above the journal's therefore shows that the journal lost records: that machine is Uncertain.
//! - A record that does not check is skipped and listed by [`Store::damaged`], its bytes stay.
//! - After a failed write everything but reads fails with `STORE_READ_ONLY`, until the disk takes writes again ([`reopen`]).
//! - All histories are bounded.

mod batch;
mod books;
mod disk;
mod envelope;
mod error;
mod keys;
mod lock;
mod reads;
mod reopen;
mod view;
mod writer;

pub use batch::Batch;
pub use disk::Damaged;
pub use envelope::Problem;
pub(crate) use envelope::SCHEMA;
pub use error::StoreError;

use crate::journal::{Journal, JournalError, Recovery};
use books::{Books, Plan};
use disk::{Disk, LET_GO, Loaded};
use keys::Key;
use lock::DirLock;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, oneshot};
use view::View;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{
    HostRecord, MigrationRecord, OperationRecord, OwnershipRecord, PmuVcpuRecord, VmRecord,
};
use writer::{Request, Shared, Writer};

/// PMU states that are kept of each vCPU.
pub const PMU_HISTORY: usize = 8;
/// Migrations that are kept of each machine.
pub const MIGRATION_HISTORY: usize = 64;
/// Operations that are kept.
pub const OPERATION_HISTORY: usize = 4096;
/// Writes that wait at most.
const QUEUE: usize = 4096;
/// Wait for reads that are under way when the store is closed.
const CLOSE: Duration = Duration::from_secs(2);

/// The store. Clones share it; the last one to go closes it (blocking), [`Store::close`] does so without blocking.
#[derive(Debug, Clone)]
pub struct Store {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    dir: PathBuf,
    host: HostRecord,
    damaged: Vec<Damaged>,
    /// Machines whose stored epoch is above the journal's.
    lost: BTreeSet<String>,
    requests: Mutex<Option<mpsc::Sender<Request>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    shared: Arc<Shared>,
    journal: Journal,
    /// Kept beside the writer's, so that the journal too is closed before the lock goes.
    lock: Mutex<Option<Arc<DirLock>>>,
}

/// Whether the store takes writes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Serving,
    /// A write failed; only reads go on, until the disk takes writes again.
    ReadOnly {
        /// The failure.
        cause: String,
    },
}

/// Counts since open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreStats {
    /// Durable commits; each has one flush and one fdatasync of each of sled's files.
    pub commits: u64,
    /// Writes that these commits made durable.
    pub writes: u64,
    /// fdatasync calls on sled's files.
    pub fdatasyncs: u64,
    /// fdatasync calls of the ownership journal.
    pub journal_fdatasyncs: u64,
}

/// A write that is on its way.
#[derive(Debug)]
#[must_use = "wait for it, or drop it where its failure is of no interest"]
pub struct Queued(oneshot::Receiver<Result<(), StoreError>>);

impl Queued {
    /// Waits until it is durable.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`], [`StoreError::OperationsFull`], [`StoreError::Io`].
    pub async fn durable(self) -> Result<(), StoreError> {
        self.0.await.map_err(|_| StoreError::ReadOnly { cause: "the writer's thread ended".to_owned() })?
    }
}

impl Store {
    /// Opens or makes the store in a directory and takes the next term. Blocking; waits up to 5 s for one that was closed a
    /// moment ago.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another process holds the directory, [`StoreError::Corrupt`] if sled cannot open or
    /// the host's own record is damaged, [`StoreError::Io`], [`StoreError::Journal`].
    pub fn open(dir: &Path) -> Result<Self, StoreError> {
        let lock = Arc::new(DirLock::acquire(dir)?);
        let journal = Journal::open(&dir.join("journal"))?;
        let disk = Disk::open(&dir.join("sled"), LET_GO)?;
        let mut loaded = disk.load()?;
        let mut damaged = std::mem::take(&mut loaded.damaged);
        let host = next_host(&loaded, &damaged, dir)?;
        let mut view = View::load(&loaded, &mut damaged);
        for found in &damaged {
            tracing::error!(key = found.key, problem = %found.problem, "damaged record skipped");
        }
        let parts = loaded.records.iter().map(|(key, (_, parts))| (key.clone(), *parts));
        let mut books = Books::new(&view, parts);
        let mut plan = Plan::default();
        books.write(Key::Host, &host, &mut plan);
        let lost = adopt_ownership(&mut view, &journal, &mut books, &mut plan);
        disk.commit(plan.batch)?;

        let shared = Arc::new(Shared::default());
        *shared.view.write().unwrap_or_else(PoisonError::into_inner) = view;
        *shared.reader.write().unwrap_or_else(PoisonError::into_inner) = Some(disk.reader());
        let clock = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .build()
            .map_err(|e| StoreError::io("cannot make a timer for", dir, &e))?;
        let writer = Writer {
            disk: Some(disk),
            dir: dir.to_owned(),
            host: host.clone(),
            damaged: damaged.len(),
            retry: None,
            clock,
            books,
            shared: Arc::clone(&shared),
            ownership: journal.index().clone(),
            _lock: Arc::clone(&lock),
        };
        let (sender, receiver) = mpsc::channel(QUEUE);
        let thread = std::thread::Builder::new()
            .name("vpmu-store".to_owned())
            .spawn(move || writer.run(receiver))
            .map_err(|e| StoreError::io("cannot start a thread for", dir, &e))?;
        Ok(Self {
            inner: Arc::new(Inner {
                dir: dir.to_owned(),
                host,
                damaged,
                lost,
                requests: Mutex::new(Some(sender)),
                writer: Mutex::new(Some(thread)),
                shared,
                journal,
                lock: Mutex::new(Some(lock)),
            }),
        })
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.inner.dir
    }

    /// Identity of this store, a UUID made once.
    pub fn store_id(&self) -> &str {
        &self.inner.host.store_id
    }

    /// Number of this start of a daemon on the store, from 1; durable before `open` returned.
    pub fn term(&self) -> u64 {
        self.inner.host.term
    }

    /// Records that were skipped at open.
    pub fn damaged(&self) -> Vec<Damaged> {
        self.inner.damaged.clone()
    }

    /// Whether it takes writes; for the health service.
    pub fn health(&self) -> Health {
        self.inner.shared.failed().map_or(Health::Serving, |cause| Health::ReadOnly { cause })
    }

    /// How often it has become writable again since open; what was refused meanwhile is to be written by its owner.
    pub fn recoveries(&self) -> u64 {
        self.inner.shared.recoveries.load(Ordering::Acquire)
    }

    /// Counts since open.
    pub fn stats(&self) -> StoreStats {
        let shared = &self.inner.shared;
        StoreStats {
            commits: shared.commits.load(Ordering::Relaxed),
            writes: shared.requests.load(Ordering::Relaxed),
            fdatasyncs: shared.fdatasyncs.load(Ordering::Relaxed),
            journal_fdatasyncs: self.inner.journal.syncs(),
        }
    }

    /// Makes a batch durable, all or nothing. Dropping the future does not take it back.
    ///
    /// # Errors
    /// [`StoreError::ReadOnly`], [`StoreError::OperationsFull`], [`StoreError::Closed`], [`StoreError::Io`].
    pub async fn commit(&self, batch: Batch) -> Result<(), StoreError> {
        if batch.ops.is_empty() {
            return Ok(());
        }
        self.enqueue(batch).await?.durable().await
    }

    /// Puts a batch into the queue. It becomes durable in its turn, whether or not that is waited for.
    ///
    /// # Errors
    /// [`StoreError::Closed`]; the others come from [`Queued::durable`].
    pub async fn enqueue(&self, batch: Batch) -> Result<Queued, StoreError> {
        let sender = self.inner.requests.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let sender = sender.ok_or(StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        sender.send(Request { ops: batch.ops, reply }).await.map_err(|_| StoreError::Closed)?;
        Ok(Queued(answer))
    }

    /// [`Batch::put_vm`] by itself.
    ///
    /// # Errors
    /// Those of [`Batch::put_vm`] and [`Store::commit`].
    pub async fn put_vm(&self, record: VmRecord) -> Result<(), StoreError> {
        self.commit(Batch::new().put_vm(record)?).await
    }

    /// [`Batch::delete_vm`] by itself.
    ///
    /// # Errors
    /// Those of [`Batch::delete_vm`] and [`Store::commit`].
    pub async fn delete_vm(&self, uid: &str) -> Result<(), StoreError> {
        self.commit(Batch::new().delete_vm(uid)?).await
    }

    /// [`Batch::put_pmu`] of every vCPU in one durable write.
    ///
    /// # Errors
    /// Those of [`Batch::put_pmu`] and [`Store::commit`].
    pub async fn put_pmu(&self, records: &[PmuVcpuRecord]) -> Result<(), StoreError> {
        let batch = records.iter().try_fold(Batch::new(), Batch::put_pmu)?;
        self.commit(batch).await
    }

    /// [`Batch::put_migration`] by itself.
    ///
    /// # Errors
    /// Those of [`Batch::put_migration`] and [`Store::commit`].
    pub async fn put_migration(&self, record: &MigrationRecord) -> Result<(), StoreError> {
        self.commit(Batch::new().put_migration(record)?).await
    }

    /// [`Batch::put_operation`] by itself.
    ///
    /// # Errors
    /// Those of [`Batch::put_operation`] and [`Store::commit`].
    pub async fn put_operation(&self, record: &OperationRecord) -> Result<(), StoreError> {
        self.commit(Batch::new().put_operation(record)?).await
    }

    /// [`Batch::delete_operation`] by itself.
    ///
    /// # Errors
    /// Those of [`Batch::delete_operation`] and [`Store::commit`].
    pub async fn delete_operation(&self, name: &str) -> Result<(), StoreError> {
        self.commit(Batch::new().delete_operation(name)?).await
    }

    /// Makes an ownership record durable in the journal and returns it with its lsn. Appending the record that already
    /// holds succeeds without a write.
    ///
    /// # Errors
    /// [`StoreError::Journal`]: see [`Journal::append`]. After `DECISION_IN_DOUBT` append the same record again.
    pub async fn append_ownership(&self, record: OwnershipRecord) -> Result<OwnershipRecord, StoreError> {
        if let Some(held) = self.lost_record(&record.vm_uid) {
            crate::handover::phase::may_follow(Some(&held), &record).map_err(JournalError::from)?;
        }
        Ok(self.inner.journal.append(record).await?)
    }

    /// The ownership record that holds for a machine. Its phase is UNCERTAIN if a later one may have been lost.
    pub fn ownership(&self, uid: &str) -> Option<OwnershipRecord> {
        self.lost_record(uid).or_else(|| self.inner.journal.index().latest(uid))
    }

    /// The ownership records of all machines that have one, by uid.
    pub fn ownerships(&self) -> Vec<OwnershipRecord> {
        let mut uids: BTreeSet<_> = self.inner.journal.index().all().into_iter().map(|r| r.vm_uid).collect();
        uids.extend(self.inner.lost.iter().cloned());
        uids.iter().filter_map(|uid| self.ownership(uid)).collect()
    }

    /// What the journal was like at open.
    pub fn journal_recovery(&self) -> &Recovery {
        self.inner.journal.recovery()
    }

    /// A machine whose stored epoch shows that the journal lost records, unless it has been settled by force since.
    fn lost_record(&self, uid: &str) -> Option<OwnershipRecord> {
        let cached =
            self.inner.lost.contains(uid).then(|| reads::cached_epoch(&self.inner.shared, uid))??;
        let held = self.inner.journal.index().latest(uid);
        if held.as_ref().is_some_and(|h| h.epoch >= cached) {
            return None;
        }
        let held = held.unwrap_or_else(|| OwnershipRecord { vm_uid: uid.to_owned(), ..Default::default() });
        Some(OwnershipRecord { epoch: cached, phase: Phase::Uncertain.into(), ..held })
    }

    /// Lets what waits finish, closes everything and gives the directory free. Waits up to 2 s for reads that are under
    /// way; after longer ones whoever opens it next waits for them.
    pub async fn close(&self) {
        let inner = Arc::clone(&self.inner);
        let _ = tokio::task::spawn_blocking(move || inner.close()).await;
    }
}

impl Inner {
    fn close(&self) {
        drop(self.requests.lock().unwrap_or_else(PoisonError::into_inner).take());
        drop(self.shared.reader.write().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(writer) = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = writer.join();
            if let Err(error) = disk::let_go(&self.dir.join("sled"), CLOSE) {
                tracing::warn!(%error, "the store is closed and something of it is still read");
            }
        }
        self.journal.close();
        drop(self.lock.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.close();
    }
}

/// The host's record with the next term.
fn next_host(loaded: &Loaded, damaged: &[Damaged], dir: &Path) -> Result<HostRecord, StoreError> {
    let corrupt = |message: String| StoreError::Corrupt { path: dir.to_owned(), message };
    if let Some(found) = damaged.iter().find(|d| d.key == "host") {
        return Err(corrupt(format!("the record \"host\": {}", found.problem)));
    }
    if let Some((bytes, _)) = loaded.records.get(&Key::Host) {
        let mut host: HostRecord =
            view::decode(bytes).map_err(|p| corrupt(format!("the record \"host\": {p}")))?;
        host.term = host.term.checked_add(1).ok_or_else(|| corrupt("the term is at its end".to_owned()))?;
        return Ok(host);
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Ok(HostRecord {
        store_id: uuid::Uuid::new_v4().to_string(),
        term: 1,
        create_time: Some(prost_types::Timestamp {
            seconds: i64::try_from(now.as_secs()).unwrap_or(i64::MAX),
            nanos: i32::try_from(now.subsec_nanos()).unwrap_or(0),
        }),
    })
}

/// Rewrites the cached ownership fields from the journal. Returns machines whose cache is ahead of it.
fn adopt_ownership(
    view: &mut View,
    journal: &Journal,
    books: &mut Books,
    plan: &mut Plan,
) -> BTreeSet<String> {
    let mut lost = BTreeSet::new();
    for (uid, record) in &mut view.vms {
        let Some(vm) = &mut record.vm else { continue };
        let held = journal.index().latest(uid).map_or((0, 0), |r| (r.epoch, r.incarnation));
        if vm.epoch > held.0 {
            tracing::error!(
                vm = uid,
                stored = vm.epoch,
                journal = held.0,
                "the ownership journal lost records"
            );
            lost.insert(uid.clone());
        } else if (vm.epoch, vm.incarnation) != held {
            (vm.epoch, vm.incarnation) = held;
            books.write(Key::Vm(uid.clone()), record, plan);
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{FlockOperation, flock};

    #[tokio::test]
    async fn a_store_that_is_closed_holds_nothing_even_if_somebody_was_reading() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path()).expect("open");
        let reader = store.inner.shared.reader.read().unwrap().clone();
        let reading = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(reader);
        });
        store.close().await;
        let log = std::fs::File::open(dir.path().join("sled/db")).unwrap();
        flock(&log, FlockOperation::NonBlockingLockExclusive).expect("free");
        reading.join().unwrap();
    }
}
