//! What a worker may answer instead of doing as asked.
//!
//! Every variant has a stable [`WorkerError::reason`] and a gRPC code; [`WorkerError::into_status`] packs both, with
//! the message, into a status that carries a `google.rpc.ErrorInfo`. A command that fails has changed nothing unless
//! its variant says so.

use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::grant::Refused;
use crate::hypervisor::HvError;
use crate::lazy::LazyError;
use crate::snapshot::SnapshotError;
use crate::vcpu::state::Refusal;

/// `ErrorInfo.domain` of every error of this crate.
pub const DOMAIN: &str = "worker.vpmu";

/// Errors of a worker. Reason codes are stable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkerError {
    /// A core's PMU cannot be taken (mode `msr`).
    #[error("{0}")]
    Msr(#[from] crate::host::msr::MsrError),
    /// vCPUs could not be given other cores.
    #[error("the vCPUs are not moved: {problem}; {}", back_text(.old, .back))]
    Placement {
        /// What failed.
        problem: String,
        /// Where they were.
        old: Vec<u32>,
        /// Whether all are there again, or why not.
        back: Result<(), String>,
    },
    /// An argument is wrong.
    #[error("{field} is {value}: {remedy}")]
    Invalid {
        /// Path of the field.
        field: &'static str,
        /// What was given, shortened.
        value: String,
        /// What to give instead.
        remedy: String,
    },
    /// The fence or the right to run refused it.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// The vCPU's state does not allow it.
    #[error(transparent)]
    Vcpu(#[from] Refusal),
    /// There is no virtual machine yet.
    #[error("this worker holds no virtual machine: call CreateVm first")]
    Empty,
    /// There is one already.
    #[error("this worker already holds virtual machine {name}: shut it down first")]
    Occupied {
        /// Name of the machine it holds.
        name: String,
    },
    /// Not in this state.
    #[error("{what} is not possible in state {state}: {remedy}")]
    State {
        /// What was asked.
        what: &'static str,
        /// State.
        state: String,
        /// What to do.
        remedy: &'static str,
    },
    /// The hypervisor refused.
    #[error(transparent)]
    Hypervisor(#[from] HvError),
    /// Guest memory.
    #[error("guest memory: {0}")]
    Memory(String),
    /// What was to be booted cannot be.
    #[error("boot: {message}")]
    Boot {
        /// Reason code of the loader.
        reason: &'static str,
        /// Field of the machine's spec that asked for it; none where it is no field's fault.
        field: Option<&'static str>,
        /// Message.
        message: String,
    },
    /// The PMU switcher failed.
    #[error("PMU of vCPU {vcpu}: {message}")]
    Pmu {
        /// vCPU index.
        vcpu: u32,
        /// What failed.
        message: String,
    },
    /// PMU state that cannot be set into this guest.
    #[error("PMU image of vCPU {vcpu}: {message}")]
    PmuImage {
        /// vCPU index.
        vcpu: u32,
        /// Why.
        message: String,
    },
    /// A core that this worker does not own.
    #[error(
        "vcpu_cores[{vcpu}] is core {core}, which this host does not give to virtual machines: choose one of {allowed:?}"
    )]
    Core {
        /// vCPU index.
        vcpu: u32,
        /// The core.
        core: u32,
        /// Cores there are.
        allowed: Vec<u32>,
    },
    /// A thread could not be started or pinned, or has ended.
    #[error("thread {thread}: {problem}")]
    Thread {
        /// Its name.
        thread: String,
        /// What happened.
        problem: String,
    },
    /// It did not answer in time. What was asked may still happen.
    #[error("{what} was not done within {within:?}")]
    Deadline {
        /// What.
        what: &'static str,
        /// The bound.
        within: Duration,
    },
    /// The guest does not come to a place where its state can be read whole.
    #[error(
        "vCPU {vcpu} does not get past a software exception (INT3), without which its state is not whole: the machine runs on; try again"
    )]
    Unsettled {
        /// vCPU index.
        vcpu: u32,
    },
    /// A migration.
    #[error("migration {id}: {message}")]
    Migration {
        /// Migration id.
        id: String,
        /// Reason code.
        reason: &'static str,
        /// What happened.
        message: String,
    },
    /// It was asked to stop.
    #[error("{what} was cancelled")]
    Cancelled {
        /// What.
        what: &'static str,
    },
    /// State that came with a migration or a snapshot cannot be used.
    #[error("VM state, {field}: {problem}")]
    BadState {
        /// Field.
        field: &'static str,
        /// What is wrong.
        problem: String,
    },
    /// What memory is to be made of.
    #[error("guest memory: {0}")]
    Backing(#[from] crate::memory::MemoryError),
    /// A snapshot.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// Memory that comes while the guest runs.
    #[error(transparent)]
    Lazy(#[from] LazyError),
}

impl WorkerError {
    /// A wrong argument. The value is cut at 64 characters, because it comes from outside.
    #[expect(clippy::needless_pass_by_value, reason = "callers give numbers and strings alike")]
    pub fn invalid(field: &'static str, value: impl ToString, remedy: impl Into<String>) -> Self {
        let value: String = value.to_string().chars().take(64).collect();
        Self::Invalid { field, value, remedy: remedy.into() }
    }

    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Invalid { .. } => "INVALID_FIELD",
            Self::Refused(r) => r.reason(),
            Self::Vcpu(r) => r.reason(),
            Self::Empty => "WORKER_EMPTY",
            Self::Occupied { .. } => "WORKER_OCCUPIED",
            Self::State { .. } => "ILLEGAL_STATE",
            Self::Hypervisor(e) => e.reason(),
            Self::Memory(_) => "GUEST_MEMORY",
            Self::Boot { reason, .. } | Self::Migration { reason, .. } => reason,
            Self::Pmu { .. } => "PMU_SWITCH_FAILED",
            Self::PmuImage { .. } => "PMU_IMAGE_REJECTED",
            Self::Core { .. } => "CORE_NOT_AVAILABLE",
            Self::Thread { .. } => "THREAD_FAILED",
            Self::Msr(e) => e.reason(),
            Self::Placement { back: Ok(()), .. } => "PLACEMENT_FAILED",
            Self::Placement { back: Err(_), .. } => "PLACEMENT_UNCERTAIN",
            Self::Deadline { .. } => "WORKER_TIMEOUT",
            Self::Unsettled { .. } => "VCPU_UNSETTLED",
            Self::Cancelled { .. } => "CANCELLED",
            Self::BadState { .. } => "STATE_REJECTED",
            Self::Backing(e) => e.reason(),
            Self::Snapshot(e) => e.reason(),
            Self::Lazy(e) => e.reason(),
        }
    }

    /// gRPC code.
    pub fn code(&self) -> Code {
        match self {
            Self::Invalid { .. } | Self::Core { .. } => Code::InvalidArgument,
            Self::Refused(_) | Self::Vcpu(_) | Self::Empty | Self::Occupied { .. } | Self::State { .. } => {
                Code::FailedPrecondition
            }
            Self::Hypervisor(HvError::Unsupported { .. } | HvError::Pmu { .. })
            | Self::Boot { .. }
            | Self::Lazy(LazyError::Unsupported { .. })
            | Self::Msr(_)
            | Self::Placement { back: Ok(()), .. } => Code::FailedPrecondition,
            Self::Memory(_) | Self::Backing(_) => Code::ResourceExhausted,
            Self::Hypervisor(HvError::State { .. }) | Self::PmuImage { .. } | Self::BadState { .. } => {
                Code::DataLoss
            }
            Self::Hypervisor(_)
            | Self::Pmu { .. }
            | Self::Thread { .. }
            | Self::Placement { .. }
            | Self::Lazy(_) => Code::Internal,
            Self::Deadline { .. } => Code::DeadlineExceeded,
            Self::Unsettled { .. } => Code::Unavailable,
            Self::Migration { .. } => Code::Aborted,
            Self::Cancelled { .. } => Code::Cancelled,
            Self::Snapshot(error) => snapshot_code(error),
        }
    }

    /// The status that goes over the wire.
    pub fn into_status(self) -> Status {
        self.to_status()
    }

    /// The same from a shared error.
    pub fn to_status(&self) -> Status {
        let message = self.to_string();
        let mut details = ErrorDetails::with_error_info(self.reason(), DOMAIN, []);
        if let Some(field) = self.field() {
            let value = self.bad_file().map(|value| ("value".to_owned(), value));
            let field_of = ("field".to_owned(), field.to_owned());
            details.set_error_info(
                self.reason(),
                DOMAIN,
                std::iter::once(field_of).chain(value).collect::<std::collections::HashMap<_, _>>(),
            );
            details.add_bad_request_violation(field, message.clone());
        }
        Status::with_error_details(self.code(), message, details)
    }

    /// The field that must be changed, where it is one's fault.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Invalid { field, .. } => Some(field),
            Self::Boot { field, .. } => *field,
            Self::Backing(error) => error.field(),
            // As the public API has it.
            Self::Snapshot(error) => error.bad_file().map(|_| "file"),
            _ => None,
        }
    }

    /// Name of the snapshot's file that cannot be used.
    fn bad_file(&self) -> Option<String> {
        let Self::Snapshot(error) = self else { return None };
        Some(error.bad_file()?.file_name()?.to_string_lossy().into_owned())
    }
}

fn snapshot_code(error: &SnapshotError) -> Code {
    match error {
        SnapshotError::Unreadable { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
            Code::NotFound
        }
        SnapshotError::Unreadable { .. }
        | SnapshotError::NotOne { .. }
        | SnapshotError::Version { .. }
        | SnapshotError::Memory { .. } => Code::FailedPrecondition,
        SnapshotError::Unwritable { .. } => Code::ResourceExhausted,
        SnapshotError::Busy { .. } => Code::Aborted,
        SnapshotError::Length { .. } | SnapshotError::Damaged { .. } => Code::DataLoss,
        SnapshotError::Cancelled => Code::Cancelled,
        SnapshotError::Guest(_) => Code::Internal,
    }
}

fn back_text(old: &[u32], back: &Result<(), String>) -> String {
    match back {
        Ok(()) => format!("all are on cores {old:?} again; choose others"),
        Err(why) => format!("and not all are back on cores {old:?} ({why}); stop the machine"),
    }
}

impl From<WorkerError> for Status {
    fn from(error: WorkerError) -> Self {
        error.into_status()
    }
}
