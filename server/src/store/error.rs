//! What can go wrong with the store: one typed error, each variant with a stable code and a remedy.

use std::path::{Path, PathBuf};

/// An error of the store. Cloneable, because one failed group commit answers many callers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// Another process holds the state directory.
    #[error("state directory {} is in use by {}; stop that vpmud or give this one another --state-dir", dir.display(), holder(*pid))]
    InUse {
        /// The directory.
        dir: PathBuf,
        /// Process id of the holder as it wrote it into the lock file; 0 if it could not be read.
        pid: u32,
    },
    /// The operating system refused something.
    #[error("{what} {}: {message}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// The system's answer.
        message: String,
    },
    /// The database cannot be opened or read.
    #[error("store {} cannot be read: {message}; keep the directory and start with another --state-dir", path.display())]
    Corrupt {
        /// The database.
        path: PathBuf,
        /// What was found.
        message: String,
    },
    /// A record is larger than the store takes.
    #[error("record {key} has {bytes} bytes, more than {max}; store less in it")]
    TooLarge {
        /// The record.
        key: String,
        /// Encoded size in bytes.
        bytes: usize,
        /// The bound in bytes.
        max: usize,
    },
    /// A field that makes a key is not usable.
    #[error("{field} {value:?} cannot be a key: {remedy}")]
    BadField {
        /// Field of the record.
        field: &'static str,
        /// Its value, cut to 80 characters.
        value: String,
        /// What would be accepted.
        remedy: &'static str,
    },
    /// Too many operations are unfinished.
    #[error("{count} operations are unfinished, the bound is {max}; wait for some to end")]
    OperationsFull {
        /// Unfinished operations.
        count: usize,
        /// The bound.
        max: usize,
    },
    /// An earlier write failed; nothing is written any more, reads go on.
    #[error(
        "the store is read-only since a write failed: {cause}; free or repair the disk: vpmud tries again by itself"
    )]
    ReadOnly {
        /// The first failure.
        cause: String,
    },
    /// The store has been closed.
    #[error("the store is closed")]
    Closed,
    /// The ownership journal refused or failed.
    #[error(transparent)]
    Journal(#[from] crate::journal::JournalError),
}

fn holder(pid: u32) -> String {
    if pid == 0 { "another process".to_owned() } else { format!("process {pid}") }
}

impl StoreError {
    /// A stable code for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InUse { .. } => "STATE_DIR_IN_USE",
            Self::Io { .. } => "STORE_IO",
            Self::Corrupt { .. } => "STORE_CORRUPT",
            Self::TooLarge { .. } => "RECORD_TOO_LARGE",
            Self::BadField { .. } => "RECORD_BAD_FIELD",
            Self::OperationsFull { .. } => "OPERATIONS_FULL",
            Self::ReadOnly { .. } => "STORE_READ_ONLY",
            Self::Closed => "STORE_CLOSED",
            Self::Journal(e) => e.reason(),
        }
    }

    pub(crate) fn io(what: &'static str, path: &Path, error: &dyn std::fmt::Display) -> Self {
        Self::Io { what, path: path.to_owned(), message: error.to_string() }
    }

    pub(crate) fn bad_field(field: &'static str, value: &str, remedy: &'static str) -> Self {
        Self::BadField { field, value: value.chars().take(80).collect(), remedy }
    }
}
