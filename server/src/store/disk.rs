//! sled, used by the rules that its known defects ask for.
//!
//! - 0.34.7 pinned, cache 32 MiB, no background flush (its failures are only logged).
//! - Durable means `flush()` returned and then every file of sled was fdatasynced: flush alone leaves data to
//!   `sync_file_range`, which promises nothing.
//! - sled may panic on a file it does not understand; a panic here is a typed error.

use super::envelope::{self, Problem};
use super::error::StoreError;
use super::keys::{Key, PART, printable, split_part};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

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

/// The database and the files it consists of.
#[derive(Debug)]
pub(crate) struct Disk {
    db: sled::Db,
    path: PathBuf,
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
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let config = sled::Config::new().path(path).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let db = guarded(|| config.open())
            .map_err(|message| StoreError::Corrupt { path: path.to_owned(), message })?;
        let disk = Self { db, path: path.to_owned() };
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
            .map_err(|e| StoreError::io("cannot set mode 0700 on", path, &e))?;
        disk.sync()?;
        for dir in [Some(path), path.parent()].into_iter().flatten() {
            File::open(dir).and_then(|d| d.sync_all()).map_err(|e| StoreError::io("cannot sync", dir, &e))?;
        }
        Ok(disk)
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

    /// fdatasync of every file of sled: its log, its configuration, snapshots and blobs.
    fn sync(&self) -> Result<u64, StoreError> {
        let mut synced = 0;
        for dir in [self.path.clone(), self.path.join("blobs")] {
            let entries = match std::fs::read_dir(&dir) {
                Ok(entries) => entries,
                Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                Err(e) => return Err(StoreError::io("cannot list", &dir, &e)),
            };
            for entry in entries {
                let path = entry.map_err(|e| StoreError::io("cannot list", &dir, &e))?.path();
                let file = match File::open(&path) {
                    Ok(file) => file,
                    // sled replaces snapshots and removes blobs by itself.
                    Err(e) if e.kind() == std::io::ErrorKind::NotFound => continue,
                    Err(e) => return Err(StoreError::io("cannot open", &path, &e)),
                };
                let is_file =
                    file.metadata().map_err(|e| StoreError::io("cannot read", &path, &e))?.is_file();
                if is_file {
                    file.sync_data().map_err(|e| StoreError::io("cannot fdatasync", &path, &e))?;
                    synced += 1;
                }
            }
        }
        Ok(synced)
    }
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
