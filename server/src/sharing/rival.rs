//! `vpmud host rival`: one of the two processes of a trial. It begins a session, says "ready", waits for a line, wants a
//! core for a while, and says how many nanoseconds of it it got.

use std::io::Write as _;
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vcpu_worker::host::{pin_current_thread, thread_cpu_ns};

/// Threads that take turns: as many guests that count on one core.
const THREADS: usize = 4;
/// How long a turn is: half of a guest's, so that a short trial shows it.
const TURN: Duration = Duration::from_millis(1);
/// Longest trial.
const LONGEST_MS: u64 = 60_000;

/// What it does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Role {
    /// One thread that computes.
    Compute,
    /// Threads that take turns computing.
    Turns,
}

impl Role {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Turns => "turns",
        }
    }
}

/// Options of `vpmud host rival`.
#[derive(Debug, clap::Args)]
pub struct RivalArgs {
    /// What it does on the core.
    #[arg(long, value_enum)]
    role: Role,
    /// The core that both want.
    #[arg(long)]
    core: u32,
    /// A core where each has something to do besides, so that it has work on two.
    #[arg(long)]
    other_core: u32,
    /// How long.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..=LONGEST_MS))]
    milliseconds: u64,
}

/// Runs it. Exit codes: 0, or 1 with what failed on standard error.
pub fn main(args: &RivalArgs) -> ExitCode {
    match compete(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vpmud host rival: {error}");
            ExitCode::FAILURE
        }
    }
}

fn compete(args: &RivalArgs) -> std::io::Result<()> {
    // The group of processors' users that the other one is not in.
    rustix::process::setsid()?;
    let mut out = std::io::stdout();
    writeln!(out, "ready")?;
    out.flush()?;
    let mut line = String::new();
    if std::io::stdin().read_line(&mut line)? == 0 {
        return Ok(());
    }
    let end = Instant::now() + Duration::from_millis(args.milliseconds);
    let beside = on(args.other_core, move || compute_until(end));
    let got = match args.role {
        Role::Compute => joined(on(args.core, move || compute_until(end)))?,
        Role::Turns => take_turns(args.core, end)?,
    };
    joined(beside)?;
    writeln!(out, "{got}")?;
    out.flush()
}

type Got = std::io::Result<u64>;

/// A thread on a core that answers with the processor time that it had.
fn on(core: u32, work: impl FnOnce() + Send + 'static) -> JoinHandle<Got> {
    std::thread::spawn(move || {
        pin_current_thread(core)?;
        let before = thread_cpu_ns();
        work();
        Ok(thread_cpu_ns().saturating_sub(before))
    })
}

fn joined(thread: JoinHandle<Got>) -> Got {
    thread.join().unwrap_or_else(|_| Err(std::io::Error::other("a thread panicked")))
}

fn compute_until(end: Instant) {
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// Whose turn it is, with one condition for each thread.
struct Turns {
    whose: Mutex<usize>,
    conditions: [Condvar; THREADS],
}

fn take_turns(core: u32, end: Instant) -> Got {
    let turns = Arc::new(Turns { whose: Mutex::new(0), conditions: [const { Condvar::new() }; THREADS] });
    let threads: Vec<_> = (0..THREADS)
        .map(|number| {
            let turns = Arc::clone(&turns);
            on(core, move || turns.take(number, end))
        })
        .collect();
    threads.into_iter().map(joined).sum()
}

impl Turns {
    /// Until the end comes to its turn; then everybody's does.
    fn take(&self, number: usize, end: Instant) {
        loop {
            let mut whose = self.whose.lock().unwrap_or_else(PoisonError::into_inner);
            while *whose != number {
                whose = self.conditions[number].wait(whose).unwrap_or_else(PoisonError::into_inner);
            }
            drop(whose);
            let now = Instant::now();
            compute_until((now + TURN).min(end));
            let next = (number + 1) % THREADS;
            *self.whose.lock().unwrap_or_else(PoisonError::into_inner) = next;
            self.conditions[next].notify_one();
            if now >= end {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn turns_end_for_everybody_and_their_time_is_what_was_had() {
        let core = vcpu_worker::host::probe().allowed_cores[0];
        let begin = Instant::now();
        let got = take_turns(core, begin + Duration::from_millis(20)).expect("pinned");
        let took = u64::try_from(begin.elapsed().as_nanos()).expect("short");
        assert!(got > 0 && got <= took, "one at a time: {got} of {took} ns");
    }

    #[test]
    fn a_core_that_is_not_there_is_an_error() {
        let end = Instant::now();
        assert!(take_turns(1 << 20, end).is_err());
    }
}
