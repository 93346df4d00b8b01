//! Several VMs on one core, strict and lazy: the token goes round, each guest's counters are its own.

mod worker_common;

use std::sync::Arc;

use vpmu_proto::api::pmu_spec::SwitchPolicy;
use worker_common::*;

#[tokio::test(flavor = "multi_thread")]
async fn guests_on_one_core_take_turns() {
    for hypervisor in hypervisors() {
        let cores = host_cores();
        let mut hosts = Vec::new();
        for (i, policy) in
            [SwitchPolicy::Strict, SwitchPolicy::Lazy, SwitchPolicy::Lazy].into_iter().enumerate()
        {
            let mut host = Host::new(&cores, &format!("vm-s{i}"));
            host.attach().await;
            let mut spec = probe_spec(1, 32);
            spec.pmu.as_mut().expect("set").switch_policy = policy.into();
            let mut request = host.create_request(hypervisor, spec, false);
            request.vm_name = format!("s{i}");
            request.vcpu_cores = vec![0];
            host.client.create_vm(request).await.expect("create");
            hosts.push(host);
        }
        for host in &mut hosts {
            host.grant(1, 1, true).await.expect("grant");
        }
        let mut before = Vec::new();
        for host in &mut hosts {
            host.report_until("each counts and is interrupted", |r| {
                r.vcpus[0].pmis > 3 && r.vcpus[0].heartbeats > 50
            })
            .await;
            before.push(host.pmu().await);
        }
        // Pausing one leaves the others going, and its own values stay what they are.
        let paused = hosts[1].pause().await;
        for i in [0, 2] {
            let then = hosts[i].report().await.vcpus[0];
            hosts[i].report_until("the others go on", |r| r.vcpus[0].pmis > then.pmis + 2).await;
        }
        assert_eq!(hosts[1].pmu().await, paused);
        hosts[1].run().await.expect("run");
        for (host, before) in hosts.iter_mut().zip(&before) {
            let report = host.report_until("a last turn", |r| r.vcpus[0].pmis > before[0].pmis).await;
            assert_eq!(report.vcpus[0].faults, 0, "{report:?}");
            let now = host.pmu().await;
            assert!(register(&now[0], 0x309) > register(&before[0], 0x309));
        }
        assert!(Arc::strong_count(&cores) > 1);
        for host in hosts {
            host.shutdown().await;
        }
        assert_eq!(cores.slot(0).expect("core 0").waiting(), 0);
        assert_eq!(worker_threads(), Vec::<String>::new());
    }
}
