//! Worker processes, by their identity: a pid alone may be somebody else's by now.

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Pid;
use vcpu_worker::process::Identity;

use super::DEADLINE;

pub(super) fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("a pid")
}

fn lives(identity: &Identity) -> bool {
    Identity::of(identity.pid).is_ok_and(|now| now == *identity)
}

/// Worker processes of a host.
pub(super) fn alive(host: &Path) -> Vec<Identity> {
    let entries = std::fs::read_dir(host.join("state/run")).into_iter().flatten().flatten();
    entries.filter_map(|e| Identity::read(&e.path())).filter(lives).collect()
}

pub(super) async fn until_gone(identity: &Identity) {
    let begin = Instant::now();
    while lives(identity) {
        assert!(begin.elapsed() < DEADLINE, "{identity:?} does not end");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
