//! What a trapped access of the guest does: to its image, and to the hardware where that owns what is touched.
//!
//! A write that touches no live counter costs no access. One that replaces, disables or re-selects a live counter is
//! wrapped in K = 0 … K if the guest runs, reads that counter first and folds a wrap into the image. What a resident
//! guest writes reaches hardware at its next load.

use super::{Core, Ran, SwitchError};
use crate::guest::live::Live;
use crate::guest::regs::bits;
use crate::guest::write::{Read, Write, classify_rdpmc, classify_read, classify_write};
use crate::guest::{GuestAccess, GuestPmu, Policy};
use crate::hardware::Hardware;
use crate::registers::{MAX_FIXED, MAX_GP, SEL_CMASK, SEL_EDGE, SEL_INV};
use crate::shape::Vendor;

/// Counters that a write touches.
#[derive(Debug, Clone, Copy, Default)]
struct Touched {
    /// Live before and replaced, disabled or re-selected: read first.
    before: Ran,
    /// Live after with another value or selector: written.
    after: Ran,
}

impl<H: Hardware> Core<H> {
    /// The guest reads a PMU MSR.
    pub fn guest_rdmsr(&mut self, g: &mut GuestPmu, msr: u32) -> Result<GuestAccess, SwitchError> {
        g.absorb();
        self.guest_read(g, classify_read(&g.shape, &g.regs, msr))
    }

    /// The guest executes RDPMC, which a handler in the guest turned into a request (KVM cannot forward it).
    pub fn guest_rdpmc(&mut self, g: &mut GuestPmu, index: u32) -> Result<GuestAccess, SwitchError> {
        g.absorb();
        self.guest_read(g, classify_rdpmc(&g.shape, index))
    }

    fn guest_read(&mut self, g: &mut GuestPmu, read: Read) -> Result<GuestAccess, SwitchError> {
        let value = match read {
            Read::Fault => return Ok(GuestAccess::Fault),
            Read::Value(value) => value,
            Read::Gp(i) => self.guarded(|_| false, |core| core.current_gp(g, i))?,
            Read::Fixed(i) => self.guarded(|_| false, |core| core.current_fixed(g, i))?,
            Read::Status => self.guarded(|_| false, |core| core.current_status(g))?,
        };
        if self.entered && self.is_loaded(g) {
            self.reenter(g)?;
        }
        Ok(GuestAccess::Value(value))
    }

    fn attached_ran(&self, g: &GuestPmu) -> Ran {
        if self.is_loaded(g) {
            self.ran
        } else {
            self.resident.as_ref().filter(|r| r.id == g.id).map_or(Ran::default(), |r| r.ran)
        }
    }

    fn current_gp(&mut self, g: &mut GuestPmu, i: u32) -> Result<u64, SwitchError> {
        if self.attached_ran(g).gp >> i & 1 == 1 {
            if !self.is_loaded(g) {
                self.read_resident()?;
                g.absorb();
            } else if self.is_running() {
                let value = self.read_gp(i)?;
                self.wrapped |= u64::from(value < self.known.gp[i as usize]) << i;
                self.known.gp[i as usize] = value;
                return Ok(value & g.shape.gp_mask());
            } else {
                self.read_while_paused(g, Ran { gp: 1 << i, fixed: 0 })?;
            }
        }
        Ok(g.regs.gp[i as usize])
    }

    fn current_fixed(&mut self, g: &mut GuestPmu, i: u32) -> Result<u64, SwitchError> {
        if self.attached_ran(g).fixed >> i & 1 == 1 {
            if !self.is_loaded(g) {
                self.read_resident()?;
                g.absorb();
            } else if self.is_running() {
                let value = self.read_fixed(i)?;
                self.wrapped |= u64::from(value < self.known.fixed[i as usize]) << (32 + i);
                self.known.fixed[i as usize] = value;
                return Ok(value & g.shape.fixed_mask());
            } else {
                self.read_while_paused(g, Ran { gp: 0, fixed: 1 << i })?;
            }
        }
        Ok(g.regs.fixed[i as usize])
    }

    /// Image | hardware.
    fn current_status(&mut self, g: &mut GuestPmu) -> Result<u64, SwitchError> {
        if self.is_loaded(g) {
            if self.host.has_global() && !self.status_fresh {
                let status = self.rdmsr(self.host.status_msr())? & g.shape.counter_bits();
                return Ok(g.regs.status | status);
            }
        } else if self.is_resident(g) {
            self.read_resident()?;
            g.absorb();
        }
        Ok(g.regs.status)
    }

    fn is_running(&self) -> bool {
        self.entered && self.control != Some(0)
    }

    /// Reads counters of the loaded, paused guest into its image; a wrap is folded in.
    pub(super) fn read_while_paused(&mut self, g: &mut GuestPmu, which: Ran) -> Result<(), SwitchError> {
        let which = Ran { gp: which.gp & self.ran.gp, fixed: which.fixed & self.ran.fixed };
        if !which.any() {
            return Ok(());
        }
        self.read_counters(which)?;
        let narrow = self.host.gp_width < 40 || self.host.fixed_width < 40;
        let status = if self.wrapped != 0 || narrow {
            self.take_wraps(None, g.shape.counter_bits(), which)?
        } else {
            0
        };
        self.ran.gp &= !which.gp;
        self.ran.fixed &= !which.fixed;
        self.publish(g, which, status);
        self.read_wrapped_if_narrow(g, status)
    }

    /// The guest writes a PMU MSR.
    pub fn guest_wrmsr(
        &mut self,
        g: &mut GuestPmu,
        msr: u32,
        value: u64,
    ) -> Result<GuestAccess, SwitchError> {
        g.absorb();
        let write = match classify_write(&g.shape, msr, value) {
            Write::Fault => return Ok(GuestAccess::Fault),
            Write::Drop => return Ok(GuestAccess::Done),
            write => write,
        };
        if self.is_loaded(g) {
            self.guarded(|_| true, |core| core.write_loaded(g, write))?;
            // An idle guest that had entered starts to count at once if this write made something live.
            self.reenter(g)?;
        } else {
            if self.is_resident(g) && self.resident_owns(g, write) {
                self.guarded(|_| false, Self::read_resident)?;
                g.absorb();
            }
            Self::apply(g, write);
        }
        Ok(GuestAccess::Done)
    }

    /// Whether a write of a resident guest touches a value that the hardware still owns.
    fn resident_owns(&self, g: &GuestPmu, write: Write) -> bool {
        let ran = self.attached_ran(g);
        let touched = self.touched(g, write, &Self::live_after(g, write));
        let status = match write {
            Write::StatusReset(v) => v & (ran.gp | ran.fixed << 32) != 0,
            _ => false,
        };
        status || touched.before.gp & ran.gp != 0 || touched.before.fixed & ran.fixed != 0
    }

    fn write_loaded(&mut self, g: &mut GuestPmu, write: Write) -> Result<(), SwitchError> {
        let touched = self.touched(g, write, &Self::live_after(g, write));
        let reset = match write {
            Write::StatusReset(v) => v & g.live.control,
            _ => 0,
        };
        if !touched.before.any() && !touched.after.any() && reset == 0 {
            Self::apply(g, write);
            return Ok(());
        }
        self.close(g)?;
        // A PMI that the pause saw may have frozen the counters.
        let touched = self.touched(g, write, &Self::live_after(g, write));
        self.read_while_paused(g, touched.before)?;
        if reset != 0 && self.is_narrow(g) {
            // A wrap that this clears unseen would take the ones above the width with it.
            self.read_while_paused(g, Ran { gp: reset & 0xFFFF_FFFF, fixed: reset >> 32 & 0xFFFF })?;
        }
        if reset != 0 && !self.status_fresh && self.host.has_global() {
            // The guest's RESET clears the image's bits and the hardware's.
            self.wrmsr(self.host.status_reset_msr(), reset)?;
        }
        let idle_before = !g.live.any();
        Self::apply(g, write);
        if g.live.any() && self.resident.is_some() {
            self.evict()?;
        }
        self.write_touched(g, touched.after)?;
        if g.policy == Policy::Lazy && idle_before {
            // A lazy guest that was idle at its load skipped the differences.
            self.write_differences(g, false)?;
        } else {
            self.write_selector_differences(g)?;
        }
        Ok(())
    }

    /// The VMM completed instructions for the guest, which the hardware did not see (RFC patches 38 and 39): counters
    /// that count them go up by as much, in the image while paused and in hardware at the next resume.
    pub fn emulated(
        &mut self,
        g: &mut GuestPmu,
        instructions: u64,
        branches: u64,
    ) -> Result<(), SwitchError> {
        g.absorb();
        if !self.is_loaded(g) {
            return Err(SwitchError::NotLoaded(g.id.0));
        }
        let (mut gp, mut fixed) = ([0; MAX_GP], [0; MAX_FIXED]);
        let mut which = Ran::default();
        for i in bits(g.live.gp) {
            gp[i as usize] = emulated_events(g.shape.vendor, g.regs.sel[i as usize], instructions, branches);
            which.gp |= u64::from(gp[i as usize] != 0) << i;
        }
        if g.live.fixed & 1 != 0 && instructions != 0 {
            fixed[0] = instructions;
            which.fixed = 1;
        }
        if !which.any() {
            return Ok(());
        }
        self.guarded(
            |_| true,
            |core| {
                core.close(g)?;
                core.read_while_paused(g, which)?;
                let mut overflow = 0;
                for i in bits(which.gp) {
                    let sum = u128::from(g.regs.gp[i as usize]) + u128::from(gp[i as usize]);
                    overflow |= u64::from(sum > u128::from(g.shape.gp_mask())) << i;
                    g.regs.gp[i as usize] = sum as u64 & g.shape.gp_mask();
                }
                for i in bits(which.fixed) {
                    let sum = u128::from(g.regs.fixed[i as usize]) + u128::from(fixed[i as usize]);
                    overflow |= u64::from(sum > u128::from(g.shape.fixed_mask())) << (32 + i);
                    g.regs.fixed[i as usize] = sum as u64 & g.shape.fixed_mask();
                }
                g.note_overflow(overflow);
                core.owe(which);
                Ok(())
            },
        )?;
        self.reenter(g)
    }

    fn write_touched(&mut self, g: &GuestPmu, which: Ran) -> Result<(), SwitchError> {
        self.known.used.gp |= which.gp;
        self.known.used.fixed |= which.fixed;
        for i in bits(which.gp) {
            if self.known.gp[i as usize] != self.hw_gp(g, i) {
                self.write_gp(i, self.hw_gp(g, i))?;
            }
        }
        for i in bits(which.fixed) {
            if self.known.fixed[i as usize] != self.hw_fixed(g, i) {
                self.write_fixed(i, self.hw_fixed(g, i))?;
            }
        }
        Ok(())
    }

    fn live_after(g: &GuestPmu, write: Write) -> Live {
        let mut regs = g.regs;
        match write {
            Write::Selector(i, v) => regs.sel[i as usize] = v,
            Write::FixedControl(v) => regs.fixed_ctrl = v,
            Write::Control(v) => regs.global = v,
            Write::StatusReset(v) => regs.status &= !v,
            Write::StatusSet(v) => regs.status |= v,
            Write::Gp(..) | Write::Fixed(..) | Write::Drop | Write::Fault => return g.live,
        }
        Live::derive(&g.shape, &regs, &g.filter)
    }

    fn touched(&self, g: &GuestPmu, write: Write, after: &Live) -> Touched {
        let before = &g.live;
        let mut t = Touched::default();
        // A counter that a PMI froze is not live, but the hardware owns its value until it is read.
        let ran = self.attached_ran(g);
        match write {
            Write::Gp(i, _) => {
                t.before.gp = (before.gp | ran.gp) & 1 << i;
                t.after.gp = before.gp & 1 << i;
            }
            Write::Fixed(i, _) => {
                t.before.fixed = (before.fixed | ran.fixed) & 1 << i;
                t.after.fixed = before.fixed & 1 << i;
            }
            _ => {
                for i in 0..MAX_GP {
                    let bit = 1 << i;
                    if (before.gp ^ after.gp) & bit != 0 || before.sel[i] != after.sel[i] {
                        t.before.gp |= before.gp & bit;
                        t.after.gp |= after.gp & bit;
                    }
                }
                for i in 0..MAX_FIXED {
                    let bit = 1 << i;
                    let changed = (before.fixed_ctrl ^ after.fixed_ctrl) >> (4 * i) & 0xF != 0;
                    if (before.fixed ^ after.fixed) & bit != 0 || changed {
                        t.before.fixed |= before.fixed & bit;
                        t.after.fixed |= after.fixed & bit;
                    }
                }
            }
        }
        t
    }

    fn apply(g: &mut GuestPmu, write: Write) {
        match write {
            Write::Gp(i, v) => g.regs.gp[i as usize] = v,
            Write::Fixed(i, v) => g.regs.fixed[i as usize] = v,
            Write::Selector(i, v) => g.regs.sel[i as usize] = v,
            Write::FixedControl(v) => g.regs.fixed_ctrl = v,
            Write::Control(v) => g.regs.global = v,
            Write::StatusReset(v) => g.regs.status &= !v,
            Write::StatusSet(v) => g.regs.status |= v,
            Write::Drop | Write::Fault => return,
        }
        if !matches!(write, Write::Gp(..) | Write::Fixed(..)) {
            g.derive();
        }
        if matches!(write, Write::StatusReset(_)) {
            g.after_status_clear();
        }
    }
}

/// How often an event select counts for instructions that the VMM completes; edge, invert and counter mask count none.
fn emulated_events(vendor: Vendor, sel: u64, instructions: u64, branches: u64) -> u64 {
    if sel & (SEL_EDGE | SEL_INV | SEL_CMASK) != 0 || (vendor == Vendor::Amd && sel >> 32 & 0xF != 0) {
        return 0;
    }
    match (vendor, sel & 0xFFFF) {
        (_, 0x00C0) => instructions,
        (Vendor::Intel, 0x00C4) | (Vendor::Amd, 0x00C2) => branches,
        _ => 0,
    }
}
