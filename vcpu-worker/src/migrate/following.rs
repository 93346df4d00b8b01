//! The destination of a post-copy: memory that follows, from the state's arrival to its last page.
//!
//! Invariants: lazy memory is there before the state is set, which may touch pages that are not; if pages cannot come any
//! more, the guest ends as POSTCOPY_SOURCE_LOST before a missing page could be read as zero.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::runtime::Handle;

use super::{Thread, failed};
use crate::bitmap::PageBitmap;
use crate::dataplane::Received;
use crate::dataplane::postcopy::Pager;
use crate::error::WorkerError;
use crate::lazy::Faults;
use crate::machine::Machine;

/// See the module.
pub(super) struct Following {
    pager: Arc<Pager>,
    thread: Thread,
}

impl Following {
    /// Takes over the connection. `missing` is the bitmap of the state; `gone`: see [`Pager::new`]. Blocks until it has begun
    /// on a thread of the runtime: those that serve faults are confined from scratch, which this one's children could not be.
    pub(super) fn begin(
        id: &str,
        received: &mut Received,
        missing: &[u8],
        faults: Option<Faults>,
        gone: &Arc<AtomicBool>,
        machine: &Arc<Machine>,
        runtime: &Handle,
    ) -> Result<Self, WorkerError> {
        let pages = bitmap(missing, machine.memory().pages())?;
        let faults = faults.ok_or(WorkerError::BadState {
            field: "VmState.missing_pages",
            problem: "pages are left for later, and this destination has offered no protocol that has that"
                .to_owned(),
        })?;
        let pager = Pager::new(Arc::clone(gone)).map_err(|e| failed(id, &e))?;
        let (conn, door, round) = received.take_pages().map_err(|e| failed(id, &e))?;
        let (id, machine, source) = (id.to_owned(), Arc::clone(machine), Arc::clone(&pager));
        let begun = runtime.spawn_blocking(move || {
            let told = Arc::clone(&source);
            let told = Box::new(move |complete| told.over(complete));
            let placer = machine.begin_postcopy(faults, pages, Arc::clone(&source) as _, told)?;
            Thread::spawn("vpmud-pages", move || {
                if let Err(error) = source.run(conn, &door, round, &placer) {
                    tracing::error!(migration = id, %error, "the rest of the memory does not come");
                }
            })
        });
        let thread = runtime.block_on(begun).map_err(|e| WorkerError::Thread {
            thread: "vpmud-pages".to_owned(),
            problem: e.to_string(),
        })??;
        Ok(Self { pager, thread })
    }

    /// The state is set.
    pub(super) fn applied(&self) {
        self.pager.applied();
    }

    /// The state could not be set: the source is told why.
    pub(super) fn reject(&self, why: &str, runtime: &Handle) {
        self.pager.reject(why);
        self.wait(runtime);
    }

    /// Until the last page is there, or none will come.
    pub(super) fn wait(&self, runtime: &Handle) {
        runtime.block_on(self.thread.joined());
    }
}

fn bitmap(bytes: &[u8], pages: u64) -> Result<PageBitmap, WorkerError> {
    let bad = |problem: String| WorkerError::BadState { field: "VmState.missing_pages", problem };
    if bytes.len() as u64 != pages.div_ceil(64) * 8 {
        return Err(bad(format!("{} bytes do not fit {pages} pages", bytes.len())));
    }
    let words: Vec<u64> = bytes
        .chunks_exact(8)
        .map(|word| word.iter().rev().fold(0, |all, byte| all << 8 | u64::from(*byte)))
        .collect();
    let used = pages % 64;
    if used != 0 && words.last().is_some_and(|last| last >> used != 0) {
        return Err(bad("it names pages beyond the memory".to_owned()));
    }
    let mut bitmap = PageBitmap::new(pages);
    bitmap.or_words(0, &words);
    Ok(bitmap)
}

/// A bitmap as it travels.
pub(super) fn to_bytes(pages: &PageBitmap) -> Vec<u8> {
    pages.words().iter().flat_map(|word| word.to_le_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bitmaps_travel_and_bad_ones_are_refused() {
        let mut pages = PageBitmap::new(1536);
        for page in [0, 63, 64, 1000, 1535] {
            pages.set(page);
        }
        let bytes = to_bytes(&pages);
        assert_eq!(bitmap(&bytes, 1536).expect("good").words(), pages.words());
        assert!(bitmap(&bytes[8..], 1536).is_err());
        assert!(bitmap(&bytes, 1600).is_err());
        let mut beyond = vec![0; 16];
        beyond[15] = 0x80;
        assert!(bitmap(&beyond, 100).is_err());
        assert!(bitmap(&beyond, 128).is_ok());
    }
}
