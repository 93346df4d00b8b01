//! One vCPU's PMU: the image, what of it is live, and the decision whether an overflow interrupts.
//!
//! Invariants
//! - Each register has one owner: while a [`crate::Core`] holds the guest (loaded, or resident after a lazy put), the
//!   counters that ran since they were last read belong to the core's hardware; everything else is here.
//! - `live` is always the derivation of `regs`, the filter and the freeze bit ([`live`]); nothing else computes it.
//! - An image is replaced as a whole: by a put, a sync, or what an eviction left in the [`mailbox`].

pub(crate) mod live;
pub(crate) mod mailbox;
pub(crate) mod regs;
pub(crate) mod write;

use std::sync::Arc;
use std::time::Duration;

use crate::filter::EventFilter;
use crate::image::{Image, ImportOutcome, RestorePolicy};
use crate::rates::Rates;
use crate::registers::{STATUS_CTR_FRZ, STATUS_LBR_FRZ};
use crate::shape::{Shape, Vendor};
use live::Live;
use mailbox::{Mailbox, Readout};
use regs::{Regs, bits};

/// Identity of a guest PMU, unique among the guests of one process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct GuestId(pub u64);

/// How much is undone when a guest leaves a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Policy {
    /// Every put scrubs: no register holds a guest-derived value afterwards.
    #[default]
    Strict,
    /// The guest stays resident, quiesced, until someone else needs the core.
    Lazy,
}

/// Answer to a guest's access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestAccess {
    /// The write was done, or dropped as the vendor drops it.
    Done,
    /// What the guest reads.
    Value(u64),
    /// #GP(0).
    Fault,
}

/// One vCPU's PMU. Owned by the vCPU's thread.
#[derive(Debug)]
pub struct GuestPmu {
    pub(crate) id: GuestId,
    pub(crate) shape: Shape,
    pub(crate) policy: Policy,
    pub(crate) filter: EventFilter,
    pub(crate) regs: Regs,
    pub(crate) live: Live,
    pub(crate) mailbox: Arc<Mailbox>,
    /// It has been resident somewhere, so that its mailbox may hold something.
    pub(crate) lent: bool,
    /// The guest's DEBUGCTL freezes counters on a PMI.
    pub(crate) freeze_on_pmi: bool,
    in_service: bool,
    pmi_raised: bool,
    pmis: u64,
}

impl GuestPmu {
    /// A PMU in its reset state.
    pub fn new(id: GuestId, shape: Shape, policy: Policy, filter: EventFilter) -> Self {
        let regs = Regs::reset(&shape);
        let live = Live::derive(&shape, &regs, &filter);
        Self {
            id,
            shape,
            policy,
            filter,
            regs,
            live,
            mailbox: Arc::default(),
            lent: false,
            freeze_on_pmi: false,
            in_service: false,
            pmi_raised: false,
            pmis: 0,
        }
    }

    /// Identity.
    pub fn id(&self) -> GuestId {
        self.id
    }

    /// Shape.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Scrub policy.
    pub fn policy(&self) -> Policy {
        self.policy
    }

    /// Some counter counts while the guest runs.
    pub fn any_live(&self) -> bool {
        self.live.any()
    }

    /// A live counter interrupts when it overflows.
    pub fn any_armed(&self) -> bool {
        self.live.armed != 0
    }

    /// FREEZE_PERFMON_ON_PMI of the guest's DEBUGCTL (bit 12): a delivered PMI sets CTR_Frz (v4), or clears the
    /// guest's global control (v2, v3).
    pub fn set_freeze_on_pmi(&mut self, on: bool) {
        self.freeze_on_pmi = on;
    }

    /// The whole image. Valid while no core's hardware owns a counter: after a strict put, a `sync`, a `release`, or
    /// before the first load.
    pub fn image(&self) -> Image {
        let mut regs = self.regs;
        if let Some(readout) = self.mailbox.peek() {
            regs.absorb_counters(&self.shape, &readout);
            if self.shape.has_global() {
                regs.status |= readout.status;
            }
        }
        Image {
            shape: self.shape,
            registers: regs.to_registers(&self.shape),
            in_service: self.in_service,
            pmi_pending: self.pmi_raised,
            pmis: self.pmis,
        }
    }

    /// Takes a saved image. Only while no core holds this guest. Nothing is changed unless the outcome is `Applied`,
    /// or the policy is [`RestorePolicy::Reset`].
    pub fn import(&mut self, image: &Image, policy: RestorePolicy) -> ImportOutcome {
        if policy == RestorePolicy::Reset {
            self.reset();
            return ImportOutcome::NotApplicable {
                reason: "the policy is reset: the PMU starts from its reset state".into(),
            };
        }
        if self.shape.gp == 0 && self.shape.fixed == 0 && image.is_reset() {
            return ImportOutcome::NotApplicable {
                reason: "this guest has no PMU and the image holds nothing".into(),
            };
        }
        if let Err(error) = image.validate() {
            return ImportOutcome::Rejected { rule: "C4", message: error.to_string() };
        }
        let best_effort = policy == RestorePolicy::BestEffort;
        let (from, to) = (&image.shape, &self.shape);
        let flavour = from.vendor != to.vendor || (to.vendor == Vendor::Amd && from.version != to.version);
        let smaller = from.version > to.version
            || from.gp & !to.gp != 0
            || from.fixed & !to.fixed != 0
            || (from.gp_width, from.fixed_width) != (to.gp_width, to.fixed_width);
        if flavour || (smaller && !best_effort) {
            let rule = if flavour { "C1" } else { "C2" };
            return ImportOutcome::Rejected {
                rule,
                message: format!("an image of shape {from} does not fit a PMU of shape {to}"),
            };
        }
        let (regs, dropped) = Regs::from_registers_lossy(&self.shape, &image.registers);
        if let Some(msr) = dropped.first().filter(|_| !best_effort) {
            let message = format!(
                "register {msr:#x} of the image does not exist or fit in a PMU of shape {}",
                self.shape
            );
            return ImportOutcome::Rejected { rule: "C4", message };
        }
        let _stale = self.mailbox.take();
        self.regs = regs;
        self.in_service = image.in_service;
        self.pmi_raised = image.pmi_pending;
        self.pmis = image.pmis;
        self.derive();
        ImportOutcome::Applied { dropped }
    }

    /// vCPU reset: everything zero, global control to its reset value (I-23). Only while no core holds this guest.
    pub fn reset(&mut self) {
        let _stale = self.mailbox.take();
        self.regs = Regs::reset(&self.shape);
        self.in_service = false;
        self.pmi_raised = false;
        self.derive();
    }

    /// Replaces the event filter. Only while no core holds this guest.
    pub fn set_filter(&mut self, filter: EventFilter) {
        self.filter = filter;
        self.derive();
    }

    /// An armed overflow was seen and has not been judged.
    pub fn pmi_raised(&self) -> bool {
        self.pmi_raised
    }

    /// A PMI was injected and the guest has not yet cleared its last enabled status bit.
    pub fn in_service(&self) -> bool {
        self.in_service
    }

    /// PMIs injected so far; travels in the image.
    pub fn pmis(&self) -> u64 {
        self.pmis
    }

    /// Judges the overflow that a pause or an emulated increment saw: true if exactly one PMI is to be injected now.
    /// Masked, or with one in service, there is none, and none later for it (switch.md section 6).
    pub fn judge_pmi(&mut self, lvtpc_masked: bool) -> bool {
        if !std::mem::take(&mut self.pmi_raised) || lvtpc_masked || self.in_service {
            return false;
        }
        // The service ends when the guest clears its last enabled bit. It may have done so already, and without an
        // overflow status there is nothing to clear.
        self.in_service = self.shape.has_global() && self.regs.status & self.live.pmi_enabled != 0;
        self.pmis += 1;
        true
    }

    /// Time until the soonest armed overflow of a live counter at these rates, from the values last read.
    pub fn nearest_overflow(&self, rates: &Rates) -> Option<Duration> {
        let vendor = self.shape.vendor;
        let gp = bits(self.live.gp).filter(|i| self.live.armed >> i & 1 == 1).map(|i| {
            let i = i as usize;
            (selector_rate(rates, vendor, self.regs.sel[i]), self.shape.gp_mask() - self.regs.gp[i])
        });
        let fixed = bits(self.live.fixed)
            .filter(|i| self.live.armed >> (32 + i) & 1 == 1)
            .map(|i| (fixed_rate(rates, i), self.shape.fixed_mask() - self.regs.fixed[i as usize]));
        gp.chain(fixed)
            .filter(|(rate, _)| *rate > 0)
            .map(|(rate, left)| {
                let nanos = (u128::from(left) + 1) * 1_000_000_000 / u128::from(rate);
                Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
            })
            .min()
    }

    /// Recomputes what is live.
    pub(crate) fn derive(&mut self) {
        self.live = Live::derive(&self.shape, &self.regs, &self.filter);
    }

    /// Takes over what an eviction read for this guest.
    #[inline]
    pub(crate) fn absorb(&mut self) {
        if self.lent
            && self.mailbox.is_full()
            && let Some(readout) = self.mailbox.take()
        {
            self.commit(&readout);
        }
    }

    /// Merges counters that were read from hardware, and their overflow bits.
    pub(crate) fn commit(&mut self, readout: &Readout) {
        self.regs.absorb_counters(&self.shape, readout);
        self.note_overflow(readout.status);
    }

    /// New overflow bits of counters: merges them and raises a PMI for each 0 -> 1 transition that is enabled.
    pub(crate) fn note_overflow(&mut self, counters: u64) {
        let new = if self.shape.has_global() { counters & !self.regs.status } else { counters };
        if self.shape.has_global() {
            self.regs.status |= counters;
        }
        if new & self.live.pmi_enabled == 0 {
            return;
        }
        self.pmi_raised = true;
        if self.freeze_on_pmi && self.shape.has_global() {
            if self.shape.version >= 4 {
                self.regs.status |= STATUS_CTR_FRZ | STATUS_LBR_FRZ;
            } else {
                self.regs.global = 0;
            }
            self.derive();
        }
    }

    /// The guest cleared status bits: a PMI in service ends with the last enabled one.
    pub(crate) fn after_status_clear(&mut self) {
        if self.regs.status & self.live.pmi_enabled == 0 {
            self.in_service = false;
        }
    }
}

/// Events a second of what a selector counts; 0 if it is none of the events that the software clock feeds.
fn selector_rate(rates: &Rates, vendor: Vendor, sel: u64) -> u64 {
    match (vendor, sel & 0xFFFF) {
        (Vendor::Intel, 0x003C) | (Vendor::Amd, 0x0076) => rates.cycles,
        (_, 0x00C0) => rates.instructions,
        (Vendor::Intel, 0x013C) => rates.ref_cycles,
        _ => 0,
    }
}

fn fixed_rate(rates: &Rates, i: u32) -> u64 {
    match i {
        0 => rates.instructions,
        1 => rates.cycles,
        2 => rates.ref_cycles,
        3 => rates.slots,
        _ => 0,
    }
}
