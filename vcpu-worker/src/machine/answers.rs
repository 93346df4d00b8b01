//! How what was asked of all vCPUs is waited for.
//!
//! A vCPU on another core answers within tens of microseconds; a thread that goes to sleep meanwhile costs as much again
//! to be woken, on a virtual processor. So it is looked for first, a little longer than it takes, unless that was in vain
//! lately or others wait as well: where every core has more to do than it can, whoever looks takes the time from the one
//! that would answer.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::COMMAND_DEADLINE;
use crate::error::WorkerError;
use crate::host::monotonic_ns;
use crate::vcpu::request::Answer;

/// How long a thread looks before it sleeps. Others of its runtime wait for so long.
const LOOK: Duration = Duration::from_micros(100);

/// Questions to the vCPUs of this process's machines that have not all been answered.
static ASKED: AtomicU32 = AtomicU32::new(0);
/// Of all machines of this process: they share its cores.
static WORTH: Worth = Worth::new();

/// Whether looking is worth it, by how it went before.
struct Worth {
    /// Looks that may still be in vain one after the other.
    credit: AtomicU32,
    /// When one was in vain last, by [`monotonic_ns`].
    in_vain_ns: AtomicU64,
}

impl Worth {
    const CREDIT: u32 = 4;
    /// So long after a look in vain the next is tried all the same: times change.
    const TRIAL_NS: u64 = 50_000_000;

    const fn new() -> Self {
        Self { credit: AtomicU32::new(Self::CREDIT), in_vain_ns: AtomicU64::new(0) }
    }

    fn may_be(&self, now_ns: u64) -> bool {
        self.credit.load(Ordering::Relaxed) > 0
            || now_ns.saturating_sub(self.in_vain_ns.load(Ordering::Relaxed)) >= Self::TRIAL_NS
    }

    fn answered(&self) {
        self.credit.store(Self::CREDIT, Ordering::Relaxed);
    }

    fn in_vain(&self, now_ns: u64) {
        // Two at once may count as one: it is a guess either way.
        self.credit.store(self.credit.load(Ordering::Relaxed).saturating_sub(1), Ordering::Relaxed);
        self.in_vain_ns.store(now_ns, Ordering::Relaxed);
    }
}

/// One such question, until this is dropped.
pub(super) struct Asked(());

impl Asked {
    pub(super) fn now() -> Self {
        ASKED.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        ASKED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Waits a moment, awake, for answers of vCPUs on other cores than this thread's: one on the same core answers once this
/// thread sleeps.
pub(super) fn look<T>(answers: &[Result<Answer<T>, WorkerError>], core: impl Fn(usize) -> u32) {
    if ASKED.load(Ordering::Relaxed) > 1 || !WORTH.may_be(monotonic_ns()) {
        return;
    }
    let begin = Instant::now();
    // What was there before anybody looked says nothing about looking.
    let mut looked = false;
    for (vcpu, answer) in answers.iter().enumerate() {
        let Ok(answer) = answer else { continue };
        let core = core(vcpu) as usize;
        while answer.is_empty() {
            if rustix::thread::sched_getcpu() == core {
                return;
            }
            if begin.elapsed() > LOOK {
                return WORTH.in_vain(monotonic_ns());
            }
            looked = true;
            std::hint::spin_loop();
        }
    }
    if looked {
        WORTH.answered();
    }
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
        let mut now = 7_000_000_000;
        for _ in 0..Worth::CREDIT {
            assert!(worth.may_be(now));
            worth.in_vain(now);
        }
        assert!(!worth.may_be(now));
        assert!(!worth.may_be(now + Worth::TRIAL_NS - 1));
        now += Worth::TRIAL_NS;
        assert!(worth.may_be(now), "times change");
        worth.in_vain(now);
        assert!(!worth.may_be(now + 1), "one trial at a time");
        worth.answered();
        assert!(worth.may_be(now + 1));
    }
}
