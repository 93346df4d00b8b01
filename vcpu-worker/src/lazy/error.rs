//! Why memory does not come.

use crate::memory::MemoryError;

/// Why memory does not come.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LazyError {
    /// The host cannot do it.
    #[error(
        "memory cannot be fetched on demand here: {problem}; run as root or with CAP_SYS_PTRACE, or set \
         vm.unprivileged_userfaultfd = 1"
    )]
    Unsupported {
        /// What is missing.
        problem: String,
    },
    /// The source has none.
    #[error("page {page} of the guest's memory could not be fetched: {problem}")]
    Source {
        /// First page asked for.
        page: u64,
        /// What the source said.
        problem: String,
    },
    /// A page could not be put in its place.
    #[error("page {page} of the guest's memory could not be placed: {problem}")]
    Place {
        /// Page.
        page: u64,
        /// Why.
        problem: String,
    },
    /// Given up by its owner before all was there.
    #[error("fetching memory was given up with {left} pages missing: {why}")]
    Abandoned {
        /// Pages not there.
        left: u64,
        /// Why.
        why: String,
    },
    /// Guest memory refused.
    #[error("guest memory: {0}")]
    Memory(String),
}

impl LazyError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Unsupported { .. } => "LAZY_MEMORY_UNSUPPORTED",
            Self::Source { .. } => "LAZY_MEMORY_SOURCE_FAILED",
            Self::Place { .. } => "LAZY_MEMORY_PLACE_FAILED",
            Self::Abandoned { .. } => "LAZY_MEMORY_ABANDONED",
            Self::Memory(_) => "LAZY_MEMORY_REFUSED",
        }
    }
}

impl From<MemoryError> for LazyError {
    fn from(error: MemoryError) -> Self {
        Self::Memory(error.to_string())
    }
}
