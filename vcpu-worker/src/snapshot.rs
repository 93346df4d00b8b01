//! A whole machine in one file: state, PMU included, and memory without the pages that are zero.
//!
//! ```text
//!   header   4096 bytes: magic, schema version, lengths, checksums of state and table, its own checksum at the end
//!   data     pages, chunk by chunk
//!   state    a SnapshotManifest
//!   table    16 bytes a chunk: first page, pages, checksum of its data
//! ```
//!
//! Invariants: every byte of the file is under a CRC-32C; every length is bounded and checked against the file's before
//! it is used; a file is complete or not there under its name (written under another one, synced, renamed, directory
//! synced); a reader changes nothing before the parts that it uses were verified.
//!
//! [`write`](mod@write) makes one, [`read`] opens one; [`lazy`] serves its pages to a guest that runs already.

pub mod lazy;
pub mod read;
#[cfg(test)]
mod tests;
pub mod write;

use std::path::PathBuf;

use crate::memory::{self, PAGE_SIZE};

/// Schema that this build writes, and the only one so far.
pub const VERSION: u32 = 1;
/// First bytes of a file.
pub const MAGIC: [u8; 8] = *b"VPMUSNAP";
/// Bytes of the header.
pub const HEADER: u64 = 4096;
/// Most pages in a chunk, which is what is read and verified at once (256 KiB).
pub const CHUNK_PAGES: u64 = 64;
/// Most bytes of state: 256 vCPUs with their PMU and 256 KiB of console are some 10 MiB.
pub const MAX_STATE: u64 = 64 << 20;
/// Bytes of a table entry.
const ENTRY: u64 = 16;

/// Why a snapshot cannot be made or used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The file system refused while reading.
    #[error("snapshot {path}: {what}: {source}; {}", readable(source))]
    Unreadable {
        /// File.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The file system refused while writing; no file is left.
    #[error("snapshot {path}: {what}: {source}; free space or choose another directory")]
    Unwritable {
        /// File.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// Somebody else writes it at this moment.
    #[error("snapshot {path} is being written by another operation: wait for it or use another name")]
    Busy {
        /// File.
        path: PathBuf,
    },
    /// It is something else.
    #[error("{path} is no snapshot of vpmud: {found}; name a file that `vpmuctl vm snapshot` wrote")]
    NotOne {
        /// File.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// A schema of another build.
    #[error(
        "snapshot {path} has schema {found}, this build reads {VERSION}: use a build that reads it, or take it again"
    )]
    Version {
        /// File.
        path: PathBuf,
        /// Its schema.
        found: u32,
    },
    /// Shorter or longer than it says.
    #[error(
        "snapshot {path} is {have} bytes long and should be {want}: it was cut or added to; take it again"
    )]
    Length {
        /// File.
        path: PathBuf,
        /// Bytes there are.
        have: u64,
        /// Bytes its header says.
        want: u64,
    },
    /// A part does not match its checksum, or contradicts another.
    #[error("snapshot {path} is damaged: {part}: {problem}; take it again or use a copy")]
    Damaged {
        /// File.
        path: PathBuf,
        /// header, state, table or data.
        part: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// It does not fit the machine.
    #[error(
        "snapshot {path} has {snapshot} bytes of guest memory, the machine {machine}: restore it into one of the same size"
    )]
    Memory {
        /// File.
        path: PathBuf,
        /// Bytes in it.
        snapshot: u64,
        /// Bytes of the machine.
        machine: u64,
    },
    /// It was asked to stop; no file is left.
    #[error("the snapshot was cancelled; no file is left")]
    Cancelled,
    /// Guest memory refused.
    #[error("guest memory: {0}")]
    Guest(#[from] memory::MemoryError),
}

/// What to do about a file that cannot be read.
fn readable(problem: &std::io::Error) -> &'static str {
    use rustix::io::Errno;
    match Errno::from_io_error(problem) {
        Some(Errno::NOENT) => "name a file that is in the snapshot directory",
        Some(Errno::ACCESS | Errno::PERM) => "let vpmud read it",
        Some(Errno::LOOP) => "no link is followed: name the file itself",
        _ => "look at the file system that it is on",
    }
}

impl SnapshotError {
    /// The file that is at fault, whatever made it so.
    pub fn bad_file(&self) -> Option<&std::path::Path> {
        match self {
            Self::Unreadable { path, .. }
            | Self::NotOne { path, .. }
            | Self::Version { path, .. }
            | Self::Length { path, .. }
            | Self::Damaged { path, .. }
            | Self::Memory { path, .. } => Some(path),
            Self::Unwritable { .. } | Self::Busy { .. } | Self::Cancelled | Self::Guest(_) => None,
        }
    }

    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unreadable { .. } => "SNAPSHOT_UNREADABLE",
            Self::Unwritable { .. } => "SNAPSHOT_UNWRITABLE",
            Self::Busy { .. } => "SNAPSHOT_BUSY",
            Self::NotOne { .. } => "SNAPSHOT_NOT_ONE",
            Self::Version { .. } => "SNAPSHOT_VERSION_UNSUPPORTED",
            Self::Length { .. } => "SNAPSHOT_LENGTH_WRONG",
            Self::Damaged { .. } => "SNAPSHOT_DAMAGED",
            Self::Memory { .. } => "SNAPSHOT_MEMORY_MISMATCH",
            Self::Cancelled => "CANCELLED",
            Self::Guest(e) => e.reason(),
        }
    }
}

/// The fixed part of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Header {
    memory_bytes: u64,
    data_bytes: u64,
    state_bytes: u64,
    table_bytes: u64,
    state_crc: u32,
    table_crc: u32,
}

/// A chunk of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    /// First page of the memfd.
    pub first: u64,
    /// Pages, 1 to [`CHUNK_PAGES`].
    pub pages: u64,
    /// CRC-32C of its data.
    crc: u32,
    /// Where its data is in the file.
    at: u64,
}

impl Chunk {
    /// Bytes of its data.
    pub fn bytes(&self) -> u64 {
        self.pages * PAGE_SIZE
    }
}

impl Header {
    fn file_bytes(&self) -> u64 {
        HEADER + self.data_bytes + self.state_bytes + self.table_bytes
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER as usize);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        out.extend_from_slice(&(HEADER as u32).to_le_bytes());
        for word in [self.memory_bytes, self.data_bytes, self.state_bytes, self.table_bytes] {
            out.extend_from_slice(&word.to_le_bytes());
        }
        out.extend_from_slice(&self.state_crc.to_le_bytes());
        out.extend_from_slice(&self.table_crc.to_le_bytes());
        out.resize(HEADER as usize - 4, 0);
        let crc = crc32c::crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        out
    }
}
