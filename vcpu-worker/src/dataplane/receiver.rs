//! The destination's side: a listener for one attempt of one migration, then receivers, then the state.
//!
//! ```text
//! bind -> run: [handshake: until n authenticated connections] -> [rounds, one thread a connection] -> Received
//!                    any error -> threads joined, the reason sent on every connection, typed error
//! Received: acknowledge -> Applied sent, then drop -> closed | reject -> Error sent, closed | drop -> closed
//! ```
//!
//! Invariants: guest memory is written only by authenticated connections, within checked ranges, and by nobody after
//! `run` returned; no connection starts a round before all have ended the one before, so that an older copy of a page
//! never follows a newer one; `Received` exists only if every count and the digest match. After `run`, connection 0
//! stays open for the answer alone: nothing reads from it any more, unless pages follow (`postcopy`).

mod gate;
pub(super) mod handshake;
mod rounds;

use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use self::gate::Gate;
pub(crate) use self::handshake::Door;
pub(super) use self::handshake::equal_in_constant_time;
use self::rounds::{Outcome, Receiver};
use super::address::{DataAddress, DataListener};
use super::cancel::CancelFlag;
use super::conn::{Conn, Timeouts};
use super::error::{DataplaneError, Result};
use super::frame::{ErrorCode, Kind, PAGE_BYTES, Receipt, RoundCounts};
use super::sender::page_bytes;
use super::tls::Tls;
use super::{PROTOCOL_VERSIONS, SessionId, check_connections};
use crate::memory::GuestMemory;

/// The destination's end, waiting.
#[derive(Debug)]
pub struct Incoming {
    pub(super) listener: DataListener,
    pub(super) session: SessionId,
    connections: u16,
    pub(super) memory: GuestMemory,
    pub(super) timeouts: Timeouts,
    tls: Option<Tls>,
    versions: RangeInclusive<u16>,
}

impl Incoming {
    /// Opens the listener. `memory` must be all zero: zero pages are not sent.
    ///
    /// # Errors
    /// `Connections`, `NotZero`, `Bind`.
    pub fn bind(
        address: &DataAddress,
        session: SessionId,
        connections: u16,
        memory: GuestMemory,
    ) -> Result<Self> {
        check_connections(connections)?;
        check_zero(&memory)?;
        let listener = DataListener::bind(address)?;
        Ok(Self {
            listener,
            session,
            connections,
            memory,
            timeouts: Timeouts::default(),
            tls: None,
            versions: PROTOCOL_VERSIONS,
        })
    }

    /// Takes TLS connections only, of the one peer that it names. Not for Unix sockets.
    #[must_use]
    pub fn with_tls(mut self, tls: Tls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Speaks these versions of the protocol only.
    #[must_use]
    pub fn with_versions(mut self, versions: RangeInclusive<u16>) -> Self {
        self.versions = versions;
        self
    }

    /// With other time-outs.
    #[must_use]
    pub fn with_timeouts(mut self, timeouts: Timeouts) -> Self {
        self.timeouts = timeouts;
        self
    }

    /// Where it listens, the port filled in.
    ///
    /// # Errors
    /// `Io`.
    pub fn local_address(&self) -> Result<DataAddress> {
        self.listener
            .local_address()
            .map_err(|source| DataplaneError::Io { what: "asking for the listener's address", source })
    }

    /// Receives everything. Blocks; on a thread of its own. `progress` counts bytes.
    ///
    /// # Errors
    /// Any. Guest memory then holds an unknown mixture and must be thrown away.
    pub fn run(self, cancel: CancelFlag, progress: &AtomicU64) -> Result<Received> {
        let tls = self.tls.as_ref().map(Tls::server).transpose()?;
        let (memory, timeouts) = (self.memory, self.timeouts);
        let door = Door {
            listener: self.listener,
            tls,
            session: self.session,
            memory_bytes: memory.bytes(),
            versions: self.versions,
            timeouts,
            cancel,
        };
        let mut conns = handshake::collect(&door, self.connections, timeouts.accept)?;
        // From here on nobody else may connect, and the path is free again; but for a source that will come back to
        // send the rest.
        let later = conns.first().is_some_and(|conn| conn.version() >= Kind::Want.since());
        let cancel = door.cancel.clone();
        let door = later.then_some(door);
        match receive(&mut conns, &memory, &cancel, progress, timeouts) {
            Ok(received) => {
                let Received { state, digest, counts, rounds, bytes, .. } = received;
                // Connections other than 0 close here.
                let conn = conns.into_iter().next();
                Ok(Received { state, digest, counts, rounds, bytes, conn, door, answered: false })
            }
            Err(error) => {
                for conn in &mut conns {
                    conn.send_error(&error);
                }
                if !matches!(error, DataplaneError::Closed { .. } | DataplaneError::Io { .. }) {
                    linger(&conns);
                }
                Err(error)
            }
        }
    }
}

/// The rounds of connections that were introduced elsewhere; for the fuzz targets.
pub(super) fn fuzzed(
    conns: &mut [Conn],
    memory: &GuestMemory,
    cancel: &CancelFlag,
    progress: &AtomicU64,
    timeouts: Timeouts,
) -> Result<Received> {
    receive(conns, memory, cancel, progress, timeouts)
}

/// Quick where it matters: a new memory has no page to look at.
fn check_zero(memory: &GuestMemory) -> Result<()> {
    let Some(resident) = memory.resident_pages() else { return Ok(()) };
    for (first, pages) in resident.runs() {
        for page in first..first + pages {
            if !memory.is_zero(page_bytes(page), PAGE_BYTES)? {
                return Err(DataplaneError::NotZero { page });
            }
        }
    }
    Ok(())
}

fn receive(
    conns: &mut [Conn],
    memory: &GuestMemory,
    cancel: &CancelFlag,
    progress: &AtomicU64,
    timeouts: Timeouts,
) -> Result<Received> {
    let gate = Gate::new(conns.iter().map(|conn| conn.stream().clone()).collect());
    let receiver = Receiver { memory, cancel, progress, timeouts, gate: &gate };
    let outcomes: Vec<Option<Outcome>> = std::thread::scope(|scope| {
        let mut conns = conns.iter_mut();
        let own = conns.next();
        let spawned: Vec<_> = conns
            .filter_map(|conn| {
                let name = format!("vpmud-recv-{}", conn.index());
                let receiver = &receiver;
                std::thread::Builder::new()
                    .name(name)
                    .spawn_scoped(scope, move || receiver.run(conn))
                    .map_err(|error| gate.fail(DataplaneError::Thread(error.to_string())))
                    .ok()
            })
            .collect();
        let mut outcomes: Vec<_> = own.into_iter().map(|conn| receiver.run(conn)).collect();
        for thread in spawned {
            outcomes.push(thread.join().unwrap_or_else(|_| {
                gate.fail(DataplaneError::Thread("a receiver panicked".into()));
                None
            }));
        }
        outcomes
    });
    if let Some(error) = gate.into_error() {
        return Err(error);
    }
    let mut counts = RoundCounts::default();
    let mut last = None;
    for outcome in outcomes {
        let outcome = outcome.ok_or_else(|| DataplaneError::Thread("a receiver ended early".into()))?;
        counts.add(&outcome.counts);
        last = last.or(outcome.last);
    }
    let (state, done) = last.ok_or_else(|| DataplaneError::Thread("no state".into()))?;
    compare(0, &done.counts, &counts)?;
    let digest: [u8; 32] = Sha256::digest(&state).into();
    if digest != done.digest {
        return Err(DataplaneError::Digest);
    }
    let first = conns.first_mut().ok_or(DataplaneError::Connections(0))?;
    first.send(Kind::Receipt, done.rounds, 0, 0, &Receipt { counts, digest }.encode(), &[])?;
    let bytes = conns.iter().map(|conn| conn.bytes_in).sum();
    Ok(Received {
        state,
        digest,
        counts,
        rounds: done.rounds,
        bytes,
        conn: None,
        door: None,
        answered: false,
    })
}

/// Everything arrived. Keeps connection 0 for the answer; dropping it unanswered shows the source a closed connection.
#[derive(Debug)]
pub struct Received {
    /// The state as the source gave it.
    pub state: Vec<u8>,
    /// SHA-256 over it.
    pub digest: [u8; 32],
    /// Frames and pages over all rounds and connections.
    pub counts: RoundCounts,
    /// Rounds.
    pub rounds: u32,
    /// Bytes on all connections, headers included.
    pub bytes: u64,
    conn: Option<Conn>,
    door: Option<Door>,
    answered: bool,
}

impl Received {
    /// Tells the source that the state was set into the virtual machine. Dropping this closes the data plane, which can
    /// wait: the source's guest stands still.
    ///
    /// # Errors
    /// If it could not be sent. The state stays set: the control plane decides.
    pub fn acknowledge(&mut self) -> Result<()> {
        let answered = std::mem::replace(&mut self.answered, true);
        let conn = self.conn.as_mut().filter(|_| !answered);
        let conn = conn.ok_or(DataplaneError::Usage("the source was answered already"))?;
        conn.send(Kind::Applied, self.rounds, 0, 0, &[], &[])?;
        conn.stream().shutdown(Shutdown::Write);
        Ok(())
    }

    /// Tells the source that the state could not be set, and why; then the data plane is closed.
    pub fn reject(&mut self, why: &str) {
        self.door = None;
        if let Some(mut conn) = self.conn.take().filter(|_| !self.answered) {
            conn.send_error(&DataplaneError::Refused { code: ErrorCode::NotApplied, message: why.into() });
        }
    }
}

impl Received {
    /// The connection on which pages still come, instead of an answer now, and the round that they are of.
    ///
    /// # Errors
    /// `Usage` once it was answered; `Order` if the source speaks a protocol without them.
    pub(crate) fn take_pages(&mut self) -> Result<(Conn, Door, u32)> {
        match (self.conn.take().filter(|_| !self.answered), self.door.take()) {
            (Some(conn), Some(door)) => Ok((conn, door, self.rounds.saturating_add(1))),
            (Some(conn), None) => {
                let error = conn.order(Kind::State, "it leaves pages for later, which this protocol has not");
                self.conn = Some(conn);
                Err(error)
            }
            _ => Err(DataplaneError::Usage("the source was answered already")),
        }
    }
}

/// Compares what the source says with what the destination saw.
pub(super) fn compare(connection: u16, sent: &RoundCounts, received: &RoundCounts) -> Result<()> {
    for (what, sent, received) in [
        ("frames", sent.frames, received.frames),
        ("pages", sent.pages, received.pages),
        ("zero pages", sent.zero_pages, received.zero_pages),
    ] {
        if sent != received {
            return Err(DataplaneError::Counts { what, connection, sent, received });
        }
    }
    Ok(())
}

/// Reads on for a moment, to nowhere: closing a TCP socket with unread bytes resets it, and a reset may overtake the
/// reason that was just sent. After that it is reset on purpose.
pub(super) fn linger(conns: &[Conn]) {
    let mut nowhere = vec![0; 64 << 10];
    let until = Instant::now() + LINGER;
    while Instant::now() < until {
        for conn in conns {
            // Reading was shut down, so this never blocks: bytes that came meanwhile, or zero.
            while Instant::now() < until && matches!(conn.stream().discard(&mut nowhere), Ok(1..)) {}
        }
        std::thread::sleep(LINGER / 20);
    }
    for conn in conns {
        conn.stream().reset_on_close();
    }
}

/// How long a failed destination keeps its sockets, so that the source can read why.
const LINGER: Duration = Duration::from_millis(100);
/// How long a refused stranger may take to read why.
const REFUSAL: Duration = Duration::from_millis(200);
