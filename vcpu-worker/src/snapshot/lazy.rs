//! Serves a snapshot's pages to a guest that runs already.

use crate::lazy::{PageSource, Placer};

use super::read::Snapshot;

/// Pages to ask for in the background at once.
pub const PREFETCH_PAGES: u64 = super::CHUNK_PAGES;

impl PageSource for Snapshot {
    /// A chunk is read, verified and placed as a whole, since its checksum is over all of it.
    fn fetch(&self, first: u64, pages: u64, _urgent: bool, into: &Placer) -> Result<(), String> {
        let end = first.saturating_add(pages);
        let from = self.chunks().partition_point(|c| c.first + c.pages <= first);
        let mut buffer = Vec::new();
        for chunk in self.chunks()[from..].iter().take_while(|c| c.first < end) {
            if !(chunk.first..chunk.first + chunk.pages).any(|page| into.is_missing(page)) {
                continue;
            }
            self.read(chunk, &mut buffer).map_err(|e| format!("[{}] {e}", e.reason()))?;
            into.place(chunk.first, &buffer).map_err(|e| e.to_string())?;
        }
        Ok(())
    }
}
