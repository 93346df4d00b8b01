//! vCPUs that go to other cores while their guest counts: nothing is lost, nothing stays behind, all go or none.

mod worker_common;

use std::collections::BTreeSet;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tonic::Code;
use vcpu_worker::cores::HostCores;
use vcpu_worker::hypervisor::Kick;
use vcpu_worker::service::WorkerOptions;
use vpmu_proto::api::pmu_spec::SwitchPolicy;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

/// Fixed counter 0: counts from the probe's first turns on, without end.
const INSTRUCTIONS: u32 = 0x309;
/// What the model counts there in a nanosecond of guest time.
const PER_NS: u64 = 3;

async fn place(host: &mut Host, cores: &[u32]) -> Result<Vec<u32>, tonic::Status> {
    let request =
        UpdatePlacementRequest { fence: host.fence(), vcpu_cores: cores.to_vec(), fifo_priority: 0 };
    Ok(host.client.update_placement(request).await?.into_inner().vcpu_cores)
}

/// Allowed cores of each vCPU thread of machine `name`, in vCPU order, as the kernel says.
fn pinned(name: &str) -> Vec<BTreeSet<u32>> {
    let mut threads: Vec<(String, BTreeSet<u32>)> = std::fs::read_dir("/proc/self/task")
        .expect("threads")
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .map(|status| {
            let field = |key: &str| {
                status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned()
            };
            let cores = field("Cpus_allowed_list:");
            let cores = cores.split(',').flat_map(|part| {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                first.parse::<u32>().expect("a number")..=last.parse().expect("a number")
            });
            (field("Name:"), cores.collect())
        })
        .filter(|(thread, _)| thread.starts_with(&format!("vm-{name}/")))
        .collect();
    threads.sort();
    threads.into_iter().map(|(_, cores)| cores).collect()
}

fn at(cores: &[u32]) -> Vec<BTreeSet<u32>> {
    cores.iter().map(|core| BTreeSet::from([*core])).collect()
}

/// Registers of a core's model that are not 0, read raw.
fn left_behind(cores: &Arc<HostCores>, core: u32) -> Vec<(u32, u64)> {
    struct Nobody;
    impl Kick for Nobody {
        fn kick(&self) {}
    }
    let nobody: Arc<dyn Kick> = Arc::new(Nobody);
    let slot = cores.slot(core).expect("a core of this host");
    let token = slot.acquire(&nobody);
    let mut core_pmu = token.core();
    let ranges = pmu::PMU_MSR_RANGES.iter().flat_map(|(first, count)| *first..first + count);
    ranges
        .filter_map(|msr| Some((msr, core_pmu.peek(msr).ok()?)))
        .filter(|(msr, v)| *v != 0 && *msr != 0x345)
        .collect()
}

struct Moment {
    instructions: Vec<u64>,
    guest_ns: Vec<u64>,
}

async fn pause(host: &mut Host) -> Moment {
    let images = host.pause().await;
    let status = host.status().await;
    Moment {
        instructions: images.iter().map(|image| register(image, INSTRUCTIONS)).collect(),
        guest_ns: status.vcpus.iter().map(|vcpu| vcpu.guest_ns).collect(),
    }
}

/// A worker whose model counts a whole number of instructions a nanosecond.
fn whole_events(cores: &Arc<HostCores>) -> Host {
    let mut options = WorkerOptions::new(Arc::clone(cores), CancellationToken::new());
    options.rates.instructions = PER_NS * 1_000_000_000;
    Host::with(options, "vm-m")
}

async fn until_counting(host: &mut Host, vcpus: usize) {
    host.report_until("all count", |r| r.vcpus.len() == vcpus && r.vcpus.iter().all(|v| v.heartbeats > 20))
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn counts_go_on_exactly_and_the_old_core_is_clean() {
    let cores = host_cores();
    let ids = cores.ids();
    if ids.len() < 2 {
        println!("skipped: one core, nowhere to go");
        return;
    }
    for hypervisor in hypervisors() {
        for policy in [SwitchPolicy::Strict, SwitchPolicy::Lazy] {
            let mut host = whole_events(&cores);
            host.attach().await;
            let mut spec = probe_spec(1, 32);
            spec.pmu.as_mut().expect("set").switch_policy = policy.into();
            let mut request = host.create_request(hypervisor, spec, false);
            request.vm_name = "moves".to_owned();
            request.vcpu_cores = vec![ids[0]];
            host.client.create_vm(request).await.expect("create");
            host.grant(1, 1, true).await.expect("grant");
            until_counting(&mut host, 1).await;
            let before = pause(&mut host).await;
            assert!(before.instructions[0] > 0);
            host.run().await.expect("run");
            for turn in 0..40 {
                let (from, to) = (ids[turn % 2], ids[(turn + 1) % 2]);
                assert_eq!(place(&mut host, &[to]).await.expect("moved"), [to]);
                assert_eq!(pinned("moves"), at(&[to]));
                assert_eq!(host.status().await.vcpus[0].core, to);
                assert_eq!(left_behind(&cores, from), [], "{hypervisor} {policy:?}");
                let heard = host.report().await.vcpus[0].heartbeats;
                host.report_until("it runs on", |r| r.vcpus[0].heartbeats > heard).await;
            }
            // Every nanosecond that the guest had was counted, on whichever core: none lost, none twice.
            let after = pause(&mut host).await;
            let (counted, ran) =
                (after.instructions[0] - before.instructions[0], after.guest_ns[0] - before.guest_ns[0]);
            assert_eq!(counted, ran * PER_NS, "{hypervisor} {policy:?}");
            assert!(ran > 0);
            // Paused: the image is the same to the bit on the other core.
            let still = host.pmu().await;
            assert_eq!(place(&mut host, &[ids[1]]).await.expect("moved"), [ids[1]]);
            assert_eq!(host.pmu().await, still);
            assert_eq!(host.state().await, State::Paused);
            host.run().await.expect("run");
            let then = host.report().await.vcpus[0];
            let now = host.report_until("overflows arrive", |r| r.vcpus[0].pmis > then.pmis + 2).await;
            assert_eq!(now.vcpus[0].faults, 0, "the guest saw nothing of it: {now:?}");
            host.shutdown().await;
            for core in &ids {
                assert_eq!(left_behind(&cores, *core), []);
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_go_or_none() {
    let hypervisor = hypervisors()[0];
    let n = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    // A core that this worker was told of and the kernel does not have.
    const GONE: u32 = 1000;
    let ids: Vec<u32> = (0..n).chain([GONE]).collect();
    let cores = Arc::new(HostCores::new(MODEL.parse().expect("a shape"), &ids));
    let mut host = Host::new(&cores, "vm-n");
    host.attach().await;
    let mut request = host.create_request(hypervisor, probe_spec(3, 32), false);
    request.vm_name = "stays".to_owned();
    let old: Vec<u32> = (0..3).map(|vcpu| vcpu % n).collect();
    request.vcpu_cores.clone_from(&old);
    host.client.create_vm(request).await.expect("create");
    host.grant(1, 1, true).await.expect("grant");
    until_counting(&mut host, 3).await;
    let last = n - 1;
    for asked in [[last, last, GONE], [GONE, 0, 0], [last, GONE, last]] {
        let answer = place(&mut host, &asked).await;
        let status = answer.expect_err("the kernel has no such core");
        assert_eq!((status.code(), reason(&status).as_str()), (Code::FailedPrecondition, "PLACEMENT_FAILED"));
        assert!(status.message().contains("again"), "{}", status.message());
        assert_eq!(pinned("stays"), at(&old));
        assert_eq!(host.status().await.vcpus.iter().map(|v| v.core).collect::<Vec<_>>(), old);
    }
    refused(place(&mut host, &[0, 0, 5000]).await, Code::InvalidArgument, "CORE_NOT_AVAILABLE");
    refused(place(&mut host, &[0, 0]).await, Code::InvalidArgument, "INVALID_FIELD");
    let request = UpdatePlacementRequest { fence: host.fence(), vcpu_cores: old.clone(), fifo_priority: 100 };
    refused(host.client.update_placement(request).await, Code::InvalidArgument, "INVALID_FIELD");
    let then = host.report().await;
    let on = |r: &vpmu_proto::api::ProbeReport| {
        r.vcpus.iter().zip(&then.vcpus).all(|(now, then)| now.heartbeats > then.heartbeats && now.faults == 0)
    };
    host.report_until("all go on as if nothing had been", on).await;
    host.shutdown().await;
    assert_eq!(pinned("stays"), at(&[]), "no thread is left");
}

/// What the kernel says about the policy of the memory of machine `name` in this process: `default`, `bind:0`, …
fn memory_policy(name: &str) -> String {
    let maps = std::fs::read_to_string("/proc/self/numa_maps").expect("numa_maps");
    let memory = format!("/memfd:{name}");
    let found: Vec<_> = maps.lines().filter(|line| line.contains(&memory)).collect();
    assert_eq!(found.len(), 1, "one mapping of {name}: {found:?}");
    found[0].split_whitespace().nth(1).expect("a policy").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_bound_to_the_nodes_of_the_request() {
    if !std::path::Path::new("/proc/self/numa_maps").exists() {
        println!("skipped: this kernel has no NUMA policy");
        return;
    }
    let cores = host_cores();
    let node = *vcpu_worker::host::Topology::of_this_host().nodes().first().expect("a node");
    for hypervisor in hypervisors() {
        for (name, nodes, expected) in
            [("anywhere", vec![], "default".to_owned()), ("bound", vec![node], format!("bind:{node}"))]
        {
            let mut host = Host::new(&cores, "vm-b");
            host.attach().await;
            let mut request = host.create_request(hypervisor, probe_spec(1, 32), false);
            request.vm_name = name.to_owned();
            request.placement = Some(ThreadPlacement { memory_nodes: nodes, ..ThreadPlacement::default() });
            host.client.create_vm(request).await.expect("create");
            host.grant(1, 1, true).await.expect("grant");
            until_counting(&mut host, 1).await;
            assert_eq!(memory_policy(name), expected, "{hypervisor}");
            host.shutdown().await;
        }
        let mut host = Host::new(&cores, "vm-c");
        host.attach().await;
        let mut request = host.create_request(hypervisor, probe_spec(1, 32), false);
        request.placement = Some(ThreadPlacement { memory_nodes: vec![1023], ..ThreadPlacement::default() });
        refused(host.client.create_vm(request).await, Code::ResourceExhausted, "GUEST_MEMORY");
        host.shutdown().await;
    }
}
