//! What can go wrong between KVM's own vPMU and an image. `reason` codes are stable.

use pmu::{FilterError, ImageError};

use crate::hypervisor::HvError;

/// Errors of mode `kvm`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KvmPmuError {
    /// KVM has no vPMU on this host.
    #[error("PMU mode kvm is not possible on this host: {why}; {remedy}")]
    None {
        /// The fact that says so.
        why: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The guest's PMU has registers that KVM does not list as state of a vCPU.
    #[error(
        "KVM does not list {registers} as state of a vCPU, but a guest PMU of shape {shape} has them; give the guest a smaller PMU or \
         choose a host whose KVM has them"
    )]
    NotListed {
        /// All of them, by name.
        registers: String,
        /// The guest's PMU.
        shape: String,
    },
    /// The guest's shape cannot be.
    #[error("the guest's PMU: {0}")]
    Shape(#[from] pmu::ShapeError),
    /// A call failed as a whole.
    #[error("{0}")]
    Call(#[from] HvError),
    /// KVM says that it processed more than it was given.
    #[error(
        "{call} says that it processed {processed} of {asked} registers; this is no KVM that can be used"
    )]
    Count {
        /// The call.
        call: &'static str,
        /// Entries of the batch.
        asked: usize,
        /// What it returned.
        processed: usize,
    },
    /// KVM stopped reading before the end.
    #[error(
        "KVM refuses to read {register} ({msr:#x}) after {read} of {of} registers: the vCPU's CPUID does not show this PMU; nothing was saved"
    )]
    ReadRefused {
        /// Name.
        register: String,
        /// MSR.
        msr: u32,
        /// Registers read before it.
        read: usize,
        /// Registers in the batch.
        of: usize,
    },
    /// Two reads in a row differ: the vCPU runs, or KVM's counters do.
    #[error(
        "{register} ({msr:#x}) moved from {first:#x} to {second:#x} between two reads: the vCPU is not stopped; pause it and try again"
    )]
    Moved {
        /// Name.
        register: String,
        /// MSR.
        msr: u32,
        /// First value.
        first: u64,
        /// Second value.
        second: u64,
    },
    /// A value that a guest of this shape cannot have. On restoring, nothing was written.
    #[error("{0}")]
    Image(#[from] ImageError),
    /// The image is another PMU's. Nothing was written.
    #[error("the image is of a PMU {image}, the guest's is {guest}; create the guest with the image's PMU")]
    ShapeDiffers {
        /// Shape and PERF_CAPABILITIES of the image.
        image: String,
        /// Shape and PERF_CAPABILITIES of the guest.
        guest: String,
    },
    /// The image does not hold exactly the guest's registers. Nothing was written.
    #[error("the image lacks [{missing}] and has [{extra}] too many; take it from the source again")]
    Registers {
        /// Names of registers that are missing.
        missing: String,
        /// Names of registers that do not belong.
        extra: String,
    },
    /// The guest has no PMU, but its image holds a value. Nothing was written.
    #[error(
        "the guest has no PMU here, but its image holds {register} ({msr:#x}) = {value:#x} (rule C7); create it with the image's PMU"
    )]
    Disabled {
        /// Name.
        register: String,
        /// MSR.
        msr: u32,
        /// Its value.
        value: u64,
    },
    /// KVM stopped writing before the end.
    #[error("KVM refuses {register} ({msr:#x}) = {value:#x} after {applied} of {of} writes; {stop}")]
    WriteRefused {
        /// Name.
        register: String,
        /// MSR.
        msr: u32,
        /// The value that was refused.
        value: u64,
        /// Writes applied before it, in the order of the batch.
        applied: usize,
        /// Writes in the batch.
        of: usize,
        /// Whether the PMU was stopped afterwards.
        stop: Stop,
    },
    /// A call of the restore failed as a whole; what it had written is unknown.
    #[error("{source}; {stop}")]
    RestoreCall {
        /// The failure.
        #[source]
        source: Box<KvmPmuError>,
        /// Whether the PMU was stopped afterwards.
        stop: Stop,
    },
    /// What was written does not read back.
    #[error("{register} ({msr:#x}) was written {wrote:#x} and reads {reads:#x}; {stop}")]
    NotVerified {
        /// Name.
        register: String,
        /// MSR.
        msr: u32,
        /// Written.
        wrote: u64,
        /// Read.
        reads: u64,
        /// Whether the PMU was stopped afterwards.
        stop: Stop,
    },
    /// An event filter that is none.
    #[error("{0}")]
    Filter(#[from] FilterError),
    /// KVM has no event filter.
    #[error(
        "this host's KVM has no PMU event filter (KVM_CAP_PMU_EVENT_FILTER): use Linux 5.4 or later, or no filter"
    )]
    FilterMissing,
}

impl From<KvmPmuError> for HvError {
    fn from(error: KvmPmuError) -> Self {
        match error {
            KvmPmuError::Call(error) => error,
            other => Self::Pmu { reason: other.reason(), message: other.to_string() },
        }
    }
}

impl KvmPmuError {
    /// Stable reason code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::None { .. } => "PMU_KVM_NONE",
            Self::NotListed { .. } => "PMU_KVM_NOT_LISTED",
            Self::Shape(error) => error.reason(),
            Self::Call(error) => error.reason(),
            Self::Count { .. } => "PMU_KVM_COUNT",
            Self::ReadRefused { .. } => "PMU_KVM_READ_REFUSED",
            Self::Moved { .. } => "PMU_KVM_MOVED",
            Self::Image(error) => error.reason(),
            Self::ShapeDiffers { .. } => "PMU_KVM_SHAPE",
            Self::Registers { .. } => "PMU_KVM_REGISTERS",
            Self::Disabled { .. } => "PMU_KVM_DISABLED",
            Self::WriteRefused { .. } => "PMU_KVM_WRITE_REFUSED",
            Self::RestoreCall { .. } => "PMU_KVM_RESTORE_CALL",
            Self::NotVerified { .. } => "PMU_KVM_NOT_VERIFIED",
            Self::Filter(error) => error.reason(),
            Self::FilterMissing => "PMU_KVM_FILTER_MISSING",
        }
    }

    /// After a failed restore: whether the PMU was stopped. `None` where nothing had been written.
    #[must_use]
    pub fn stop(&self) -> Option<&Stop> {
        match self {
            Self::WriteRefused { stop, .. }
            | Self::RestoreCall { stop, .. }
            | Self::NotVerified { stop, .. } => Some(stop),
            _ => None,
        }
    }
}

/// What came of stopping the PMU after a restore that failed half-way.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stop {
    /// Registers that could not be set to 0, by name; empty: nothing counts.
    pub failed: Vec<String>,
}

impl std::fmt::Display for Stop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.failed.is_empty() {
            f.write_str("the PMU was stopped, nothing counts; restore again or reset it")
        } else {
            write!(f, "{} could not be cleared: do not run this vCPU", self.failed.join(", "))
        }
    }
}
