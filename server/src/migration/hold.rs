//! `--hold-at`: the process says that it has reached a step of a handover and stops itself, so that a test can kill it
//! exactly there. Without the option it says so in the log alone, for those who time a hand-over (RUST_LOG=debug).

use std::io::Write as _;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::handover::step::{HandoverStep, HoldPoint};

/// How long the kernel is given to stop every thread.
const SETTLE: std::time::Duration = std::time::Duration::from_millis(200);

/// A point and whether the process has stopped there.
#[derive(Debug)]
pub struct Hold {
    point: HoldPoint,
    done: AtomicBool,
}

impl From<HoldPoint> for Hold {
    fn from(point: HoldPoint) -> Self {
        Self { point, done: AtomicBool::new(false) }
    }
}

/// Holds if this is one of the points, the first time that it is reached. `SIGCONT` lets it go on.
pub(super) fn at(holds: &[Hold], after: bool, step: Option<HandoverStep>) {
    let Some(point) = step.map(|step| HoldPoint { after, step }) else { return };
    tracing::debug!(step = %point, "handover");
    let Some(hold) = holds.iter().find(|h| h.point == point) else { return };
    if hold.done.swap(true, Ordering::SeqCst) {
        return;
    }
    let hold = point;
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
