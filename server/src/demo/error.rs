//! What can keep the demo from its end.

use std::io;
use std::time::Duration;
use vpmu_client::{ClientError, EndpointError};

/// Why the demo did not finish. Checks that do not hold are in the report instead.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    /// A file, directory or process of ours.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// A host did not get ready.
    #[error("host {host} did not get ready: {problem}")]
    NotReady {
        /// "a" or "b".
        host: &'static str,
        /// What happened instead.
        problem: String,
    },
    /// A host did not end as it should.
    #[error("host {host} did not end cleanly: {problem}")]
    NotEnded {
        /// "a" or "b".
        host: &'static str,
        /// What happened instead.
        problem: String,
    },
    /// A call to a host failed.
    #[error("{step}: {source}")]
    Call {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: ClientError,
    },
    /// Something did not happen in time.
    #[error("{what} within {} s; last seen: {last}", .waited.as_secs())]
    Waited {
        /// What did not happen.
        what: &'static str,
        /// How long was waited.
        waited: Duration,
        /// What was there instead.
        last: String,
    },
    /// The temporary directory's path is too long for sockets.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// A signal came.
    #[error("ended by {signal}; everything is cleaned up")]
    Interrupted {
        /// Its name.
        signal: &'static str,
    },
    /// The whole took too long.
    #[error("did not finish within {} s", .waited.as_secs())]
    TooLong {
        /// The bound.
        waited: Duration,
    },
}

impl DemoError {
    /// Stable code.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Io { .. } => "IO",
            Self::NotReady { .. } => "HOST_NOT_READY",
            Self::NotEnded { .. } => "HOST_NOT_ENDED",
            Self::Call { source, .. } => source.reason(),
            Self::Waited { .. } => "WAITED_IN_VAIN",
            Self::Endpoint(error) => error.reason(),
            Self::Interrupted { .. } => "INTERRUPTED",
            Self::TooLong { .. } => "TOO_LONG",
        }
    }

    /// An I/O failure of something of ours.
    pub(crate) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

/// Adds the step to a client's error.
pub(crate) trait Step<T> {
    /// Names what was tried.
    fn step(self, step: &'static str) -> Result<T, DemoError>;
}

impl<T> Step<T> for Result<T, ClientError> {
    fn step(self, step: &'static str) -> Result<T, DemoError> {
        self.map_err(|source| DemoError::Call { step, source })
    }
}
