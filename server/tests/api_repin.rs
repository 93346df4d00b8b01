//! `UpdateVcpuPlacement`: where the kernel says that each vCPU thread is, in both kinds of isolation, and what is left
//! as it was when a move is refused or comes to nothing.

mod support;

use std::collections::BTreeSet;

use support::load::Reaper;
use support::threads::{Cpuset, pinned, two_cores, vcpu_scheduling};
use support::*;
use tonic::{Code, Status};
use vpmu_proto::api::cpu_placement::Policy;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const ISOLATIONS: [&str; 2] = ["thread", "process"];

async fn host(dir: &std::path::Path, isolation: &str) -> Host {
    Host::start(dir, &["--hypervisor", "simulated", "--isolation", isolation, "--stop-vms"]).await
}

/// Cores that vCPUs may have; none, and it says so, where there is only one.
fn shared(cores: &[u32]) -> CpuPlacement {
    CpuPlacement { cores: cores.to_vec(), ..CpuPlacement::default() }
}

fn dedicated(cores: &[u32]) -> CpuPlacement {
    CpuPlacement { policy: Policy::Dedicated.into(), ..shared(cores) }
}

fn placed(vcpus: u32, placement: CpuPlacement) -> VirtualMachineSpec {
    VirtualMachineSpec { placement: Some(placement), ..probe_spec(vcpus, 16) }
}

async fn place(host: &Host, id: &str, to: CpuPlacement, etag: &str) -> Result<VirtualMachine, Status> {
    let request = UpdateVcpuPlacementRequest { name: name(id), placement: Some(to), etag: etag.to_owned() };
    Ok(host.vms().await.update_vcpu_placement(request).await?.into_inner())
}

/// The process in which the machine's vCPUs are.
fn process(host: &Host, vm: &VirtualMachine) -> u32 {
    if vm.worker_pid == 0 { host.child.id().expect("running") } else { vm.worker_pid }
}

fn at(cores: &[u32]) -> Vec<BTreeSet<u32>> {
    cores.iter().map(|core| BTreeSet::from([*core])).collect()
}

/// Whom each core is dedicated to, and how many vCPUs are on it, as the host shows it.
async fn held(host: &Host) -> Vec<(u32, String, u32)> {
    let shown = host.pmu().await.get_host_pmu_capabilities(GetHostPmuCapabilitiesRequest {}).await;
    let cpus = shown.expect("host").into_inner().topology;
    cpus.into_iter().map(|cpu| (cpu.cpu, cpu.dedicated_to, cpu.vcpus)).filter(|(.., n)| *n > 0).collect()
}

/// Waits until every vCPU has done something since now.
async fn until_it_goes_on(host: &Host, id: &str) {
    let beats = |pmu: Pmu| pmu.probe.expect("probe").vcpus.iter().map(|v| v.heartbeats).collect::<Vec<_>>();
    let then = beats(host.until_counting(id).await);
    let begin = std::time::Instant::now();
    while beats(host.live_pmu(id).await).iter().zip(&then).any(|(now, then)| now <= then) {
        assert!(begin.elapsed() < DEADLINE, "{id} does not go on");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn vcpus_are_where_the_api_says_that_they_went() {
    let Some(all) = two_cores() else { return };
    let (a, b) = (all[0], all[1]);
    for isolation in ISOLATIONS {
        let dir = tempfile::tempdir().expect("tempdir");
        let _reaper = Reaper(vec![dir.path().to_owned()]);
        let mut host = host(dir.path(), isolation).await;
        host.create("vm", placed(3, shared(&[a]))).await;
        // Not running: the record alone, and the next start goes by it.
        let stopped = place(&host, "vm", shared(&[b]), "").await.expect("noted");
        assert_eq!((stopped.observed_state(), &stopped.vcpu_cores[..]), (State::Stopped, &[][..]));
        let started = host.start_vm("vm").await;
        assert_eq!(started.vcpu_cores, [b, b, b]);
        let pid = process(&host, &started);
        assert_eq!(pinned(pid, "vm"), at(&[b, b, b]));
        let mut etags = BTreeSet::from([started.etag.clone()]);
        let mut last = started;
        for (list, expected) in [(vec![a, b], [a, b, a]), (vec![b, a], [b, a, b]), (vec![a], [a, a, a])] {
            let moved = place(&host, "vm", shared(&list), &last.etag).await.expect("moved");
            assert_eq!(moved.vcpu_cores, expected, "{isolation}");
            assert_eq!(pinned(pid, "vm"), at(&expected), "{isolation}");
            assert_eq!(moved.spec.as_ref().expect("spec").placement, Some(shared(&list)));
            assert_eq!((moved.observed_state(), process(&host, &moved)), (State::Running, pid));
            assert!(etags.insert(moved.etag.clone()), "a change has a tag of its own");
            assert_eq!(host.get("vm").await, moved);
            until_it_goes_on(&host, "vm").await;
            let counting = host.live_pmu("vm").await.vcpus;
            assert_eq!(counting.iter().map(|v| v.core).collect::<Vec<_>>(), expected);
            last = moved;
        }
        // Paused: the same, and it stays paused.
        let pause = PauseVirtualMachineRequest { name: name("vm") };
        host.vms().await.pause_virtual_machine(pause).await.expect("paused");
        let moved = place(&host, "vm", shared(&[b]), "").await.expect("moved");
        assert_eq!((moved.observed_state(), pinned(pid, "vm")), (State::Paused, at(&[b, b, b])));
        host.stop_vm("vm").await;
        assert_eq!(held(&host).await, []);
        assert_eq!(host.terminate().await, 0);
    }
}

#[tokio::test]
async fn what_is_refused_changes_nothing() {
    let Some(all) = two_cores() else { return };
    let (a, b) = (all[0], all[1]);
    for isolation in ISOLATIONS {
        let dir = tempfile::tempdir().expect("tempdir");
        let _reaper = Reaper(vec![dir.path().to_owned()]);
        let mut host = host(dir.path(), isolation).await;
        host.create("own", placed(1, dedicated(&[b]))).await;
        host.start_vm("own").await;
        host.create("vm", placed(2, shared(&[a]))).await;
        let vm = host.start_vm("vm").await;
        let (pid, held_before) = (process(&host, &vm), held(&host).await);
        let list = |cores: &[u32]| shared(cores);
        let (taken, invalid) = (Code::ResourceExhausted, Code::InvalidArgument);
        for (to, etag, code, reason) in [
            (list(&[a]), "another", Code::Aborted, "ETAG_MISMATCH"),
            (list(&[a, b]), "", taken, "CORE_TAKEN"),
            (list(&[a, 4_000_000]), "", invalid, "CORE_UNKNOWN"),
            (list(&[a, b, 0]), "", invalid, "CORES_COUNT"),
            (list(&[a, a]), "", invalid, "CORES_OVERLAP"),
            (dedicated(&[a]), "", invalid, "CORES_COUNT"),
            (dedicated(&[a, b]), "", taken, "CORE_TAKEN"),
            (CpuPlacement { fifo_priority: 3, ..list(&[a]) }, "", invalid, "FIFO_NEEDS_DEDICATED"),
        ] {
            let status = expect_error(place(&host, "vm", to.clone(), etag).await, code, reason);
            if code == taken {
                assert!(status.message().contains("dedicated to machine own"), "{}", status.message());
            }
            assert_eq!(host.get("vm").await, vm, "{isolation} {to:?}");
            assert_eq!(pinned(pid, "vm"), at(&[a, a]), "{isolation} {to:?}");
            assert_eq!(held(&host).await, held_before, "{isolation} {to:?}");
        }
        let none = UpdateVcpuPlacementRequest { name: name("vm"), ..UpdateVcpuPlacementRequest::default() };
        expect_error(host.vms().await.update_vcpu_placement(none).await, invalid, "FIELD_REQUIRED");
        expect_error(
            place(&host, "nobody", list(&[a]), "").await,
            Code::NotFound,
            "VIRTUAL_MACHINE_NOT_FOUND",
        );
        assert_eq!(host.get("vm").await, vm);
        until_it_goes_on(&host, "vm").await;
        assert_eq!(host.terminate().await, 0);
    }
}

/// The kernel refuses one of two: the other, which has gone, comes back. Then it refuses the way back too, and nobody
/// else gets either place until a move succeeds.
#[tokio::test]
async fn a_move_that_the_kernel_refuses_is_undone_or_said_to_be_uncertain() {
    let Some(all) = two_cores() else { return };
    let (a, b) = (all[0], all[1]);
    for isolation in ISOLATIONS {
        let Some(cpuset) = Cpuset::new(&format!("repin-{isolation}"), &a.to_string()) else { return };
        let dir = tempfile::tempdir().expect("tempdir");
        let _reaper = Reaper(vec![dir.path().to_owned()]);
        let mut host = host(dir.path(), isolation).await;
        host.create("vm", placed(2, shared(&[a]))).await;
        let vm = host.start_vm("vm").await;
        let pid = process(&host, &vm);
        let before = held(&host).await;
        assert_eq!(before, [(a, String::new(), 2)]);

        cpuset.hold(pid);
        for list in [[b, a], [a, b]] {
            let failed = place(&host, "vm", shared(&list), "").await;
            let status = expect_error(failed, Code::FailedPrecondition, "PLACEMENT_FAILED");
            assert!(status.message().contains(&format!("core {b}")), "{}", status.message());
            assert_eq!(host.get("vm").await, vm, "{isolation}");
            assert_eq!(pinned(pid, "vm"), at(&[a, a]), "{isolation}");
            assert_eq!(held(&host).await, before, "{isolation}");
        }
        until_it_goes_on(&host, "vm").await;

        // From two cores, of which one is taken away.
        cpuset.allow(&format!("{a},{b}"));
        let two = place(&host, "vm", shared(&[a, b]), "").await.expect("moved");
        assert_eq!(pinned(pid, "vm"), at(&[a, b]));
        cpuset.allow(&a.to_string());
        let failed = place(&host, "vm", shared(&[b, a]), "").await;
        expect_error(failed, Code::Internal, "PLACEMENT_UNCERTAIN");
        assert_eq!(host.get("vm").await, two, "{isolation}: the record is of what was asked for and granted");
        assert_eq!(held(&host).await, [(a, String::new(), 2), (b, String::new(), 2)], "both places are kept");

        cpuset.release();
        let settled = place(&host, "vm", shared(&[a]), "").await.expect("moved");
        assert_eq!((settled.vcpu_cores, pinned(pid, "vm")), (vec![a, a], at(&[a, a])));
        assert_eq!(held(&host).await, before, "{isolation}");
        until_it_goes_on(&host, "vm").await;
        assert_eq!(host.terminate().await, 0);
    }
}

/// SCHED_FIFO comes and goes with the move, also in a worker that has given up its privileges.
#[tokio::test]
async fn a_move_brings_the_scheduler_with_it() {
    const FIFO: u32 = 1;
    let Some(all) = two_cores() else { return };
    let (a, b) = (all[0], all[1]);
    for isolation in ISOLATIONS {
        let dir = tempfile::tempdir().expect("tempdir");
        let _reaper = Reaper(vec![dir.path().to_owned()]);
        let mut host = host(dir.path(), isolation).await;
        host.create("vm", placed(1, shared(&[a]))).await;
        let vm = host.start_vm("vm").await;
        let pid = process(&host, &vm);
        assert_eq!(vcpu_scheduling(pid), [(0, 0)]);
        let fifo = |core: u32, fifo_priority: u32| CpuPlacement { fifo_priority, ..dedicated(&[core]) };
        match place(&host, "vm", fifo(b, 7), "").await {
            Ok(moved) => {
                assert_eq!((moved.vcpu_cores, pinned(pid, "vm")), (vec![b], at(&[b])));
                assert_eq!(vcpu_scheduling(pid), [(FIFO, 7)], "{isolation}");
                assert_eq!(held(&host).await, [(b, "vm".to_owned(), 1)]);
                // On the core where it is: only the priority changes.
                place(&host, "vm", fifo(b, 12), "").await.expect("the same core");
                assert_eq!((vcpu_scheduling(pid), pinned(pid, "vm")), (vec![(FIFO, 12)], at(&[b])));
                place(&host, "vm", shared(&[a]), "").await.expect("back");
                assert_eq!(vcpu_scheduling(pid), [(0, 0)], "{isolation}");
                assert_eq!(held(&host).await, [(a, String::new(), 1)]);
            }
            // Without CAP_SYS_NICE: refused, and it is where and what it was.
            Err(status) => {
                expect_error(Err::<(), _>(status), Code::FailedPrecondition, "PLACEMENT_FAILED");
                assert_eq!((vcpu_scheduling(pid), pinned(pid, "vm")), (vec![(0, 0)], at(&[a])));
                assert_eq!(host.get("vm").await, vm);
            }
        }
        until_it_goes_on(&host, "vm").await;
        host.stop_vm("vm").await;

        // From the start, in a process of its own.
        host.create("fifo", placed(1, fifo(b, 9))).await;
        let request = StartVirtualMachineRequest { name: name("fifo"), request_id: String::new() };
        let operation = host.vms().await.start_virtual_machine(request).await.expect("accepted").into_inner();
        match host.finish(operation).await {
            Ok(any) => {
                let pid = process(&host, &unpack(&any));
                assert_eq!((vcpu_scheduling(pid), pinned(pid, "fifo")), (vec![(FIFO, 9)], at(&[b])));
            }
            Err(error) => assert_eq!(reason_of(&error), "THREAD_FAILED"),
        }
        assert_eq!(host.terminate().await, 0);
    }
}
