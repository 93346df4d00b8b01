//! The image of one vCPU's PMU: what is saved, stored and sent.
//!
//! A shape plus a list of (register, value), never fixed arrays: a record with hard-coded counter numbers cannot grow
//! (QEMU's and Propolis' could not). Importing has three distinct outcomes, and which of them is acceptable is the
//! caller's policy.

use sha2::{Digest, Sha256};

use crate::filter::EventFilter;
use crate::guest::live::Live;
use crate::guest::regs::{Regs, bits};
use crate::shape::{Shape, Vendor};

/// Registers that an image holds at most; more are refused before anything is read.
pub const MAX_REGISTERS: usize = 64;

/// One vCPU's PMU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The guest's PMU.
    pub shape: Shape,
    /// (MSR, value), ascending by MSR; counters by their legacy number on Intel.
    pub registers: Vec<(u32, u64)>,
    /// A PMI was injected and is in service.
    pub in_service: bool,
    /// A PMI is owed.
    pub pmi_pending: bool,
    /// PMIs injected so far.
    pub pmis: u64,
}

/// What to do with an image that does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RestorePolicy {
    /// It is rejected.
    #[default]
    Require,
    /// What fits is taken.
    BestEffort,
    /// The PMU is reset; the image is not looked at.
    Reset,
}

/// Outcome of an import.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImportOutcome {
    /// The image is in force; registers that were left out (best effort only) are named.
    Applied {
        /// MSRs that did not fit.
        dropped: Vec<u32>,
    },
    /// There was nothing to apply.
    NotApplicable {
        /// Why.
        reason: String,
    },
    /// Nothing was changed.
    Rejected {
        /// Rule of reference section 6.5.
        rule: &'static str,
        /// What does not fit.
        message: String,
    },
}

/// An image that is not one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The shape cannot be.
    #[error("image: {0}")]
    Shape(#[from] crate::shape::ShapeError),
    /// Too many registers.
    #[error("image holds {0} registers, at most {MAX_REGISTERS} are possible")]
    TooMany(usize),
    /// Registers out of order or twice.
    #[error("image register {0:#x} is out of order or present twice")]
    Order(u32),
    /// A register the shape does not have, or a value it cannot hold.
    #[error("image register {msr:#x} cannot hold {value:#x} in a PMU of shape {shape}")]
    Value {
        /// MSR.
        msr: u32,
        /// Value.
        value: u64,
        /// Shape.
        shape: Shape,
    },
}

impl ImageError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Shape(_) => "PMU_IMAGE_SHAPE",
            Self::TooMany(_) => "PMU_IMAGE_TOO_LARGE",
            Self::Order(_) => "PMU_IMAGE_ORDER",
            Self::Value { .. } => "PMU_IMAGE_VALUE",
        }
    }
}

impl Image {
    /// Checks an image from outside: shape, order, and that every value fits its register.
    pub fn validate(&self) -> Result<(), ImageError> {
        self.shape.validate()?;
        if self.registers.len() > MAX_REGISTERS {
            return Err(ImageError::TooMany(self.registers.len()));
        }
        if let Some(pair) = self.registers.windows(2).find(|w| w[0].0 >= w[1].0) {
            return Err(ImageError::Order(pair[1].0));
        }
        let (_, lost) = Regs::from_registers_lossy(&self.shape, &self.registers);
        if let Some(&msr) = lost.first() {
            let value = self.registers.iter().find(|r| r.0 == msr).map_or(0, |r| r.1);
            return Err(ImageError::Value { msr, value, shape: self.shape });
        }
        Ok(())
    }

    /// One register's value.
    pub fn get(&self, msr: u32) -> Option<u64> {
        self.registers.binary_search_by_key(&msr, |r| r.0).ok().map(|i| self.registers[i].1)
    }

    /// Nothing but reset values: no counter, selector, control or status was ever set.
    pub fn is_reset(&self) -> bool {
        let control = self.shape.control_msr();
        self.registers.iter().all(|&(msr, value)| value == 0 || (msr == control && value == self.shape.gp))
    }

    /// SHA-256 over shape, registers and flags: what both sides of a migration compare.
    pub fn digest(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        let s = &self.shape;
        hash.update([u8::from(s.vendor == Vendor::Amd), s.version, s.gp_width, s.fixed_width]);
        for word in [s.gp, s.fixed, s.perf_capabilities, self.pmis] {
            hash.update(word.to_le_bytes());
        }
        hash.update([u8::from(self.in_service), u8::from(self.pmi_pending)]);
        for &(msr, value) in &self.registers {
            hash.update(msr.to_le_bytes());
            hash.update(value.to_le_bytes());
        }
        hash.finalize().into()
    }
}

/// One counter, decoded for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CounterView {
    /// "gp0", "fixed1".
    pub name: String,
    /// Value, below 2^width.
    pub value: u64,
    /// Event select as the guest wrote it; fixed: its 4-bit field of fixed control.
    pub selector: u64,
    /// It counts while the guest runs (as far as selector and control say; the event filter is not looked at).
    pub live: bool,
    /// Its overflow status bit.
    pub overflow: bool,
    /// An overflow raises a PMI.
    pub pmi_enabled: bool,
}

/// The counters of an image.
pub fn counters(image: &Image) -> Vec<CounterView> {
    let shape = &image.shape;
    let (regs, _) = Regs::from_registers_lossy(shape, &image.registers);
    let live = Live::derive(shape, &regs, &EventFilter::allow_all());
    let view = |name: String, value, selector, bit: u32| CounterView {
        name,
        value,
        selector,
        live: live.control >> bit & 1 == 1,
        overflow: regs.status >> bit & 1 == 1,
        pmi_enabled: live.pmi_enabled >> bit & 1 == 1,
    };
    let gp = bits(shape.gp).map(|i| view(format!("gp{i}"), regs.gp[i as usize], regs.sel[i as usize], i));
    let fixed = bits(shape.fixed)
        .map(|i| view(format!("fixed{i}"), regs.fixed[i as usize], regs.fixed_ctrl >> (4 * i) & 0xF, 32 + i));
    gp.chain(fixed).collect()
}
