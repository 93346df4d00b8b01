//! The demo's private directory: short (socket paths are bounded), mode 0700, removed at the end.
//!
//! A demo that is killed cannot remove its own. It holds a lock on a file in the directory, which the kernel releases when
//! the process is gone; the next demo removes every directory of ours whose lock it can take.

use super::error::DemoError;
use rustix::fs::{FlockOperation, flock};
use std::fs::{self, DirBuilder, File};
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

const PREFIX: &str = "vpmud-demo-";
const LOCK: &str = "lock";

/// A directory without a lock file is being made, or its maker was killed right then: it is left alone for this long.
const GRACE: Duration = Duration::from_secs(60);

/// Longest base directory that leaves room for our own part of a socket's path.
const MAX_BASE: usize = 40;

/// The directory, for as long as the value lives.
#[derive(Debug)]
pub(crate) struct WorkDir {
    path: PathBuf,
    keep: bool,
    _lock: File,
}

impl WorkDir {
    /// Sweeps what killed demos left, then makes a new directory.
    pub(crate) fn new(keep: bool) -> Result<Self, DemoError> {
        Self::new_in(&base(), keep)
    }

    fn new_in(base: &Path, keep: bool) -> Result<Self, DemoError> {
        sweep(base);
        let unique = uuid::Uuid::new_v4().simple().to_string();
        let path = base.join(format!("{PREFIX}{}", unique.get(..12).unwrap_or(&unique)));
        let failed = |error| DemoError::io(format!("make the directory {}", path.display()), error);
        DirBuilder::new().mode(0o700).create(&path).map_err(failed)?;
        let locked = (|| {
            let mut lock = File::create(path.join(LOCK))?;
            flock(&lock, FlockOperation::NonBlockingLockExclusive)?;
            // For people who find it; the lock is what counts.
            writeln!(lock, "{}", std::process::id())?;
            Ok(lock)
        })();
        match locked {
            Ok(lock) => Ok(Self { path, keep, _lock: lock }),
            Err(error) => {
                let error = failed(error);
                // Nothing is in it yet.
                let _ = fs::remove_dir_all(&path);
                Err(error)
            }
        }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        if self.keep {
            // The mark keeps the next sweep away.
            let _ = fs::rename(self.path.join(LOCK), self.path.join("kept"));
        } else if let Err(error) = fs::remove_dir_all(&self.path) {
            eprintln!("vpmud demo: {} could not be removed: {error}", self.path.display());
        }
    }
}

/// The system's temporary directory, or /tmp where that one's path is too long.
fn base() -> PathBuf {
    let base = std::env::temp_dir();
    if base.as_os_str().len() > MAX_BASE { PathBuf::from("/tmp") } else { base }
}

/// Removes the directories of demos that are gone. What cannot be removed is in nobody's way and stays.
fn sweep(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    for entry in entries.flatten() {
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && abandoned(&path) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

/// Ours, and nobody holds its lock.
fn abandoned(path: &Path) -> bool {
    // Not through a symbolic link: somebody else could have put one there.
    let Ok(metadata) = fs::symlink_metadata(path) else { return false };
    if !metadata.is_dir()
        || metadata.uid() != rustix::process::geteuid().as_raw()
        || path.join("kept").exists()
    {
        return false;
    }
    match File::open(path.join(LOCK)) {
        Ok(lock) => flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok(),
        Err(_) => metadata.modified().ok().and_then(|at| at.elapsed().ok()).is_some_and(|age| age > GRACE),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_goes_with_its_value() {
        let base = tempfile::tempdir().expect("tempdir");
        let workdir = WorkDir::new_in(base.path(), false).expect("made");
        let path = workdir.path().to_owned();
        assert_eq!(fs::metadata(&path).expect("is there").mode() & 0o777, 0o700);
        drop(workdir);
        assert!(!path.exists());
    }

    #[test]
    fn only_abandoned_directories_are_swept() {
        let base = tempfile::tempdir().expect("tempdir");
        let in_use = WorkDir::new_in(base.path(), false).expect("made");
        let kept = {
            let workdir = WorkDir::new_in(base.path(), true).expect("made");
            workdir.path().to_owned()
        };
        // What a killed demo leaves: a directory with a lock that nobody holds.
        let dead = base.path().join(format!("{PREFIX}dead"));
        fs::create_dir_all(dead.join("a")).expect("made");
        fs::write(dead.join(LOCK), "1").expect("written");
        // One that is being made right now, and somebody else's.
        let young = base.path().join(format!("{PREFIX}young"));
        fs::create_dir(&young).expect("made");
        let other = base.path().join("other");
        fs::create_dir(&other).expect("made");

        sweep(base.path());
        assert!(!dead.exists());
        for path in [in_use.path(), &kept, &young, &other] {
            assert!(path.exists(), "{}", path.display());
        }
    }
}
