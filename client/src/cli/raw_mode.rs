//! The terminal in raw mode, for as long as a value lives: it is restored on every way out, unwinding included.

use rustix::termios::{self, OptionalActions, OutputModes, Termios};
use std::io;

/// Raw mode of standard input's terminal.
#[derive(Debug)]
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Switches to raw mode. Output processing stays on, so that a guest's bare newline still starts a line.
    pub(crate) fn enter() -> io::Result<Self> {
        let before = termios::tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.output_modes |= before.output_modes & (OutputModes::OPOST | OutputModes::ONLCR);
        // The guard exists before the change, so that a failure half way is undone too.
        let guard = Self { before };
        termios::tcsetattr(io::stdin(), OptionalActions::Flush, &raw)?;
        Ok(guard)
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // A terminal that has gone away has nothing to restore.
        let _ = termios::tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}
