//! `put`, `sync` and `release`: reading what ran, committing the image, then scrubbing.
//!
//! Order (switch.md section 5): (1) K := 0, (2) all reads into a scratch copy, (3) the image, (4) scrub. A failure in 1
//! or 2 leaves the old image and the guest loaded; in 4 the image is final and the hardware unknown.

use super::{Core, Ran, Resident, SwitchError, Used};
use crate::guest::mailbox::Readout;
use crate::guest::regs::bits;
use crate::guest::{GuestPmu, Policy};
use crate::hardware::Hardware;
use std::sync::Arc;

impl<H: Hardware> Core<H> {
    /// Takes the guest off the core. Putting a guest that is not loaded does nothing.
    pub fn put(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        if !self.is_loaded(g) {
            return Ok(());
        }
        if g.policy == Policy::Lazy {
            self.pause(g)?;
            self.leave_resident(g);
            return Ok(());
        }
        if self.control != Some(0) || self.ran.any() {
            self.collect(g)?;
        }
        self.unload();
        if self.known.is_zero() { Ok(()) } else { self.guarded(|_| true, Self::scrub) }
    }

    /// Publishes the whole image of a loaded or resident guest, which stays where it is. A loaded guest is paused.
    pub fn sync(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        g.absorb();
        if self.is_loaded(g) {
            return self.collect(g);
        }
        if self.is_resident(g) {
            self.guarded(|_| false, Self::read_resident)?;
            g.absorb();
        }
        Ok(())
    }

    /// Takes the guest off the core and scrubs, whatever its policy: before a re-pin, a hand-over or its end.
    pub fn release(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        g.absorb();
        if self.is_loaded(g) {
            self.collect(g)?;
            self.unload();
        } else if self.is_resident(g) {
            self.guarded(|_| false, Self::read_resident)?;
            g.absorb();
            self.resident = None;
        } else {
            return Ok(());
        }
        if self.resident.is_some() {
            // An idle lazy guest was loaded beside somebody whose counters are still in the hardware.
            self.guarded(|_| false, Self::evict)?;
        }
        self.guarded(|_| true, Self::scrub)
    }

    /// Steps 1 to 3 for the loaded guest.
    pub(super) fn collect(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        self.entered = false;
        if self.control == Some(0) && !self.ran.any() {
            return Ok(());
        }
        self.guarded(
            |_| false,
            |core| {
                core.quiesce()?;
                let armed = g.live.armed != 0 && core.host.has_global();
                // The status of an armed guest is read at the pause, ahead of the counters; its RESET is the last
                // access before the commit, so that a failure in between has lost nothing.
                let early = if armed && !core.status_fresh {
                    Some(core.rdmsr(core.host.status_msr())?)
                } else {
                    None
                };
                let ran = core.ran;
                core.read_counters(ran)?;
                let status = core.take_wraps(early, g.shape.counter_bits(), ran)?;
                core.ran = Ran::default();
                core.publish(g, ran, status);
                Ok(())
            },
        )
    }

    /// Reads a resident guest's counters into its mailbox.
    pub(super) fn read_resident(&mut self) -> Result<(), SwitchError> {
        let Some(resident) = self.resident.take() else { return Ok(()) };
        let (ran, shape) = (resident.ran, resident.shape);
        let (fresh, wrapped) = (self.status_fresh, self.wrapped);
        (self.status_fresh, self.wrapped) = (resident.status_fresh, resident.wrapped);
        let result = if ran.any() {
            self.quiesce()
                .and_then(|()| self.read_counters(ran))
                .and_then(|()| self.take_wraps(None, shape.counter_bits(), ran))
        } else {
            Ok(0)
        };
        let seen = self.wrapped;
        (self.status_fresh, self.wrapped) = (fresh, wrapped);
        let status = match result {
            Ok(status) => status,
            Err(error) => {
                // What was read is known already, so a wrap that it showed must not be forgotten.
                self.resident = Some(Resident { wrapped: seen, ..resident });
                return Err(error);
            }
        };
        if ran.any() {
            let (gp, fixed) = (self.known.gp, self.known.fixed);
            resident.mailbox.leave(&Readout { gp_read: ran.gp, fixed_read: ran.fixed, gp, fixed, status });
        }
        self.resident = Some(Resident { ran: Ran::default(), status_fresh: true, wrapped: 0, ..resident });
        Ok(())
    }

    /// Reads counters; a value below the last one is a wrap. What was read is known from then on, which is the scratch
    /// copy: the image takes it over only when everything has been read.
    pub(super) fn read_counters(&mut self, which: Ran) -> Result<(), SwitchError> {
        for i in bits(which.gp) {
            let value = self.read_gp(i)?;
            if value < std::mem::replace(&mut self.known.gp[i as usize], value) {
                self.wrapped |= 1 << i;
            }
        }
        for i in bits(which.fixed) {
            let value = self.read_fixed(i)?;
            if value < std::mem::replace(&mut self.known.fixed[i as usize], value) {
                self.wrapped |= 1 << (32 + i);
            }
        }
        Ok(())
    }

    /// Overflow bits of a guest's counters after its counters were read: from the status register where a wrap is
    /// possible (one RDMSR and, if it is not 0, one RESET), never inferred; without such a register, from the values.
    pub(super) fn take_wraps(
        &mut self,
        early: Option<u64>,
        counters: u64,
        ran: Ran,
    ) -> Result<u64, SwitchError> {
        if !self.host.has_global() {
            self.status_fresh = true;
            return Ok(std::mem::take(&mut self.wrapped));
        }
        let narrow =
            (ran.gp != 0 && self.host.gp_width < 40) || (ran.fixed != 0 && self.host.fixed_width < 40);
        let status = match early {
            Some(status) => status,
            None if !self.status_fresh && (self.wrapped != 0 || narrow) => {
                self.rdmsr(self.host.status_msr())?
            }
            None => 0,
        };
        if status != 0 {
            self.wrmsr(self.host.status_reset_msr(), status)?;
        }
        self.status_fresh = true;
        self.wrapped = 0;
        Ok(status & counters)
    }

    /// Writes 0 to every register that is not known to be 0: selectors first, so that nothing can count.
    pub(super) fn scrub(&mut self) -> Result<(), SwitchError> {
        let used = self.known.used;
        for i in bits(used.sel) {
            if self.known.sel[i as usize] != 0 {
                self.write_sel(i, 0)?;
            }
        }
        if self.known.fixed_ctrl != 0 {
            self.write_fixed_ctrl(0)?;
        }
        for i in bits(used.gp) {
            if self.known.gp[i as usize] != 0 {
                self.write_gp(i, 0)?;
            }
        }
        for i in bits(used.fixed) {
            if self.known.fixed[i as usize] != 0 {
                self.write_fixed(i, 0)?;
            }
        }
        self.known.used = Used::default();
        Ok(())
    }

    pub(super) fn leave_resident(&mut self, g: &mut GuestPmu) {
        // A lazy guest that never had a live counter here took nothing over; whoever is resident stays.
        if g.live.any() || self.ran.any() {
            g.lent = true;
            self.resident = Some(Resident {
                id: g.id,
                mailbox: Arc::clone(&g.mailbox),
                shape: g.shape,
                ran: self.ran,
                status_fresh: self.status_fresh,
                wrapped: self.wrapped,
            });
        }
        self.unload();
    }
}
