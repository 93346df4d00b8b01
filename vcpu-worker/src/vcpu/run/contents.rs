//! What a vCPU holds: its state and its PMU's, read and replaced, and the core that it is on. The guest is not in it meanwhile;
//! its PMU is looked at, and it is moved, between two entries.

use super::Driver;
use crate::error::WorkerError;
use crate::host::affinity::pinned_core;
use crate::host::{pin_current_thread, schedule};
use crate::vcpu::counting::{Pmi, delivery};
use crate::vcpu::request::{LoadFrom, Place, Saved};

impl Driver {
    /// Takes the PMU off the old core while still on it, then goes. After an error it is where it was.
    pub(super) fn place(&mut self, to: Place) -> Result<u32, WorkerError> {
        self.counting.release()?;
        let (from, core) = (self.counting.core(), to.slot.id());
        let failed =
            |problem: String| WorkerError::Thread { thread: format!("vCPU {}", self.index), problem };
        pin_current_thread(core).map_err(|e| failed(format!("pinning it to core {core}: {e}")))?;
        if to.fifo != self.fifo
            && let Err(error) = schedule::set_current(to.fifo)
        {
            pin_current_thread(from).map_err(|e| failed(format!("{error}; and back to core {from}: {e}")))?;
            return Err(failed(format!("scheduling it at priority {:?}: {error}", to.fifo)));
        }
        if let Err(error) = self.counting.move_to(to.slot, to.prepared) {
            // Its place on the old core has been kept.
            schedule::set_current(self.fifo)
                .and_then(|()| pin_current_thread(from))
                .map_err(|e| failed(format!("{error}; and back to core {from}: {e}")))?;
            return Err(error);
        }
        self.fifo = to.fifo;
        if self.computes {
            // Under SCHED_FIFO nothing was said about the ordinary scheduler.
            self.compute()?;
        }
        self.shared.set_place(core, to.fifo);
        pinned_core().ok_or_else(|| failed("the kernel lets it run on several cores".to_owned()))
    }

    /// The PMU's image: the switcher's, or in mode `kvm` what KVM says.
    pub(super) fn image(&mut self) -> Result<Option<pmu::Image>, WorkerError> {
        match self.vcpu.save_pmu()? {
            Some(image) => Ok(Some(image)),
            None => self.counting.image(),
        }
    }

    pub(super) fn save(&mut self) -> Result<Saved, WorkerError> {
        if !self.whole {
            return Err(WorkerError::Unsettled { vcpu: self.index });
        }
        let pieces = self.vcpu.save()?;
        Ok((pieces, self.image()?))
    }

    pub(super) fn load(&mut self, from: LoadFrom) -> Result<Option<pmu::Image>, WorkerError> {
        match from {
            LoadFrom::Initial(regs) => {
                self.vcpu.set_initial(&regs)?;
                self.vcpu.set_runnable()?;
                self.whole = true;
            }
            LoadFrom::Saved { pieces, pmu } => {
                let kernel = self.vcpu.has_pmu();
                match &pmu {
                    // After the rest of the state: CPUID and what else the PMU depends on come first.
                    Some(_) if kernel => {}
                    Some(image) => self.counting.import(image)?,
                    None if kernel || self.counting.enabled() => {
                        return Err(WorkerError::PmuImage {
                            vcpu: self.index,
                            message: "it is missing".to_owned(),
                        });
                    }
                    None => {}
                }
                self.vcpu.restore(&pieces)?;
                self.whole = true;
                if let (true, Some(image)) = (kernel, &pmu) {
                    self.restore_kernel_pmu(image)?;
                }
                self.shared.stats.set_pmis(self.counting.pmis());
            }
        }
        self.image()
    }

    /// Mode `kvm`: whether KVM still owed the guest an overflow's interrupt cannot be read, so one is given for overflows
    /// that the guest has not acknowledged. One too many finds the status that it is about.
    fn restore_kernel_pmu(&mut self, image: &pmu::Image) -> Result<(), WorkerError> {
        if !self.vcpu.restore_pmu(image)? {
            return Ok(());
        }
        match delivery(self.vcpu.lvtpc()?) {
            Some(Pmi::Nmi) => Ok(self.vcpu.inject_nmi()?),
            Some(Pmi::Fixed(vector)) => Ok(self.signal(vector)?),
            None => Ok(()),
        }
    }
}
