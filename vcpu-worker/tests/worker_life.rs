//! A virtual machine's life in one worker, through the same calls as a daemon makes.

#![allow(clippy::assigning_clones, reason = "requests are built, not reused")]

mod worker_common;

use tonic::Code;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

/// Everything in one test: whether threads are left behind can only be seen while no other test makes some.
#[tokio::test(flavor = "multi_thread")]
async fn a_probe_lives_and_dies() {
    for hypervisor in hypervisors() {
        println!("on {hypervisor}");
        life(hypervisor).await;
        assert_eq!(worker_threads(), Vec::<String>::new(), "{hypervisor}: threads are left");
    }
    if let Some(hypervisor) = hypervisors().first() {
        refusals(hypervisor).await;
        a_grant_with_a_deadline_pauses(hypervisor).await;
        many_looks_do_not_crowd_out_commands(hypervisor).await;
        dropping_ends_it(hypervisor).await;
    }
}

async fn life(hypervisor: &str) {
    let cores = host_cores();
    let mut host = Host::new(&cores, "vm-1");
    refused(
        host.client.get_status(GetStatusRequest { fence: host.fence() }).await,
        Code::FailedPrecondition,
        "NOT_ATTACHED",
    );
    host.attach().await;
    assert_eq!(host.state().await, State::Empty);
    let created = host.create(hypervisor, probe_spec(2, 64), false).await;
    assert_eq!(created.pmu_shape.map(|s| (s.gp_bitmap, s.fixed_bitmap)), Some((0xff, 0x7)));
    assert_eq!(host.state().await, State::Paused);
    assert_eq!(worker_threads(), vec!["vm-probe/0", "vm-probe/1"]);
    refused(host.run().await, Code::FailedPrecondition, "NO_GRANT");
    assert_eq!(host.state().await, State::Paused);

    assert!(host.grant(1, 1, true).await.expect("grant") > 0);
    assert_eq!(host.state().await, State::Running);
    let report = host
        .report_until("heartbeats and PMIs on both vCPUs", |r| {
            r.vcpus.iter().all(|v| v.heartbeats > 100 && v.pmis > 0)
        })
        .await;
    assert!(report.vcpus.iter().all(|v| v.faults == 0), "{report:?}");

    // Counters move while it runs, without it being stopped.
    let first = host.pmu().await;
    assert_eq!(first.len(), 2);
    host.report_until("more heartbeats", |r| {
        r.vcpus.iter().zip(&report.vcpus).all(|(now, then)| now.heartbeats > then.heartbeats + 20)
    })
    .await;
    let second = host.pmu().await;
    for (a, b) in first.iter().zip(&second) {
        // Fixed counter 0 never takes overflows in the probe's plan.
        assert!(register(b, 0x309) > register(a, 0x309), "{a:x?}\n{b:x?}");
    }
    assert_eq!(host.state().await, State::Running);

    // Paused: nothing moves, and what is read is what Pause returned.
    let paused = host.pause().await;
    assert_eq!(host.state().await, State::Paused);
    let still = host.report().await;
    assert_eq!(host.pmu().await, paused);
    assert_eq!(host.report().await, still);
    assert_eq!(host.pause().await, paused, "pausing twice is one pause");

    host.run().await.expect("run");
    host.report_until("it goes on", |r| {
        r.vcpus
            .iter()
            .zip(&still.vcpus)
            .all(|(now, then)| now.heartbeats > then.heartbeats + 20 && now.pmis > then.pmis)
    })
    .await;
    let status = host.status().await;
    assert!(
        status.vcpus.iter().all(|v| v.exits > 0 && v.pmu_msr_exits > 0 && v.pmis > 0 && v.guest_ns > 0),
        "{status:?}"
    );
    let console = host.console().await;
    assert!(!console.is_empty(), "the probe prints");

    // Fences: a new daemon takes over, the old one's commands are refused.
    let old = host.fence.clone();
    host.fence.term = 2;
    host.attach().await;
    let stale = host.client.pause(PauseRequest { fence: Some(old) }).await;
    refused(stale, Code::FailedPrecondition, "TERM_FENCED");
    assert_eq!(host.state().await, State::Running, "a fenced command changes nothing");

    // Sealed for good.
    let sealed =
        host.client.seal(SealRequest { fence: host.fence(), migration_id: String::new(), epoch: 1 }).await;
    assert_eq!(sealed.expect("seal").into_inner().sealed_epoch, 1);
    assert_eq!(host.state().await, State::Sealed);
    refused(host.run().await, Code::FailedPrecondition, "NO_GRANT");
    refused(host.grant(1, 9, true).await, Code::FailedPrecondition, "EPOCH_SEALED");
    host.grant(2, 1, true).await.expect("a later epoch");
    assert_eq!(host.state().await, State::Running);
    let report = host.report_until("a last look", |r| r.vcpus.len() == 2).await;
    assert!(report.vcpus.iter().all(|v| v.faults == 0), "{report:?}");
    assert_eq!(host.shutdown().await.len(), 2);
}

async fn refusals(hypervisor: &str) {
    let cores = host_cores();
    let mut host = Host::new(&cores, "vm-2");
    host.attach().await;
    let good = host.create_request(hypervisor, probe_spec(1, 64), false);
    let bad = |change: fn(&mut CreateVmRequest)| {
        let mut request = good.clone();
        change(&mut request);
        request
    };
    let cases: [(CreateVmRequest, &str); 10] = [
        (bad(|r| r.vm_name.clear()), "INVALID_FIELD"),
        (bad(|r| r.vm_name.push('\0')), "INVALID_FIELD"),
        (bad(|r| r.spec = None), "INVALID_FIELD"),
        (bad(|r| r.spec.as_mut().unwrap().vcpus = 0), "INVALID_FIELD"),
        (bad(|r| r.spec.as_mut().unwrap().vcpus = 10_000), "INVALID_FIELD"),
        (bad(|r| r.spec.as_mut().unwrap().memory_bytes = (64 << 20) + 4096), "INVALID_FIELD"),
        (bad(|r| r.hypervisor = "bochs".to_owned()), "INVALID_FIELD"),
        (bad(|r| r.vcpu_cores = vec![9999]), "CORE_NOT_AVAILABLE"),
        (bad(|r| r.model_pmu = "amd:v2:6:48".to_owned()), "INVALID_FIELD"),
        (bad(|r| r.spec.as_mut().unwrap().pmu.as_mut().unwrap().gp_counters = 99), "INVALID_FIELD"),
    ];
    for (request, why) in cases {
        refused(host.client.create_vm(request).await, Code::InvalidArgument, why);
        assert_eq!(host.state().await, State::Empty);
    }
    host.client.create_vm(good.clone()).await.expect("create");
    refused(host.client.create_vm(good).await, Code::FailedPrecondition, "WORKER_OCCUPIED");
    let input = WriteConsoleRequest { fence: host.fence(), data: vec![b'x'; 5000] };
    refused(host.client.write_console(input).await, Code::InvalidArgument, "INVALID_FIELD");
    let input = WriteConsoleRequest { fence: host.fence(), data: vec![b'x'; 4096] };
    let taken = host.client.write_console(input).await.expect("input").into_inner().accepted;
    assert_eq!(taken, 4096);
    host.shutdown().await;
}

async fn a_grant_with_a_deadline_pauses(hypervisor: &str) {
    let cores = host_cores();
    let mut host = Host::new(&cores, "vm-3");
    host.attach().await;
    host.create(hypervisor, probe_spec(1, 64), false).await;
    let mut events = host
        .client
        .watch_events(WatchEventsRequest { fence: host.fence() })
        .await
        .expect("watch")
        .into_inner();
    let request = GrantRequest {
        fence: host.fence(),
        epoch: 1,
        seq: 1,
        deadline_boottime_ns: vcpu_worker::host::boottime_ns() + 50_000_000,
        run: true,
    };
    host.client.grant(request).await.expect("grant");
    let until = std::time::Instant::now() + PATIENCE;
    while host.state().await == State::Running {
        assert!(std::time::Instant::now() < until, "it runs on after its grant");
        tokio::task::yield_now().await;
    }
    assert_eq!(host.state().await, State::Paused);
    refused(host.run().await, Code::FailedPrecondition, "GRANT_EXPIRED");
    host.grant(1, 2, true).await.expect("renewed");
    assert_eq!(host.state().await, State::Running);
    host.shutdown().await;
    while let Ok(Some(_)) = events.message().await {}
}

async fn dropping_ends_it(hypervisor: &str) {
    let cores = host_cores();
    let mut host = Host::new(&cores, "vm-4");
    host.attach().await;
    host.create(hypervisor, probe_spec(1, 64), false).await;
    host.grant(1, 1, true).await.expect("grant");
    drop(host);
    let until = std::time::Instant::now() + PATIENCE;
    while !worker_threads().is_empty() {
        assert!(std::time::Instant::now() < until, "left: {:?}", worker_threads());
        tokio::task::yield_now().await;
    }
}

async fn many_looks_do_not_crowd_out_commands(hypervisor: &str) {
    let cores = host_cores();
    let mut host = Host::new(&cores, "vm-5");
    host.attach().await;
    host.create(hypervisor, probe_spec(2, 64), false).await;
    host.grant(1, 1, true).await.expect("grant");
    let mut looks = tokio::task::JoinSet::new();
    for _ in 0..300 {
        let (mut client, fence) = (host.client.clone(), host.fence());
        looks.spawn(async move { client.get_pmu(GetPmuRequest { fence }).await });
    }
    for _ in 0..10 {
        host.pause().await;
        host.run().await.expect("run");
    }
    while let Some(look) = looks.join_next().await {
        assert_eq!(look.expect("task").expect("a look").into_inner().pmu.len(), 2);
    }
    host.shutdown().await;
}
