//! Workers that wait for a machine: one is taken at a start, found again by a later daemon as that machine's, and nothing
//! of one that waits outlives its daemon. On KVM where it is, else simulated.

mod support;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::*;
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;

const OPTIONS: [&str; 4] = ["--isolation", "process", "--spare-workers", "1"];

/// Ends what a test leaves, also when it panics. Made before the host, so that it is dropped after it.
struct Run(PathBuf);

impl Run {
    fn of(dir: &Path) -> Self {
        Self(dir.join("state/run"))
    }

    /// Runtime directories of living workers.
    fn alive(&self) -> Vec<(String, Identity)> {
        let entries = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
        let named = entries
            .filter_map(|e| Some((e.file_name().to_string_lossy().into_owned(), Identity::read(&e.path())?)));
        named.filter(|(_, identity)| lives(identity)).collect()
    }

    fn spares(&self) -> Vec<Identity> {
        self.alive().into_iter().filter(|(name, _)| name.starts_with("spare")).map(|(_, id)| id).collect()
    }

    /// What the daemon that runs now has said.
    fn log(&self) -> String {
        let dir = self.0.ancestors().nth(2).expect("below the host's directory");
        std::fs::read_to_string(dir.join("log")).expect("log")
    }

    fn is_empty(&self) {
        let left: Vec<_> = std::fs::read_dir(&self.0).expect("there").flatten().map(|e| e.path()).collect();
        let inside = left.iter().flat_map(std::fs::read_dir).flatten().flatten().map(|e| e.path());
        assert!(left.is_empty(), "left: {left:?} with {:?}", inside.collect::<Vec<_>>());
    }

    /// The spare that is ready, once there is exactly one that is not `old`. It is ready when the daemon says so: its
    /// own files are there before.
    async fn until_spare(&self, old: Option<&Identity>) -> Identity {
        let begin = Instant::now();
        loop {
            let spares = self.spares();
            if let [spare] = spares.as_slice()
                && Some(spare) != old
                && self.log().contains(&format!("spare worker {} waits", spare.pid))
            {
                return spare.clone();
            }
            assert!(begin.elapsed() < DEADLINE, "{spares:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        for (_, left) in self.alive() {
            let _ = kill_process(pid(left.pid), Signal::KILL);
        }
    }
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("a pid")
}

fn lives(identity: &Identity) -> bool {
    Identity::of(identity.pid).is_ok_and(|now| now == *identity)
}

/// What a process's descriptors are, those whose name begins so.
fn open(pid: u32, kind: &str) -> Vec<PathBuf> {
    let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("its descriptors").flatten();
    let named = fds.filter_map(|fd| std::fs::read_link(fd.path()).ok());
    named.filter(|name| name.to_string_lossy().starts_with(kind)).collect()
}

/// VMs that a process holds.
fn vms(identity: &Identity) -> usize {
    open(identity.pid, "anon_inode:kvm-vm")
        .into_iter()
        .filter(|name| name.ends_with("anon_inode:kvm-vm"))
        .count()
}

async fn until_gone(identity: &Identity) {
    let begin = Instant::now();
    while lives(identity) {
        assert!(begin.elapsed() < DEADLINE, "{identity:?} does not end");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_spare_becomes_a_machines_worker_for_good() {
    let dir = tempfile::tempdir().expect("tempdir");
    let run = Run::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    let spare = run.until_spare(None).await;
    let kvm = vcpu_worker::host::probe().kvm.is_ok();
    assert_eq!(vms(&spare), usize::from(kvm), "a VM without memory, made ahead");
    let connected = open(spare.pid, "socket:");
    host.create("a", probe_spec(1, 32)).await;
    let vm = host.start_vm("a").await;
    assert_eq!(vm.worker_pid, spare.pid, "the one that waited");
    assert_eq!(vms(&spare), usize::from(vm.hypervisor == "kvm"), "that one is used");
    assert_eq!(open(spare.pid, "socket:"), connected, "the connection that was made ahead serves it");
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", spare.pid)).expect("its name");
    assert_eq!(comm.trim(), "vm-a");
    let next = run.until_spare(Some(&spare)).await;
    host.until_counting("a").await;

    // The spare goes with its daemon, the machine's worker stays and is found.
    host.kill().await;
    until_gone(&next).await;
    assert!(lives(&spare), "it outlives the daemon");
    host.restart().await;
    let after = host.get("a").await;
    assert_eq!((after.observed_state(), after.worker_pid), (State::Running, spare.pid), "{after:?}");
    run.until_spare(Some(&next)).await;

    host.delete("a").await;
    until_gone(&spare).await;
    assert_eq!(host.terminate().await, 0);
    run.is_empty();
}

#[tokio::test]
async fn a_spare_that_has_died_is_no_loss() {
    let dir = tempfile::tempdir().expect("tempdir");
    let run = Run::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    let spare = run.until_spare(None).await;
    kill_process(pid(spare.pid), Signal::KILL).expect("killed");
    until_gone(&spare).await;
    // Its first thread may be gone before its last, and only then does anybody hear of its end.
    let (begin, threads) = (Instant::now(), format!("/proc/{}/task", spare.pid));
    while std::fs::read_dir(&threads).is_ok_and(|threads| threads.count() > 1) {
        assert!(begin.elapsed() < DEADLINE, "its threads do not end");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    host.create("a", probe_spec(1, 32)).await;
    let vm = host.start_vm("a").await;
    assert_eq!(vm.observed_state(), State::Running);
    assert_ne!(vm.worker_pid, spare.pid);
    run.until_spare(Some(&spare)).await;
    host.delete("a").await;
    assert_eq!(host.terminate().await, 0);
    run.is_empty();
}

/// Nothing is known of it but that it lives: the start that took it fails, it is ended (which takes ten seconds: it is asked
/// to first), and the next start has another.
#[tokio::test]
async fn a_spare_that_does_not_answer_costs_one_start() {
    let dir = tempfile::tempdir().expect("tempdir");
    let run = Run::of(dir.path());
    let options = [&OPTIONS[..], &["--handover-timeout", "2000"]].concat();
    let mut host = Host::start(dir.path(), &options).await;
    let spare = run.until_spare(None).await;
    kill_process(pid(spare.pid), Signal::STOP).expect("stopped");
    host.create("a", probe_spec(1, 32)).await;
    assert_eq!(host.try_start_vm("a").await.expect_err("refused"), "WORKER_TIMEOUT");
    until_gone(&spare).await;
    assert_eq!(host.get("a").await.observed_state(), State::Failed);
    let next = run.until_spare(Some(&spare)).await;
    let vm = host.start_vm("a").await;
    assert_eq!((vm.observed_state(), vm.worker_pid), (State::Running, next.pid));
    host.delete("a").await;
    assert_eq!(host.terminate().await, 0);
    run.is_empty();
}

/// The first event of a host makes whoever opens it wait for RCU: no machine's start is that.
#[tokio::test]
async fn a_daemon_holds_a_perf_event_where_it_may() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &[]).await;
    let timer = vcpu_worker::host::TickTimer::new(Duration::from_millis(1)).expect("a timer");
    if timer.source() != "perf cpu-clock" {
        println!("skipped: perf events are refused here (perf_event_paranoid, seccomp)");
        return;
    }
    let begin = Instant::now();
    while open(host.child.id().expect("running"), "anon_inode:[perf_event]").len() != 1 {
        assert!(begin.elapsed() < DEADLINE, "it holds none");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}
