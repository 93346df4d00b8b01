//! The three instructions that a switcher needs, as a trait.
//!
//! Back ends: [`crate::ModelPmu`] (register-accurate software) and [`crate::msr_device::MsrDevice`]
//! (`/dev/cpu/N/msr`). Everything above this trait is the same code for both, so what tests prove on the model
//! holds for the code that drives hardware.

/// Why an access failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HwError {
    /// #GP: the register does not exist or the value has a reserved bit (EIO from the msr driver).
    #[error("the access faulted (#GP)")]
    Fault,
    /// The device refused or failed.
    #[error("the msr device answered errno {0}")]
    Io(i32),
    /// The calling thread is not on the core that this PMU belongs to.
    #[error("on core {actual}, but this PMU is core {expected}'s")]
    WrongCore {
        /// Core of the PMU.
        expected: u32,
        /// Core of the thread.
        actual: u32,
    },
    /// A fault that a test asked for.
    #[error("injected failure")]
    Injected,
}

impl HwError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Fault => "PMU_ACCESS_FAULT",
            Self::Io(_) => "PMU_DEVICE_ERROR",
            Self::WrongCore { .. } => "PMU_WRONG_CORE",
            Self::Injected => "PMU_INJECTED_FAILURE",
        }
    }
}

/// A core's PMU.
pub trait Hardware {
    /// Event select INT and fixed-counter PMI bits must not reach this hardware, because an overflow interrupt would
    /// arrive at the host as an NMI that nobody claims (reference section 5, row 06).
    const STRIP_PMI: bool = false;

    /// RDMSR.
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError>;
    /// WRMSR.
    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError>;
    /// RDPMC: a general-purpose counter's index, or `1 << 30` plus a fixed counter's.
    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError>;
}
