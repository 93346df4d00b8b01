//! `put`, `sync` and `release`: reading what ran, committing the image, then scrubbing.
//!
//! Order (switch.md section 5): (1) K := 0, (2) all reads into a scratch copy, (3) the image, (4) scrub. A failure in 1
//! or 2 leaves the old image and the guest loaded; in 4 the image is final and the hardware unknown.

use super::{Core, Ran, Resident, SwitchError};
use crate::guest::mailbox::Readout;
use crate::guest::regs::bits;
use crate::guest::{GuestPmu, Policy};
use crate::hardware::Hardware;
use crate::shape::Shape;
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
        self.collect(g)?;
        self.loaded = None;
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
            self.loaded = None;
        } else if self.is_resident(g) {
            self.guarded(|_| false, Self::read_resident)?;
            g.absorb();
            self.resident = None;
        } else {
            return Ok(());
        }
        self.guarded(|_| true, Self::scrub)
    }

    /// Steps 1 to 3 for the loaded guest.
    pub(super) fn collect(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        if let Some(loaded) = &mut self.loaded {
            loaded.entered = false;
        }
        if self.control == Some(0) && !self.ran.any() {
            return Ok(());
        }
        self.guarded(
            |_| false,
            |core| {
                core.quiesce()?;
                let armed = g.live.armed != 0 && core.host.has_global();
                let mut readout = Readout::default();
                // The status of an armed guest is read at the pause, ahead of the counters; its RESET is the last
                // access before the commit, so that a failure in between has lost nothing.
                let early = if armed && !core.status_fresh {
                    Some(core.rdmsr(core.host.status_msr())?)
                } else {
                    None
                };
                let (ran, shape) = (core.ran, g.shape);
                core.read_counters(ran, &mut readout)?;
                core.finish_reads(early, &shape, ran, &mut readout)?;
                core.ran = Ran::default();
                g.commit(&readout);
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
        let mut readout = Readout::default();
        let result = if ran.any() {
            self.quiesce()
                .and_then(|()| self.read_counters(ran, &mut readout))
                .and_then(|()| self.finish_reads(None, &shape, ran, &mut readout))
        } else {
            Ok(())
        };
        (self.status_fresh, self.wrapped) = (fresh, wrapped);
        if let Err(error) = result {
            self.resident = Some(resident);
            return Err(error);
        }
        if ran.any() {
            resident.mailbox.leave(&readout);
        }
        self.resident = Some(Resident { ran: Ran::default(), status_fresh: true, wrapped: 0, ..resident });
        Ok(())
    }

    /// Reads counters into the scratch copy; a value below the last one is a wrap.
    pub(super) fn read_counters(&mut self, which: Ran, readout: &mut Readout) -> Result<(), SwitchError> {
        let mut wrapped = 0;
        for i in bits(which.gp) {
            let value = self.read_gp(i)?;
            wrapped |= u64::from(value < self.known.gp[i as usize]) << i;
            readout.gp[i as usize] = value;
        }
        for i in bits(which.fixed) {
            let value = self.read_fixed(i)?;
            wrapped |= u64::from(value < self.known.fixed[i as usize]) << (32 + i);
            readout.fixed[i as usize] = value;
        }
        readout.gp_read |= which.gp;
        readout.fixed_read |= which.fixed;
        self.wrapped |= wrapped;
        Ok(())
    }

    /// The status where it is needed, then what the reads taught becomes known. Never fails after its last access.
    pub(super) fn finish_reads(
        &mut self,
        early: Option<u64>,
        guest: &Shape,
        ran: Ran,
        readout: &mut Readout,
    ) -> Result<(), SwitchError> {
        if self.host.has_global() {
            let narrow =
                (ran.gp != 0 && self.host.gp_width < 40) || (ran.fixed != 0 && self.host.fixed_width < 40);
            let needed = early.is_none() && !self.status_fresh && (self.wrapped != 0 || narrow);
            let status = match early {
                Some(status) => status,
                None if needed => self.rdmsr(self.host.status_msr())?,
                None => 0,
            };
            if status != 0 {
                self.wrmsr(self.host.status_reset_msr(), status)?;
            }
            self.status_fresh = true;
            self.wrapped = 0;
            readout.status |= status & guest.counter_bits();
        } else {
            readout.status |= std::mem::take(&mut self.wrapped);
            self.status_fresh = true;
        }
        for i in bits(readout.gp_read) {
            self.known.set_gp(i, readout.gp[i as usize]);
        }
        for i in bits(readout.fixed_read) {
            self.known.set_fixed(i, readout.fixed[i as usize]);
        }
        Ok(())
    }

    /// Writes 0 to every register that is not known to be 0: selectors first, so that nothing can count.
    pub(super) fn scrub(&mut self) -> Result<(), SwitchError> {
        for i in bits(self.known.used.sel) {
            self.write_sel(i, 0)?;
        }
        if self.known.fixed_ctrl != 0 {
            self.write_fixed_ctrl(0)?;
        }
        for i in bits(self.known.used.gp) {
            self.write_gp(i, 0)?;
        }
        for i in bits(self.known.used.fixed) {
            self.write_fixed(i, 0)?;
        }
        Ok(())
    }

    pub(super) fn leave_resident(&mut self, g: &GuestPmu) {
        self.loaded = None;
        // A lazy guest that never had a live counter here took nothing over; whoever is resident stays.
        if g.live.any() || self.ran.any() {
            self.resident = Some(Resident {
                id: g.id,
                mailbox: Arc::clone(&g.mailbox),
                shape: g.shape,
                ran: self.ran,
                status_fresh: self.status_fresh,
                wrapped: self.wrapped,
            });
        }
        self.ran = Ran::default();
    }
}
