//! Where the kernel shares processors by session (sched(7), autogroup): the daemon's has more than a worker's.

mod support;

use support::workers::*;
use support::*;

/// Session of a process, and its nice value; none where the kernel does not share by session.
fn session(pid: u32) -> Option<(String, i32)> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/autogroup")).ok()?;
    let (session, nice) = text.trim().split_once(" nice ")?;
    Some((session.to_owned(), nice.parse().ok()?))
}

/// CAP_SYS_NICE (capabilities(7)).
fn may_raise(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("CapEff");
    u64::from_str_radix(effective.trim(), 16).expect("a mask") >> 23 & 1 == 1
}

#[tokio::test]
async fn a_daemon_of_processes_has_more_than_a_worker() {
    let own = std::process::id();
    let Some(before) = session(own).filter(|(name, _)| name != "/autogroup-0") else {
        println!("skipped: this kernel does not share by session (CONFIG_SCHED_AUTOGROUP), or not here");
        return;
    };
    let dir = tempfile::tempdir().expect("tempdir");
    let _workers = Workers::of(dir.path());
    let host = Host::start(dir.path(), &["--isolation", "process"]).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    let worker = session(vm.worker_pid).expect("its session");
    let pid = host.child.id().expect("running");
    let daemon = session(pid).expect("its session");
    assert_eq!(daemon.0, before.0, "it was started here");
    assert_ne!(worker.0, daemon.0, "one session");
    assert_eq!(worker.1, 0, "{worker:?}");
    match before.1 {
        // Raised now, or by a daemon before it.
        0 | -10 if may_raise(pid) => assert_eq!(daemon.1, -10),
        chosen => assert_eq!(daemon.1, chosen, "chosen by somebody, or not to be raised"),
    }
}
