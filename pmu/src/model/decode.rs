//! Which register of the model an MSR number is.
//!
//! Kept apart from the crate's register table on purpose: the switcher is tested against this one, and two maps that must agree find each
//! other's mistakes.

use super::ModelPmu;
use crate::shape::Vendor;

/// A register that exists in a given model, by role.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Register {
    /// GP counter; `legacy` is Intel's `0xC1+i` port, whose writes are sign-extended from 32 bits.
    Counter {
        index: usize,
        legacy: bool,
    },
    Selector(usize),
    Fixed(usize),
    FixedControl,
    GlobalControl,
    Status,
    StatusReset,
    StatusSet,
    InUse,
    Capabilities,
    Metrics,
    DebugControl,
    /// Intel `0xC1`, `0xC2`, `0x186`, `0x187` where the counter is absent: writes are dropped, reads are 0 (P6 compatibility).
    Dropped,
}

const FW_WRITE: u64 = 1 << 13;
const PERF_METRICS: u64 = 1 << 15;

impl ModelPmu {
    /// The register behind an MSR number, or `None` if the MSR does not exist in this shape (or is no PMU register).
    pub(super) fn decode(&self, msr: u32) -> Option<Register> {
        match self.shape.vendor {
            Vendor::Intel => self.decode_intel(msr),
            Vendor::Amd => self.decode_amd(msr),
        }
    }

    fn decode_intel(&self, msr: u32) -> Option<Register> {
        let version = self.shape.version;
        let fixed = |base: u32| index_of(msr, base, self.fixed);
        if let Some(index) = index_of(msr, 0xC1, self.gp) {
            return Some(Register::Counter { index, legacy: true });
        }
        if let Some(index) = index_of(msr, 0x186, self.gp) {
            return Some(Register::Selector(index));
        }
        if let (Some(index), true) =
            (index_of(msr, 0x4C1, self.gp), self.shape.perf_capabilities & FW_WRITE != 0)
        {
            return Some(Register::Counter { index, legacy: false });
        }
        match msr {
            0xC1 | 0xC2 | 0x186 | 0x187 => Some(Register::Dropped),
            0x1D9 => Some(Register::DebugControl),
            0x345 => Some(Register::Capabilities),
            0x329 if self.has_metrics() => Some(Register::Metrics),
            0x38D if version >= 2 => Some(Register::FixedControl),
            0x38E if version >= 2 => Some(Register::Status),
            0x38F if version >= 2 => Some(Register::GlobalControl),
            0x390 if version >= 2 => Some(Register::StatusReset),
            0x391 if version >= 4 => Some(Register::StatusSet),
            0x392 if version >= 4 => Some(Register::InUse),
            _ => fixed(0x309).map(Register::Fixed),
        }
    }

    fn decode_amd(&self, msr: u32) -> Option<Register> {
        let counter = |index| Register::Counter { index, legacy: false };
        match msr {
            0xC001_0000..=0xC001_0003 => index_of(msr, 0xC001_0000, self.gp).map(Register::Selector),
            0xC001_0004..=0xC001_0007 => index_of(msr, 0xC001_0004, self.gp).map(counter),
            0xC001_0200..=0xC001_0223 if self.shape.version >= 1 => {
                let index = index_of((msr - 0xC001_0200) / 2, 0, self.gp)?;
                Some(if msr & 1 == 0 { Register::Selector(index) } else { counter(index) })
            }
            0xC000_0300 if self.shape.version >= 2 => Some(Register::Status),
            0xC000_0301 if self.shape.version >= 2 => Some(Register::GlobalControl),
            0xC000_0302 if self.shape.version >= 2 => Some(Register::StatusReset),
            0xC000_0303 if self.shape.version >= 2 => Some(Register::StatusSet),
            0x1D9 => Some(Register::DebugControl),
            _ => None,
        }
    }

    /// PERF_METRICS exists (PERF_CAPABILITIES[15], Intel).
    pub(super) fn has_metrics(&self) -> bool {
        self.shape.vendor == Vendor::Intel && self.shape.perf_capabilities & PERF_METRICS != 0
    }
}

/// The counter index behind an MSR of a run that starts at `base`, if that counter exists.
fn index_of(msr: u32, base: u32, bitmap: u64) -> Option<usize> {
    let index = msr.checked_sub(base)?;
    (index < 64 && bitmap >> index & 1 == 1).then_some(index as usize)
}
