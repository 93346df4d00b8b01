//! The serial console's output, kept for readers that come later.
//!
//! A ring of the last [`HISTORY`] bytes with absolute offsets: byte `n` of the guest's output has offset `n` for ever,
//! also after a migration. Any number of readers follow it; none of them can hold the guest up, a slow one merely
//! misses what has been dropped. Invariant: `start + bytes.len()` is the number of bytes ever written.

use std::collections::VecDeque;
use std::sync::Mutex;

use tokio::sync::watch;
use vpmu_proto::worker::ConsoleState;

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

#[derive(Debug, Default)]
struct Ring {
    start: u64,
    bytes: VecDeque<u8>,
}

impl Ring {
    fn end(&self) -> u64 {
        self.start.saturating_add(self.bytes.len() as u64)
    }
}

impl Default for Console {
    fn default() -> Self {
        Self { ring: Mutex::default(), end: watch::Sender::new(0) }
    }
}

impl Console {
    /// Adds output and wakes readers. Never blocks for longer than a copy.
    pub fn write(&self, data: &[u8]) {
        let end = {
            let mut ring = self.lock();
            ring.bytes.extend(data);
            let excess = ring.bytes.len().saturating_sub(HISTORY);
            ring.bytes.drain(..excess);
            ring.start = ring.start.saturating_add(excess as u64);
            ring.end()
        };
        self.end.send_replace(end);
    }

    /// At most [`CHUNK`] bytes from `offset`, or from the oldest byte kept if that is later; the offset of the first
    /// byte comes first. Empty if there is nothing there yet.
    pub fn read(&self, offset: u64) -> (u64, Vec<u8>) {
        let ring = self.lock();
        let from = offset.clamp(ring.start, ring.end());
        let skip = usize::try_from(from - ring.start).unwrap_or(usize::MAX);
        (from, ring.bytes.iter().skip(skip).take(CHUNK).copied().collect())
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
        ConsoleState { offset: ring.start, data: ring.bytes.iter().copied().collect() }
    }

    /// Replaces everything by what was saved; only the newest [`HISTORY`] bytes are kept.
    pub fn restore(&self, state: &ConsoleState) {
        let excess = state.data.len().saturating_sub(HISTORY);
        let end = {
            let mut ring = self.lock();
            ring.bytes = state.data.iter().skip(excess).copied().collect();
            ring.start = state.offset.saturating_add(excess as u64);
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
        fn readers_see_the_tail(writes in proptest::collection::vec(0usize..90_000, 0..12), from in 0u64..800_000) {
            let console = Console::default();
            let mut all = Vec::new();
            for n in writes {
                let data: Vec<u8> = (all.len()..all.len() + n).map(|i| (i % 251) as u8).collect();
                console.write(&data);
                all.extend(data);
            }
            prop_assert_eq!(console.end(), all.len() as u64);
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
        let a = Console::default();
        a.write(&vec![b'x'; HISTORY + 10]);
        a.write(b"end");
        let b = Console::default();
        b.restore(&a.save());
        assert_eq!(b.end(), a.end());
        assert_eq!(b.read(b.end() - 3), (b.end() - 3, b"end".to_vec()));
    }
}
