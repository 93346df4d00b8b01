//! What of a guest's PMU has to be in hardware: the derivation of switch.md section 3.

use super::regs::{Regs, bits};
use crate::filter::EventFilter;
use crate::registers::{
    AMD_SEL_GUEST_ONLY, AMD_SEL_HOST_ONLY, MAX_GP, SEL_EN, SEL_INT, SEL_OS, SEL_USR, STATUS_CTR_FRZ,
};
use crate::shape::{Shape, Vendor};

/// The live part of a guest's PMU. `armed` and `pmi_enabled` have status-register positions (fixed at 32).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Live {
    /// General-purpose counters that count while the guest runs.
    pub(crate) gp: u64,
    /// Fixed counters that count while the guest runs.
    pub(crate) fixed: u64,
    /// Selectors as they go to hardware: 0 unless live.
    pub(crate) sel: [u64; MAX_GP],
    /// Fixed control as it goes to hardware: live fields only.
    pub(crate) fixed_ctrl: u64,
    /// Global control as it goes to hardware: live bits only.
    pub(crate) control: u64,
    /// Live counters whose overflow interrupts.
    pub(crate) armed: u64,
    /// Counters whose PMI enable is set, live or not.
    pub(crate) pmi_enabled: u64,
}

impl Live {
    /// Some counter is live.
    #[inline]
    pub(crate) fn any(&self) -> bool {
        self.control != 0
    }

    /// Derives from what the guest wrote.
    pub(crate) fn derive(shape: &Shape, regs: &Regs, filter: &EventFilter) -> Self {
        let frozen = shape.vendor == Vendor::Intel && shape.version >= 4 && regs.status & STATUS_CTR_FRZ != 0;
        // Without a global control the guest's K is all ones (switch.md section 4).
        let control = if shape.has_global() { regs.global } else { shape.counter_bits() };
        let control = if frozen { 0 } else { control };
        let mut live =
            Self { gp: 0, fixed: 0, sel: [0; MAX_GP], fixed_ctrl: 0, control: 0, armed: 0, pmi_enabled: 0 };
        for i in bits(shape.gp) {
            let sel = regs.sel[i as usize];
            if sel & SEL_INT != 0 {
                live.pmi_enabled |= 1 << i;
            }
            let on = control >> i & 1 == 1 && sel & SEL_EN != 0 && sel & (SEL_OS | SEL_USR) != 0;
            if on && filter.allows_gp(shape.vendor, sel) {
                live.gp |= 1 << i;
                live.sel[i as usize] = sel & !(AMD_SEL_GUEST_ONLY | AMD_SEL_HOST_ONLY);
            }
        }
        for i in bits(shape.fixed) {
            let field = regs.fixed_ctrl >> (4 * i) & 0xF;
            if field & 8 != 0 {
                live.pmi_enabled |= 1 << (32 + i);
            }
            if control >> (32 + i) & 1 == 1 && field & 3 != 0 && filter.allows_fixed(i) {
                live.fixed |= 1 << i;
                live.fixed_ctrl |= field << (4 * i);
            }
        }
        live.control = live.gp | live.fixed << 32;
        live.armed = live.pmi_enabled & live.control;
        live
    }
}
