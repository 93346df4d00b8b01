//! `--hold-at`: the process says that it has reached a step of a handover and stops itself, so that a test can kill it
//! exactly there. Without the option it does nothing.

use std::io::Write as _;

use crate::handover::step::{HandoverStep, HoldPoint};

/// How long the kernel is given to stop every thread.
const SETTLE: std::time::Duration = std::time::Duration::from_millis(200);

/// Holds if this is the point. `SIGCONT` lets it go on.
pub(super) fn at(hold: Option<HoldPoint>, after: bool, step: Option<HandoverStep>) {
    let (Some(hold), Some(step)) = (hold, step) else { return };
    if hold != (HoldPoint { after, step }) {
        return;
    }
    let line = serde_json::json!({ "hold": hold.to_string(), "pid": std::process::id() });
    // Nobody may be reading any more; it is held all the same.
    let mut out = std::io::stdout();
    let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    let stopped = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP);
    if let Err(error) = stopped {
        tracing::error!(%hold, %error, "cannot stop itself");
    }
    // Another thread may take the signal, and the stop reaches this one a little later: it must not go on before.
    std::thread::sleep(SETTLE);
}
