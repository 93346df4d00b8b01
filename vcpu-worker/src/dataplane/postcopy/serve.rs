//! The source's side: gives out the pages of a sealed guest until the destination has all of them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::address::DataAddress;
use super::super::conn::Conn;
use super::super::error::{DataplaneError, Result};
use super::super::frame::{FLAG_MORE, FLAG_RESUME, HEADER_BYTES, Kind, PAGE_BYTES, PageRange, encode_ranges};
use super::super::sender::{ConnectOptions, Outgoing, page_bytes};
use super::super::{CancelFlag, SessionId};
use super::{CHUNK_PAGES, SLICE, is_lost};
use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;

/// Pages that the destination has not got.
#[derive(Debug)]
pub struct Left {
    pages: PageBitmap,
    count: u64,
    /// Where the background goes on.
    cursor: u64,
}

impl Left {
    /// All of `pages`.
    pub fn new(pages: PageBitmap) -> Self {
        Self { count: pages.count(), pages, cursor: 0 }
    }

    /// Which.
    pub fn pages(&self) -> &PageBitmap {
        &self.pages
    }

    /// How many.
    pub fn count(&self) -> u64 {
        self.count
    }

    fn take(&mut self, page: u64) -> bool {
        let there = self.pages.get(page);
        if there {
            self.pages.clear(page);
            self.count -= 1;
        }
        there
    }

    /// The next pages of the background, taken.
    fn next(&mut self, most: u64) -> Vec<u64> {
        let total = self.pages.pages();
        let mut taken = Vec::new();
        for _ in 0..total {
            if self.count == 0 || taken.len() as u64 >= most {
                break;
            }
            let page = self.cursor;
            self.cursor = (self.cursor + 1) % total;
            if self.take(page) {
                taken.push(page);
            }
        }
        taken
    }

    fn resume(&mut self, ranges: &[PageRange], first: bool) {
        if first {
            self.pages.clear_all();
        }
        for range in ranges {
            self.pages.set_range(range.first, range.pages);
        }
        self.count = self.pages.count();
    }
}

/// How far to serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Until {
    /// The state is set, by then; meanwhile only what is wanted goes.
    Applied(Instant),
    /// The destination has everything.
    Drained {
        /// The connection is a new one: the destination first says what is missing.
        resumed: bool,
    },
}

impl Outgoing {
    /// After [`Self::finish`] with a state that names missing pages. Guest memory must not change any more.
    ///
    /// # Errors
    /// Any. Which pages have arrived is then known to the destination alone: [`Self::reopen`].
    pub fn serve(&mut self, left: &mut Left, until: Until) -> Result<()> {
        let result = self.serve_until(left, until);
        match (result, self.conns.first_mut()) {
            // A destination that gives up says so, then closes; what it says may lie behind a broken pipe.
            (Err(error), Some(conn)) if is_lost(&error) => Err(conn.find_refusal(REASON).unwrap_or(error)),
            (result, _) => result,
        }
    }

    fn serve_until(&mut self, left: &mut Left, until: Until) -> Result<()> {
        let (memory, limiter, round) = (self.memory.clone(), &self.limiter, self.round.saturating_add(1));
        let (cancel, idle) = (self.cancel.clone(), self.timeouts.idle);
        let (progress, before) = (Arc::clone(&self.progress), self.closed_bytes);
        let conn = self.conns.first_mut().ok_or(DataplaneError::Connections(0))?;
        let background = matches!(until, Until::Drained { .. });
        let (mut resuming, mut first) = (until == Until::Drained { resumed: true }, true);
        let (mut heard, mut ranges) = (Instant::now(), Vec::new());
        loop {
            if cancel.is_cancelled() {
                return Err(DataplaneError::Cancelled);
            }
            progress.left.store(left.count(), Ordering::Relaxed);
            progress.bytes.store(before + conn.bytes_out, Ordering::Relaxed);
            let push = background && !resuming && left.count() > 0;
            if conn.is_readable(if push { Duration::ZERO } else { SLICE })? {
                heard = Instant::now();
                let header = conn.recv_header("serving pages", idle)?;
                conn.recv_meta(&header, memory.pages(), &mut ranges)?;
                match header.kind {
                    Kind::Want if header.flags & FLAG_RESUME != 0 && resuming => {
                        left.resume(&ranges, std::mem::take(&mut first));
                        resuming = header.flags & FLAG_MORE != 0;
                    }
                    Kind::Want if header.flags == 0 && header.round == round && !resuming => {
                        // What is on its way already is not sent twice. At most MAX_WANTED: the header was checked.
                        let wanted = ranges.iter().flat_map(|range| range.first..range.end());
                        let wanted: Vec<u64> = wanted.filter(|page| left.take(*page)).collect();
                        for pages in wanted.chunks(CHUNK_PAGES as usize) {
                            // A guest waits for these: they go at once, and the background pays.
                            limiter.charge(send(conn, &memory, round, pages)?);
                        }
                        if let Some(last) = wanted.last() {
                            left.cursor = (last + 1) % memory.pages();
                        }
                    }
                    Kind::Applied if !background => return Ok(()),
                    Kind::Drained if background && !resuming => {
                        // Best effort: a destination that does not hear it asks once more, then goes by itself.
                        let _ = conn.send(Kind::Drained, round, 0, 0, &[], &[]);
                        progress.left.store(0, Ordering::Relaxed);
                        return Ok(());
                    }
                    kind => return Err(conn.order(kind, "Want, then Applied, then Drained were expected")),
                }
            } else if push {
                heard = Instant::now();
                let most = limiter.chunk_bytes(page_bytes(CHUNK_PAGES)) / PAGE_BYTES;
                let pages = left.next(most.max(1));
                if limiter.acquire(page_bytes(pages.len() as u64) + HEADER_BYTES as u64, &cancel) {
                    return Err(DataplaneError::Cancelled);
                }
                send(conn, &memory, round, &pages)?;
            } else if let Until::Applied(by) = until
                && Instant::now() >= by
            {
                let what = "waiting until the destination has set the state";
                return Err(DataplaneError::Timeout { what, after: heard.elapsed() });
            } else if heard.elapsed() > idle {
                return Err(DataplaneError::Timeout { what: "waiting for the destination", after: idle });
            }
        }
    }

    /// Opens connection 0 anew after it broke, for as long as the destination may hope for it.
    ///
    /// # Errors
    /// The last attempt's; `Order` if the destination speaks another protocol now.
    pub fn reopen(
        &mut self,
        address: &DataAddress,
        session: &SessionId,
        cancel: &CancelFlag,
        options: &ConnectOptions,
    ) -> Result<()> {
        self.closed_bytes = self.bytes();
        self.conns.clear();
        let until = Instant::now() + options.timeouts.recover * 2;
        loop {
            let brief =
                ConnectOptions { connections: 1, deadline: Duration::from_secs(5), ..options.clone() };
            match Self::open(address, session, self.memory.clone(), cancel.clone(), brief) {
                Ok(fresh) if fresh.version() < Kind::Want.since() => {
                    return Err(DataplaneError::Usage("the destination came back with an older protocol"));
                }
                Ok(fresh) => {
                    (self.conns, self.packers) = (fresh.conns, fresh.packers);
                    self.failed = false;
                    return Ok(());
                }
                Err(DataplaneError::Cancelled) => return Err(DataplaneError::Cancelled),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(error) => tracing::debug!(%error, "the destination is not reached again yet"),
            }
            if cancel.wait(AGAIN) {
                return Err(DataplaneError::Cancelled);
            }
        }
    }
}

/// How long a lost destination's own words are looked for.
const REASON: Duration = Duration::from_millis(300);

/// Between two attempts to come back.
const AGAIN: Duration = Duration::from_millis(200);

/// Sends pages, those that are zero by name only; returns the bytes.
fn send(conn: &mut Conn, memory: &GuestMemory, round: u32, pages: &[u64]) -> Result<u64> {
    let (mut full, mut zero): (Vec<PageRange>, Vec<PageRange>) = (Vec::new(), Vec::new());
    let mut sorted = pages.to_vec();
    sorted.sort_unstable();
    for page in sorted {
        let is_zero = memory.is_zero(page_bytes(page), PAGE_BYTES)?;
        let list = if is_zero { &mut zero } else { &mut full };
        match list.last_mut() {
            Some(last) if last.end() == page => last.pages += 1,
            _ => list.push(PageRange { first: page, pages: 1 }),
        }
    }
    let mut bytes = 0;
    if !full.is_empty() {
        bytes += conn.send_guest_pages(round, &full, memory)?;
    }
    if !zero.is_empty() {
        let mut meta = Vec::new();
        encode_ranges(&zero, &mut meta);
        let count = zero.iter().map(|range| range.pages).sum::<u64>() as u32;
        bytes += conn.send(Kind::Zero, round, 0, count, &meta, &[])?;
    }
    Ok(bytes)
}
