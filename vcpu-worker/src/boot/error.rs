//! Why a guest could not be put into memory.

use std::path::PathBuf;

use crate::memory::MemoryError;

/// What can go wrong with booting. Nothing of it is the daemon's fault, and none leaves a guest half started: the
/// memory is thrown away with the machine.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootError {
    /// The file is not there.
    #[error("{what} {}: no such file; give an absolute path on this host", .path.display())]
    Missing {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Which file.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("{what} {} cannot be read: {problem}", .path.display())]
    Unreadable {
        /// "kernel" or "initrd".
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why.
        problem: String,
    },
    /// Neither a PVH ELF nor a bzImage nor a flat image.
    #[error("kernel is not bootable: {problem}; give an ELF with a PVH note (vmlinux) or a bzImage")]
    NotAKernel {
        /// What was found.
        problem: String,
    },
    /// The file ends before what its header promises.
    #[error("kernel is truncated: {problem}")]
    Truncated {
        /// What is missing.
        problem: String,
    },
    /// It does not fit.
    #[error("{what} needs {needed} bytes of guest memory, there are {memory}; give the machine more memory")]
    TooLarge {
        /// "kernel", "initrd" or "probe".
        what: &'static str,
        /// Bytes needed.
        needed: u64,
        /// Bytes of guest memory.
        memory: u64,
    },
    /// The command line is too long.
    #[error("cmdline has {len} bytes, the limit is {limit}")]
    CmdlineTooLong {
        /// Its length.
        len: usize,
        /// [`super::CMDLINE_MAX`].
        limit: usize,
    },
    /// The command line holds a zero byte or another byte that is not printable ASCII.
    #[error("cmdline byte {at} is {byte:#04x}; use printable ASCII")]
    CmdlineByte {
        /// Where.
        at: usize,
        /// Which.
        byte: u8,
    },
    /// A parameter of the probe guest is out of range.
    #[error("probe {field} is {value}: {remedy}")]
    Probe {
        /// Field of `ProbeBoot` or of the guest's PMU.
        field: &'static str,
        /// Its value.
        value: u64,
        /// What to give instead.
        remedy: String,
    },
    /// Guest memory refused an access.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl BootError {
    /// Field of the machine's spec that must be changed.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Missing { what, .. } | Self::Unreadable { what, .. } if *what == "initrd" => {
                Some("spec.kernel.initrd_path")
            }
            Self::Missing { .. }
            | Self::Unreadable { .. }
            | Self::NotAKernel { .. }
            | Self::Truncated { .. } => Some("spec.kernel.path"),
            Self::TooLarge { .. } => Some("spec.memory_bytes"),
            Self::CmdlineTooLong { .. } | Self::CmdlineByte { .. } => Some("spec.kernel.cmdline"),
            Self::Probe { .. } => Some("spec.probe"),
            Self::Memory(error) => error.field(),
        }
    }

    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Missing { .. } => "KERNEL_FILE_MISSING",
            Self::Unreadable { .. } => "KERNEL_FILE_UNREADABLE",
            Self::NotAKernel { .. } => "NOT_A_KERNEL",
            Self::Truncated { .. } => "KERNEL_TRUNCATED",
            Self::TooLarge { .. } => "LARGER_THAN_MEMORY",
            Self::CmdlineTooLong { .. } => "CMDLINE_TOO_LONG",
            Self::CmdlineByte { .. } => "CMDLINE_INVALID",
            Self::Probe { .. } => "PROBE_PARAMETER_INVALID",
            Self::Memory(e) => e.reason(),
        }
    }
}
