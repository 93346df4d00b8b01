//! The sandbox of a worker process: what it has given up, and what a forbidden system call leads to.

mod support;

use std::time::Instant;

use support::*;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::*;

/// A field of /proc/PID/status.
fn field(status: &str, name: &str) -> String {
    let line =
        status.lines().find(|l| l.starts_with(&format!("{name}:"))).unwrap_or_else(|| panic!("{name}"));
    line.split_once(':').map(|(_, value)| value.trim().to_owned()).expect("a value")
}

fn number(status: &str, name: &str) -> u64 {
    field(status, name).parse().expect("a number")
}

fn capabilities(status: &str, set: &str) -> u64 {
    u64::from_str_radix(&field(status, set), 16).expect("hexadecimal")
}

/// Name and status of each thread.
fn threads(pid: u32) -> Vec<(String, String)> {
    std::fs::read_dir(format!("/proc/{pid}/task"))
        .expect("threads")
        .flatten()
        .filter_map(|task| std::fs::read_to_string(task.path().join("status")).ok())
        .map(|status| (field(&status, "Name"), status))
        .collect()
}

#[tokio::test]
async fn a_worker_has_given_up_what_it_does_not_need() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process"]).await;
    host.create("a", probe_spec(2, 16)).await;
    let vm = host.start_vm("a").await;
    host.until_counting("a").await;
    let own = std::fs::read_to_string("/proc/self/status").expect("own status");
    // SYS_NICE, IPC_LOCK, PERFMON.
    let kept = 1 << 23 | 1 << 14 | 1 << 38;
    let all = threads(vm.worker_pid);
    assert!(all.len() >= 5, "main, two of the runtime, two vCPUs: {}", all.len());
    let filters = number(&own, "Seccomp_filters");
    for (name, status) in &all {
        assert_eq!((number(status, "NoNewPrivs"), number(status, "Seccomp")), (1, 2), "{name}: {status}");
        for set in ["CapPrm", "CapEff"] {
            assert_eq!(capabilities(status, set), capabilities(&own, set) & kept, "{name}: {set}");
        }
        assert_eq!((capabilities(status, "CapInh"), capabilities(status, "CapAmb")), (0, 0), "{name}");
        if capabilities(&own, "CapEff") & (1 << 8) != 0 {
            assert_eq!(capabilities(status, "CapBnd"), 0, "{name}: SETPCAP empties the bounding set");
        }
        // clone3's and control's, and a vCPU's own; KVM's helper thread comes from a vCPU.
        let vcpu = name.starts_with("vm-a/") || name.starts_with("kvm-");
        assert_eq!(number(status, "Seccomp_filters") - filters, if vcpu { 3 } else { 2 }, "{name}");
    }
    assert_eq!(all.iter().filter(|(name, _)| name.starts_with("vm-a/")).count(), 2);

    let limits = std::fs::read_to_string(format!("/proc/{}/limits", vm.worker_pid)).expect("limits");
    let limit = |name: &str| -> Vec<String> {
        let line = limits.lines().find(|l| l.starts_with(name)).expect("a limit");
        line[name.len()..].split_whitespace().take(2).map(str::to_owned).collect()
    };
    assert_eq!(limit("Max core file size"), ["0", "0"]);
    assert!(limit("Max open files").iter().all(|n| n.parse::<u64>().expect("a number") <= 2048), "{limits}");

    // Nothing of the daemon's: no store, no listener of its own, no terminal.
    for entry in std::fs::read_dir(format!("/proc/{}/fd", vm.worker_pid)).expect("descriptors").flatten() {
        let target = std::fs::read_link(entry.path()).map(|t| t.display().to_string()).unwrap_or_default();
        let known = [
            "socket:",
            "anon_inode:",
            "/dev/null",
            "/dev/kvm",
            "/memfd:",
            "pipe:",
            "/dev/shm/vpmud-console-",
        ];
        // Of its own runtime directory, which is named after the machine.
        let own = ["/log", "/violation", "/console", vm.uid.as_str()].iter().any(|end| target.ends_with(end));
        assert!(
            own || known.iter().any(|k| target.starts_with(k)),
            "descriptor {:?} is {target}",
            entry.path()
        );
    }

    assert!(vm.sandbox.starts_with("seccomp=enforce cgroup="), "{:?}", vm.sandbox);
    let label = vm.sandbox.rsplit_once("cgroup=").expect("a label").1.to_owned();
    let placed = || {
        let lines = std::fs::read_to_string(format!("/proc/{}/cgroup", vm.worker_pid)).unwrap_or_default();
        lines.lines().filter(|l| l.ends_with(&vm.uid)).count()
    };
    let wanted = if label == "none" { 0 } else { label.split(',').count() };
    let begin = Instant::now();
    while placed() != wanted {
        assert!(begin.elapsed() < DEADLINE, "{label}: it is in {} cgroups of its own", placed());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let listed = dir.path().join("state/run").join(&vm.uid).join("cgroup");
    let groups = std::fs::read_to_string(listed).unwrap_or_default();
    assert_eq!(groups.lines().count(), wanted);
    host.stop_vm("a").await;
    for group in groups.lines() {
        assert!(!std::path::Path::new(group).exists(), "{group} is left");
    }
    assert_eq!(host.terminate().await, 0);
}

/// A forbidden call on each kind of thread ends that worker, says so, and no other.
#[tokio::test]
async fn a_forbidden_call_ends_only_that_worker_and_is_named() {
    for (kind, thread) in [("vcpu", "vm-a/0"), ("control", "tokio-rt-worker"), ("data", "vpmud-out")] {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut host = Host::start(dir.path(), &["--isolation", "process", "--worker-violates", kind]).await;
        for id in ["a", "b"] {
            host.create(id, probe_spec(1, 16)).await;
            host.start_vm(id).await;
        }
        let other = host.get("b").await.worker_pid;
        let before = host.until_counting("b").await;
        match kind {
            "vcpu" => {
                let request = PauseVirtualMachineRequest { name: name("a") };
                host.vms().await.pause_virtual_machine(request).await.expect_err("its worker ends");
            }
            "control" => {
                let attach =
                    AttachConsoleRequest { name: name("a"), write: true, ..AttachConsoleRequest::default() };
                let input = AttachConsoleRequest { data: b"x".to_vec(), ..AttachConsoleRequest::default() };
                let messages = tokio_stream::iter([attach, input]);
                let mut stream =
                    host.vms().await.attach_console(messages).await.expect("attached").into_inner();
                while let Ok(Some(_)) = stream.message().await {}
            }
            _ => {
                let there = tempfile::tempdir().expect("tempdir");
                let destination = Host::start(there.path(), &["--isolation", "process"]).await;
                let operation = host.migrate("a", destination.arrival()).await;
                host.finish(operation).await.expect_err("its worker ends");
            }
        }
        let failed = host.until("a", "FAILED", is(State::Failed)).await;
        assert_eq!(
            (failed.reason.as_str(), failed.worker_pid),
            ("SECCOMP_VIOLATION", 0),
            "{kind}: {failed:?}"
        );
        assert!(
            failed.message.contains("socket (41)") && failed.message.contains(thread),
            "{}",
            failed.message
        );
        assert_eq!(failed.desired_state(), DesiredState::Running);
        let still = host.get("b").await;
        assert_eq!((still.observed_state(), still.worker_pid), (State::Running, other), "{kind}");
        let now = host.live_pmu("b").await;
        let heartbeats =
            |pmu: &Pmu| pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.heartbeats).sum::<u64>();
        assert!(heartbeats(&now) >= heartbeats(&before), "{kind}");
        // Not the machine but its worker was at fault: it starts again.
        assert_eq!(host.start_vm("a").await.observed_state(), State::Running);
        host.stop_vm("a").await;
        host.stop_vm("b").await;
        assert_eq!(host.terminate().await, 0);
    }
}

/// The same call, where the operator asked for no filter: it is made, and the machine goes on.
#[tokio::test]
async fn the_filters_can_be_left_off() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--isolation", "process", "--worker-violates", "vcpu", "--seccomp", "off"];
    let mut host = Host::start(dir.path(), &options).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    assert!(vm.sandbox.starts_with("seccomp=off "), "{}", vm.sandbox);
    host.vms()
        .await
        .pause_virtual_machine(PauseVirtualMachineRequest { name: name("a") })
        .await
        .expect("paused");
    host.stop_vm("a").await;
    assert_eq!(host.terminate().await, 0);
}
