//! Restart policies: what dies is started again as asked, later each time, also over a daemon's death, and never while a
//! migration is open. Every end, the guest's own or its worker's death, is an event with its reason.

mod support;

use std::collections::BTreeMap;

use rustix::process::{Pid, Signal, kill_process};
use support::guest::*;
use support::*;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::virtual_machine_spec::RestartPolicy;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
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

/// Every change from now on.
struct Watch(tonic::Streaming<WatchVirtualMachinesResponse>);

impl Watch {
    async fn of(host: &Host) -> Self {
        let request = WatchVirtualMachinesRequest::default();
        let stream = host.vms().await.watch_virtual_machines(request).await.expect("watches").into_inner();
        let mut watch = Self(stream);
        while watch.next().await.0 != Kind::Synced {}
        watch
    }

    async fn next(&mut self) -> (Kind, VirtualMachine) {
        let event = tokio::time::timeout(DEADLINE, self.0.message()).await.expect("an event in time");
        let event = event.expect("reads").expect("goes on");
        (event.kind(), event.virtual_machine.unwrap_or_default())
    }

    /// The next end.
    async fn end(&mut self) -> VirtualMachine {
        loop {
            let (_, vm) = self.next().await;
            if matches!(vm.observed_state(), State::Stopped | State::Failed) {
                return vm;
            }
        }
    }
}

#[tokio::test]
async fn a_workers_death_is_an_event_with_its_reason() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    for id in ["a", "beside"] {
        host.create(id, spec(RestartPolicy::Never)).await;
    }
    let vm = host.start_vm("a").await;
    host.start_vm("beside").await;
    let mut watch = Watch::of(&host).await;
    kill_worker(&vm);
    // The first event there is: nothing is told of anything else, nor of the machine beside it.
    let (kind, told) = watch.next().await;
    assert_eq!(
        (kind, told.name.as_str(), told.observed_state()),
        (Kind::Updated, &*name("a"), State::Failed)
    );
    assert_eq!((told.reason.as_str(), told.worker_pid), ("WORKER_DIED", 0), "{told:?}");
    assert!(!told.message.is_empty() && told.etag != vm.etag, "{told:?}");
    assert_eq!(told, host.get("a").await, "who asks is told the same");
    assert_eq!(host.get("beside").await.observed_state(), State::Running);
    assert_eq!(host.terminate().await, 0);
}

/// Name, policy and code of a machine; its state and reason when its guest has ended, and whether it is started again.
type Case = (&'static str, RestartPolicy, &'static [u8], State, &'static str, bool);

/// Guests that end by themselves, again whenever they are started. Needs KVM.
#[tokio::test]
async fn a_guests_own_end_is_an_event_and_answered_as_its_policy_says() {
    const ROWS: u32 = 2;
    if !have_kvm() {
        return;
    }
    let (never, failure, always) = (RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always);
    let (stopped, failed) = (State::Stopped, State::Failed);
    let cases: [Case; 8] = [
        ("always-off", always, POWER_OFF, stopped, "GUEST_SHUTDOWN", true),
        ("failure-off", failure, POWER_OFF, stopped, "GUEST_SHUTDOWN", false),
        ("always-reset", always, RESET, stopped, "GUEST_RESET", true),
        ("failure-reset", failure, RESET, stopped, "GUEST_RESET", false),
        ("failure-triple", failure, TRIPLE_FAULT, failed, "GUEST_TRIPLE_FAULT", true),
        ("never-triple", never, TRIPLE_FAULT, failed, "GUEST_TRIPLE_FAULT", false),
        ("failure-nowhere", failure, NOWHERE, failed, "HYPERVISOR_INTERNAL_ERROR", true),
        ("never-nowhere", never, NOWHERE, failed, "HYPERVISOR_INTERNAL_ERROR", false),
    ];
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    for (id, policy, code, ..) in cases {
        let boot = flat(dir.path(), id, code);
        host.create(id, VirtualMachineSpec { restart_policy: policy.into(), ..boot }).await;
    }
    let mut watch = Watch::of(&host).await;
    for (id, ..) in cases {
        let request = StartVirtualMachineRequest { name: name(id), request_id: String::new() };
        let started = host.vms().await.start_virtual_machine(request).await.expect("accepted").into_inner();
        // Its guest may have ended before its start was answered.
        drop(host.finish(started).await);
    }

    // Those that are not started again end once; the others at least once more, each time in a longer row.
    let wanted = |id: &str| cases.iter().find(|case| name(case.0) == id).expect("one of them");
    let mut ends: BTreeMap<String, Vec<VirtualMachine>> = BTreeMap::new();
    while ends.len() < cases.len()
        || ends.iter().any(|(id, seen)| wanted(id).5 && seen.len() < ROWS as usize + 1)
    {
        let vm = watch.end().await;
        ends.entry(vm.name.clone()).or_default().push(vm);
    }
    for (id, seen) in &ends {
        let &(_, _, _, state, reason, again) = wanted(id);
        assert!(again || seen.len() == 1, "{seen:?}");
        for (row, vm) in (0_u32..).zip(seen) {
            assert_eq!((vm.observed_state(), vm.reason.as_str()), (state, reason), "{vm:?}");
            assert_eq!(vm.desired_state(), DesiredState::Running, "what the user wants stays");
            let counts = (vm.restart_count, vm.restart_row, u64::from(row) + 1 == vm.incarnation);
            assert_eq!(counts, (row, if again { row + 1 } else { 0 }, true), "{vm:?}");
            assert_eq!(vm.next_restart_time.is_some(), again, "{vm:?}");
        }
        // The wait was kept: the end that follows a start is of a later time than the one that the start was set for.
        for pair in seen.windows(2) {
            let (due, ended) = (pair[0].next_restart_time.as_ref(), pair[1].update_time.as_ref());
            assert!(due.map(ms) < ended.map(ms), "{pair:?}");
        }
    }
    for (id, _, _, state, _, again) in cases {
        let left = host.get(id).await;
        assert!(again || (left.observed_state(), left.incarnation) == (state, 1), "{left:?}");
    }
    assert_eq!(host.terminate().await, 0);
}
