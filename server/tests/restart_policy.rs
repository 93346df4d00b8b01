//! Restart policies: what dies is started again as asked, later each time, also over a daemon's death, and never while a
//! migration is open.

mod support;

use rustix::process::{Pid, Signal, kill_process};
use support::*;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::virtual_machine_spec::RestartPolicy;
use vpmu_proto::api::*;

fn spec(policy: RestartPolicy) -> VirtualMachineSpec {
    VirtualMachineSpec { restart_policy: policy.into(), ..probe_spec(1, 16) }
}

fn kill_worker(vm: &VirtualMachine) {
    let pid = Pid::from_raw(vm.worker_pid.cast_signed()).expect("a worker");
    kill_process(pid, Signal::KILL).expect("SIGKILL");
}

fn ms(at: &prost_types::Timestamp) -> i64 {
    at.seconds * 1000 + i64::from(at.nanos) / 1_000_000
}

#[tokio::test]
async fn a_machine_whose_worker_dies_is_started_again() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process"]).await;
    host.create("keep", spec(RestartPolicy::OnFailure)).await;
    host.create("leave", spec(RestartPolicy::Never)).await;
    let (first, other) = (host.start_vm("keep").await, host.start_vm("leave").await);
    assert_eq!((first.restart_count, first.next_restart_time), (0, None));
    kill_worker(&first);
    kill_worker(&other);
    let failed = host.until("keep", "waiting or back", |vm| vm.worker_pid != first.worker_pid).await;
    if failed.observed_state() == State::Failed {
        assert_eq!(failed.reason, "WORKER_DIED");
        let next = ms(failed.next_restart_time.as_ref().expect("a next start"));
        let wait = next - ms(failed.update_time.as_ref().expect("a time"));
        assert!((300..=600).contains(&wait), "the first wait is {wait} ms");
    }
    let again = host.until("keep", "RUNNING", is(State::Running)).await;
    assert_eq!((again.restart_count, again.incarnation, again.reason.as_str()), (1, 2, ""));
    assert_eq!(again.next_restart_time, None);
    host.until_counting("keep").await;

    // Killed again, and the daemon before the wait is over: the next daemon goes on waiting, then starts it.
    kill_worker(&again);
    host.until("keep", "FAILED", |vm| vm.next_restart_time.is_some()).await;
    host.kill().await;
    host.restart().await;
    let third = host.until("keep", "RUNNING", |vm| is(State::Running)(vm) && vm.incarnation == 3).await;
    assert_eq!(third.restart_count, 2);

    // A user's stop ends it: nothing waits any more.
    kill_worker(&third);
    host.until("keep", "FAILED", |vm| vm.next_restart_time.is_some()).await;
    let stopped = host.stop_vm("keep").await;
    assert_eq!((stopped.restart_count, stopped.next_restart_time), (0, None));
    let left = host.get("leave").await;
    assert_eq!((left.observed_state(), left.reason.as_str()), (State::Failed, "WORKER_DIED"));
    assert_eq!((left.incarnation, left.next_restart_time), (1, None), "never is never");
    assert_eq!(host.get("keep").await.observed_state(), State::Stopped);
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn always_brings_a_thread_isolated_machine_back_with_its_daemon() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &[]).await;
    for (id, policy) in [("always", RestartPolicy::Always), ("failure", RestartPolicy::OnFailure)] {
        host.create(id, spec(policy)).await;
        host.start_vm(id).await;
    }
    host.create("stopped", spec(RestartPolicy::Always)).await;
    host.kill().await;
    host.restart().await;
    let back = host.until("always", "RUNNING", is(State::Running)).await;
    assert_eq!((back.incarnation, back.restart_count), (2, 1));
    let ended = host.get("failure").await;
    assert_eq!((ended.observed_state(), ended.reason.as_str()), (State::Stopped, "HOST_RESTARTED"));
    assert_eq!(host.get("stopped").await.incarnation, 0, "nobody wanted it to run");
    assert_eq!(host.terminate().await, 0);
}

/// The source's worker dies in the middle of a copy: the migration fails, the machine is owned here, and only then the
/// policy acts.
#[tokio::test]
async fn no_policy_acts_while_a_migration_is_open() {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--isolation", "process"];
    let mut a = Host::start(&dir.path().join("a"), &options).await;
    let mut b = Host::start(&dir.path().join("b"), &options).await;
    let probe = ProbeBoot { fill_bytes: 32 << 20, ..ProbeBoot::default() };
    let boot = Some(virtual_machine_spec::Boot::Probe(probe));
    let spec =
        VirtualMachineSpec { restart_policy: RestartPolicy::OnFailure.into(), boot, ..probe_spec(1, 64) };
    a.create("vm", spec).await;
    let vm = a.start_vm("vm").await;
    a.until_counting("vm").await;
    // Slow enough that it is open when the worker dies.
    let spec = MigrationSpec { max_bandwidth: 1 << 20, ..b.arrival() };
    let operation = a.migrate("vm", spec).await;
    a.until("vm", "MIGRATING_OUT", is(State::MigratingOut)).await;
    kill_worker(&vm);
    let error = a.finish(operation).await.expect_err("its worker died");
    assert_eq!(reason_of(&error), "WORKER_DIED", "{error:?}");
    let again = a.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!((again.restart_count, again.migration.as_str()), (1, ""));
    assert!(again.epoch > vm.epoch, "the abort was decided before anything was started: {again:?}");
    assert_eq!(again.desired_state(), DesiredState::Running);
    let begin = std::time::Instant::now();
    while !b.list().await.is_empty() {
        assert!(begin.elapsed() < DEADLINE, "what began to arrive there stays");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    a.stop_vm("vm").await;
    assert_eq!((a.terminate().await, b.terminate().await), (0, 0));
}
