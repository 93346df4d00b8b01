//! A TLS session over a TCP socket, blocking or not as the socket is.
//!
//! ```text
//!   Shaking, with each call ──handshake done──▶ Open: who reads and who writes do not wait for each other
//! ```
//! One thread at a time reads and one writes; others only shut the socket down, which needs no lock and wakes whoever waits
//! in it. Keys are renewed when they have encrypted as much as they may, and when the peer renews its own.
//!
//! Invariants: bytes are read from the socket in large pieces and decrypted where they are; what a peer sends that is neither
//! data nor a new key ends the session, for good. That is narrower than RFC 8446: tickets, a KeyUpdate that shares a record
//! with something else, and warnings are refused; neither side sends them. A write that fails can be followed by another: what
//! was sealed goes out first.

mod outgoing;

use std::io::{self, IoSlice, Read as _};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustls::{AlertDescription, Error, InvalidMessage, PeerMisbehaved};

use super::handshake::{Handshake, Renewal, Side};
use super::record::{self, Content, HEADER, LARGEST, Opener, RECORD, Sealer, TRAILER};
use outgoing::Outgoing;

/// Bytes read from the socket at once, at most.
const IN_BYTES: usize = (128 << 10) + LARGEST;
/// Records one after the other that hold no data.
const IDLE_RECORDS: u32 = 32;
/// KeyUpdate (RFC 8446, section 4.6.3) that asks for none in return.
const KEY_UPDATE: [u8; 5] = [24, 0, 0, 1, 0];
/// The same that asks for one.
const KEY_UPDATE_REQUESTED: [u8; 5] = [24, 0, 0, 1, 1];

pub(crate) struct TlsStream {
    tcp: TcpStream,
    shaking: Mutex<Option<Handshake>>,
    open: OnceLock<Open>,
}

struct Open {
    incoming: Mutex<Incoming>,
    outgoing: Mutex<Outgoing>,
    renewal: Mutex<Renewal>,
    /// The peer wants our key renewed.
    renewal_due: AtomicBool,
}

struct Incoming {
    opener: Opener,
    /// Bytes of the socket: `buf[start..end]`.
    buf: Vec<u8>,
    start: usize,
    end: usize,
    /// Data of a record before `start` that nobody has read yet.
    data: Range<usize>,
    /// Records since the last that held data.
    idle: u32,
    /// The peer has said that nothing follows.
    closed: bool,
    /// Why the session is over.
    broken: Option<Error>,
}

impl std::fmt::Debug for TlsStream {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("TlsStream").field(&self.tcp).finish()
    }
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl TlsStream {
    pub(super) fn new(tcp: TcpStream, side: Side) -> Self {
        Self { tcp, shaking: Mutex::new(Some(Handshake::new(side))), open: OnceLock::new() }
    }

    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Goes on with the handshake; false if the peer has closed. `WouldBlock` where the socket says so.
    pub(crate) fn shake(&self) -> io::Result<bool> {
        let mut shaking = self.shaking.lock();
        let Some(handshake) = shaking.as_mut() else {
            // It is open, or has come to nothing.
            return if self.open.get().is_some() {
                Ok(true)
            } else {
                Err(invalid(Error::HandshakeNotComplete))
            };
        };
        match handshake.go_on(&self.tcp) {
            Ok(true) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Err(error);
            }
            ended => {
                *shaking = None;
                return ended;
            }
        }
        let Some(handshake) = shaking.take() else { return Err(invalid(Error::HandshakeNotComplete)) };
        let (secrets, renewal) = handshake.finish()?;
        let incoming = Incoming {
            opener: Opener::new(secrets.rx).map_err(invalid)?,
            buf: Vec::new(),
            start: 0,
            end: 0,
            data: 0..0,
            idle: 0,
            closed: false,
            broken: None,
        };
        let sealer = Sealer::new(secrets.tx, renewal.limit()).map_err(invalid)?;
        let open = Open {
            incoming: Mutex::new(incoming),
            outgoing: Mutex::new(Outgoing::new(sealer)),
            renewal: Mutex::new(renewal),
            renewal_due: AtomicBool::new(false),
        };
        drop(self.open.set(open));
        Ok(true)
    }

    /// Once the handshake is done, with which it goes on; none if the peer has closed before.
    fn opened(&self) -> io::Result<Option<&Open>> {
        if self.open.get().is_none() && !self.shake()? {
            return Ok(None);
        }
        self.open.get().map(Some).ok_or_else(|| invalid(Error::HandshakeNotComplete))
    }

    pub(crate) fn read(&self, out: &mut [u8]) -> io::Result<usize> {
        let Some(open) = self.opened()? else { return Ok(0) };
        open.read(&mut open.incoming.lock(), &self.tcp, out)
    }

    pub(crate) fn read_exact(&self, mut out: &mut [u8]) -> io::Result<()> {
        let open = self.opened()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut incoming = open.incoming.lock();
        while !out.is_empty() {
            match open.read(&mut incoming, &self.tcp, out) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => out = out.get_mut(n..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    pub(crate) fn write_all(&self, slices: &[IoSlice<'_>]) -> io::Result<()> {
        let open = self.opened()?.ok_or(io::ErrorKind::BrokenPipe)?;
        let mut outgoing = open.outgoing.lock();
        let mut rest = slices.iter().map(|slice| &**slice).filter(|slice| !slice.is_empty());
        let mut piece: &[u8] = rest.next().unwrap_or_default();
        while !piece.is_empty() {
            open.renew_if_due(&mut outgoing, &self.tcp)?;
            let record = outgoing.room(&self.tcp)?;
            let mut filled = HEADER;
            let full = RECORD - TRAILER;
            while filled < full && !piece.is_empty() {
                let (now, later) = piece.split_at(piece.len().min(full - filled));
                if let Some(place) = record.get_mut(filled..filled + now.len()) {
                    place.copy_from_slice(now);
                }
                filled += now.len();
                piece = if later.is_empty() { rest.next().unwrap_or_default() } else { later };
            }
            outgoing.seal(Content::Data, filled + TRAILER)?;
        }
        outgoing.flush(&self.tcp)
    }

    /// Whether bytes are here already that a wait for the socket would not see.
    pub(crate) fn has_buffered(&self) -> bool {
        self.open.get().is_some_and(|open| {
            let incoming = open.incoming.lock();
            // What cannot be a record is found out by who reads.
            !incoming.data.is_empty() || !matches!(incoming.whole(), Ok(None))
        })
    }
}

impl Open {
    fn read(&self, incoming: &mut Incoming, tcp: &TcpStream, out: &mut [u8]) -> io::Result<usize> {
        if incoming.data.is_empty() && !out.is_empty() {
            // The end of the socket without the session's own: frames tell where they end, so nothing is lost.
            if !self.advance(incoming, tcp)? {
                return Ok(0);
            }
        }
        let here = incoming.buf.get(incoming.data.clone()).unwrap_or_default();
        let taken = here.len().min(out.len());
        let (here, out) = (here.get(..taken).unwrap_or_default(), out.get_mut(..taken).unwrap_or_default());
        out.copy_from_slice(here);
        incoming.data.start += taken;
        Ok(taken)
    }

    /// Opens records until one holds data; false at the end of the stream.
    fn advance(&self, incoming: &mut Incoming, tcp: &TcpStream) -> io::Result<bool> {
        loop {
            if let Some(broken) = &incoming.broken {
                return Err(invalid(broken.clone()));
            }
            if incoming.closed {
                return Ok(false);
            }
            let opened = match incoming.whole() {
                Ok(Some(whole)) => self.next(incoming, whole),
                Ok(None) if incoming.receive(tcp)? => Ok(()),
                Ok(None) => return Ok(false),
                Err(error) => Err(error),
            };
            if let Err(error) = opened {
                self.say_why(&error, tcp);
                incoming.broken = Some(error);
            } else if !incoming.data.is_empty() {
                return Ok(true);
            }
        }
    }

    /// Opens one record.
    fn next(&self, incoming: &mut Incoming, whole: usize) -> Result<(), Error> {
        let begin = incoming.start;
        let record = incoming.buf.get_mut(begin..begin + whole).unwrap_or_default();
        let (content, length) = incoming.opener.open(record)?;
        let data = begin + HEADER..begin + HEADER + length;
        incoming.start += whole;
        incoming.idle += 1;
        match (content, incoming.buf.get(data.clone()).unwrap_or_default()) {
            (Content::Data, []) => {}
            (Content::Data, _) => (incoming.data, incoming.idle) = (data, 0),
            (Content::Handshake, message) if *message == KEY_UPDATE || *message == KEY_UPDATE_REQUESTED => {
                if *message == KEY_UPDATE_REQUESTED {
                    self.renewal_due.store(true, Ordering::Release);
                }
                let secrets = self.renewal.lock().incoming()?;
                incoming.opener.renew(secrets)?;
            }
            (Content::Handshake, _) => {
                let what = "a handshake message after the handshake";
                return Err(InvalidMessage::UnexpectedMessage(what).into());
            }
            (Content::Alert, &[_, description]) => match AlertDescription::from(description) {
                AlertDescription::CloseNotify => incoming.closed = true,
                other => return Err(Error::AlertReceived(other)),
            },
            (Content::Alert, _) => return Err(InvalidMessage::MessageTooShort.into()),
        }
        if incoming.idle > IDLE_RECORDS { Err(PeerMisbehaved::TooManyEmptyFragments.into()) } else { Ok(()) }
    }

    /// An alert, if nobody is writing; as much of it as the socket takes at once.
    fn say_why(&self, error: &Error, tcp: &TcpStream) {
        let Some(alert) = record::alert_of(error) else { return };
        if let Some(mut outgoing) = self.outgoing.try_lock()
            && outgoing.has_room()
            && outgoing.put(Content::Alert, &alert, tcp).is_ok()
        {
            outgoing.flush_at_once(tcp);
        }
    }

    /// Another key, if this one has been used enough or the peer wants one.
    fn renew_if_due(&self, outgoing: &mut Outgoing, tcp: &TcpStream) -> io::Result<()> {
        if !outgoing.is_worn() && !self.renewal_due.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        outgoing.put(Content::Handshake, &KEY_UPDATE, tcp)?;
        let renewed = self.renewal.lock().outgoing();
        renewed.and_then(|secrets| outgoing.renew(secrets)).map_err(invalid)
    }
}

impl Incoming {
    /// Length of the next record, if all of it is here.
    fn whole(&self) -> Result<Option<usize>, Error> {
        let here = self.buf.get(self.start..self.end).unwrap_or_default();
        Ok(record::length(here)?.filter(|whole| *whole <= here.len()))
    }

    /// More bytes of the socket; false at its end. All data has been read.
    fn receive(&mut self, mut tcp: &TcpStream) -> io::Result<bool> {
        self.buf.resize(IN_BYTES, 0);
        self.buf.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        self.data = 0..0;
        let read = tcp.read(self.buf.get_mut(self.end..).unwrap_or_default())?;
        self.end += read;
        Ok(read > 0)
    }
}

impl AsFd for TlsStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.tcp.as_fd()
    }
}

#[cfg(test)]
mod tests;
