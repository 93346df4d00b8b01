//! How what was asked of all vCPUs is waited for.
//!
//! A vCPU on another core answers within tens of microseconds; a thread that goes to sleep meanwhile costs as much again
//! to be woken, on a virtual processor. So it is looked for first, a little longer than it takes.

use std::time::{Duration, Instant};

use super::COMMAND_DEADLINE;
use crate::error::WorkerError;
use crate::vcpu::request::Answer;

/// How long a thread looks before it sleeps. Others of its runtime wait for so long.
const LOOK: Duration = Duration::from_micros(100);

/// Waits a moment, awake, for answers of vCPUs on other cores than this thread's: one on the same core answers once this
/// thread sleeps.
pub(super) fn look<T>(answers: &[Result<Answer<T>, WorkerError>], core: impl Fn(usize) -> u32) {
    let begin = Instant::now();
    for (vcpu, answer) in answers.iter().enumerate() {
        let Ok(answer) = answer else { continue };
        let core = core(vcpu) as usize;
        while answer.is_empty() {
            if begin.elapsed() > LOOK || rustix::thread::sched_getcpu() == core {
                return;
            }
            std::hint::spin_loop();
        }
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
