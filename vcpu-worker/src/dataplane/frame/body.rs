//! The typed parts of frames other than pages: fixed layouts, read field by field with every value checked.

use super::{FrameError, Kind, MAX_CONNECTIONS, MAX_STATE_BYTES};

/// Reads fixed-size fields; the header has already fixed the length, so `Short` means a caller's mistake, not a panic.
struct Fields<'a> {
    bytes: &'a [u8],
    need: usize,
}

impl<'a> Fields<'a> {
    fn new(bytes: &'a [u8], need: usize) -> Result<Self, FrameError> {
        if bytes.len() == need {
            Ok(Self { bytes, need })
        } else {
            Err(FrameError::Short { have: bytes.len(), need })
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], FrameError> {
        let (head, tail) = self
            .bytes
            .split_first_chunk::<N>()
            .ok_or(FrameError::Short { have: self.bytes.len(), need: self.need })?;
        self.bytes = tail;
        Ok(*head)
    }

    fn u16(&mut self) -> Result<u16, FrameError> {
        Ok(u16::from_le_bytes(self.take()?))
    }

    fn u32(&mut self) -> Result<u32, FrameError> {
        Ok(u32::from_le_bytes(self.take()?))
    }

    fn u64(&mut self) -> Result<u64, FrameError> {
        Ok(u64::from_le_bytes(self.take()?))
    }
}

fn field(kind: Kind, field: &'static str, value: u64, allowed: &'static str) -> FrameError {
    FrameError::Field { kind, field, value, allowed }
}

/// Body of `Hello`. The token proves that the peer was told of this migration over the authenticated control channel.
#[derive(Clone, PartialEq, Eq)]
pub struct Hello {
    /// Secret of the session.
    pub token: [u8; 32],
    /// Oldest protocol that the source speaks.
    pub version_min: u16,
    /// Newest protocol that the source speaks.
    pub version_max: u16,
    /// Connections that the source will open, 1 to 16.
    pub connections: u16,
    /// Guest memory in bytes; must equal the destination's.
    pub memory_bytes: u64,
}

impl std::fmt::Debug for Hello {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hello")
            .field("token", &"(secret)")
            .field("versions", &(self.version_min..=self.version_max))
            .field("connections", &self.connections)
            .field("memory_bytes", &self.memory_bytes)
            .finish()
    }
}

impl Hello {
    /// Encoded size.
    pub const BYTES: usize = 48;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(Self::BYTES);
        out.extend_from_slice(&self.token);
        out.extend_from_slice(&self.version_min.to_le_bytes());
        out.extend_from_slice(&self.version_max.to_le_bytes());
        out.extend_from_slice(&self.connections.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&self.memory_bytes.to_le_bytes());
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError::Field`] for a value out of range, `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields::new(meta, Self::BYTES)?;
        let token = fields.take()?;
        let (version_min, version_max) = (fields.u16()?, fields.u16()?);
        let connections = fields.u16()?;
        let reserved = fields.u16()?;
        let memory_bytes = fields.u64()?;
        if reserved != 0 {
            return Err(field(Kind::Hello, "reserved", reserved.into(), "0"));
        }
        if connections == 0 || connections > MAX_CONNECTIONS {
            return Err(field(Kind::Hello, "connections", connections.into(), "1 to 16"));
        }
        if version_min > version_max {
            return Err(field(Kind::Hello, "version_min", version_min.into(), "at most version_max"));
        }
        Ok(Self { token, version_min, version_max, connections, memory_bytes })
    }
}

/// Body of `HelloAck`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HelloAck {
    /// Protocol that both will use.
    pub version: u16,
}

impl HelloAck {
    /// Encoded size.
    pub const BYTES: usize = 2;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        self.version.to_le_bytes().to_vec()
    }

    /// From bytes.
    ///
    /// # Errors
    /// `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        Ok(Self { version: Fields::new(meta, Self::BYTES)?.u16()? })
    }
}

/// Body of `RoundEnd`: what this connection sent in this round, `RoundEnd` itself not counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct RoundCounts {
    /// `Pages` and `Zero` frames.
    pub frames: u64,
    /// Pages with content.
    pub pages: u64,
    /// Pages in `Zero` frames.
    pub zero_pages: u64,
}

impl RoundCounts {
    /// Encoded size.
    pub const BYTES: usize = 24;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        [self.frames, self.pages, self.zero_pages].iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    /// From bytes.
    ///
    /// # Errors
    /// `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields::new(meta, Self::BYTES)?;
        Ok(Self { frames: fields.u64()?, pages: fields.u64()?, zero_pages: fields.u64()? })
    }

    /// Adds another's counts.
    pub fn add(&mut self, other: &Self) {
        self.frames = self.frames.saturating_add(other.frames);
        self.pages = self.pages.saturating_add(other.pages);
        self.zero_pages = self.zero_pages.saturating_add(other.zero_pages);
    }
}

/// Body of `State`: where the piece belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateChunk {
    /// Offset of the first byte.
    pub offset: u64,
    /// Bytes of the whole state, at most 64 MiB.
    pub total: u64,
}

impl StateChunk {
    /// Encoded size.
    pub const BYTES: usize = 16;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        [self.offset, self.total].iter().flat_map(|n| n.to_le_bytes()).collect()
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError::Field`] for a value out of range, `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields::new(meta, Self::BYTES)?;
        let (offset, total) = (fields.u64()?, fields.u64()?);
        if total == 0 || total > MAX_STATE_BYTES {
            return Err(field(Kind::State, "total", total, "1 to 64 MiB"));
        }
        if offset >= total {
            return Err(field(Kind::State, "offset", offset, "below total"));
        }
        Ok(Self { offset, total })
    }
}

/// Body of `Done`. On connections other than 0 only that connection's counts are set, and the rest is zero.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DoneTotals {
    /// Over all rounds; on connection 0 over all connections.
    pub counts: RoundCounts,
    /// Rounds.
    pub rounds: u32,
    /// Bytes of the state; connection 0 only.
    pub state_bytes: u64,
    /// SHA-256 over the state; connection 0 only.
    pub digest: [u8; 32],
}

impl DoneTotals {
    /// Encoded size.
    pub const BYTES: usize = RoundCounts::BYTES + 4 + 8 + 32;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.counts.encode();
        out.extend_from_slice(&self.rounds.to_le_bytes());
        out.extend_from_slice(&self.state_bytes.to_le_bytes());
        out.extend_from_slice(&self.digest);
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`FrameError::Field`] for a value out of range, `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields::new(meta, Self::BYTES)?;
        let counts = RoundCounts { frames: fields.u64()?, pages: fields.u64()?, zero_pages: fields.u64()? };
        let done = Self { counts, rounds: fields.u32()?, state_bytes: fields.u64()?, digest: fields.take()? };
        if done.state_bytes > MAX_STATE_BYTES {
            return Err(field(Kind::Done, "state_bytes", done.state_bytes, "at most 64 MiB"));
        }
        Ok(done)
    }
}

/// Body of `Receipt`: what the destination counted and computed itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt {
    /// Over all connections and rounds.
    pub counts: RoundCounts,
    /// SHA-256 over the state as it arrived.
    pub digest: [u8; 32],
}

impl Receipt {
    /// Encoded size.
    pub const BYTES: usize = RoundCounts::BYTES + 32;

    /// As bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.counts.encode();
        out.extend_from_slice(&self.digest);
        out
    }

    /// From bytes.
    ///
    /// # Errors
    /// `Short` for another length.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let mut fields = Fields::new(meta, Self::BYTES)?;
        let counts = RoundCounts { frames: fields.u64()?, pages: fields.u64()?, zero_pages: fields.u64()? };
        Ok(Self { counts, digest: fields.take()? })
    }
}

/// Why a side gave up, as a number that both builds know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// The token is not this session's.
    Unauthorized,
    /// Another migration or attempt.
    WrongSession,
    /// This connection index is taken.
    DuplicateConnection,
    /// Memory size or connection count differ from what was prepared.
    Mismatch,
    /// No common protocol version.
    Version,
    /// A malformed frame.
    Frame,
    /// A frame out of order.
    Order,
    /// Counts at a round's end or at the end do not match.
    Counts,
    /// Page or state bytes changed on the way.
    Checksum,
    /// A connection failed or timed out.
    Connection,
    /// Cancelled by its owner.
    Cancelled,
    /// The state arrived but could not be set into the virtual machine.
    NotApplied,
    /// Anything else.
    Internal,
    /// A number that this build does not know.
    Unknown(u16),
}

impl ErrorCode {
    const TABLE: [(u16, Self); 13] = [
        (1, Self::Unauthorized),
        (2, Self::WrongSession),
        (3, Self::DuplicateConnection),
        (4, Self::Mismatch),
        (5, Self::Version),
        (6, Self::Frame),
        (7, Self::Order),
        (8, Self::Counts),
        (9, Self::Checksum),
        (10, Self::Connection),
        (11, Self::Cancelled),
        (12, Self::NotApplied),
        (13, Self::Internal),
    ];

    fn to_wire(self) -> u16 {
        match self {
            Self::Unknown(number) => number,
            known => Self::TABLE.iter().find(|(_, code)| *code == known).map_or(13, |(number, _)| *number),
        }
    }

    fn from_wire(number: u16) -> Self {
        Self::TABLE.iter().find(|(n, _)| *n == number).map_or(Self::Unknown(number), |(_, code)| *code)
    }
}

/// Body of `Error`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ErrorBody {
    /// Machine-readable reason.
    pub code: ErrorCode,
    /// For people; at most 512 bytes.
    pub message: String,
}

impl ErrorBody {
    /// Smallest encoded size.
    pub const MIN_BYTES: usize = 2;
    /// Largest encoded size.
    pub const MAX_BYTES: usize = 2 + 512;

    /// As bytes; a longer message is cut at a character.
    pub fn encode(&self) -> Vec<u8> {
        let mut end = self.message.len().min(Self::MAX_BYTES - 2);
        while !self.message.is_char_boundary(end) {
            end -= 1;
        }
        let mut out = self.code.to_wire().to_le_bytes().to_vec();
        out.extend_from_slice(&self.message.as_bytes()[..end]);
        out
    }

    /// From bytes. Control characters are replaced: the text ends up in logs and terminals.
    ///
    /// # Errors
    /// `Short` without a code.
    pub fn decode(meta: &[u8]) -> Result<Self, FrameError> {
        let (code, text) = meta
            .split_first_chunk::<2>()
            .ok_or(FrameError::Short { have: meta.len(), need: Self::MIN_BYTES })?;
        let message =
            String::from_utf8_lossy(text).chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Ok(Self { code: ErrorCode::from_wire(u16::from_le_bytes(*code)), message })
    }
}
