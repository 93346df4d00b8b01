//! The file that a worker keeps its console in, so that it outlives the worker.
//!
//! It must be on a tmpfs: a vCPU stores to it, and on a disk would wait for that. The state directory is usually on none; then the
//! runtime directory has a link to a file in [`SHARED`].
//! Invariant: the link is there before the file, so that whoever clears the directory finds it, also after a crash.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use vcpu_worker::process::CONSOLE;
use vpmu_proto::worker::ConsoleState;

/// A tmpfs of every Linux host (POSIX shared memory).
const SHARED: &str = "/dev/shm";
/// Names of files there.
const PREFIX: &str = "vpmud-console-";
/// statfs(2).
const TMPFS_MAGIC: i64 = 0x0102_1994;

fn is_tmpfs(dir: &Path) -> bool {
    rustix::fs::statfs(dir).is_ok_and(|stat| stat.f_type == TMPFS_MAGIC)
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

/// Makes the file. Without it the worker goes on, and what it printed is lost if it is killed.
pub(super) fn make(dir: &Path) {
    let made = if is_tmpfs(dir) {
        create(&dir.join(CONSOLE))
    } else if is_tmpfs(Path::new(SHARED)) {
        let id = uuid::Uuid::new_v4().simple();
        let file = Path::new(SHARED).join(format!("{PREFIX}{id}"));
        std::os::unix::fs::symlink(&file, dir.join(CONSOLE)).and_then(|()| create(&file))
    } else {
        Err(io::Error::other(format!("neither the state directory nor {SHARED} is on a tmpfs")))
    };
    if let Err(error) = made {
        tracing::warn!(dir = %dir.display(), %error, "a worker's console does not outlive it if it is killed");
    }
}

/// Where it is, if not in the directory.
fn elsewhere(dir: &Path) -> Option<PathBuf> {
    let target = std::fs::read_link(dir.join(CONSOLE)).ok()?;
    let ours = target.file_name()?.to_str()?.starts_with(PREFIX);
    (ours && target.parent() == Some(Path::new(SHARED))).then_some(target)
}

/// What is in it. Blocks.
pub(super) fn read(dir: &Path) -> Option<ConsoleState> {
    vcpu_worker::console::last_output(&elsewhere(dir).unwrap_or_else(|| dir.join(CONSOLE)))
}

/// Removes it, if it is not in the directory.
pub(super) fn remove(dir: &Path) {
    if let Some(file) = elsewhere(dir) {
        drop(std::fs::remove_file(file));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_on_a_tmpfs_wherever_the_directory_is() {
        let (here, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(SHARED).unwrap());
        for dir in [here.path(), shared.path()] {
            make(dir);
            let console = vcpu_worker::console::Console::in_file(&dir.join(CONSOLE)).unwrap();
            console.write(b"hello");
            drop(console);
            let file = std::fs::canonicalize(dir.join(CONSOLE)).unwrap();
            assert!(is_tmpfs(file.parent().unwrap()), "{}", file.display());
            assert_eq!(read(dir).unwrap().data, b"hello");
            remove(dir);
            assert_eq!(file.exists(), file.starts_with(dir), "{}", file.display());
        }
    }

    /// Whatever a link says, nothing else is read or removed.
    #[test]
    fn a_link_elsewhere_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let victim = dir.path().join(format!("{PREFIX}x"));
        std::fs::write(&victim, "kept").unwrap();
        std::os::unix::fs::symlink(&victim, dir.path().join(CONSOLE)).unwrap();
        assert_eq!(read(dir.path()), None);
        remove(dir.path());
        assert!(victim.exists());
    }
}
