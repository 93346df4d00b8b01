//! `resume` and `pause`: opening and closing the global control around the guest's execution, and the one status read
//! that an armed PMI costs.

use super::{Core, Ran, SwitchError};
use crate::guest::GuestPmu;
use crate::guest::regs::bits;
use crate::hardware::Hardware;

impl<H: Hardware> Core<H> {
    /// Lets the loaded guest's live counters count: K := hwK, only if it is not 0 and differs.
    pub fn resume(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        if !self.is_loaded(g) {
            return Err(SwitchError::NotLoaded(g.id.0));
        }
        if !self.clean {
            self.reload(g)?;
        }
        self.entered = true;
        if !g.live.any() {
            return Ok(());
        }
        self.guarded(|_| true, |core| core.open(g))
    }

    /// Lets a guest that is between `resume` and `pause` count on, also after a failed access stopped it.
    pub(super) fn reenter(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        if !self.entered || !g.live.any() || (self.clean && self.control == Some(g.live.control)) {
            return Ok(());
        }
        if !self.clean {
            self.reload(g)?;
        }
        self.guarded(|_| true, |core| core.open(g))
    }

    pub(super) fn open(&mut self, g: &GuestPmu) -> Result<(), SwitchError> {
        let owed = std::mem::take(&mut self.owed);
        for i in bits(owed.gp & g.live.gp & !self.ran.gp) {
            if self.known.gp[i as usize] != self.hw_gp(g, i) {
                self.write_gp(i, self.hw_gp(g, i))?;
            }
        }
        for i in bits(owed.fixed & g.live.fixed & !self.ran.fixed) {
            if self.known.fixed[i as usize] != self.hw_fixed(g, i) {
                self.write_fixed(i, self.hw_fixed(g, i))?;
            }
        }
        if self.host.has_global() {
            if self.control != Some(g.live.control) {
                self.write_control(g.live.control)?;
            }
        } else {
            // Without a global control the selectors are the switch (switch.md section 4).
            self.control = None;
            self.known.used.sel |= g.live.gp;
            for i in bits(g.live.gp) {
                let want = self.hw_selector(g, i);
                if self.known.sel[i as usize] != want {
                    self.write_sel(i, want)?;
                }
            }
            self.control = Some(g.live.control);
        }
        self.ran.gp |= g.live.gp;
        self.ran.fixed |= g.live.fixed;
        self.status_fresh = false;
        Ok(())
    }

    /// Stops the loaded guest's counters: K := 0, only if it is not 0; then one RDMSR of the overflow status if a live
    /// counter has its PMI enable set. See [`GuestPmu::pmi_raised`].
    pub fn pause(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        if !self.is_loaded(g) {
            return Err(SwitchError::NotLoaded(g.id.0));
        }
        self.entered = false;
        self.guarded(|_| false, |core| core.close(g))
    }

    /// K := 0 and the status read of an armed PMI; the guest may be re-entered by `open`.
    pub(super) fn close(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        self.quiesce()?;
        if g.live.armed == 0 || self.status_fresh {
            return Ok(());
        }
        if self.host.has_global() {
            let status = self.take_status()? & g.shape.counter_bits();
            g.note_overflow(status);
            self.read_wrapped_if_narrow(g, status)?;
        } else {
            // No status register: a wrap of an armed counter shows in its value only.
            let armed = Ran { gp: self.ran.gp & g.live.armed, fixed: 0 };
            self.read_counters(armed)?;
            self.ran.gp &= !armed.gp;
            let wrapped = std::mem::take(&mut self.wrapped);
            self.publish(g, armed, wrapped);
        }
        self.status_fresh = true;
        Ok(())
    }

    /// A counter narrower than the hardware's lost the ones above its width with the wrap: it is read, so that the next
    /// resume puts them back and the next wrap is one for the hardware too.
    pub(super) fn read_wrapped_if_narrow(
        &mut self,
        g: &mut GuestPmu,
        status: u64,
    ) -> Result<(), SwitchError> {
        if status == 0 || !self.is_narrow(g) {
            return Ok(());
        }
        self.read_while_paused(g, Ran { gp: status & 0xFFFF_FFFF, fixed: status >> 32 & 0xFFFF })
    }

    /// K := 0, only if it is not known to be 0; without a global control the live selectors := 0.
    pub(super) fn quiesce(&mut self) -> Result<(), SwitchError> {
        if self.control != Some(0) {
            if self.host.has_global() {
                self.write_control(0)?;
            } else {
                for i in bits(self.known.used.sel) {
                    if self.known.sel[i as usize] != 0 {
                        self.write_sel(i, 0)?;
                    }
                }
                self.control = Some(0);
            }
        }
        Ok(())
    }

    /// Has the next resume write these counters from the image.
    pub(super) fn owe(&mut self, which: Ran) {
        self.owed.gp |= which.gp;
        self.owed.fixed |= which.fixed;
    }

    /// One RDMSR of the overflow status and, if it is not 0, one RESET. The bits are never inferred.
    pub(super) fn take_status(&mut self) -> Result<u64, SwitchError> {
        let status = self.rdmsr(self.host.status_msr())?;
        if status != 0 {
            self.wrmsr(self.host.status_reset_msr(), status)?;
        }
        self.status_fresh = true;
        self.wrapped = 0;
        Ok(status)
    }
}
