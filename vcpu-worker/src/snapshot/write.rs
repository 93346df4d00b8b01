//! Writes a snapshot: under a name of its own first, which is locked, so that a second writer is refused and a leftover
//! of a host that died is reused; then synced, renamed over the old one, and the directory synced.

use std::fs::File;
use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use prost::Message as _;
use rustix::fs::{FlockOperation, Mode, OFlags};
use vpmu_proto::worker::SnapshotManifest;

use super::{CHUNK_PAGES, HEADER, Header, SnapshotError};
use crate::memory::{GuestMemory, PAGE_SIZE};

/// How far a writer is; read by others.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes of memory looked at.
    pub done: AtomicU64,
    /// Bytes of memory to look at.
    pub total: AtomicU64,
    /// Asks it to stop.
    pub cancel: AtomicBool,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Bytes of the file.
    pub file_bytes: u64,
    /// Pages in it.
    pub pages: u64,
}

/// The name it is written under.
fn part_path(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".part");
    path.with_file_name(name)
}

/// A file that goes away unless it is kept.
struct Part<'a> {
    path: &'a Path,
    written: PathBuf,
    file: File,
    kept: bool,
}

impl Drop for Part<'_> {
    fn drop(&mut self) {
        if !self.kept
            && let Err(error) = std::fs::remove_file(&self.written)
        {
            tracing::warn!(path = %self.written.display(), %error, "an unfinished snapshot stays behind");
        }
    }
}

impl<'a> Part<'a> {
    fn create(path: &'a Path) -> Result<Self, SnapshotError> {
        let part = part_path(path);
        let failed = |what, e: rustix::io::Errno| SnapshotError::Unwritable {
            path: path.to_owned(),
            what,
            source: e.into(),
        };
        let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file =
            rustix::fs::open(&part, flags, Mode::RUSR | Mode::WUSR).map_err(|e| failed("creating it", e))?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|e| {
            if e == rustix::io::Errno::WOULDBLOCK {
                SnapshotError::Busy { path: path.to_owned() }
            } else {
                failed("locking it", e)
            }
        })?;
        // Its writer may have renamed it between our open and our lock: then what is locked has another name now.
        let here = rustix::fs::stat(&part).is_ok_and(|there| {
            rustix::fs::fstat(&file)
                .is_ok_and(|ours| (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino))
        });
        if !here {
            return Err(SnapshotError::Busy { path: path.to_owned() });
        }
        let this = Self { path, written: part, file: File::from(file), kept: false };
        this.file.set_len(0).map_err(|e| this.failed("emptying it", e))?;
        Ok(this)
    }

    fn failed(&self, what: &'static str, source: std::io::Error) -> SnapshotError {
        SnapshotError::Unwritable { path: self.path.to_owned(), what, source }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), SnapshotError> {
        self.file.write_all(bytes).map_err(|e| self.failed("writing", e))
    }

    fn keep(mut self) -> Result<(), SnapshotError> {
        self.file.sync_all().map_err(|e| self.failed("syncing it", e))?;
        std::fs::rename(&self.written, self.path).map_err(|e| self.failed("renaming it", e))?;
        self.kept = true;
        let directory = self.path.parent().unwrap_or(Path::new("."));
        File::open(directory).and_then(|d| d.sync_all()).map_err(|e| self.failed("syncing the directory", e))
    }
}

/// Writes the memory of a machine that does not run, and `manifest`, to `path`. Blocks. After an error there is no file,
/// or the one from before.
pub fn write(
    path: &Path,
    manifest: &SnapshotManifest,
    memory: &GuestMemory,
    progress: &Progress,
) -> Result<Written, SnapshotError> {
    let mut part = Part::create(path)?;
    part.write(&[0; HEADER as usize])?;
    let mut table = Vec::new();
    let mut pages = 0;
    let mut buffer = vec![0u8; (CHUNK_PAGES * PAGE_SIZE) as usize];
    // Without the kernel's word every page is looked at.
    let resident = memory.resident_pages();
    let resident = resident.unwrap_or_else(|| crate::bitmap::PageBitmap::full(memory.pages()));
    progress.total.store(resident.count() * PAGE_SIZE, Ordering::Relaxed);
    for (first, len) in resident.runs() {
        let mut at = first;
        while at < first + len {
            if progress.cancel.load(Ordering::Relaxed) {
                return Err(SnapshotError::Cancelled);
            }
            let here = CHUNK_PAGES.min(first + len - at);
            let bytes = &mut buffer[..(here * PAGE_SIZE) as usize];
            memory.read_at(at * PAGE_SIZE, bytes)?;
            for (offset, run) in filled(bytes) {
                table.extend_from_slice(&(at + offset).to_le_bytes());
                table.extend_from_slice(&((run.len() as u64 / PAGE_SIZE) as u32).to_le_bytes());
                table.extend_from_slice(&crc32c::crc32c(run).to_le_bytes());
                part.write(run)?;
                pages += run.len() as u64 / PAGE_SIZE;
            }
            at += here;
            progress.done.fetch_add(here * PAGE_SIZE, Ordering::Relaxed);
        }
    }
    let state = manifest.encode_to_vec();
    part.write(&state)?;
    part.write(&table)?;
    let header = Header {
        memory_bytes: memory.bytes(),
        data_bytes: pages * PAGE_SIZE,
        state_bytes: state.len() as u64,
        table_bytes: table.len() as u64,
        state_crc: crc32c::crc32c(&state),
        table_crc: crc32c::crc32c(&table),
    };
    part.file.write_all_at(&header.encode(), 0).map_err(|e| part.failed("writing the header", e))?;
    if progress.cancel.load(Ordering::Relaxed) {
        return Err(SnapshotError::Cancelled);
    }
    part.keep()?;
    Ok(Written { file_bytes: header.file_bytes(), pages })
}

/// Runs of pages that are not zero, with the page where each begins.
fn filled(bytes: &[u8]) -> impl Iterator<Item = (u64, &[u8])> {
    let page = PAGE_SIZE as usize;
    let is_zero = |p: &[u8]| p.iter().all(|b| *b == 0);
    let mut at = 0;
    std::iter::from_fn(move || {
        while at < bytes.len() && is_zero(&bytes[at..at + page]) {
            at += page;
        }
        let first = at;
        while at < bytes.len() && !is_zero(&bytes[at..at + page]) {
            at += page;
        }
        (at > first).then(|| ((first / page) as u64, &bytes[first..at]))
    })
}

/// Removes what writers that no longer live left in a directory of snapshots; what is being written stays.
pub fn sweep(directory: &Path) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let part = name.strip_prefix('.').and_then(|n| n.strip_suffix(".part"));
        if part.is_none_or(str::is_empty) {
            continue;
        }
        let Ok(file) =
            rustix::fs::open(&path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty())
        else {
            continue;
        };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            std::fs::remove_file(&path)?;
        }
    }
    Ok(())
}
