//! The signals that a console session answers.

use rustix::process::Signal as Number;
use std::io;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// What they ask for.
pub(super) enum Told {
    /// End in good order.
    Leave,
    /// Stop for now: SIGTSTP, which in raw mode only other processes send.
    Suspend,
    /// Go on at the terminal, whoever stopped us.
    Continue,
}

/// The signals; those of job control only at a terminal, elsewhere the system answers them.
pub(super) struct Signals {
    leave: [Signal; 4],
    job: Option<[Signal; 2]>,
}

impl Signals {
    pub(super) fn new(terminal: bool) -> io::Result<Self> {
        let of = |number: Number| signal(SignalKind::from_raw(number.as_raw()));
        let leave = [of(Number::INT)?, of(Number::TERM)?, of(Number::HUP)?, of(Number::QUIT)?];
        let job = if terminal { Some([of(Number::TSTP)?, of(Number::CONT)?]) } else { None };
        Ok(Self { leave, job })
    }

    pub(super) async fn next(&mut self) -> Told {
        let [interrupt, terminate, hangup, quit] = &mut self.leave;
        tokio::select! {
            _ = interrupt.recv() => Told::Leave,
            _ = terminate.recv() => Told::Leave,
            _ = hangup.recv() => Told::Leave,
            _ = quit.recv() => Told::Leave,
            told = job_control(&mut self.job) => told,
        }
    }
}

async fn job_control(job: &mut Option<[Signal; 2]>) -> Told {
    let Some([suspend, resume]) = job else { return std::future::pending().await };
    tokio::select! {
        // Where both wait, going on comes last: the terminal is raw again afterwards.
        biased;
        _ = suspend.recv() => Told::Suspend,
        _ = resume.recv() => Told::Continue,
    }
}
