use pmu::{EventFilter, GuestId, GuestPmu, Image, Policy, Shape};
use vpmu_proto::api::migration_spec::PmuRestore;
use vpmu_proto::api::{
    MigrationSpec, PmuEventFilter, PmuSpec, VirtualMachine, VirtualMachineSpec, pmu_event_filter,
};

use super::*;

fn shape(text: &str) -> Shape {
    text.parse().expect(text)
}

/// Two vCPUs whose counter 0 counts `selector` and stands at its highest value.
fn needs(shape: &Shape, mode: &str, selector: u64) -> Requirements {
    let pmu = GuestPmu::new(GuestId(1), *shape, Policy::Strict, EventFilter::allow_all());
    let mut image: Image = pmu.image();
    for (msr, value) in &mut image.registers {
        match *msr {
            0xC1 => *value = (1 << shape.gp_width) - 1,
            0x186 => *value = selector,
            _ => {}
        }
    }
    Requirements {
        pmu_shape: Some(pmu_glue::shape_to_proto(shape)),
        pmu_mode: mode.to_owned(),
        pmu: (0..2).map(|vcpu| pmu_glue::image_to_proto(vcpu, &image)).collect(),
        ..Requirements::default()
    }
}

fn rules(found: &[MigrationMismatch]) -> Vec<(&str, bool)> {
    for m in found {
        assert!(!m.message.is_empty() && !m.remedy.is_empty(), "{m:?}");
    }
    found.iter().map(|m| (m.rule.as_str(), m.warning)).collect()
}

fn under(mut needs: Requirements, policy: PmuRestore) -> Requirements {
    needs.spec = Some(MigrationSpec { pmu_restore: policy.into(), ..MigrationSpec::default() });
    needs
}

/// INST_RETIRED.ANY_P, enabled in rings 3 and 0; and an event that each model has its own meaning for.
const ARCHITECTURAL: u64 = 0x43_00C0;
const OWN: u64 = 0x43_01D1;

#[test]
fn a_smaller_pmu_refuses_by_c2_alone_or_costs_what_does_not_fit() {
    let (guest, host) = (shape("intel:v5:8+4:48"), shape("intel:v5:4+3:40"));
    let needs = needs(&guest, "model", ARCHITECTURAL);
    let found = mismatches(&host, &[], &needs);
    assert!(
        found.len() >= 3 && rules(&found).iter().all(|r| *r == ("C2", false)),
        "no C4 beside C2: {found:?}"
    );
    for policy in [PmuRestore::BestEffort, PmuRestore::Reset] {
        let borne = mismatches(&host, &[], &under(needs.clone(), policy));
        assert_eq!(borne.len(), found.len());
        assert!(rules(&borne).iter().all(|r| *r == ("C2", true)), "{borne:?}");
        assert!(borne[0].remedy.contains("pmu_restore is"), "{borne:?}");
    }
}

#[test]
fn no_policy_bears_another_vendor() {
    let needs = needs(&shape("intel:v5:8+4:48"), "model", ARCHITECTURAL);
    for policy in [PmuRestore::Require, PmuRestore::BestEffort, PmuRestore::Reset] {
        let found = mismatches(&shape("amd:v2:6:48"), &[], &under(needs.clone(), policy));
        assert!(rules(&found).contains(&("C1", false)), "{policy:?}: {found:?}");
    }
}

#[test]
fn what_fits_has_no_mismatch_and_a_larger_host_is_none() {
    let guest = shape("intel:v5:4+3:48");
    let needs = needs(&guest, "model", ARCHITECTURAL);
    assert_eq!(rules(&mismatches(&guest, &[], &needs)), []);
    assert_eq!(rules(&mismatches(&shape("intel:v5:8+4:48"), &[], &needs)), []);
}

#[test]
fn c6_is_about_processors_that_count_and_events_of_their_own() {
    let guest = shape("intel:v5:8+4:48");
    let leaf = |eax| vec![CpuidLeaf { function: 1, eax, ..CpuidLeaf::default() }];
    // Family 6: models 0x8F and 0x6A.
    let (here, elsewhere) = (leaf(0x000_806F0), leaf(0x000_606A0));
    for (mode, selector, target, expected) in [
        ("msr", OWN, &elsewhere, vec![("C6", true)]),
        ("kvm", OWN, &elsewhere, vec![("C6", true)]),
        ("model", OWN, &elsewhere, vec![]),
        ("msr", OWN, &here, vec![]),
        ("msr", ARCHITECTURAL, &elsewhere, vec![]),
    ] {
        let mut needs = needs(&guest, mode, selector);
        needs.cpuid.clone_from(&here);
        let found = mismatches(&guest, target, &needs);
        assert_eq!(rules(&found), expected, "{mode} {selector:#x}: {found:?}");
    }
}

#[test]
fn c5_a_filter_comes_along_or_is_named() {
    let guest = shape("intel:v5:8+4:48");
    let filtered = |events: Vec<u64>, masked| {
        let mut needs = needs(&guest, "model", ARCHITECTURAL);
        let filter = PmuEventFilter {
            action: pmu_event_filter::Action::Allow.into(),
            events,
            masked,
            ..PmuEventFilter::default()
        };
        let pmu = PmuSpec { event_filter: Some(filter), ..PmuSpec::default() };
        let spec = VirtualMachineSpec { pmu: Some(pmu), ..VirtualMachineSpec::default() };
        needs.vm = Some(VirtualMachine { spec: Some(spec), ..VirtualMachine::default() });
        needs
    };
    // The same filter on both sides freezes nothing that it did not freeze before.
    assert_eq!(rules(&mismatches(&guest, &[], &filtered(vec![0xC0], false))), []);
    assert_eq!(rules(&mismatches(&guest, &[], &filtered(vec![0x3C], false))), []);
    let found = mismatches(&guest, &[], &filtered(vec![u64::MAX], true));
    assert_eq!(rules(&found), [("C5", false)], "{found:?}");
}

#[test]
fn an_image_that_is_none_is_named() {
    let guest = shape("intel:v5:8+4:48");
    let mut needs = needs(&guest, "model", ARCHITECTURAL);
    needs.pmu[1].digest.clear();
    assert_eq!(rules(&mismatches(&guest, &[], &needs)), [("PMU_IMAGE", false)]);
}
