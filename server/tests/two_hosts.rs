//! Two hosts with addresses of their own, in network namespaces: mutual TLS between them, links that are slow, lose
//! packets, stall and are cut, and what is left of the machine after each. Needs root; says so where it cannot run.

mod support;

use std::time::{Duration, Instant};

use serde_json::json;
use support::ca::Ca;
use support::guest::{filled, until_filled, verify};
use support::netns::{ADDRESS, Net};
use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

/// Addresses of the peer listeners.
const PEER: [&str; 2] = ["tcp:10.93.7.1:7171", "tcp:10.93.7.2:7171"];

/// Hosts go before the namespaces they live in, and both before the directory.
struct World {
    a: Host,
    b: Host,
    net: Net,
    dir: tempfile::TempDir,
}

fn hypervisor() -> &'static str {
    if vcpu_worker::host::probe().kvm.is_ok() { "kvm" } else { "simulated" }
}

/// One host: with its peer listener, and with `more`.
async fn host(net: &Net, dir: &tempfile::TempDir, side: usize, more: &[String]) -> Host {
    let mut options = vec!["--hypervisor", hypervisor(), "--handover-timeout", "2000"];
    options.extend(["--peer-listen", PEER[side]]);
    options.extend(more.iter().map(String::as_str));
    Host::start_in(&dir.path().join(["a", "b"][side]), &net.host[side], &options).await
}

/// Two hosts with certificates of one CA; none where no namespaces can be made.
async fn world(net: Option<Net>, more: [&[&str]; 2]) -> Option<World> {
    let net = net?;
    let dir = tempfile::tempdir().expect("tempdir");
    let ca = Ca::new(&dir.path().join("ca"));
    let options = |side: usize| {
        let names = [format!("host-{side}.example"), ADDRESS[side].to_owned()];
        let mut options = ca.host(&format!("host-{side}"), &names.each_ref().map(String::as_str));
        options.extend(more[side].iter().map(ToString::to_string));
        options
    };
    let a = host(&net, &dir, 0, &options(0)).await;
    let b = host(&net, &dir, 1, &options(1)).await;
    Some(World { a, b, net, dir })
}

fn to(side: usize) -> MigrationSpec {
    MigrationSpec { destination: PEER[side].to_owned(), ..MigrationSpec::default() }
}

fn request(spec: MigrationSpec) -> CreateMigrationRequest {
    CreateMigrationRequest { parent: name("vm"), spec: Some(spec), ..CreateMigrationRequest::default() }
}

async fn run(from: &Host, spec: MigrationSpec) -> MigrationResult {
    let started = from.migrations().await.create_migration(request(spec)).await;
    let done = from.finish(started.expect("accepted").into_inner()).await;
    let migration: Migration = unpack(&done.expect("migrated"));
    migration.result.expect("result")
}

/// The machine's migration as its source shows it, once it is as wanted.
async fn until_migration(from: &Host, what: &str, wanted: impl Fn(&Migration) -> bool) -> Migration {
    let begin = Instant::now();
    loop {
        let listed = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
        let listed = from.migrations().await.list_migrations(listed).await.expect("lists").into_inner();
        if let Some(found) = listed.migrations.into_iter().find(&wanted) {
            return found;
        }
        assert!(begin.elapsed() < DEADLINE, "no migration becomes {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether it runs here.
async fn runs(host: &Host) -> bool {
    host.list().await.iter().any(|vm| vm.observed_state() == State::Running)
}

/// Exactly this one runs it, its memory is as the guest wrote it, and it goes on.
async fn one_owner(owner: &Host, other: &Host) {
    owner.until("vm", "running", is(State::Running)).await;
    assert!(!runs(other).await, "two owners");
    let before = figures(&owner.live_pmu("vm").await);
    verify(owner, "vm").await;
    let begin = Instant::now();
    while figures(&owner.live_pmu("vm").await).iter().zip(&before).any(|(now, then)| now <= then) {
        assert!(begin.elapsed() < DEADLINE, "it does not go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let probe = owner.live_pmu("vm").await.probe.expect("probe");
    assert!(probe.vcpus.iter().all(|v| v.faults == 0), "a count was lost or doubled: {probe:?}");
}

fn figures(pmu: &Pmu) -> Vec<u64> {
    pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.loops).collect()
}

async fn ask(host: &Host, spec: MigrationSpec) -> Result<(), tonic::Status> {
    host.migrations().await.create_migration(request(spec)).await.map(drop)
}

async fn begin(a: &Host) {
    a.create("vm", filled(2, 64, 24)).await;
    a.start_vm("vm").await;
    until_filled(a, "vm").await;
}

#[tokio::test]
async fn a_machine_crosses_under_tls_and_back_in_clear() {
    let Some(World { a, b, net: _net, dir: _dir }) = world(Net::veth(), [&[], &[]]).await else { return };
    begin(&a).await;
    // Memory leaves the host, so it is encrypted unasked.
    let result = run(&a, MigrationSpec { connections: 3, ..to(1) }).await;
    assert_eq!(result.transport, "tcp+tls");
    one_owner(&b, &a).await;
    // The peer's name.
    b.until_logged("host-0.example", 1).await;
    let result = run(&b, MigrationSpec { allow_plaintext: true, ..to(0) }).await;
    assert_eq!(result.transport, "tcp");
    one_owner(&a, &b).await;
}

#[tokio::test]
async fn hosts_that_nobody_vouches_for_are_refused() {
    let Some(World { a, b, net, dir }) = world(Net::veth(), [&[], &[]]).await else { return };
    begin(&a).await;
    drop(b);
    // A host of another CA.
    let foreign = Ca::new(&dir.path().join("foreign")).host("b", &["host-1.example", ADDRESS[1]]);
    let b = host(&net, &dir, 1, &foreign).await;
    let status = expect_error(ask(&a, to(1)).await, Code::Unavailable, "DESTINATION_UNREACHABLE");
    assert!(status.message().contains("certificate"), "{status:?}");
    drop(b);
    // No certificates at all: the one that is asked refuses to talk in clear, and so does the one that asks.
    let b = host(&net, &dir, 1, &["--peer-plaintext".to_owned()]).await;
    expect_error(ask(&a, to(1)).await, Code::Unavailable, "DESTINATION_UNREACHABLE");
    drop(a);
    let options = ["--hypervisor", "simulated", "--peer-listen", "tcp:127.0.0.1:0"];
    let bare = Host::start_in(&dir.path().join("bare"), &net.host[0], &options).await;
    bare.create("vm", filled(1, 16, 1)).await;
    bare.start_vm("vm").await;
    expect_error(ask(&bare, to(1)).await, Code::FailedPrecondition, "TLS_REQUIRED");
    drop(bare);
    // Where the operator says that nobody else is on the network.
    let a = host(&net, &dir, 0, &["--peer-plaintext".to_owned()]).await;
    a.until("vm", "known", |_| true).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    assert_eq!(run(&a, to(1)).await.transport, "tcp+tls", "memory is encrypted all the same");
    one_owner(&b, &a).await;
    drop((a, b));
}

#[tokio::test]
async fn a_link_cut_while_memory_is_copied_leaves_the_machine_where_it_is() {
    let Some(World { a, b, net, dir: _dir }) = world(Net::veth(), [&[], &[]]).await else { return };
    begin(&a).await;
    // 24 MiB at 8 MiB/s: there is time to cut it.
    let slow = MigrationSpec { max_bandwidth: 8 << 20, ..to(1) };
    let started = a.migrations().await.create_migration(request(slow)).await.expect("accepted").into_inner();
    until_migration(&a, "copying", |m| m.progress.as_ref().is_some_and(|p| p.bytes_sent > 4 << 20)).await;
    net.set_up(false);
    let error = a.finish(started).await.expect_err("it is cut off");
    assert!(!reason_of(&error).is_empty() && error.message.contains("destination"), "{error:?}");
    one_owner(&a, &b).await;
    net.set_up(true);
    // The other host finds out what was decided, and takes it at the next try.
    run(&a, to(1)).await;
    one_owner(&b, &a).await;
    // The kernel's own way to end a connection, where it has it.
    let slow = MigrationSpec { max_bandwidth: 8 << 20, ..to(0) };
    let started = b.migrations().await.create_migration(request(slow)).await.expect("accepted").into_inner();
    until_migration(&b, "copying", |m| m.progress.as_ref().is_some_and(|p| p.bytes_sent > 4 << 20)).await;
    if net.kill_connections() {
        b.finish(started).await.expect_err("its connections are gone");
        one_owner(&b, &a).await;
    } else {
        println!(
            "this kernel's sock_diag does not end connections (CONFIG_INET_DIAG_DESTROY): ss -K not tried"
        );
        b.finish(started).await.expect("migrated");
        one_owner(&a, &b).await;
    }
}

#[tokio::test]
async fn a_link_cut_after_the_decision_only_delays_it() {
    let Some(World { a, b, net, dir: _dir }) =
        world(Net::veth(), [&["--hold-at", "before:source-send-go"], &[]]).await
    else {
        return;
    };
    begin(&a).await;
    let started = a.migrations().await.create_migration(request(to(1))).await.expect("accepted").into_inner();
    a.until_held().await;
    net.set_up(false);
    a.signal(rustix::process::Signal::CONT);
    // Committed, and nobody can be told: nobody runs it, and it may not be taken back.
    let open = until_migration(&a, "committed", |m| m.state() == migration::State::Committed).await;
    let cancel = CancelMigrationRequest { name: open.name };
    expect_error(
        a.migrations().await.cancel_migration(cancel).await,
        Code::FailedPrecondition,
        "MIGRATION_COMMITTED",
    );
    assert!(!runs(&a).await && !runs(&b).await, "nobody knows that it may");
    net.set_up(true);
    a.finish(started).await.expect("the decision stands");
    one_owner(&b, &a).await;
}

#[tokio::test]
async fn a_link_that_is_slow_loses_packets_and_stalls_only_takes_longer() {
    let Some(World { a, b, mut net, dir: _dir }) = world(Net::slow(), [&[], &[]]).await else { return };
    begin(&a).await;
    net.be(&json!({"delay_ms": 15, "rate_mbit": 200, "loss": 0.005}));
    // The guest dirties 8 MiB over and over, so that is what the stop takes at this rate.
    let patient = |side| MigrationSpec {
        connections: 2,
        max_blackout: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
        ..to(side)
    };
    let spec = patient(1);
    let started = a.migrations().await.create_migration(request(spec)).await.expect("accepted").into_inner();
    until_migration(&a, "copying", |m| m.progress.as_ref().is_some_and(|p| p.bytes_sent > 2 << 20)).await;
    // Shorter than what counts as silence.
    net.be(&json!({"stall": true}));
    tokio::time::sleep(Duration::from_millis(700)).await;
    net.be(&json!({"stall": false}));
    a.finish(started).await.expect("migrated");
    one_owner(&b, &a).await;
    // And longer: the machine stays, and goes once the link is well.
    net.be(&json!({"loss": 0, "rate_mbit": 100}));
    let started =
        b.migrations().await.create_migration(request(patient(0))).await.expect("accepted").into_inner();
    until_migration(&b, "copying", |m| m.progress.as_ref().is_some_and(|p| p.bytes_sent > 2 << 20)).await;
    net.be(&json!({"stall": true}));
    b.finish(started).await.expect_err("silence");
    one_owner(&b, &a).await;
    net.be(&json!({"stall": false, "rate_mbit": 0, "delay_ms": 1}));
    run(&b, to(0)).await;
    one_owner(&a, &b).await;
}
