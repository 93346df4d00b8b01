//! The report on hosts good and bad, and that it accounts for every patch that only a kernel can do.

use super::*;
use crate::cpuid::FamilyModel;

fn good() -> Facts {
    let shape: Shape = "intel:v5:8+4:48".parse().unwrap();
    let caps = Capabilities {
        shape,
        arch_events: 0xFF,
        perfmon_v6: false,
        family_model: FamilyModel { family: 6, model: 0x8F },
    };
    Facts {
        kernel: "7.0.1".into(),
        pmu: Some(Ok(caps)),
        is_guest: false,
        model: Some(shape),
        kvm: Some(Ok(())),
        kvm_msr_filter: true,
        kvm_pmu_capability: true,
        enable_pmu: Some(true),
        enable_mediated_pmu: Some(true),
        nested: Some(false),
        nmi_watchdog: Some(false),
        perf_users: Some(vec![]),
        rdpmc: Some(1),
        isolated_cores: vec![2, 3],
        msr_cores: vec![2, 3],
        msr_allow_writes: Some("on".into()),
        lockdown: Some("none".into()),
    }
}

const MODES: [Mode; 3] = [Mode::Model, Mode::Msr, Mode::Kvm];

fn at(facts: &Facts, mode: Mode, id: &str) -> Level {
    let lines = report(facts, mode);
    lines.iter().find(|l| l.id == id).unwrap_or_else(|| panic!("no line {id}")).level
}

#[test]
fn a_good_host_has_no_error_in_any_mode() {
    for mode in MODES {
        for line in report(&good(), mode) {
            assert_ne!(line.level, Level::Error, "{mode:?}: {line:?}");
            assert_eq!(line.remedy.is_empty(), line.level == Level::Ok, "{line:?}");
        }
    }
    assert_eq!(good().kvm_pmu(), KvmPmu::Mediated);
}

#[test]
fn every_mode_has_the_same_lines() {
    let ids = |facts: &Facts, mode| report(facts, mode).iter().map(|l| l.id).collect::<Vec<_>>();
    let all = ids(&good(), Mode::Model);
    for mode in MODES {
        assert_eq!(ids(&good(), mode), all);
        assert_eq!(ids(&Facts::default(), mode), all);
    }
}

#[test]
fn what_stops_each_mode() {
    type Spoil = fn(&mut Facts);
    use Level::{Error, Ok as Fine, Warning};
    // What is spoilt, and how bad that is in model, msr and kvm mode.
    let cases: [(&str, Spoil, [Level; 3]); 11] = [
        ("kvm", |f| f.kvm = Some(Err("no /dev/kvm".into())), [Error, Error, Error]),
        ("kvm_pmu", |f| f.enable_mediated_pmu = None, [Fine, Fine, Warning]),
        ("kvm_pmu", |f| f.enable_pmu = Some(false), [Fine, Fine, Error]),
        ("msr_filter", |f| f.kvm_msr_filter = false, [Error, Error, Fine]),
        ("pmu_capability", |f| f.kvm_pmu_capability = false, [Warning, Warning, Fine]),
        ("pmu_shape", |f| f.pmu = Some(Err("unknown vendor".into())), [Fine, Error, Error]),
        ("nmi_watchdog", |f| f.nmi_watchdog = Some(true), [Fine, Error, Error]),
        ("perf_users", |f| f.perf_users = Some(vec!["perf (7)".into()]), [Fine, Error, Warning]),
        ("rdpmc", |f| f.rdpmc = Some(2), [Fine, Error, Fine]),
        ("isolated_cores", |f| f.isolated_cores.clear(), [Fine, Error, Fine]),
        ("msr_device", |f| f.lockdown = Some("integrity".into()), [Fine, Error, Fine]),
    ];
    for (id, spoil, levels) in cases {
        let mut facts = good();
        spoil(&mut facts);
        for (mode, level) in MODES.into_iter().zip(levels) {
            assert_eq!(at(&facts, mode, id), level, "{id} in {mode:?}");
        }
    }
}

#[test]
fn a_host_that_is_a_guest_without_a_pmu_can_run_the_model_only() {
    let facts = Facts {
        pmu: Some(Ok(Capabilities {
            shape: Shape::none(),
            arch_events: 0,
            perfmon_v6: false,
            family_model: FamilyModel::default(),
        })),
        is_guest: true,
        enable_mediated_pmu: None,
        isolated_cores: vec![],
        msr_cores: vec![],
        ..good()
    };
    let errors = |mode| report(&facts, mode).iter().any(|l| l.level == Level::Error);
    assert!(!errors(Mode::Model) && errors(Mode::Msr) && errors(Mode::Kvm));
    assert_eq!(facts.kvm_pmu(), KvmPmu::None);
}

/// The rows of the reference's section 5 that say "kernel-only", and the series' other parts that depend on the host.
#[test]
fn every_kernel_only_patch_has_a_line() {
    let covered: Vec<u8> =
        report(&good(), Mode::Msr).iter().flat_map(|l| l.patches.iter().copied()).collect();
    for patch in [1, 2, 3, 4, 5, 6, 9, 10, 14, 15, 19, 28, 29, 30, 31, 32, 39, 41] {
        assert!(covered.contains(&patch), "patch {patch:02}");
    }
    assert!(covered.iter().all(|patch| (1..=41).contains(patch)));
}
