//! Guest memory as the kernel has it: what a request about huge pages and NUMA nodes comes to in the worker's mapping.
//!
//! Each daemon has mounts of its own, in which the host seems to allow transparent huge pages or to have a second node.
//! The kernel under it is the real one, and so is what it answers.

mod support;

use std::path::Path;

use support::load::Reaper;
use support::*;
use vpmu_proto::api::memory_backing::HugePages;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const OPTIONS: [&str; 5] = ["--hypervisor", "simulated", "--isolation", "process", "--stop-vms"];

/// `VmFlags` of the memory of machine `id` in its worker (proc_pid_smaps(5)).
fn flags(pid: u32, id: &str) -> Vec<String> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/smaps")).expect("smaps");
    let memory = format!("/memfd:{id} ");
    let mut lines = maps.lines().skip_while(|line| !line.contains(&memory));
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("its memory is mapped");
    flags.split_whitespace().map(str::to_owned).collect()
}

#[tokio::test]
async fn transparent_huge_pages_are_asked_of_the_kernel() {
    const SWITCH: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    if !Path::new(SWITCH).exists() {
        println!("skipped: this kernel has no transparent huge pages of shared memory");
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let switch = dir.path().join("switch");
    std::fs::write(&switch, "always within_size [advise] never deny force\n").expect("written");
    let prepare = format!("mount --bind {} {SWITCH}", switch.display());
    let Some(mut host) = Host::start_with_mounts(dir.path(), &prepare, &OPTIONS).await else { return };
    for (id, huge_pages) in [("plain", HugePages::Unspecified), ("transparent", HugePages::Transparent)] {
        let memory_backing = Some(MemoryBacking { huge_pages: huge_pages.into(), prefault: false });
        host.create(id, VirtualMachineSpec { memory_backing, ..probe_spec(1, 16) }).await;
        let vm = host.try_start_vm(id).await.expect("started");
        host.until_counting(id).await;
        let flags = flags(vm.worker_pid, id);
        assert_eq!(flags.iter().any(|flag| flag == "hg"), id == "transparent", "{id}: {flags:?}");
    }
    // Whoever turns the switch off has it refused.
    std::fs::write(&switch, "always within_size advise [never] deny force\n").expect("written");
    host.stop_vm("transparent").await;
    assert_eq!(host.try_start_vm("transparent").await.expect_err("refused"), "TRANSPARENT_HUGE_PAGES_OFF");
    assert_eq!(host.terminate().await, 0);
}

/// Policy of the memory of machine `id` in its worker: `default`, `bind:0`, … (numa(7)).
fn policy(pid: u32, id: &str) -> String {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/numa_maps")).expect("numa_maps");
    let memory = format!("/memfd:{id}\\");
    let found = maps.lines().find(|line| line.contains(&memory)).unwrap_or_else(|| panic!("{id}: {maps}"));
    found.split_whitespace().nth(1).expect("a policy").to_owned()
}

#[tokio::test]
async fn a_numa_local_machine_has_its_memory_bound_to_its_node() {
    /// No kernel has as many.
    const ABSENT: u32 = 1000;
    const NODES: &str = "/sys/devices/system/node";
    let cores = vcpu_worker::host::affinity::pinnable(&vcpu_worker::host::allowed_cores());
    if cores.len() < 2 || !Path::new("/proc/self/numa_maps").exists() {
        println!("skipped: a host with one core, or without NUMA policy");
        return;
    }
    let (here, elsewhere) = (cores[0], cores[1]);
    let real = vcpu_worker::host::Topology::of_this_host().cpu(here).expect("online").node;
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let nodes = dir.path().join("nodes");
    for (node, core) in [(real, here), (ABSENT, elsewhere)] {
        std::fs::create_dir_all(nodes.join(format!("node{node}"))).expect("made");
        std::fs::write(nodes.join(format!("node{node}/cpulist")), format!("{core}\n")).expect("written");
    }
    std::fs::write(nodes.join("online"), format!("{real},{ABSENT}\n")).expect("written");
    let prepare = format!("mount --bind {} {NODES}", nodes.display());
    let Some(mut host) = Host::start_with_mounts(dir.path(), &prepare, &OPTIONS).await else { return };
    let on = |core: u32, numa_local: bool| {
        let placement = CpuPlacement { cores: vec![core], numa_local, ..CpuPlacement::default() };
        VirtualMachineSpec { placement: Some(placement), ..probe_spec(1, 16) }
    };
    for (id, spec, expected) in [
        ("anywhere", on(here, false), "default".to_owned()),
        ("local", on(here, true), format!("bind:{real}")),
    ] {
        host.create(id, spec).await;
        let vm = host.try_start_vm(id).await.expect("started");
        host.until_counting(id).await;
        assert_eq!(policy(vm.worker_pid, id), expected, "{id}");
    }
    // The other node is asked of the kernel too, which does not have it; without the binding nobody asks for it.
    host.create("there", on(elsewhere, true)).await;
    assert_eq!(host.try_start_vm("there").await.expect_err("refused"), "GUEST_MEMORY");
    let failed = host.get("there").await;
    assert_eq!((failed.observed_state(), failed.worker_pid), (State::Failed, 0), "{failed:?}");
    assert!(failed.message.contains("mbind"), "{}", failed.message);
    host.create("free", on(elsewhere, false)).await;
    host.try_start_vm("free").await.expect("started");
    assert_eq!(host.terminate().await, 0);
}
