//! Where the kernel shares processors by session (sched(7), autogroup): the daemon's has more than a worker's.

mod support;

use support::workers::*;
use support::*;
use vpmu_proto::api::virtual_machine::State;

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
async fn a_daemon_in_a_session_of_its_own_has_more_than_a_worker() {
    let own = std::process::id();
    let Some(before) = session(own) else {
        println!("skipped: this kernel does not share by session (CONFIG_SCHED_AUTOGROUP)");
        return;
    };
    for under in [&[][..], &["setsid".to_owned()]] {
        let dir = tempfile::tempdir().expect("tempdir");
        let _workers = Workers::of(dir.path());
        let host = Host::start_under(dir.path(), under, &["--isolation", "process"]).await;
        host.create("a", probe_spec(1, 16)).await;
        let vm = host.start_vm("a").await;
        let worker = session(vm.worker_pid).expect("its session");
        let pid = host.child.id().expect("running");
        let daemon = session(pid).expect("its session");
        assert_ne!(worker.0, daemon.0, "one session");
        assert_eq!(worker.1, 0, "{worker:?}");
        if under.is_empty() {
            assert_eq!(daemon, before, "the session of who started it is left alone");
        } else {
            assert_ne!(daemon.0, before.0, "a session of its own");
            assert_eq!(daemon.1, if may_raise(pid) { -10 } else { 0 });
        }
    }
}

/// As in a container: the session was begun outside of it, and its number is none that the daemon can see.
#[tokio::test]
async fn a_daemon_whose_session_was_begun_outside_of_its_container_serves() {
    let under = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"].map(str::to_owned);
    let may = std::process::Command::new(&under[0]).args(&under[1..]).arg("true").output();
    if !may.as_ref().is_ok_and(|may| may.status.success()) {
        println!("skipped: no namespace of processes here: {may:?}");
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start_under(dir.path(), &under, &["--isolation", "process"]).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    assert_eq!(vm.observed_state(), State::Running, "{vm:?}");
}
