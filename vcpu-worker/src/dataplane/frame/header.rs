//! The fixed header.
//!
//! ```text
//! 0  magic u32      8  migration id [16]   32 sequence u64     48 meta_len u32   60 data_crc u32
//! 4  version u16    24 attempt u32         40 connection u16   52 data_len u32   64 reserved u32
//! 6  kind u8        28 round u32           42 reserved u16     56 meta_crc u32   68 header_crc u32 (bytes 0..68)
//! 7  flags u8                              44 count u32
//! ```

use super::body::{DoneTotals, ErrorBody, Hello, HelloAck, Receipt, RoundCounts, StateChunk};
use super::ranges::{PageRange, decode_ranges};
use super::{FrameError, MAX_CONNECTIONS, MAX_DATA_BYTES, MAX_META_BYTES, PAGE_BYTES, check_sum};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 72;
/// "VPMD" read as a little-endian word.
pub const MAGIC: u32 = u32::from_le_bytes(*b"VPMD");
/// Version of this layout.
pub const VERSION: u16 = 1;
/// On `RoundEnd`: the destination answers `RoundAck` on connection 0 once all connections reached this round's end.
pub const FLAG_ACK: u8 = 1;

/// On `Packed`: the data is one LZ4 block.
pub const FLAG_LZ4: u8 = 1;
/// On `Packed`: the data is one zstd frame.
pub const FLAG_ZSTD: u8 = 2;

/// Most pages that one `Want` without [`FLAG_RESUME`] asks for.
pub const MAX_WANTED: u32 = 4096;
/// On `Want`: these pages are missing, and all others are there.
pub const FLAG_RESUME: u8 = 1;
/// On `Want` with [`FLAG_RESUME`]: the list goes on in the next frame.
pub const FLAG_MORE: u8 = 2;

/// What a frame says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// First frame from the source: token, connection index, memory size, protocol versions.
    Hello = 1,
    /// The destination took this connection.
    HelloAck = 2,
    /// Page ranges, then their bytes.
    Pages = 3,
    /// Page ranges that are zero now and were not when last sent.
    Zero = 4,
    /// What this connection sent in this round.
    RoundEnd = 5,
    /// All connections reached the end of this round at the destination.
    RoundAck = 6,
    /// A piece of the state, on connection 0 only.
    State = 7,
    /// Totals of this connection; on connection 0 of all, with the digest of the state.
    Done = 8,
    /// The destination has everything and all counts match.
    Receipt = 9,
    /// The destination has set the state; only the grant is missing.
    Applied = 10,
    /// The sender of this frame gives up, and why.
    Error = 11,
    /// As `Pages`, with the bytes compressed; from version 2 on.
    Packed = 12,
    /// The destination wants these pages of a guest that has moved; from version 3 on.
    Want = 13,
    /// The destination has every page; the source's echo says that it has heard so. From version 3 on.
    Drained = 14,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 14] = [
        Self::Hello,
        Self::HelloAck,
        Self::Pages,
        Self::Zero,
        Self::RoundEnd,
        Self::RoundAck,
        Self::State,
        Self::Done,
        Self::Receipt,
        Self::Applied,
        Self::Error,
        Self::Packed,
        Self::Want,
        Self::Drained,
    ];

    fn from_wire(byte: u8) -> Result<Self, FrameError> {
        Self::ALL.into_iter().find(|kind| *kind as u8 == byte).ok_or(FrameError::Kind(byte))
    }

    /// Smallest and largest `meta`.
    const fn meta_bounds(self) -> (u32, u32) {
        match self {
            Self::Hello => (Hello::BYTES as u32, Hello::BYTES as u32),
            Self::HelloAck => (HelloAck::BYTES as u32, HelloAck::BYTES as u32),
            Self::Pages | Self::Packed => (8, MAX_DATA_BYTES / PAGE_BYTES as u32 * 8),
            Self::Zero => (8, MAX_META_BYTES),
            Self::Want => (0, MAX_META_BYTES),
            Self::RoundEnd => (RoundCounts::BYTES as u32, RoundCounts::BYTES as u32),
            Self::RoundAck | Self::Applied | Self::Drained => (0, 0),
            Self::State => (StateChunk::BYTES as u32, StateChunk::BYTES as u32),
            Self::Done => (DoneTotals::BYTES as u32, DoneTotals::BYTES as u32),
            Self::Receipt => (Receipt::BYTES as u32, Receipt::BYTES as u32),
            Self::Error => (ErrorBody::MIN_BYTES as u32, ErrorBody::MAX_BYTES as u32),
        }
    }

    /// Smallest and largest `data`.
    const fn data_bounds(self) -> (u32, u32) {
        match self {
            Self::Pages => (PAGE_BYTES as u32, MAX_DATA_BYTES),
            Self::State | Self::Packed => (1, MAX_DATA_BYTES),
            _ => (0, 0),
        }
    }

    /// Flags that may be set.
    const fn flags(self) -> u8 {
        match self {
            Self::RoundEnd => FLAG_ACK,
            Self::Packed => FLAG_LZ4 | FLAG_ZSTD,
            Self::Want => FLAG_RESUME | FLAG_MORE,
            _ => 0,
        }
    }

    /// Whether its typed part is a list of page ranges.
    pub const fn has_ranges(self) -> bool {
        matches!(self, Self::Pages | Self::Zero | Self::Packed | Self::Want)
    }

    /// The oldest protocol that has it.
    pub const fn since(self) -> u16 {
        match self {
            Self::Packed => 2,
            Self::Want | Self::Drained => 3,
            _ => 1,
        }
    }
}

/// Which attempt of which migration a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FrameKey {
    /// UUID bytes.
    pub migration_id: [u8; 16],
    /// From 1.
    pub attempt: u32,
}

/// A header, its fields in range for its kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// Kind.
    pub kind: Kind,
    /// Flags; only those of the kind.
    pub flags: u8,
    /// Migration and attempt.
    pub key: FrameKey,
    /// Round, from 1; 0 before the first.
    pub round: u32,
    /// Position on this connection and direction, from 0, without holes.
    pub sequence: u64,
    /// Index of the connection, 0 to 15.
    pub connection: u16,
    /// Pages in `Pages`, `Packed` and `Zero`; else 0.
    pub count: u32,
    /// Bytes of the typed part.
    pub meta_len: u32,
    /// Bytes of the bulk part.
    pub data_len: u32,
    /// CRC-32C of the typed part.
    pub meta_crc: u32,
    /// CRC-32C of the bulk part.
    pub data_crc: u32,
}

impl Header {
    /// A header with empty parts.
    pub fn new(kind: Kind, key: FrameKey, round: u32, sequence: u64, connection: u16) -> Self {
        Self {
            kind,
            flags: 0,
            key,
            round,
            sequence,
            connection,
            count: 0,
            meta_len: 0,
            data_len: 0,
            meta_crc: 0,
            data_crc: 0,
        }
    }

    /// Takes over lengths and sums of the parts that will follow.
    pub fn seal(&mut self, meta: &[u8], data_crc: u32, data_len: u32) {
        self.meta_len = meta.len() as u32;
        self.meta_crc = crc32c::crc32c(meta);
        self.data_len = data_len;
        self.data_crc = data_crc;
    }

    /// The header as bytes with its own sum.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut out = [0; HEADER_BYTES];
        let mut put = |at: usize, bytes: &[u8]| out[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, &MAGIC.to_le_bytes());
        put(4, &VERSION.to_le_bytes());
        put(6, &[self.kind as u8, self.flags]);
        put(8, &self.key.migration_id);
        put(24, &self.key.attempt.to_le_bytes());
        put(28, &self.round.to_le_bytes());
        put(32, &self.sequence.to_le_bytes());
        put(40, &self.connection.to_le_bytes());
        put(44, &self.count.to_le_bytes());
        put(48, &self.meta_len.to_le_bytes());
        put(52, &self.data_len.to_le_bytes());
        put(56, &self.meta_crc.to_le_bytes());
        put(60, &self.data_crc.to_le_bytes());
        let crc = crc32c::crc32c(&out[..68]);
        out[68..].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads and checks a header.
    ///
    /// # Errors
    /// Any [`FrameError`] but `Short`; nothing after the header may then be interpreted.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Self, FrameError> {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        // Magic and version first: for a peer that speaks something else they say more than a wrong sum.
        if word(0) != MAGIC {
            return Err(FrameError::Magic(word(0)));
        }
        if half(4) != VERSION {
            return Err(FrameError::Version(half(4)));
        }
        check_sum("header", &bytes[..68], word(68))?;
        let kind = Kind::from_wire(bytes[6])?;
        let mut migration_id = [0; 16];
        migration_id.copy_from_slice(&bytes[8..24]);
        let header = Self {
            kind,
            flags: bytes[7],
            key: FrameKey { migration_id, attempt: word(24) },
            round: word(28),
            sequence: u64::from(word(32)) | u64::from(word(36)) << 32,
            connection: half(40),
            count: word(44),
            meta_len: word(48),
            data_len: word(52),
            meta_crc: word(56),
            data_crc: word(60),
        };
        let field = |field, value: u64, allowed| Err(FrameError::Field { kind, field, value, allowed });
        if half(42) != 0 || word(64) != 0 {
            return field("reserved", u64::from(half(42)) | u64::from(word(64)) << 32, "0");
        }
        if header.flags & !kind.flags() != 0 {
            return field("flags", header.flags.into(), "the flags of this kind");
        }
        if header.connection >= MAX_CONNECTIONS {
            return field("connection", header.connection.into(), "0 to 15");
        }
        let (low, high) = kind.meta_bounds();
        if header.meta_len < low || header.meta_len > high {
            return field("meta_len", header.meta_len.into(), "the bounds of this kind");
        }
        let (low, high) = kind.data_bounds();
        if header.data_len < low || header.data_len > high {
            return field("data_len", header.data_len.into(), "the bounds of this kind");
        }
        match kind {
            Kind::Pages if u64::from(header.data_len) != u64::from(header.count) * PAGE_BYTES => {
                field("data_len", header.data_len.into(), "count * 4096")
            }
            Kind::Packed if u64::from(header.count) * PAGE_BYTES > u64::from(MAX_DATA_BYTES) => {
                field("count", header.count.into(), "at most 256")
            }
            Kind::Packed if u64::from(header.data_len) >= u64::from(header.count) * PAGE_BYTES => {
                field("data_len", header.data_len.into(), "less than count * 4096")
            }
            Kind::Packed if header.flags.count_ones() != 1 => {
                field("flags", header.flags.into(), "one algorithm")
            }
            _ if kind.has_ranges() && !header.meta_len.is_multiple_of(8) => {
                field("meta_len", header.meta_len.into(), "a multiple of 8")
            }
            Kind::Zero if header.count == 0 => field("count", 0, "1 or more"),
            // What is missing is as much as memory at most; what is wanted at once is little.
            Kind::Want if header.flags == FLAG_MORE => field("flags", FLAG_MORE.into(), "with the list only"),
            Kind::Want if header.flags == 0 && !(1..=MAX_WANTED).contains(&header.count) => {
                field("count", header.count.into(), "1 to 4096")
            }
            _ if kind.has_ranges() => Ok(header),
            _ if header.count != 0 => field("count", header.count.into(), "0"),
            _ => Ok(header),
        }
    }

    /// Checks the typed part: its sum, and where it is page ranges every one of them, which go to `ranges`.
    ///
    /// # Errors
    /// Any [`FrameError`].
    pub fn check_meta(
        &self,
        meta: &[u8],
        memory_pages: u64,
        ranges: &mut Vec<PageRange>,
    ) -> Result<(), FrameError> {
        ranges.clear();
        check_sum("meta", meta, self.meta_crc)?;
        if self.kind.has_ranges() {
            let pages = decode_ranges(meta, memory_pages, ranges)?;
            if pages != u64::from(self.count) {
                return Err(FrameError::Field {
                    kind: self.kind,
                    field: "count",
                    value: self.count.into(),
                    allowed: "the pages of its ranges",
                });
            }
        }
        Ok(())
    }
}
