//! What can keep a measurement from its end.

use std::io;

use vcpu_worker::error::WorkerError;
use vcpu_worker::hypervisor::HvError;
use vpmu_client::{ClientError, EndpointError};

use crate::demo::error::DemoError;

/// Why a measurement did not finish.
#[derive(Debug, thiserror::Error)]
pub(super) enum BenchError {
    /// A measured host did not start or end.
    #[error(transparent)]
    Host(#[from] DemoError),
    /// A call to a measured host failed.
    #[error("{step}: {source}")]
    Call {
        /// What was tried.
        step: &'static str,
        /// Why not.
        source: ClientError,
    },
    /// The run loop on trial.
    #[error(transparent)]
    Worker(#[from] WorkerError),
    /// The bare side.
    #[error("the bare virtual machine: {0}")]
    Bare(#[from] HvError),
    /// A file of ours or of /proc.
    #[error("cannot {what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// Why not.
        source: io::Error,
    },
    /// Something that must be there is not.
    #[error("{0}")]
    Missing(String),
    /// The path of the temporary directory is too long for sockets.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// By a signal.
    #[error("interrupted; everything that it started has ended")]
    Interrupted,
}

impl BenchError {
    /// Stable code.
    pub(super) fn reason(&self) -> &str {
        match self {
            Self::Host(error) => error.reason(),
            Self::Call { source, .. } => source.reason(),
            Self::Worker(error) => error.reason(),
            Self::Bare(_) => "BARE_VM",
            Self::Io { .. } => "IO",
            Self::Missing(_) => "MISSING",
            Self::Endpoint(error) => error.reason(),
            Self::Interrupted => "INTERRUPTED",
        }
    }

    /// An I/O failure.
    pub(super) fn io(what: impl Into<String>, source: io::Error) -> Self {
        Self::Io { what: what.into(), source }
    }
}

/// Adds the step to a client's error.
pub(super) trait Step<T> {
    /// Names what was tried.
    fn step(self, step: &'static str) -> Result<T, BenchError>;
}

impl<T> Step<T> for Result<T, ClientError> {
    fn step(self, step: &'static str) -> Result<T, BenchError> {
        self.map_err(|source| BenchError::Call { step, source })
    }
}
