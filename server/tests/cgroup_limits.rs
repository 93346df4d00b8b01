//! What a worker's cgroup limits, in whichever hierarchy (v1 or v2) it gets the controller; and a host on which no cgroup
//! can be made.

mod support;

use std::path::PathBuf;
use std::time::Instant;

use support::load::Reaper;
use support::*;

const OPTIONS: [&str; 5] = ["--hypervisor", "simulated", "--isolation", "process", "--stop-vms"];

/// The cgroups of a machine's worker, once it is in all of them.
async fn cgroups(host: &Host, uid: &str, pid: u32) -> Vec<PathBuf> {
    let list = host.dir.join("state/run").join(uid).join("cgroup");
    let begin = Instant::now();
    loop {
        let dirs = std::fs::read_to_string(&list).unwrap_or_default();
        let dirs: Vec<PathBuf> = dirs.lines().map(PathBuf::from).collect();
        let inside = |dir: &PathBuf| {
            let processes = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            processes.lines().any(|line| line == pid.to_string())
        };
        if !dirs.is_empty() && dirs.iter().all(inside) {
            return dirs;
        }
        assert!(begin.elapsed() < DEADLINE, "worker {pid} is not in {dirs:?}");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn a_workers_threads_are_bounded_by_its_cgroup() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    let label = vm.sandbox.rsplit_once("cgroup=").expect("a label").1;
    if !label.split([',', '+']).any(|controller| controller == "pids") {
        let required = std::env::var_os("VPMU_REQUIRE_CGROUP").is_some_and(|v| v == "1");
        assert!(!required, "the controller pids is required and not there: {label}");
        println!("skipped: workers have no controller pids here: {label}");
        return;
    }
    let dirs = cgroups(&host, &vm.uid, vm.worker_pid).await;
    let limits = dirs.iter().filter_map(|dir| std::fs::read_to_string(dir.join("pids.max")).ok());
    let limits: Vec<String> = limits.map(|text| text.trim().to_owned()).collect();
    assert!(limits.iter().any(|limit| limit == "1024"), "{dirs:?}: {limits:?}");
    // All of its threads count.
    let all = std::fs::read_dir(format!("/proc/{}/task", vm.worker_pid)).expect("threads").count();
    let counted = dirs.iter().filter_map(|dir| std::fs::read_to_string(dir.join("pids.current")).ok());
    let counted: Vec<usize> = counted.map(|text| text.trim().parse().expect("a number")).collect();
    assert!(all >= 4 && counted.iter().any(|n| *n >= 4), "{all} threads, {counted:?} counted");
    assert_eq!(host.terminate().await, 0);
}

/// Machines run without; the reason is said once, with every place that was tried, however many machines there are.
#[tokio::test]
async fn where_no_cgroup_can_be_made_it_is_said_once() {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    let cgroups = mounts.lines().filter(|l| l.contains(" - cgroup ") || l.contains(" - cgroup2 "));
    let cgroups: Vec<&str> = cgroups.filter_map(|l| l.split(' ').nth(4)).collect();
    if cgroups.is_empty() {
        println!("skipped: no cgroup is mounted here");
        return;
    }
    let read_only: Vec<String> =
        cgroups.iter().map(|dir| format!("mount -o remount,bind,ro {dir}")).collect();
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let host = Host::start_with_mounts(dir.path(), &read_only.join(" && "), &OPTIONS).await;
    let Some(mut host) = host else { return };
    for id in ["a", "b"] {
        host.create(id, probe_spec(1, 16)).await;
        let vm = host.start_vm(id).await;
        assert!(vm.sandbox.ends_with("cgroup=none"), "{}", vm.sandbox);
        host.until_counting(id).await;
        assert!(!dir.path().join("state/run").join(&vm.uid).join("cgroup").exists(), "nothing to remove");
        host.stop_vm(id).await;
    }
    assert_eq!(host.terminate().await, 0);
    let log = std::fs::read_to_string(dir.path().join("log")).expect("log");
    let said: Vec<&str> = log.lines().filter(|l| l.to_lowercase().contains("cgroup")).collect();
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(said[0].contains("workers get no cgroup of their own"), "{}", said[0]);
    assert!(said[0].contains("Read-only file system") && said[0].contains("Delegate=yes"), "{}", said[0]);
}
