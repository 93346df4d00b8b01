//! Hosts that are killed exactly in the commit window, by `--hold-at`: a machine ends up on one of them, or nowhere if
//! no copy survived, and never runs on both.

mod support;

use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const SIMULATED: [&str; 2] = ["--hypervisor", "simulated"];
const KVM: [&str; 2] = ["--hypervisor", "kvm"];

struct Pair {
    _dir: tempfile::TempDir,
    a: Host,
    b: Host,
}

/// Two hosts, one of which will stop itself, and a migration from `a` to `b` that has begun.
async fn begin(
    plain: [&'static str; 2],
    hold_a: Option<&str>,
    hold_b: Option<&str>,
) -> (Pair, vpmu_proto::longrunning::Operation) {
    let options = |hold: Option<&'static str>| -> Vec<&'static str> {
        plain.into_iter().chain(hold.into_iter().flat_map(|point| ["--hold-at", point])).collect()
    };
    let leak = |hold: Option<&str>| hold.map(|point| &*point.to_owned().leak());
    let dir = tempfile::tempdir().expect("tempdir");
    let a = Host::start(&dir.path().join("a"), &options(leak(hold_a))).await;
    let b = Host::start(&dir.path().join("b"), &options(leak(hold_b))).await;
    a.create("vm", probe_spec(1, 16)).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let operation = a.migrate("vm", b.arrival()).await;
    (Pair { _dir: dir, a, b }, operation)
}

async fn running(hosts: [&Host; 2]) -> usize {
    let mut count = 0;
    for host in hosts {
        count += host.list().await.iter().filter(|vm| vm.observed_state() == State::Running).count();
    }
    count
}

/// The source dies at `point`: it runs on the destination, once.
async fn source_dies(plain: [&'static str; 2], point: &str) -> Pair {
    let (mut pair, _) = begin(plain, Some(point), None).await;
    let Pair { a, b, .. } = &mut pair;
    a.kill_at_hold().await;
    a.restart_with(&plain).await;
    let here = b.until("vm", "running", is(State::Running)).await;
    assert_eq!(here.epoch, 2, "{point}");
    let gone = a.until("vm", "moved", is(State::Moved)).await;
    assert_eq!(gone.moved_to, b.ready["host_id"]);
    b.until_counting("vm").await;
    assert_eq!(running([a, b]).await, 1, "{point}");
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let refused = a.vms().await.start_virtual_machine(start).await;
    expect_error(refused, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
    let begin = std::time::Instant::now();
    loop {
        let request = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
        let list = a.migrations().await.list_migrations(request).await.expect("lists").into_inner();
        if list.migrations[0].state() == migration::State::Succeeded {
            return pair;
        }
        assert!(begin.elapsed() < DEADLINE, "{point}: {:?}", list.migrations);
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_source_killed_before_its_decision_commits_late_to_the_ready_copy() {
    source_dies(SIMULATED, "before:source-persist-handed-over").await;
}

#[tokio::test]
async fn a_source_killed_between_its_decision_and_go_has_handed_over() {
    source_dies(SIMULATED, "after:source-persist-handed-over").await;
}

#[tokio::test]
async fn a_source_killed_after_go_has_handed_over() {
    source_dies(SIMULATED, "after:source-send-go").await;
}

#[tokio::test]
async fn a_source_killed_before_its_release_has_handed_over() {
    let pair = source_dies(SIMULATED, "before:source-release").await;
    let stored = pair.a.stored_pmu("vm").await.expect("stored before the release");
    assert_eq!(stored.cause, "migrate-out");
}

#[tokio::test]
async fn a_source_killed_after_its_release_has_handed_over() {
    source_dies(SIMULATED, "after:source-persist-released").await;
}

#[tokio::test]
async fn on_kvm_a_source_killed_between_its_decision_and_go_has_handed_over() {
    if have_kvm() {
        source_dies(KVM, "after:source-persist-handed-over").await;
    }
}

/// The destination dies at `point` before Entered: it goes on at the source.
async fn destination_dies(plain: [&'static str; 2], point: &str) -> (u64, String) {
    let (Pair { _dir, a, mut b }, operation) = begin(plain, None, Some(point)).await;
    b.kill_at_hold().await;
    b.restart_with(&plain).await;
    let error = a.finish(operation).await.expect_err("it did not move");
    let vm = a.until("vm", "running", is(State::Running)).await;
    a.until_counting("vm").await;
    assert_eq!(running([&a, &b]).await, 1, "{point}");
    assert!(b.list().await.is_empty(), "{point}: no copy stays");
    // And it can move yet.
    let again = a.migrate("vm", b.arrival()).await;
    a.finish(again).await.expect("moved");
    assert_eq!(b.get("vm").await.epoch, vm.epoch + 1, "{point}");
    (vm.epoch, reason_of(&error))
}

#[tokio::test]
async fn a_destination_killed_before_ready_leaves_it_on_the_source() {
    let (epoch, reason) = destination_dies(SIMULATED, "before:destination-send-ready").await;
    assert_eq!((epoch, reason.as_str()), (2, "DESTINATION_LOST"));
}

#[tokio::test]
async fn a_destination_killed_around_its_promise_leaves_or_gives_it_back() {
    // Ready may have left the process or not.
    let (epoch, reason) = destination_dies(SIMULATED, "after:destination-send-ready").await;
    assert!(
        [(2, "DESTINATION_LOST"), (3, "RETURNED")].contains(&(epoch, reason.as_str())),
        "{epoch} {reason}"
    );
}

#[tokio::test]
async fn a_destination_killed_between_go_and_entered_gives_it_back() {
    let (epoch, reason) = destination_dies(SIMULATED, "before:destination-persist-entered").await;
    assert_eq!((epoch, reason.as_str()), (3, "RETURNED"));
}

#[tokio::test]
async fn on_kvm_a_destination_killed_between_go_and_entered_gives_it_back() {
    if have_kvm() {
        let (epoch, reason) = destination_dies(KVM, "before:destination-persist-entered").await;
        assert_eq!((epoch, reason.as_str()), (3, "RETURNED"));
    }
}

/// The destination dies at `point` after Entered: it is the destination's, stopped with its daemon.
async fn owner_dies(plain: [&'static str; 2], point: &str) {
    let (Pair { _dir, a, mut b }, operation) = begin(plain, None, Some(point)).await;
    b.kill_at_hold().await;
    assert_eq!(a.get("vm").await.observed_state(), State::MigratingOut, "{point}: the source waits");
    b.restart_with(&plain).await;
    let moved: Migration = unpack(&a.finish(operation).await.expect("it has moved"));
    assert_eq!(moved.state(), migration::State::Succeeded);
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
    let vm = b.get("vm").await;
    assert_eq!((vm.observed_state(), vm.reason.as_str(), vm.epoch), (State::Stopped, "HOST_RESTARTED", 2));
    assert_eq!(running([&a, &b]).await, 0, "{point}");
    b.start_vm("vm").await;
}

#[tokio::test]
async fn a_destination_killed_after_entered_owns_it() {
    owner_dies(SIMULATED, "after:destination-persist-entered").await;
}

#[tokio::test]
async fn a_destination_killed_after_its_grant_owns_it() {
    owner_dies(SIMULATED, "after:destination-grant").await;
}

/// The source dies after its decision and the destination before Entered: no copy survives, and nothing runs by itself.
#[tokio::test]
async fn both_killed_in_the_window_leave_no_copy_and_say_so() {
    let (Pair { _dir, mut a, mut b }, _) =
        begin(SIMULATED, Some("after:source-persist-handed-over"), None).await;
    a.kill_at_hold().await;
    b.kill().await;
    b.restart().await;
    a.restart_with(&SIMULATED).await;
    let vm = a.until("vm", "given back", |vm| vm.epoch == 3).await;
    assert_eq!((vm.observed_state(), vm.reason.as_str()), (State::Failed, "LOST"));
    assert!(b.list().await.is_empty());
    a.start_vm("vm").await;
    assert_eq!(running([&a, &b]).await, 1);
}

/// The source dies before its decision and the destination after it: in doubt until the destination itself says that
/// its copy is gone, and LOST then.
#[tokio::test]
async fn without_a_decision_it_is_in_doubt_until_the_destination_answers_and_lost_if_its_copy_died() {
    let (Pair { _dir, mut a, mut b }, _) =
        begin(SIMULATED, Some("before:source-persist-handed-over"), None).await;
    a.kill_at_hold().await;
    b.kill().await;
    a.restart_with(&SIMULATED).await;
    let vm = a.get("vm").await;
    assert_eq!((vm.observed_state(), vm.reason.as_str()), (State::MigratingOut, "IN_DOUBT"));
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let refused = a.vms().await.start_virtual_machine(start).await;
    expect_error(refused, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
    b.restart().await;
    let vm = a.until("vm", "lost", is(State::Failed)).await;
    assert_eq!((vm.reason.as_str(), vm.epoch), ("LOST", 2));
    assert!(b.list().await.is_empty());
    assert_eq!(running([&a, &b]).await, 0);
    a.start_vm("vm").await;
}
