//! Opening the connections of a migration and introducing them.

use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use super::super::address::{DataAddress, DataStream};
use super::super::cancel::CancelFlag;
use super::super::compress::{Compression, Packer};
use super::super::conn::{Conn, Timeouts};
use super::super::error::Result;
use super::super::frame::{Hello, HelloAck, Kind, RoundCounts};
use super::super::limiter::Limiter;
use super::super::tls::Tls;
use super::super::{PROTOCOL_VERSIONS, SessionId, check_connections};
use super::Outgoing;
use crate::memory::GuestMemory;

/// How the connections are opened and used.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// 1 to 16.
    pub connections: u16,
    /// Bytes a second, 0 for no limit.
    pub bandwidth: u64,
    /// Until all are introduced.
    pub deadline: Duration,
    /// Afterwards.
    pub timeouts: Timeouts,
    /// TLS; not for Unix sockets, which stay as they are.
    pub tls: Option<Tls>,
    /// Compression of pages; none with a destination that speaks protocol 1.
    pub compression: Compression,
    /// Protocol versions that are offered.
    pub versions: RangeInclusive<u16>,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            connections: 1,
            bandwidth: 0,
            deadline: Duration::from_secs(10),
            timeouts: Timeouts::default(),
            tls: None,
            compression: Compression::None,
            versions: PROTOCOL_VERSIONS,
        }
    }
}

impl Outgoing {
    /// [`Self::open`] with the most common options.
    ///
    /// # Errors
    /// As there.
    pub fn connect(
        address: &DataAddress,
        session: &SessionId,
        connections: u16,
        memory: GuestMemory,
        bandwidth: u64,
        cancel: CancelFlag,
        deadline: Duration,
    ) -> Result<Self> {
        let options = ConnectOptions { connections, bandwidth, deadline, ..ConnectOptions::default() };
        Self::open(address, session, memory, cancel, options)
    }

    /// Opens and introduces the data connections.
    ///
    /// # Errors
    /// `Connections`, `Connect`, `Tls`, `Refused` with the destination's reason, `Cancelled`, `Timeout`.
    pub fn open(
        address: &DataAddress,
        session: &SessionId,
        memory: GuestMemory,
        cancel: CancelFlag,
        options: ConnectOptions,
    ) -> Result<Self> {
        let ConnectOptions { connections, bandwidth, deadline, timeouts, tls, compression, versions } =
            options;
        check_connections(connections)?;
        let until = Instant::now() + deadline;
        let hello = Hello {
            token: session.token,
            version_min: *versions.start(),
            version_max: *versions.end(),
            connections,
            memory_bytes: memory.bytes(),
        }
        .encode();
        let mut conns = Vec::with_capacity(connections.into());
        let mut transport = "";
        for index in 0..connections {
            let stream = DataStream::connect(address, tls.as_ref(), until, &cancel)?;
            transport = stream.transport();
            let mut conn = Conn::new(stream, session.key(), index, cancel.clone(), timeouts, Shutdown::Both)?;
            conn.send(Kind::Hello, 0, 0, 0, &hello, &[])?;
            conns.push(conn);
        }
        let mut version = *versions.end();
        for conn in &mut conns {
            let wait = until.saturating_duration_since(Instant::now()).min(timeouts.hello);
            let header = conn.recv_header("waiting for the destination's answer to Hello", wait)?;
            if header.kind != Kind::HelloAck {
                return Err(conn.order(header.kind, "HelloAck was expected"));
            }
            let ack = HelloAck::decode(conn.recv_meta(&header, 0, &mut Vec::new())?);
            let ack = ack.map_err(|source| conn.frame_error(source))?;
            if !versions.contains(&ack.version) {
                return Err(
                    conn.order(Kind::HelloAck, "the destination chose a version that was not offered")
                );
            }
            version = version.min(ack.version);
        }
        for conn in &mut conns {
            conn.speak(version);
        }
        let compression = if version < Kind::Packed.since() { Compression::None } else { compression };
        let words = memory.pages().div_ceil(64);
        Ok(Self {
            counts: vec![RoundCounts::default(); conns.len()],
            packers: conns.iter().map(|_| Packer::new(compression)).collect(),
            compression,
            conns,
            limiter: Limiter::new(bandwidth),
            cancel,
            timeouts,
            sent: (0..words).map(|_| AtomicU64::new(0)).collect(),
            memory,
            round: 0,
            zero_pages: 0,
            progress: Arc::default(),
            transport,
            version,
            failed: false,
            finished: None,
            closed_bytes: 0,
        })
    }
}
