//! The registers of a guest's PMU as the guest sees them, and their form in an image.

use super::mailbox::Readout;
use crate::registers::{MAX_FIXED, MAX_GP, Reg, decode};
use crate::shape::Shape;

/// Indices of the set bits, ascending.
#[inline]
pub(crate) fn bits(mut bitmap: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        (bitmap != 0).then(|| {
            let i = bitmap.trailing_zeros();
            bitmap &= bitmap - 1;
            i
        })
    })
}

/// Register values. Entries of absent counters stay 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Regs {
    pub(crate) gp: [u64; MAX_GP],
    pub(crate) sel: [u64; MAX_GP],
    pub(crate) fixed: [u64; MAX_FIXED],
    pub(crate) fixed_ctrl: u64,
    pub(crate) global: u64,
    pub(crate) status: u64,
}

impl Regs {
    /// The reset state: global control has the bits of the general-purpose counters (reference section 10, trap 4).
    pub(crate) fn reset(shape: &Shape) -> Self {
        Self {
            gp: [0; MAX_GP],
            sel: [0; MAX_GP],
            fixed: [0; MAX_FIXED],
            fixed_ctrl: 0,
            global: if shape.has_global() { shape.gp } else { 0 },
            status: 0,
        }
    }

    /// Merges counters that were read from hardware.
    #[inline]
    pub(crate) fn absorb_counters(&mut self, shape: &Shape, readout: &Readout) {
        for i in bits(readout.gp_read) {
            self.gp[i as usize] = readout.gp[i as usize] & shape.gp_mask();
        }
        for i in bits(readout.fixed_read) {
            self.fixed[i as usize] = readout.fixed[i as usize] & shape.fixed_mask();
        }
    }

    /// All registers of the shape, ascending by MSR.
    pub(crate) fn to_registers(self, shape: &Shape) -> Vec<(u32, u64)> {
        let mut out = Vec::with_capacity(2 * MAX_GP + MAX_FIXED + 3);
        for i in bits(shape.gp) {
            out.push((shape.counter_msr(i), self.gp[i as usize]));
            out.push((shape.selector_msr(i), self.sel[i as usize]));
        }
        for i in bits(shape.fixed) {
            out.push((shape.fixed_msr(i), self.fixed[i as usize]));
        }
        if shape.has_global() {
            if shape.fixed != 0 {
                out.push((crate::registers::IA32_FIXED_CTR_CTRL, self.fixed_ctrl));
            }
            out.push((shape.status_msr(), self.status));
            out.push((shape.control_msr(), self.global));
        }
        out.sort_unstable_by_key(|r| r.0);
        out
    }

    fn set(&mut self, shape: &Shape, msr: u32, value: u64) -> bool {
        let fits = |mask: u64| value & !mask == 0;
        match decode(shape.vendor, shape.version, msr) {
            // One number a register: an image with two aliases of one counter would depend on their order
            // (reference section 10, trap 13).
            Some(Reg::GpCounter(i) | Reg::GpCounterLegacy(i))
                if msr == shape.counter_msr(i) && shape.has_gp(i) && fits(shape.gp_mask()) =>
            {
                self.gp[i as usize] = value;
            }
            Some(Reg::GpSelector(i))
                if msr == shape.selector_msr(i)
                    && shape.has_gp(i)
                    && fits(super::write::selector_bits(shape)) =>
            {
                self.sel[i as usize] = value;
            }
            Some(Reg::FixedCounter(i)) if shape.has_fixed(i) && fits(shape.fixed_mask()) => {
                self.fixed[i as usize] = value;
            }
            Some(Reg::FixedControl) if shape.fixed != 0 && fits(shape.fixed_control_bits()) => {
                self.fixed_ctrl = value;
            }
            Some(Reg::Status) if shape.has_global() && fits(super::write::status_bits(shape)) => {
                self.status = value;
            }
            Some(Reg::Control) if shape.has_global() && fits(shape.counter_bits()) => self.global = value,
            _ => return false,
        }
        true
    }

    /// Registers from an image; those that do not exist or do not fit are left out and named.
    pub(crate) fn from_registers_lossy(shape: &Shape, registers: &[(u32, u64)]) -> (Self, Vec<u32>) {
        let mut regs = Self { global: 0, ..Self::reset(shape) };
        let lost =
            registers.iter().filter(|&&(msr, value)| !regs.set(shape, msr, value)).map(|r| r.0).collect();
        (regs, lost)
    }
}
