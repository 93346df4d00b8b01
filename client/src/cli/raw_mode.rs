//! The terminal in raw mode, for as long as a value lives: it is restored on every way out, unwinding included, and while
//! the process is suspended.

use rustix::process::{Signal, getpid, kill_process};
use rustix::termios::{self, OptionalActions, OutputModes, Termios};
use std::io;

/// Raw mode of standard input's terminal.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
    raw: Termios,
}

impl RawMode {
    /// Switches to raw mode. Output processing stays on, so that a guest's bare newline still starts a line.
    pub(crate) fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        // The guard exists before the change, so that a failure half way is undone too.
        let guard = Self { before, raw };
        termios::tcsetattr(io::stdin(), OptionalActions::Flush, &guard.raw)?;
        Ok(guard)
    }

    /// Stops this process, with the terminal as it was; [`Self::again`] once it goes on.
    pub(crate) fn suspend(&self) {
        self.restore();
        // Cannot fail: it is this process.
        let _ = kill_process(getpid(), Signal::STOP);
    }

    /// Raw mode again: whoever had the terminal meanwhile may have changed it.
    pub(crate) fn again(&self) {
        // A terminal that has gone away needs no mode; its end is seen by who reads it.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.raw);
    }

    fn restore(&self) {
        // A terminal that has gone away has nothing to restore.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        self.restore();
    }
}
