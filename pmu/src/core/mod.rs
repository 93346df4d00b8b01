//! One host core's PMU: the hardware, what is known of it, and who holds it.
//!
//! ```text
//!            load              resume            pause             put
//!   (free) ───────▶ (loaded, K=0) ─────▶ (counting) ─────▶ (loaded, K=0) ─────▶ (free), strict: scrubbed
//!                                                                        └────▶ (free), lazy: guest stays resident
//!   resident ── load of another strict or live guest ──▶ read into its mailbox ──▶ overwritten by difference
//! ```
//!
//! Invariants
//! - Global control is 0 (without one: all selectors are) whenever any other register is written (I-6).
//! - `known` holds the value of every register of the host's shape, except that a counter in `ran` has counted since
//!   it was last read. After a failed access nothing is known, and the next load starts clean.
//! - At most one guest is loaded and at most one is resident; they are the same guest only during a load.
//! - An error leaves K = 0 attempted last, with its result in the error (switch.md section 5).
//!
//! Precondition that no code here can check: fewer than 2^w increments of any counter between two reads of it. For
//! counters of 40 bits and more that is a read at least every 60 s; a resident guest needs a `sync` that often.

mod audit;
mod load;
mod put;
mod run;
mod trap;

pub use audit::ForeignWrite;

use crate::guest::mailbox::Mailbox;
use crate::guest::regs::bits;
use crate::guest::{GuestId, GuestPmu};
use crate::hardware::{Hardware, HwError};
use crate::registers::{MAX_FIXED, MAX_GP, RDPMC_FIXED};
use crate::shape::{Shape, Vendor};
use std::sync::Arc;

/// What kind of access failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccessKind {
    /// RDMSR.
    Rdmsr,
    /// WRMSR.
    Wrmsr,
    /// RDPMC.
    Rdpmc,
}

/// Why an operation of the switcher failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SwitchError {
    /// A hardware access failed.
    #[error("access {index} ({kind:?} {register:#x}) failed: {source}; quiescing afterwards: {}", quiesce_text(.quiesced))]
    Access {
        /// How many accesses this operation had done before, from 0.
        index: u32,
        /// Kind.
        kind: AccessKind,
        /// MSR, or RDPMC index.
        register: u32,
        /// Why.
        #[source]
        source: HwError,
        /// What became of the attempt to clear global control.
        quiesced: Result<(), HwError>,
    },
    /// Another guest holds the core.
    #[error("the core's PMU is loaded with guest {0}; put it first")]
    Busy(u64),
    /// The operation needs the guest loaded.
    #[error("guest {0} is not loaded on this core")]
    NotLoaded(u64),
    /// The guest's PMU is not a subset of this core's.
    #[error(
        "guest {0}'s PMU is not a subset of this core's; give it a shape made by Shape::guest of the core's"
    )]
    Shape(u64),
}

fn quiesce_text(result: &Result<(), HwError>) -> String {
    match result {
        Ok(()) => "done".into(),
        Err(error) => format!("failed too: {error}"),
    }
}

impl SwitchError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Access { .. } => "PMU_ACCESS_FAILED",
            Self::Busy(_) => "PMU_CORE_BUSY",
            Self::NotLoaded(_) => "PMU_NOT_LOADED",
            Self::Shape(_) => "PMU_SHAPE_MISMATCH",
        }
    }
}

/// Values of the hardware's registers as last read or written.
#[derive(Debug, Clone, Copy)]
struct Known {
    gp: [u64; MAX_GP],
    sel: [u64; MAX_GP],
    fixed: [u64; MAX_FIXED],
    fixed_ctrl: u64,
    /// Counters and selectors that may be other than 0, so that a switch looks at these only.
    used: Used,
}

/// Which registers of the hardware may be other than 0.
#[derive(Debug, Clone, Copy, Default)]
struct Used {
    gp: u64,
    sel: u64,
    fixed: u64,
}

impl Known {
    const ZERO: Self = Self {
        gp: [0; MAX_GP],
        sel: [0; MAX_GP],
        fixed: [0; MAX_FIXED],
        fixed_ctrl: 0,
        used: Used { gp: 0, sel: 0, fixed: 0 },
    };

    /// Every register is 0.
    fn is_zero(&self) -> bool {
        self.used.gp | self.used.sel | self.used.fixed | self.fixed_ctrl == 0
    }
}

/// Counters that counted since they were last read.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Ran {
    gp: u64,
    fixed: u64,
}

impl Ran {
    fn any(self) -> bool {
        self.gp | self.fixed != 0
    }
}

/// A guest whose registers may still be in the hardware.
#[derive(Debug)]
struct Resident {
    id: GuestId,
    mailbox: Arc<Mailbox>,
    shape: Shape,
    ran: Ran,
    /// Overflow status was read after the guest's last run.
    status_fresh: bool,
    /// A counter was seen below its last value by a read that did not look at the status.
    wrapped: u64,
}

/// Where the host's counters and selectors are, so that no access works it out again.
#[derive(Debug, Clone, Copy)]
struct Addresses {
    counter: u32,
    selector: u32,
    stride: u32,
}

/// One host core's PMU.
#[derive(Debug)]
pub struct Core<H: Hardware> {
    hw: H,
    host: Shape,
    svme: bool,
    /// Everything but K is known.
    clean: bool,
    known: Known,
    /// Global control, if known. Without one in hardware: 0 when all selectors are quiesced.
    control: Option<u64>,
    addresses: Addresses,
    /// The guest that is loaded.
    loaded: Option<GuestId>,
    resident: Option<Resident>,
    /// The guest whose shape was last found to fit.
    fits: Option<GuestId>,
    // Of the loaded guest; at rest (false, none, true, 0) while nobody is loaded.
    /// Between `resume` and `pause`: live counters count.
    entered: bool,
    ran: Ran,
    /// Counter values that the image has and the hardware lacks (emulated increments), written at the next resume.
    owed: Ran,
    status_fresh: bool,
    wrapped: u64,
    accesses: u32,
}

impl<H: Hardware> Core<H> {
    /// A core of which nothing is known. On AMD, EFER.SVME is taken to be 1, as it is while KVM is in use.
    pub fn new(hardware: H, host: Shape) -> Self {
        Self {
            hw: hardware,
            host,
            svme: host.vendor == Vendor::Amd,
            clean: false,
            known: Known::ZERO,
            control: None,
            addresses: Addresses {
                counter: host.counter_write_msr(0),
                selector: host.selector_msr(0),
                stride: host.selector_msr(1) - host.selector_msr(0),
            },
            loaded: None,
            resident: None,
            fits: None,
            entered: false,
            ran: Ran::default(),
            owed: Ran::default(),
            status_fresh: true,
            wrapped: 0,
            accesses: 0,
        }
    }

    /// Sets whether EFER.SVME is 1 on this core (AMD): live selectors carry GuestOnly then. The core must be free.
    pub fn set_svme(&mut self, svme: bool) {
        self.svme = svme && self.host.vendor == Vendor::Amd;
    }

    /// Shape of the host's PMU.
    pub fn host(&self) -> &Shape {
        &self.host
    }

    /// The hardware.
    pub fn hardware(&self) -> &H {
        &self.hw
    }

    /// The hardware. Whoever writes registers behind the switcher's back calls [`Core::forget`].
    pub fn hardware_mut(&mut self) -> &mut H {
        &mut self.hw
    }

    /// Declares everything unknown: the next load starts clean.
    pub fn forget(&mut self) {
        self.clean = false;
        self.control = None;
    }

    /// Whether this guest is loaded.
    pub fn is_loaded(&self, g: &GuestPmu) -> bool {
        self.loaded == Some(g.id)
    }

    /// Whether this guest is resident after a lazy put.
    pub fn is_resident(&self, g: &GuestPmu) -> bool {
        self.resident.as_ref().is_some_and(|r| r.id == g.id)
    }

    /// Whether some guest is loaded.
    pub fn is_busy(&self) -> bool {
        self.loaded.is_some()
    }

    fn hw_selector(&self, g: &GuestPmu, i: u32) -> u64 {
        let mut sel = g.live.sel[i as usize];
        if H::STRIP_PMI {
            sel &= !crate::registers::SEL_INT;
        }
        if self.svme && sel != 0 {
            sel |= crate::registers::AMD_SEL_GUEST_ONLY;
        }
        sel
    }

    fn hw_fixed_ctrl(g: &GuestPmu) -> u64 {
        if H::STRIP_PMI { g.live.fixed_ctrl & !0x8888_8888 } else { g.live.fixed_ctrl }
    }

    /// A counter's value as it goes to hardware. Where the hardware is wider, the bits above the guest's width are
    /// ones, so that both wrap at the same increment.
    fn hw_gp(&self, g: &GuestPmu, i: u32) -> u64 {
        g.regs.gp[i as usize] | self.gp_pad(g)
    }

    fn hw_fixed(&self, g: &GuestPmu, i: u32) -> u64 {
        g.regs.fixed[i as usize] | self.fixed_pad(g)
    }

    fn gp_pad(&self, g: &GuestPmu) -> u64 {
        self.host.gp_mask() & !g.shape.gp_mask()
    }

    fn fixed_pad(&self, g: &GuestPmu) -> u64 {
        self.host.fixed_mask() & !g.shape.fixed_mask()
    }

    /// Nobody is loaded any more.
    fn unload(&mut self) {
        self.loaded = None;
        self.entered = false;
        self.ran = Ran::default();
        self.owed = Ran::default();
        self.status_fresh = true;
        self.wrapped = 0;
    }

    /// Some counter of the guest is narrower than the hardware's.
    fn is_narrow(&self, g: &GuestPmu) -> bool {
        self.gp_pad(g) | self.fixed_pad(g) != 0
    }

    /// Takes counters that were read, and overflow bits, over into the image of the loaded guest.
    fn publish(&mut self, g: &mut GuestPmu, which: Ran, status: u64) {
        if self.is_narrow(g) {
            self.owe(which);
        }
        for i in bits(which.gp) {
            g.regs.gp[i as usize] = self.known.gp[i as usize] & g.shape.gp_mask();
        }
        for i in bits(which.fixed) {
            g.regs.fixed[i as usize] = self.known.fixed[i as usize] & g.shape.fixed_mask();
        }
        if status != 0 {
            g.note_overflow(status);
        }
    }

    // ---- accesses ----

    #[cold]
    #[inline(never)]
    fn failed(&self, kind: AccessKind, register: u32, source: HwError) -> SwitchError {
        SwitchError::Access { index: self.accesses - 1, kind, register, source, quiesced: Ok(()) }
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), SwitchError> {
        self.accesses += 1;
        self.hw.wrmsr(msr, value).map_err(|e| self.failed(AccessKind::Wrmsr, msr, e))
    }

    fn rdmsr(&mut self, msr: u32) -> Result<u64, SwitchError> {
        self.accesses += 1;
        self.hw.rdmsr(msr).map_err(|e| self.failed(AccessKind::Rdmsr, msr, e))
    }

    fn rdpmc(&mut self, index: u32) -> Result<u64, SwitchError> {
        self.accesses += 1;
        self.hw.rdpmc(index).map_err(|e| self.failed(AccessKind::Rdpmc, index, e))
    }

    fn read_gp(&mut self, i: u32) -> Result<u64, SwitchError> {
        self.rdpmc(i)
    }

    fn read_fixed(&mut self, i: u32) -> Result<u64, SwitchError> {
        self.rdpmc(RDPMC_FIXED | i)
    }

    fn write_gp(&mut self, i: u32, value: u64) -> Result<(), SwitchError> {
        self.wrmsr(self.addresses.counter + i * self.addresses.stride, value)?;
        self.known.gp[i as usize] = value;
        Ok(())
    }

    fn write_fixed(&mut self, i: u32, value: u64) -> Result<(), SwitchError> {
        self.wrmsr(self.host.fixed_msr(i), value)?;
        self.known.fixed[i as usize] = value;
        Ok(())
    }

    fn write_sel(&mut self, i: u32, value: u64) -> Result<(), SwitchError> {
        self.wrmsr(self.addresses.selector + i * self.addresses.stride, value)?;
        self.known.sel[i as usize] = value;
        Ok(())
    }

    fn write_fixed_ctrl(&mut self, value: u64) -> Result<(), SwitchError> {
        self.wrmsr(crate::registers::IA32_FIXED_CTR_CTRL, value)?;
        self.known.fixed_ctrl = value;
        Ok(())
    }

    fn write_control(&mut self, value: u64) -> Result<(), SwitchError> {
        self.control = None;
        self.wrmsr(self.host.control_msr(), value)?;
        self.control = Some(value);
        Ok(())
    }

    /// Runs an operation; if it fails, attempts K = 0 last and reports how that went. `lost` says that registers may
    /// have been written, so that nothing is known any more.
    fn guarded<T>(
        &mut self,
        lost: impl FnOnce(&Self) -> bool,
        op: impl FnOnce(&mut Self) -> Result<T, SwitchError>,
    ) -> Result<T, SwitchError> {
        self.accesses = 0;
        match op(self) {
            Ok(value) => Ok(value),
            Err(SwitchError::Access { index, kind, register, source, .. }) => {
                if lost(self) {
                    self.clean = false;
                }
                let quiesced = self.quiesce_after_failure();
                Err(SwitchError::Access { index, kind, register, source, quiesced })
            }
            Err(other) => Err(other),
        }
    }

    #[cold]
    #[inline(never)]
    fn quiesce_after_failure(&mut self) -> Result<(), HwError> {
        self.control = None;
        if self.host.has_global() {
            self.hw.wrmsr(self.host.control_msr(), 0)?;
        } else {
            // All of them, whatever becomes of one: each that is cleared counts no longer.
            let mut first = Ok(());
            for i in bits(self.host.gp) {
                match self.hw.wrmsr(self.host.selector_msr(i), 0) {
                    Ok(()) => self.known.sel[i as usize] = 0,
                    Err(error) => first = first.and(Err(error)),
                }
            }
            first?;
        }
        self.control = Some(0);
        Ok(())
    }
}
