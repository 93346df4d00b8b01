//! What a read or write of each register does: values, faults and side effects (pmu-reference 1.2, 1.3, 1.5, 1.7, 1.8).

use super::decode::Register;
use super::{CTR_FRZ, INT, ModelPmu, bits, low_bits};
use crate::hardware::HwError;
use crate::shape::Vendor;

/// Intel EVENTSEL: bits 63:32 and 21 (ANY) are reserved.
const INTEL_SELECTOR: u64 = 0xFFFF_FFFF & !(1 << 21);
/// AMD PERF_CTL: bits 63:36, 21 and 19 are reserved, except GuestOnly (40) and HostOnly (41).
const AMD_SELECTOR: u64 = !0xFFFF_FFF0_0028_0000 | 3 << 40;
/// DEBUGCTL bits that exist: 0, 1 and 15:6 (Intel); AMD keeps 5:0.
const INTEL_DEBUG_CONTROL: u64 = 0xFFC3;
const AMD_DEBUG_CONTROL: u64 = 0x3F;
const LBR_FRZ: u64 = 1 << 58;
const OVF_BUF: u64 = 1 << 62;
const COND_CHGD: u64 = 1 << 63;
const METRICS_BIT: u64 = 1 << 48;
/// RDPMC: fixed counters, and PERF_METRICS.
const RDPMC_FIXED: u32 = 1 << 30;
const RDPMC_METRICS: u32 = 1 << 29;

impl ModelPmu {
    pub(super) fn read(&self, register: Register) -> u64 {
        match register {
            Register::Counter { index, .. } => self.counters[index],
            Register::Selector(index) => self.selectors[index],
            Register::Fixed(index) => self.fixed_counters[index],
            Register::FixedControl => self.fixed_control,
            Register::GlobalControl => self.global_control,
            Register::Status => self.status,
            Register::StatusReset | Register::StatusSet | Register::Dropped => 0,
            Register::InUse => self.in_use(),
            Register::Capabilities => self.shape.perf_capabilities,
            Register::Metrics => self.metrics,
            Register::DebugControl => self.debug_control,
        }
    }

    pub(super) fn write(&mut self, register: Register, value: u64) -> Result<(), HwError> {
        match register {
            Register::Counter { index, legacy } => {
                self.counters[index] = self.counter_value(value, legacy)?;
            }
            Register::Selector(index) => self.selectors[index] = self.accept(value, self.selector_mask())?,
            Register::Fixed(index) => {
                self.fixed_counters[index] =
                    self.accept(value, low_bits(u32::from(self.shape.fixed_width)))?;
                if index == 3 {
                    self.metrics = 0;
                }
            }
            Register::FixedControl => self.fixed_control = self.accept(value, self.fixed_control_mask())?,
            Register::GlobalControl => {
                self.global_control = self.accept(value, self.global_control_mask())?;
            }
            Register::StatusReset => self.status &= !self.accept(value, self.status_mask())?,
            Register::StatusSet => self.status |= self.accept(value, self.status_mask())?,
            Register::Metrics => self.metrics = value,
            Register::DebugControl => self.debug_control = self.accept(value, self.debug_control_mask())?,
            Register::Status if self.shape.vendor == Vendor::Amd => {}
            Register::Dropped => {}
            Register::Status | Register::InUse | Register::Capabilities => return Err(HwError::Fault),
        }
        Ok(())
    }

    pub(super) fn read_pmc(&self, index: u32) -> Option<u64> {
        let at = |bitmap: u64, i: u32| (i < 64 && bitmap >> i & 1 == 1).then_some(i as usize);
        if let Some(i) = at(self.gp, index) {
            return self.counters.get(i).copied();
        }
        match (self.shape.vendor, index) {
            (Vendor::Intel, RDPMC_METRICS) if self.has_metrics() => Some(self.metrics),
            (Vendor::Intel, _) => {
                let i = at(self.fixed, index.checked_sub(RDPMC_FIXED)?)?;
                self.fixed_counters.get(i).copied()
            }
            (Vendor::Amd, _) => None,
        }
    }

    /// What a write leaves of a value, given the bits that exist: Intel faults on any other, AMD drops them.
    pub(super) fn accept(&self, value: u64, mask: u64) -> Result<u64, HwError> {
        match self.shape.vendor {
            Vendor::Intel if value & !mask != 0 => Err(HwError::Fault),
            _ => Ok(value & mask),
        }
    }

    fn counter_value(&self, value: u64, legacy: bool) -> Result<u64, HwError> {
        let mask = low_bits(u32::from(self.shape.gp_width));
        if legacy {
            // EDX is ignored, bit 31 of EAX is copied upwards (SDM 20.2.8).
            return Ok(i64::from((value as u32).cast_signed()).cast_unsigned() & mask);
        }
        self.accept(value, mask)
    }

    fn selector_mask(&self) -> u64 {
        match self.shape.vendor {
            Vendor::Intel => INTEL_SELECTOR,
            Vendor::Amd => AMD_SELECTOR,
        }
    }

    /// OS, USR and PMI of each fixed counter that exists; ANY (bit 2 of a field) is reserved.
    fn fixed_control_mask(&self) -> u64 {
        bits(self.fixed).fold(0, |mask, i| mask | 0xB << (4 * i))
    }

    fn global_control_mask(&self) -> u64 {
        self.gp | self.fixed << 32 | if self.has_metrics() { METRICS_BIT } else { 0 }
    }

    /// The bits that STATUS can hold, and that RESET and SET take.
    pub(super) fn status_mask(&self) -> u64 {
        let counters = self.global_control_mask();
        match self.shape.vendor {
            Vendor::Amd => counters,
            Vendor::Intel if self.shape.version >= 4 => counters | OVF_BUF | COND_CHGD | LBR_FRZ | CTR_FRZ,
            Vendor::Intel => counters | OVF_BUF | COND_CHGD,
        }
    }

    fn debug_control_mask(&self) -> u64 {
        match self.shape.vendor {
            Vendor::Intel => INTEL_DEBUG_CONTROL,
            Vendor::Amd => AMD_DEBUG_CONTROL,
        }
    }

    /// GLOBAL_INUSE: which selectors are not empty, and bit 63 if any PMI is armed. A selector of event 0x00 reads as unused.
    fn in_use(&self) -> u64 {
        let mut value = 0;
        for i in bits(self.gp) {
            let selector = self.selectors[i];
            value |= u64::from(selector & 0xFF != 0) << i | u64::from(selector & INT != 0) << 63;
        }
        for i in bits(self.fixed) {
            let field = self.fixed_control >> (4 * i);
            value |= u64::from(field & 3 != 0) << (32 + i) | u64::from(field & 8 != 0) << 63;
        }
        value
    }
}
