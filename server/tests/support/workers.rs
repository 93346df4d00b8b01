//! Worker processes as a test sees them: which live, and whether their guests go on.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use vcpu_worker::process::Identity;

use super::*;

/// Ends every worker that a test leaves, also when it panics. Made before the host, so that it is dropped after it.
pub struct Workers {
    pub dir: PathBuf,
}

impl Workers {
    pub fn of(dir: &Path) -> Self {
        Self { dir: dir.join("state/run") }
    }

    pub fn alive(&self) -> Vec<Identity> {
        let entries = std::fs::read_dir(&self.dir).into_iter().flatten().flatten();
        entries.filter_map(|e| Identity::read(&e.path())).filter(lives).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        for left in self.alive() {
            let _ = kill_process(pid(left.pid), Signal::KILL);
        }
    }
}

pub fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("a pid")
}

/// Whether that very process lives.
pub fn lives(identity: &Identity) -> bool {
    Identity::of(identity.pid).is_ok_and(|now| now == *identity)
}

pub fn identity(vm: &VirtualMachine) -> Identity {
    assert_ne!(vm.worker_pid, 0, "{vm:?}");
    Identity::of(vm.worker_pid).expect("the worker lives")
}

pub async fn until_gone(identity: &Identity) {
    let begin = Instant::now();
    while lives(identity) {
        assert!(begin.elapsed() < DEADLINE, "{identity:?} does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Heartbeats, PMIs and the values of the counters that take no overflow.
pub fn figures(pmu: &Pmu) -> Vec<u64> {
    let report = pmu.probe.iter().flat_map(|p| &p.vcpus).flat_map(|v| [v.heartbeats, v.loops]);
    let counters = pmu.vcpus.iter().flat_map(|v| &v.counters).filter(|c| c.live && !c.pmi_enabled);
    report.chain(counters.map(|c| c.value)).collect()
}

/// Waits until everything has grown beyond `before`.
pub async fn until_beyond(host: &Host, id: &str, before: &Pmu) -> Pmu {
    let (begin, old) = (Instant::now(), figures(before));
    assert!(!old.is_empty());
    loop {
        let now = host.live_pmu(id).await;
        let new = figures(&now);
        assert_eq!(new.len(), old.len(), "{now:?}");
        assert!(new.iter().zip(&old).all(|(n, o)| n >= o), "something went back: {old:?}, then {new:?}");
        if new.iter().zip(&old).all(|(n, o)| n > o) {
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "it does not go on: {old:?}, then {new:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Names of the cgroups of a host's workers, over all hierarchies; each ends with its machine's uid.
pub fn cgroups_of(host: &Host) -> Vec<String> {
    let prefix = format!("vpmud-{}-", &host.ready["host_id"].as_str().expect("an id")[..8]);
    let mut found = Vec::new();
    cgroups(Path::new("/sys/fs/cgroup"), &prefix, 6, &mut found);
    found
}

fn cgroups(dir: &Path, prefix: &str, depth: u32, found: &mut Vec<String>) {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for entry in entries.filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir())) {
        if depth > 0 {
            cgroups(&entry.path(), prefix, depth - 1, found);
        }
        let name = entry.file_name().to_string_lossy().into_owned();
        found.extend(Some(name).filter(|name| name.starts_with(prefix)));
    }
}
