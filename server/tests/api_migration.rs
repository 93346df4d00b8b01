//! Live migration between two real vpmud processes.

mod support;

use std::time::Duration;

use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

struct Pair {
    _dir: tempfile::TempDir,
    a: Host,
    b: Host,
}

async fn pair(hypervisor: &str, b_options: &[&str]) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let a = Host::start(&dir.path().join("a"), &["--hypervisor", hypervisor]).await;
    let mut options = vec!["--hypervisor", hypervisor];
    options.extend(b_options);
    let b = Host::start(&dir.path().join("b"), &options).await;
    Pair { _dir: dir, a, b }
}

fn migrate(id: &str, to: &str) -> CreateMigrationRequest {
    CreateMigrationRequest {
        parent: name(id),
        spec: Some(MigrationSpec { destination: to.to_owned(), ..MigrationSpec::default() }),
        ..CreateMigrationRequest::default()
    }
}

async fn run(from: &Host, id: &str, to: &str) -> Migration {
    let operation =
        from.migrations().await.create_migration(migrate(id, to)).await.expect("accepted").into_inner();
    unpack(&from.finish(operation).await.expect("migrated"))
}

#[tokio::test]
async fn there_and_back_on_the_simulated_hypervisor() {
    there_and_back("simulated").await;
}

#[tokio::test]
async fn there_and_back_on_kvm() {
    if have_kvm() {
        there_and_back("kvm").await;
    }
}

async fn there_and_back(hypervisor: &str) {
    let Pair { _dir, a, b } = pair(hypervisor, &[]).await;
    let created = a.create("vm", probe_spec(2, 64)).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;

    for (round, (from, to)) in [(&a, &b), (&b, &a)].into_iter().enumerate() {
        let migration = run(from, "vm", &to.peer()).await;
        assert_eq!(migration.state(), migration::State::Succeeded);
        let result = migration.result.expect("result");
        println!(
            "{hypervisor} round {round}: total {} us, blackout {} us, guest gap {:?} us, {} bytes, {} rounds, {:?}",
            result.total_us,
            result.blackout_us,
            result.guest_gap_us,
            result.bytes,
            result.rounds,
            result.breakdown
        );
        assert!(result.blackout_us > 0 && result.blackout_us < result.total_us, "{result:?}");
        assert_eq!(result.pmu_at_stop.len(), 2);
        for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
            assert_eq!(
                (&stop.registers, &stop.digest, stop.pmis),
                (&resume.registers, &resume.digest, resume.pmis)
            );
        }
        let gone = from.get("vm").await;
        assert_eq!(gone.observed_state(), State::Moved);
        assert_eq!(gone.moved_to, to.ready["host_id"]);
        let here = to.get("vm").await;
        assert_eq!((here.observed_state(), here.uid.as_str()), (State::Running, created.uid.as_str()));
        assert_eq!(here.epoch, round as u64 + 2, "every decision burns an epoch");
        let now = to.until_counting("vm").await;
        for (stop, now) in result.pmu_at_stop.iter().zip(&now.vcpus) {
            for (stop, now) in stop.counters.iter().zip(&now.counters).filter(|(s, _)| !s.pmi_enabled) {
                assert!(
                    now.value >= stop.value,
                    "vCPU counter {} went back: {} to {}",
                    stop.name,
                    stop.value,
                    now.value
                );
            }
        }
        let faults: u64 = now.probe.expect("probe").vcpus.iter().map(|v| v.faults).sum();
        assert_eq!(faults, 0, "the guest's own view is whole");
        assert_eq!(from.stored_pmu("vm").await.expect("stored").cause, "migrate-out");
    }
    // What has gone can be neither started nor deleted by half.
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    expect_error(
        b.vms().await.start_virtual_machine(start).await,
        Code::FailedPrecondition,
        "ILLEGAL_TRANSITION",
    );
    a.stop_vm("vm").await;
}

#[tokio::test]
async fn what_cannot_move_is_refused_before_anything_happens() {
    let Pair { _dir, a, b } = pair("simulated", &["--model-pmu", "intel:v5:4+3:48"]).await;
    a.create("vm", probe_spec(1, 32)).await;
    a.start_vm("vm").await;
    let before = a.get("vm").await;
    let mut migrations = a.migrations().await;

    expect_error(
        migrations.create_migration(migrate("vm", &a.peer())).await,
        Code::FailedPrecondition,
        "MIGRATION_INCOMPATIBLE",
    );
    expect_error(
        migrations.create_migration(migrate("vm", "unix:/nowhere.sock")).await,
        Code::Unavailable,
        "DESTINATION_UNREACHABLE",
    );
    let fewer = migrations.create_migration(migrate("vm", &b.peer())).await;
    let status = expect_error(fewer, Code::FailedPrecondition, "MIGRATION_INCOMPATIBLE");
    assert!(status.message().contains("counters"), "{status:?}");

    let check = CheckMigrationRequest { parent: name("vm"), spec: migrate("vm", &a.peer()).spec };
    let answer = migrations.check_migration(check).await.expect("checks").into_inner();
    assert_eq!((answer.compatible, answer.mismatches[0].rule.as_str()), (false, "SAME_HOST"));

    assert_eq!(a.get("vm").await, before);
    assert!(b.list().await.is_empty());
}

#[tokio::test]
async fn a_name_that_is_taken_there_is_refused() {
    let Pair { _dir, a, b } = pair("simulated", &[]).await;
    a.create("vm", probe_spec(1, 32)).await;
    b.create("vm", probe_spec(1, 32)).await;
    a.start_vm("vm").await;
    let refused = a.migrations().await.create_migration(migrate("vm", &b.peer())).await;
    let status = expect_error(refused, Code::FailedPrecondition, "MIGRATION_INCOMPATIBLE");
    assert!(status.message().contains("NAME_IN_USE"), "{status:?}");
    assert_eq!(a.get("vm").await.observed_state(), State::Running);
}

/// A migration that is slow enough to be disturbed.
fn slow(id: &str, to: &str) -> CreateMigrationRequest {
    let mut request = migrate(id, to);
    let spec = request.spec.as_mut().expect("spec");
    spec.max_bandwidth = 4 << 20;
    spec.max_blackout = Some(prost_types::Duration { seconds: 0, nanos: 1_000_000 });
    request
}

fn filled() -> VirtualMachineSpec {
    let mut spec = probe_spec(1, 128);
    let fill = ProbeBoot { fill_bytes: 64 << 20, dirty_pages_per_second: 500, ..ProbeBoot::default() };
    spec.boot = Some(virtual_machine_spec::Boot::Probe(fill));
    spec
}

async fn until_copying(host: &Host, operation: &vpmu_proto::longrunning::Operation) -> Migration {
    let migration: Migration = unpack(operation.metadata.as_ref().expect("metadata"));
    let request = WatchMigrationRequest { name: migration.name };
    let mut watch = host.migrations().await.watch_migration(request).await.expect("watches").into_inner();
    loop {
        let migration = tokio::time::timeout(DEADLINE, watch.message())
            .await
            .expect("in time")
            .expect("stream")
            .expect("open");
        if migration.state() == migration::State::Precopy {
            return migration;
        }
        assert_eq!(migration.state(), migration::State::Preparing, "{migration:?}");
    }
}

#[tokio::test]
async fn cancel_leaves_it_running_here_and_it_can_move_later() {
    let Pair { _dir, a, b } = pair("simulated", &[]).await;
    a.create("vm", filled()).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let mut migrations = a.migrations().await;
    let operation = migrations.create_migration(slow("vm", &b.peer())).await.expect("accepted").into_inner();
    let migration = until_copying(&a, &operation).await;
    assert_eq!(a.get("vm").await.migration, migration.name);
    assert_eq!(b.get("vm").await.observed_state(), State::Incoming);
    expect_error(
        migrations.create_migration(slow("vm", &b.peer())).await,
        Code::Aborted,
        "MIGRATION_IN_PROGRESS",
    );

    migrations
        .cancel_migration(CancelMigrationRequest { name: migration.name.clone() })
        .await
        .expect("cancelled");
    let error = a.finish(operation).await.expect_err("cancelled");
    assert_eq!(reason_of(&error), "CANCELLED");
    let ended = migrations
        .get_migration(GetMigrationRequest { name: migration.name.clone() })
        .await
        .expect("kept")
        .into_inner();
    assert_eq!(ended.state(), migration::State::Cancelled);
    let again = migrations.cancel_migration(CancelMigrationRequest { name: migration.name }).await;
    expect_error(again, Code::FailedPrecondition, "MIGRATION_OVER");

    let vm = a.until("vm", "running", is(State::Running)).await;
    assert_eq!((vm.epoch, vm.migration.as_str()), (2, ""), "an abort burns an epoch");
    until_empty(&b).await;
    let moved = run(&a, "vm", &b.peer()).await;
    assert_eq!(moved.state(), migration::State::Succeeded);
    assert_eq!(b.get("vm").await.epoch, 3);
}

async fn until_empty(host: &Host) {
    let begin = std::time::Instant::now();
    while !host.list().await.is_empty() {
        assert!(begin.elapsed() < DEADLINE, "the destination keeps a copy: {:?}", host.list().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_destination_that_dies_leaves_it_running_on_the_source() {
    let Pair { _dir, a, mut b } = pair("simulated", &[]).await;
    a.create("vm", filled()).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let operation =
        a.migrations().await.create_migration(slow("vm", &b.peer())).await.expect("accepted").into_inner();
    until_copying(&a, &operation).await;
    b.kill().await;
    let error = a.finish(operation).await.expect_err("failed");
    println!("{}: {}", reason_of(&error), error.message);
    let vm = a.until("vm", "running", is(State::Running)).await;
    assert_eq!(vm.epoch, 2);
    let (one, two) = (a.live_pmu("vm").await, a.until_counting("vm").await);
    assert_eq!(one.vcpus.len(), two.vcpus.len());
    b.restart().await;
    assert!(b.list().await.is_empty(), "the destination has dropped it");
    let moved = run(&a, "vm", &b.peer()).await;
    assert_eq!(moved.state(), migration::State::Succeeded);
}

#[tokio::test]
async fn a_source_that_dies_while_copying_keeps_it_stopped_and_the_destination_drops_it() {
    let Pair { _dir, mut a, b } = pair("simulated", &[]).await;
    a.create("vm", filled()).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let operation =
        a.migrations().await.create_migration(slow("vm", &b.peer())).await.expect("accepted").into_inner();
    let migration = until_copying(&a, &operation).await;
    a.kill().await;
    until_empty(&b).await;
    a.restart().await;
    let vm = a.get("vm").await;
    assert_eq!((vm.observed_state(), vm.reason.as_str(), vm.epoch), (State::Stopped, "HOST_RESTARTED", 2));
    let ended = a
        .migrations()
        .await
        .get_migration(GetMigrationRequest { name: migration.name })
        .await
        .expect("kept")
        .into_inner();
    assert_eq!((ended.state(), ended.reason.as_str()), (migration::State::Failed, "HOST_RESTARTED"));
    a.start_vm("vm").await;
    let moved = run(&a, "vm", &b.peer()).await;
    assert_eq!(moved.state(), migration::State::Succeeded);
}

#[tokio::test]
async fn the_destination_keeps_what_it_got_over_a_crash() {
    let Pair { _dir, a, mut b } = pair("simulated", &[]).await;
    a.create("vm", probe_spec(2, 32)).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let result = run(&a, "vm", &b.peer()).await.result.expect("result");
    b.kill().await;
    b.restart().await;
    let vm = b.get("vm").await;
    assert_eq!((vm.observed_state(), vm.reason.as_str(), vm.epoch), (State::Stopped, "HOST_RESTARTED", 2));
    let stored = b.stored_pmu("vm").await.expect("stored");
    assert!(["migrate-in", "checkpoint"].contains(&stored.cause.as_str()), "{}", stored.cause);
    if stored.cause == "migrate-in" {
        for (stop, stored) in result.pmu_at_stop.iter().zip(&stored.vcpus) {
            assert_eq!(stop.digest, stored.digest);
        }
    }
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
}
