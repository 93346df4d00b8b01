//! What one receiver thread does with its connection.
//!
//! ```text
//! InRound(r) --Pages|Zero of r--> InRound(r) --RoundEnd(r), counts equal, all meet--> Between(r)
//! Between(r) --Pages|Zero|RoundEnd of r+1--> InRound(r+1)
//! Between(r) --State, connection 0--> Between(r)      Between(r) --Done, totals equal--> end
//! anything else: Order
//! ```

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::cancel::CancelFlag;
use super::super::conn::{Conn, Timeouts};
use super::super::error::{DataplaneError, Result};
use super::super::frame::{DoneTotals, FLAG_ACK, Header, Kind, PageRange, RoundCounts, StateChunk};
use super::super::sender::page_bytes;
use super::compare;
use super::gate::Gate;
use crate::memory::GuestMemory;

/// How a connection ended well.
pub(super) struct Outcome {
    /// All rounds.
    pub(super) counts: RoundCounts,
    /// Connection 0: the state and the source's totals.
    pub(super) last: Option<(Vec<u8>, DoneTotals)>,
}

/// What the threads share.
pub(super) struct Receiver<'a> {
    pub(super) memory: &'a GuestMemory,
    pub(super) cancel: &'a CancelFlag,
    pub(super) progress: &'a AtomicU64,
    pub(super) timeouts: Timeouts,
    pub(super) gate: &'a Gate,
}

/// Where one connection stands.
#[derive(Default)]
struct Stand {
    /// Rounds ended.
    rounds: u32,
    round: RoundCounts,
    all: RoundCounts,
    state: Vec<u8>,
    state_total: Option<u64>,
    ranges: Vec<PageRange>,
}

impl Receiver<'_> {
    /// Receives until `Done`. None: this thread or another failed, and the gate knows why.
    pub(super) fn run(&self, conn: &mut Conn) -> Option<Outcome> {
        let mut stand = Stand::default();
        loop {
            match self.frame(conn, &mut stand) {
                Ok(None) => {}
                Ok(Some(done)) => {
                    let last = (conn.index() == 0).then_some((stand.state, done));
                    return Some(Outcome { counts: stand.all, last });
                }
                Err(error) => {
                    self.gate.fail(error);
                    return None;
                }
            }
        }
    }

    fn frame(&self, conn: &mut Conn, stand: &mut Stand) -> Result<Option<DoneTotals>> {
        if self.cancel.is_cancelled() {
            return Err(DataplaneError::Cancelled);
        }
        if self.gate.has_failed() {
            // The gate keeps the first error; this one is never seen.
            return Err(DataplaneError::Closed {
                what: "another connection failed",
                connection: conn.index(),
            });
        }
        let before = conn.bytes_in;
        let header = conn.recv_header("receiving", self.timeouts.idle)?;
        let done = match header.kind {
            Kind::Pages | Kind::Packed | Kind::Zero => self.pages(conn, &header, stand).map(|()| None),
            Kind::RoundEnd => self.round_end(conn, &header, stand).map(|()| None),
            Kind::State => state(conn, &header, stand).map(|()| None),
            Kind::Done => done(conn, &header, stand).map(Some),
            Kind::Hello => Err(conn.order(Kind::Hello, "this connection was introduced already")),
            other => Err(conn.order(other, "this kind goes the other way")),
        }?;
        self.progress.fetch_add(conn.bytes_in - before, Ordering::Relaxed);
        Ok(done)
    }

    fn pages(&self, conn: &mut Conn, header: &Header, stand: &mut Stand) -> Result<()> {
        in_round(conn, header, stand)?;
        if !stand.state.is_empty() {
            return Err(conn.order(header.kind, "pages after the state"));
        }
        conn.recv_meta(header, self.memory.pages(), &mut stand.ranges)?;
        stand.round.frames += 1;
        if header.kind != Kind::Zero {
            stand.round.pages += u64::from(header.count);
            // In the first round no page can have been written before.
            let receive = if header.round == 1 { Conn::recv_fresh_pages } else { Conn::recv_guest_pages };
            return receive(conn, header, &stand.ranges, self.memory);
        }
        stand.round.zero_pages += u64::from(header.count);
        for range in &stand.ranges {
            self.memory.discard(page_bytes(range.first), page_bytes(range.pages))?;
        }
        Ok(())
    }

    fn round_end(&self, conn: &mut Conn, header: &Header, stand: &mut Stand) -> Result<()> {
        in_round(conn, header, stand)?;
        if !stand.state.is_empty() {
            return Err(conn.order(header.kind, "a round after the state"));
        }
        let counts = RoundCounts::decode(conn.recv_meta(header, 0, &mut stand.ranges)?);
        let counts = counts.map_err(|source| conn.frame_error(source))?;
        compare(conn.index(), &counts, &stand.round)?;
        stand.all.add(&counts);
        stand.round = RoundCounts::default();
        stand.rounds = header.round;
        if self.gate.meet() && conn.index() == 0 && header.flags & FLAG_ACK != 0 {
            conn.send(Kind::RoundAck, header.round, 0, 0, &[], &[])?;
        }
        Ok(())
    }
}

/// Refuses frames of a round that is over or not yet begun.
fn in_round(conn: &Conn, header: &Header, stand: &Stand) -> Result<()> {
    if Some(header.round) == stand.rounds.checked_add(1) {
        Ok(())
    } else {
        Err(conn.order(header.kind, "its round is not the present one"))
    }
}

fn between(conn: &Conn, header: &Header, stand: &Stand) -> Result<()> {
    if stand.rounds == 0 || stand.round != RoundCounts::default() {
        Err(conn.order(header.kind, "the round before it was not ended"))
    } else if header.round != stand.rounds {
        Err(conn.order(header.kind, "its round is not the last one"))
    } else {
        Ok(())
    }
}

fn state(conn: &mut Conn, header: &Header, stand: &mut Stand) -> Result<()> {
    between(conn, header, stand)?;
    if conn.index() != 0 {
        return Err(conn.order(header.kind, "state travels on connection 0"));
    }
    let chunk = StateChunk::decode(conn.recv_meta(header, 0, &mut stand.ranges)?);
    let chunk = chunk.map_err(|source| conn.frame_error(source))?;
    let have = stand.state.len() as u64;
    if *stand.state_total.get_or_insert(chunk.total) != chunk.total {
        return Err(conn.order(header.kind, "the size of the state changed"));
    }
    if chunk.offset != have || have + u64::from(header.data_len) > chunk.total {
        return Err(conn.order(header.kind, "the piece does not follow the one before it"));
    }
    conn.recv_data(header, &mut stand.state)
}

fn done(conn: &mut Conn, header: &Header, stand: &mut Stand) -> Result<DoneTotals> {
    between(conn, header, stand)?;
    let done = DoneTotals::decode(conn.recv_meta(header, 0, &mut stand.ranges)?);
    let done = done.map_err(|source| conn.frame_error(source))?;
    if done.rounds != stand.rounds {
        return Err(DataplaneError::Counts {
            what: "rounds",
            connection: conn.index(),
            sent: done.rounds.into(),
            received: stand.rounds.into(),
        });
    }
    if conn.index() != 0 {
        compare(conn.index(), &done.counts, &stand.all)?;
        return Ok(done);
    }
    let have = stand.state.len() as u64;
    if have == 0 || done.state_bytes != have || stand.state_total != Some(have) {
        return Err(DataplaneError::Counts {
            what: "state bytes",
            connection: 0,
            sent: done.state_bytes,
            received: have,
        });
    }
    Ok(done)
}
