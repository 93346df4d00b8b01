//! The ring in a file on a tmpfs, mapped: what a guest has printed survives the worker, however that ends, and costs a vCPU
//! no system call.
//!
//! | bytes | hold |
//! |---|---|
//! | 0..8 | [`MAGIC`] |
//! | 8..16 | offset of the oldest byte kept |
//! | 16..24 | offset of the next byte |
//! | 64.. | byte `n` of the output, at `n` modulo [`HISTORY`] |
//!
//! Invariants: the oldest byte moves on before any byte is overwritten, and the next one after it was written, so that at
//! every moment at which the process can be killed all between the two is right. Whoever has it mapped has it locked (flock,
//! shared), so that nobody takes it for left behind. A page is allocated by a write, which can
//! fail, before it is stored to through the mapping, where a full file system would kill the process.

use std::fs::{File, Metadata};
use std::io::{self, Read as _};
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{FlockOperation, flock};
use vm_memory::mmap::MmapRegion;
use vm_memory::{FileOffset, VolatileMemory as _};
use vpmu_proto::worker::ConsoleState;

use super::HISTORY;

const MAGIC: u64 = u64::from_le_bytes(*b"vpmucon1");
const START: usize = 8;
const END: usize = 16;
const DATA: usize = 64;
const SIZE: usize = DATA + HISTORY;
const PAGE: usize = 4096;

/// The mapped file.
pub(super) struct FileRing {
    file: File,
    map: MmapRegion,
    /// Pages that the file system has given.
    given: Vec<bool>,
    start: u64,
    end: u64,
}

impl std::fmt::Debug for FileRing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileRing").field("start", &self.start).field("end", &self.end).finish_non_exhaustive()
    }
}

fn place(offset: u64) -> usize {
    (offset % HISTORY as u64) as usize
}

impl FileRing {
    /// Makes an existing file an empty ring.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options().read(true).write(true).open(path)?;
        if !is_own_file(&file.metadata()?) {
            return Err(io::Error::other("the console's file is no file of this user"));
        }
        flock(&file, FlockOperation::NonBlockingLockShared)?;
        file.set_len(0)?;
        file.set_len(SIZE as u64)?;
        let map =
            MmapRegion::from_file(FileOffset::new(file.try_clone()?, 0), SIZE).map_err(io::Error::other)?;
        let mut ring = Self { file, map, given: vec![false; SIZE.div_ceil(PAGE)], start: 0, end: 0 };
        ring.allocate(0, DATA)?;
        ring.word(0, MAGIC)?;
        Ok(ring)
    }

    pub(super) fn start(&self) -> u64 {
        self.start
    }

    pub(super) fn end(&self) -> u64 {
        self.end
    }

    /// Begins anew at an offset.
    pub(super) fn reset(&mut self, offset: u64) -> io::Result<()> {
        // Empty at every moment in between: an end before the start.
        self.word(END, 0)?;
        self.word(START, offset)?;
        self.word(END, offset)?;
        (self.start, self.end) = (offset, offset);
        Ok(())
    }

    /// Adds the newest bytes, at most [`HISTORY`].
    pub(super) fn push(&mut self, data: &[u8]) -> io::Result<()> {
        let end = self.end.saturating_add(data.len() as u64);
        let at = place(self.end);
        let (first, second) = data.split_at(data.len().min(HISTORY - at));
        self.allocate(DATA + at, first.len())?;
        self.allocate(DATA, second.len())?;
        let start = self.start.max(end.saturating_sub(HISTORY as u64));
        if start != self.start {
            self.start = start;
            self.word(START, start)?;
            // The bytes that are stored next are no atomics: they must not pass it.
            std::sync::atomic::fence(Ordering::SeqCst);
        }
        self.store(DATA + at, first)?;
        self.store(DATA, second)?;
        self.end = end;
        self.word(END, end)
    }

    /// At most `most` bytes from an offset that is kept.
    pub(super) fn read(&self, from: u64, most: usize) -> Vec<u8> {
        let kept = usize::try_from(self.end.saturating_sub(from)).unwrap_or(usize::MAX).min(HISTORY);
        let mut data = vec![0; kept.min(most)];
        let at = place(from);
        let (first, second) = {
            let middle = data.len().min(HISTORY - at);
            data.split_at_mut(middle)
        };
        for (offset, piece) in [(DATA + at, first), (DATA, second)] {
            if let Ok(slice) = self.map.get_slice(offset, piece.len()) {
                slice.copy_to(piece);
            }
        }
        data
    }

    fn allocate(&mut self, offset: usize, len: usize) -> io::Result<()> {
        if len == 0 {
            return Ok(());
        }
        for page in offset / PAGE..=(offset + len - 1) / PAGE {
            if let Some(given) = self.given.get_mut(page).filter(|given| !**given) {
                // Nothing but zeros is there yet.
                self.file.write_all_at(&[0], (page * PAGE) as u64)?;
                *given = true;
            }
        }
        Ok(())
    }

    fn store(&self, offset: usize, data: &[u8]) -> io::Result<()> {
        self.map.get_slice(offset, data.len()).map_err(io::Error::other)?.copy_from(data);
        Ok(())
    }

    fn word(&self, offset: usize, value: u64) -> io::Result<()> {
        use std::sync::atomic::AtomicU64;
        let word = self.map.get_atomic_ref::<AtomicU64>(offset).map_err(io::Error::other)?;
        word.store(value, Ordering::Release);
        Ok(())
    }
}

fn is_own_file(known: &Metadata) -> bool {
    known.is_file() && known.uid() == rustix::process::geteuid().as_raw()
}

/// What a worker that has ended, or one that lives, had written; none if there is no such file of this user's. Whoever wrote
/// it is not trusted, and no link is followed. Blocks.
pub fn last_output(path: &Path) -> Option<ConsoleState> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = File::options().read(true).custom_flags(flags).open(path).ok()?;
    let known = file.metadata().ok()?;
    if !is_own_file(&known) || known.len() != SIZE as u64 {
        return None;
    }
    // No more of it, should it grow meanwhile.
    let mut bytes = Vec::with_capacity(SIZE + 1);
    file.take(SIZE as u64 + 1).read_to_end(&mut bytes).ok()?;
    parse(&bytes)
}

fn parse(bytes: &[u8]) -> Option<ConsoleState> {
    let word = |at: usize| -> Option<u64> {
        Some(u64::from_le_bytes(bytes.get(at..)?.first_chunk::<8>().copied()?))
    };
    let (start, end) = (word(START)?, word(END)?);
    let kept = usize::try_from(end.checked_sub(start)?).ok().filter(|kept| *kept <= HISTORY)?;
    if word(0)? != MAGIC || bytes.len() != SIZE {
        return None;
    }
    let ring = &bytes[DATA..];
    let data = ring.iter().cycle().skip(place(start)).take(kept).copied().collect();
    Some(ConsoleState { offset: start, data })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// No file makes it panic, or yield more than the ring holds.
        #[test]
        fn reading_is_total(start in any::<u64>(), length in 0..2 * HISTORY as u64, magic in any::<bool>(), cut in 0..SIZE) {
            let mut bytes = vec![0u8; SIZE];
            bytes[..8].copy_from_slice(&if magic { MAGIC } else { 0 }.to_le_bytes());
            bytes[START..END].copy_from_slice(&start.to_le_bytes());
            bytes[END..END + 8].copy_from_slice(&start.wrapping_add(length).to_le_bytes());
            let whole = parse(&bytes);
            let fits = magic && length <= HISTORY as u64 && start.checked_add(length).is_some();
            prop_assert_eq!(whole.is_some(), fits);
            if let Some(state) = whole {
                prop_assert_eq!((state.offset, state.data.len() as u64), (start, length));
            }
            prop_assert_eq!(parse(&bytes[..cut]), None);
        }
    }

    #[test]
    fn no_link_is_followed_and_nothing_but_a_file_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let (file, link) = (dir.path().join("console"), dir.path().join("link"));
        File::create(&file).unwrap();
        drop(FileRing::open(&file).unwrap());
        assert!(last_output(&file).is_some());
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert_eq!(last_output(&link), None);
        assert_eq!(last_output(dir.path()), None);
        assert_eq!(last_output(Path::new("/dev/zero")), None);
    }

    #[test]
    fn it_is_locked_for_as_long_as_it_is_mapped() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let ring = FileRing::open(file.path()).unwrap();
        let taken = || flock(file.as_file(), FlockOperation::NonBlockingLockExclusive);
        assert!(taken().is_err(), "somebody has it");
        drop(ring);
        taken().unwrap();
    }

    #[test]
    fn a_file_without_room_is_an_error_and_no_signal() {
        // Nothing can be allocated in it, as on a full file system.
        let full = Path::new("/dev/full");
        assert!(FileRing::open(full).is_err());
    }
}
