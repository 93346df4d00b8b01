//! What travels on a data connection: frames of a fixed 72-byte header, a small typed part (`meta`) and bulk `data`.
//!
//! ```text
//! header 72 bytes | meta (ranges or a body, at most 32 KiB) | data (pages or state, at most 1 MiB)
//! ```
//!
//! Everything is little endian. Three CRC-32C sums cover the three parts, so that a header can be believed before the
//! rest is read, and a range list before a byte goes to guest memory. Rules that every reader keeps:
//!
//! * The header is checked (sum, magic, version, kind, flags, and the bounds of its kind) before `meta` is read.
//! * `meta` is checked (sum, then each range: order, overlap, inside memory, total equal to `data_len`) before `data`
//!   is read, and only then is guest memory touched.
//! * No length from the wire decides an allocation: buffers have the fixed maximum, or grow with bytes that arrived.
//!
//! Order on one connection: `Hello`, `HelloAck`, then rounds `(Pages | Packed | Zero)* RoundEnd`, on connection 0 `State*`, and
//! `Done`. The destination answers `RoundAck` where asked, then `Receipt`, then `Applied`; `Error` is legal at any time.
//! Where pages are left for later, `Pages | Packed | Zero` one way and `Want`, at the end `Drained`, the other follow on
//! connection 0 (see `postcopy`).

mod body;
mod header;
mod ranges;
#[cfg(test)]
mod tests;

pub use body::{DoneTotals, ErrorBody, ErrorCode, Hello, HelloAck, Receipt, RoundCounts, StateChunk};
pub use header::{
    FLAG_ACK, FLAG_LZ4, FLAG_MORE, FLAG_RESUME, FLAG_ZSTD, FrameKey, HEADER_BYTES, Header, Kind, MAGIC,
    MAX_WANTED, VERSION,
};
pub use ranges::{PageRange, decode_ranges, encode_ranges};

/// Bytes in a page of the migration protocol, whatever the host or the guest maps.
pub const PAGE_BYTES: u64 = 4096;
/// Most bytes of pages or state in one frame.
pub const MAX_DATA_BYTES: u32 = 1 << 20;
/// Most ranges in one frame.
pub const MAX_RANGES: usize = 4096;
/// Most bytes of `meta` in one frame.
pub const MAX_META_BYTES: u32 = (MAX_RANGES * 8) as u32;
/// Most bytes of vCPU, PMU and device state of one machine.
pub const MAX_STATE_BYTES: u64 = 64 << 20;
/// Most data connections of one migration.
pub const MAX_CONNECTIONS: u16 = 16;

/// Why bytes are not a frame of this protocol.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Fewer bytes than the fixed part needs.
    #[error("frame: {have} bytes where {need} are needed")]
    Short {
        /// Bytes present.
        have: usize,
        /// Bytes needed.
        need: usize,
    },
    /// A sum does not match: the bytes changed on the way, or were never a frame.
    #[error("frame: CRC-32C of the {part} is {found:#010x}, the frame says {expected:#010x}")]
    Checksum {
        /// "header", "meta" or "data".
        part: &'static str,
        /// As computed.
        found: u32,
        /// As carried.
        expected: u32,
    },
    /// Not this protocol.
    #[error("frame: magic is {0:#010x}, not that of the migration data plane")]
    Magic(u32),
    /// A version of the header that this build does not read.
    #[error("frame: header version {0}, this build reads {VERSION}")]
    Version(u16),
    /// A kind that this build does not know.
    #[error("frame: unknown kind {0}")]
    Kind(u8),
    /// A field has a value outside its range.
    #[error("frame {kind:?}: {field} is {value}, allowed is {allowed}")]
    Field {
        /// The kind of frame.
        kind: Kind,
        /// Name of the field.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What would have been allowed.
        allowed: &'static str,
    },
    /// Compressed pages that do not unpack to what the frame says.
    #[error("frame: {0}")]
    Packed(&'static str),
    /// A page range that must not be believed.
    #[error("frame: page range {index} ({first}+{pages}) {problem}; memory has {memory_pages} pages")]
    Range {
        /// Position in the list.
        index: usize,
        /// First page.
        first: u64,
        /// Pages.
        pages: u64,
        /// What is wrong.
        problem: &'static str,
        /// Pages of guest memory.
        memory_pages: u64,
    },
}

impl FrameError {
    /// Stable code for logs, metrics and the `Error` frame.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Short { .. } => "FRAME_SHORT",
            Self::Checksum { .. } => "FRAME_CHECKSUM",
            Self::Magic(_) => "FRAME_MAGIC",
            Self::Version(_) => "FRAME_VERSION",
            Self::Kind(_) => "FRAME_KIND",
            Self::Field { .. } => "FRAME_FIELD",
            Self::Packed(_) => "FRAME_PACKED",
            Self::Range { .. } => "FRAME_RANGE",
        }
    }
}

/// Checks one part of a frame against the sum that the header carries.
///
/// # Errors
/// [`FrameError::Checksum`].
pub fn check_sum(part: &'static str, bytes: &[u8], expected: u32) -> Result<(), FrameError> {
    let found = crc32c::crc32c(bytes);
    if found == expected { Ok(()) } else { Err(FrameError::Checksum { part, found, expected }) }
}

/// A whole frame in memory; what tests, fuzzers and recorded streams use. The data plane itself reads part by part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// The typed part.
    pub meta: Vec<u8>,
    /// The bulk part.
    pub data: Vec<u8>,
}

impl Frame {
    /// Parses the first frame of `bytes` with every check the data plane makes, for a guest of `memory_pages` pages.
    /// Returns the frame and its length.
    ///
    /// # Errors
    /// Any [`FrameError`].
    pub fn parse(bytes: &[u8], memory_pages: u64) -> Result<(Self, usize), FrameError> {
        let short = |need: usize| FrameError::Short { have: bytes.len(), need };
        let fixed = bytes.first_chunk::<HEADER_BYTES>().ok_or_else(|| short(HEADER_BYTES))?;
        let header = Header::decode(fixed)?;
        let meta_end = HEADER_BYTES + header.meta_len as usize;
        let meta = bytes.get(HEADER_BYTES..meta_end).ok_or_else(|| short(meta_end))?;
        header.check_meta(meta, memory_pages, &mut Vec::new())?;
        let end = meta_end + header.data_len as usize;
        let data = bytes.get(meta_end..end).ok_or_else(|| short(end))?;
        check_sum("data", data, header.data_crc)?;
        Ok((Self { header, meta: meta.to_vec(), data: data.to_vec() }, end))
    }

    /// The frame as bytes, its sums filled in.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut header = self.header.clone();
        header.seal(&self.meta, crc32c::crc32c(&self.data), self.data.len() as u32);
        let mut out = header.encode().to_vec();
        out.extend_from_slice(&self.meta);
        out.extend_from_slice(&self.data);
        out
    }
}
