//! Which registers, and in which order.

use pmu::Shape;

use super::super::{KvmPmu, list};
use super::{FakeKvm, metrics, shapes};

fn order(text: &str) -> Vec<u32> {
    let shape: Shape = text.parse().expect(text);
    list::writes(&shape, |_| 1).into_iter().map(|w| w.0).collect()
}

#[test]
fn the_writes_of_each_flavour_in_order() {
    assert_eq!(order("intel:v1:2+0:40"), [0x186, 0x187, 0xC1, 0xC2, 0x186, 0x187]);
    assert_eq!(order("intel:v2:1+0:48"), [0x38F, 0xC1, 0x186, 0x38E, 0x38F]);
    assert_eq!(
        order("intel:v2:2+3:48"),
        [0x38F, 0x38D, 0x309, 0x30A, 0x30B, 0xC1, 0xC2, 0x186, 0x187, 0x38E, 0x38D, 0x38F]
    );
    assert_eq!(
        order("intel:v5:0x5+0x9:48"),
        [0x38F, 0x38D, 0x309, 0x30C, 0xC1, 0xC3, 0x186, 0x188, 0x38E, 0x38D, 0x38F]
    );
    assert_eq!(
        order("amd:v0:0x3:48"),
        [0xC001_0000, 0xC001_0001, 0xC001_0004, 0xC001_0005, 0xC001_0000, 0xC001_0001]
    );
    assert_eq!(
        order("amd:v1:0x3:48"),
        [0xC001_0200, 0xC001_0202, 0xC001_0201, 0xC001_0203, 0xC001_0200, 0xC001_0202]
    );
    assert_eq!(
        order("amd:v2:0x3:48"),
        [0xC000_0301, 0xC001_0201, 0xC001_0203, 0xC001_0200, 0xC001_0202, 0xC000_0300, 0xC000_0301]
    );
    let with_metrics: Vec<u32> = list::writes(&metrics(), |_| 1).into_iter().map(|w| w.0).collect();
    let at = |msr| with_metrics.iter().position(|m| *m == msr).expect("there");
    assert!(at(0x30C) < at(0x329) && at(0x18D) < at(0x329) && at(0x329) < at(0x38E));
}

#[test]
fn the_stop_writes_are_zero_and_every_register_is_written_after_them_once() {
    for shape in shapes() {
        let stop = list::stop(&shape);
        let writes = list::writes(&shape, |msr| u64::from(msr) + 1);
        let (first, rest) = writes.split_at(stop.len());
        assert!(first.iter().zip(&stop).all(|(w, msr)| *w == (*msr, 0)), "{shape}");
        let mut written: Vec<u32> = rest.iter().map(|w| w.0).collect();
        assert!(rest.iter().all(|w| w.1 == u64::from(w.0) + 1));
        written.sort_unstable();
        assert_eq!(written, list::expected(&shape), "{shape}");
    }
}

#[test]
fn aliases_and_write_only_ports_are_never_listed() {
    for shape in shapes() {
        for msr in list::expected(&shape) {
            let k7 = (0xC001_0000..0xC001_0008).contains(&msr);
            assert_eq!(k7, shape.to_string().starts_with("amd:v0"), "{shape} {msr:#x}");
            let never = [0x390, 0x391, 0x392, 0x345, 0x3F1, 0x600, 0x1D9, 0xC000_0302, 0xC000_0303];
            assert!(!never.contains(&msr) && !(0x4C1..0x4D0).contains(&msr), "{shape} {msr:#x}");
        }
    }
}

#[test]
fn what_kvm_does_not_list_is_refused_by_name_and_what_it_lists_beyond_is_skipped() {
    for shape in shapes() {
        for absent in list::expected(&shape) {
            let mut fake = FakeKvm::new(shape);
            fake.listed.retain(|msr| *msr != absent);
            let error = KvmPmu::new(shape, &mut fake).expect_err("missing");
            assert_eq!(error.reason(), "PMU_KVM_NOT_LISTED");
            let name = pmu::register_name(absent, shape.vendor);
            let text = error.to_string();
            assert!(text.contains(&format!("{name} ({absent:#x})")) && text.contains(&shape.to_string()));
            assert!(fake.calls.is_empty());
        }
        let mut fake = FakeKvm::new(shape);
        // A host's list is longer than the guest's PMU, and not only about PMUs.
        fake.listed.extend([0x10, 0x3F1, 0x600, 0xC000_0302, 0xC000_0080]);
        let kvm = KvmPmu::new(shape, &mut fake).expect("listed");
        assert_eq!(kvm.skipped(), [0x3F1, 0x600, 0xC000_0302]);
        assert_eq!(kvm.registers(), list::expected(&shape));
        assert_eq!(kvm.shape(), &shape);
    }
}

#[test]
fn several_missing_registers_are_all_named() {
    let shape: Shape = "intel:v2:2+1:48".parse().expect("shape");
    let mut fake = FakeKvm::new(shape);
    fake.listed.clear();
    let text = KvmPmu::new(shape, &mut fake).expect_err("missing").to_string();
    for name in ["IA32_PMC0", "IA32_PERFEVTSEL1", "IA32_FIXED_CTR0", "IA32_PERF_GLOBAL_CTRL (0x38f)"] {
        assert!(text.contains(name), "{text}");
    }
}
