//! Two workers in one process: a probe VM moves from one to the other while it runs.

mod worker_common;

use tonic::{Code, Status, Streaming};
use vpmu_proto::api::VirtualMachineSpec;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

const ID: &str = "0b1e0b1e-0000-4000-8000-000000000001";
const TOKEN: [u8; 32] = [7; 32];
/// As the listener: the memory itself is handed over.
const LOCAL: &str = "local";

struct Pair {
    source: Host,
    destination: Host,
    _dir: tempfile::TempDir,
    out: Streaming<MigrateOutProgress>,
    arriving: Streaming<IncomingProgress>,
}

async fn begin(
    source: Host,
    destination: Host,
    hypervisor: &str,
    attempt: u32,
    listen: Option<&str>,
) -> Pair {
    let goals = MigrateOutRequest { max_blackout_us: 50_000, ..MigrateOutRequest::default() };
    begin_with(source, destination, hypervisor, probe_spec(2, 64), attempt, listen, goals).await
}

async fn begin_with(
    mut source: Host,
    mut destination: Host,
    hypervisor: &str,
    spec: VirtualMachineSpec,
    attempt: u32,
    listen: Option<&str>,
    goals: MigrateOutRequest,
) -> Pair {
    destination.attach().await;
    destination.create(hypervisor, spec, true).await;
    assert_eq!(destination.state().await, State::Paused);
    let dir = tempfile::tempdir().expect("tempdir");
    // "tls:" stands for TCP with TLS.
    let mut certificate = Vec::new();
    if listen.is_some_and(|l| l.starts_with("tls:")) {
        let request = PrepareOutgoingRequest { fence: source.fence(), migration_id: ID.to_owned() };
        let prepared = source.client.prepare_outgoing(request).await.expect("a certificate").into_inner();
        certificate = prepared.certificate_sha256;
    }
    let local = listen == Some(LOCAL);
    let listen = listen.filter(|_| !local).map(|l| l.replace("tls:", "tcp:"));
    let listen = listen.unwrap_or_else(|| format!("unix:{}/data", dir.path().display()));
    let request = PrepareIncomingRequest {
        recover_ms: 0,
        fence: destination.fence(),
        migration_id: ID.to_owned(),
        attempt,
        token: TOKEN.to_vec(),
        listen,
        connections: 2,
        memory_bytes: 64 << 20,
        peer_certificate_sha256: certificate,
        local,
        ..PrepareIncomingRequest::default()
    };
    let prepared = destination.client.prepare_incoming(request).await.expect("prepare").into_inner();
    assert_eq!(destination.state().await, State::Incoming);
    let watch = WatchIncomingRequest { fence: destination.fence(), migration_id: ID.to_owned() };
    let arriving = destination.client.watch_incoming(watch).await.expect("watch").into_inner();
    let request = MigrateOutRequest {
        fence: source.fence(),
        migration_id: ID.to_owned(),
        attempt,
        data_address: prepared.data_address,
        token: TOKEN.to_vec(),
        connections: 2,
        peer_certificate_sha256: prepared.certificate_sha256,
        local,
        ..goals
    };
    let out = source.client.migrate_out(request).await.expect("migrate out").into_inner();
    Pair { source, destination, _dir: dir, out, arriving }
}

async fn converged(out: &mut Streaming<MigrateOutProgress>) -> MigrateOutProgress {
    loop {
        let progress =
            out.message().await.expect("progress").expect("the stream stays open until it is finished");
        if progress.converged {
            return progress;
        }
    }
}

async fn ready(arriving: &mut Streaming<IncomingProgress>) -> Result<IncomingProgress, Status> {
    loop {
        match arriving.message().await? {
            Some(progress) if progress.ready => return Ok(progress),
            Some(_) => {}
            None => panic!("the stream ended without READY"),
        }
    }
}

async fn started(hypervisor: &str) -> Host {
    started_with(hypervisor, probe_spec(2, 64)).await
}

async fn started_with(hypervisor: &str, spec: VirtualMachineSpec) -> Host {
    let cores = host_cores();
    let mut source = Host::new(&cores, "vm-m");
    source.attach().await;
    source.create(hypervisor, spec, false).await;
    source.grant(1, 1, true).await.expect("grant");
    source
        .report_until("it counts", |r| {
            r.vcpus.iter().all(|v| v.heartbeats > 100 && v.pmis > 0 && v.pages_dirtied > 0)
        })
        .await;
    source
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_probe_moves() {
    for hypervisor in hypervisors() {
        println!("on {hypervisor}");
        moves(hypervisor, None).await;
        moves(hypervisor, Some("tcp:127.0.0.1:0")).await;
        moves(hypervisor, Some("tls:127.0.0.1:0")).await;
        tls_needs_what_was_prepared(hypervisor).await;
        slowed_down_until_the_end(hypervisor).await;
        moves(hypervisor, Some(LOCAL)).await;
        for listen in [None, Some(LOCAL)] {
            println!("{}", listen.unwrap_or("copied"));
            cancelled_and_again(hypervisor, listen).await;
            paused_stays_paused(hypervisor, listen).await;
            there_and_back(hypervisor, listen).await;
            the_destination_goes_away(hypervisor, listen).await;
        }
        assert_eq!(worker_threads(), Vec::<String>::new(), "{hypervisor}: threads are left");
    }
}

/// A guest that dirties without end is slowed down step by step, and is at full speed again whatever the end is.
async fn slowed_down_until_the_end(hypervisor: &str) {
    let goals = MigrateOutRequest {
        // Nothing but a clean memory would do.
        max_blackout_us: 2_001,
        max_bandwidth: 8 << 20,
        allow_throttle: true,
        ..MigrateOutRequest::default()
    };
    // The guest writes its whole working set many times while that is sent once, also with a small share of a core.
    let mut spec = probe_spec(2, 64);
    if let Some(Boot::Probe(probe)) = &mut spec.boot {
        probe.dirty_pages_per_second = 200_000;
    }
    // One end on each hypervisor: a copy at this rate takes a second or two.
    for cancel in [hypervisor == "simulated"] {
        let source = started_with(hypervisor, spec.clone()).await;
        let destination = Host::new(&host_cores(), "vm-m");
        let mut pair =
            begin_with(source, destination, hypervisor, spec.clone(), 1, None, goals.clone()).await;
        let slowest = loop {
            let progress = pair.out.message().await.expect("progress").expect("it cannot converge");
            if progress.throttle_percent >= 35 {
                break progress;
            }
        };
        let steps = slowest.actions.iter().filter(|a| a.code == "THROTTLE");
        let shares: Vec<_> = steps.filter_map(|a| a.detail.split(' ').nth(2)).collect();
        assert_eq!(shares[..2], ["20", "35"], "{:?}", slowest.actions);
        assert!(worker_threads().iter().any(|t| t == "vpmud-throttle"), "{:?}", worker_threads());
        if cancel {
            let request = CancelMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned() };
            pair.source.client.cancel_migration(request).await.expect("cancelled");
            assert!(!worker_threads().iter().any(|t| t == "vpmud-throttle"), "{:?}", worker_threads());
            assert_eq!(pair.source.state().await, State::Running);
            let then = pair.source.report().await;
            pair.source
                .report_until("it goes on", |r| {
                    r.vcpus.iter().zip(&then.vcpus).all(|(now, then)| now.heartbeats > then.heartbeats + 100)
                })
                .await;
            continue;
        }
        let request =
            FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch: 1 };
        let finished = pair.source.client.finish_migration(request).await.expect("finish").into_inner();
        assert!(finished.throttle_percent_max >= 35, "{finished:?}");
        assert!(finished.throttled_us > 0, "{finished:?}");
        ready(&mut pair.arriving).await.expect("ready");
        pair.destination.grant(2, 1, true).await.expect("grant");
        let then = pair.destination.report().await;
        pair.destination
            .report_until("it goes on there", |r| {
                r.vcpus.iter().zip(&then.vcpus).all(|(now, then)| now.heartbeats > then.heartbeats + 100)
            })
            .await;
    }
}

/// TLS is begun only with the certificate that was made for this very migration.
async fn tls_needs_what_was_prepared(hypervisor: &str) {
    let mut source = started(hypervisor).await;
    let other = "0b1e0b1e-0000-4000-8000-000000000002";
    let request = PrepareOutgoingRequest { fence: source.fence(), migration_id: other.to_owned() };
    source.client.prepare_outgoing(request).await.expect("a certificate");
    let request = MigrateOutRequest {
        fence: source.fence(),
        migration_id: ID.to_owned(),
        attempt: 1,
        data_address: "tcp:127.0.0.1:9".to_owned(),
        token: TOKEN.to_vec(),
        connections: 1,
        peer_certificate_sha256: vec![1; 32],
        ..MigrateOutRequest::default()
    };
    let bad = MigrateOutRequest { peer_certificate_sha256: vec![1; 31], ..request.clone() };
    refused(source.client.migrate_out(request).await, Code::FailedPrecondition, "ILLEGAL_STATE");
    refused(source.client.migrate_out(bad).await, Code::InvalidArgument, "INVALID_FIELD");
    assert_eq!(source.state().await, State::Running);
}

async fn moves(hypervisor: &str, listen: Option<&str>) {
    let source = started(hypervisor).await;
    let destination = Host::new(&host_cores(), "vm-m");
    let mut pair = begin(source, destination, hypervisor, 1, listen).await;
    let progress = converged(&mut pair.out).await;
    assert_eq!(progress.memory_bytes, 64 << 20);
    assert_eq!(pair.source.state().await, State::Running, "it runs while it is copied");
    refused(pair.destination.grant(2, 1, true).await, Code::FailedPrecondition, "ILLEGAL_STATE");

    let request =
        FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch: 1 };
    let finished = pair.source.client.finish_migration(request).await.expect("finish").into_inner();
    let arrived = ready(&mut pair.arriving).await.expect("ready");
    assert_eq!(arrived.state_digest, finished.state_digest);
    assert_eq!(arrived.state_digest.len(), 32);
    // Bit for bit: what was put at the stop is what was read back at the destination.
    assert_eq!(arrived.pmu, finished.pmu);
    assert_eq!(finished.pmu.len(), 2);
    assert!(!finished.was_paused);
    assert_eq!(pair.source.state().await, State::Sealed);
    assert_eq!(pair.destination.state().await, State::Ready);
    refused(pair.source.run().await, Code::FailedPrecondition, "NO_GRANT");
    refused(pair.destination.run().await, Code::FailedPrecondition, "NO_GRANT");
    let at_stop = pair.source.report().await;

    let running = pair.destination.grant(2, 1, true).await.expect("grant");
    let blackout_us = (running - finished.stop_monotonic_ns) / 1000;
    println!(
        "{hypervisor} {}: blackout {blackout_us} us (stop {}, save {}, transfer {}, restore {}), {} bytes, {} rounds, {} pages, {} zero",
        finished.transport,
        finished.stop_us,
        finished.save_us,
        finished.transfer_us,
        arrived.restore_us,
        finished.bytes,
        finished.rounds,
        finished.pages_sent,
        finished.zero_pages
    );
    assert_eq!(pair.destination.state().await, State::Running);
    let after = pair
        .destination
        .report_until("it goes on at the destination", |r| {
            r.vcpus.iter().zip(&at_stop.vcpus).all(|(now, then)| {
                now.heartbeats > then.heartbeats + 100
                    && now.pmis > then.pmis + 1
                    && now.pages_dirtied > then.pages_dirtied
            })
        })
        .await;
    assert!(after.vcpus.iter().all(|v| v.faults == 0), "{after:?}");
    println!("guest gap {} us", after.vcpus.iter().map(|v| v.last_gap_ns).max().unwrap_or(0) / 1000);
    let now = pair.destination.pmu().await;
    for (stop, now) in finished.pmu.iter().zip(&now) {
        assert!(register(now, 0x309) > register(stop, 0x309), "{stop:x?}\n{now:x?}");
        assert!(now.pmis > stop.pmis);
    }
    // The console's history came along.
    let (old, new) = (pair.source.console().await, pair.destination.console().await);
    assert!(
        new.starts_with(&old),
        "{:?}\n{:?}",
        String::from_utf8_lossy(&old),
        String::from_utf8_lossy(&new)
    );
    assert_eq!(pair.source.state().await, State::Sealed, "the source keeps its copy until it is released");
    pair.source.shutdown().await;
    pair.destination.shutdown().await;
}

async fn cancelled_and_again(hypervisor: &str, listen: Option<&str>) {
    let source = started(hypervisor).await;
    let mut pair = begin(source, Host::new(&host_cores(), "vm-m"), hypervisor, 1, listen).await;
    converged(&mut pair.out).await;
    let cancel = CancelMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned() };
    pair.source.client.cancel_migration(cancel).await.expect("cancel");
    let end = loop {
        match pair.out.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert_eq!(end.code(), Code::Cancelled, "{end:?}");
    let failed = ready(&mut pair.arriving).await.expect_err("the destination gives up");
    assert!(!reason(&failed).is_empty(), "{failed:?}");
    pair.destination.shutdown().await;
    assert_eq!(pair.source.state().await, State::Running, "cancel leaves it running");
    let then = pair.source.report().await;
    pair.source
        .report_until("it goes on", |r| {
            r.vcpus.iter().zip(&then.vcpus).all(|(n, t)| n.heartbeats > t.heartbeats + 20)
        })
        .await;

    // The next attempt begins with a full copy and succeeds; memory is the same at both ends.
    let mut pair = begin(pair.source, Host::new(&host_cores(), "vm-m"), hypervisor, 2, listen).await;
    converged(&mut pair.out).await;
    let request =
        FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch: 1 };
    let finished = pair.source.client.finish_migration(request).await.expect("finish").into_inner();
    let arrived = ready(&mut pair.arriving).await.expect("ready");
    assert_eq!(arrived.pmu, finished.pmu);
    assert_eq!(pair.destination.report().await, pair.source.report().await);
    // The owner takes it back instead: a later epoch runs it here again, nothing was lost.
    pair.destination.shutdown().await;
    pair.source.grant(2, 2, true).await.expect("taken back");
    let then = pair.source.report().await;
    let after = pair
        .source
        .report_until("it goes on", |r| {
            r.vcpus.iter().zip(&then.vcpus).all(|(n, t)| n.heartbeats > t.heartbeats + 20)
        })
        .await;
    assert!(after.vcpus.iter().all(|v| v.faults == 0), "{after:?}");
    pair.source.shutdown().await;
}

async fn paused_stays_paused(hypervisor: &str, listen: Option<&str>) {
    let mut source = started(hypervisor).await;
    let images = source.pause().await;
    let mut pair = begin(source, Host::new(&host_cores(), "vm-m"), hypervisor, 1, listen).await;
    converged(&mut pair.out).await;
    let request =
        FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch: 1 };
    let finished = pair.source.client.finish_migration(request).await.expect("finish").into_inner();
    assert!(finished.was_paused);
    assert_eq!(finished.pmu, images);
    let arrived = ready(&mut pair.arriving).await.expect("ready");
    assert_eq!(arrived.pmu, images);
    assert_eq!(pair.destination.grant(2, 1, false).await.expect("grant"), 0);
    assert_eq!(pair.destination.state().await, State::Paused);
    assert_eq!(pair.destination.pmu().await, images);
    pair.destination.run().await.expect("run");
    let report =
        pair.destination.report_until("it goes on", |r| r.vcpus.iter().all(|v| v.heartbeats > 200)).await;
    assert!(report.vcpus.iter().all(|v| v.faults == 0), "{report:?}");
    pair.source.shutdown().await;
    pair.destination.shutdown().await;
}

/// Four hops in a row, each from a worker that it came to by the hop before.
async fn there_and_back(hypervisor: &str, listen: Option<&str>) {
    let mut source = started(hypervisor).await;
    for hop in 1..=4 {
        let mut pair = begin(source, Host::new(&host_cores(), "vm-m"), hypervisor, 1, listen).await;
        converged(&mut pair.out).await;
        let epoch = hop;
        let request =
            FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch };
        let finished = pair.source.client.finish_migration(request).await.expect("finish").into_inner();
        let arrived = ready(&mut pair.arriving).await.expect("ready");
        assert_eq!(arrived.pmu, finished.pmu, "hop {hop}");
        let then = pair.source.report().await;
        pair.destination.grant(epoch + 1, 1, true).await.expect("grant");
        assert_eq!(pair.destination.status().await.migration_id, "");
        let now = pair
            .destination
            .report_until("it goes on", |r| {
                r.vcpus
                    .iter()
                    .zip(&then.vcpus)
                    .all(|(n, t)| n.heartbeats > t.heartbeats + 50 && n.pmis > t.pmis)
            })
            .await;
        assert!(now.vcpus.iter().all(|v| v.faults == 0), "hop {hop}: {now:?}");
        pair.source.shutdown().await;
        source = pair.destination;
    }
    source.shutdown().await;
}

/// A destination that ends during the copy costs nothing; one that ends at the stop leaves the source sealed and whole,
/// and its owner runs it again under a later epoch.
async fn the_destination_goes_away(hypervisor: &str, listen: Option<&str>) {
    let source = started(hypervisor).await;
    let mut pair = begin(source, Host::new(&host_cores(), "vm-m"), hypervisor, 1, listen).await;
    converged(&mut pair.out).await;
    pair.destination.shutdown().await;
    let end = loop {
        match pair.out.message().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("the stream ended without an error"),
            Err(status) => break status,
        }
    };
    assert!(reason(&end).starts_with("DATA_"), "{end:?}");
    let status = pair.source.status().await;
    assert_eq!((status.state(), status.migration_id.as_str()), (State::Running, ""));

    let mut pair = begin(pair.source, Host::new(&host_cores(), "vm-m"), hypervisor, 2, listen).await;
    converged(&mut pair.out).await;
    // Its listener is gone with it, whenever the source notices.
    let (finished, ()) = {
        let request =
            FinishMigrationRequest { fence: pair.source.fence(), migration_id: ID.to_owned(), epoch: 1 };
        let finish = pair.source.client.finish_migration(request);
        let destination = pair.destination;
        tokio::join!(finish, async { drop(destination.shutdown().await) })
    };
    match finished {
        // The state was set before the end: the source is sealed, as after any finish.
        Ok(_) => assert_eq!(pair.source.state().await, State::Sealed),
        Err(status) => {
            assert!(!reason(&status).is_empty(), "{status:?}");
            println!("finish: {}", status.message());
        }
    }
    let then = pair.source.report().await;
    if pair.source.state().await == State::Sealed {
        refused(pair.source.grant(1, 5, true).await, Code::FailedPrecondition, "EPOCH_SEALED");
        pair.source.grant(2, 5, true).await.expect("the owner takes it back");
    }
    let now = pair
        .source
        .report_until("it goes on", |r| {
            r.vcpus.iter().zip(&then.vcpus).all(|(n, t)| n.heartbeats > t.heartbeats + 20)
        })
        .await;
    assert!(now.vcpus.iter().all(|v| v.faults == 0), "{now:?}");
    pair.source.shutdown().await;
}
