//! A vCPU of KVM that records every call and counts the moment it is enabled.
//!
//! It is stricter than KVM, which reprograms at the next KVM_RUN: here every live counter moves with each register written, and a write to
//! a register of the PMU whose counter is enabled at that moment is noted as a violation (I-6, I-20).

use std::collections::{BTreeMap, BTreeSet};

use pmu::registers::{IA32_FIXED_CTR_CTRL, MSR_PERF_METRICS, Reg, SEL_EN, decode};
use pmu::{Shape, Vendor};

use super::{MsrPort, check, list};
use crate::hypervisor::HvError;

/// What was asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Get(Vec<u32>),
    Set(Vec<(u32, u64)>),
}

/// The fake.
#[derive(Debug, Clone)]
pub(crate) struct FakeKvm {
    pub(crate) shape: Shape,
    pub(crate) values: BTreeMap<u32, u64>,
    pub(crate) listed: Vec<u32>,
    pub(crate) calls: Vec<Call>,
    pub(crate) violations: Vec<String>,
    /// The next SET processes so many entries.
    pub(crate) stop_next_set: Option<usize>,
    /// Registers that refuse every write.
    pub(crate) read_only: BTreeSet<u32>,
    /// Registers that refuse every write of a value other than 0.
    pub(crate) zero_only: BTreeSet<u32>,
    /// Registers that refuse to be read.
    pub(crate) unreadable: BTreeSet<u32>,
    /// Takes writes and keeps 0.
    pub(crate) forgets: Option<u32>,
    /// Goes up by one after each GET.
    pub(crate) moves: Option<u32>,
    /// Calls, counted from 0, that fail as a whole.
    pub(crate) fails: BTreeSet<usize>,
    /// What calls claim beyond what they did.
    pub(crate) overcount: usize,
}

impl FakeKvm {
    /// As after reset.
    pub(crate) fn new(shape: Shape) -> Self {
        let mut values: BTreeMap<u32, u64> = list::expected(&shape).into_iter().map(|msr| (msr, 0)).collect();
        if shape.has_global() {
            values.insert(shape.control_msr(), shape.gp);
        }
        Self {
            shape,
            listed: values.keys().copied().collect(),
            values,
            calls: Vec::new(),
            violations: Vec::new(),
            stop_next_set: None,
            read_only: BTreeSet::new(),
            zero_only: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            forgets: None,
            moves: None,
            fails: BTreeSet::new(),
            overcount: 0,
        }
    }

    /// In the state of an image.
    pub(crate) fn holding(image: &pmu::Image) -> Self {
        let mut fake = Self::new(image.shape);
        fake.values.extend(image.registers.iter().copied());
        fake
    }

    fn value(&self, msr: u32) -> u64 {
        self.values.get(&msr).copied().unwrap_or(0)
    }

    fn control(&self) -> u64 {
        if self.shape.has_global() { self.value(self.shape.control_msr()) } else { u64::MAX }
    }

    fn gp_enabled(&self, i: u32) -> bool {
        self.control() >> i & 1 == 1 && self.value(self.shape.selector_msr(i)) & SEL_EN != 0
    }

    fn fixed_enabled(&self, i: u32) -> bool {
        self.control() >> (32 + i) & 1 == 1 && self.value(IA32_FIXED_CTR_CTRL) >> (4 * i) & 3 != 0
    }

    /// Nothing can count.
    pub(crate) fn stopped(&self) -> bool {
        (0..16).all(|i| !self.shape.has_gp(i) || !self.gp_enabled(i))
            && (0..8).all(|i| !self.shape.has_fixed(i) || !self.fixed_enabled(i))
            && (!self.shape.has_global() || self.control() == 0)
    }

    /// Notes a write that must not happen while something is enabled.
    fn watch(&mut self, msr: u32, value: u64) {
        let global = self.shape.has_global();
        let control = self.control();
        let wrong = match decode(self.shape.vendor, self.shape.version, msr) {
            Some(Reg::GpCounter(i) | Reg::GpCounterLegacy(i)) => {
                if global {
                    control >> i & 1 == 1
                } else {
                    self.gp_enabled(i)
                }
            }
            // Without a global control the selector itself is the switch: only on from off, or off.
            Some(Reg::GpSelector(i)) if global => control >> i & 1 == 1,
            Some(Reg::GpSelector(i)) => value != 0 && self.gp_enabled(i),
            Some(Reg::FixedCounter(i)) => control >> (32 + i) & 1 == 1,
            Some(Reg::FixedControl) => control >> 32 != 0,
            Some(Reg::Status) => control != 0,
            _ => msr == MSR_PERF_METRICS && control != 0,
        };
        if wrong {
            self.violations.push(format!("{msr:#x} := {value:#x} while enabled"));
        }
    }

    /// Every live counter counts. Without a global control nothing could hold the first counters back while the last selectors are
    /// written, except that KVM does not run the guest; there only [`Self::watch`] judges the order.
    fn tick(&mut self) {
        if !self.shape.has_global() {
            return;
        }
        for i in 0..16 {
            if self.shape.has_gp(i) && self.gp_enabled(i) {
                let msr = self.shape.counter_msr(i);
                let next = self.value(msr).wrapping_add(1) & self.shape.gp_mask();
                self.values.insert(msr, next);
            }
            if self.shape.has_fixed(i) && self.fixed_enabled(i) {
                let msr = self.shape.fixed_msr(i);
                let next = self.value(msr).wrapping_add(1) & self.shape.fixed_mask();
                self.values.insert(msr, next);
            }
        }
    }

    /// One host-initiated write; false: refused.
    fn write(&mut self, msr: u32, value: u64) -> bool {
        let refused = !self.values.contains_key(&msr)
            || self.read_only.contains(&msr)
            || (value != 0 && self.zero_only.contains(&msr));
        if refused {
            return false;
        }
        self.watch(msr, value);
        self.tick();
        let shape = self.shape;
        let mut kept = value;
        match decode(shape.vendor, shape.version, msr) {
            Some(Reg::GpCounter(_) | Reg::GpCounterLegacy(_)) => kept &= shape.gp_mask(),
            Some(Reg::FixedCounter(i)) => {
                kept &= shape.fixed_mask();
                if i == 3 && list::has_metrics(&shape) {
                    self.values.insert(MSR_PERF_METRICS, 0);
                }
            }
            Some(Reg::Status) if value & !check::status_bits(&shape) != 0 => return false,
            Some(Reg::Control) => {
                let allowed = shape.counter_bits() | list::metrics_bits(&shape);
                if value & !allowed != 0 && shape.vendor == Vendor::Intel {
                    return false;
                }
                kept &= allowed;
            }
            _ => {}
        }
        self.values.insert(msr, if self.forgets == Some(msr) { 0 } else { kept });
        true
    }

    fn fail(&self) -> Result<(), HvError> {
        if self.fails.contains(&(self.calls.len() - 1)) {
            let source = std::io::Error::from_raw_os_error(libc::EFAULT);
            return Err(HvError::Os { call: "fake", source });
        }
        Ok(())
    }
}

impl MsrPort for FakeKvm {
    fn listed(&mut self) -> Result<Vec<u32>, HvError> {
        Ok(self.listed.clone())
    }

    fn get(&mut self, batch: &mut [(u32, u64)]) -> Result<usize, HvError> {
        self.calls.push(Call::Get(batch.iter().map(|r| r.0).collect()));
        self.fail()?;
        let mut read = 0;
        for entry in batch.iter_mut() {
            match self.values.get(&entry.0) {
                Some(value) if !self.unreadable.contains(&entry.0) => entry.1 = *value,
                _ => return Ok(read),
            }
            read += 1;
        }
        if let Some(msr) = self.moves {
            *self.values.entry(msr).or_default() += 1;
        }
        Ok(read + self.overcount)
    }

    fn set(&mut self, batch: &[(u32, u64)]) -> Result<usize, HvError> {
        self.calls.push(Call::Set(batch.to_vec()));
        self.fail()?;
        let limit = self.stop_next_set.take().unwrap_or(batch.len());
        for (done, &(msr, value)) in batch.iter().enumerate() {
            if done == limit || !self.write(msr, value) {
                return Ok(done);
            }
        }
        Ok(batch.len() + self.overcount)
    }
}
