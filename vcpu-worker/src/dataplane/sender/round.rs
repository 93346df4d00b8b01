//! One round on one connection: take work, look for zero pages, fill frames.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

use super::super::cancel::CancelFlag;
use super::super::compress::Packer;
use super::super::conn::Conn;
use super::super::error::{DataplaneError, Result};
use super::super::frame::{
    HEADER_BYTES, Kind, MAX_RANGES, PAGE_BYTES, PageRange, RoundCounts, encode_ranges,
};
use super::super::limiter::Limiter;
use super::{SendProgress, page_bytes};
use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;

/// Bytes of pages in a frame: the bounce buffer stays in the second-level cache between copy, sum and send.
const CHUNK_BYTES: u64 = 256 << 10;
/// Most pages of a `Zero` frame.
const MAX_ZERO_PAGES: u64 = 1 << 20;
/// Most pages that a thread takes at once.
const MAX_UNIT: u64 = 1024;

/// Bytes of a frame but its pages.
fn frame_bytes(ranges: usize) -> u64 {
    (HEADER_BYTES + ranges * 8) as u64
}

/// The pages of a round, handed out in ascending order in pieces small enough that threads end together.
pub(super) struct Work<I> {
    left: Mutex<(I, Option<(u64, u64)>)>,
    unit: u64,
}

impl<I: Iterator<Item = (u64, u64)>> Work<I> {
    pub(super) fn new(runs: I, pages: u64, threads: u64) -> Self {
        Self { left: Mutex::new((runs, None)), unit: (pages / (threads * 8).max(1)).clamp(16, MAX_UNIT) }
    }

    /// Fills `unit` with the next runs; false when nothing is left.
    fn take(&self, unit: &mut Vec<(u64, u64)>) -> bool {
        unit.clear();
        let mut want = self.unit;
        let (runs, rest) = &mut *self.left.lock();
        while want > 0 {
            let Some((first, len)) = rest.take().or_else(|| runs.next()) else { break };
            let here = len.min(want);
            unit.push((first, here));
            want -= here;
            if here < len {
                *rest = Some((first + here, len - here));
            }
        }
        !unit.is_empty()
    }
}

/// What one connection did in a round.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Tally {
    pub(super) counts: RoundCounts,
    /// Zero pages that needed no frame.
    pub(super) skipped: u64,
}

/// What the connections of a round share.
pub(super) struct Round<'a> {
    pub(super) number: u32,
    pub(super) live: bool,
    pub(super) memory: &'a GuestMemory,
    pub(super) resident: Option<&'a PageBitmap>,
    pub(super) sent: &'a [AtomicU64],
    pub(super) limiter: &'a Limiter,
    pub(super) progress: &'a SendProgress,
    pub(super) failed: AtomicBool,
}

/// Pages collected for the next frame of a kind.
#[derive(Default)]
struct Batch {
    ranges: Vec<PageRange>,
    pages: u64,
}

impl Batch {
    fn push(&mut self, page: u64) {
        self.pages += 1;
        match self.ranges.last_mut() {
            Some(last) if last.end() == page => last.pages += 1,
            _ => self.ranges.push(PageRange { first: page, pages: 1 }),
        }
    }

    fn clear(&mut self) {
        self.ranges.clear();
        self.pages = 0;
    }
}

impl Round<'_> {
    fn sent_bit(&self, page: u64) -> Option<(&AtomicU64, u64)> {
        Some((self.sent.get(usize::try_from(page / 64).ok()?)?, 1 << (page % 64)))
    }

    fn was_sent(&self, page: u64) -> bool {
        self.sent_bit(page).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn mark(&self, ranges: &[PageRange], sent: bool) {
        for page in ranges.iter().flat_map(|range| range.first..range.end()) {
            // Relaxed: within a round a page belongs to one thread, and rounds are joined.
            match self.sent_bit(page) {
                Some((word, bit)) if sent => word.fetch_or(bit, Ordering::Relaxed),
                Some((word, bit)) => word.fetch_and(!bit, Ordering::Relaxed),
                None => 0,
            };
        }
    }

    fn is_zero(&self, page: u64) -> Result<bool> {
        if self.resident.is_some_and(|resident| !resident.get(page)) {
            return Ok(true);
        }
        Ok(self.memory.is_zero(page_bytes(page), PAGE_BYTES)?)
    }

    /// Sends pages until no work is left.
    pub(super) fn send<I>(&self, conn: &mut Conn, packer: &mut Packer, work: &Work<I>) -> Result<Tally>
    where
        I: Iterator<Item = (u64, u64)>,
    {
        let chunk_pages = self.limiter.chunk_bytes(CHUNK_BYTES) / PAGE_BYTES;
        let mut tally = Tally::default();
        let (mut unit, mut full, mut zero) = (Vec::new(), Batch::default(), Batch::default());
        while work.take(&mut unit) {
            if conn.cancel().is_cancelled() {
                return Err(DataplaneError::Cancelled);
            }
            if self.failed.load(Ordering::Relaxed) {
                return Err(DataplaneError::Closed {
                    what: "another connection failed",
                    connection: conn.index(),
                });
            }
            for page in unit.iter().flat_map(|(first, len)| *first..first + len) {
                if !self.is_zero(page)? {
                    full.push(page);
                    if full.pages >= chunk_pages {
                        self.flush_pages(conn, packer, &mut full, &mut tally)?;
                    }
                } else if self.was_sent(page) {
                    zero.push(page);
                    // Not more than one word can name, so that a range is always one word.
                    if zero.ranges.len() >= MAX_RANGES || zero.pages >= MAX_ZERO_PAGES {
                        self.flush_zero(conn, &mut zero, &mut tally)?;
                    }
                } else {
                    tally.skipped += 1;
                }
            }
            let done = unit.iter().map(|(_, len)| len).sum();
            self.progress.round_done.fetch_add(done, Ordering::Relaxed);
        }
        self.flush_pages(conn, packer, &mut full, &mut tally)?;
        self.flush_zero(conn, &mut zero, &mut tally)?;
        Ok(tally)
    }

    /// Waits for the turn of `bytes`.
    fn turn(&self, cancel: &CancelFlag, bytes: u64) -> Result<()> {
        if self.limiter.acquire(bytes, cancel) { Err(DataplaneError::Cancelled) } else { Ok(()) }
    }

    fn flush_pages(
        &self,
        conn: &mut Conn,
        packer: &mut Packer,
        batch: &mut Batch,
        tally: &mut Tally,
    ) -> Result<()> {
        if batch.pages == 0 {
            return Ok(());
        }
        let cancel = conn.cancel().clone();
        let bytes = if packer.is_on() {
            conn.send_packed_pages(self.number, &batch.ranges, self.memory, packer, |bytes| {
                self.turn(&cancel, bytes)
            })?
        } else {
            self.turn(&cancel, frame_bytes(batch.ranges.len()) + page_bytes(batch.pages))?;
            let send = if self.live { Conn::send_copied_pages } else { Conn::send_guest_pages };
            send(conn, self.number, &batch.ranges, self.memory)?
        };
        self.progress.page_bytes.fetch_add(page_bytes(batch.pages), Ordering::Relaxed);
        self.progress.page_wire_bytes.fetch_add(bytes, Ordering::Relaxed);
        self.mark(&batch.ranges, true);
        tally.counts.frames += 1;
        tally.counts.pages += batch.pages;
        self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
        batch.clear();
        Ok(())
    }

    fn flush_zero(&self, conn: &mut Conn, batch: &mut Batch, tally: &mut Tally) -> Result<()> {
        if batch.pages == 0 {
            return Ok(());
        }
        let mut meta = Vec::with_capacity(batch.ranges.len() * 8);
        encode_ranges(&batch.ranges, &mut meta);
        let cancel = conn.cancel().clone();
        self.turn(&cancel, frame_bytes(batch.ranges.len()))?;
        let bytes = conn.send(Kind::Zero, self.number, 0, batch.pages as u32, &meta, &[])?;
        self.mark(&batch.ranges, false);
        tally.counts.frames += 1;
        tally.counts.zero_pages += batch.pages;
        self.progress.bytes.fetch_add(bytes, Ordering::Relaxed);
        batch.clear();
        Ok(())
    }
}
