//! A TLS session over a TCP socket, blocking or not as the socket is.
//!
//! Bytes are read from the socket in large pieces: rustls alone would ask for 4 KiB at a time. One thread at a time
//! reads or writes; others only shut the socket down, which needs no lock and wakes whoever waits in it.

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};

use parking_lot::Mutex;
use rustls::Connection;

/// Bytes read from the socket at once.
const IN_BYTES: usize = 128 << 10;
/// Bytes that are encrypted before they are written.
const OUT_BYTES: usize = 256 << 10;

pub(crate) struct TlsStream {
    tcp: TcpStream,
    session: Mutex<Session>,
}

impl std::fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TlsStream").field(&self.tcp).finish()
    }
}

struct Session {
    tls: Connection,
    /// Bytes of the socket that the session has not taken yet: `buf[start..end]`.
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Session {
    /// Writes what the session has to say.
    fn flush(&mut self, mut tcp: &TcpStream) -> io::Result<()> {
        while self.tls.wants_write() {
            match self.tls.write_tls(&mut tcp) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Takes in bytes of the socket, waiting for some if none are here; false at the end of the stream.
    fn advance(&mut self, mut tcp: &TcpStream) -> io::Result<bool> {
        if self.start == self.end {
            self.buf.resize(IN_BYTES, 0);
            (self.start, self.end) = (0, 0);
            self.end = tcp.read(&mut self.buf)?;
            if self.end == 0 {
                return Ok(false);
            }
        }
        let mut here = self.buf.get(self.start..self.end).unwrap_or_default();
        let taken = self.tls.read_tls(&mut here)?;
        self.start += taken;
        let processed = self.tls.process_new_packets();
        // An alert says why, also where the packets were refused.
        let flushed = self.flush(tcp);
        processed.map_err(invalid)?;
        flushed?;
        Ok(true)
    }

    fn read(&mut self, tcp: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        self.flush(tcp)?;
        loop {
            match self.tls.reader().read(out) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // The end of the socket without the session's own: frames tell where they end, so nothing is lost.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(0),
                other => return other,
            }
            if !self.advance(tcp)? {
                return Ok(0);
            }
        }
    }
}

impl TlsStream {
    pub(super) fn new(tcp: TcpStream, mut tls: Connection) -> Self {
        tls.set_buffer_limit(Some(OUT_BYTES));
        Self { tcp, session: Mutex::new(Session { tls, buf: Vec::new(), start: 0, end: 0 }) }
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Goes on with the handshake; false if the peer has closed. `WouldBlock` where the socket says so.
    pub(crate) fn shake(&self) -> io::Result<bool> {
        let mut session = self.session.lock();
        session.flush(&self.tcp)?;
        while session.tls.is_handshaking() {
            if !session.advance(&self.tcp)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub(crate) fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        self.session.lock().read(&self.tcp, out)
    }

    pub(crate) fn read_exact(&self, mut out: &mut [u8]) -> io::Result<()> {
        let mut session = self.session.lock();
        while !out.is_empty() {
            match session.read(&self.tcp, out) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => out = out.get_mut(n..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) fn write_all(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let mut session = self.session.lock();
        for slice in slices {
            let mut rest: &[u8] = slice;
            while !rest.is_empty() {
                let taken = session.tls.writer().write(rest)?;
                rest = rest.get(taken..).unwrap_or_default();
                if taken == 0 {
                    session.flush(&self.tcp)?;
                }
            }
        }
        session.flush(&self.tcp)
    }

    /// Whether bytes are here already that a wait for the socket would not see.
    pub(crate) fn has_buffered(&self) -> bool {
        let mut session = self.session.lock();
        session.start < session.end
            || session.tls.process_new_packets().is_ok_and(|state| state.plaintext_bytes_to_read() > 0)
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}
