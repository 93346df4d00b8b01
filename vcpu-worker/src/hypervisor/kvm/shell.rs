//! A VM without memory and vCPUs: what is the same for every machine, made in its place or ahead of it.
//!
//! ```text
//!   new ──▶ VM, addresses, MSR filter ──(memory slots)──▶ interrupt controllers, timer       made when it is needed
//!   prepare ──▶ VM, addresses, MSR filter, interrupt controllers, timer ──▶ waits ──(memory slots)      made ahead
//! ```
//! Every step but the last waits for grace periods of the VM's SRCU: tens of microseconds on an idle host, a scheduler's
//! tick (4 ms) each where a guest computes on the core that the kernel's thread for it is due on; a migration's destination
//! is such a host by nature when its source is the same one. A spare worker has that behind it.
//!
//! Invariant: a shell made ahead is used at most once, by this process, and only where it is what would be made.

use std::time::{Duration, Instant};

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use super::{System, msr_filter, system, uninterrupted};
use crate::hypervisor::HvError;
use crate::sys::failed;

/// Three pages below the BIOS, as every VMM has them, for real mode on processors that cannot run it natively.
pub(super) const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for the same purpose.
pub(super) const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;
/// See [`Shell::new`].
pub(super) const SRCU_QUIET: Duration = Duration::from_micros(30);

/// Held while a VM is created.
static CREATING: Mutex<()> = Mutex::new(());
static READY: Ready = Ready(Mutex::new(None));

/// Where one waits that was made ahead.
struct Ready(Mutex<Option<Shell>>);

/// See the module.
pub(super) struct Shell {
    pub(super) fd: VmFd,
    filters: bool,
    /// The interrupt controllers and the timer are there.
    complete: bool,
}

/// Makes one ahead, for the next VM of this process; `filter` as in [`super::KvmOptions::filter_pmu_msrs`]. Blocks.
///
/// # Errors
/// Any of KVM. Nothing is ready then, and the next VM is made as if this had not been tried.
pub fn prepare(filter: bool) -> Result<(), HvError> {
    READY.prepare(system()?, filter)
}

/// The one that was made ahead, if it is right, or a new one.
pub(super) fn take(system: &System, filter: bool) -> Result<Shell, HvError> {
    READY.take(system, filter)
}

impl Ready {
    fn prepare(&self, system: &System, filter: bool) -> Result<(), HvError> {
        let mut shell = Shell::new(system, filter)?;
        shell.complete()?;
        *self.0.lock() = Some(shell);
        Ok(())
    }

    fn take(&self, system: &System, filter: bool) -> Result<Shell, HvError> {
        // One that does not fit stays: closing it takes longer than keeping it.
        let ready = self.0.lock().take_if(|ready| ready.filters == filter);
        ready.map_or_else(|| Shell::new(system, filter), Ok)
    }
}

impl Shell {
    fn new(system: &System, filter: bool) -> Result<Self, HvError> {
        let fd = {
            // It takes every lock of this process's address space: whoever wants that at the same time only spins.
            let _turn = CREATING.lock();
            uninterrupted(|| system.kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))?
        };
        // Both before any vCPU; processors that run real mode natively ignore them.
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(failed("KVM_SET_TSS_ADDR"))?;
        let made = Instant::now();
        if filter {
            msr_filter::disable_pmu(&fd)?;
            // Setting the filter waits for an SRCU grace period. That takes tens of microseconds instead of some
            // milliseconds only before the interrupt controller registers its devices (callbacks on the same SRCU)
            // and when 25 us (srcutree.exp_holdoff) have passed since the last grace period.
            while made.elapsed() < SRCU_QUIET {
                std::hint::spin_loop();
            }
            msr_filter::filter_pmu(&fd)?;
        }
        Ok(Self { fd, filters: filter, complete: false })
    }

    /// Makes what must come after the memory, unless it is there: a slot that is added soon after waits for it.
    pub(super) fn complete(&mut self) -> Result<(), HvError> {
        if self.complete {
            return Ok(());
        }
        self.fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        self.complete = true;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_used_once_and_only_where_it_fits() {
        if !crate::testing::require_kvm() {
            return;
        }
        let system = system().expect("KVM");
        let place = Ready(Mutex::new(None));
        place.prepare(system, true).expect("made");
        let ready = place.take(system, true).expect("there");
        assert!(ready.complete, "made ahead");
        let fresh = place.take(system, true).expect("made");
        assert!(!fresh.complete, "the one that was ready is used up");
        place.prepare(system, false).expect("made");
        let other = place.take(system, true).expect("made");
        assert!(!other.complete && other.filters, "one without the filter is no use");
        assert!(place.take(system, false).expect("there").complete, "and is kept for one that can use it");
    }
}
