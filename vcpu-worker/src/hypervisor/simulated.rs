//! A hypervisor without hardware: the same traits, threads, switcher, memory and migration, with a scripted guest that
//! does what the probe guest does, by the same parameter and report pages (`crate::probe`).
//!
//! What is real: guest memory and its dirty log (exact), PMU register accesses as exits and their answers, counter
//! overflow interrupts through a small local APIC, serial output, state that is saved and restored to the bit, CPU time
//! spent. What is not: no instruction of a guest is executed, so only the probe runs, and a turn of its loop takes
//! milliseconds instead of nanoseconds.
//!
//! Cost: a vCPU works a little ([`SimOptions::burn`]) every turn and in between says `Exit::Hlt`, which lets go of its
//! core. The turn gets longer the more simulated vCPUs the process has, so that hundreds share two cores.
//!
//! * `guest`: the script, over guest memory. `registers`: what is not in memory, and its encoding. `vcpu`: exits.

mod guest;
mod registers;
#[cfg(test)]
mod tests;
mod vcpu;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vpmu_proto::worker::StatePiece;

use super::{HvError, Vcpu, Vm};
use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;
use vcpu::{Interrupts, SimVcpu};

/// How a simulated VM behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimOptions {
    /// Shortest time between two turns of a vCPU's loop.
    pub turn: Duration,
    /// CPU time that a turn uses up on top of its work, so that counters move.
    pub burn: Duration,
    /// Time that every simulated vCPU of the process adds to the turn.
    pub share: Duration,
}

impl Default for SimOptions {
    /// A turn every 4 ms with 100 us of work; from 20 vCPUs on they use half a core together.
    fn default() -> Self {
        Self {
            turn: Duration::from_millis(4),
            burn: Duration::from_micros(100),
            share: Duration::from_micros(200),
        }
    }
}

/// Simulated vCPUs of this process.
static VCPUS: AtomicU64 = AtomicU64::new(0);

/// What the parts of a VM share.
struct Shared {
    memory: GuestMemory,
    options: SimOptions,
    /// Dirty tracking is on. The script writes through [`GuestMemory`], which notes the pages.
    tracking: AtomicBool,
    interrupts: Mutex<BTreeMap<u32, Arc<Interrupts>>>,
}

impl Shared {
    fn interrupts(&self) -> MutexGuard<'_, BTreeMap<u32, Arc<Interrupts>>> {
        self.interrupts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time between two turns now, nanoseconds.
    fn turn_ns(&self) -> u64 {
        let share = self.options.share.as_nanos() as u64;
        let all = share.saturating_mul(VCPUS.load(Ordering::Relaxed));
        (self.options.turn.as_nanos() as u64).max(all)
    }
}

/// A simulated virtual machine.
pub struct SimVm {
    shared: Arc<Shared>,
}

impl std::fmt::Debug for SimVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SimVm").field("memory", &self.shared.memory).finish_non_exhaustive()
    }
}

impl SimVm {
    /// Makes the VM. Cannot fail today; a hypervisor may.
    pub fn new(memory: GuestMemory, options: SimOptions) -> Result<Arc<Self>, HvError> {
        let shared = Shared {
            memory,
            options,
            tracking: AtomicBool::new(false),
            interrupts: Mutex::new(BTreeMap::new()),
        };
        Ok(Arc::new(Self { shared: Arc::new(shared) }))
    }
}

impl Vm for SimVm {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HvError> {
        if index >= crate::probe::layout::MAX_VCPUS {
            return Err(HvError::Unsupported {
                what: "the vCPU index asked for",
                remedy: format!("a simulated VM has at most {} vCPUs", crate::probe::layout::MAX_VCPUS),
            });
        }
        let interrupts = Arc::new(Interrupts::default());
        self.shared.interrupts().insert(index, Arc::clone(&interrupts));
        Ok(Box::new(SimVcpu::new(Arc::clone(&self.shared), index, interrupts)))
    }

    fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    fn start_dirty_tracking(&self) -> Result<(), HvError> {
        self.shared.memory.track_writes(true);
        self.shared.tracking.store(true, Ordering::Release);
        Ok(())
    }

    fn collect_dirty(&self, into: &mut PageBitmap) -> Result<(), HvError> {
        if !self.shared.tracking.load(Ordering::Acquire) {
            return Err(HvError::Unsupported {
                what: "a dirty log that was not started",
                remedy: "call start_dirty_tracking first".to_owned(),
            });
        }
        self.shared.memory.take_writes(into);
        Ok(())
    }

    fn stop_dirty_tracking(&self) -> Result<(), HvError> {
        self.shared.tracking.store(false, Ordering::Release);
        self.shared.memory.track_writes(false);
        Ok(())
    }

    /// A simulated machine has no state of its own.
    fn save(&self) -> Result<Vec<StatePiece>, HvError> {
        Ok(Vec::new())
    }

    fn restore(&self, pieces: &[StatePiece]) -> Result<(), HvError> {
        match pieces.first() {
            None => Ok(()),
            Some(piece) => Err(HvError::State {
                kind: piece.kind.chars().take(64).collect(),
                problem: "a simulated VM has no such state".to_owned(),
            }),
        }
    }

    /// Delivery modes fixed and NMI, physical destination; to a vCPU that does not exist it is lost, as on a bus.
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), HvError> {
        let target = address >> 12 & 0xff;
        for (index, interrupts) in self.shared.interrupts().iter() {
            if target == 0xff || target == u64::from(*index) {
                match data >> 8 & 7 {
                    0 => interrupts.raise(data as u8),
                    4 => interrupts.raise_nmi(),
                    mode => {
                        return Err(HvError::Unsupported {
                            what: "an interrupt delivery mode but fixed and NMI in a simulated VM",
                            remedy: format!("mode {mode} was asked for"),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    /// The scripted guest polls no legacy line.
    fn set_irq_line(&self, _gsi: u32, _level: bool) -> Result<(), HvError> {
        Ok(())
    }
}
