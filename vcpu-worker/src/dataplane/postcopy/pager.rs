//! The destination's side: one thread that owns connection 0, asks for pages and has those placed that come.
//!
//! ```text
//! Serving ──every page there──▶ Drained sent ──echo──▶ end
//!    │  ▲                            │
//!    │  └── resumed ── Waiting ◀─────┴── connection lost
//!    │                   └── recover is over, or the source is known to be gone ──▶ failed (or the end, if every page is there)
//!    └── the peer lies, or the guest is given up here ──▶ failed, the source is told
//! ```

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::conn::Conn;
use super::super::error::{DataplaneError, Result};
use super::super::frame::{
    ErrorCode, FLAG_MORE, FLAG_RESUME, Header, Kind, MAX_RANGES, MAX_WANTED, PAGE_BYTES, PageRange,
    encode_ranges,
};
use super::super::receiver::{Door, handshake, linger};
use super::{SLICE, is_lost};
use crate::lazy::{LazyError, PageSource, Placer};

/// What others tell the thread. The source of lazy memory.
pub(crate) struct Pager {
    wanted: Mutex<VecDeque<PageRange>>,
    applied: AtomicBool,
    complete: AtomicBool,
    given_up: AtomicBool,
    /// The state could not be set, and why.
    refusal: Mutex<Option<String>>,
    bell: OwnedFd,
    /// The source will not come back.
    gone: Arc<AtomicBool>,
}

impl std::fmt::Debug for Pager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Pager")
    }
}

impl PageSource for Pager {
    fn fetch(
        &self,
        first: u64,
        pages: u64,
        _urgent: bool,
        _into: &Placer,
    ) -> std::result::Result<(), String> {
        self.wanted.lock().push_back(PageRange { first, pages });
        self.ring();
        Ok(())
    }
}

impl Pager {
    /// Nothing is asked yet. `gone` becomes true once the source is known to have ended: what its connection still has
    /// to give is taken, and then nothing is waited for.
    ///
    /// # Errors
    /// `Io` if the system gives no descriptor.
    pub(crate) fn new(gone: Arc<AtomicBool>) -> Result<Arc<Self>> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| DataplaneError::Io { what: "eventfd", source: errno.into() })?;
        Ok(Arc::new(Self {
            wanted: Mutex::default(),
            applied: AtomicBool::new(false),
            complete: AtomicBool::new(false),
            given_up: AtomicBool::new(false),
            refusal: Mutex::default(),
            bell,
            gone,
        }))
    }

    /// The state is set: the source is told.
    pub(crate) fn applied(&self) {
        self.applied.store(true, Ordering::Release);
        self.ring();
    }

    /// The memory's end: every page is there, or the guest is given up. The source is told, and the thread ends.
    pub(crate) fn over(&self, complete: bool) {
        let flag = if complete { &self.complete } else { &self.given_up };
        flag.store(true, Ordering::Release);
        self.ring();
    }

    /// The state could not be set: the source is told why, and the thread ends.
    pub(crate) fn reject(&self, why: &str) {
        *self.refusal.lock() = Some(why.to_owned());
        self.over(false);
    }

    /// Why it is not to go on, if it is not.
    fn ended(&self, door: &Door) -> Option<DataplaneError> {
        let given_up = self.given_up.load(Ordering::Acquire);
        let refusal = self.refusal.lock().take().filter(|_| given_up);
        match refusal {
            Some(message) => Some(DataplaneError::Refused { code: ErrorCode::NotApplied, message }),
            None => (given_up || door.cancel.is_cancelled()).then_some(DataplaneError::Cancelled),
        }
    }

    fn ring(&self) {
        // A bell that is full rings already.
        let _ = rustix::io::write(&self.bell, &1u64.to_ne_bytes());
    }

    fn is_complete(&self) -> bool {
        self.complete.load(Ordering::Acquire)
    }

    /// Body of the thread: until everything is there, or the source is lost for longer than its time-out.
    ///
    /// # Errors
    /// Why it was given up; the memory has been told.
    pub(crate) fn run(&self, conn: Conn, door: &Door, round: u32, placer: &Placer) -> Result<()> {
        let (mut conn, mut resumed) = (conn, false);
        loop {
            let serving = Serving { pager: self, conn: &mut conn, door, round, placer };
            let Err(error) = serving.run(resumed) else { return Ok(()) };
            // A peer that lies is not given another chance; one that went away is.
            let again = if is_lost(&error) && !door.cancel.is_cancelled() {
                tracing::warn!(%error, "the source of pages is lost; waiting for it to come back");
                // Whatever is left of it must not be mistaken for a connection that lives.
                conn.stream().shutdown(Shutdown::Both);
                self.reopened(door)
            } else {
                conn.send_error(&error);
                conn.stream().shutdown(Shutdown::Read);
                linger(std::slice::from_ref(&conn));
                Err(error)
            };
            match again {
                Ok(fresh) => (conn, resumed) = (fresh, true),
                // Everything came before the connection broke; the source finds out for itself.
                Err(_) if self.is_complete() => return Ok(()),
                Err(error) => {
                    let missing = placer.missing();
                    let page = missing.runs().next().map_or(0, |(first, _)| first);
                    let problem = error.to_string();
                    placer.fail(match error {
                        DataplaneError::Cancelled => {
                            LazyError::Abandoned { left: missing.count(), why: problem }
                        }
                        _ => LazyError::Source { page, problem },
                    });
                    return Err(error);
                }
            }
        }
    }

    fn reopened(&self, door: &Door) -> Result<Conn> {
        let until = Instant::now() + door.timeouts.recover;
        loop {
            if let Some(error) = self.ended(door) {
                return Err(error);
            }
            if self.gone.load(Ordering::Acquire) {
                return Err(DataplaneError::Gone);
            }
            let left = until.saturating_duration_since(Instant::now());
            match handshake::collect(door, 1, left.min(SLICE * 5)) {
                Ok(conns) => {
                    let conn = conns.into_iter().next().ok_or(DataplaneError::Connections(0))?;
                    if conn.version() < Kind::Want.since() {
                        return Err(conn.order(Kind::Hello, "its protocol has no pages for later"));
                    }
                    tracing::info!("the source of pages came back");
                    return Ok(conn);
                }
                Err(DataplaneError::Timeout { .. }) if !left.is_zero() => {}
                Err(DataplaneError::Timeout { what, .. }) => {
                    return Err(DataplaneError::Timeout { what, after: door.timeouts.recover });
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// One connection's life.
struct Serving<'a> {
    pager: &'a Pager,
    conn: &'a mut Conn,
    door: &'a Door,
    round: u32,
    placer: &'a Placer,
}

impl Serving<'_> {
    fn run(mut self, resumed: bool) -> Result<()> {
        let (mut applied, mut drained) = (resumed, false);
        if resumed {
            // Asked for again along with all the rest.
            self.pager.wanted.lock().clear();
            self.resume()?;
        }
        let (mut heard, mut ranges) = (Instant::now(), Vec::new());
        loop {
            if let Some(error) = self.pager.ended(self.door) {
                return Err(error);
            }
            if !applied && self.pager.applied.load(Ordering::Acquire) {
                self.tell(Kind::Applied)?;
                (applied, heard) = (true, Instant::now());
            }
            if applied && !drained && self.pager.is_complete() {
                self.tell(Kind::Drained)?;
                (drained, heard) = (true, Instant::now());
            }
            self.ask()?;
            if !self.wait()? {
                // The source sends without being asked; silence means that it is gone.
                let stall = self.door.timeouts.stall;
                if applied && heard.elapsed() > stall {
                    return Err(DataplaneError::Timeout { what: "waiting for pages", after: stall });
                }
                continue;
            }
            heard = Instant::now();
            let header = self.conn.recv_header("receiving pages", self.door.timeouts.stall)?;
            if drained && header.kind == Kind::Drained {
                return self.conn.recv_meta(&header, 0, &mut ranges).map(drop);
            }
            self.pages(&header, &mut ranges)?;
        }
    }

    fn pages(&mut self, header: &Header, ranges: &mut Vec<PageRange>) -> Result<()> {
        if !matches!(header.kind, Kind::Pages | Kind::Packed | Kind::Zero) || header.round != self.round {
            return Err(self.conn.order(header.kind, "pages of the round after the last were expected"));
        }
        self.conn.recv_meta(header, self.door.memory_bytes / PAGE_BYTES, ranges)?;
        let failed = |error: LazyError| DataplaneError::Thread(error.to_string());
        if header.kind == Kind::Zero {
            for range in &*ranges {
                self.placer.place_zero(range.first, range.pages).map_err(failed)?;
            }
            return Ok(());
        }
        let placer = self.placer;
        self.conn.recv_through_buffer(header, ranges, |offset, piece| {
            placer.place(offset / PAGE_BYTES, piece).map_err(failed)
        })
    }

    fn tell(&mut self, kind: Kind) -> Result<()> {
        self.conn.send(kind, self.round, 0, 0, &[], &[]).map(drop)
    }

    /// Asks for what was wanted since.
    fn ask(&mut self) -> Result<()> {
        loop {
            let mut ranges: Vec<PageRange> = {
                let mut wanted = self.pager.wanted.lock();
                let most = wanted.len().min(MAX_WANTED as usize / 8);
                wanted.drain(..most).collect()
            };
            if ranges.is_empty() {
                return Ok(());
            }
            // The wire wants them ascending and apart.
            ranges.sort_unstable_by_key(|range| range.first);
            ranges.dedup_by(|next, last| {
                let overlap = next.first <= last.end();
                if overlap {
                    last.pages = last.end().max(next.end()) - last.first;
                }
                overlap
            });
            self.want(0, &ranges)?;
        }
    }

    fn want(&mut self, flags: u8, ranges: &[PageRange]) -> Result<()> {
        let mut meta = Vec::with_capacity(ranges.len() * 8);
        encode_ranges(ranges, &mut meta);
        let pages: u64 = ranges.iter().map(|range| range.pages).sum();
        let count = u32::try_from(pages).unwrap_or(u32::MAX);
        self.conn.send(Kind::Want, self.round, flags, count, &meta, &[]).map(drop)
    }

    /// Tells a source that came back what is still missing.
    fn resume(&mut self) -> Result<()> {
        const LONGEST: u64 = 1 << 18;
        let missing = self.placer.missing();
        let mut ranges: Vec<PageRange> = Vec::new();
        for (mut first, mut pages) in missing.runs() {
            while pages > 0 {
                let here = pages.min(LONGEST);
                ranges.push(PageRange { first, pages: here });
                (first, pages) = (first + here, pages - here);
            }
        }
        let mut frames = ranges.chunks(MAX_RANGES / 4).peekable();
        if frames.peek().is_none() {
            return self.want(FLAG_RESUME, &[]);
        }
        while let Some(frame) = frames.next() {
            let more = if frames.peek().is_some() { FLAG_MORE } else { 0 };
            self.want(FLAG_RESUME | more, frame)?;
        }
        Ok(())
    }

    /// Waits a moment for the connection or the bell; whether the connection has something.
    fn wait(&self) -> Result<bool> {
        if self.conn.stream().has_buffered() {
            return Ok(true);
        }
        let socket = self.conn.stream().as_fd();
        let mut fds = [PollFd::new(&socket, PollFlags::IN), PollFd::new(&self.pager.bell, PollFlags::IN)];
        let time = Timespec { tv_sec: 0, tv_nsec: SLICE.subsec_nanos().into() };
        match poll(&mut fds, Some(&time)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(DataplaneError::Io { what: "poll", source: errno.into() }),
        }
        let [socket, bell] = fds.map(|fd| !fd.revents().is_empty());
        if bell {
            let _ = rustix::io::read(&self.pager.bell, &mut [0; 8]);
        }
        Ok(socket)
    }
}
