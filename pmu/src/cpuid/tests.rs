//! Real processors' leaves, the round trip through a guest's leaves, and random ones.

use super::*;
use proptest::prelude::*;

fn words(name: [u8; 12]) -> Leaf {
    let word = |at: usize| u32::from_le_bytes([name[at], name[at + 1], name[at + 2], name[at + 3]]);
    Leaf { eax: 0x20, ebx: word(0), edx: word(4), ecx: word(8) }
}

fn intel(perfmon: Leaf, perf_capabilities: u64) -> CpuidLeaves {
    CpuidLeaves {
        vendor: words(*b"GenuineIntel"),
        features: Leaf { eax: 0x806F8, ecx: 1 << 15, ..Leaf::default() },
        perfmon,
        perf_capabilities,
        ..CpuidLeaves::default()
    }
}

fn amd(ext_core: bool, amd_perfmon: Leaf) -> CpuidLeaves {
    CpuidLeaves {
        vendor: words(*b"AuthenticAMD"),
        features: Leaf { eax: 0xB0_0F21, ..Leaf::default() },
        amd_features: Leaf { ecx: u32::from(ext_core) << 23, ..Leaf::default() },
        amd_perfmon,
        ..CpuidLeaves::default()
    }
}

#[test]
fn known_processors() {
    // Sapphire Rapids: v5, 8 + 4, 48 bits, all events, AnyThread deprecated.
    let spr = intel(Leaf { eax: 0x0830_0805, ebx: 0, ecx: 0xF, edx: 0x8604 }, 0x8_A7C5 | 1 << 13);
    let caps = Capabilities::from_cpuid(&spr).unwrap();
    assert_eq!(caps.shape.to_string(), "intel:v5:8+4:48");
    assert_eq!((caps.arch_events, caps.perfmon_v6), (0xFF, false));
    assert_eq!(caps.family_model, FamilyModel { family: 6, model: 0x8F });
    assert!(caps.shape.has_full_width_writes());
    // Skylake: v4, 4 + 3.
    let skl =
        Capabilities::from_cpuid(&intel(Leaf { eax: 0x0730_0404, ebx: 0, ecx: 0, edx: 0x603 }, 0)).unwrap();
    assert_eq!((skl.shape.to_string().as_str(), skl.arch_events), ("intel:v4:4+3:48", 0x7F));
    // Core Solo: v1, 2 counters of 40 bits.
    let v1 =
        Capabilities::from_cpuid(&intel(Leaf { eax: 0x0728_0201, ebx: 0, ecx: 7, edx: 0x603 }, 0)).unwrap();
    assert_eq!((v1.shape.to_string().as_str(), v1.shape.fixed), ("intel:v1:2+0:40", 0));
    // Zen 4, Zen 3, and one without the extension.
    let zen4 =
        Capabilities::from_cpuid(&amd(true, Leaf { eax: 7, ebx: 0x0010_4106, ..Leaf::default() })).unwrap();
    assert_eq!(zen4.shape.to_string(), "amd:v2:6:48");
    assert_eq!(zen4.family_model, FamilyModel { family: 0x1A, model: 0x02 });
    assert_eq!(
        Capabilities::from_cpuid(&amd(true, Leaf::default())).unwrap().shape.to_string(),
        "amd:v1:6:48"
    );
    assert_eq!(
        Capabilities::from_cpuid(&amd(false, Leaf::default())).unwrap().shape.to_string(),
        "amd:v0:4:48"
    );
    let hygon = CpuidLeaves { vendor: words(*b"HygonGenuine"), ..amd(true, Leaf::default()) };
    assert_eq!(Capabilities::from_cpuid(&hygon).unwrap().shape.vendor, Vendor::Amd);
}

#[test]
fn a_hidden_pmu_is_none() {
    assert_eq!(Capabilities::from_cpuid(&intel(Leaf::default(), u64::MAX)).unwrap().shape, Shape::none());
}

#[test]
fn fixed_counters_exist_by_bitmap_or_by_count() {
    let with = |ecx, contiguous: u32, version: u32| {
        let leaf = Leaf { eax: 0x0830_0800 | version, ebx: 0, ecx, edx: 48 << 5 | contiguous };
        Capabilities::from_cpuid(&intel(leaf, 0)).unwrap().shape.fixed
    };
    for ecx in 0..16u32 {
        for contiguous in 0..=4 {
            for i in 0..4 {
                assert_eq!(
                    with(ecx, contiguous, 5) >> i & 1 == 1,
                    ecx >> i & 1 == 1 || i < contiguous,
                    "{ecx:#x} {contiguous} {i}"
                );
                assert_eq!(
                    with(ecx, contiguous, 4) >> i & 1 == 1,
                    i < contiguous,
                    "ECX is not looked at below v5"
                );
            }
        }
    }
}

#[test]
fn a_v6_host_is_v5_with_the_bitmaps_of_leaf_23h() {
    let mut leaves = intel(Leaf { eax: 0x0830_0806, ebx: 0, ecx: 0xF, edx: 0x8604 }, 1 << 13);
    leaves.extended_features.eax = 1 << 8;
    leaves.perfmon_ext.eax = 0b11;
    leaves.perfmon_ext_counters = Leaf { eax: 0xB5, ebx: 0b1011, ..Leaf::default() };
    let caps = Capabilities::from_cpuid(&leaves).unwrap();
    assert!(caps.perfmon_v6);
    assert_eq!(caps.shape.to_string(), "intel:v5:0xb5+0xb:48");
    leaves.perfmon_ext.eax = 1; // sub-leaf 1 not valid
    assert_eq!(Capabilities::from_cpuid(&leaves).unwrap().shape.to_string(), "intel:v5:8+4:48");
    leaves.extended_features.eax = 0;
    assert!(!Capabilities::from_cpuid(&leaves).unwrap().perfmon_v6);
}

#[test]
fn perf_capabilities_need_pdcm() {
    let mut leaves = intel(Leaf { eax: 0x0830_0805, ebx: 0, ecx: 0xF, edx: 0x8604 }, 1 << 13);
    leaves.features.ecx = 0;
    assert_eq!(Capabilities::from_cpuid(&leaves).unwrap().shape.perf_capabilities, 0);
}

#[test]
fn events_beyond_the_vector_or_marked_absent_are_not_available() {
    let events = |length: u32, ebx| {
        let leaf = Leaf { eax: length << 24 | 0x30_0805, ebx, ecx: 0xF, edx: 0x8604 };
        Capabilities::from_cpuid(&intel(leaf, 0)).unwrap().arch_events
    };
    assert_eq!(events(3, 0), 0b111);
    assert_eq!(events(8, 0b1010_0000), 0b0101_1111);
    assert_eq!(events(255, 0), 0xFF);
    assert_eq!(events(0, 0), 0);
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let refused = |leaves: CpuidLeaves| Capabilities::from_cpuid(&leaves).unwrap_err().reason();
    assert_eq!(
        refused(intel(Leaf { eax: 0x0830_FF05, edx: 0x8604, ..Leaf::default() }, 0)),
        "CPUID_TOO_MANY_COUNTERS"
    );
    assert_eq!(
        refused(intel(Leaf { eax: 0x0830_0805, ecx: 1 << 20, ..Leaf::default() }, 0)),
        "CPUID_TOO_MANY_COUNTERS"
    );
    assert_eq!(refused(intel(Leaf { eax: 0x0800_0805, edx: 0x8604, ..Leaf::default() }, 0)), "CPUID_SHAPE");
    let via = CpuidLeaves { vendor: words(*b"Centaur\0auls"), ..CpuidLeaves::default() };
    assert_eq!(Capabilities::from_cpuid(&via), Err(CpuidError::Vendor { vendor: "Centaur.auls".into() }));
}

/// A processor that shows these leaves.
fn shown(leaves: &GuestLeaves, vendor: Vendor) -> CpuidLeaves {
    CpuidLeaves {
        vendor: words(if vendor == Vendor::Intel { *b"GenuineIntel" } else { *b"AuthenticAMD" }),
        features: Leaf { ecx: u32::from(leaves.pdcm) << 15, ..Leaf::default() },
        perfmon: leaves.perfmon,
        amd_features: Leaf { ecx: u32::from(leaves.amd_ext_core) << 23, ..Leaf::default() },
        amd_perfmon: leaves.amd_perfmon,
        perf_capabilities: leaves.perf_capabilities,
        ..CpuidLeaves::default()
    }
}

#[test]
fn a_shape_survives_the_way_through_cpuid() {
    for version in 1..=5u8 {
        for gp in [1, 2, 4, 6, 8] {
            for fixed in [0, 3, 4] {
                for width in [40, 48] {
                    let fixed = if version >= 2 { fixed } else { 0 };
                    let shape = Shape::new(Vendor::Intel, version, gp, fixed, width).unwrap();
                    let leaves = GuestLeaves::of(&shape, 0b111).unwrap();
                    let caps = Capabilities::from_cpuid(&shown(&leaves, Vendor::Intel)).unwrap();
                    assert_eq!((caps.shape, caps.arch_events), (shape, 0b111), "{shape}");
                    assert!(leaves.full_width_writes());
                }
            }
        }
    }
    for text in ["amd:v0:4:48", "amd:v1:6:48", "amd:v2:6:48", "amd:v2:1:48", "intel:v5:8+0xb:48"] {
        let shape: Shape = text.parse().unwrap();
        let leaves = GuestLeaves::of(&shape, 0xFF).unwrap();
        assert_eq!(Capabilities::from_cpuid(&shown(&leaves, shape.vendor)).unwrap().shape, shape, "{text}");
    }
}

#[test]
fn a_shape_that_cpuid_cannot_say_is_refused() {
    for text in [
        "intel:v5:0xb5+4:48",
        "intel:v4:8+0xb:48",
        "amd:v1:4:48",
        "amd:v0:3:48",
        "amd:v2:0:48",
        "amd:v2:6:40",
        "amd:v2:16:48",
    ] {
        let error = GuestLeaves::of(&text.parse().unwrap(), 0xFF).unwrap_err();
        assert_eq!(error.reason(), "CPUID_NOT_EXPRESSIBLE", "{text}");
        assert!(error.to_string().contains(text), "{error}");
    }
}

#[test]
fn a_guest_without_a_pmu_sees_none() {
    assert_eq!(GuestLeaves::of(&Shape::none(), 0xFF).unwrap(), GuestLeaves::hidden());
    assert!(!GuestLeaves::hidden().full_width_writes());
}

fn any_leaf() -> impl Strategy<Value = Leaf> {
    (any::<u32>(), any::<u32>(), any::<u32>(), any::<u32>()).prop_map(|(eax, ebx, ecx, edx)| Leaf {
        eax,
        ebx,
        ecx,
        edx,
    })
}

proptest! {
    /// Whatever CPUID says, the answer is a valid shape or an error, and the shape can be shown to a guest or is refused.
    #[test]
    fn random_leaves_never_panic(
        which in 0u8..3, features in any_leaf(), extended_features in any_leaf(), mut perfmon in any_leaf(), small in any::<bool>(),
        perfmon_ext in any_leaf(), perfmon_ext_counters in any_leaf(), amd_features in any_leaf(), amd_perfmon in any_leaf(),
        perf_capabilities in any::<u64>(), events in any::<u32>(),
    ) {
        if small {
            // Make valid ones likely, too.
            perfmon.eax = perfmon.eax & 0xFF00_0707 | 0x30_0000;
            perfmon.ecx &= 0xF;
            perfmon.edx = perfmon.edx & 3 | 48 << 5;
        }
        let vendor = match which { 0 => words(*b"GenuineIntel"), 1 => words(*b"AuthenticAMD"), _ => features };
        let leaves = CpuidLeaves {
            vendor, features, extended_features, perfmon, perfmon_ext, perfmon_ext_counters, amd_features, amd_perfmon, perf_capabilities,
        };
        if let Ok(caps) = Capabilities::from_cpuid(&leaves) {
            prop_assert_eq!(caps.shape.validate(), Ok(()));
            if let Ok(guest) = GuestLeaves::of(&caps.shape, events) {
                let again = Capabilities::from_cpuid(&shown(&guest, caps.shape.vendor)).unwrap();
                prop_assert_eq!(again.shape, caps.shape);
            }
        }
    }
}
