//! One vpmud a state directory: an exclusive lock on `DIR/lock`, which names its holder.
//!
//! The descriptor is CLOEXEC (std's default): a worker process that inherited it would keep the directory locked after
//! the daemon's death.

use super::error::StoreError;
use rustix::fs::{FlockOperation, flock};
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;

/// Holds the state directory until it is dropped.
#[derive(Debug)]
pub(crate) struct DirLock {
    file: File,
}

impl Drop for DirLock {
    fn drop(&mut self) {
        // A fork that has not become a worker yet has a copy of the descriptor: its end would not be the lock's.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

impl DirLock {
    /// Makes the directory (mode 0700) and takes its lock without waiting.
    pub(crate) fn acquire(dir: &Path) -> Result<Self, StoreError> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(|e| StoreError::io("cannot create the state directory", dir, &e))?;
        std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o700))
            .map_err(|e| StoreError::io("cannot set mode 0700 on", dir, &e))?;
        let path = dir.join("lock");
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(|e| StoreError::io("cannot open the lock file", &path, &e))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let mut text = String::new();
                let _ = (&mut file).take(32).read_to_string(&mut text);
                return Err(StoreError::InUse { dir: dir.to_owned(), pid: text.trim().parse().unwrap_or(0) });
            }
            Err(e) => return Err(StoreError::io("cannot lock", &path, &e)),
        }
        let write = |file: &mut File| {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            writeln!(file, "{}", std::process::id())
        };
        write(&mut file).map_err(|e| StoreError::io("cannot write the lock file", &path, &e))?;
        Ok(Self { file })
    }
}
