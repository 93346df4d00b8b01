//! MSR numbers of both vendors' PMUs, and what each number means for a given PMU flavour.
//!
//! Sources: Intel SDM vol. 4 (architectural MSRs) and vol. 3 chapter 20 (architectural performance monitoring); AMD APM
//! vol. 2 section 13.2; KVM `arch/x86/kvm/pmu.c`.

use crate::shape::{Shape, Vendor};

/// Counters that an array of general-purpose counters holds at most.
pub const MAX_GP: usize = 16;
/// Fixed counters that an array holds at most.
pub const MAX_FIXED: usize = 8;
/// Highest number of general-purpose counters by the legacy Intel MSR numbers (0xC1 to 0xCA).
pub const MAX_INTEL_GP: u32 = 10;

/// IA32_PMC0, legacy alias: writes are sign-extended from bit 31.
pub const IA32_PMC0: u32 = 0xC1;
/// IA32_PERFEVTSEL0.
pub const IA32_PERFEVTSEL0: u32 = 0x186;
/// IA32_FIXED_CTR0.
pub const IA32_FIXED_CTR0: u32 = 0x309;
/// MSR_PERF_METRICS.
pub const MSR_PERF_METRICS: u32 = 0x329;
/// IA32_PERF_CAPABILITIES.
pub const IA32_PERF_CAPABILITIES: u32 = 0x345;
/// IA32_FIXED_CTR_CTRL.
pub const IA32_FIXED_CTR_CTRL: u32 = 0x38D;
/// IA32_PERF_GLOBAL_STATUS.
pub const IA32_PERF_GLOBAL_STATUS: u32 = 0x38E;
/// IA32_PERF_GLOBAL_CTRL.
pub const IA32_PERF_GLOBAL_CTRL: u32 = 0x38F;
/// IA32_PERF_GLOBAL_OVF_CTRL, from v4 on IA32_PERF_GLOBAL_STATUS_RESET.
pub const IA32_PERF_GLOBAL_STATUS_RESET: u32 = 0x390;
/// IA32_PERF_GLOBAL_STATUS_SET (v4).
pub const IA32_PERF_GLOBAL_STATUS_SET: u32 = 0x391;
/// IA32_PERF_GLOBAL_INUSE (v4).
pub const IA32_PERF_GLOBAL_INUSE: u32 = 0x392;
/// IA32_PEBS_ENABLE.
pub const IA32_PEBS_ENABLE: u32 = 0x3F1;
/// MSR_PEBS_DATA_CFG.
pub const MSR_PEBS_DATA_CFG: u32 = 0x3F2;
/// IA32_A_PMC0: full-width alias of IA32_PMC0.
pub const IA32_A_PMC0: u32 = 0x4C1;
/// IA32_DS_AREA.
pub const IA32_DS_AREA: u32 = 0x600;
/// IA32_DEBUGCTL: bit 12 is FREEZE_PERFMON_ON_PMI.
pub const IA32_DEBUGCTL: u32 = 0x1D9;

/// K7 PERFEVTSEL0.
pub const K7_EVNTSEL0: u32 = 0xC001_0000;
/// K7 PERFCTR0.
pub const K7_PERFCTR0: u32 = 0xC001_0004;
/// PerfCtrExtCore PERF_CTL0; counter i is at +2i, its PERF_CTR at +2i+1.
pub const F15H_PERF_CTL0: u32 = 0xC001_0200;
/// PerfCtrExtCore PERF_CTR0.
pub const F15H_PERF_CTR0: u32 = 0xC001_0201;
/// PerfMonV2 PerfCntrGlobalStatus.
pub const AMD_GLOBAL_STATUS: u32 = 0xC000_0300;
/// PerfMonV2 PerfCntrGlobalCtl.
pub const AMD_GLOBAL_CTL: u32 = 0xC000_0301;
/// PerfMonV2 PerfCntrGlobalStatusClr.
pub const AMD_GLOBAL_STATUS_CLR: u32 = 0xC000_0302;
/// PerfMonV2 PerfCntrGlobalStatusSet.
pub const AMD_GLOBAL_STATUS_SET: u32 = 0xC000_0303;

/// Event select: user-mode enable.
pub const SEL_USR: u64 = 1 << 16;
/// Event select: kernel-mode enable.
pub const SEL_OS: u64 = 1 << 17;
/// Event select: edge detect.
pub const SEL_EDGE: u64 = 1 << 18;
/// Event select: overflow interrupt.
pub const SEL_INT: u64 = 1 << 20;
/// Event select: AnyThread (always reserved here).
pub const SEL_ANY: u64 = 1 << 21;
/// Event select: enable.
pub const SEL_EN: u64 = 1 << 22;
/// Event select: invert the counter mask.
pub const SEL_INV: u64 = 1 << 23;
/// Event select: counter mask.
pub const SEL_CMASK: u64 = 0xFF << 24;
/// AMD event select: bits that are silently dropped (KVM: 63:36, 21, 19), GuestOnly and HostOnly among them.
pub const AMD_SEL_RESERVED: u64 = 0xFFFF_FFF0_0028_0000;
/// AMD event select: count in guest mode only.
pub const AMD_SEL_GUEST_ONLY: u64 = 1 << 40;
/// AMD event select: count in host mode only.
pub const AMD_SEL_HOST_ONLY: u64 = 1 << 41;

/// Overflow status: LBRs are frozen (v4).
pub const STATUS_LBR_FRZ: u64 = 1 << 58;
/// Overflow status: counters are frozen (v4).
pub const STATUS_CTR_FRZ: u64 = 1 << 59;
/// Overflow status: DS buffer overflow.
pub const STATUS_OVF_BUF: u64 = 1 << 62;
/// Overflow status: condition changed.
pub const STATUS_COND_CHGD: u64 = 1 << 63;

/// PERF_CAPABILITIES: full-width counter writes.
pub const CAP_FW_WRITE: u64 = 1 << 13;
/// PERF_CAPABILITIES: PERF_METRICS.
pub const CAP_PERF_METRICS: u64 = 1 << 15;

/// RDPMC index of fixed counter 0.
pub const RDPMC_FIXED: u32 = 1 << 30;

/// Every PMU MSR of both vendors as (first, count): what an MSR filter must catch (switch.md section 8). KVM takes at
/// most 16 ranges.
pub const PMU_MSR_RANGES: &[(u32, u32)] = &[
    (IA32_PMC0, MAX_INTEL_GP),
    (IA32_PERFEVTSEL0, MAX_INTEL_GP),
    (IA32_FIXED_CTR0, MAX_FIXED as u32),
    (MSR_PERF_METRICS, 1),
    (IA32_PERF_CAPABILITIES, 1),
    (IA32_FIXED_CTR_CTRL, 6),
    (IA32_PEBS_ENABLE, 2),
    (IA32_A_PMC0, MAX_INTEL_GP),
    (IA32_DS_AREA, 1),
    (K7_EVNTSEL0, 8),
    (F15H_PERF_CTL0, 2 * MAX_GP as u32),
    (AMD_GLOBAL_STATUS, 4),
];

/// Whether a number is a PMU MSR of either vendor.
pub fn is_pmu_msr(msr: u32) -> bool {
    PMU_MSR_RANGES.iter().any(|&(first, count)| msr >= first && msr - first < count)
}

/// What an MSR number means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reg {
    /// General-purpose counter through the alias that sign-extends writes from bit 31.
    GpCounterLegacy(u32),
    /// General-purpose counter, full width.
    GpCounter(u32),
    /// Event select.
    GpSelector(u32),
    /// Fixed counter.
    FixedCounter(u32),
    /// Fixed control.
    FixedControl,
    /// Overflow status.
    Status,
    /// Global control.
    Control,
    /// Write-1-to-clear port of the overflow status.
    StatusReset,
    /// Write-1-to-set port of the overflow status.
    StatusSet,
    /// Which counters have a selector.
    InUse,
    /// IA32_PERF_CAPABILITIES.
    Capabilities,
    /// Anything else in the PMU's ranges: metrics, PEBS, the DS area.
    Unsupported,
}

/// What `msr` means on a PMU of this vendor and version, whether or not the counter exists.
pub fn decode(vendor: Vendor, version: u8, msr: u32) -> Option<Reg> {
    let within = |first: u32, count: u32| (msr >= first && msr - first < count).then(|| msr - first);
    match vendor {
        Vendor::Intel => {
            if let Some(i) = within(IA32_PMC0, MAX_INTEL_GP) {
                return Some(Reg::GpCounterLegacy(i));
            }
            if let Some(i) = within(IA32_A_PMC0, MAX_INTEL_GP) {
                return Some(Reg::GpCounter(i));
            }
            if let Some(i) = within(IA32_PERFEVTSEL0, MAX_INTEL_GP) {
                return Some(Reg::GpSelector(i));
            }
            if let Some(i) = within(IA32_FIXED_CTR0, MAX_FIXED as u32) {
                return Some(Reg::FixedCounter(i));
            }
            Some(match msr {
                IA32_FIXED_CTR_CTRL => Reg::FixedControl,
                IA32_PERF_GLOBAL_STATUS => Reg::Status,
                IA32_PERF_GLOBAL_CTRL => Reg::Control,
                IA32_PERF_GLOBAL_STATUS_RESET => Reg::StatusReset,
                IA32_PERF_GLOBAL_STATUS_SET => Reg::StatusSet,
                IA32_PERF_GLOBAL_INUSE => Reg::InUse,
                IA32_PERF_CAPABILITIES => Reg::Capabilities,
                MSR_PERF_METRICS | IA32_PEBS_ENABLE | MSR_PEBS_DATA_CFG | IA32_DS_AREA => Reg::Unsupported,
                _ => return None,
            })
        }
        Vendor::Amd => {
            if let Some(i) = within(K7_EVNTSEL0, 4) {
                return Some(Reg::GpSelector(i));
            }
            if let Some(i) = within(K7_PERFCTR0, 4) {
                return Some(Reg::GpCounter(i));
            }
            if version >= 1
                && let Some(i) = within(F15H_PERF_CTL0, 2 * MAX_GP as u32)
            {
                return Some(if i % 2 == 0 { Reg::GpSelector(i / 2) } else { Reg::GpCounter(i / 2) });
            }
            if version >= 2 {
                return Some(match msr {
                    AMD_GLOBAL_STATUS => Reg::Status,
                    AMD_GLOBAL_CTL => Reg::Control,
                    AMD_GLOBAL_STATUS_CLR => Reg::StatusReset,
                    AMD_GLOBAL_STATUS_SET => Reg::StatusSet,
                    _ => return None,
                });
            }
            None
        }
    }
}

/// The numbers by which a shape's registers are reached, in an image and in hardware.
impl Shape {
    /// Event select of counter `i`.
    pub const fn selector_msr(&self, i: u32) -> u32 {
        match (self.vendor, self.version) {
            (Vendor::Intel, _) => IA32_PERFEVTSEL0 + i,
            (Vendor::Amd, 0) => K7_EVNTSEL0 + i,
            (Vendor::Amd, _) => F15H_PERF_CTL0 + 2 * i,
        }
    }

    /// Counter `i` as it stands in an image and in KVM's list: on Intel the legacy number.
    pub const fn counter_msr(&self, i: u32) -> u32 {
        match (self.vendor, self.version) {
            (Vendor::Intel, _) => IA32_PMC0 + i,
            (Vendor::Amd, 0) => K7_PERFCTR0 + i,
            (Vendor::Amd, _) => F15H_PERF_CTR0 + 2 * i,
        }
    }

    /// The number by which the switcher writes counter `i`: full width where the PMU has it, because 0xC1 cannot
    /// restore a value whose upper bits differ from bit 31 (reference section 1.4).
    pub const fn counter_write_msr(&self, i: u32) -> u32 {
        match self.vendor {
            Vendor::Intel if self.perf_capabilities & CAP_FW_WRITE != 0 => IA32_A_PMC0 + i,
            _ => self.counter_msr(i),
        }
    }

    /// Fixed counter `i`.
    pub const fn fixed_msr(&self, i: u32) -> u32 {
        IA32_FIXED_CTR0 + i
    }

    /// Global control.
    pub const fn control_msr(&self) -> u32 {
        match self.vendor {
            Vendor::Intel => IA32_PERF_GLOBAL_CTRL,
            Vendor::Amd => AMD_GLOBAL_CTL,
        }
    }

    /// Overflow status.
    pub const fn status_msr(&self) -> u32 {
        match self.vendor {
            Vendor::Intel => IA32_PERF_GLOBAL_STATUS,
            Vendor::Amd => AMD_GLOBAL_STATUS,
        }
    }

    /// Write-1-to-clear port of the overflow status.
    pub const fn status_reset_msr(&self) -> u32 {
        match self.vendor {
            Vendor::Intel => IA32_PERF_GLOBAL_STATUS_RESET,
            Vendor::Amd => AMD_GLOBAL_STATUS_CLR,
        }
    }
}

/// A register's name for people, as the vendor's manual spells it.
pub fn register_name(msr: u32, vendor: Vendor) -> String {
    match (vendor, decode(vendor, 2, msr)) {
        (Vendor::Intel, Some(reg)) => match reg {
            Reg::GpCounterLegacy(i) => format!("IA32_PMC{i}"),
            Reg::GpCounter(i) => format!("IA32_A_PMC{i}"),
            Reg::GpSelector(i) => format!("IA32_PERFEVTSEL{i}"),
            Reg::FixedCounter(i) => format!("IA32_FIXED_CTR{i}"),
            Reg::FixedControl => "IA32_FIXED_CTR_CTRL".into(),
            Reg::Status => "IA32_PERF_GLOBAL_STATUS".into(),
            Reg::Control => "IA32_PERF_GLOBAL_CTRL".into(),
            Reg::StatusReset => "IA32_PERF_GLOBAL_STATUS_RESET".into(),
            Reg::StatusSet => "IA32_PERF_GLOBAL_STATUS_SET".into(),
            Reg::InUse => "IA32_PERF_GLOBAL_INUSE".into(),
            Reg::Capabilities => "IA32_PERF_CAPABILITIES".into(),
            Reg::Unsupported => format!("MSR_{msr:#x}"),
        },
        (Vendor::Amd, Some(reg)) => match reg {
            Reg::GpCounter(i) | Reg::GpCounterLegacy(i) => format!("PERF_CTR{i}"),
            Reg::GpSelector(i) => format!("PERF_CTL{i}"),
            Reg::Status => "PerfCntrGlobalStatus".into(),
            Reg::Control => "PerfCntrGlobalCtl".into(),
            Reg::StatusReset => "PerfCntrGlobalStatusClr".into(),
            Reg::StatusSet => "PerfCntrGlobalStatusSet".into(),
            _ => format!("MSR_{msr:#x}"),
        },
        (_, None) => format!("MSR_{msr:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_fit_kvms_filter_and_hold_every_decoded_register() {
        assert!(PMU_MSR_RANGES.len() <= 16);
        for msr in (0..0x2000u32).chain(0xC000_0000..0xC002_0000) {
            for (vendor, version) in [(Vendor::Intel, 5), (Vendor::Amd, 2), (Vendor::Amd, 0)] {
                if decode(vendor, version, msr).is_some() {
                    assert!(is_pmu_msr(msr), "{msr:#x} decodes but is not filtered");
                }
            }
        }
        for other in [0x10, 0x1D9, 0x122, 0xCD, 0x190, 0x311, 0xC000_0080, 0xC001_0008] {
            assert!(!is_pmu_msr(other), "{other:#x}");
        }
    }

    #[test]
    fn aliases_name_one_counter() {
        assert_eq!(decode(Vendor::Intel, 5, 0xC3), Some(Reg::GpCounterLegacy(2)));
        assert_eq!(decode(Vendor::Intel, 5, 0x4C3), Some(Reg::GpCounter(2)));
        assert_eq!(decode(Vendor::Amd, 2, 0xC001_0003), Some(Reg::GpSelector(3)));
        assert_eq!(decode(Vendor::Amd, 2, 0xC001_0206), Some(Reg::GpSelector(3)));
        assert_eq!(decode(Vendor::Amd, 0, 0xC001_0206), None);
        assert_eq!(decode(Vendor::Amd, 1, 0xC000_0300), None);
    }
}
