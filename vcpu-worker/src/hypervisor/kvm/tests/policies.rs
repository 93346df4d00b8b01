//! What CPUID policies show, compared bit by bit with what KVM says that it stored.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::Cap;

use super::super::features::{CpuidPolicy, check, names};
use super::*;

/// Registers that name features: leaf, subleaf, register (EAX, EBX, ECX, EDX).
const REGISTERS: [(u32, u32, usize); 8] = [
    (1, 0, 2),
    (7, 0, 1),
    (7, 0, 2),
    (7, 0, 3),
    (7, 1, 0),
    (0xd, 1, 0),
    (0x8000_0001, 0, 2),
    (0x8000_0001, 0, 3),
];

/// x86-64-v3 with what it includes (x86-64 psABI, table "Micro-Architecture Levels"), by the names of /proc/cpuinfo;
/// sorted. LZCNT is abm there, and OSXSAVE stands for xsave.
const V3: [&str; 16] = [
    "abm", "avx", "avx2", "bmi1", "bmi2", "cx16", "f16c", "fma", "lahf_lm", "movbe", "popcnt", "sse3",
    "sse4_1", "sse4_2", "ssse3", "xsave",
];

fn registers(e: &kvm_cpuid_entry2) -> [u32; 4] {
    [e.eax, e.ebx, e.ecx, e.edx]
}

fn register(entries: &[kvm_cpuid_entry2], (leaf, subleaf, at): (u32, u32, usize)) -> u32 {
    let found = entries.iter().find(|e| (e.function, e.index) == (leaf, subleaf));
    found.map_or(0, |e| registers(e)[at])
}

/// Every feature that is known by name, sorted.
fn features(entries: &[kvm_cpuid_entry2]) -> Vec<&'static str> {
    let all = REGISTERS.iter().flat_map(|r| names(r.0, r.1, r.2, register(entries, *r)));
    let mut all: Vec<_> = all.collect();
    all.sort_unstable();
    all
}

struct Shown {
    /// What is to be shown, built anew from what KVM supports.
    asked: Vec<kvm_cpuid_entry2>,
    /// What KVM_GET_CPUID2 says.
    stored: Vec<kvm_cpuid_entry2>,
}

/// Makes a vCPU by this policy; whatever the policy: the copy that is kept, and travels, is what KVM says, and the
/// differences that are told are all that there are. `as_far_as` also where this host lacks some of it, which is refused otherwise.
fn shown(policy: &CpuidPolicy, as_far_as: bool) -> Shown {
    let made_by = if as_far_as { CpuidPolicy::Host } else { policy.clone() };
    let options = KvmOptions { vcpus: 2, features: made_by, ..KvmOptions::default() };
    let vm = KvmVm::new(memory(2 * MIB), options).expect("vm");
    let mut vcpu = vm.make_vcpu(0).expect("vcpu");
    let deadline = vm.shared.fd.check_extension(Cap::TscDeadlineTimer);
    let mut asked = cpuid::build(vm.shared.system.cpuid.as_slice(), 0, 2, deadline, None);
    policy.apply(&mut asked);
    if as_far_as {
        vcpu.set_cpuid(&asked).expect("set");
    } else {
        assert_eq!(vm.cpuid_differences(), vcpu.cpuid_differences());
    }
    let stored = vcpu.fd.get_cpuid2(KVM_MAX_CPUID_ENTRIES).expect("KVM_GET_CPUID2").as_slice().to_vec();
    assert_eq!(cpuid::from_bytes(&vcpu.cpuid).expect("entries"), stored, "{policy:?}: the copy that is kept");
    let saved = vcpu.save().expect("saved");
    assert!(
        saved.iter().any(|p| p.kind == "cpuid" && p.data == vcpu.cpuid),
        "{policy:?}: the copy that travels"
    );
    let all = vcpu.cpuid_differences();
    let mut different = 0;
    for a in &asked {
        let found = stored.iter().find(|s| (s.function, s.index) == (a.function, a.index));
        let found = found.map_or([0; 4], registers);
        match all.iter().find(|d| (d.leaf, d.subleaf) == (a.function, a.index)) {
            None => assert_eq!(found, registers(a), "{policy:?}: leaf {:#x}/{}", a.function, a.index),
            Some(told) => {
                assert_eq!((told.asked, told.stored), (registers(a), found));
                assert_ne!(told.asked, told.stored);
                different += 1;
            }
        }
    }
    assert_eq!(all.len(), different, "{policy:?}: none twice, none of a leaf that was not asked");
    assert!(stored.iter().all(|s| asked.iter().any(|a| (a.function, a.index) == (s.function, s.index))));
    Shown { asked, stored }
}

impl Shown {
    /// Features that KVM added to what was asked for, sorted.
    fn forced(&self) -> Vec<&'static str> {
        let asked = features(&self.asked);
        features(&self.stored).into_iter().filter(|name| !asked.contains(name)).collect()
    }

    /// Features that KVM took from it.
    fn taken(&self) -> Vec<&'static str> {
        let stored = features(&self.stored);
        features(&self.asked).into_iter().filter(|name| !stored.contains(name)).collect()
    }
}

#[test]
fn host_shows_all_that_kvm_supports() {
    if !require_kvm() {
        return;
    }
    let host = shown(&CpuidPolicy::Host, false);
    let supported = features(system().expect("KVM").cpuid.as_slice());
    println!("supported: {supported:?}; added by this KVM: {:?}; taken: {:?}", host.forced(), host.taken());
    assert_eq!(features(&host.asked), supported);
    // This KVM lists few on AMD, and forces the rest. These, of two registers, every processor of the last fifteen years has.
    assert!(["cx16", "lahf_lm"].iter().all(|name| supported.contains(name)), "{supported:?}");
}

#[test]
fn baseline_is_a_part_of_host_and_shows_nothing_newer() {
    if !require_kvm() {
        return;
    }
    let lacks = check(&CpuidPolicy::Baseline).expect("asked");
    let supported = features(system().expect("KVM").cpuid.as_slice());
    let part: Vec<_> = V3.into_iter().filter(|name| supported.contains(name)).collect();
    assert_eq!(lacks.is_ok(), part == V3, "{lacks:?}: {part:?}");
    if let Err(refused) = &lacks {
        println!("this KVM is no x86-64-v3 ({refused:?}): what it has of it is set all the same");
    }
    let (host, baseline) = (shown(&CpuidPolicy::Host, false), shown(&CpuidPolicy::Baseline, lacks.is_err()));
    assert_eq!(features(&baseline.asked), part);
    println!("added by this KVM: {:?}; taken: {:?}", baseline.forced(), baseline.taken());
    let mut listed: Vec<_> = part.into_iter().chain(baseline.forced()).collect();
    listed.retain(|name| !baseline.taken().contains(name));
    listed.sort_unstable();
    assert_eq!(features(&baseline.stored), listed, "the list, and what KVM forces, which is told");
    for at in REGISTERS {
        let (more, less) = (register(&host.stored, at), register(&baseline.stored, at));
        assert_eq!(less & !more, 0, "{at:x?}: {less:#x} is not within {more:#x}");
    }
}

/// On a processor that has everything: the stated list, no more and no less, and no extended state without instructions.
#[test]
fn baseline_is_x86_64_v3_on_a_host_that_has_more() {
    let all = |function, index| {
        let (eax, ebx, ecx, edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    };
    let rich = [all(1, 0), all(7, 0), all(7, 1), all(0xd, 0), all(0xd, 1), all(0x8000_0001, 0)];
    let mut shown = rich;
    CpuidPolicy::Baseline.check(&rich).expect("it has everything");
    CpuidPolicy::Baseline.apply(&mut shown);
    assert_eq!(features(&shown), V3);
    assert!(features(&rich).len() > 60, "{:?}", features(&rich));
    let states = register(&shown, (0xd, 0, 0));
    assert_eq!(states & 0x6_02e7, 7, "x87, SSE and AVX, not PKRU, AVX-512 or AMX: {states:#x}");
    let mut host = rich;
    CpuidPolicy::Host.apply(&mut host);
    assert_eq!(host, rich, "host leaves everything");
    // Each of them is wanted: without one it is refused by its name.
    for name in V3 {
        let mut poor = rich;
        CpuidPolicy::Features(
            features(&rich).into_iter().filter(|n| *n != name).map(str::to_owned).collect(),
        )
        .apply(&mut poor);
        assert_eq!(CpuidPolicy::Baseline.check(&poor).expect_err("refused").feature, name);
    }
}
