//! The serial console's output, kept for readers that come later.
//!
//! A ring of the last [`HISTORY`] bytes with absolute offsets: byte `n` of the guest's output has offset `n` for ever,
//! also after a migration. Any number of readers follow it; none of them can hold the guest up, a slow one merely
//! misses what has been dropped. A worker's process keeps the ring in a file ([`Console::in_file`]), where it outlives
//! the process, for whoever asks what the guest said last; elsewhere it is in memory. Invariant: the end of the ring is the number of bytes ever written.

mod file;

use std::collections::VecDeque;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use tokio::sync::watch;
use vpmu_proto::worker::ConsoleState;

pub use file::last_output;

/// Bytes of output that are kept.
pub const HISTORY: usize = 256 * 1024;

/// Most bytes that one read returns.
pub const CHUNK: usize = 64 * 1024;

/// The output of one serial port.
#[derive(Debug)]
pub struct Console {
    ring: Mutex<Ring>,
    end: watch::Sender<u64>,
}

#[derive(Debug)]
enum Ring {
    Memory { start: u64, bytes: VecDeque<u8> },
    File(file::FileRing),
}

impl Default for Ring {
    fn default() -> Self {
        Self::Memory { start: 0, bytes: VecDeque::new() }
    }
}

impl Ring {
    fn start(&self) -> u64 {
        match self {
            Self::Memory { start, .. } => *start,
            Self::File(ring) => ring.start(),
        }
    }

    fn end(&self) -> u64 {
        match self {
            Self::Memory { start, bytes } => start.saturating_add(bytes.len() as u64),
            Self::File(ring) => ring.end(),
        }
    }

    /// At most `most` bytes from an offset that is kept.
    fn read(&self, from: u64, most: usize) -> Vec<u8> {
        match self {
            Self::Memory { start, bytes } => {
                let skip = usize::try_from(from.saturating_sub(*start)).unwrap_or(usize::MAX);
                bytes.iter().skip(skip).take(most).copied().collect()
            }
            Self::File(ring) => ring.read(from, most),
        }
    }

    /// Adds at most [`HISTORY`] bytes.
    fn push(&mut self, data: &[u8]) {
        match self {
            Self::Memory { start, bytes } => {
                bytes.extend(data);
                let excess = bytes.len().saturating_sub(HISTORY);
                bytes.drain(..excess);
                *start = start.saturating_add(excess as u64);
            }
            Self::File(ring) => {
                if let Err(error) = ring.push(data) {
                    self.leave_file(&error);
                    self.push(data);
                }
            }
        }
    }

    /// Forgets everything and goes on at an offset.
    fn reset(&mut self, offset: u64) {
        match self {
            Self::Memory { .. } => *self = Self::Memory { start: offset, bytes: VecDeque::new() },
            Self::File(ring) => {
                if let Err(error) = ring.reset(offset) {
                    self.leave_file(&error);
                    self.reset(offset);
                }
            }
        }
    }

    /// Its file system is full: from now on in memory.
    fn leave_file(&mut self, error: &io::Error) {
        tracing::warn!(%error, "what the guest prints from now on is lost if this process is killed");
        let bytes = self.read(self.start(), HISTORY).into();
        *self = Self::Memory { start: self.start(), bytes };
    }
}

impl Default for Console {
    fn default() -> Self {
        Self::over(Ring::default())
    }
}

impl Console {
    fn over(ring: Ring) -> Self {
        Self { ring: Mutex::new(ring), end: watch::Sender::new(0) }
    }

    /// An empty one whose ring is in this file, which must be there and is best on a tmpfs; [`last_output`] reads it.
    ///
    /// # Errors
    /// If it cannot be opened or mapped.
    pub fn in_file(path: &Path) -> io::Result<Self> {
        file::FileRing::open(path).map(|ring| Self::over(Ring::File(ring)))
    }

    /// Adds output and wakes readers. Never blocks for longer than a copy.
    pub fn write(&self, data: &[u8]) {
        let end = {
            let mut ring = self.lock();
            data.chunks(HISTORY).for_each(|piece| ring.push(piece));
            ring.end()
        };
        self.end.send_replace(end);
    }

    /// At most [`CHUNK`] bytes from `offset`, or from the oldest byte kept if that is later; the offset of the first
    /// byte comes first. Empty if there is nothing there yet.
    pub fn read(&self, offset: u64) -> (u64, Vec<u8>) {
        let ring = self.lock();
        let from = offset.clamp(ring.start(), ring.end());
        (from, ring.read(from, CHUNK))
    }

    /// Offset of the byte that will be written next.
    pub fn end(&self) -> u64 {
        self.lock().end()
    }

    /// Tells when there is more.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// For saving.
    pub fn save(&self) -> ConsoleState {
        let ring = self.lock();
        ConsoleState { offset: ring.start(), data: ring.read(ring.start(), HISTORY) }
    }

    /// Replaces everything by what was saved; only the newest [`HISTORY`] bytes are kept.
    pub fn restore(&self, state: &ConsoleState) {
        let excess = state.data.len().saturating_sub(HISTORY);
        let end = {
            let mut ring = self.lock();
            ring.reset(state.offset.saturating_add(excess as u64));
            ring.push(state.data.get(excess..).unwrap_or_default());
            ring.end()
        };
        self.end.send_replace(end);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Ring> {
        // A panic while it was held cannot leave the ring half-changed in a way that matters: bytes are bytes.
        self.ring.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Reading chunk by chunk from any offset gives exactly the tail of what was written, at the right offsets.
        #[test]
        fn readers_see_the_tail(writes in proptest::collection::vec(0usize..90_000, 0..12), from in 0u64..800_000, in_file in any::<bool>()) {
            let file = tempfile::NamedTempFile::new().unwrap();
            let console = if in_file { Console::in_file(file.path()).unwrap() } else { Console::default() };
            let mut all = Vec::new();
            for n in writes {
                let data: Vec<u8> = (all.len()..all.len() + n).map(|i| (i % 251) as u8).collect();
                console.write(&data);
                all.extend(data);
            }
            prop_assert_eq!(console.end(), all.len() as u64);
            // Without the process there would be the same.
            prop_assert_eq!(last_output(file.path()), in_file.then(|| console.save()));
            let oldest = all.len().saturating_sub(HISTORY);
            let mut at = from;
            let (first, _) = console.read(at);
            prop_assert_eq!(first, (from as usize).clamp(oldest, all.len()) as u64);
            let mut seen = Vec::new();
            loop {
                let (offset, data) = console.read(at);
                if data.is_empty() { break }
                prop_assert!(data.len() <= CHUNK);
                at = offset + data.len() as u64;
                seen.extend(data);
            }
            prop_assert_eq!(&seen[..], &all[first as usize..]);
        }
    }

    #[test]
    fn history_survives_a_move_with_its_offsets() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let a = Console::default();
        a.write(&vec![b'x'; HISTORY + 10]);
        a.write(b"end");
        for b in [Console::default(), Console::in_file(file.path()).unwrap()] {
            b.write(b"something else");
            b.restore(&a.save());
            assert_eq!(b.end(), a.end());
            assert_eq!(b.read(b.end() - 3), (b.end() - 3, b"end".to_vec()));
            assert_eq!(b.save(), a.save());
        }
        assert_eq!(last_output(file.path()), Some(a.save()));
    }

    /// A file system with room for a few pages only.
    #[test]
    fn a_file_that_cannot_grow_is_left_without_a_loss() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let console = Console::in_file(file.path()).unwrap();
        console.write(b"before");
        console.lock().leave_file(&io::Error::other("no space"));
        console.write(b" and after");
        assert_eq!(console.read(0), (0, b"before and after".to_vec()));
        assert_eq!(last_output(file.path()).unwrap().data, b"before");
    }
}
