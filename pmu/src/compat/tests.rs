//! Every rule: where it holds, where it does not, and that all mismatches are named.

use super::*;
use crate::filter::FilterSpec;
use proptest::prelude::*;

const ON: u64 = 1 << 22 | 3 << 16;

fn shape(text: &str) -> Shape {
    text.parse().unwrap()
}

fn image(shape: Shape, registers: &[(u32, u64)]) -> Image {
    Image { shape, registers: registers.to_vec(), in_service: false, pmi_pending: false, pmis: 0 }
}

/// An Intel image with something in every register.
fn busy() -> Image {
    image(
        shape("intel:v5:2+2:48"),
        &[
            (0xC1, (1 << 48) - 1),
            (0xC2, 7),
            (0x186, 0xC0 | ON),
            (0x187, 0x4F2E | ON | 1 << 20),
            (0x309, 0x8000_0000),
            (0x30A, 0),
            (0x38D, 0x0B3),
            (0x38E, 1 | 1 << 33 | 1 << 59 | 1 << 63),
            (0x38F, 3 | 3 << 32),
        ],
    )
}

fn busy_amd(version: u8) -> Image {
    let gp = if version == 0 { 4 } else { 6 };
    let shape = Shape::new(Vendor::Amd, version, gp, 0, 48).unwrap();
    let mut registers = match version {
        0 => vec![(0xC001_0000, 0x76 | ON), (0xC001_0004, 5)],
        _ => vec![(0xC001_0200, 0x76 | ON), (0xC001_0201, 5), (0xC001_020A, 0xC0 | ON | 0xF << 32)],
    };
    if version == 2 {
        registers.splice(0..0, [(0xC000_0300, 0x21), (0xC000_0301, 0x3F)]);
    }
    image(shape, &registers)
}

fn rules(found: &[Mismatch]) -> Vec<(&'static str, bool)> {
    found.iter().map(|m| (m.rule, m.warning)).collect()
}

fn with(image: &Image, target: &str, context: &CompatContext) -> Vec<(&'static str, bool)> {
    let found = check(image, &shape(target), context);
    assert!(found.iter().all(|m| !m.message.is_empty() && !m.remedy.is_empty()));
    rules(&found)
}

fn plain(image: &Image, target: &str) -> Vec<(&'static str, bool)> {
    with(image, target, &CompatContext::default())
}

#[test]
fn an_image_fits_its_own_shape_and_larger_ones() {
    for target in ["intel:v5:2+2:48", "intel:v5:8+4:48", "intel:v5:0xb3+0xb:48", "intel:v5:8+4:64"] {
        assert_eq!(plain(&busy(), target), [], "{target}");
    }
    for version in 0..=2 {
        let image = busy_amd(version);
        assert_eq!(plain(&image, &image.shape.to_string()), []);
    }
}

#[test]
fn c1_vendor_and_flavour() {
    assert_eq!(plain(&busy(), "amd:v2:6:48"), [("C1", false)]);
    assert_eq!(plain(&busy_amd(2), "intel:v5:8+4:48"), [("C1", false)]);
    assert_eq!(plain(&busy_amd(1), "amd:v2:6:48"), [("C1", false)]);
    assert_eq!(plain(&busy_amd(0), "amd:v1:6:48"), [("C1", false)]);
    let message = check(&busy(), &shape("amd:v1:6:48"), &CompatContext::default())[0].message.clone();
    assert!(
        message.contains("Intel architectural PerfMon") && message.contains("AMD PerfCtrExtCore"),
        "{message}"
    );
}

#[test]
fn i22_the_other_vendors_image_is_refused_whatever_it_holds() {
    for image in [busy(), image(shape("intel:v2:1+0:48"), &[])] {
        for target in ["amd:v0:4:48", "amd:v1:6:48", "amd:v2:6:48"] {
            assert!(refusal(&check(&image, &shape(target), &CompatContext::default())).is_some());
        }
    }
    for version in 0..=2 {
        assert!(
            refusal(&check(&busy_amd(version), &shape("intel:v5:8+4:48"), &CompatContext::default()))
                .is_some()
        );
    }
}

#[test]
fn c2_version_counters_and_widths() {
    let empty = |text| image(shape(text), &[]);
    assert_eq!(plain(&empty("intel:v5:2+2:48"), "intel:v4:8+4:48"), [("C2", false)]);
    assert_eq!(plain(&empty("intel:v2:2+2:48"), "intel:v5:8+4:48"), []);
    assert_eq!(
        plain(&empty("intel:v5:0x9+0:48"), "intel:v5:3+4:48"),
        [("C2", false)],
        "by bitmap: counter 3 is missing"
    );
    assert_eq!(plain(&empty("intel:v5:2+0x8:48"), "intel:v5:8+3:48"), [("C2", false)]);
    assert_eq!(plain(&empty("intel:v5:2+2:48"), "intel:v5:8+4:40"), [("C2", false), ("C2", false)]);
    assert_eq!(
        plain(&empty("intel:v5:2+0:48"), "intel:v5:8+4:40"),
        [("C2", false)],
        "no fixed counter, no fixed width"
    );
    assert_eq!(plain(&empty("intel:v5:2+2:40"), "intel:v5:8+4:48"), []);
}

#[test]
fn every_mismatch_is_named_not_only_the_first() {
    let found = check(&busy(), &shape("intel:v3:1+1:40"), &CompatContext::default());
    let refused: Vec<&str> = found.iter().filter(|m| m.rule == "C2").map(|m| m.message.as_str()).collect();
    assert_eq!(refused.len(), 5, "version, both bitmaps, both widths: {refused:?}");
    // The value of 0xC1 (48 bits), 0xC2, 0x187, 0x38D, 0x38F do not fit; status is only masked.
    let c4 = |warning| found.iter().filter(|m| m.rule == "C4" && m.warning == warning).count();
    assert_eq!((c4(false), c4(true)), (5, 1), "{found:#?}");
    assert!(found.iter().any(|m| m.message.contains("IA32_PERFEVTSEL1")));
}

#[test]
fn c3_capabilities() {
    let guest = |caps| Shape { perf_capabilities: caps, ..shape("intel:v5:2+2:48") };
    let host = |caps| Shape { perf_capabilities: caps, ..shape("intel:v5:8+4:48") };
    for (want, have, count) in [
        (1 << 13, 1 << 13, 0),
        (0, 1 << 13, 0),
        (1 << 13, 0, 1),
        (0x5, 0x5, 0),
        (0x5, 0x6, 1),
        (0, 0x6, 0),
        (0x400, 0x500, 1),
        (0x405 | 1 << 15, 0, 3),
    ] {
        assert_eq!(check_shape(&guest(want), &host(have)).len(), count, "{want:#x} on {have:#x}");
    }
}

#[test]
fn c4_values_that_do_not_fit() {
    let refused =
        |registers: &[(u32, u64)]| plain(&image(shape("intel:v3:2+1:48"), registers), "intel:v3:2+1:48");
    for register in [
        (0xC1, 1 << 48),
        (0xC3, 1),
        (0x186, 1 << 21),
        (0x186, 1 << 32),
        (0x188, ON),
        (0x309, 1 << 48),
        (0x30A, 1),
        (0x38D, 0x4),
        (0x38D, 0x10),
        (0x38F, 1 << 2),
        (0x38F, 1 << 33),
        (0x38E, 1 << 59),
        (0x38E, 1 << 2),
        (0x4C1, 0),
        (0x390, 0),
        (0x345, 0),
        (0x329, 0),
        (0x10, 0),
    ] {
        assert_eq!(refused(&[register]), [("C4", false)], "{register:#x?}");
    }
    assert_eq!(refused(&[(0xC3, 0), (0x30A, 0)]), [], "a zero for an absent counter loses nothing");
    assert_eq!(refused(&[(0xC2, 0), (0xC1, 0)]), [("C4", false)], "out of order");
    assert_eq!(refused(&[(0xC1, 0), (0xC1, 0)]), [("C4", false)], "twice");
    assert_eq!(refused(&vec![(0xC1, 0); 65]), [("C4", false)], "too many registers are not looked at");
    let amd = image(shape("amd:v2:6:48"), &[(0xC001_0200, 1 << 40)]);
    assert_eq!(plain(&amd, "amd:v2:6:48"), [("C4", false)], "GuestOnly is the host's");
}

#[test]
fn c4_status_bits_alone_are_masked_with_a_warning() {
    let guest = image(shape("intel:v5:2+1:48"), &[(0x38E, 1 | 1 << 59)]);
    assert_eq!(plain(&guest, "intel:v3:2+1:48"), [("C2", false), ("C4", true)]);
}

#[test]
fn c5_events_that_the_target_filters() {
    let filter = |action, fixed, events: &[u64]| {
        let spec = FilterSpec {
            action,
            fixed_counter_bitmap: fixed,
            events: events.to_vec(),
            ..FilterSpec::default()
        };
        Some(EventFilter::new(Vendor::Intel, spec).unwrap())
    };
    let context = |source, target| CompatContext {
        source_filter: source,
        target_filter: target,
        ..CompatContext::default()
    };
    let with = |context: &CompatContext| check(&busy(), &shape("intel:v5:8+4:48"), context);
    assert_eq!(with(&context(filter(1, 0, &[0xC0]), None)), [], "what the source froze may count");
    let found = with(&context(None, filter(1, 0b10, &[0xC0])));
    assert_eq!(rules(&found), [("C5", true)]);
    assert!(
        found[0].message.contains("gp0")
            && found[0].message.contains("fixed1")
            && !found[0].message.contains("gp1")
    );
    assert_eq!(with(&context(filter(1, 0b10, &[0xC0]), filter(1, 0b10, &[0xC0]))), []);
    assert!(refusal(&found).is_none());
}

#[test]
fn c6_raw_events_on_another_processor() {
    let cpu = |model| Some(FamilyModel { family: 6, model });
    let mut raw = busy();
    let context =
        |source, target| CompatContext { source_cpu: source, target_cpu: target, ..CompatContext::default() };
    assert_eq!(
        with(&raw, "intel:v5:8+4:48", &context(cpu(0x8F), cpu(0xCF))),
        [],
        "architectural events only"
    );
    raw.registers[3].1 = 0x01D3 | ON;
    assert_eq!(with(&raw, "intel:v5:8+4:48", &context(cpu(0x8F), cpu(0xCF))), [("C6", true)]);
    assert_eq!(with(&raw, "intel:v5:8+4:48", &context(cpu(0x8F), cpu(0x8F))), []);
    assert_eq!(with(&raw, "intel:v5:8+4:48", &context(None, cpu(0x8F))), []);
    raw.registers[3].1 &= !(1 << 22);
    assert_eq!(
        with(&raw, "intel:v5:8+4:48", &context(cpu(0x8F), cpu(0xCF))),
        [],
        "disabled selectors count nothing"
    );
    let amd = busy_amd(2);
    assert_eq!(
        with(&amd, "amd:v2:6:48", &context(cpu(1), cpu(2))),
        [("C6", true)],
        "event 0xFC0 is not 0xC0"
    );
}

#[test]
fn c7_a_target_without_a_pmu() {
    let none = image(Shape::none(), &[]);
    let off = CompatContext { target_pmu_disabled: true, ..CompatContext::default() };
    for target in ["intel:v5:8+4:48", "amd:v2:6:48"] {
        assert_eq!(plain(&none, target), []);
        assert_eq!(with(&none, target, &off), []);
    }
    assert_eq!(with(&image(Shape::none(), &[(0xC1, 0)]), "intel:v5:8+4:48", &off), []);
    assert_eq!(with(&image(Shape::none(), &[(0xC1, 1)]), "intel:v5:8+4:48", &off), [("C4", false)]);
    assert_eq!(with(&busy(), "intel:v5:2+2:48", &off), [("C7", false)]);
    assert_eq!(rules(&check(&busy(), &Shape::none(), &off))[0], ("C7", false));
    assert_eq!(rules(&check_shape(&busy().shape, &Shape::none())), [("C7", false)]);
}

#[test]
fn c8_only_under_kvm_and_only_a_warning() {
    let kvm = CompatContext { target_is_kvm: true, ..CompatContext::default() };
    assert_eq!(with(&busy(), "intel:v5:8+4:48", &kvm), [("C8", true)]);
    assert_eq!(with(&busy(), "intel:v5:2+2:48", &kvm), []);
    assert_eq!(plain(&busy(), "intel:v5:8+4:48"), []);
}

#[test]
fn c9_status_that_cannot_be_put_back() {
    let context = CompatContext { target_status_set: false, ..CompatContext::default() };
    assert_eq!(with(&busy(), "intel:v5:8+4:48", &context), [("C9", false)]);
    let mut clean = busy();
    clean.registers[7].1 = 0;
    assert_eq!(with(&clean, "intel:v5:8+4:48", &context), []);
}

#[test]
fn an_impossible_shape_is_a_mismatch_and_not_a_panic() {
    let wrong = Shape { gp_width: 200, ..shape("intel:v5:8+4:48") };
    assert_eq!(
        rules(&check(&image(wrong, &[(0xC1, 1)]), &shape("intel:v5:8+4:48"), &CompatContext::default())),
        [("C2", false)]
    );
    assert_eq!(rules(&check_shape(&shape("intel:v5:8+4:48"), &wrong)), [("C2", false)]);
}

proptest! {
    #[test]
    fn no_image_panics_and_its_own_host_never_refuses_what_validates(
        vendor in any::<bool>(), version in 0u8..7, gp in any::<u16>(), fixed in any::<u8>(), width in 30u8..70,
        registers in proptest::collection::vec((prop_oneof![0xC0u32..0xD0, 0x180u32..0x190, 0x300u32..0x3A0, any::<u32>()], any::<u64>()), 0..70),
        status_set in any::<bool>(),
    ) {
        let vendor = if vendor { Vendor::Intel } else { Vendor::Amd };
        let shape = Shape { vendor, version, gp: gp.into(), fixed: fixed.into(), gp_width: width, fixed_width: width, perf_capabilities: 0 };
        let image = image(shape, &registers);
        let context = CompatContext { target_status_set: status_set, ..CompatContext::default() };
        for target in [shape, "intel:v5:8+4:48".parse().unwrap(), "amd:v2:6:48".parse().unwrap()] {
            let found = check(&image, &target, &context);
            prop_assert!(found.iter().all(|m| m.rule.starts_with('C')));
        }
        if shape.validate().is_ok() {
            prop_assert_eq!(check_shape(&shape, &shape), vec![]);
        }
    }
}
