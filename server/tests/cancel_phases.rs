//! Cancel, defined in each phase of a migration: what the caller is told, where the machine is afterwards, and what the
//! other host keeps of it. The destination stops itself at a point of each phase, so that the phase lasts.

mod support;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use support::guest::{filled, until_filled, verify};
use support::*;
use tonic::Code;
use vpmu_proto::api::migration::State as Phase;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::Operation;

struct Pair {
    _dir: tempfile::TempDir,
    a: Host,
    b: Host,
}

/// The destination holds at a point, if one is given.
async fn pair(hold: Option<&str>) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--hypervisor", "simulated"];
    let a = Host::start(&dir.path().join("a"), &options).await;
    let mut held = options.to_vec();
    held.extend(hold.iter().flat_map(|point| ["--hold-at", point]));
    let b = Host::start(&dir.path().join("b"), &held).await;
    a.create("vm", filled(1, 32, 8)).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    Pair { _dir: dir, a, b }
}

async fn begin(a: &Host, b: &Host, max_bandwidth: u64) -> Operation {
    a.migrate("vm", MigrationSpec { max_bandwidth, ..b.arrival() }).await
}

async fn migration(a: &Host) -> Migration {
    let request = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
    let listed = a.migrations().await.list_migrations(request).await.expect("lists").into_inner();
    listed.migrations.into_iter().next().expect("one migration")
}

async fn until(a: &Host, what: &str, wanted: impl Fn(&Migration) -> bool) -> Migration {
    let begin = Instant::now();
    loop {
        let now = migration(a).await;
        if wanted(&now) {
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "it does not become {what}: {now:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

async fn cancel(a: &Host, migration: &Migration) -> Result<(), tonic::Status> {
    let request = CancelMigrationRequest { name: migration.name.clone() };
    a.migrations().await.cancel_migration(request).await.map(drop)
}

/// It was cancelled: the operation, the record and the machine say so, it runs on at the source, and the other host
/// forgets it.
async fn stayed(a: &Host, b: &Host, operation: Operation, epoch: u64) {
    let error = a.finish(operation).await.expect_err("cancelled");
    assert_eq!((error.code, reason_of(&error).as_str()), (Code::Cancelled as i32, "CANCELLED"));
    let last = migration(a).await;
    assert_eq!((last.state(), last.reason.as_str()), (Phase::Cancelled, "CANCELLED"));
    assert_eq!(last.phase, "it runs on the source");
    assert!(last.end_time.is_some() && last.result.is_none(), "{last:?}");
    let vm = a.until("vm", "running", is(State::Running)).await;
    assert_eq!((vm.epoch, vm.migration.as_str()), (epoch, ""), "an abort is a decision");
    let before = a.live_pmu("vm").await;
    let loops = |pmu: &Pmu| pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.loops).sum::<u64>();
    let begin = Instant::now();
    while loops(&a.live_pmu("vm").await) <= loops(&before) {
        assert!(begin.elapsed() < DEADLINE, "it does not go on");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    verify(a, "vm").await;
    let begin = Instant::now();
    while !b.list().await.is_empty() {
        assert!(begin.elapsed() < DEADLINE, "the destination keeps it");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // Over is over.
    expect_error(cancel(a, &last).await, Code::FailedPrecondition, "MIGRATION_OVER");
}

#[tokio::test]
async fn while_the_destination_prepares_it_is_called_off() {
    let Pair { _dir, a, b } = pair(Some("before:destination-start-worker")).await;
    let operation = begin(&a, &b, 0).await;
    b.until_held().await;
    let now = until(&a, "preparing", |m| m.state() == Phase::Preparing).await;
    let progress = now.progress.unwrap_or_default();
    assert_eq!((progress.round, progress.bytes_sent), (0, 0));
    cancel(&a, &until(&a, "preparing", |_| true).await).await.expect("may be cancelled");
    b.signal(Signal::CONT);
    stayed(&a, &b, operation, 2).await;
}

#[tokio::test]
async fn while_memory_is_copied_it_is_called_off_and_again_is_no_error() {
    let Pair { _dir, a, b } = pair(None).await;
    let operation = begin(&a, &b, 2 << 20).await;
    let now = until(&a, "copying", |m| m.progress.as_ref().is_some_and(|p| p.bytes_sent > 1 << 20)).await;
    let progress = now.progress.expect("progress");
    assert_eq!((now.state(), progress.memory_bytes), (Phase::Precopy, 32 << 20));
    assert!(progress.round == 1 && progress.bytes_remaining > 0, "{progress:?}");
    cancel(&a, &now).await.expect("may be cancelled");
    // Heard already, or over already.
    if let Err(again) = cancel(&a, &now).await {
        expect_error::<()>(Err(again), Code::FailedPrecondition, "MIGRATION_OVER");
    }
    stayed(&a, &b, operation, 2).await;
}

#[tokio::test]
async fn while_it_is_stopped_it_is_called_off_and_runs_on() {
    let Pair { _dir, a, b } = pair(Some("before:destination-send-ready")).await;
    let operation = begin(&a, &b, 0).await;
    b.until_held().await;
    let now = until(&a, "stopped", |m| m.state() == Phase::Stopped).await;
    assert!(now.progress.unwrap_or_default().bytes_sent > 0, "{now:?}");
    cancel(&a, &now).await.expect("may be cancelled");
    b.signal(Signal::CONT);
    stayed(&a, &b, operation, 2).await;
}

#[tokio::test]
async fn once_it_is_committed_it_is_refused() {
    let Pair { _dir, a, b } = pair(Some("before:destination-persist-entered")).await;
    let operation = begin(&a, &b, 0).await;
    b.until_held().await;
    let now = until(&a, "committed", |m| m.state() == Phase::Committed).await;
    expect_error(cancel(&a, &now).await, Code::FailedPrecondition, "MIGRATION_COMMITTED");
    b.signal(Signal::CONT);
    let done: Migration = unpack(&a.finish(operation).await.expect("the decision stands"));
    assert_eq!(done.state(), Phase::Succeeded);
    expect_error(cancel(&a, &done).await, Code::FailedPrecondition, "MIGRATION_OVER");
    let vm = b.until("vm", "running", is(State::Running)).await;
    assert_eq!(vm.epoch, 2);
    verify(&b, "vm").await;
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
}
