//! What can go wrong on the data plane, with a stable code for each case.

use std::io;
use std::time::Duration;

use super::address::DataAddress;
use super::frame::{ErrorCode, FrameError, Kind};
use crate::memory::MemoryError;

/// An error of the data plane. None of them leaves the source's virtual machine changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataplaneError {
    /// Not an address.
    #[error("data address {value:?}: {problem}; write unix:PATH or tcp:ADDR:PORT")]
    Address {
        /// As given.
        value: String,
        /// What is wrong with it.
        problem: String,
    },
    /// The listener could not be opened.
    #[error("data listener {address}: {source}")]
    Bind {
        /// Where.
        address: DataAddress,
        /// Why.
        source: io::Error,
    },
    /// The destination could not be reached.
    #[error("data connection to {address}: {source}; is the destination's data listener still open?")]
    Connect {
        /// Where.
        address: DataAddress,
        /// Why.
        source: io::Error,
    },
    /// A number of connections outside the bounds.
    #[error("connections is {0}, allowed is 1 to 16")]
    Connections(u16),
    /// The destination's memory was written before the migration.
    #[error("page {page} of the destination's memory is not zero; use memory that was just made")]
    NotZero {
        /// The first such page.
        page: u64,
    },
    /// State larger than the protocol carries, or empty.
    #[error("state is {bytes} bytes, allowed is 1 byte to 64 MiB")]
    StateSize {
        /// As given.
        bytes: u64,
    },
    /// A call that does not fit what was done before.
    #[error("{0}")]
    Usage(&'static str),
    /// Reading or writing failed.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Nothing moved for too long.
    #[error("{what}: nothing moved for {after:?}")]
    Timeout {
        /// What was being waited for.
        what: &'static str,
        /// The deadline.
        after: Duration,
    },
    /// The source is gone, by the word of its own host.
    #[error("the source's worker has ended, as its host says")]
    Gone,
    /// The peer closed the connection.
    #[error("{what}: the peer closed connection {connection}")]
    Closed {
        /// What was being done.
        what: &'static str,
        /// Index.
        connection: u16,
    },
    /// Cancelled by its owner on this side.
    #[error("cancelled")]
    Cancelled,
    /// The peer sent something that is not a frame, or must not be believed.
    #[error("connection {connection}: {source}")]
    Frame {
        /// Index.
        connection: u16,
        /// What is wrong.
        source: FrameError,
    },
    /// A frame of another migration or attempt; nothing of it was used.
    #[error("connection {connection}: frame of another migration or attempt")]
    Stale {
        /// Index.
        connection: u16,
    },
    /// A well-formed frame in the wrong place.
    #[error("connection {connection}: {kind:?} frame out of order: {problem}")]
    Order {
        /// Index.
        connection: u16,
        /// Its kind.
        kind: Kind,
        /// What was expected.
        problem: &'static str,
    },
    /// The two sides count differently: something was lost.
    #[error("{what} on connection {connection}: sent {sent}, received {received}")]
    Counts {
        /// Which count.
        what: &'static str,
        /// Index; 0 for totals.
        connection: u16,
        /// What the source says.
        sent: u64,
        /// What the destination saw.
        received: u64,
    },
    /// The digest of the state differs between the sides.
    #[error("the state changed on the way: its SHA-256 differs between source and destination")]
    Digest,
    /// The peer gave up and said why.
    #[error("refused by the peer ({code:?}): {message}")]
    Refused {
        /// Its code.
        code: ErrorCode,
        /// Its words.
        message: String,
    },
    /// The peer could not prove to be who was announced, or does not speak TLS 1.3.
    #[error(
        "TLS on a data connection: {problem}; both sides must have been told each other's certificate of this migration"
    )]
    Tls {
        /// What went wrong.
        problem: String,
    },
    /// Guest memory could not be read or written.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
    /// A thread of the data plane could not be started or died.
    #[error("data-plane thread: {0}")]
    Thread(String),
}

/// Shorthand.
pub type Result<T, E = DataplaneError> = std::result::Result<T, E>;

impl DataplaneError {
    /// Stable code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Address { .. } => "DATA_ADDRESS_INVALID",
            Self::Bind { .. } => "DATA_LISTENER_FAILED",
            Self::Connect { .. } => "DATA_CONNECT_FAILED",
            Self::Connections(_) => "DATA_CONNECTIONS_INVALID",
            Self::NotZero { .. } => "DATA_MEMORY_NOT_ZERO",
            Self::StateSize { .. } => "DATA_STATE_SIZE",
            Self::Usage(_) => "DATA_USAGE",
            Self::Io { .. } => "DATA_IO",
            Self::Timeout { .. } => "DATA_TIMEOUT",
            Self::Gone => "DATA_SOURCE_GONE",
            Self::Closed { .. } => "DATA_PEER_CLOSED",
            Self::Cancelled => "DATA_CANCELLED",
            Self::Frame { source, .. } => source.reason(),
            Self::Stale { .. } => "DATA_STALE_FRAME",
            Self::Order { .. } => "DATA_ORDER",
            Self::Counts { .. } => "DATA_COUNTS",
            Self::Digest => "DATA_DIGEST",
            Self::Refused { .. } => "DATA_REFUSED",
            Self::Tls { .. } => "DATA_TLS",
            Self::Memory(_) => "DATA_MEMORY",
            Self::Thread(_) => "DATA_THREAD",
        }
    }

    /// An error of a TLS stream: the session's own, or the socket's.
    pub(crate) fn of_tls(error: io::Error, what: &'static str) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(rustls::Error::InvalidCertificate(_)) => {
                Self::Tls { problem: "the peer's certificate is not the one that was announced".into() }
            }
            Some(inner) => Self::Tls { problem: inner.to_string() },
            None => Self::Io { what, source: error },
        }
    }

    /// The code that the peer is told.
    pub(crate) fn wire_code(&self) -> ErrorCode {
        match self {
            Self::Refused { code, .. } => *code,
            Self::Frame { source: FrameError::Checksum { .. }, .. } | Self::Digest => ErrorCode::Checksum,
            Self::Frame { .. } => ErrorCode::Frame,
            Self::Order { .. } => ErrorCode::Order,
            Self::Stale { .. } => ErrorCode::WrongSession,
            Self::Counts { .. } => ErrorCode::Counts,
            Self::Cancelled => ErrorCode::Cancelled,
            Self::Io { .. } | Self::Timeout { .. } | Self::Closed { .. } | Self::Tls { .. } => {
                ErrorCode::Connection
            }
            _ => ErrorCode::Internal,
        }
    }
}
