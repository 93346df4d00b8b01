//! `load`, the clean start and the difference writes.

use super::{Core, SwitchError, Used};
use crate::guest::regs::bits;
use crate::guest::{GuestPmu, Policy};
use crate::hardware::Hardware;
use crate::shape::Vendor;

impl<H: Hardware> Core<H> {
    /// Puts the guest's live registers into hardware; K stays 0. Loading the loaded guest does nothing. A failed load
    /// leaves the image unchanged and the guest not loaded.
    pub fn load(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        g.absorb();
        if let Some(loaded) = self.loaded {
            return if loaded == g.id { Ok(()) } else { Err(SwitchError::Busy(loaded.0)) };
        }
        if self.fits != Some(g.id) {
            self.check_fit(g)?;
        }
        if !self.clean {
            self.guarded(|_| true, Self::start_clean)?;
            // The clean start may have read this very guest, resident since a load that failed.
            g.absorb();
        }
        let strict = g.policy == Policy::Strict;
        let live = g.live.any();
        let mine = self.is_resident(g);
        if !mine && self.resident.is_some() && (strict || live) {
            self.guarded(|_| false, Self::evict)?;
        }
        if mine && let Some(resident) = self.resident.take() {
            (self.ran, self.status_fresh, self.wrapped) =
                (resident.ran, resident.status_fresh, resident.wrapped);
        }
        if live || (strict && !self.known.is_zero()) {
            let written = self.guarded(|_| true, |core| core.write_differences(g, strict));
            if let Err(error) = written {
                // What the hardware still owns of this guest is read by the clean start of the next load.
                self.leave_resident(g);
                return Err(error);
            }
        }
        self.loaded = Some(g.id);
        Ok(())
    }

    /// A guest's shape never changes, so this is asked once for a guest that keeps coming.
    #[cold]
    #[inline(never)]
    fn check_fit(&mut self, g: &GuestPmu) -> Result<(), SwitchError> {
        let (guest, host) = (&g.shape, &self.host);
        let fits = guest.counter_bits() == 0
            || (guest.vendor == host.vendor
                && guest.version <= host.version
                && guest.counter_bits() & !host.counter_bits() == 0
                && guest.gp_width <= host.gp_width
                && guest.fixed_width <= host.fixed_width);
        if !fits {
            return Err(SwitchError::Shape(g.id.0));
        }
        self.fits = Some(g.id);
        Ok(())
    }

    /// Takes back a load whose resume failed: the guest is not loaded, its image is unchanged, and what the hardware
    /// still owns of it is read by the next load.
    pub fn abandon_load(&mut self, g: &mut GuestPmu) {
        if self.is_loaded(g) {
            self.leave_resident(g);
        }
    }

    /// After a failed access left the hardware unknown under a loaded guest: reads what ran, cleans, writes again.
    #[cold]
    #[inline(never)]
    pub(super) fn reload(&mut self, g: &mut GuestPmu) -> Result<(), SwitchError> {
        let entered = self.entered;
        let collected = self.collect(g);
        self.entered = entered;
        collected?;
        self.guarded(
            |_| true,
            |core| {
                core.start_clean()?;
                core.write_differences(g, true)
            },
        )
    }

    /// Clean start: makes a core of which nothing is known known and empty. Reads a resident guest first.
    pub fn clean(&mut self) -> Result<(), SwitchError> {
        if let Some(loaded) = self.loaded {
            return Err(SwitchError::Busy(loaded.0));
        }
        self.guarded(|_| true, Self::start_clean)
    }

    /// Reads the resident guest, if any, into its mailbox; its registers stay until they are overwritten.
    pub fn evict_resident(&mut self) -> Result<(), SwitchError> {
        self.guarded(|_| false, Self::evict)
    }

    pub(super) fn evict(&mut self) -> Result<(), SwitchError> {
        self.read_resident()?;
        self.resident = None;
        Ok(())
    }

    /// K = 0; every selector, fixed control and counter of the host's shape := 0; status read and reset. FIXED_CTR3 is
    /// among the counters, and its write resets PERF_METRICS (reference section 1.5).
    #[cold]
    #[inline(never)]
    fn start_clean(&mut self) -> Result<(), SwitchError> {
        if self.host.has_global() {
            self.write_control(0)?;
        }
        for i in bits(self.host.gp) {
            self.write_sel(i, 0)?;
        }
        if self.host.has_global() && self.host.vendor == Vendor::Intel {
            self.write_fixed_ctrl(0)?;
        }
        self.control = Some(0);
        self.evict()?;
        for i in bits(self.host.gp) {
            self.write_gp(i, 0)?;
        }
        for i in bits(self.host.fixed) {
            self.write_fixed(i, 0)?;
        }
        if self.host.has_global() {
            self.take_status()?;
        }
        self.known.used = Used::default();
        self.clean = true;
        Ok(())
    }

    /// Writes what differs, in the order counters, selectors, fixed control; K is 0. For a strict guest, registers that
    /// it does not use must be 0; for a lazy one, counters that it does not use may keep what they hold, because no
    /// guest reads hardware by itself.
    pub(super) fn write_differences(&mut self, g: &GuestPmu, strict: bool) -> Result<(), SwitchError> {
        let others = if strict { self.known.used } else { Used::default() };
        self.known.used.gp |= g.live.gp;
        self.known.used.fixed |= g.live.fixed;
        let (gp_pad, fixed_pad) = (self.gp_pad(g), self.fixed_pad(g));
        for i in bits((g.live.gp | others.gp) & !self.ran.gp) {
            let want = if g.live.gp >> i & 1 == 1 { g.regs.gp[i as usize] | gp_pad } else { 0 };
            if self.known.gp[i as usize] != want {
                self.write_gp(i, want)?;
            }
        }
        for i in bits((g.live.fixed | others.fixed) & !self.ran.fixed) {
            let want = if g.live.fixed >> i & 1 == 1 { g.regs.fixed[i as usize] | fixed_pad } else { 0 };
            if self.known.fixed[i as usize] != want {
                self.write_fixed(i, want)?;
            }
        }
        self.write_selector_differences(g)
    }

    /// Selectors and fixed control that differ; a counter that is not live has none.
    pub(super) fn write_selector_differences(&mut self, g: &GuestPmu) -> Result<(), SwitchError> {
        if self.host.has_global() {
            self.known.used.sel |= g.live.gp;
            for i in bits(self.known.used.sel) {
                let want = self.hw_selector(g, i);
                if self.known.sel[i as usize] != want {
                    self.write_sel(i, want)?;
                }
            }
        }
        let want = Self::hw_fixed_ctrl(g);
        if self.known.fixed_ctrl != want {
            self.write_fixed_ctrl(want)?;
        }
        Ok(())
    }
}
