//! Between switcher and model: records every access, watches the quiesce rule (I-6), fails the access it is asked to,
//! and can break one rule, which makes the switcher a deliberately wrong one (the mutation check).

use pmu::registers::*;
use pmu::{Hardware, HwError, ModelPmu, Shape, Vendor};

/// A rule that the rig breaks on the way to the hardware, so that the composed switcher is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mutant {
    /// Does not clear event selects.
    KeepsSelectors,
    /// Does not clear fixed control.
    KeepsFixedControl,
    /// Does not clear counters.
    KeepsCounters,
    /// Does not quiesce.
    NeverQuiesces,
    /// Forgets the overflow status.
    ForgetsStatus,
    /// Reads the overflow status but does not reset it.
    KeepsStatus,
    /// Leaves the counters that no guest sees as they are.
    LeavesUnexposed,
    /// Restores counters through the sign-extending alias.
    RestoresThroughLegacyAlias,
    /// Sets global control to all counters instead of the live ones.
    OpensEverything,
    /// Does not write counter values.
    LosesValues,
    /// Reads counters as zero.
    ReadsZero,
    /// After a failed access, does not quiesce.
    KeepsCountingAfterFailure,
    /// Reads every counter twice.
    ReadsTwice,
}

impl Mutant {
    pub(crate) const ALL: [Self; 13] = [
        Self::KeepsSelectors,
        Self::KeepsFixedControl,
        Self::KeepsCounters,
        Self::NeverQuiesces,
        Self::ForgetsStatus,
        Self::KeepsStatus,
        Self::LeavesUnexposed,
        Self::RestoresThroughLegacyAlias,
        Self::OpensEverything,
        Self::LosesValues,
        Self::ReadsZero,
        Self::KeepsCountingAfterFailure,
        Self::ReadsTwice,
    ];
}

/// The rig.
pub(crate) struct Rig {
    pub(crate) model: ModelPmu,
    shape: Shape,
    pub(crate) mutant: Option<Mutant>,
    pub(crate) count: u64,
    /// Fail the access with this index (of `count`).
    pub(crate) fail_at: Option<u64>,
    /// What it fails with.
    pub(crate) fail_with: HwError,
    failed: bool,
    /// Writes that happened while the counter they concern was enabled in global control.
    pub(crate) unquiesced: Vec<(u32, u64)>,
}

impl Rig {
    pub(crate) fn new(shape: Shape) -> Self {
        Self {
            model: ModelPmu::new(shape),
            shape,
            mutant: None,
            count: 0,
            fail_at: None,
            fail_with: HwError::Injected,
            failed: false,
            unquiesced: Vec::new(),
        }
    }

    fn tick(&mut self) -> Result<(), HwError> {
        let n = self.count;
        self.count += 1;
        if self.fail_at == Some(n) {
            self.fail_at = None;
            self.failed = true;
            return Err(self.fail_with);
        }
        Ok(())
    }

    fn is_counter(&self, msr: u32) -> bool {
        matches!(
            decode(self.shape.vendor, self.shape.version, msr),
            Some(Reg::GpCounter(_) | Reg::GpCounterLegacy(_) | Reg::FixedCounter(_))
        )
    }

    fn is_selector(&self, msr: u32) -> bool {
        matches!(decode(self.shape.vendor, self.shape.version, msr), Some(Reg::GpSelector(_)))
    }

    /// I-6: at a write, no counter that it concerns may be enabled.
    fn watch(&mut self, msr: u32, value: u64) {
        let gp_enabled = |i: u32| {
            if self.shape.has_global() {
                self.model.raw(self.shape.control_msr()).unwrap() >> i & 1 == 1
            } else {
                self.model.raw(self.shape.selector_msr(i)).unwrap() & SEL_EN != 0
            }
        };
        let control =
            if self.shape.has_global() { self.model.raw(self.shape.control_msr()).unwrap() } else { 0 };
        let bad = match decode(self.shape.vendor, self.shape.version, msr) {
            Some(Reg::GpCounter(i) | Reg::GpCounterLegacy(i)) => gp_enabled(i),
            // Without a global control the selector itself is the switch.
            Some(Reg::GpSelector(i)) => self.shape.has_global() && gp_enabled(i),
            Some(Reg::FixedCounter(i)) => control >> (32 + i) & 1 == 1,
            Some(Reg::FixedControl) => control >> 32 != 0,
            Some(Reg::StatusReset | Reg::StatusSet) => control & value != 0,
            _ => false,
        };
        if bad {
            self.unquiesced.push((msr, value));
        }
    }
}

impl Hardware for Rig {
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.tick()?;
        let value = self.model.rdmsr(msr)?;
        let status = self.shape.has_global() && msr == self.shape.status_msr();
        Ok(if status && self.mutant == Some(Mutant::ForgetsStatus) { 0 } else { value })
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.tick()?;
        self.watch(msr, value);
        let (counter, selector) = (self.is_counter(msr), self.is_selector(msr));
        let control = self.shape.has_global() && msr == self.shape.control_msr();
        let unexposed = match decode(self.shape.vendor, self.shape.version, msr) {
            Some(Reg::GpCounter(i) | Reg::GpCounterLegacy(i) | Reg::GpSelector(i)) => i >= 2,
            Some(Reg::FixedCounter(i)) => i >= 2,
            _ => false,
        };
        let (mut msr, mut value) = (msr, value);
        match self.mutant {
            Some(Mutant::KeepsSelectors) if selector && value == 0 => return Ok(()),
            Some(Mutant::KeepsFixedControl) if msr == IA32_FIXED_CTR_CTRL && value == 0 => return Ok(()),
            Some(Mutant::KeepsCounters) if counter && value == 0 => return Ok(()),
            Some(Mutant::KeepsCountingAfterFailure) if control && value == 0 && self.failed => return Ok(()),
            Some(Mutant::NeverQuiesces) if control && value == 0 => return Ok(()),
            Some(Mutant::KeepsStatus) if self.shape.has_global() && msr == self.shape.status_reset_msr() => {
                return Ok(());
            }
            Some(Mutant::LeavesUnexposed) if unexposed && value == 0 => return Ok(()),
            Some(Mutant::RestoresThroughLegacyAlias) if (IA32_A_PMC0..IA32_A_PMC0 + 10).contains(&msr) => {
                msr = msr - IA32_A_PMC0 + IA32_PMC0;
            }
            Some(Mutant::OpensEverything) if control && value != 0 => value = self.shape.counter_bits(),
            Some(Mutant::LosesValues) if counter && value != 0 => return Ok(()),
            _ => {}
        }
        self.model.wrmsr(msr, value)
    }

    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.tick()?;
        self.count += u64::from(self.mutant == Some(Mutant::ReadsTwice));
        let value = self.model.rdpmc(index)?;
        Ok(if self.mutant == Some(Mutant::ReadsZero) { 0 } else { value })
    }
}

/// Every raw register of a shape, for looking at hardware from outside.
pub(crate) fn all_registers(shape: &Shape) -> Vec<u32> {
    let mut out = Vec::new();
    for i in 0..16 {
        if shape.has_gp(i) {
            out.push(shape.counter_msr(i));
            out.push(shape.selector_msr(i));
        }
        if shape.has_fixed(i) {
            out.push(shape.fixed_msr(i));
        }
    }
    if shape.has_global() {
        out.extend([shape.status_msr(), shape.control_msr()]);
        if shape.vendor == Vendor::Intel {
            out.push(IA32_FIXED_CTR_CTRL);
        }
    }
    out
}
