//! Local mode between real processes: the guest's memory goes to another vpmud on the machine without a copy, by the same
//! handover as any migration. Memory is verified by the guest's own pattern, read from the worker's memory file.

mod support;

use std::time::{Duration, Instant};

use support::guest::*;
use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::*;

const MIB: u64 = 1 << 20;

struct Pair {
    a: Host,
    b: Host,
    workers: Workers,
    _dir: tempfile::TempDir,
}

async fn pair(a: &[&str], b: &[&str]) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers(["a", "b"].map(|host| dir.path().join(host).join("state/run")).to_vec());
    let (a, b) = (Host::start(&dir.path().join("a"), a).await, Host::start(&dir.path().join("b"), b).await);
    Pair { a, b, workers, _dir: dir }
}

fn local(to: &Host) -> CreateMigrationRequest {
    CreateMigrationRequest {
        parent: name("vm"),
        spec: Some(MigrationSpec {
            destination: to.peer(),
            mode: migration_spec::Mode::Local.into(),
            ..MigrationSpec::default()
        }),
        ..CreateMigrationRequest::default()
    }
}

async fn run(from: &Host, to: &Host) -> Migration {
    let operation = from.migrations().await.create_migration(local(to)).await.expect("accepted").into_inner();
    unpack(&from.finish(operation).await.expect("migrated"))
}

/// Counters that take no overflow never go back, and those of the stop are those of the resume.
fn exact(result: &MigrationResult, now: &Pmu) {
    assert!(!result.pmu_at_stop.is_empty());
    for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
        assert_eq!(
            (&stop.registers, &stop.digest, stop.pmis),
            (&resume.registers, &resume.digest, resume.pmis)
        );
    }
    for (stop, now) in result.pmu_at_stop.iter().zip(&now.vcpus) {
        for (stop, now) in stop.counters.iter().zip(&now.counters).filter(|(s, _)| !s.pmi_enabled) {
            assert!(now.value >= stop.value, "{} went back: {} to {}", stop.name, stop.value, now.value);
        }
    }
    let faults: u64 = now.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.faults).sum();
    assert_eq!(faults, 0, "the guest's own view is whole");
}

const THREAD: [&str; 2] = ["--isolation", "thread"];
const PROCESS: [&str; 2] = ["--isolation", "process"];

/// There and back under load, then a hop while paused, on whatever runs guests here.
async fn there_and_back(a: &[&str], b: &[&str]) {
    let Pair { _dir, workers, a, b } = pair(a, b).await;
    a.create("vm", filled(2, 128, 32)).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    for (from, to) in [(&a, &b), (&b, &a)] {
        let migration = run(from, to).await;
        assert_eq!(migration.state(), migration::State::Succeeded);
        let result = migration.result.expect("a result");
        println!(
            "total {} us, blackout {} us, gap {:?} us, {:?}",
            result.total_us, result.blackout_us, result.guest_gap_us, result.breakdown
        );
        assert_eq!((result.mode.as_str(), result.transport.as_str()), ("local", "unix"));
        assert_eq!((result.pages_sent, result.zero_pages), (0, 0), "no page is copied");
        assert!(result.bytes < MIB, "only state goes over: {} bytes", result.bytes);
        assert_eq!(from.get("vm").await.observed_state(), State::Moved);
        exact(&result, &to.until_counting("vm").await);
        verify(to, "vm").await;
    }
    let request = PauseVirtualMachineRequest { name: name("vm") };
    a.vms().await.pause_virtual_machine(request).await.expect("paused");
    let before = a.live_pmu("vm").await;
    let result = run(&a, &b).await.result.expect("a result");
    let vm = b.get("vm").await;
    assert_eq!((vm.observed_state(), vm.desired_state()), (State::Paused, DesiredState::Paused));
    let after = b.live_pmu("vm").await;
    for (before, after) in before.vcpus.iter().zip(&after.vcpus) {
        assert_eq!((&before.counters, before.pmis), (&after.counters, after.pmis), "it stood still");
    }
    verify(&b, "vm").await;
    let request = ResumeVirtualMachineRequest { name: name("vm") };
    b.vms().await.resume_virtual_machine(request).await.expect("resumed");
    exact(&result, &b.until_counting("vm").await);
    b.stop_vm("vm").await;
    assert!(workers.alive().is_empty());
}

#[tokio::test]
async fn between_the_threads_of_two_daemons() {
    there_and_back(&THREAD, &THREAD).await;
}

#[tokio::test]
async fn between_two_processes() {
    there_and_back(&PROCESS, &PROCESS).await;
}

#[tokio::test]
async fn from_a_thread_to_a_process_and_back() {
    there_and_back(&THREAD, &PROCESS).await;
}

#[tokio::test]
async fn on_the_simulated_hypervisor() {
    let simulated = ["--hypervisor", "simulated"];
    there_and_back(&simulated, &simulated).await;
}

#[tokio::test]
async fn auto_hands_over_where_it_can_and_copies_where_it_is_told() {
    let auto = ["--hypervisor", "simulated", "--local-migration", "auto"];
    let Pair { _dir, workers: _workers, a, b } = pair(&auto, &auto).await;
    a.create("vm", probe_spec(1, 16)).await;
    a.start_vm("vm").await;
    let mut modes = Vec::new();
    for (from, to, mode) in
        [(&a, &b, migration_spec::Mode::Unspecified), (&b, &a, migration_spec::Mode::PrecopyOnly)]
    {
        let mut request = local(to);
        request.spec.as_mut().expect("spec").mode = mode.into();
        let operation = from.migrations().await.create_migration(request).await.expect("accepted");
        let done: Migration = unpack(&from.finish(operation.into_inner()).await.expect("migrated"));
        modes.push(done.result.expect("a result").mode);
    }
    assert_eq!(modes, ["local", "precopy"]);
    let request = CheckMigrationRequest { parent: name("vm"), spec: local(&b).spec };
    let checked = a.migrations().await.check_migration(request).await.expect("checked").into_inner();
    assert!(checked.compatible, "{checked:?}");
}

/// One host stops itself at `point` and is killed there; the machine ends up on `there`, or stays.
async fn killed(source: bool, point: &str, stays: bool, options: &[&str]) {
    let mut held = options.to_vec();
    held.extend(["--hold-at", point]);
    let (on_a, on_b): (&[&str], &[&str]) = if source { (&held, options) } else { (options, &held) };
    let Pair { _dir, workers, mut a, mut b } = pair(on_a, on_b).await;
    a.create("vm", filled(1, 64, 16)).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    let before = a.live_pmu("vm").await;
    a.migrations().await.create_migration(local(&b)).await.expect("accepted");
    let victim = if source { &mut a } else { &mut b };
    victim.kill_at_hold().await;
    victim.restart_with(options).await;
    let (keeper, other) = if stays { (&a, &b) } else { (&b, &a) };
    let begin = Instant::now();
    while !keeper.list().await.iter().any(|vm| vm.observed_state() == State::Running) {
        assert!(begin.elapsed() < DEADLINE, "{point}: it does not run: {:?}", keeper.list().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(other.list().await.iter().all(|vm| vm.observed_state() != State::Running), "{point}");
    let now = keeper.until_counting("vm").await;
    for (before, now) in before.vcpus.iter().zip(&now.vcpus) {
        for (before, now) in before.counters.iter().zip(&now.counters).filter(|(b, _)| !b.pmi_enabled) {
            assert!(now.value >= before.value, "{point}: {} went back", before.name);
        }
    }
    let report = now.probe.expect("probe");
    assert_eq!(report.vcpus.iter().map(|v| v.faults).sum::<u64>(), 0, "{point}");
    verify(keeper, "vm").await;
    if options.contains(&"process") {
        let begin = Instant::now();
        while workers.alive().len() != 1 {
            assert!(begin.elapsed() < DEADLINE, "{point}: {:?}", workers.alive());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // And what was killed can take part again, once the other side has heard how it ended.
    let begin = Instant::now();
    while other.list().await.iter().any(|vm| vm.observed_state() != State::Moved) {
        assert!(begin.elapsed() < DEADLINE, "{point}: not over: {:?}", other.list().await);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let (from, to) = if stays { (&a, &b) } else { (&b, &a) };
    assert_eq!(run(from, to).await.state(), migration::State::Succeeded, "{point}");
    verify(to, "vm").await;
    to.stop_vm("vm").await;
}

#[tokio::test]
async fn a_source_that_is_killed_in_thread_isolation_has_handed_over_what_was_ready() {
    for point in [
        "before:source-persist-handed-over",
        "after:source-persist-handed-over",
        "after:source-send-go",
        "before:source-release",
    ] {
        killed(true, point, false, &THREAD).await;
    }
}

#[tokio::test]
async fn a_destination_that_is_killed_before_it_entered_gives_the_same_memory_back() {
    for point in [
        "after:destination-start-worker",
        "before:destination-send-ready",
        "after:destination-send-ready",
        "before:destination-persist-entered",
    ] {
        killed(false, point, true, &THREAD).await;
    }
}

#[tokio::test]
async fn a_daemon_that_is_killed_in_process_isolation_leaves_one_owner_of_the_memory() {
    for (source, point, stays) in [
        (true, "after:source-start-copy", true),
        (true, "after:source-persist-quiesced", true),
        (true, "before:source-persist-handed-over", true),
        (true, "after:source-persist-handed-over", false),
        (true, "after:source-release", false),
        (false, "before:destination-send-ready", true),
        (false, "after:destination-persist-entered", false),
    ] {
        killed(source, point, stays, &PROCESS).await;
    }
}

#[tokio::test]
async fn a_cancel_before_the_stop_leaves_it_and_its_memory_here() {
    // The destination is held while it prepares, so that the cancel surely comes in time.
    let mut held = THREAD.to_vec();
    held.extend(["--hold-at", "before:destination-start-worker"]);
    let Pair { _dir, workers: _workers, a, mut b } = pair(&THREAD, &held).await;
    a.create("vm", filled(1, 64, 16)).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    let operation = a.migrations().await.create_migration(local(&b)).await.expect("accepted").into_inner();
    let migration: Migration = unpack(operation.metadata.as_ref().expect("metadata"));
    let cancel = CancelMigrationRequest { name: migration.name.clone() };
    b.until_held().await;
    a.migrations().await.cancel_migration(cancel.clone()).await.expect("cancelled");
    let error = a.finish(operation).await.expect_err("cancelled");
    assert_eq!(reason_of(&error), "CANCELLED");
    a.until("vm", "running", is(State::Running)).await;
    verify(&a, "vm").await;
    let again = a.migrations().await.cancel_migration(cancel).await;
    expect_error(again, Code::FailedPrecondition, "MIGRATION_OVER");
    b.kill_at_hold().await;
    b.restart_with(&THREAD).await;
    assert_eq!(run(&a, &b).await.state(), migration::State::Succeeded);
    verify(&b, "vm").await;
}

/// Not a test: `cargo test --release -p vpmu-server --test api_local -- --ignored --nocapture figures` on a machine with
/// nothing else to do prints the medians of each size, isolation and mode; sizes alternate.
#[tokio::test]
#[ignore = "prints figures: cargo test --release -p vpmu-server --test api_local -- --ignored --nocapture figures"]
async fn figures() {
    let rounds: usize = std::env::var("VPMU_ROUNDS").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    println!("isolation memory_mib  total_us blackout_us gap_us | stop save transfer persist restore resume");
    for options in [THREAD, PROCESS] {
        let Pair { _dir, workers: _workers, a, b } = pair(&options, &options).await;
        let sizes = [256, 1024, 4096];
        for size in sizes {
            let boot = ProbeBoot {
                fill_bytes: size / 2 * MIB,
                dirty_pages_per_second: 5000,
                ..ProbeBoot::default()
            };
            let spec = VirtualMachineSpec {
                boot: Some(virtual_machine_spec::Boot::Probe(boot)),
                ..probe_spec(1, size)
            };
            let id = format!("vm{size}");
            a.create(&id, spec).await;
        }
        let mut all: Vec<Vec<MigrationResult>> = vec![Vec::new(); sizes.len()];
        for (size, results) in sizes.iter().zip(&mut all) {
            // One machine runs at a time: on few cores the others would be measured too.
            let id = format!("vm{size}");
            a.start_vm(&id).await;
            a.until_counting(&id).await;
            tokio::time::sleep(Duration::from_secs(3)).await;
            for round in 0..rounds {
                let (from, to) = if round % 2 == 0 { (&a, &b) } else { (&b, &a) };
                let request = CreateMigrationRequest { parent: name(&id), ..local(to) };
                let operation = from.migrations().await.create_migration(request).await.expect("accepted");
                let done: Migration = unpack(&from.finish(operation.into_inner()).await.expect("migrated"));
                results.push(done.result.expect("a result"));
                tokio::time::sleep(Duration::from_millis(200)).await;
            }
            let last = if rounds.is_multiple_of(2) { &a } else { &b };
            last.stop_vm(&id).await;
        }
        for (size, results) in sizes.iter().zip(&all) {
            let median = |f: &dyn Fn(&MigrationResult) -> u64| {
                let mut values: Vec<u64> = results.iter().map(f).collect();
                values.sort_unstable();
                values[values.len() / 2]
            };
            let part = |f: fn(&BlackoutBreakdown) -> u64| median(&|r| r.breakdown.as_ref().map_or(0, f));
            println!(
                "{:9} {size:10} {:9} {:11} {:6} | {} {} {} {} {} {}",
                options[1],
                median(&|r| r.total_us),
                median(&|r| r.blackout_us),
                median(&|r| r.guest_gap_us.unwrap_or(0)),
                part(|b| b.stop_us),
                part(|b| b.save_us),
                part(|b| b.transfer_us),
                part(|b| b.persist_us),
                part(|b| b.restore_us),
                part(|b| b.resume_us),
            );
        }
    }
}

#[tokio::test]
async fn memory_that_cannot_be_handed_over_is_copied_and_that_is_said() {
    let options = ["--hypervisor", "simulated", "--local-migration", "auto"];
    let Pair { a, b, workers: _workers, _dir } = pair(&options, &options).await;
    let backing = MemoryBacking { prefault: true, ..MemoryBacking::default() };
    a.create("vm", VirtualMachineSpec { memory_backing: Some(backing), ..filled(1, 32, 4) }).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    let refused = a.migrations().await.create_migration(local(&b)).await;
    let status = expect_error(refused, Code::FailedPrecondition, "MIGRATION_INCOMPATIBLE");
    assert!(
        status.message().contains("MEMORY_BACKING") && status.message().contains("prefault"),
        "{status:?}"
    );

    let mut auto = local(&b);
    auto.spec.as_mut().expect("spec").mode = migration_spec::Mode::Auto.into();
    let operation = a.migrations().await.create_migration(auto.clone()).await.expect("accepted").into_inner();
    let migration: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    let said: Vec<_> = migration.actions.iter().map(|action| action.code.as_str()).collect();
    assert_eq!(
        (said.first(), said.last()),
        (Some(&"COPY_INSTEAD"), Some(&"CONVERGED")),
        "{:?}",
        migration.actions
    );
    assert_eq!(migration.result.expect("result").mode, "precopy");
    verify(&b, "vm").await;
}
