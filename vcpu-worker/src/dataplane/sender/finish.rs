//! The end at the source: state, receipt, word that it was set; or giving up.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use super::super::error::{DataplaneError, Result};
use super::super::frame::{
    DoneTotals, Kind, MAX_DATA_BYTES, MAX_STATE_BYTES, Receipt, RoundCounts, StateChunk,
};
use super::super::receiver::compare;
use super::{FinishStats, Outgoing};

impl Outgoing {
    /// Sends the state after the last round and waits until the destination has counted everything.
    ///
    /// # Errors
    /// Any; without `Ok` the destination cannot have become ready with this digest.
    pub fn finish(&mut self, state: &[u8]) -> Result<FinishStats> {
        self.usable()?;
        let bytes = state.len() as u64;
        if bytes == 0 || bytes > MAX_STATE_BYTES {
            return Err(DataplaneError::StateSize { bytes });
        }
        if self.round == 0 {
            return Err(DataplaneError::Usage("no round was sent"));
        }
        let result = self.send_state(state);
        self.fail_on_error(result)
    }

    fn send_state(&mut self, state: &[u8]) -> Result<FinishStats> {
        let begin = Instant::now();
        let rounds = self.round;
        let mut total = RoundCounts::default();
        for (conn, counts) in self.conns.iter_mut().zip(&self.counts) {
            total.add(counts);
            if conn.index() != 0 {
                let done = DoneTotals { counts: *counts, rounds, ..DoneTotals::default() };
                conn.send(Kind::Done, rounds, 0, 0, &done.encode(), &[])?;
            }
        }
        let idle = self.timeouts.idle;
        let conn = self.first()?;
        let mut offset = 0;
        for data in state.chunks(MAX_DATA_BYTES as usize) {
            let chunk = StateChunk { offset, total: state.len() as u64 };
            conn.send(Kind::State, rounds, 0, 0, &chunk.encode(), data)?;
            offset += data.len() as u64;
        }
        // While the destination reads the state.
        let digest: [u8; 32] = Sha256::digest(state).into();
        let done = DoneTotals { counts: total, rounds, state_bytes: state.len() as u64, digest };
        conn.send(Kind::Done, rounds, 0, 0, &done.encode(), &[])?;
        let header = conn.recv_header("waiting for the destination's receipt", idle)?;
        if header.kind != Kind::Receipt {
            return Err(conn.order(header.kind, "Receipt was expected"));
        }
        let receipt = Receipt::decode(conn.recv_meta(&header, 0, &mut Vec::new())?);
        let receipt = receipt.map_err(|source| conn.frame_error(source))?;
        if receipt.digest != digest {
            return Err(DataplaneError::Digest);
        }
        compare(0, &total, &receipt.counts)?;
        self.finished = Some(digest);
        self.progress.bytes.store(self.bytes(), Ordering::Relaxed);
        Ok(FinishStats {
            digest,
            rounds,
            pages: total.pages,
            zero_pages: self.zero_pages,
            bytes: self.bytes(),
            elapsed: begin.elapsed(),
        })
    }

    /// After [`Self::finish`]: waits until the destination has set the state into its virtual machine.
    ///
    /// # Errors
    /// `Refused` with the destination's reason, `Timeout`, `Closed`, `Cancelled`. None of them says that the state was
    /// not set; only the control plane can find that out.
    pub fn await_applied(&mut self, deadline: Duration) -> Result<()> {
        if self.finished.is_none() {
            return Err(DataplaneError::Usage("the state was not sent yet"));
        }
        let conn = self.first()?;
        let header = conn.recv_header("waiting until the destination has set the state", deadline)?;
        if header.kind != Kind::Applied {
            return Err(conn.order(header.kind, "Applied was expected"));
        }
        conn.recv_meta(&header, 0, &mut Vec::new())?;
        Ok(())
    }

    /// Gives up and tells the destination so, as far as the connections still work.
    pub fn abort(mut self) {
        if !self.failed {
            for conn in &mut self.conns {
                conn.send_error(&DataplaneError::Cancelled);
            }
        }
    }
}
