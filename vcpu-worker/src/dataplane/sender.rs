//! The source's side: connections, rounds, the end.
//!
//! ```text
//! connect -> send_round* -> finish -> await_applied
//!      any error, or abort -> failed (every later call is refused)
//! ```
//!
//! Invariants: rounds are numbered 1, 2, ... without holes; every connection ends every round, also those that had
//! nothing to send; `sent` holds exactly the pages whose copy at the destination may be other than zero.

mod connect;
mod finish;
mod round;

pub use self::connect::ConnectOptions;

use std::net::Shutdown;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rustix::event::PollFlags;

use self::round::{Round, Tally, Work};
use super::address::wait_one;
use super::cancel::CancelFlag;
use super::compress::{Compression, Packer};
use super::conn::{Conn, Timeouts};
use super::error::{DataplaneError, Result};
use super::frame::{FLAG_ACK, Kind, PAGE_BYTES, RoundCounts};
use super::limiter::Limiter;
use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;

/// Below this many pages for each, a further thread costs more than it brings.
const PAGES_A_THREAD: u64 = 256;

/// How long a destination that closed one connection may take to say why. It ends with its answer or the end of the
/// connection; only a destination that does neither, on a machine loaded that much, costs all of it.
const REASON: Duration = Duration::from_secs(2);

/// What one round did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundStats {
    /// From 1.
    pub round: u32,
    /// Pages sent with content.
    pub pages: u64,
    /// Zero pages that cost nothing, or eight bytes a range.
    pub zero_pages: u64,
    /// Bytes on all connections, headers included.
    pub bytes: u64,
    /// From the call to the destination's acknowledgement (live), or to the last write (not live).
    pub elapsed: Duration,
}

/// What the whole migration did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FinishStats {
    /// SHA-256 over the state, the same on both sides.
    pub digest: [u8; 32],
    /// Rounds, final ones included.
    pub rounds: u32,
    /// Pages sent with content, counted each time.
    pub pages: u64,
    /// Zero pages not sent.
    pub zero_pages: u64,
    /// Bytes on all connections, state and headers included.
    pub bytes: u64,
    /// From the call to the receipt.
    pub elapsed: Duration,
}

/// Numbers that may be read while a round runs.
#[derive(Debug, Default)]
pub struct SendProgress {
    /// Bytes sent since the connections were opened.
    pub bytes: AtomicU64,
    /// The present round, from 1; 0 before the first.
    pub round: AtomicU32,
    /// Pages of the present round.
    pub round_pages: AtomicU64,
    /// Pages of the present round that were dealt with.
    pub round_done: AtomicU64,
    /// Bytes of pages that were sent, before compression.
    pub page_bytes: AtomicU64,
    /// What those took on the wire, headers included.
    pub page_wire_bytes: AtomicU64,
    /// Post-copy: pages that were not sent yet.
    pub left: AtomicU64,
}

/// The source's end of a migration. Blocking; for one driving thread.
#[derive(Debug)]
pub struct Outgoing {
    pub(super) conns: Vec<Conn>,
    counts: Vec<RoundCounts>,
    pub(super) packers: Vec<Packer>,
    compression: Compression,
    pub(super) memory: GuestMemory,
    pub(super) limiter: Limiter,
    pub(super) cancel: CancelFlag,
    pub(super) timeouts: Timeouts,
    sent: Vec<AtomicU64>,
    pub(super) round: u32,
    zero_pages: u64,
    pub(super) progress: Arc<SendProgress>,
    transport: &'static str,
    version: u16,
    pub(super) failed: bool,
    finished: Option<[u8; 32]>,
    /// On connections that broke and were opened anew.
    pub(super) closed_bytes: u64,
}

impl Outgoing {
    /// "unix", "tcp" or "tcp+tls".
    pub fn transport(&self) -> &'static str {
        self.transport
    }

    /// What is done to pages, as far as the destination understands it.
    pub fn compression(&self) -> Compression {
        self.compression
    }

    /// The protocol that both sides speak.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// Numbers to read from another thread while a round runs.
    pub fn progress(&self) -> Arc<SendProgress> {
        Arc::clone(&self.progress)
    }

    /// Bytes on all connections so far, both directions' headers included.
    pub fn bytes(&self) -> u64 {
        self.closed_bytes + self.conns.iter().map(|conn| conn.bytes_out).sum::<u64>()
    }

    /// Rounds sent so far.
    pub fn rounds(&self) -> u32 {
        self.round
    }

    fn usable(&self) -> Result<()> {
        if self.cancel.is_cancelled() {
            Err(DataplaneError::Cancelled)
        } else if self.failed {
            Err(DataplaneError::Usage("this migration's data plane has failed already"))
        } else if self.finished.is_some() {
            Err(DataplaneError::Usage("the state was sent already"))
        } else {
            Ok(())
        }
    }

    /// Sends the pages of `pages`. Rounds are numbered from 1. `live`: the guest may write meanwhile, and the dirty log
    /// must have been on since before the call (for round 1: since before the first call). With `live` false nothing
    /// may write guest memory until the call returns; the destination's acknowledgement is then not waited for.
    ///
    /// # Errors
    /// Any; after one the migration cannot go on and its pages count as not sent.
    pub fn send_round(&mut self, round: u32, pages: &PageBitmap, live: bool) -> Result<RoundStats> {
        self.usable()?;
        if Some(round) != self.round.checked_add(1) {
            return Err(DataplaneError::Usage("rounds are numbered 1, 2, ... without holes"));
        }
        if pages.pages() != self.memory.pages() {
            return Err(DataplaneError::Usage("the bitmap is of another memory size"));
        }
        self.round = round;
        let result = self.round(pages, live);
        self.fail_on_error(result)
    }

    fn round(&mut self, pages: &PageBitmap, live: bool) -> Result<RoundStats> {
        let begin = Instant::now();
        let before = self.bytes();
        let count = pages.count();
        self.progress.round_pages.store(count, Ordering::Relaxed);
        self.progress.round_done.store(0, Ordering::Relaxed);
        self.progress.round.store(self.round, Ordering::Relaxed);
        // Later rounds hold pages that were written, so they exist.
        let resident = if self.round == 1 && count > 0 { self.memory.resident_pages() } else { None };
        let threads = count.div_ceil(PAGES_A_THREAD).clamp(1, self.conns.len() as u64);
        let shared = Round {
            number: self.round,
            live,
            memory: &self.memory,
            resident: resident.as_ref(),
            sent: &self.sent,
            limiter: &self.limiter,
            progress: &self.progress,
            failed: AtomicBool::new(false),
        };
        let work = Work::new(pages.runs(), count, threads);
        let streams: Vec<_> = self.conns.iter().map(|conn| Arc::clone(conn.stream())).collect();
        let fail = |error| {
            shared.failed.store(true, Ordering::Relaxed);
            // Wakes writers that a destination which stopped reading would hold up. Reading stays open.
            for stream in &streams {
                stream.shutdown(Shutdown::Write);
            }
            error
        };
        let flags = if live { FLAG_ACK } else { 0 };
        let one = |(conn, packer): (&mut Conn, &mut Packer), busy: bool| -> Result<Tally> {
            let tally = if busy { shared.send(conn, packer, &work)? } else { Tally::default() };
            conn.send(Kind::RoundEnd, shared.number, flags, 0, &tally.counts.encode(), &[])?;
            Ok(tally)
        };
        let results: Vec<Result<Tally>> = std::thread::scope(|scope| {
            let mut all = self.conns.iter_mut().zip(&mut self.packers);
            let mut busy = all.by_ref().take(threads as usize);
            let own = busy.next();
            let spawned: Vec<_> = busy
                .map(|conn| {
                    let name = format!("vpmud-data-{}", conn.0.index());
                    std::thread::Builder::new()
                        .name(name)
                        .spawn_scoped(scope, || one(conn, true).map_err(fail))
                        .map_err(|error| fail(DataplaneError::Thread(error.to_string())))
                })
                .collect();
            let mut results: Vec<_> = own.into_iter().map(|conn| one(conn, true).map_err(fail)).collect();
            for thread in spawned {
                results.push(thread.and_then(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(fail(DataplaneError::Thread("a sender panicked".into()))))
                }));
            }
            results.extend(all.map(|conn| one(conn, false).map_err(fail)));
            results
        });
        let mut stats = RoundStats { round: self.round, ..RoundStats::default() };
        for (result, counts) in first_cause(results)?.into_iter().zip(&mut self.counts) {
            counts.add(&result.counts);
            stats.pages += result.counts.pages;
            stats.zero_pages += result.counts.zero_pages + result.skipped;
        }
        self.zero_pages += stats.zero_pages;
        if live {
            let (number, idle) = (self.round, self.timeouts.idle);
            let conn = self.first()?;
            let header = conn.recv_header("waiting for the end of a round at the destination", idle)?;
            if header.kind != Kind::RoundAck || header.round != number {
                return Err(conn.order(header.kind, "RoundAck of this round was expected"));
            }
            conn.recv_meta(&header, 0, &mut Vec::new())?;
        }
        stats.bytes = self.bytes() - before;
        stats.elapsed = begin.elapsed();
        Ok(stats)
    }

    /// Between rounds: the destination is still there. It says nothing then unless it gives up.
    ///
    /// # Errors
    /// Its reason, or `Closed`.
    pub fn check_peer(&mut self) -> Result<()> {
        self.usable()?;
        let what = "waiting for the order to finish";
        let stream = Arc::clone(self.first()?.stream());
        match wait_one(stream.as_fd(), PollFlags::IN, Duration::ZERO) {
            Ok(false) => Ok(()),
            Ok(true) => self.fail_on_error(Err(DataplaneError::Closed { what, connection: 0 })),
            Err(source) => self.fail_on_error(Err(DataplaneError::Io { what, source })),
        }
    }

    fn first(&mut self) -> Result<&mut Conn> {
        self.conns.first_mut().ok_or(DataplaneError::Connections(0))
    }

    /// Marks the migration failed and looks for the destination's own words, which say more than a closed socket.
    fn fail_on_error<T>(&mut self, result: Result<T>) -> Result<T> {
        let error = match result {
            Ok(value) => return Ok(value),
            Err(error) => error,
        };
        self.failed = true;
        let worth_asking = matches!(
            error,
            DataplaneError::Closed { .. } | DataplaneError::Io { .. } | DataplaneError::Timeout { .. }
        );
        let mut wait = REASON;
        for conn in &mut self.conns {
            if worth_asking && let Some(refusal) = conn.find_refusal(wait) {
                return Err(refusal);
            }
            // The destination sends its reason on all connections at once.
            wait = REASON / 20;
        }
        for conn in &self.conns {
            conn.stream().shutdown(Shutdown::Both);
        }
        Err(error)
    }

    /// Pages whose copy at the destination may be other than zero.
    #[doc(hidden)]
    pub fn sent_pages(&self) -> u64 {
        self.sent.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }
}

/// All values, or the error that came first in time as far as can be told: one that is not a mere consequence.
fn first_cause<T>(results: Vec<Result<T>>) -> Result<Vec<T>> {
    let mut values = Vec::with_capacity(results.len());
    let mut cause: Option<DataplaneError> = None;
    for result in results {
        match result {
            Ok(value) => values.push(value),
            Err(error) => {
                let consequence = matches!(error, DataplaneError::Closed { .. });
                if cause.is_none() || !consequence {
                    cause = Some(error);
                }
            }
        }
    }
    cause.map_or(Ok(values), Err)
}

/// Pages to bytes, for a caller that counts in pages.
pub(crate) const fn page_bytes(pages: u64) -> u64 {
    pages.saturating_mul(PAGE_BYTES)
}
