//! Cores of a machine's own through the public API, judged by where the kernel says that each thread is.

mod support;

use std::collections::BTreeSet;
use std::time::Instant;

use support::guest::{Workers, alive, filled, until_filled};
use support::threads::{is_vcpu, threads, two_cores, vcpu_scheduling};
use support::*;
use tonic::Code;
use vpmu_proto::api::cpu_placement::{Arrangement, Policy};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

/// Waits until every thread of the process that runs no vCPU may be on exactly these cores.
async fn until_kept_to(pid: u32, cores: &BTreeSet<u32>) {
    let begin = Instant::now();
    loop {
        let all = threads(pid);
        if all.iter().all(|(name, allowed)| is_vcpu(name) || allowed == cores) {
            return;
        }
        assert!(begin.elapsed() < DEADLINE, "not kept to {cores:?}: {all:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn placed(vcpus: u32, placement: CpuPlacement) -> VirtualMachineSpec {
    VirtualMachineSpec { placement: Some(placement), ..probe_spec(vcpus, 16) }
}

fn dedicated() -> CpuPlacement {
    CpuPlacement { policy: Policy::Dedicated.into(), ..CpuPlacement::default() }
}

#[tokio::test]
async fn a_dedicated_core_is_left_by_everybody_else() {
    let Some(all) = two_cores() else { return };
    for isolation in ["thread", "process"] {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut host =
            Host::start(dir.path(), &["--hypervisor", "simulated", "--isolation", isolation, "--stop-vms"])
                .await;
        let pid = host.child.id().expect("running");
        let everywhere: BTreeSet<u32> = all.iter().copied().collect();
        until_kept_to(pid, &everywhere).await;

        host.create("own", placed(1, dedicated())).await;
        let own = host.try_start_vm("own").await.expect("started");
        let [core] = own.vcpu_cores[..] else { panic!("one core: {own:?}") };
        let topology = vcpu_worker::host::Topology::of_this_host();
        let threads_of_core: BTreeSet<u32> = topology.threads_of(core).collect();
        let rest: BTreeSet<u32> = everywhere.difference(&threads_of_core).copied().collect();
        assert!(!rest.is_empty(), "the host keeps a core");
        until_kept_to(pid, &rest).await;
        let worker = if own.worker_pid == 0 { pid } else { own.worker_pid };
        until_kept_to(worker, &rest).await;
        let vcpus: Vec<_> = threads(worker).into_iter().filter(|(name, _)| is_vcpu(name)).collect();
        assert_eq!(
            vcpus.iter().map(|(_, cores)| cores.clone()).collect::<Vec<_>>(),
            [BTreeSet::from([core])]
        );
        assert_eq!(host.until_counting("own").await.vcpus[0].core, core);

        // Shared machines go elsewhere, by choice and by list.
        host.create("other", probe_spec(3, 16)).await;
        let other = host.try_start_vm("other").await.expect("started");
        assert!(other.vcpu_cores.iter().all(|core| rest.contains(core)), "{other:?}");
        let there = CpuPlacement { cores: vec![core], ..CpuPlacement::default() };
        host.create("there", placed(1, there)).await;
        assert_eq!(host.try_start_vm("there").await.expect_err("refused"), "CORE_TAKEN");
        assert_eq!(host.get("there").await.observed_state(), State::Stopped, "nothing of it failed");
        let shown =
            host.pmu().await.get_host_pmu_capabilities(GetHostPmuCapabilitiesRequest {}).await.expect("host");
        let shown = shown.into_inner().topology;
        let cpu = shown.iter().find(|cpu| cpu.cpu == core).expect("shown");
        assert_eq!((cpu.dedicated_to.as_str(), cpu.vcpus, cpu.usable), ("own", 1, true));
        assert_eq!(shown.iter().map(|cpu| cpu.vcpus).sum::<u32>(), 4);

        // More than there are: refused by count, and everything is given back in the end.
        host.create("many", placed(256, dedicated())).await;
        assert_eq!(host.try_start_vm("many").await.expect_err("refused"), "CORES_EXHAUSTED");
        host.stop_vm("own").await;
        until_kept_to(pid, &everywhere).await;
        if let Some(pid) = Some(other.worker_pid).filter(|pid| *pid != 0) {
            until_kept_to(pid, &everywhere).await;
        }
        let there = host.try_start_vm("there").await.expect("free again");
        assert_eq!(there.vcpu_cores, [core]);
        assert_eq!(host.terminate().await, 0);
    }
}

/// Spares that were made before the core was dedicated are not left on it.
#[tokio::test]
async fn spare_workers_leave_a_dedicated_core_too() {
    let Some(all) = two_cores() else { return };
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--isolation", "process", "--spare-workers", "2", "--stop-vms"];
    let mut host = Host::start(dir.path(), &options).await;
    let run = dir.path().join("state/run");
    let spares = || -> Vec<u32> {
        let entries = std::fs::read_dir(&run).into_iter().flatten().flatten();
        let spares = entries.filter(|e| e.file_name().to_string_lossy().starts_with("spare"));
        let identities = spares.filter_map(|e| vcpu_worker::process::Identity::read(&e.path()));
        let ready = |pid: u32| {
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap_or_default();
            log.contains(&format!("spare worker {pid} waits"))
        };
        identities.map(|identity| identity.pid).filter(|pid| ready(*pid)).collect()
    };
    let begin = Instant::now();
    while spares().len() < 2 {
        assert!(begin.elapsed() < DEADLINE, "spares: {:?}", spares());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    host.create("own", placed(1, dedicated())).await;
    let own = host.try_start_vm("own").await.expect("started");
    let [core] = own.vcpu_cores[..] else { panic!("one core: {own:?}") };
    let threads_of_core: BTreeSet<u32> =
        vcpu_worker::host::Topology::of_this_host().threads_of(core).collect();
    let rest: BTreeSet<u32> = all.iter().copied().filter(|cpu| !threads_of_core.contains(cpu)).collect();
    let begin = Instant::now();
    loop {
        let spares = spares();
        let masks: Vec<_> = spares.iter().flat_map(|pid| threads(*pid)).collect();
        if spares.len() == 2 && masks.len() >= 2 && masks.iter().all(|(_, cores)| *cores == rest) {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "not all of them keep to {rest:?}: {masks:?}");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(host.terminate().await, 0);
}

/// The threads of a host, in its daemon and in its workers, that carry a machine's memory, once all of `names` are
/// there and kept to `cores`.
async fn until_data_threads_keep_to(host: &Host, names: &[String], cores: &BTreeSet<u32>) {
    let runtime = [host.dir.join("state/run")];
    let begin = Instant::now();
    loop {
        let daemon = host.child.id().expect("running");
        let processes = alive(&runtime).into_iter().map(|worker| worker.pid).chain([daemon]);
        let found: Vec<_> = processes.flat_map(threads).filter(|(name, _)| names.contains(name)).collect();
        if found.len() == names.len() && found.iter().all(|(_, allowed)| allowed == cores) {
            return;
        }
        let seen = || std::fs::read_to_string(host.dir.join("log")).unwrap_or_default();
        assert!(begin.elapsed() < DEADLINE, "{names:?} keep to {found:?}, not to {cores:?}: {}", seen());
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

async fn until_copying(host: &Host, migration: &str) {
    let begin = Instant::now();
    loop {
        let request = GetMigrationRequest { name: migration.to_owned() };
        let now = host.migrations().await.get_migration(request).await.expect("there").into_inner();
        assert!(now.end_time.is_none() && begin.elapsed() < DEADLINE, "it does not copy: {now:?}");
        if now.progress.is_some_and(|p| p.round == 1) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn data_threads_of_every_connection_stay_off_a_dedicated_core() {
    // More than glibc has heaps at first: a thread that starts then must not need what its filter forbids.
    const CONNECTIONS: u32 = 12;
    let side = |first: &str, others: &str| -> Vec<String> {
        std::iter::once(first.to_owned()).chain((1..CONNECTIONS).map(|n| format!("{others}-{n}"))).collect()
    };
    let (outgoing, incoming) = (side("vpmud-out", "vpmud-data"), side("vpmud-in", "vpmud-recv"));
    let Some(all) = two_cores() else { return };
    let everywhere: BTreeSet<u32> = all.iter().copied().collect();
    let topology = vcpu_worker::host::Topology::of_this_host();
    for isolation in ["thread", "process"] {
        let dir = tempfile::tempdir().expect("tempdir");
        let _workers = Workers(["a", "b"].map(|side| dir.path().join(side).join("state/run")).to_vec());
        let options = ["--hypervisor", "simulated", "--isolation", isolation, "--stop-vms"];
        let mut a = Host::start(&dir.path().join("a"), &options).await;
        let mut b = Host::start(&dir.path().join("b"), &options).await;
        let mut rest = Vec::new();
        for host in [&a, &b] {
            host.create("own", placed(1, dedicated())).await;
            let own = host.try_start_vm("own").await.expect("started");
            let taken: BTreeSet<u32> = topology.threads_of(own.vcpu_cores[0]).collect();
            rest.push(everywhere.difference(&taken).copied().collect::<BTreeSet<u32>>());
        }
        a.create("vm", filled(1, 32, 16)).await;
        a.try_start_vm("vm").await.expect("started");
        until_filled(&a, "vm").await;
        // So slow that it is in its first round to the end.
        let spec = MigrationSpec { connections: CONNECTIONS, max_bandwidth: 1 << 20, ..b.arrival() };
        let operation = a.migrate("vm", spec).await;
        let migration: Migration = unpack(operation.metadata.as_ref().expect("metadata"));
        until_copying(&a, &migration.name).await;
        until_data_threads_keep_to(&a, &outgoing, &rest[0]).await;
        until_data_threads_keep_to(&b, &incoming, &rest[1]).await;
        // They go where there is room, and leave again, in the middle of a round.
        for host in [&a, &b] {
            host.stop_vm("own").await;
        }
        until_data_threads_keep_to(&a, &outgoing, &everywhere).await;
        until_data_threads_keep_to(&b, &incoming, &everywhere).await;
        for host in [&a, &b] {
            host.try_start_vm("own").await.expect("started");
        }
        until_data_threads_keep_to(&a, &outgoing, &rest[0]).await;
        until_data_threads_keep_to(&b, &incoming, &rest[1]).await;
        let cancel = CancelMigrationRequest { name: migration.name };
        a.migrations().await.cancel_migration(cancel).await.expect("cancelled");
        let cancelled = a.finish(operation).await.expect_err("cancelled");
        assert_eq!(reason_of(&cancelled), "CANCELLED", "{cancelled:?}");
        assert_eq!((a.terminate().await, b.terminate().await), (0, 0));
    }
}

#[tokio::test]
async fn a_dedicated_machine_that_outlived_its_daemon_keeps_its_core() {
    if two_cores().is_none() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated", "--isolation", "process"]).await;
    host.create("own", placed(1, dedicated())).await;
    let own = host.try_start_vm("own").await.expect("started");
    let core = own.vcpu_cores[0];
    host.kill().await;
    host.restart().await;
    let back = host.until("own", "found again", is(State::Running)).await;
    assert_eq!((&back.vcpu_cores, back.worker_pid), (&own.vcpu_cores, own.worker_pid));
    let pid = host.child.id().expect("running");
    let own_core: BTreeSet<u32> = vcpu_worker::host::Topology::of_this_host().threads_of(core).collect();
    let rest =
        vcpu_worker::host::allowed_cores().into_iter().filter(|core| !own_core.contains(core)).collect();
    until_kept_to(pid, &rest).await;
    host.create("there", placed(1, CpuPlacement { cores: vec![core], ..CpuPlacement::default() })).await;
    assert_eq!(host.try_start_vm("there").await.expect_err("refused"), "CORE_TAKEN");
    host.stop_vm("own").await;
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn fifo_is_set_where_it_is_asked_for() {
    if two_cores().is_none() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    let pid = host.child.id().expect("running");
    host.create("plain", probe_spec(1, 16)).await;
    host.try_start_vm("plain").await.expect("started");
    assert_eq!(vcpu_scheduling(pid), [(0, 0)]);
    host.stop_vm("plain").await;
    host.create("fifo", placed(1, CpuPlacement { fifo_priority: 7, ..dedicated() })).await;
    match host.try_start_vm("fifo").await {
        Ok(_) => assert_eq!(vcpu_scheduling(pid), [(1, 7)], "SCHED_FIFO"),
        // Without CAP_SYS_NICE it is refused, and no thread is left.
        Err(reason) => {
            assert_eq!(reason, "THREAD_FAILED");
            assert_eq!(vcpu_scheduling(pid), []);
        }
    }
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn placements_that_cannot_be_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    let mut vms = host.vms().await;
    let core = vcpu_worker::host::allowed_cores()[0];
    for (placement, reason, field) in [
        (CpuPlacement { cores: vec![core, core], ..dedicated() }, "CORES_OVERLAP", "cores"),
        (CpuPlacement { cores: vec![core, core], ..CpuPlacement::default() }, "CORES_OVERLAP", "cores"),
        (CpuPlacement { cores: vec![core, 4_000_000], ..dedicated() }, "CORE_UNKNOWN", "cores"),
        (CpuPlacement { cores: vec![core], ..dedicated() }, "CORES_COUNT", "cores"),
        (CpuPlacement { cores: vec![core; 300_000], ..CpuPlacement::default() }, "CORES_COUNT", "cores"),
        (CpuPlacement { policy: 9, ..CpuPlacement::default() }, "BAD_POLICY", "policy"),
        (CpuPlacement { arrangement: 9, ..dedicated() }, "BAD_ARRANGEMENT", "arrangement"),
        (
            CpuPlacement { arrangement: Arrangement::Spread.into(), ..CpuPlacement::default() },
            "ARRANGEMENT_WITHOUT_CHOICE",
            "arrangement",
        ),
        (CpuPlacement { fifo_priority: 100, ..dedicated() }, "FIFO_PRIORITY_OUT_OF_RANGE", "fifo_priority"),
        (
            CpuPlacement { fifo_priority: 1, ..CpuPlacement::default() },
            "FIFO_NEEDS_DEDICATED",
            "fifo_priority",
        ),
    ] {
        let refused = vms.create_virtual_machine(create("bad", placed(2, placement))).await;
        let status = expect_error(refused, Code::InvalidArgument, reason);
        let field = format!("virtual_machine.spec.placement.{field}");
        assert!(status.message().starts_with(&field), "{}", status.message());
    }
    let offline = vcpu_worker::host::Topology::of_this_host().offline().next();
    if let Some(offline) = offline {
        let placement = CpuPlacement { cores: vec![offline], ..CpuPlacement::default() };
        let refused = vms.create_virtual_machine(create("bad", placed(1, placement))).await;
        expect_error(refused, Code::InvalidArgument, "CORE_OFFLINE");
    }
    assert_eq!(host.list().await, []);
    assert_eq!(host.terminate().await, 0);
}
