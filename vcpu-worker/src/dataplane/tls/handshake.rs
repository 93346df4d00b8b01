//! How a session comes about: rustls makes the handshake and gives the keys away.
//!
//! ```text
//!   shake ──▶ rustls: encode ▶ transmit ▶ wait for a record ──┐ … ──▶ done: keys, and whoever renews them
//!               ▲                                             │
//!               └─────────────────────────────────────────────┘
//! ```
//! Invariants: rustls is shown no byte beyond the record that it waits for, so that it takes none of the data that follows the
//! handshake; what does not begin as a record is refused at its first bytes, without an alert, and not waited for.

use std::io::{self, Read as _, Write as _};
use std::net::TcpStream;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::kernel::KernelConnection;
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, UnbufferedStatus};
use rustls::{ConnectionTrafficSecrets, Error, ExtractedSecrets};

use super::record;

/// Most bytes of a handshake that are kept at once: a message may lie in several records.
const INCOMING: usize = 64 << 10;

/// Which side.
pub(super) enum Side {
    Client(Box<UnbufferedClientConnection>),
    Server(Box<UnbufferedServerConnection>),
}

impl Side {
    fn wants_write(&self) -> bool {
        match self {
            Self::Client(client) => client.wants_write(),
            Self::Server(server) => server.wants_write(),
        }
    }
}

/// Keys that follow the first ones.
pub(super) enum Renewal {
    Client(Box<KernelConnection<ClientConnectionData>>),
    Server(Box<KernelConnection<ServerConnectionData>>),
}

impl Renewal {
    pub(super) fn outgoing(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_tx_secret(),
            Self::Server(kernel) => kernel.update_tx_secret(),
        }
    }

    pub(super) fn incoming(&mut self) -> Result<(u64, ConnectionTrafficSecrets), Error> {
        match self {
            Self::Client(kernel) => kernel.update_rx_secret(),
            Self::Server(kernel) => kernel.update_rx_secret(),
        }
    }

    /// Records that one key of the agreed cipher may encrypt.
    pub(super) fn limit(&self) -> u64 {
        let suite = match self {
            Self::Client(kernel) => kernel.negotiated_cipher_suite(),
            Self::Server(kernel) => kernel.negotiated_cipher_suite(),
        };
        suite.tls13().map_or(0, |suite| suite.common.confidentiality_limit)
    }
}

/// What rustls wants next.
enum Next {
    Again,
    Record,
    Done,
}

/// A handshake on its way.
pub(super) struct Handshake {
    side: Side,
    /// Of the socket; of it the first `shown` bytes have been shown to rustls.
    incoming: Vec<u8>,
    shown: usize,
    /// To be sent.
    outgoing: Vec<u8>,
}

fn invalid(error: Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

impl Handshake {
    pub(super) fn new(side: Side) -> Self {
        Self { side, incoming: Vec::new(), shown: 0, outgoing: Vec::new() }
    }

    /// Goes on as far as the socket lets it: true once it is done, false if the peer has closed.
    pub(super) fn go_on(&mut self, tcp: &TcpStream) -> io::Result<bool> {
        loop {
            self.send(tcp)?;
            match self.step() {
                Ok(Next::Done) => return Ok(true),
                Ok(Next::Again) => {}
                Ok(Next::Record) => {
                    if !self.receive(tcp)? {
                        return Ok(false);
                    }
                }
                Err(error) => {
                    // All that rustls has to say, of which the last is why; the socket may be gone.
                    while self.side.wants_write() && matches!(self.step(), Ok(Next::Again)) {}
                    drop(self.send(tcp));
                    return Err(invalid(error));
                }
            }
        }
    }

    /// The first keys, once it is done.
    pub(super) fn finish(self) -> io::Result<(ExtractedSecrets, Renewal)> {
        match self.side {
            Side::Client(client) => {
                let (secrets, kernel) = client.dangerous_into_kernel_connection().map_err(invalid)?;
                Ok((secrets, Renewal::Client(Box::new(kernel))))
            }
            Side::Server(server) => {
                let (secrets, kernel) = server.dangerous_into_kernel_connection().map_err(invalid)?;
                Ok((secrets, Renewal::Server(Box::new(kernel))))
            }
        }
    }

    fn send(&mut self, mut tcp: &TcpStream) -> io::Result<()> {
        while !self.outgoing.is_empty() {
            match tcp.write(&self.outgoing) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => drop(self.outgoing.drain(..sent)),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// One more record, to be shown; false at the end of the stream.
    fn receive(&mut self, mut tcp: &TcpStream) -> io::Result<bool> {
        loop {
            let here = self.incoming.len();
            let begun = self.incoming.get(self.shown..).unwrap_or_default();
            record::check(begun).map_err(invalid)?;
            let missing = match record::length(begun).map_err(invalid)? {
                Some(whole) => whole.saturating_sub(begun.len()),
                None => record::HEADER - begun.len(),
            };
            if missing == 0 {
                self.shown = here;
                return Ok(true);
            }
            if here + missing > INCOMING {
                return Err(invalid(Error::PeerSentOversizedRecord));
            }
            self.incoming.resize(here + missing, 0);
            let read = tcp.read(self.incoming.get_mut(here..).unwrap_or_default());
            self.incoming.truncate(here + *read.as_ref().unwrap_or(&0));
            match read {
                Ok(0) => return Ok(false),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn step(&mut self) -> Result<Next, Error> {
        let shown = self.incoming.get_mut(..self.shown).unwrap_or_default();
        let (discard, next) = match &mut self.side {
            Side::Client(client) => judge(client.process_tls_records(shown), &mut self.outgoing),
            Side::Server(server) => judge(server.process_tls_records(shown), &mut self.outgoing),
        };
        let discard = discard.min(self.shown);
        self.incoming.drain(..discard);
        self.shown -= discard;
        next
    }
}

fn judge<Data>(
    status: UnbufferedStatus<'_, '_, Data>,
    outgoing: &mut Vec<u8>,
) -> (usize, Result<Next, Error>) {
    let UnbufferedStatus { discard, state, .. } = status;
    let next = match state {
        Err(error) => Err(error),
        Ok(ConnectionState::EncodeTlsData(data)) => encode(data, outgoing).map(|()| Next::Again),
        Ok(ConnectionState::TransmitTlsData(data)) => {
            // It is sent before anything else.
            data.done();
            Ok(Next::Again)
        }
        Ok(ConnectionState::BlockedHandshake) => Ok(Next::Record),
        Ok(ConnectionState::WriteTraffic(_)) => Ok(Next::Done),
        Ok(_) => Err(Error::HandshakeNotComplete),
    };
    (discard, next)
}

fn encode<Data>(mut data: EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) -> Result<(), Error> {
    let begin = outgoing.len();
    loop {
        match data.encode(outgoing.get_mut(begin..).unwrap_or_default()) {
            Ok(written) => {
                outgoing.truncate(begin + written);
                return Ok(());
            }
            Err(EncodeError::InsufficientSize(short)) if outgoing.len() < begin + short.required_size => {
                outgoing.resize(begin + short.required_size, 0);
            }
            Err(error) => return Err(Error::General(error.to_string())),
        }
    }
}
