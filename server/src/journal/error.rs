//! What can go wrong with the ownership journal.

use crate::handover::phase::Refusal;
use std::path::PathBuf;

/// An error of the journal. Cloneable, because one failed group answers many callers.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JournalError {
    /// A decision was handed to the disk and it is not known whether it will survive. Neither resume nor go on until
    /// the same record has been appended with success; append it again.
    #[error(
        "the decision about {vm_uid} is in doubt: {cause}; it must be made durable before anything follows from it"
    )]
    InDoubt {
        /// The machine.
        vm_uid: String,
        /// What failed.
        cause: String,
    },
    /// The record may not follow the one that holds.
    #[error("ownership record refused: {0}")]
    Refused(#[from] Refusal),
    /// A field is unusable.
    #[error("{field} of an ownership record: {problem}")]
    BadField {
        /// The field.
        field: &'static str,
        /// What is wrong and what would be right.
        problem: String,
    },
    /// There is no space that a new migration's decisions could be sure of.
    #[error(
        "no space can be reserved in the journal: {cause}; free space on the state directory's file system"
    )]
    NoSpace {
        /// The system's answer.
        cause: String,
    },
    /// The journal cannot be opened.
    #[error("journal {}: {message}", path.display())]
    Open {
        /// Its directory.
        path: PathBuf,
        /// What failed.
        message: String,
    },
    /// The journal has been closed.
    #[error("the journal is closed")]
    Closed,
}

impl JournalError {
    /// A stable code for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InDoubt { .. } => "DECISION_IN_DOUBT",
            Self::Refused(r) => r.reason(),
            Self::BadField { .. } => "OWNERSHIP_BAD_FIELD",
            Self::NoSpace { .. } => "JOURNAL_NO_SPACE",
            Self::Open { .. } => "JOURNAL_OPEN",
            Self::Closed => "JOURNAL_CLOSED",
        }
    }
}
