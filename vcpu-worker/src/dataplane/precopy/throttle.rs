//! How much a guest that does not converge is slowed down: in steps, and never less again before the end.

use super::{Decision, Verdict, expected_dirty};

/// First share of the time that vCPUs rest, hundredths.
const FIRST: u32 = 20;
/// Each further step.
const STEP: u32 = 15;
/// The last one.
const MOST: u32 = 95;
/// A round that is expected to leave less than this many hundredths of what is dirty now converges by itself.
const CONVERGES_PERCENT: u64 = 70;

/// See the module.
#[derive(Debug, Clone)]
pub struct Stepper {
    allowed: bool,
    percent: u32,
}

impl Stepper {
    /// `allowed`: by who asked for the migration.
    pub fn new(allowed: bool) -> Self {
        Self { allowed, percent: 0 }
    }

    /// Takes in a round's verdict; a new share, if it must be another.
    pub fn step(&mut self, verdict: &Verdict) -> Option<u32> {
        let stuck = verdict.decision == Decision::NextRound { voluntary: false }
            && expected_dirty(&verdict.prediction).is_some_and(|expected| {
                u128::from(expected) * 100
                    >= u128::from(verdict.prediction.remaining_bytes) * u128::from(CONVERGES_PERCENT)
            });
        if !self.allowed || !stuck || self.percent >= MOST {
            return None;
        }
        self.percent = if self.percent == 0 { FIRST } else { (self.percent + STEP).min(MOST) };
        Some(self.percent)
    }

    /// Whether there is nothing left to be gained by slowing it down.
    pub fn is_exhausted(&self) -> bool {
        !self.allowed || self.percent >= MOST
    }
}

#[cfg(test)]
mod tests {
    use super::super::Prediction;
    use super::*;

    fn verdict(decision: Decision, dirty: u64) -> Verdict {
        let prediction = Prediction {
            bytes_per_second: 100,
            dirty_bytes_per_second: dirty,
            remaining_bytes: 1000,
            ..Prediction::default()
        };
        Verdict { decision, prediction, stalled: false, why: String::new() }
    }

    #[test]
    fn steps_up_while_it_does_not_converge_and_only_if_allowed() {
        let stuck = verdict(Decision::NextRound { voluntary: false }, 90);
        assert_eq!(Stepper::new(false).step(&stuck), None);
        assert!(Stepper::new(false).is_exhausted());
        let mut stepper = Stepper::new(true);
        let shares: Vec<_> = (0..10).filter_map(|_| stepper.step(&stuck)).collect();
        assert_eq!(shares, [20, 35, 50, 65, 80, 95]);
        assert!(stepper.is_exhausted());
        let mut stepper = Stepper::new(true);
        assert_eq!(stepper.step(&verdict(Decision::NextRound { voluntary: false }, 60)), None, "it shrinks");
        assert_eq!(stepper.step(&verdict(Decision::NextRound { voluntary: true }, 90)), None);
        assert_eq!(stepper.step(&verdict(Decision::Converged, 90)), None);
        assert!(!stepper.is_exhausted());
    }
}
