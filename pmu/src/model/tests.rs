//! Every row of pmu-reference 1.2, 1.3, 1.5, 1.7 and 1.8, by vendor and version.

use super::*;
use proptest::prelude::*;

const W48: u64 = (1 << 48) - 1;
const EN: u64 = 1 << 22;
const OS_USR: u64 = 3 << 16;
const ON: u64 = EN | OS_USR;

fn intel(version: u8) -> Shape {
    Shape {
        vendor: Vendor::Intel,
        version,
        gp: 0xFF,
        fixed: if version >= 2 { 0xF } else { 0 },
        gp_width: 48,
        fixed_width: if version >= 2 { 48 } else { 0 },
        perf_capabilities: 1 << 13 | 1 << 15,
    }
}

fn amd(version: u8) -> Shape {
    let gp = if version == 0 { 0xF } else { 0x3F };
    Shape { vendor: Vendor::Amd, version, gp, fixed: 0, gp_width: 48, fixed_width: 0, perf_capabilities: 0 }
}

fn model(shape: Shape) -> ModelPmu {
    ModelPmu::new(shape)
}

fn set(m: &mut ModelPmu, msr: u32, value: u64) {
    assert_eq!(m.wrmsr(msr, value), Ok(()), "wrmsr {msr:#x} {value:#x}");
}

fn faults(m: &mut ModelPmu, msr: u32, value: u64) {
    let before = m.clone();
    assert_eq!(m.wrmsr(msr, value), Err(HwError::Fault), "wrmsr {msr:#x} {value:#x}");
    assert_eq!(*m, before, "a faulting write changes nothing");
}

fn events(n: u64) -> Events {
    Events { cycles: n, instructions: n, ref_cycles: n, slots: n, branches: n }
}

#[test]
fn reset_values() {
    for version in 1..=5 {
        let mut m = model(intel(version));
        assert_eq!(m.rdmsr(0x38F), if version >= 2 { Ok(0xFF) } else { Err(HwError::Fault) });
        for msr in [0xC1, 0xC8, 0x186, 0x18D, 0x4C1] {
            assert_eq!(m.rdmsr(msr), Ok(0));
        }
    }
    assert_eq!(model(amd(2)).rdmsr(0xC000_0301), Ok(0x3F));
    for version in 0..2 {
        assert_eq!(model(amd(version)).rdmsr(0xC000_0301), Err(HwError::Fault));
    }
}

#[test]
fn legacy_counter_writes_are_sign_extended_and_full_width_ones_are_not() {
    let mut m = model(intel(5));
    for (written, held) in [
        (0x7FFF_FFFF, 0x7FFF_FFFF),
        (0x8000_0000, 0xFFFF_8000_0000),
        (0xFFFF_FFFF, W48),
        (0xDEAD_0000_0000_0001, 1),
        (u64::MAX, W48),
    ] {
        set(&mut m, 0xC2, written);
        assert_eq!(m.rdmsr(0xC2), Ok(held));
        assert_eq!(m.rdmsr(0x4C2), Ok(held), "both numbers are the same register");
        assert_eq!(m.rdpmc(1), Ok(held));
    }
    for value in [0, 0x8000_0000, 0xFFFF_FFFF, 1 << 47, W48] {
        set(&mut m, 0x4C2, value);
        assert_eq!((m.rdmsr(0xC2), m.rdpmc(1)), (Ok(value), Ok(value)));
    }
    for value in [1 << 48, 1 << 63, u64::MAX] {
        faults(&mut m, 0x4C2, value);
        faults(&mut m, 0x309, value);
    }
    let mut narrow = model(Shape { gp_width: 40, fixed_width: 40, ..intel(2) });
    set(&mut narrow, 0xC1, 0x8000_0000);
    assert_eq!(narrow.rdmsr(0xC1), Ok(0xFF_8000_0000));
    faults(&mut narrow, 0x4C1, 1 << 40);
}

#[test]
fn full_width_port_needs_its_capability() {
    let mut m = model(Shape { perf_capabilities: 0, ..intel(5) });
    assert_eq!(m.rdmsr(0x4C1), Err(HwError::Fault));
    faults(&mut m, 0x4C1, 0);
    faults(&mut m, 0x329, 0);
    assert_eq!(m.rdpmc(1 << 29), Err(HwError::Fault));
}

#[test]
fn intel_reserved_bits_fault() {
    let mut m = model(intel(5));
    for bit in (32..64).chain([21]) {
        faults(&mut m, 0x186, 1 << bit);
    }
    set(&mut m, 0x186, 0xFFFF_FFFF & !(1 << 21));
    for bit in (8..32).chain(36..48).chain(49..64) {
        faults(&mut m, 0x38F, 1 << bit);
    }
    set(&mut m, 0x38F, 0x1_000F_0000_00FF);
    for i in 0..4 {
        faults(&mut m, 0x38D, 4 << (4 * i));
        set(&mut m, 0x38D, 0xB << (4 * i));
    }
    for bit in 16..64 {
        faults(&mut m, 0x38D, 1 << bit);
    }
    for port in [0x390, 0x391] {
        for bit in (8..32).chain(36..48).chain(49..58).chain(60..62) {
            faults(&mut m, port, 1 << bit);
        }
        set(&mut m, port, 0xCC01_000F_0000_00FF);
    }
    for read_only in [0x38E, 0x392, 0x345] {
        faults(&mut m, read_only, 0);
    }
    let mut v3 = model(intel(3));
    for bit in [58, 59] {
        faults(&mut v3, 0x390, 1 << bit);
    }
    for absent in [0x391, 0x392] {
        faults(&mut v3, absent, 0);
        assert_eq!(v3.rdmsr(absent), Err(HwError::Fault));
    }
}

#[test]
fn v1_has_counters_and_selectors_only() {
    let mut m = model(Shape { gp: 3, perf_capabilities: 0, ..intel(1) });
    for msr in [0x309, 0x38D, 0x38E, 0x38F, 0x390, 0x391, 0x392, 0xC3, 0x188] {
        faults(&mut m, msr, 0);
        assert_eq!(m.rdmsr(msr), Err(HwError::Fault));
        assert_eq!(m.raw(msr), None);
    }
    assert_eq!(m.rdpmc(1 << 30), Err(HwError::Fault));
    set(&mut m, 0xC1, u64::MAX);
    set(&mut m, 0x186, 0xC0 | ON);
    m.feed(&events(3), CpuMode::Guest);
    assert_eq!(m.rdpmc(0), Ok(2), "counts without a global control, wraps without a status");
}

#[test]
fn absent_counters_fault_but_the_p6_ones_swallow_writes() {
    let mut m = model(Shape { gp: 0b100, fixed: 0b101, ..intel(5) });
    for msr in [0xC1, 0xC2, 0x186, 0x187] {
        set(&mut m, msr, 0xFFFF);
        assert_eq!(m.rdmsr(msr), Ok(0));
    }
    for msr in [0xC4, 0x189, 0x4C1, 0x4C4, 0x30A, 0x30C] {
        faults(&mut m, msr, 0);
        assert_eq!(m.rdmsr(msr), Err(HwError::Fault));
    }
    for (index, want) in
        [(0, false), (2, true), (3, false), (1 << 30, true), (1 << 30 | 1, false), (1 << 30 | 2, true)]
    {
        assert_eq!(m.rdpmc(index).is_ok(), want, "rdpmc {index:#x}");
    }
    faults(&mut m, 0x38D, 1 << 4);
    faults(&mut m, 0x38F, 1);
    faults(&mut m, 0x38F, 1 << 33);
}

#[test]
fn rdpmc_encodings() {
    let mut m = model(intel(5));
    set(&mut m, 0x30A, 7);
    set(&mut m, 0x329, 0xABCD);
    assert_eq!(m.rdpmc(1 << 30 | 1), Ok(7));
    assert_eq!(m.rdpmc(1 << 29), Ok(0xABCD));
    for junk in [8, 64, 1 << 30 | 4, 1 << 30 | 64, 1 << 29 | 1, 1 << 31, 1 << 31 | 1, u32::MAX] {
        assert_eq!(m.rdpmc(junk), Err(HwError::Fault), "{junk:#x}");
    }
    let mut a = model(amd(2));
    assert_eq!(a.rdpmc(5), Ok(0));
    for junk in [6, 10, 64, 1 << 30, 1 << 29, u32::MAX] {
        assert_eq!(a.rdpmc(junk), Err(HwError::Fault), "{junk:#x}");
    }
}

#[test]
fn fixed_counter_3_resets_perf_metrics() {
    let mut m = model(intel(5));
    set(&mut m, 0x329, u64::MAX);
    set(&mut m, 0x30A, 1);
    assert_eq!(m.rdmsr(0x329), Ok(u64::MAX), "other fixed counters do not");
    set(&mut m, 0x30C, 5);
    assert_eq!((m.rdmsr(0x329), m.rdmsr(0x30C)), (Ok(0), Ok(5)));
    set(&mut m, 0x329, 3);
    faults(&mut m, 0x30C, u64::MAX);
}

#[test]
fn status_ports() {
    let mut m = model(intel(4));
    set(&mut m, 0x391, 0b1010);
    set(&mut m, 0x391, 0);
    set(&mut m, 0x391, 1 << 33);
    assert_eq!(m.rdmsr(0x38E), Ok(0x2_0000_000A), "SET only sets");
    set(&mut m, 0x390, 0);
    set(&mut m, 0x390, 0b0011);
    assert_eq!(m.rdmsr(0x38E), Ok(0x2_0000_0008), "RESET clears what is written 1");
    assert_eq!((m.rdmsr(0x390), m.rdmsr(0x391)), (Ok(0), Ok(0)));
    assert_eq!((m.raw(0x390), m.raw(0x391)), (Some(0), Some(0)));
}

#[test]
fn in_use_shows_selectors_and_armed_interrupts() {
    let mut m = model(intel(4));
    assert_eq!(m.rdmsr(0x392), Ok(0));
    set(&mut m, 0x188, 0x3C);
    set(&mut m, 0x187, ON);
    set(&mut m, 0x38D, 0x20);
    assert_eq!(m.rdmsr(0x392), Ok(1 << 2 | 1 << 33), "event 0x00 reads as not in use");
    set(&mut m, 0x38D, 0x28);
    assert_eq!(m.rdmsr(0x392), Ok(1 << 2 | 1 << 33 | 1 << 63));
    set(&mut m, 0x38D, 0x20);
    set(&mut m, 0x187, INT);
    assert_eq!(m.rdmsr(0x392), Ok(1 << 2 | 1 << 33 | 1 << 63));
}

#[test]
fn a_counter_needs_enable_privilege_and_global_bit() {
    let mut m = model(intel(5));
    set(&mut m, 0x38F, 0b1101);
    for (i, selector) in [0xC0 | ON, 0xC0 | ON, 0xC0 | OS_USR, 0xC0 | EN].into_iter().enumerate() {
        set(&mut m, 0x186 + i as u32, selector);
    }
    set(&mut m, 0x38D, 0x1231);
    m.feed(&events(5), CpuMode::Guest);
    let got: Vec<u64> = (0..4).map(|i| m.rdpmc(i).unwrap()).collect();
    assert_eq!(got, [5, 0, 0, 0]);
    assert_eq!(m.rdpmc(1 << 30), Ok(0), "global bit 32 is clear");
    set(&mut m, 0x38F, 0xF << 32);
    for (field, want) in [(0x1111, 5), (0x2222, 10), (0x3333, 15), (0x8888, 15)] {
        set(&mut m, 0x38D, field);
        m.feed(&events(5), CpuMode::Host);
        assert!((0..4).all(|i| m.rdpmc(1 << 30 | i) == Ok(want)), "field {field:#x}");
    }
}

#[test]
fn selectors_count_their_event() {
    let fed = Events { cycles: 1, instructions: 2, ref_cycles: 3, slots: 4, branches: 5 };
    let count = |shape: Shape, extended: bool, selector: u64| {
        let mut m = if extended { ModelPmu::with_extended_events(shape) } else { ModelPmu::new(shape) };
        let (ctl, ctr) =
            if shape.vendor == Vendor::Intel { (0x186, 0xC1) } else { (0xC001_0000, 0xC001_0004) };
        set(&mut m, ctl, selector | ON);
        m.feed(&fed, CpuMode::Guest);
        m.rdmsr(ctr).unwrap()
    };
    for (selector, plain, extended) in [
        (0x3C, 1, 1),
        (0xC0, 2, 2),
        (0x13C, 3, 3),
        (0xC4, 0, 5),
        (0x1A4, 0, 4),
        (0x76, 0, 0),
        (0xC2, 0, 0),
        (0x23C, 0, 0),
        (0, 0, 0),
    ] {
        assert_eq!(count(intel(5), false, selector), plain, "Intel {selector:#x}");
        assert_eq!(count(intel(5), true, selector), extended, "Intel {selector:#x} extended");
    }
    for version in 0..=2 {
        for (selector, plain, extended) in
            [(0x76, 1, 1), (0xC0, 2, 2), (0xC2, 0, 5), (0x3C, 0, 0), (0xC4, 0, 0), (0x1_0000_00C0, 0, 0)]
        {
            assert_eq!(count(amd(version), false, selector), plain, "AMD {selector:#x}");
            assert_eq!(count(amd(version), true, selector), extended, "AMD {selector:#x} extended");
        }
    }
    for condition in [1 << 18, 1 << 23, 1 << 24, 0xFF << 24] {
        assert_eq!(count(intel(5), true, 0xC0 | condition), 0, "EDGE, INV, CMASK count nothing");
        assert_eq!(count(amd(2), true, 0xC0 | condition), 0);
    }
    let mut m = model(intel(5));
    set(&mut m, 0x38F, 0xF << 32);
    set(&mut m, 0x38D, 0x3333);
    m.feed(&fed, CpuMode::Guest);
    let fixed: Vec<u64> = (0..4).map(|i| m.rdpmc(1 << 30 | i).unwrap()).collect();
    assert_eq!(fixed, [2, 1, 3, 4]);
}

#[test]
fn wraps_set_status_and_keep_the_remainder() {
    let mut m = model(intel(2));
    set(&mut m, 0x186, 0xC0 | ON);
    set(&mut m, 0x38F, 1 | 1 << 33);
    set(&mut m, 0x38D, 0x20);
    set(&mut m, 0x4C1, W48);
    set(&mut m, 0x30A, W48 - 1);
    m.feed(&events(1), CpuMode::Guest);
    assert_eq!((m.rdpmc(0), m.rdmsr(0x38E)), (Ok(0), Ok(1)), "all ones to 0 is a wrap");
    m.feed(&events(1), CpuMode::Guest);
    assert_eq!(m.rdmsr(0x38E), Ok(1 | 1 << 33));
    set(&mut m, 0x390, 1 | 1 << 33);
    m.feed(&events(u64::MAX), CpuMode::Guest);
    assert_eq!(
        (m.rdpmc(0), m.rdmsr(0x38E)),
        (Ok(0), Ok(1 | 1 << 33)),
        "many wraps in one feed set the bit once"
    );
    set(&mut m, 0x390, 1 | 1 << 33);
    set(&mut m, 0xC1, 0);
    assert_eq!(m.rdmsr(0x38E), Ok(0), "a write is no wrap");
}

#[test]
fn a_write_to_a_running_counter_takes_effect() {
    let mut m = model(intel(5));
    set(&mut m, 0x186, 0xC0 | ON);
    m.feed(&events(9), CpuMode::Guest);
    set(&mut m, 0xC1, 0);
    assert_eq!(m.rdpmc(0), Ok(0));
    set(&mut m, 0xC1, 0xFFFF_FFFF);
    m.feed(&events(2), CpuMode::Guest);
    assert_eq!((m.rdpmc(0), m.rdmsr(0x38E)), (Ok(1), Ok(1)));
}

#[test]
fn freeze_on_pmi_in_both_generations() {
    for version in 2..=5 {
        let arm = |debug: u64, int: u64| {
            let mut m = model(intel(version));
            set(&mut m, 0x1D9, debug);
            set(&mut m, 0x186, 0xC0 | ON | int);
            set(&mut m, 0x187, 0xC0 | ON);
            set(&mut m, 0xC1, u64::MAX);
            m.feed(&events(2), CpuMode::Guest);
            assert_eq!(m.rdpmc(1), Ok(2), "the feed that wraps counts whole");
            m
        };
        for (debug, int) in [(0, INT), (FREEZE_ON_PMI, 0)] {
            let mut m = arm(debug, int);
            assert_eq!(
                (m.rdmsr(0x38E), m.rdmsr(0x38F)),
                (Ok(1), Ok(0xFF)),
                "v{version}: no freeze without both"
            );
        }
        let mut m = arm(FREEZE_ON_PMI, INT);
        if version >= 4 {
            assert_eq!((m.rdmsr(0x38E), m.rdmsr(0x38F)), (Ok(1 | CTR_FRZ), Ok(0xFF)));
        } else {
            assert_eq!((m.rdmsr(0x38E), m.rdmsr(0x38F)), (Ok(1), Ok(0)));
        }
        m.feed(&events(7), CpuMode::Guest);
        assert_eq!(m.rdpmc(1), Ok(2), "v{version}: frozen");
        if version >= 4 {
            set(&mut m, 0x390, CTR_FRZ);
        } else {
            set(&mut m, 0x38F, 0xFF);
        }
        m.feed(&events(7), CpuMode::Guest);
        assert_eq!(m.rdpmc(1), Ok(9), "v{version}: thawed");
    }
}

#[test]
fn freeze_on_pmi_of_a_fixed_counter() {
    let mut m = model(intel(5));
    set(&mut m, 0x1D9, FREEZE_ON_PMI);
    set(&mut m, 0x38F, 1 << 32);
    set(&mut m, 0x38D, 0xB);
    set(&mut m, 0x309, W48);
    m.feed(&events(1), CpuMode::Guest);
    assert_eq!(m.rdmsr(0x38E), Ok(1 << 32 | CTR_FRZ));
    faults(&mut m, 0x1D9, 1 << 2);
}

#[test]
fn counter_freeze_by_the_set_port_stops_everything() {
    let mut m = model(intel(4));
    set(&mut m, 0x186, 0xC0 | ON);
    set(&mut m, 0x391, CTR_FRZ);
    m.feed(&events(4), CpuMode::Guest);
    assert_eq!(m.rdpmc(0), Ok(0));
}

#[test]
fn amd_drops_what_intel_faults() {
    let mut m = model(amd(2));
    set(&mut m, 0xC001_0200, u64::MAX);
    assert_eq!(m.rdmsr(0xC001_0200), Ok(0x0000_030F_FFD7_FFFF));
    set(&mut m, 0xC001_0201, u64::MAX);
    assert_eq!((m.rdmsr(0xC001_0201), m.rdpmc(0)), (Ok(W48), Ok(W48)), "full width, no sign extension");
    set(&mut m, 0xC001_0201, 0x8000_0000);
    assert_eq!(m.rdpmc(0), Ok(0x8000_0000));
    set(&mut m, 0xC000_0301, u64::MAX);
    assert_eq!(m.rdmsr(0xC000_0301), Ok(0x3F));
    set(&mut m, 0xC000_0303, u64::MAX);
    assert_eq!(m.rdmsr(0xC000_0300), Ok(0x3F));
    set(&mut m, 0xC000_0300, 0);
    assert_eq!(m.rdmsr(0xC000_0300), Ok(0x3F), "writes to status are ignored");
    set(&mut m, 0xC000_0302, u64::MAX << 2);
    assert_eq!((m.rdmsr(0xC000_0300), m.rdmsr(0xC000_0302), m.rdmsr(0xC000_0303)), (Ok(3), Ok(0), Ok(0)));
    for absent in [0xC001_020C, 0xC001_020D, 0xC1, 0x186, 0x38F, 0x309, 0xC001_0008] {
        faults(&mut m, absent, 0);
    }
}

#[test]
fn amd_k7_numbers_are_aliases_of_the_first_four() {
    for version in 1..=2 {
        let mut m = model(amd(version));
        for i in 0..4 {
            set(&mut m, 0xC001_0000 + i, 0xC0 | u64::from(i));
            set(&mut m, 0xC001_0004 + i, 100 + u64::from(i));
            assert_eq!(m.rdmsr(0xC001_0200 + 2 * i), Ok(0xC0 | u64::from(i)));
            assert_eq!(m.rdmsr(0xC001_0201 + 2 * i), Ok(100 + u64::from(i)));
            set(&mut m, 0xC001_0201 + 2 * i, 7);
            assert_eq!(m.raw(0xC001_0004 + i), Some(7));
        }
    }
    let mut k7 = model(amd(0));
    for absent in [0xC001_0200, 0xC001_0201, 0xC000_0300] {
        faults(&mut k7, absent, 0);
    }
    set(&mut k7, 0xC001_0003, 0x76 | ON);
    k7.feed(&events(3), CpuMode::Guest);
    assert_eq!((k7.rdpmc(3), k7.rdpmc(4)), (Ok(3), Err(HwError::Fault)));
}

/// The kernel's svm_pmu_host_guest_test: four counters {none, G, H, HG} through SVME 0, SVME 1 in the host, in the guest.
#[test]
fn amd_guest_only_and_host_only() {
    let counted = |svme: bool, mode: CpuMode| {
        let mut m = model(amd(2));
        m.set_svme(svme);
        for (i, bits) in (0u32..).zip([0u64, 1, 2, 3]) {
            set(&mut m, 0xC001_0200 + 2 * i, 0xC0 | ON | bits << 40);
        }
        m.feed(&events(1), mode);
        [0, 1, 2, 3].map(|i| m.rdpmc(i).unwrap())
    };
    assert_eq!(counted(false, CpuMode::Guest), [1, 0, 0, 0]);
    assert_eq!(counted(false, CpuMode::Host), [1, 0, 0, 0]);
    assert_eq!(counted(true, CpuMode::Host), [1, 0, 1, 1]);
    assert_eq!(counted(true, CpuMode::Guest), [1, 1, 0, 1]);
}

#[test]
fn amd_perfmon_v2_wraps_into_its_status_and_older_ones_have_none() {
    for version in 0..=2 {
        let mut m = model(amd(version));
        set(&mut m, 0xC001_0001, 0xC0 | ON | INT);
        set(&mut m, 0xC001_0005, W48);
        m.feed(&events(3), CpuMode::Guest);
        assert_eq!(m.rdpmc(1), Ok(2));
        assert_eq!(m.raw(0xC000_0300), (version == 2).then_some(2));
        if version == 2 {
            set(&mut m, 0xC000_0301, 0);
            m.feed(&events(3), CpuMode::Guest);
            assert_eq!(m.rdpmc(1), Ok(2), "GlobalCtl gates counting");
        }
    }
}

#[test]
fn host_set_puts_values_in_place() {
    let mut m = model(intel(2));
    assert_eq!(m.host_set(0xC1, 0x8000_0000), Ok(()));
    assert_eq!(m.raw(0xC1), Some(0x8000_0000), "no sign extension: it is a value, not a guest's write");
    assert_eq!(m.host_set(0x4C1, u64::MAX), Ok(()));
    assert_eq!(m.raw(0xC1), Some(W48));
    assert_eq!(m.host_set(0x38E, 0x8000_0001_0000_0003), Ok(()), "status too, and below v4");
    assert_eq!(m.host_set(0x38E, 0x2), Ok(()));
    assert_eq!(m.raw(0x38E), Some(2), "absolute");
    let before = m.clone();
    for (msr, value) in [(0x38E, 1 << 59), (0x38F, 1 << 40), (0x345, 0), (0x186, 1 << 40), (0x1234, 0)] {
        assert_eq!(m.host_set(msr, value), Err(HwError::Fault), "{msr:#x}");
    }
    assert_eq!(m, before);
    let mut a = model(amd(2));
    assert_eq!(a.host_set(0xC000_0300, u64::MAX), Ok(()));
    assert_eq!(a.raw(0xC000_0300), Some(0x3F));
    assert_eq!(a.host_set(0xC001_0004, u64::MAX), Ok(()));
    assert_eq!(a.raw(0xC001_0201), Some(W48));
}

#[test]
fn reset_clears_everything_on_both_vendors() {
    let mut m = model(intel(5));
    for (msr, value) in [
        (0x186, 0xC0 | ON),
        (0x4C1, 5),
        (0x309, 6),
        (0x38D, 0xB),
        (0x391, 1),
        (0x329, 1),
        (0x1D9, 1),
        (0x38F, 0),
    ] {
        set(&mut m, msr, value);
    }
    m.reset();
    assert_eq!(m, model(intel(5)));
    let mut a = model(amd(2));
    for (msr, value) in [(0xC001_0200, 0xC0 | ON), (0xC001_0201, 5), (0xC000_0303, 1), (0xC000_0301, 0)] {
        set(&mut a, msr, value);
    }
    a.reset();
    assert_eq!(a, model(amd(2)));
}

#[test]
fn helpers_at_their_edges() {
    assert_eq!(
        (low_bits(0), low_bits(1), low_bits(63), low_bits(64), low_bits(255)),
        (0, 1, u64::MAX >> 1, u64::MAX, u64::MAX)
    );
    assert_eq!(bits(0).count(), 0);
    assert_eq!(bits(u64::MAX).count(), 64);
    assert_eq!(bits(1 << 63 | 0b101).collect::<Vec<_>>(), [0, 2, 63]);
}

fn any_shape() -> impl Strategy<Value = Shape> {
    (any::<bool>(), any::<u8>(), any::<u64>(), any::<u64>(), any::<u8>(), any::<u8>(), any::<u64>()).prop_map(
        |(is_intel, version, gp, fixed, gp_width, fixed_width, perf_capabilities)| Shape {
            vendor: if is_intel { Vendor::Intel } else { Vendor::Amd },
            version: if is_intel { version % 6 } else { version % 3 },
            gp,
            fixed,
            gp_width,
            fixed_width,
            perf_capabilities,
        },
    )
}

fn any_msr() -> impl Strategy<Value = u32> {
    prop_oneof![
        0xC0u32..0xE0,
        0x180u32..0x1A0,
        0x305u32..0x320,
        0x329u32..0x32A,
        0x340u32..0x3A0,
        0x4C0u32..0x4E0,
        0x1D9u32..0x1DA,
        0xC000_0300u32..0xC000_0304,
        0xC001_0000u32..0xC001_0008,
        0xC001_0200u32..0xC001_0230,
        any::<u32>()
    ]
}

proptest! {
    /// Whatever the shape and whatever is done to it, the model neither panics nor holds a counter above its width.
    #[test]
    fn any_access_keeps_the_invariants(
        shape in any_shape(),
        ops in proptest::collection::vec((0u8..5, any_msr(), any::<u64>(), any::<u32>()), 0..60),
    ) {
        let mut m = ModelPmu::with_extended_events(shape);
        for (op, msr, value, index) in ops {
            match op {
                0 => { let _ = m.wrmsr(msr, value); }
                1 => { let _ = m.wrmsr(msr, value & 0xFFFF_FFFF & !(1 << 21)); }
                2 => { let _ = m.host_set(msr, value); }
                3 => m.feed(&events(value), if index & 1 == 0 { CpuMode::Guest } else { CpuMode::Host }),
                _ => { let _ = m.rdpmc(index & 0x6000_003F); }
            }
            let read = m.clone();
            prop_assert_eq!(m.rdmsr(msr).ok(), read.raw(msr), "rdmsr and raw agree");
            prop_assert_eq!(&m, &read, "reading has no side effect");
        }
        prop_assert!(m.counters.iter().all(|v| *v <= low_bits(u32::from(shape.gp_width))));
        prop_assert!(m.fixed_counters.iter().all(|v| *v <= low_bits(u32::from(shape.fixed_width))));
    }

    /// Feeding a time whole or in parts is the same as long as nothing freezes.
    #[test]
    fn feeds_add_up(parts in proptest::collection::vec(0u64..1 << 50, 1..20), start in 0u64..1 << 48) {
        let make = || {
            let mut m = model(intel(5));
            set(&mut m, 0x186, 0xC0 | ON);
            set(&mut m, 0x4C1, start);
            m
        };
        let (mut whole, mut split) = (make(), make());
        whole.feed(&events(parts.iter().sum()), CpuMode::Guest);
        for part in &parts {
            split.feed(&events(*part), CpuMode::Guest);
        }
        prop_assert_eq!(whole, split);
    }
}
