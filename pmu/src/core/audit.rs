//! Finding foreign writers: registers that do not hold what the switcher knows (I-24).

use super::{Core, SwitchError};
use crate::guest::regs::bits;
use crate::hardware::Hardware;

/// A register that somebody else wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ForeignWrite {
    /// MSR.
    pub msr: u32,
    /// What the switcher knows.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

impl<H: Hardware> Core<H> {
    /// Reads every register of a free core and names those that hold something else than is known. Finding any makes
    /// everything unknown, so that the next load starts clean. A core of which nothing is known has nothing to compare.
    pub fn audit(&mut self) -> Result<Vec<ForeignWrite>, SwitchError> {
        if let Some(loaded) = self.loaded {
            return Err(SwitchError::Busy(loaded.0));
        }
        if !self.clean {
            return Ok(Vec::new());
        }
        let ran = self.resident.as_ref().map(|r| r.ran).unwrap_or_default();
        let found = self.guarded(|_| false, |core| core.compare(ran))?;
        if !found.is_empty() {
            self.forget();
        }
        Ok(found)
    }

    fn compare(&mut self, ran: super::Ran) -> Result<Vec<ForeignWrite>, SwitchError> {
        let mut foreign = Vec::new();
        let mut note = |msr, expected: u64, found: u64| {
            if expected != found {
                foreign.push(ForeignWrite { msr, expected, found });
            }
        };
        if self.host.has_global() {
            let msr = self.host.control_msr();
            note(msr, self.control.unwrap_or(0), self.rdmsr(msr)?);
        }
        for i in bits(self.host.gp) {
            let msr = self.host.selector_msr(i);
            note(msr, self.known.sel[i as usize], self.rdmsr(msr)?);
            if ran.gp >> i & 1 == 0 {
                note(self.host.counter_msr(i), self.known.gp[i as usize], self.read_gp(i)?);
            }
        }
        for i in bits(self.host.fixed & !ran.fixed) {
            note(self.host.fixed_msr(i), self.known.fixed[i as usize], self.read_fixed(i)?);
        }
        if self.host.fixed != 0 {
            let msr = crate::registers::IA32_FIXED_CTR_CTRL;
            note(msr, self.known.fixed_ctrl, self.rdmsr(msr)?);
        }
        Ok(foreign)
    }
}
