//! What a session writes: records are put together and sealed in place, several of them before the socket is written to.
//!
//! Invariant: what was sealed goes out in its order and once, whichever write it takes.

use std::io::{self, Write as _};
use std::net::TcpStream;

use rustix::net::SendFlags;
use rustls::{ConnectionTrafficSecrets, Error};

use super::super::record::{Content, HEADER, RECORD, Sealer, TRAILER};
use super::invalid;

/// Records that are encrypted before they are written.
const OUT_RECORDS: usize = 16;

pub(super) struct Outgoing {
    pub(super) sealer: Sealer,
    /// Records that are to be written; their length is in `end`.
    pub(super) buf: Vec<u8>,
    pub(super) end: usize,
}

impl Outgoing {
    pub(super) fn new(sealer: Sealer) -> Self {
        Self { sealer, buf: Vec::new(), end: 0 }
    }

    /// Whether its key has encrypted as much as it may.
    pub(super) fn is_worn(&self) -> bool {
        self.sealer.is_worn()
    }

    /// Goes on with another key.
    pub(super) fn renew(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> Result<(), Error> {
        self.sealer.renew(secrets)
    }

    /// Where the next record is put together.
    pub(super) fn room(&mut self, tcp: &TcpStream) -> io::Result<&mut [u8]> {
        self.buf.resize(OUT_RECORDS * RECORD, 0);
        if !self.has_room() {
            self.flush(tcp)?;
        }
        Ok(self.buf.get_mut(self.end..self.end + RECORD).unwrap_or_default())
    }

    /// The record that was put together has this length, header and all.
    pub(super) fn seal(&mut self, content: Content, length: usize) -> io::Result<()> {
        let record = self.buf.get_mut(self.end..self.end + length).unwrap_or_default();
        self.sealer.seal(content, record).map_err(invalid)?;
        self.end += length;
        Ok(())
    }

    pub(super) fn put(&mut self, content: Content, message: &[u8], tcp: &TcpStream) -> io::Result<()> {
        let record = self.room(tcp)?;
        record.get_mut(HEADER..HEADER + message.len()).unwrap_or_default().copy_from_slice(message);
        self.seal(content, HEADER + message.len() + TRAILER)
    }

    /// Whether another record fits without one being written first.
    pub(super) fn has_room(&self) -> bool {
        self.end + RECORD <= OUT_RECORDS * RECORD
    }

    pub(super) fn flush(&mut self, mut tcp: &TcpStream) -> io::Result<()> {
        self.send(|records| tcp.write(records))
    }

    /// What the socket takes without a wait.
    pub(super) fn flush_at_once(&mut self, tcp: &TcpStream) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        // The rest stays: it is written first, should anything be.
        drop(self.send(|records| Ok(rustix::net::send(tcp, records, flags)?)));
    }

    fn send(&mut self, mut write: impl FnMut(&[u8]) -> io::Result<usize>) -> io::Result<()> {
        let mut sent = 0;
        let ended = loop {
            let records = self.buf.get(sent..self.end).unwrap_or_default();
            if records.is_empty() {
                break Ok(());
            }
            match write(records) {
                Ok(0) => break Err(io::ErrorKind::WriteZero.into()),
                Ok(taken) => sent += taken,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => break Err(error),
            }
        };
        let sent = sent.min(self.end);
        self.buf.copy_within(sent..self.end, 0);
        self.end -= sent;
        ended
    }
}
