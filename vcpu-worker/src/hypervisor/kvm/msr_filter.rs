//! PMU MSRs become exits.
//!
//! Without the filter KVM answers some of them itself (IA32_MISC_ENABLE's PMU bits, legacy AMD counters, "ignored"
//! event selects). KVM's own vPMU is switched off as well where that is possible, so that it neither allocates host
//! events nor counts.

use kvm_bindings::*;
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRange, MsrFilterRangeFlags, VmFd};
use pmu::PMU_MSR_RANGES;

use crate::hypervisor::HvError;
use crate::sys::failed;

/// Switches KVM's vPMU off; nothing where KVM cannot or has none. Before vCPUs exist.
pub(super) fn disable_pmu(vm: &VmFd) -> Result<(), HvError> {
    let offers = vm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
    if offers <= 0 || offers as u32 & KVM_PMU_CAP_DISABLE == 0 {
        return Ok(());
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_PMU_CAPABILITY,
        args: [u64::from(KVM_PMU_CAP_DISABLE), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(PMU_CAPABILITY)"))
}

/// Lets reads and writes of every PMU MSR of both vendors exit.
pub(super) fn filter_pmu(vm: &VmFd) -> Result<(), HvError> {
    if vm.check_extension_raw(KVM_CAP_X86_USER_SPACE_MSR.into()) <= 0
        || vm.check_extension_raw(KVM_CAP_X86_MSR_FILTER.into()) <= 0
    {
        return Err(HvError::Unsupported {
            what: "MSR exits to user space (KVM_CAP_X86_USER_SPACE_MSR, KVM_CAP_X86_MSR_FILTER)",
            remedy: "use Linux 5.10 or later, or PMU mode kvm".to_owned(),
        });
    }
    let cap = kvm_enable_cap {
        cap: KVM_CAP_X86_USER_SPACE_MSR,
        args: [u64::from(KVM_MSR_EXIT_REASON_FILTER), 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(X86_USER_SPACE_MSR)"))?;
    // A zero bit denies; every range fits the longest bitmap.
    let longest = PMU_MSR_RANGES.iter().map(|&(_, count)| count).max().unwrap_or(0);
    let bitmap = vec![0u8; longest.div_ceil(8) as usize];
    let ranges: Vec<MsrFilterRange<'_>> = PMU_MSR_RANGES
        .iter()
        .map(|&(base, msr_count)| MsrFilterRange {
            flags: MsrFilterRangeFlags::READ | MsrFilterRangeFlags::WRITE,
            base,
            msr_count,
            bitmap: &bitmap,
        })
        .collect();
    vm.set_msr_filter(MsrFilterDefaultAction::ALLOW, &ranges).map_err(failed("KVM_X86_SET_MSR_FILTER"))
}

const _: () = assert!(PMU_MSR_RANGES.len() <= KVM_MSR_FILTER_MAX_RANGES as usize);
