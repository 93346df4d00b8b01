//! Statistics, memory backing and CPUID policies through the API, read back from what runs.
#![allow(missing_docs)]

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use support::load::Reaper;
use support::*;
use tonic::Code;
use vpmu_proto::api::memory_backing::HugePages;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

async fn stats(host: &Host, id: &str) -> VirtualMachineStats {
    let request = GetVirtualMachineStatsRequest { name: name(id) };
    host.vms().await.get_virtual_machine_stats(request).await.expect("figures").into_inner()
}

async fn statistics(hypervisor: &str, isolation: &str) {
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let mut host =
        Host::start(dir.path(), &["--hypervisor", hypervisor, "--isolation", isolation, "--stop-vms"]).await;
    host.create("a", probe_spec(2, 16)).await;
    let request = GetVirtualMachineStatsRequest { name: name("a") };
    let none = host.vms().await.get_virtual_machine_stats(request).await;
    expect_error(none, Code::FailedPrecondition, "VM_HAS_NO_WORKER");
    let vm = host.start_vm("a").await;
    host.until_counting("a").await;

    let first = stats(&host, "a").await;
    assert_eq!(first.name, name("a"));
    assert_eq!(first.vcpus.iter().map(|v| v.vcpu).collect::<Vec<_>>(), [0, 1]);
    assert_eq!(first.vcpus.iter().map(|v| v.core).collect::<Vec<_>>(), vm.vcpu_cores);
    assert!(first.arriving_memory.is_none(), "all of it was there at the start");
    let begin = Instant::now();
    loop {
        let now = stats(&host, "a").await;
        let grown = now.vcpus.iter().zip(&first.vcpus).all(|(n, f)| {
            assert!(n.exits >= f.exits && n.guest_ns >= f.guest_ns && n.pmu_msr_exits >= f.pmu_msr_exits);
            n.exits > f.exits && n.guest_ns > f.guest_ns
        });
        if grown {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "its figures stand still: {now:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(first.vcpus.iter().all(|v| v.pmu_msr_exits > 0), "the probe programs its counters: {first:?}");
    if hypervisor == "kvm" {
        let names = |of: &[HypervisorStatistic]| of.iter().map(|s| s.name.clone()).collect::<BTreeSet<_>>();
        for vcpu in &first.vcpus {
            let exits = vcpu.hypervisor.iter().find(|s| s.name == "exits").expect("KVM counts exits");
            assert!(exits.values[0] > 0, "{vcpu:?}");
        }
        assert!(names(&first.hypervisor).contains("pages_4k"), "{:?}", first.hypervisor);
    }

    let pause = PauseVirtualMachineRequest { name: name("a") };
    host.vms().await.pause_virtual_machine(pause).await.expect("paused");
    let paused = stats(&host, "a").await.vcpus;
    let own = |all: &[VcpuStats]| all.iter().map(|v| (v.exits, v.guest_ns, v.pmis)).collect::<Vec<_>>();
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(own(&stats(&host, "a").await.vcpus), own(&paused), "a paused machine does nothing");
    host.stop_vm("a").await;
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn statistics_of_a_simulated_machine() {
    statistics("simulated", "thread").await;
}

#[tokio::test]
async fn statistics_on_kvm_in_a_process() {
    if have_kvm() {
        statistics("kvm", "process").await;
    }
}

fn backed(huge_pages: HugePages, prefault: bool) -> VirtualMachineSpec {
    let memory_backing = Some(MemoryBacking { huge_pages: huge_pages.into(), prefault });
    VirtualMachineSpec { memory_backing, ..probe_spec(1, 64) }
}

/// KiB of shared memory that a process has in use.
fn shmem_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).expect("its status");
    let line = status.lines().find_map(|line| line.strip_prefix("RssShmem:")).expect("RssShmem");
    line.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
}

#[tokio::test]
async fn memory_is_what_was_asked_for() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;

    host.create("touched", backed(HugePages::Unspecified, false)).await;
    let touched = host.try_start_vm("touched").await.expect("starts");
    host.create("prefault", backed(HugePages::Unspecified, true)).await;
    let prefault = host.try_start_vm("prefault").await.expect("starts");
    assert!(shmem_kib(prefault.worker_pid) >= 64 << 10, "every page has its memory");
    assert!(shmem_kib(touched.worker_pid) < 32 << 10, "only what was touched has");
    assert!(prefault.spec.expect("spec").memory_backing.expect("read back").prefault);

    // Huge pages, where the host has them, or a refusal that names what is short and leaves nothing running.
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u64 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    let shmem =
        std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled").unwrap_or_default();
    let transparent =
        ["always", "advise", "within_size", "force"].iter().any(|m| shmem.contains(&format!("[{m}]")));
    for (id, huge, there, reason) in [
        ("hugetlb", HugePages::Hugetlb, free >= 32, "HUGE_PAGES_EXHAUSTED"),
        ("transparent", HugePages::Transparent, transparent, "TRANSPARENT_HUGE_PAGES_OFF"),
    ] {
        host.create(id, backed(huge, false)).await;
        match host.try_start_vm(id).await {
            Ok(vm) => {
                assert!(there, "{id}");
                assert_eq!(vm.spec.expect("spec").memory_backing.expect("read back").huge_pages, huge as i32);
                host.until_counting(id).await;
            }
            Err(why) => {
                assert!(!there, "{id}: {why}");
                assert_eq!(why, reason);
                let vm = host.get(id).await;
                assert_eq!(
                    (vm.observed_state(), vm.worker_pid, vm.reason.as_str()),
                    (State::Failed, 0, reason)
                );
            }
        }
    }
    assert_eq!(host.terminate().await, 0);
}

fn with_cpuid(policy: cpuid_spec::Policy, features: &[&str]) -> VirtualMachineSpec {
    let features = features.iter().map(ToString::to_string).collect();
    VirtualMachineSpec { cpuid: Some(CpuidSpec { policy: policy.into(), features }), ..probe_spec(1, 16) }
}

/// Whether this host's KVM offers all of these bits of a register of CPUID: 0 EAX to 3 EDX.
fn offers(leaf: u32, register: usize, bits: &[u32]) -> bool {
    let facts = vcpu_worker::host::probe().kvm.expect("KVM");
    let found = facts.cpuid.iter().find(|(function, index, _)| (*function, *index) == (leaf, 0));
    found.is_some_and(|(_, _, registers)| bits.iter().all(|bit| registers[register] >> bit & 1 == 1))
}

#[tokio::test]
async fn cpuid_policies_are_read_back() {
    use cpuid_spec::Policy;
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let options = ["--hypervisor", "kvm", "--isolation", "process", "--stop-vms"];
    let mut host = Host::start(dir.path(), &options).await;
    // The features of x86-64-v3 in the leaves that name them (AMD64 Architecture Programmer's Manual, volume 3, appendix E).
    let baseline = offers(1, 2, &[0, 9, 12, 13, 19, 20, 22, 23, 26, 28, 29])
        && offers(7, 1, &[3, 5, 8])
        && offers(0x8000_0001, 2, &[0, 5]);
    let mut listed = Vec::new();
    for (feature, bit) in [("ssse3", 9), ("cx16", 13), ("sse4_2", 20), ("popcnt", 23)] {
        listed.extend(offers(1, 2, &[bit]).then_some(feature));
    }
    assert!(!listed.is_empty(), "a processor of the last fifteen years");
    for (id, policy, features) in [
        ("host", Policy::Host, &[][..]),
        ("baseline", Policy::Baseline, &[]),
        ("list", Policy::List, &listed[..]),
    ] {
        if policy == Policy::Baseline && !baseline {
            let refused =
                host.vms().await.create_virtual_machine(create(id, with_cpuid(policy, features))).await;
            let refused = expect_error(refused, Code::InvalidArgument, "INVALID_FIELD");
            assert!(refused.message().contains("is not offered by this host"), "{refused:?}");
            continue;
        }
        host.create(id, with_cpuid(policy, features)).await;
        host.start_vm(id).await;
        host.until_counting(id).await;
        let vm = host.get(id).await;
        let spec = vm.spec.as_ref().expect("spec").cpuid.as_ref().expect("read back");
        assert_eq!((spec.policy(), spec.features.len()), (policy, features.len()));
        // What KVM forces is named, bit by bit; nothing that is as asked is listed.
        for other in &vm.cpuid_differences {
            assert_ne!(other.asked, other.stored, "{other:?}");
            assert!(["eax", "ebx", "ecx", "edx"].contains(&other.register.as_str()), "{other:?}");
            assert!(other.features.iter().all(|f| f.starts_with(['+', '-'])), "{other:?}");
        }
        let taken: Vec<_> =
            vm.cpuid_differences.iter().flat_map(|d| &d.features).filter(|f| f.starts_with('-')).collect();
        assert!(features.iter().all(|f| !taken.contains(&&format!("-{f}"))), "{id}: {taken:?}");
        host.stop_vm(id).await;
    }

    let mut vms = host.vms().await;
    let before = host.list().await;
    for (policy, features) in [
        (Policy::List, vec!["no_such_feature"]),
        (Policy::List, vec!["avx2"; 129]),
        (Policy::Baseline, vec!["avx2"]),
    ] {
        let refused = vms.create_virtual_machine(create("bad", with_cpuid(policy, &features))).await;
        let refused = refused.expect_err("refused");
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
        assert!(refused.message().contains("cpuid.features"), "{refused:?}");
    }
    let mut odd = with_cpuid(Policy::Host, &[]);
    odd.cpuid.as_mut().expect("set").policy = 9;
    let refused = vms.create_virtual_machine(create("bad", odd)).await.expect_err("refused");
    assert!(refused.message().contains("cpuid.policy"), "{refused:?}");
    assert_eq!(host.list().await, before, "nothing has changed");
    assert_eq!(host.terminate().await, 0);
}
