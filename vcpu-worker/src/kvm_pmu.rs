//! PMU mode `kvm`: KVM's own vPMU, emulated or mediated, saved and restored through KVM_GET_MSRS and KVM_SET_MSRS.
//!
//! While the guest runs there is nothing to do: KVM switches the PMU, takes the interrupts and filters events. What is here is the
//! state: [`KvmPmu::save`] reads it into the same [`pmu::Image`] that the other modes use, [`KvmPmu::restore`] writes it in an order in
//! which nothing can count before everything is in place.
//!
//! ```text
//!   save     GET all ──► all read? ──► GET all ──► the same? ──► image
//!   restore  image is this guest's? ──► SET [stop, counters, selectors, metrics, status, fixed control, global control]
//!              ──► all written? ──► GET all ──► as written? ──► done
//!                       └── no ─────────────────────┴── no ──► global control := 0, fixed control := 0, typed error
//! ```
//!
//! Invariants: nothing is written before the whole image is checked; global control is written last (without one, each selector comes
//! behind all counters), I-20; a restore that fails leaves a PMU that does not count, or says which register would not be cleared; no
//! register is ever left out silently. The vCPU is outside KVM_RUN during every call.
//!
//! Who calls this must keep PMU MSRs out of the vCPU's other state (KVM lists them too, in an order that starts counting early), restore
//! CPUID and PERF_CAPABILITIES before and VCPU_EVENTS after, and look at [`Restored::armed_overflows`].
//!
//! vCPU threads use it through `hypervisor::Vcpu::{save_pmu, restore_pmu}`; mode `kvm` is refused where [`detect`](detect::detect) finds no
//! vPMU. The machines this was written on have none: everything here is shown on a recording fake, and on real KVM only the refusals and the
//! event filter. What a
//! host with a PMU still has to show: that KVM's list holds what [`KvmPmu::new`] expects, that a save of a counting guest reads twice the
//! same, and that restore and read-back agree. `vpmud host check --pmu kvm` says whether a host can; `VPMU_REQUIRE_KVM=1 cargo test -p
//! vcpu-worker --lib kvm_pmu` then makes that round trip on its KVM.

mod check;
pub mod detect;
mod error;
mod filter;
mod list;
mod port;

#[cfg(test)]
pub(crate) mod fake;
#[cfg(test)]
mod tests;

use pmu::{Image, Shape, register_name};

pub use error::{KvmPmuError, Stop};
pub use filter::{event_filter_bytes, set_event_filter};
pub use port::{MsrPort, VcpuPort};

/// The PMU of one vCPU as KVM keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmPmu {
    shape: Shape,
    /// Ascending.
    registers: Vec<u32>,
    /// Ascending.
    skipped: Vec<u32>,
}

/// A restore that succeeded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Restored {
    /// Registers in force; 0 where the guest has no PMU on either side.
    pub registers: usize,
    /// Status bits that the guest's register cannot hold (a mediated PMU can show some). They were masked; log them.
    pub status_masked: u64,
    /// Overflows that the guest has not acknowledged and that interrupt. Whether KVM still owed the interrupt cannot be read: the caller
    /// injects one PMI if this is not 0, LVTPC is unmasked and none is pending.
    pub armed_overflows: u64,
}

impl KvmPmu {
    /// The PMU of a guest of this shape on this host's KVM. A shape without counters ([`Shape::none`]) stands for a guest whose PMU is
    /// off. Registers of the guest that KVM does not list are refused by name; PMU registers that it lists beyond are skipped.
    pub fn new(shape: Shape, port: &mut impl MsrPort) -> Result<Self, KvmPmuError> {
        shape.validate()?;
        let registers = list::expected(&shape);
        let (missing, skipped) = list::intersect(&registers, &port.listed()?);
        if !missing.is_empty() {
            return Err(KvmPmuError::NotListed {
                registers: check::names(missing.into_iter(), shape.vendor),
                shape: shape.to_string(),
            });
        }
        Ok(Self { shape, registers, skipped })
    }

    /// The guest's PMU.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// The registers that are saved, ascending.
    #[must_use]
    pub fn registers(&self) -> &[u32] {
        &self.registers
    }

    /// PMU registers that KVM lists on this host and that this guest does not have.
    #[must_use]
    pub fn skipped(&self) -> &[u32] {
        &self.skipped
    }

    /// Reads the PMU. The status is as KVM tells it, even bits that the guest's register cannot hold ([`KvmPmu::transmittable`]).
    pub fn save(&self, port: &mut impl MsrPort) -> Result<Image, KvmPmuError> {
        let first = self.read(port)?;
        let second = self.read(port)?;
        if let Some((a, b)) = first.iter().zip(&second).find(|(a, b)| a != b) {
            return Err(KvmPmuError::Moved { register: self.name(a.0), msr: a.0, first: a.1, second: b.1 });
        }
        let image =
            Image { shape: self.shape, registers: first, in_service: false, pmi_pending: false, pmis: 0 };
        check::values(&image)?;
        Ok(image)
    }

    /// An image as it may be sent and stored: the status masked to what the guest's register can hold. And the bits that were masked.
    #[must_use]
    pub fn transmittable(image: &Image) -> (Image, u64) {
        check::mask_status(image)
    }

    /// Writes an image, reads it back and compares. The vCPU must not have run since its CPUID was set, or be stopped.
    pub fn restore(&self, port: &mut impl MsrPort, image: &Image) -> Result<Restored, KvmPmuError> {
        if self.registers.is_empty() {
            return self.restore_nothing(image);
        }
        check::belongs(image, &self.shape, &self.registers)?;
        check::values(image)?;
        let (image, status_masked) = check::mask_status(image);
        let writes = list::writes(&self.shape, |msr| image.get(msr).unwrap_or(0));
        self.write(port, &writes)?;
        let back = match self.read(port) {
            Ok(back) => back,
            Err(error) => {
                let stop = self.stop(port);
                return Err(KvmPmuError::RestoreCall { source: Box::new(error), stop });
            }
        };
        if let Some((want, have)) = image.registers.iter().zip(&back).find(|(want, have)| want != have) {
            let stop = self.stop(port);
            return Err(KvmPmuError::NotVerified {
                register: self.name(want.0),
                msr: want.0,
                wrote: want.1,
                reads: have.1,
                stop,
            });
        }
        let armed_overflows = check::armed_overflows(&image);
        Ok(Restored { registers: back.len(), status_masked, armed_overflows })
    }

    /// Off on both sides and nothing in the image: success (reference section 6.4 item 4, rule C7).
    fn restore_nothing(&self, image: &Image) -> Result<Restored, KvmPmuError> {
        if let Some(&(msr, value)) = image.registers.iter().find(|r| r.1 != 0) {
            let register = register_name(msr, image.shape.vendor);
            return Err(KvmPmuError::Disabled { register, msr, value });
        }
        if image.shape.gp != 0 || image.shape.fixed != 0 {
            check::belongs(image, &self.shape, &self.registers)?;
        }
        Ok(Restored { registers: 0, status_masked: 0, armed_overflows: 0 })
    }

    fn name(&self, msr: u32) -> String {
        register_name(msr, self.shape.vendor)
    }

    /// All registers in one batch; ascending.
    fn read(&self, port: &mut impl MsrPort) -> Result<Vec<(u32, u64)>, KvmPmuError> {
        let mut batch: Vec<(u32, u64)> = self.registers.iter().map(|msr| (*msr, 0)).collect();
        if batch.is_empty() {
            return Ok(batch);
        }
        let (read, of) = (port.get(&mut batch)?, batch.len());
        match batch.get(read) {
            None if read == of => Ok(batch),
            None => Err(KvmPmuError::Count { call: "KVM_GET_MSRS", asked: of, processed: read }),
            Some(&(msr, _)) => Err(KvmPmuError::ReadRefused { register: self.name(msr), msr, read, of }),
        }
    }

    /// One batch; anything but full success stops the PMU.
    fn write(&self, port: &mut impl MsrPort, writes: &[(u32, u64)]) -> Result<(), KvmPmuError> {
        let of = writes.len();
        let failure = match port.set(writes) {
            Ok(applied) if applied == of => return Ok(()),
            Ok(applied) => match writes.get(applied) {
                Some(&(msr, value)) => {
                    let stop = self.stop(port);
                    return Err(KvmPmuError::WriteRefused {
                        register: self.name(msr),
                        msr,
                        value,
                        applied,
                        of,
                        stop,
                    });
                }
                None => KvmPmuError::Count { call: "KVM_SET_MSRS", asked: of, processed: applied },
            },
            Err(error) => error.into(),
        };
        Err(KvmPmuError::RestoreCall { source: Box::new(failure), stop: self.stop(port) })
    }

    /// Stops the PMU after a failure: each register by itself, because KVM stops a batch at the first that it refuses.
    fn stop(&self, port: &mut impl MsrPort) -> Stop {
        let stop = list::stop(&self.shape).into_iter();
        let failed =
            stop.filter(|msr| !matches!(port.set(&[(*msr, 0)]), Ok(1))).map(|msr| self.name(msr)).collect();
        Stop { failed }
    }
}
