//! A register-accurate software PMU: Intel architectural PerfMon v1 to v5, AMD K7, PerfCtrExtCore and PerfMonV2.
//!
//! It is the back end of `model` mode, the machine behind the replay tool and the bench for the switcher's tests. It implements
//! [`Hardware`] with the faults and side effects of the real register file (pmu-reference 1.2 to 1.8; Intel SDM vol. 3 ch. 20, AMD PPR):
//!
//! - `0xC1+i` writes are sign-extended from 32 bits, `0x4C1+i` (only with `PERF_CAPABILITIES[13]`) takes the full width and faults above it;
//! - Intel faults on reserved bits, AMD drops them; Intel's `GLOBAL_STATUS` faults on writes, AMD's ignores them;
//! - `0x390` clears, `0x391` only sets; neither raises a PMI; a `FIXED_CTR3` write resets `PERF_METRICS`;
//! - freeze-on-PMI (`DEBUGCTL[12]`): v2/v3 clear `GLOBAL_CTRL`, v4 and later set `STATUS.CTR_Frz`, which gates counting;
//! - AMD `GuestOnly`/`HostOnly` follow `EFER.SVME` and the CPU mode.
//!
//! Invariants: deterministic, it advances only by what [`ModelPmu::feed`] is given; every counter is below 2^width; bits of absent counters
//! are 0 in every register. `INT` and fixed-PMI bits are registers like any other; the model delivers no interrupt.
//!
//! A feed is one indivisible step: every counter that counts takes all of it, and a freeze caused by a wrap acts from the next feed on.

mod access;
mod decode;
mod events;

use crate::hardware::{Hardware, HwError};
use crate::rates::Events;
use crate::shape::{Shape, Vendor};
use decode::Register;

/// The most general-purpose counters the model has room for: counter i answers to MSR `0xC1 + i`, `0x186 + i`.
const MAX_GP: usize = 18;
/// The most fixed counters: counter i answers to MSR `0x309 + i` and bits `4i+3:4i` of a 64-bit control register.
const MAX_FIXED: usize = 16;

/// `STATUS.CTR_Frz` (Intel v4 and later): counters are frozen.
const CTR_FRZ: u64 = 1 << 59;
/// `DEBUGCTL.FREEZE_PERFMON_ON_PMI`.
const FREEZE_ON_PMI: u64 = 1 << 12;
/// OS and USR of a field of the fixed control.
const OS_OR_USR_FIELD: u64 = 3;
/// `EVENTSEL.INT` (GP counters of both vendors).
const INT: u64 = 1 << 20;

/// In which mode the core runs while events happen. It matters on AMD only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CpuMode {
    /// Inside a guest (after VMRUN).
    Guest,
    /// The host.
    Host,
}

/// One core's PMU in software. See the module's head for the rules.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelPmu {
    shape: Shape,
    /// Bitmaps of the counters that exist, cut to the room there is.
    gp: u64,
    fixed: u64,
    extended_events: bool,
    svme: bool,
    counters: [u64; MAX_GP],
    selectors: [u64; MAX_GP],
    fixed_counters: [u64; MAX_FIXED],
    fixed_control: u64,
    global_control: u64,
    status: u64,
    metrics: u64,
    debug_control: u64,
}

impl ModelPmu {
    /// A PMU of this shape in its reset state: everything 0, `GLOBAL_CTRL` the bits of the GP counters, AMD's `EFER.SVME` 1 (as under KVM).
    /// It counts Intel 3C/00, C0/00, 3C/01 and the fixed counters, AMD 76/00 and C0/00, and nothing else.
    #[must_use]
    pub fn new(shape: Shape) -> Self {
        let gp = shape.gp & low_bits(MAX_GP as u32);
        let fixed = if shape.vendor == Vendor::Intel && shape.version >= 2 {
            shape.fixed & low_bits(MAX_FIXED as u32)
        } else {
            0
        };
        let mut model = Self {
            svme: shape.vendor == Vendor::Amd,
            shape,
            gp,
            fixed,
            extended_events: false,
            counters: [0; MAX_GP],
            selectors: [0; MAX_GP],
            fixed_counters: [0; MAX_FIXED],
            fixed_control: 0,
            global_control: 0,
            status: 0,
            metrics: 0,
            debug_control: 0,
        };
        model.reset();
        model
    }

    /// As [`ModelPmu::new`], and GP counters also count Intel C4/00 (branches) and A4/01 (slots), AMD C2/00 (branches).
    #[must_use]
    pub fn with_extended_events(shape: Shape) -> Self {
        Self { extended_events: true, ..Self::new(shape) }
    }

    /// The shape it was made with.
    #[must_use]
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Sets AMD's `EFER.SVME` on this core: with 0, counters with `GuestOnly` or `HostOnly` do not count at all. No effect on Intel.
    pub fn set_svme(&mut self, on: bool) {
        self.svme = on;
    }

    /// Puts every register into its reset state. `EFER.SVME` is no PMU register and stays.
    pub fn reset(&mut self) {
        self.counters = [0; MAX_GP];
        self.selectors = [0; MAX_GP];
        self.fixed_counters = [0; MAX_FIXED];
        self.fixed_control = 0;
        self.global_control = if self.has_global() { self.gp } else { 0 };
        self.status = 0;
        self.metrics = 0;
        self.debug_control = 0;
    }

    /// Lets these events happen in this mode. A counter takes those its selector names if it is enabled, its global bit is set, nothing is
    /// frozen and OS or USR is set (events have no privilege level here). A counter that passes 2^width, once or several times, keeps the
    /// remainder and has its status bit set.
    pub fn feed(&mut self, events: &Events, mode: CpuMode) {
        if events.is_zero() || self.status & CTR_FRZ != 0 {
            return;
        }
        let mut wrapped = 0u64;
        let mut interrupt = false;
        let width = low_bits(u32::from(self.shape.gp_width));
        for i in bits(self.gp) {
            if !self.enabled(i) || !self.mode_counts(self.selectors[i], mode) {
                continue;
            }
            let selector = self.selectors[i];
            let increment = events::of_selector(self.shape.vendor, selector, events, self.extended_events);
            if add(&mut self.counters[i], increment, width) {
                wrapped |= 1 << i;
                interrupt |= selector & INT != 0;
            }
        }
        let width = low_bits(u32::from(self.shape.fixed_width));
        for i in bits(self.fixed) {
            let field = self.fixed_control >> (4 * i);
            let on = field & OS_OR_USR_FIELD != 0;
            if !on || self.global_control >> (32 + i) & 1 == 0 {
                continue;
            }
            if add(&mut self.fixed_counters[i], events::of_fixed(i, events), width) {
                wrapped |= 1 << (32 + i);
                interrupt |= field & 8 != 0;
            }
        }
        self.overflow(wrapped, interrupt);
    }

    /// The value of a register without any side effect. Aliases read the same, write-only ports read 0; `None` where no register is.
    #[must_use]
    pub fn raw(&self, msr: u32) -> Option<u64> {
        self.decode(msr).map(|register| self.read(register))
    }

    /// Puts a value into a register as other software of the host might have left it, with the value's side effects: counters by any
    /// alias take the value cut to their width (no sign extension), status (`0x38E`, `C000_0300`) becomes the value. Reserved bits are a
    /// fault on Intel and are dropped on AMD; read-only registers fault.
    pub fn host_set(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        match self.decode(msr).ok_or(HwError::Fault)? {
            Register::Counter { index, .. } => {
                self.counters[index] = value & low_bits(u32::from(self.shape.gp_width));
                Ok(())
            }
            Register::Status => {
                self.status = self.accept(value, self.status_mask())?;
                Ok(())
            }
            register => self.write(register, value),
        }
    }

    fn enabled(&self, i: usize) -> bool {
        const EN: u64 = 1 << 22;
        const OS_OR_USR: u64 = 3 << 16;
        let selector = self.selectors[i];
        selector & EN != 0
            && selector & OS_OR_USR != 0
            && (!self.has_global() || self.global_control >> i & 1 == 1)
    }

    /// The GuestOnly (40) and HostOnly (41) truth table of the kernel's svm_pmu_host_guest_test.
    fn mode_counts(&self, selector: u64, mode: CpuMode) -> bool {
        if self.shape.vendor == Vendor::Intel {
            return true;
        }
        match (selector >> 40 & 3, self.svme) {
            (0, _) | (3, true) => true,
            (1, true) => mode == CpuMode::Guest,
            (2, true) => mode == CpuMode::Host,
            _ => false,
        }
    }

    fn overflow(&mut self, wrapped: u64, interrupt: bool) {
        if !self.has_global() {
            return; // Intel v1, K7 and ExtCore have no status: only the counter tells.
        }
        self.status |= wrapped;
        if interrupt && self.shape.vendor == Vendor::Intel && self.debug_control & FREEZE_ON_PMI != 0 {
            if self.shape.version >= 4 {
                self.status |= CTR_FRZ;
            } else {
                self.global_control = 0;
            }
        }
    }

    /// Whether there are GLOBAL_CTRL and GLOBAL_STATUS.
    fn has_global(&self) -> bool {
        self.shape.version >= 2
    }
}

impl Hardware for ModelPmu {
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.raw(msr).ok_or(HwError::Fault)
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        let register = self.decode(msr).ok_or(HwError::Fault)?;
        self.write(register, value)
    }

    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.read_pmc(index).ok_or(HwError::Fault)
    }
}

/// Adds modulo `mask + 1`, a power of two; true if it wrapped at least once.
fn add(counter: &mut u64, increment: u64, mask: u64) -> bool {
    let (sum, carried) = counter.overflowing_add(increment);
    *counter = sum & mask;
    carried || sum > mask
}

/// A mask of the lowest `n` bits; all ones from 64 on.
fn low_bits(n: u32) -> u64 {
    1u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1)
}

/// The indices of the set bits, ascending.
fn bits(mut bitmap: u64) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let index = bitmap.trailing_zeros();
        bitmap &= bitmap.wrapping_sub(1);
        (index < 64).then_some(index as usize)
    })
}

#[cfg(test)]
mod tests;
