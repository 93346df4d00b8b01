//! What moving a machine's state takes with nothing but the ioctls: one vCPU, its interrupt controllers, timer and clock.
//!
//! The floor of a migration's "save" and "restore": no message is built, nothing is checked, summed or sent, and what the
//! worker sets ahead of the stop (CPUID) is left out here too.

use std::time::{Duration, Instant};

use kvm_bindings::{Msrs, kvm_irqchip, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

use super::bare::BareHost;
use crate::hypervisor::HvError;
use crate::sys::{self, failed};

/// The time stamp counter: set apart, by its offset.
const TSC: u32 = 0x10;

/// Saves the state of one fresh machine and sets it into another, `runs` times: how long each part took.
///
/// # Errors
/// Any of KVM.
pub fn save_and_restore(host: &BareHost, runs: usize) -> Result<Vec<(Duration, Duration)>, HvError> {
    let (from, to) = (host.empty()?, host.empty()?);
    let list =
        Kvm::new().and_then(|kvm| kvm.get_msr_index_list()).map_err(failed("KVM_GET_MSR_INDEX_LIST"))?;
    let entries: Vec<kvm_msr_entry> = list
        .as_slice()
        .iter()
        .filter(|index| **index != TSC)
        .map(|index| kvm_msr_entry { index: *index, ..Default::default() })
        .collect();
    let msrs = Msrs::from_entries(&entries)
        .map_err(|e| HvError::State { kind: "msrs".to_owned(), problem: format!("{e:?}") })?;
    (0..runs).map(|_| once((&from.vcpu, &from.vm), (&to.vcpu, &to.vm), msrs.clone())).collect()
}

fn once(
    (from, from_vm): (&VcpuFd, &VmFd),
    (to, to_vm): (&VcpuFd, &VmFd),
    mut msrs: Msrs,
) -> Result<(Duration, Duration), HvError> {
    let begin = Instant::now();
    let mp_state = from.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
    let sregs = from.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
    let regs = from.get_regs().map_err(failed("KVM_GET_REGS"))?;
    let xcrs = from.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
    // Not KVM_GET_XSAVE2: no guest of a floor uses dynamic states.
    let xsave = sys::get_xsave(from, sys::XSAVE.size)?;
    let debug = from.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
    let lapic = from.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    let read = from.get_msrs(&mut msrs).map_err(failed("KVM_GET_MSRS"))?;
    let events = from.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
    let mut chips = [0, 1, 2].map(|chip_id| kvm_irqchip { chip_id, ..Default::default() });
    for chip in &mut chips {
        from_vm.get_irqchip(chip).map_err(failed("KVM_GET_IRQCHIP"))?;
    }
    let timer = from_vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?;
    let mut clock = from_vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?;
    let saved = begin.elapsed();

    let begin = Instant::now();
    for chip in &chips {
        to_vm.set_irqchip(chip).map_err(failed("KVM_SET_IRQCHIP"))?;
    }
    to_vm.set_pit2(&timer).map_err(failed("KVM_SET_PIT2"))?;
    clock.flags = 0;
    to_vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))?;
    to.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
    to.set_regs(&regs).map_err(failed("KVM_SET_REGS"))?;
    to.set_xcrs(&xcrs).map_err(failed("KVM_SET_XCRS"))?;
    sys::set_xsave(to, sys::XSAVE.size, &xsave)?;
    to.set_debug_regs(&debug).map_err(failed("KVM_SET_DEBUGREGS"))?;
    to.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    let written = to.set_msrs(&msrs).map_err(failed("KVM_SET_MSRS"))?;
    to.set_vcpu_events(&events).map_err(failed("KVM_SET_VCPU_EVENTS"))?;
    to.set_mp_state(mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
    let restored = begin.elapsed();
    let wanted = msrs.as_slice().len();
    if (read, written) != (wanted, wanted) {
        let problem = format!("{read} of {wanted} were read and {written} were written");
        return Err(HvError::State { kind: "msrs".to_owned(), problem });
    }
    Ok((saved, restored))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn state_moves() {
        if !crate::testing::require_kvm() {
            return;
        }
        let host = BareHost::open().expect("KVM");
        let times = save_and_restore(&host, 3).expect("moved");
        assert_eq!(times.len(), 3);
        assert!(times.iter().all(|(save, restore)| !save.is_zero() && !restore.is_zero()), "{times:?}");
    }
}
