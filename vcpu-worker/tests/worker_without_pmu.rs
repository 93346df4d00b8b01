//! A guest whose PMU is disabled runs and moves like any other, and has no images.

mod worker_common;

use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

#[tokio::test(flavor = "multi_thread")]
async fn it_runs_and_moves() {
    const ID: &str = "0b1e0b1e-0000-4000-8000-000000000002";
    for hypervisor in hypervisors() {
        let mut spec = probe_spec(2, 32);
        spec.pmu.as_mut().expect("set").disabled = true;
        let mut source = Host::new(&host_cores(), "vm-n");
        source.attach().await;
        assert_eq!(source.create(hypervisor, spec.clone(), false).await.pmu_shape, None);
        source.grant(1, 1, true).await.expect("grant");
        source.report_until("it beats", |r| r.vcpus.iter().all(|v| v.heartbeats > 50)).await;
        assert_eq!(source.pmu().await, vec![]);

        let mut destination = Host::new(&host_cores(), "vm-n");
        destination.attach().await;
        destination.create(hypervisor, spec, true).await;
        let dir = tempfile::tempdir().expect("tempdir");
        let request = PrepareIncomingRequest {
            fence: destination.fence(),
            migration_id: ID.to_owned(),
            attempt: 1,
            token: vec![1; 32],
            listen: format!("unix:{}/data", dir.path().display()),
            connections: 1,
            memory_bytes: 32 << 20,
            ..Default::default()
        };
        let data_address =
            destination.client.prepare_incoming(request).await.expect("prepare").into_inner().data_address;
        let watch = WatchIncomingRequest { fence: destination.fence(), migration_id: ID.to_owned() };
        let mut arriving = destination.client.watch_incoming(watch).await.expect("watch").into_inner();
        let request = MigrateOutRequest {
            fence: source.fence(),
            migration_id: ID.to_owned(),
            attempt: 1,
            data_address,
            token: vec![1; 32],
            connections: 1,
            max_blackout_us: 50_000,
            max_bandwidth: 0,
            max_duration_ms: 0,
            ..Default::default()
        };
        let mut out = source.client.migrate_out(request).await.expect("migrate out").into_inner();
        while !out.message().await.expect("progress").expect("open").converged {}
        let request = FinishMigrationRequest { fence: source.fence(), migration_id: ID.to_owned(), epoch: 1 };
        let finished = source.client.finish_migration(request).await.expect("finish").into_inner();
        let mut last = IncomingProgress::default();
        while let Some(progress) = arriving.message().await.expect("arriving") {
            last = progress;
        }
        assert!(last.ready);
        assert_eq!(last.state_digest, finished.state_digest);
        let then = source.report().await;
        destination.grant(2, 1, true).await.expect("grant");
        let now = destination
            .report_until("it goes on", |r| {
                r.vcpus.iter().zip(&then.vcpus).all(|(n, t)| n.heartbeats > t.heartbeats + 50)
            })
            .await;
        assert!(now.vcpus.iter().all(|v| v.faults == 0), "{now:?}");
        assert_eq!(source.state().await, State::Sealed);
        source.shutdown().await;
        destination.shutdown().await;
        assert_eq!(worker_threads(), Vec::<String>::new());
    }
}
