//! Opening the connections of a migration and introducing them.

use std::net::Shutdown;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use super::super::address::{DataAddress, DataStream};
use super::super::cancel::CancelFlag;
use super::super::conn::{Conn, Timeouts};
use super::super::error::Result;
use super::super::frame::{Hello, HelloAck, Kind, RoundCounts};
use super::super::limiter::Limiter;
use super::super::{PROTOCOL_VERSIONS, SessionId, check_connections};
use super::Outgoing;
use crate::memory::GuestMemory;

impl Outgoing {
    /// Opens and introduces `connections` data connections, within `deadline`. `bandwidth` is in bytes a second, 0 for
    /// no limit.
    ///
    /// # Errors
    /// `Connections`, `Connect`, `Refused` with the destination's reason, `Cancelled`, `Timeout`.
    pub fn connect(
        address: &DataAddress,
        session: &SessionId,
        connections: u16,
        memory: GuestMemory,
        bandwidth: u64,
        cancel: CancelFlag,
        deadline: Duration,
    ) -> Result<Self> {
        Self::connect_with(
            address,
            session,
            connections,
            memory,
            bandwidth,
            cancel,
            deadline,
            Timeouts::default(),
        )
    }

    /// [`Self::connect`] with other time-outs.
    ///
    /// # Errors
    /// As [`Self::connect`].
    #[expect(clippy::too_many_arguments, reason = "the session's facts, each of another type")]
    pub fn connect_with(
        address: &DataAddress,
        session: &SessionId,
        connections: u16,
        memory: GuestMemory,
        bandwidth: u64,
        cancel: CancelFlag,
        deadline: Duration,
        timeouts: Timeouts,
    ) -> Result<Self> {
        check_connections(connections)?;
        let until = Instant::now() + deadline;
        let hello = Hello {
            token: session.token,
            version_min: *PROTOCOL_VERSIONS.start(),
            version_max: *PROTOCOL_VERSIONS.end(),
            connections,
            memory_bytes: memory.bytes(),
        }
        .encode();
        let mut conns = Vec::with_capacity(connections.into());
        for index in 0..connections {
            let stream = DataStream::connect(address, until, &cancel)?;
            let mut conn = Conn::new(stream, session.key(), index, cancel.clone(), timeouts, Shutdown::Both)?;
            conn.send(Kind::Hello, 0, 0, 0, &hello, &[])?;
            conns.push(conn);
        }
        for conn in &mut conns {
            let wait = until.saturating_duration_since(Instant::now()).min(timeouts.hello);
            let header = conn.recv_header("waiting for the destination's answer to Hello", wait)?;
            if header.kind != Kind::HelloAck {
                return Err(conn.order(header.kind, "HelloAck was expected"));
            }
            let ack = HelloAck::decode(conn.recv_meta(&header, 0, &mut Vec::new())?);
            let ack = ack.map_err(|source| conn.frame_error(source))?;
            if !PROTOCOL_VERSIONS.contains(&ack.version) {
                return Err(
                    conn.order(Kind::HelloAck, "the destination chose a version that was not offered")
                );
            }
        }
        let words = memory.pages().div_ceil(64);
        Ok(Self {
            counts: vec![RoundCounts::default(); conns.len()],
            conns,
            limiter: Limiter::new(bandwidth),
            cancel,
            timeouts,
            sent: (0..words).map(|_| AtomicU64::new(0)).collect(),
            memory,
            round: 0,
            zero_pages: 0,
            progress: Arc::default(),
            transport: match address {
                DataAddress::Unix(_) => "unix",
                DataAddress::Tcp(_) => "tcp",
            },
            failed: false,
            finished: None,
        })
    }
}
