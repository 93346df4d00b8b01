//! Emulated, mediated or none, from plain facts; and the bytes of an event filter.

use pmu::cpuid::{Capabilities, CpuidLeaves, FamilyModel, Leaf};
use pmu::filter::{FLAG_MASKED_EVENTS, MAX_FILTER_EVENTS, masked_entry};
use pmu::host_check::{Facts, KvmPmu as Kind};
use pmu::{FilterSpec, Shape};

use super::super::detect::{Detected, Observed, detect, observe};
use super::super::event_filter_bytes;
use super::FakeKvm;
use crate::host::{HostFacts, KvmFacts, KvmProblem};
use crate::kvm_pmu::list;

/// A host of this shape with a KVM that offers and lists all of it.
fn host(shape: Shape) -> (HostFacts, Facts) {
    let amd = shape.vendor == pmu::Vendor::Amd;
    let vendor = if amd { *b"AuthenticAMD" } else { *b"GenuineIntel" };
    let word = |at: usize| u32::from_le_bytes([vendor[at], vendor[at + 1], vendor[at + 2], vendor[at + 3]]);
    let guest = pmu::cpuid::GuestLeaves::of(&shape, 0xFF).expect("expressible");
    let leaf = |l: Leaf| [l.eax, l.ebx, l.ecx, l.edx];
    let cpuid = vec![
        (0, 0, [0x10, word(0), word(8), word(4)]),
        (1, 0, [0, 0, u32::from(guest.pdcm) << 15, 0]),
        (0xA, 0, leaf(guest.perfmon)),
        (0x8000_0001, 0, [0, 0, u32::from(guest.amd_ext_core) << 23, 0]),
        (0x8000_0022, 0, leaf(guest.amd_perfmon)),
    ];
    let kvm = KvmFacts {
        api_version: 12,
        max_vcpus: 1,
        pmu_capability: true,
        msr_filter: true,
        manual_dirty_log: true,
        cpuid,
        msrs: list::expected(&shape),
    };
    let facts = Facts {
        kernel: "6.12.1-test".to_owned(),
        pmu: Some(Ok(Capabilities {
            shape,
            arch_events: 0xFF,
            perfmon_v6: false,
            family_model: FamilyModel::default(),
        })),
        kvm: Some(Ok(())),
        kvm_pmu_capability: true,
        enable_pmu: Some(true),
        ..Facts::default()
    };
    let host = HostFacts {
        kvm: Ok(kvm),
        memory_bytes: 0,
        memory_available_bytes: 0,
        online_cores: vec![],
        allowed_cores: vec![],
        boot_id: String::new(),
        hostname: String::new(),
        kernel: facts.kernel.clone(),
        cpu_vendor: String::new(),
        cpu_model: String::new(),
        tsc_khz: 0,
    };
    (host, facts)
}

fn shape(text: &str) -> Shape {
    text.parse().expect(text)
}

#[test]
fn emulated_or_mediated_by_the_parameter_and_the_shape_by_what_kvm_offers_and_lists() {
    for text in ["intel:v2:8+3:48", "intel:v5:8+4:48", "amd:v0:4:48", "amd:v1:6:48", "amd:v2:6:48"] {
        let (host, mut facts) = host(shape(text));
        let emulated =
            Detected { kind: Kind::Emulated, shape: shape(text), can_disable: true, backported: false };
        assert_eq!(detect(&host, &facts).expect(text), emulated);
        facts.enable_mediated_pmu = Some(true);
        let backported = Detected { kind: Kind::Mediated, backported: true, ..emulated };
        assert_eq!(detect(&host, &facts).expect(text), backported);
        facts.kernel = "7.0.0-rc1".to_owned();
        assert_eq!(
            detect(&host, &facts).expect(text),
            Detected { kind: Kind::Mediated, backported: false, ..emulated }
        );
        facts.kvm_pmu_capability = false;
        assert!(!detect(&host, &facts).expect(text).can_disable);
    }
    let (mut host, facts) = host(shape("intel:v5:8+4:48"));
    if let Ok(kvm) = &mut host.kvm {
        // Fixed counter 3 and the selector of counter 7 are not state of a vCPU.
        kvm.msrs.retain(|msr| ![0x30C, 0x18D].contains(msr));
    }
    assert_eq!(detect(&host, &facts).expect("still a PMU").shape, shape("intel:v5:7+3:48"));
}

#[test]
fn none_is_refused_by_the_fact_that_says_so() {
    let refused = |change: &dyn Fn(&mut HostFacts, &mut Facts)| {
        let (mut host, mut facts) = host(shape("intel:v2:8+3:48"));
        change(&mut host, &mut facts);
        let error = detect(&host, &facts).expect_err("none");
        assert_eq!(error.reason(), "PMU_KVM_NONE");
        error.to_string()
    };
    let problem =
        KvmProblem { code: "KVM_MISSING", problem: "/dev/kvm is not there".into(), remedy: String::new() };
    assert!(refused(&move |h, _| h.kvm = Err(problem.clone())).contains("/dev/kvm is not there"));
    assert!(refused(&|_, f| f.enable_pmu = Some(false)).contains("kvm.enable_pmu is N"));
    assert!(refused(&|_, f| f.pmu = None).contains("not probed"));
    assert!(refused(&|_, f| f.pmu = Some(Err("odd".into()))).contains("odd"));
    let hidden = Capabilities::from_cpuid(&CpuidLeaves {
        vendor: Leaf { ebx: 0x756e_6547, edx: 0x4965_6e69, ecx: 0x6c65_746e, eax: 0 },
        ..CpuidLeaves::default()
    });
    assert!(
        refused(&move |_, f| f.pmu = Some(Ok(hidden.clone().expect("hidden"))))
            .contains("the host has no PMU")
    );
    let unlisted = |h: &mut HostFacts, _: &mut Facts| {
        if let Ok(kvm) = &mut h.kvm {
            kvm.msrs = vec![0x10, 0x345];
        }
    };
    assert!(refused(&unlisted).contains("lists none of its counters"));
    let unoffered = |h: &mut HostFacts, _: &mut Facts| {
        if let Ok(kvm) = &mut h.kvm {
            kvm.cpuid.retain(|leaf| leaf.0 != 0xA);
        }
    };
    assert!(refused(&unoffered).contains("KVM offers intel:v0"));
    assert!(refused(&|h, _| h.kvm.as_mut().expect("kvm").cpuid.clear()).contains("cannot be driven"));
    assert!(refused(&|_, f| f.kvm = Some(Err("gone".into()))).contains("finds none"));
}

#[test]
fn registers_that_are_refused_or_zero_are_silent() {
    let mut fake = FakeKvm::new(shape("intel:v2:1+1:48"));
    let (shape, control) = (fake.shape, fake.shape.control_msr());
    assert_eq!(
        observe(&mut fake, &shape).expect("read"),
        Observed::Alive { msr: control, value: 1 },
        "global control after reset"
    );
    fake.values.insert(control, 0);
    fake.unreadable.extend([0x309, 0x38D]);
    let Observed::Silent { refused, zero } = observe(&mut fake, &shape).expect("read") else {
        panic!("silent")
    };
    assert_eq!(refused, "IA32_FIXED_CTR0 (0x309), IA32_FIXED_CTR_CTRL (0x38d)");
    assert!(zero.contains("IA32_PERF_GLOBAL_CTRL (0x38f)") && zero.contains("IA32_PMC0 (0xc1)"));
}

#[test]
fn a_filter_is_laid_out_as_the_kernel_has_it() {
    let spec = FilterSpec {
        action: 1,
        flags: FLAG_MASKED_EVENTS,
        fixed_counter_bitmap: 5,
        events: vec![masked_entry(0x1C2, 0xFF, 0, false), 0xC0],
    };
    let mut want = Vec::new();
    for word in [1u32, 2, 5, 1, 0, 0, 0, 0] {
        want.extend_from_slice(&word.to_le_bytes());
    }
    want.extend_from_slice(&spec.events[0].to_le_bytes());
    want.extend_from_slice(&0xC0u64.to_le_bytes());
    assert_eq!(event_filter_bytes(&spec).expect("bytes"), want);
    let full = FilterSpec { events: vec![0; MAX_FILTER_EVENTS], ..spec.clone() };
    assert_eq!(event_filter_bytes(&full).expect("300").len(), 32 + 2400);
    let over = FilterSpec { events: vec![0; MAX_FILTER_EVENTS + 1], ..spec };
    assert_eq!(event_filter_bytes(&over).expect_err("301").reason(), "FILTER_TOO_MANY");
}
