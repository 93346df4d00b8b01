//! How what was asked of all vCPUs is waited for.
//!
//! A vCPU on another core answers within tens of microseconds; a thread that goes to sleep meanwhile costs as much again
//! to be woken, on a virtual processor. So it is looked for first, a little longer than it takes.

use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::COMMAND_DEADLINE;
use crate::error::WorkerError;
use crate::vcpu::request::Answer;

/// How long a thread looks before it sleeps. Others of its runtime wait for so long.
const LOOK: Duration = Duration::from_micros(100);

static WORTH: Worth = Worth::new();

/// Whether looking is worth it, by how it went before: where every core has more to do than it can, an answer does not come
/// for looking, and whoever looks takes the time from the one that would answer.
struct Worth {
    /// Looks that may still be in vain one after the other.
    credit: AtomicU32,
    /// Looks that were left out since the last one.
    left_out: AtomicU32,
}

impl Worth {
    const CREDIT: u32 = 4;
    /// One look in so many is tried all the same: times change.
    const TRIAL: u32 = 32;

    const fn new() -> Self {
        Self { credit: AtomicU32::new(Self::CREDIT), left_out: AtomicU32::new(0) }
    }

    fn try_it(&self) -> bool {
        self.credit.load(Ordering::Relaxed) > 0
            || self.left_out.fetch_add(1, Ordering::Relaxed) % Self::TRIAL == Self::TRIAL - 1
    }

    // Two at once may count as one: it is a guess either way.
    fn learn(&self, answered: bool) {
        let credit =
            if answered { Self::CREDIT } else { self.credit.load(Ordering::Relaxed).saturating_sub(1) };
        self.credit.store(credit, Ordering::Relaxed);
    }
}

/// Waits a moment, awake, for answers of vCPUs on other cores than this thread's: one on the same core answers once this
/// thread sleeps.
pub(super) fn look<T>(answers: &[Result<Answer<T>, WorkerError>], core: impl Fn(usize) -> u32) {
    if !WORTH.try_it() {
        return;
    }
    let begin = Instant::now();
    for (vcpu, answer) in answers.iter().enumerate() {
        let Ok(answer) = answer else { continue };
        let core = core(vcpu) as usize;
        while answer.is_empty() {
            if rustix::thread::sched_getcpu() == core {
                return;
            }
            if begin.elapsed() > LOOK {
                return WORTH.learn(false);
            }
            std::hint::spin_loop();
        }
    }
    WORTH.learn(true);
}

/// Waits for every answer, also when one fails, and returns the first failure.
pub(super) async fn gather<T>(
    what: &'static str,
    answers: Vec<Result<Answer<T>, WorkerError>>,
) -> Result<Vec<T>, WorkerError> {
    let until = tokio::time::Instant::from_std(Instant::now() + COMMAND_DEADLINE);
    let mut out = Vec::with_capacity(answers.len());
    let mut failed = None;
    for answer in answers {
        let answer = match answer {
            Ok(answer) => match tokio::time::timeout_at(until, answer).await {
                Ok(Ok(answer)) => answer,
                Ok(Err(_)) => Err(WorkerError::Thread {
                    thread: "vCPU".to_owned(),
                    problem: format!("it ended while {what}"),
                }),
                Err(_) => Err(WorkerError::Deadline { what, within: COMMAND_DEADLINE }),
            },
            Err(error) => Err(error),
        };
        match answer {
            Ok(value) => out.push(value),
            Err(error) => failed = failed.or(Some(error)),
        }
    }
    failed.map_or(Ok(out), Err)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_in_vain_ends_and_is_tried_again() {
        let worth = Worth::new();
        for _ in 0..Worth::CREDIT {
            assert!(worth.try_it());
            worth.learn(false);
        }
        let tried: Vec<bool> = (0..2 * Worth::TRIAL).map(|_| worth.try_it()).collect();
        assert_eq!(tried.iter().filter(|tried| **tried).count(), 2, "{tried:?}");
        worth.learn(true);
        assert!((0..3 * Worth::TRIAL).all(|_| worth.try_it()));
    }
}
