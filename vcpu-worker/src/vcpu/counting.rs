//! The PMU of one vCPU as its run loop uses it: the guest's state, the core it counts on, and the clock that feeds
//! the model.
//!
//! Order around the guest (switch.md section 2): take the core token and load, resume, run, feed, pause, judge; put and
//! give the token back before anything that may block. With nothing live there is no token and no tick: an idle guest
//! evicts nobody. A guest whose PMU is disabled has none of this, and its accesses fault.

use std::sync::Arc;
use std::time::Duration;

use pmu::core::ForeignWrite;
use pmu::{GuestAccess, GuestPmu, Image, ImportOutcome, Policy, RateClock, Rates, RestorePolicy};

use crate::cores::{Claim, CorePmu, CoreSlot, Prepared, Token};
use crate::error::WorkerError;
use crate::host::thread_cpu_ns;
use crate::hypervisor::{Completion, Kick};

/// Longest time between two looks at the counters of a guest that spins.
pub(super) const TICK: Duration = Duration::from_millis(1);

/// Bit 16 of LVTPC: masked.
const LVT_MASKED: u32 = 1 << 16;

/// How a PMI has to be delivered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pmi {
    /// As this vector.
    Fixed(u8),
    /// As an NMI.
    Nmi,
}

/// One vCPU's PMU.
pub(super) struct Counting {
    vcpu: u32,
    guest: Option<GuestPmu>,
    slot: Arc<CoreSlot>,
    /// Its place on the core, if it counts at all.
    claim: Option<Claim>,
    kick: Arc<dyn Kick>,
    token: Option<Token>,
    rates: Rates,
    clock: RateClock,
    /// Thread CPU time at the last resume, while counting.
    since: Option<u64>,
}

impl Counting {
    /// On the vCPU's thread, pinned to the core: a guest with a PMU claims it.
    pub(super) fn new(
        vcpu: u32,
        guest: Option<GuestPmu>,
        slot: Arc<CoreSlot>,
        kick: Arc<dyn Kick>,
        rates: Rates,
    ) -> Result<Self, WorkerError> {
        let clock = RateClock::new(rates);
        let claim = guest.as_ref().map(|_| slot.prepare()?.claim()).transpose()?;
        Ok(Self { vcpu, guest, slot, claim, kick, token: None, rates, clock, since: None })
    }

    /// Before the guest is entered. Returns the bound after which it must be left again, if something counts.
    #[inline]
    pub(super) fn enter(&mut self) -> Result<Option<Duration>, WorkerError> {
        let Some(guest) = &self.guest else { return Ok(None) };
        if guest.any_live() {
            return self.resume();
        }
        if self.token.as_ref().is_some_and(Token::contended) {
            self.put()?;
        }
        Ok(None)
    }

    #[inline(never)]
    fn resume(&mut self) -> Result<Option<Duration>, WorkerError> {
        let Some(guest) = &mut self.guest else { return Ok(None) };
        let token = self.token.get_or_insert_with(|| self.slot.acquire(&self.kick));
        {
            let mut core = token.core();
            if !core.is_loaded(guest) {
                core.load(guest).map_err(|e| failed(self.vcpu, "load", e))?;
            }
            core.resume(guest).map_err(|e| failed(self.vcpu, "resume", e))?;
        }
        let bound = guest.nearest_overflow(&self.rates).map_or(TICK, |d| d.min(TICK));
        self.since = Some(thread_cpu_ns());
        Ok(Some(bound))
    }

    /// After the guest was left: feeds what it did and pauses. Returns the CPU time it took, if something counted.
    #[inline]
    pub(super) fn leave(&mut self) -> Result<Option<u64>, WorkerError> {
        match self.since.take() {
            None => Ok(None),
            Some(since) => self.pause(since),
        }
    }

    #[inline(never)]
    fn pause(&mut self, since: u64) -> Result<Option<u64>, WorkerError> {
        let (Some(guest), Some(token)) = (&mut self.guest, &self.token) else { return Ok(None) };
        let ns = thread_cpu_ns().saturating_sub(since);
        let events = self.clock.advance(ns);
        let mut core = token.core();
        core.feed(&events);
        core.pause(guest).map_err(|e| failed(self.vcpu, "pause", e))?;
        Ok(Some(ns))
    }

    /// Whether an overflow has yet to be judged.
    #[inline]
    pub(super) fn pmi_raised(&self) -> bool {
        self.guest.as_ref().is_some_and(GuestPmu::pmi_raised)
    }

    /// Judges it; `lvtpc` is the guest's register now.
    pub(super) fn judge(&mut self, lvtpc: u32) -> Option<Pmi> {
        let guest = self.guest.as_mut()?;
        if !guest.judge_pmi(lvtpc & LVT_MASKED != 0) {
            return None;
        }
        delivery(lvtpc)
    }

    /// PMIs so far, those before a migration included.
    pub(super) fn pmis(&self) -> u64 {
        self.guest.as_ref().map_or(0, GuestPmu::pmis)
    }

    /// Answers a trapped read.
    pub(super) fn rdmsr(&mut self, msr: u32) -> Result<Completion, WorkerError> {
        let vcpu = self.vcpu;
        self.access(|core, guest| core.guest_rdmsr(guest, msr).map_err(|e| failed(vcpu, "guest RDMSR", e)))
    }

    /// Answers a trapped write.
    pub(super) fn wrmsr(&mut self, msr: u32, value: u64) -> Result<Completion, WorkerError> {
        let vcpu = self.vcpu;
        self.access(|core, guest| {
            core.guest_wrmsr(guest, msr, value).map_err(|e| failed(vcpu, "guest WRMSR", e))
        })
    }

    fn access(
        &mut self,
        act: impl FnOnce(&mut CorePmu, &mut GuestPmu) -> Result<GuestAccess, WorkerError>,
    ) -> Result<Completion, WorkerError> {
        let Some(guest) = &mut self.guest else { return Ok(Completion::Fault) };
        let token = self.token.get_or_insert_with(|| self.slot.acquire(&self.kick));
        let answer = act(&mut token.core(), guest)?;
        Ok(match answer {
            GuestAccess::Done => Completion::Done,
            GuestAccess::Value(value) => Completion::Value(value),
            GuestAccess::Fault => Completion::Fault,
        })
    }

    /// Whether somebody else should have the core now.
    pub(super) fn token_wanted(&self) -> bool {
        self.token.as_ref().is_some_and(Token::wanted)
    }

    /// Puts the PMU and gives the token up. Nothing to do without a token: then nothing is in a core that is not
    /// also on its way into the image.
    pub(super) fn put(&mut self) -> Result<(), WorkerError> {
        self.since = None;
        if let (Some(token), Some(guest)) = (self.token.take(), &mut self.guest) {
            let mut core = token.core();
            if core.is_loaded(guest) {
                core.put(guest).map_err(|e| failed(self.vcpu, "put", e))?;
            }
        }
        Ok(())
    }

    /// The image as of now. A lazy guest's values may be in a core although it is put: the core is asked for them.
    pub(super) fn image(&mut self) -> Result<Option<Image>, WorkerError> {
        let Some(guest) = &mut self.guest else { return Ok(None) };
        if let Some(token) = &self.token {
            token.core().sync(guest).map_err(|e| failed(self.vcpu, "sync", e))?;
        } else if guest.policy() == Policy::Lazy {
            let token = self.slot.acquire(&self.kick);
            token.core().sync(guest).map_err(|e| failed(self.vcpu, "sync", e))?;
        }
        Ok(Some(guest.image()))
    }

    /// Takes everything of this guest off the core, whatever its policy.
    pub(super) fn release(&mut self) -> Result<(), WorkerError> {
        self.put()?;
        if let Some(guest) = self.guest.as_mut().filter(|g| g.policy() == Policy::Lazy) {
            let token = self.slot.acquire(&self.kick);
            token.core().release(guest).map_err(|e| failed(self.vcpu, "release", e))?;
        }
        Ok(())
    }

    /// Counts on another core from here on; the thread is pinned to it. Everything of this guest has been taken off the
    /// old one ([`Self::release`]), which is kept if the new one is refused.
    pub(super) fn move_to(&mut self, slot: Arc<CoreSlot>, core: Option<Prepared>) -> Result<(), WorkerError> {
        debug_assert!(self.token.is_none(), "released before");
        if let (true, Some(core)) = (self.guest.is_some(), core) {
            self.claim = Some(core.claim()?);
        }
        self.slot = slot;
        Ok(())
    }

    /// Registers of the core that somebody else wrote, with this guest taken off it.
    pub(super) fn audit(&mut self) -> Result<Vec<ForeignWrite>, WorkerError> {
        self.put()?;
        if self.claim.is_none() {
            return Ok(Vec::new());
        }
        let token = self.slot.acquire(&self.kick);
        token.core().audit().map_err(|e| failed(self.vcpu, "audit", e))
    }

    /// The core that it counts on.
    pub(super) fn core(&self) -> u32 {
        self.slot.id()
    }

    /// Replaces the whole state; only while put.
    pub(super) fn import(&mut self, image: &Image) -> Result<(), WorkerError> {
        let vcpu = self.vcpu;
        self.release()?;
        let Some(guest) = &mut self.guest else {
            return Err(WorkerError::PmuImage { vcpu, message: "this guest has no PMU".to_owned() });
        };
        match guest.import(image, RestorePolicy::Require) {
            ImportOutcome::Applied { .. } => Ok(()),
            ImportOutcome::NotApplicable { reason } => Err(WorkerError::PmuImage { vcpu, message: reason }),
            ImportOutcome::Rejected { rule, message } => {
                Err(WorkerError::PmuImage { vcpu, message: format!("rule {rule}: {message}") })
            }
        }
    }

    /// Whether this guest has a PMU.
    pub(super) fn enabled(&self) -> bool {
        self.guest.is_some()
    }
}

/// How the guest wants its PMI; none if it is masked.
pub(super) fn delivery(lvtpc: u32) -> Option<Pmi> {
    match (lvtpc >> 8) & 7 {
        _ if lvtpc & LVT_MASKED != 0 => None,
        4 => Some(Pmi::Nmi),
        0 | 1 => Some(Pmi::Fixed(lvtpc as u8)),
        // SMI, INIT and the reserved modes: as good as masked for a performance interrupt.
        _ => None,
    }
}

fn failed(vcpu: u32, what: &str, error: impl std::fmt::Display) -> WorkerError {
    WorkerError::Pmu { vcpu, message: format!("{what}: {error}") }
}
