//! The file that a worker keeps its console in, so that it outlives the worker.
//!
//! It must be on a tmpfs: a vCPU stores to it, and on a disk would wait for that. The state directory is usually on none; then the
//! runtime directory has a link to a file in [`SHARED`], beside which a note (`FILE.of`, a link too) says where that runtime
//! directory lies. Somebody may delete it: then [`sweep`] finds the file by the note.
//!
//! Invariants: the link is there before the note and the note before the file, so that whoever clears the directory finds
//! both, also after a crash. Nothing is read through a link to anywhere else. What is swept is a file of this user and of our
//! name, to which no runtime directory links, and which no worker has open (it holds a lock, see `vcpu_worker::console`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use vcpu_worker::process::CONSOLE;
use vpmu_proto::worker::ConsoleState;

/// A tmpfs of every Linux host (POSIX shared memory).
const SHARED: &str = "/dev/shm";
/// Names of files there.
const PREFIX: &str = "vpmud-console-";
/// The note beside a file.
const NOTE: &str = ".of";
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
        create(&dir.join(CONSOLE)).map(drop)
    } else if is_tmpfs(Path::new(SHARED)) {
        make_elsewhere(dir, Path::new(SHARED))
    } else {
        Err(io::Error::other(format!("neither the state directory nor {SHARED} is on a tmpfs")))
    };
    if let Err(error) = made {
        tracing::warn!(dir = %dir.display(), %error, "a worker's console does not outlive it if it is killed");
    }
}

fn make_elsewhere(dir: &Path, shared: &Path) -> io::Result<()> {
    let file = shared.join(format!("{PREFIX}{}", uuid::Uuid::new_v4().simple()));
    symlink(&file, dir.join(CONSOLE))?;
    // The directory itself may get another name.
    symlink(std::path::absolute(dir)?.parent().unwrap_or(Path::new("/")), note_of(&file))?;
    create(&file).map(drop)
}

fn note_of(file: &Path) -> PathBuf {
    let mut note = file.as_os_str().to_owned();
    note.push(NOTE);
    note.into()
}

fn is_name(name: &str) -> bool {
    let id = name.strip_prefix(PREFIX).unwrap_or_default();
    id.len() == 32 && id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Where it is, if not in the directory.
fn elsewhere(dir: &Path, shared: &Path) -> Option<PathBuf> {
    let target = std::fs::read_link(dir.join(CONSOLE)).ok()?;
    let ours = is_name(target.file_name()?.to_str()?);
    (ours && target.parent() == Some(shared)).then_some(target)
}

/// What is in it. Blocks.
pub(super) fn read(dir: &Path) -> Option<ConsoleState> {
    let inside = dir.join(CONSOLE);
    let file = if inside.is_symlink() { elsewhere(dir, Path::new(SHARED))? } else { inside };
    // Should it become a link meanwhile, that is not followed.
    vcpu_worker::console::last_output(&file)
}

/// Removes it, if it is not in the directory.
pub(super) fn remove(dir: &Path) {
    remove_elsewhere(dir, Path::new(SHARED));
}

fn remove_elsewhere(dir: &Path, shared: &Path) {
    if let Some(file) = elsewhere(dir, shared) {
        unlink(&file);
    }
}

/// The note last: it is what finds the file.
fn unlink(file: &Path) {
    drop(std::fs::remove_file(file));
    drop(std::fs::remove_file(note_of(file)));
}

/// Removes what is left of runtime directories that are gone, whichever vpmud's they were. Blocks.
pub fn sweep() {
    let swept = sweep_in(Path::new(SHARED));
    if swept > 0 {
        tracing::info!(swept, "removed consoles of workers whose runtime directories are gone");
    }
}

fn sweep_in(shared: &Path) -> usize {
    let mut swept = 0;
    for entry in std::fs::read_dir(shared).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(name) = name.to_str().and_then(|name| name.strip_suffix(NOTE)).filter(|n| is_name(n)) else {
            continue;
        };
        let file = shared.join(name);
        if is_left(&file) {
            unlink(&file);
            swept += 1;
        }
    }
    swept
}

/// Whether nobody will ever ask for it. What cannot be told is not so.
fn is_left(file: &Path) -> bool {
    let me = rustix::process::geteuid().as_raw();
    let note = note_of(file);
    let noted = std::fs::symlink_metadata(&note).is_ok_and(|known| known.is_symlink() && known.uid() == me);
    let Ok(run_dir) = std::fs::read_link(&note) else { return false };
    if !noted || is_linked(&run_dir, file) != Some(false) {
        return false;
    }
    let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::NONBLOCK;
    let flags = i32::try_from(flags.bits()).unwrap_or(0);
    match OpenOptions::new().read(true).custom_flags(flags).open(file) {
        Ok(open) => {
            let ours = open.metadata().is_ok_and(|known| known.is_file() && known.uid() == me);
            ours && flock(&open, FlockOperation::NonBlockingLockExclusive).is_ok()
        }
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// Whether a runtime directory in there links to it; none if that cannot be told.
fn is_linked(run_dir: &Path, file: &Path) -> Option<bool> {
    use io::ErrorKind as K;
    let dirs = match std::fs::read_dir(run_dir) {
        Ok(dirs) => dirs,
        Err(error) => return (run_dir.is_absolute() && error.kind() == K::NotFound).then_some(false),
    };
    for dir in dirs {
        match std::fs::read_link(dir.ok()?.path().join(CONSOLE)) {
            Ok(target) if target == file => return Some(true),
            Ok(_) => {}
            // None there, or on a tmpfs: a file, and no link.
            Err(error) if matches!(error.kind(), K::NotFound | K::NotADirectory | K::InvalidInput) => {}
            Err(_) => return None,
        }
    }
    Some(false)
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
        symlink(&victim, dir.path().join(CONSOLE)).unwrap();
        assert_eq!(read(dir.path()), None);
        remove(dir.path());
        assert!(victim.exists());
    }
    /// Nor is a file of the right size and content that another place's link names.
    #[test]
    fn only_a_link_to_where_they_are_made_is_followed() {
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(SHARED).unwrap());
        make_elsewhere(dir.path(), other.path()).unwrap();
        let console = vcpu_worker::console::Console::in_file(&dir.path().join(CONSOLE)).unwrap();
        console.write(b"hello");
        assert!(elsewhere(dir.path(), other.path()).is_some());
        assert_eq!(read(dir.path()), None, "it is not in {SHARED} itself");
    }

    #[test]
    fn a_file_is_swept_when_its_directory_and_its_worker_are_gone() {
        let (run, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(SHARED).unwrap());
        let (dir, shared) = (run.path().join("run/uid"), shared.path());
        std::fs::create_dir_all(&dir).unwrap();
        make_elsewhere(&dir, shared).unwrap();
        let file = elsewhere(&dir, shared).unwrap();
        assert_eq!(sweep_in(shared), 0, "its directory is there");
        // A spare's directory is renamed when it gets its machine.
        std::fs::rename(&dir, run.path().join("run/other")).unwrap();
        let worker =
            vcpu_worker::console::Console::in_file(&run.path().join("run/other").join(CONSOLE)).unwrap();
        assert_eq!(sweep_in(shared), 0, "it is there under another name");
        std::fs::remove_dir_all(run.path().join("run/other")).unwrap();
        assert_eq!(sweep_in(shared), 0, "its worker lives");
        drop(worker);
        // What is none of ours.
        let foreign =
            ["vpmud-console-x", "vpmud-console-x.of", "vpmud-console-0123456789abcdef0123456789abcdef"];
        for name in foreign {
            std::fs::write(shared.join(name), "").unwrap();
        }
        assert_eq!(sweep_in(shared), 1);
        assert!(!file.exists() && !note_of(&file).is_symlink());
        assert!(foreign.iter().all(|name| shared.join(name).exists()));
    }

    #[test]
    fn a_file_goes_with_its_note_and_a_note_alone_is_swept() {
        let (run, shared) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in(SHARED).unwrap());
        make_elsewhere(run.path(), shared.path()).unwrap();
        let file = elsewhere(run.path(), shared.path()).unwrap();
        remove_elsewhere(run.path(), shared.path());
        assert!(!file.exists() && !note_of(&file).is_symlink());
        // All of its state directory was deleted, and the machine was in the middle of it.
        let gone = run.path().join("gone");
        symlink(&gone, note_of(&file)).unwrap();
        assert_eq!(sweep_in(shared.path()), 1);
        // A link in the file's place is not followed, and its target is nobody's.
        let victim = run.path().join("victim");
        std::fs::write(&victim, "kept").unwrap();
        symlink(&gone, note_of(&file)).unwrap();
        symlink(&victim, &file).unwrap();
        assert_eq!(sweep_in(shared.path()), 0);
        assert!(victim.exists() && file.is_symlink());
    }
}
