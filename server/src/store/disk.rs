//! sled, used by the rules that its known defects ask for.
//!
//! - 0.34.7 pinned, cache 32 MiB, no background flush (its failures are only logged).
//! - Durable means `flush()` returned and then every file of sled was fdatasynced: flush alone leaves data to
//!   `sync_file_range`, which promises nothing. Its log, `db`, is synced every time; a file that nobody has written for a
//!   while (its configuration, old snapshots and blobs) once, because each call costs the device a flush.
//! - sled may panic on a file it does not understand; a panic here is a typed error.
//! - A write is done when `flush()` returns, but sled's pool may hold the log, and its lock, for a moment after the last handle
//!   went: who opens and who closes waits for that ([`let_go`]). `DIR/lock` is what keeps other daemons out.

use super::envelope::{self, Problem};
use super::error::StoreError;
use super::keys::{Key, PART, printable, split_part};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Metadata, OpenOptions};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

const CACHE_BYTES: u64 = 32 << 20;

/// A record that was skipped at open. Its bytes are still there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damaged {
    /// Its key.
    pub key: String,
    /// What is wrong with it.
    pub problem: Problem,
}

/// Records as found, with the number of parts each has, and what could not be read.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) records: BTreeMap<Key, (Vec<u8>, u16)>,
    pub(crate) damaged: Vec<Damaged>,
}

/// Times of a file that are this old when it is looked at tell whether it is written afterwards: no clock of a file system
/// is coarser.
const SETTLED: Duration = Duration::from_secs(2);
/// The same where times have fractions of a second: the kernel takes those from a clock that ticks 100 times a second or more
/// often, and the coarsest of such file systems (exFAT) keeps hundredths.
const SETTLED_FINE: Duration = Duration::from_millis(50);
/// What sled's pool has at most to finish with a database after its last handle went.
pub(crate) const LET_GO: Duration = Duration::from_secs(5);
/// The file that every commit writes.
const LOG: &str = "db";

/// What tells a file from the same one written since: inode, length, modification and change time.
type Stamp = (u64, u64, (i64, i64), (i64, i64));

/// The database and the files it consists of.
#[derive(Debug)]
pub(crate) struct Disk {
    db: sled::Db,
    path: PathBuf,
    /// Files that were synced as they still are.
    synced: Mutex<HashMap<PathBuf, Stamp>>,
}

/// Runs code of sled; a panic becomes its message.
fn guarded<T>(run: impl FnOnce() -> sled::Result<T>) -> Result<T, String> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(|e| e.to_string()),
        Err(panic) => Err(panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "sled panicked".to_owned())),
    }
}

impl Disk {
    /// Waits for one that was closed a moment ago, `patience` at most.
    pub(crate) fn open(path: &Path, patience: Duration) -> Result<Self, StoreError> {
        let_go(path, patience)?;
        let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let db = guarded(|| config.open())
            .map_err(|message| StoreError::Corrupt { path: path.to_owned(), message })?;
        let disk = Self { db, path: path.to_owned(), synced: Mutex::default() };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
            .map_err(|e| StoreError::io("cannot set mode 0700 on", path, &e))?;
        disk.sync()?;
        for dir in [Some(path), path.parent()].into_iter().flatten() {
            File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io("cannot sync", dir, &e))?;
        }
        Ok(disk)
    }

    /// Closes one that has failed, which may complain about that again.
    pub(crate) fn close(self) {
        let Self { db, path, .. } = self;
        if let Err(message) = guarded(|| {
            drop(db);
            Ok(())
        }) {
            tracing::debug!(path = %path.display(), message, "closing a database that had failed");
        }
    }

    /// A handle for reads on another thread.
    pub(crate) fn reader(&self) -> Reader {
        Reader { db: self.db.clone() }
    }

    /// Reads everything once.
    pub(crate) fn load(&self) -> Result<Loaded, StoreError> {
        let mut parts: BTreeMap<Vec<u8>, BTreeMap<u16, Vec<u8>>> = BTreeMap::new();
        let mut loaded = Loaded::default();
        let read = guarded(|| {
            for entry in self.db.iter() {
                let (key, value) = entry?;
                match split_part(&key) {
                    Some((base, part)) => {
                        parts.entry(base.to_vec()).or_default().insert(part, value.to_vec());
                    }
                    None => loaded.damaged.push(Damaged { key: printable(&key), problem: Problem::WrongKey }),
                }
            }
            Ok(())
        });
        read.map_err(|message| StoreError::Corrupt { path: self.path.clone(), message })?;
        for (base, parts) in parts {
            match assemble(&base, &parts) {
                Ok((key, record)) => {
                    let count = u16::try_from(parts.len()).unwrap_or(u16::MAX);
                    loaded.records.insert(key, (record, count));
                }
                Err(problem) => loaded.damaged.push(Damaged { key: printable(&base), problem }),
            }
        }
        Ok(loaded)
    }

    /// Applies a batch (atomic) and makes it durable. Returns the number of fdatasync calls.
    pub(crate) fn commit(&self, batch: sled::Batch) -> Result<u64, StoreError> {
        let failed = |message: String| StoreError::Io {
            what: "cannot write to the database",
            path: self.path.clone(),
            message,
        };
        guarded(|| self.db.apply_batch(batch)).map_err(failed)?;
        guarded(|| self.db.flush()).map_err(failed)?;
        self.sync()
    }

    /// fdatasync of every file of sled that may have changed: its log, its configuration, snapshots and blobs.
    fn sync(&self) -> Result<u64, StoreError> {
        let mut known = self.synced.lock().unwrap_or_else(PoisonError::into_inner);
        let mut still = HashMap::new();
        let mut calls = 0;
        for dir in [self.path.clone(), self.path.join("blobs")] {
            let entries = match std::fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("cannot list", &dir, &e)),
            };
            for entry in entries {
                let path = entry.map_err(|e| StoreError::io("cannot list", &dir, &e))?.path();
                // Before the look, and by the clock that file times are taken from: what is written later has a later time,
                // however long the sync takes.
                let now = clock();
                let meta = match std::fs::metadata(&path) {
                    Ok(meta) => meta,
                    // sled replaces snapshots and removes blobs by itself.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(StoreError::io("cannot read", &path, &e)),
                };
                if !meta.is_file() {
                    continue;
                }
                let stamp = stamp(&meta);
                let log = path.file_name().is_some_and(|name| name == LOG);
                if log || known.get(&path) != Some(&stamp) {
                    let file = match File::open(&path) {
                        Ok(file) => file,
                        Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                        Err(e) => return Err(StoreError::io("cannot open", &path, &e)),
                    };
                    file.sync_data().map_err(|e| StoreError::io("cannot fdatasync", &path, &e))?;
                    calls += 1;
                }
                if !log && settled(&stamp, now) {
                    still.insert(path, stamp);
                }
            }
        }
        *known = still;
        Ok(calls)
    }
}

/// Waits until nobody holds the database in `path` any more, `patience` at most. Blocks. `DIR/lock` keeps other daemons out: it
/// is this process, or a tool of sled's own.
///
/// # Errors
/// [`StoreError::Io`] if it is still held then.
pub(crate) fn let_go(path: &Path, patience: Duration) -> Result<(), StoreError> {
    let log = match OpenOptions::new().read(true).write(true).open(path.join(LOG)) {
        Ok(log) => log,
        Err(error) => {
            if error.kind() != std::io::ErrorKind::NotFound {
                tracing::debug!(path = %path.display(), %error, "whether the database is held cannot be told");
            }
            return Ok(());
        }
    };
    let begin = Instant::now();
    loop {
        match flock(&log, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                // A fork may have a copy of the descriptor: its end would not be the lock's.
                let _ = flock(&log, FlockOperation::Unlock);
                break;
            }
            Err(Errno::WOULDBLOCK) if begin.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(Errno::WOULDBLOCK) => {
                return Err(StoreError::Io {
                    what: "cannot have for itself the database in",
                    path: path.to_owned(),
                    message: "something still has it open; end the tool that looks into it, if one does"
                        .to_owned(),
                });
            }
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "whether the database is held cannot be told");
                break;
            }
        }
    }
    Ok(())
}

/// Seconds and nanoseconds of the clock that the kernel takes file times from.
fn clock() -> (i64, i64) {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::RealtimeCoarse);
    (now.tv_sec, now.tv_nsec)
}

/// Whether a write after `now` would change the times.
fn settled(stamp: &Stamp, now: (i64, i64)) -> bool {
    let nanoseconds = |(s, ns): (i64, i64)| i128::from(s) * 1_000_000_000 + i128::from(ns);
    [stamp.2, stamp.3].into_iter().all(|time| {
        let coarse = stamp.2.1 == 0 || stamp.3.1 == 0;
        let wait = if coarse { SETTLED } else { SETTLED_FINE };
        nanoseconds(now) - nanoseconds(time) > wait.as_nanos().cast_signed()
    })
}

fn stamp(meta: &Metadata) -> Stamp {
    (meta.ino(), meta.len(), (meta.mtime(), meta.mtime_nsec()), (meta.ctime(), meta.ctime_nsec()))
}

/// Reads of what is not kept in memory; blocking.
#[derive(Debug, Clone)]
pub(crate) struct Reader {
    db: sled::Db,
}

impl Reader {
    /// One record: `None` if it is not there (any more).
    pub(crate) fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Problem> {
        let base = key.encode();
        let mut parts = BTreeMap::new();
        let read = guarded(|| {
            for part in 0..=u16::MAX {
                match self.db.get(key.part(part))? {
                    Some(value) => parts.insert(part, value.to_vec()),
                    None => break,
                };
            }
            Ok(())
        });
        read.map_err(Problem::Undecodable)?;
        if parts.is_empty() {
            return Ok(None);
        }
        assemble(&base, &parts).map(|(_, record)| Some(record))
    }
}

fn assemble(base: &[u8], parts: &BTreeMap<u16, Vec<u8>>) -> Result<(Key, Vec<u8>), Problem> {
    let key = Key::decode(base).ok_or(Problem::WrongKey)?;
    let whole: Vec<u8> = parts.values().flatten().copied().collect();
    let contiguous = parts.keys().copied().eq(0..u16::try_from(parts.len()).unwrap_or(u16::MAX));
    if !contiguous {
        return Err(Problem::Truncated { expected: parts.len() * PART, found: whole.len() });
    }
    envelope::open(&whole).map(|body| (key, body.to_vec()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::SystemTime;

    fn commit(disk: &Disk, value: &[u8]) -> u64 {
        let mut batch = sled::Batch::default();
        batch.insert(b"key", value);
        disk.commit(batch).expect("commit")
    }

    #[test]
    fn a_database_that_is_still_held_is_waited_for_and_no_longer_than_is_borne() {
        let dir = tempfile::tempdir().unwrap();
        drop(Disk::open(dir.path(), LET_GO).expect("open"));
        let_go(dir.path(), LET_GO).expect("let go");
        let held = File::open(dir.path().join(LOG)).unwrap();
        flock(&held, FlockOperation::NonBlockingLockExclusive).expect("nobody holds it after that");
        let refused = Disk::open(dir.path(), Duration::ZERO).expect_err("held");
        assert!(matches!(&refused, StoreError::Io { .. }), "{refused}");
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            flock(&held, FlockOperation::Unlock).expect("unlocked");
        });
        drop(Disk::open(dir.path(), LET_GO).expect("waited for"));
        holder.join().unwrap();
    }

    #[test]
    fn a_file_that_nobody_writes_is_synced_once_and_the_log_always() {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::open(dir.path(), LET_GO).expect("open");
        let conf = dir.path().join("conf");
        let file = File::options().write(true).open(&conf).expect("conf");
        // A change time cannot be set: from here on it is old enough.
        let set = |age: Duration| {
            file.set_modified(SystemTime::now() - age).expect("times");
            let begin = Instant::now();
            while !settled(&stamp(&file.metadata().expect("times")), clock()) {
                assert!(begin.elapsed() < Duration::from_secs(60), "never old enough");
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        file.set_modified(SystemTime::now() + Duration::from_secs(3600)).expect("times");
        assert_eq!([commit(&disk, b"1"), commit(&disk, b"1")], [2, 2], "a time to come tells nothing");
        set(2 * SETTLED);
        let calls = [commit(&disk, b"2"), commit(&disk, b"3"), commit(&disk, b"4")];
        assert_eq!(calls, [2, 1, 1]);
        set(3 * SETTLED);
        assert_eq!([commit(&disk, b"5"), commit(&disk, b"6")], [2, 1], "changed since");
    }

    #[test]
    fn times_tell_once_they_are_older_than_their_clock_is_coarse() {
        let at = |ms: i64| (1_000 + ms.div_euclid(1000), ms.rem_euclid(1000) * 1_000_000);
        let cases = [
            // mtime and ctime before `now`, in ms; `now` has a fraction of its own.
            ((51, 51), true),
            ((49, 51), false),
            ((51, 49), false),
            ((-3_600_000, 60), false),
            ((4_000, 60), true),
        ];
        let now = at(10_500);
        for ((m, c), expected) in cases {
            let stamp: Stamp = (1, 1, at(10_500 - m), at(10_500 - c));
            assert_eq!(settled(&stamp, now), expected, "{m} and {c} ms old");
        }
        for (m, c, expected) in
            [(9_000, 8_777, false), (8_000, 8_777, false), (8_000, 8_444, true), (8_444, 8_000, true)]
        {
            let stamp: Stamp = (1, 1, at(m), at(c));
            assert_eq!(settled(&stamp, now), expected, "whole seconds: {stamp:?}");
        }
    }
}
