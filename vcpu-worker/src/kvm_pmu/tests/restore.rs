//! Restoring: order, exactness, and every way to fail half-way.

use proptest::prelude::*;

use pmu::registers::{AMD_GLOBAL_STATUS, SEL_EN, SEL_INT};
use pmu::{Image, Shape};

use super::super::fake::Call;
use super::super::{KvmPmuError, list};
use super::{FakeKvm, contents, image, open, shapes};
use crate::kvm_pmu::MsrPort;

/// A fake with any contents, counting.
fn dirty(shape: Shape, seed: u64) -> FakeKvm {
    FakeKvm::holding(&image(shape, seed))
}

proptest! {
    #[test]
    fn i20_nothing_is_written_while_it_could_count_and_global_control_comes_last(
        which in 0..9usize, old: u64, new: u64,
    ) {
        let shape = shapes()[which];
        let image = image(shape, new);
        let mut fake = dirty(shape, old);
        let kvm = open(&mut fake);
        let restored = kvm.restore(&mut fake, &image).expect("restored");
        prop_assert_eq!(&fake.violations, &Vec::<String>::new());
        prop_assert_eq!(contents(&fake), image.registers.clone());
        prop_assert_eq!(restored.registers, image.registers.len());
        prop_assert_eq!(restored.status_masked, 0);
        let Call::Set(writes) = fake.calls[0].clone() else { panic!("the first call is the write") };
        prop_assert_eq!(fake.calls.len(), 2);
        if shape.has_global() {
            let last = writes.last().copied();
            prop_assert_eq!(last, Some((shape.control_msr(), image.get(shape.control_msr()).unwrap_or(0))));
            prop_assert_eq!(writes.first().copied(), Some((shape.control_msr(), 0)));
        }
    }

    #[test]
    fn i19_a_restored_pmu_saves_the_same_image(which in 0..9usize, old: u64, new: u64) {
        let shape = shapes()[which];
        let image = image(shape, new);
        let mut fake = dirty(shape, old);
        let kvm = open(&mut fake);
        kvm.restore(&mut fake, &image).expect("restored");
        prop_assert_eq!(kvm.save(&mut fake).expect("saved"), image.clone());
        kvm.restore(&mut fake, &image).expect("restored again");
        prop_assert_eq!(contents(&fake), image.registers);
    }
}

#[test]
fn i20_the_fake_catches_every_wrong_order() {
    let shape: Shape = "intel:v5:2+2:48".parse().expect("shape");
    let mut image = image(shape, 3);
    for register in &mut image.registers {
        match register.0 {
            0x186 | 0x187 => register.1 = SEL_EN | 0x3_00C0,
            0x38D => register.1 = 0x33,
            0x38F => register.1 = shape.counter_bits(),
            _ => {}
        }
    }
    let right = list::writes(&shape, |msr| image.get(msr).unwrap_or(0));
    let caught = |writes: &[(u32, u64)]| {
        let mut fake = FakeKvm::holding(&image);
        fake.set(writes).expect("set");
        !fake.violations.is_empty()
    };
    assert!(!caught(&right));
    assert!(caught(&right[2..]), "without the stop");
    let mut early = right.clone();
    let control = early.pop().expect("control");
    for at in 2..early.len() {
        let mut wrong = early.clone();
        wrong.insert(at, control);
        assert!(caught(&wrong), "global control before write {at}");
    }
}

#[test]
fn partial_success_at_every_index_names_the_write_and_leaves_nothing_counting() {
    for shape in shapes() {
        let image = image(shape, 11);
        let writes = list::writes(&shape, |msr| image.get(msr).unwrap_or(0));
        for index in 0..writes.len() {
            let mut fake = dirty(shape, 12);
            let kvm = open(&mut fake);
            fake.stop_next_set = Some(index);
            let error = kvm.restore(&mut fake, &image).expect_err("partial");
            let KvmPmuError::WriteRefused { register, msr, value, applied, of, stop } = &error else {
                panic!("{error}")
            };
            assert_eq!(((*msr, *value), *applied, *of), (writes[index], index, writes.len()), "{shape}");
            assert_eq!(*register, pmu::register_name(*msr, shape.vendor));
            assert!(stop.failed.is_empty() && fake.stopped(), "{shape} after {index}: {error}");
            assert_eq!(fake.violations, Vec::<String>::new());
            let stops: Vec<Call> = list::stop(&shape).iter().map(|msr| Call::Set(vec![(*msr, 0)])).collect();
            assert_eq!(fake.calls[1..], stops, "the explicit stop, each by itself");
            kvm.restore(&mut fake, &image).expect("a retry repairs");
            assert_eq!(contents(&fake), image.registers);
        }
    }
}

#[test]
fn a_register_that_refuses_its_value_is_named() {
    for shape in shapes() {
        let mut image = image(shape, 21);
        for register in &mut image.registers {
            register.1 |= 1; // never 0, and bit 0 exists in every register
        }
        let stop = list::stop(&shape);
        for &(msr, _) in &image.registers {
            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            fake.zero_only.insert(msr);
            let error = kvm.restore(&mut fake, &image).expect_err("refused");
            assert_eq!(error.reason(), "PMU_KVM_WRITE_REFUSED");
            assert!(error.to_string().contains(&format!("{msr:#x}")), "{error}");
            assert!(error.stop().expect("written").failed.is_empty() && fake.stopped());

            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            fake.read_only.insert(msr);
            let error = kvm.restore(&mut fake, &image).expect_err("refused");
            let failed = &error.stop().expect("written").failed;
            if stop.contains(&msr) {
                assert_eq!(*failed, [pmu::register_name(msr, shape.vendor)]);
                assert!(error.to_string().contains("do not run this vCPU"), "{error}");
                let others = fake.calls[1..].len();
                assert_eq!(others, stop.len(), "the others are still cleared");
            } else {
                assert!(failed.is_empty() && fake.stopped());
            }
        }
    }
}

#[test]
fn what_does_not_read_back_is_named_and_stopped() {
    for shape in shapes() {
        let mut image = image(shape, 31);
        image.registers.iter_mut().for_each(|r| r.1 |= 1);
        for &(msr, wrote) in &image.registers {
            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            fake.forgets = Some(msr);
            let error = kvm.restore(&mut fake, &image).expect_err("forgotten");
            assert_eq!(error.reason(), "PMU_KVM_NOT_VERIFIED");
            let text = error.to_string();
            assert!(text.contains(&format!("({msr:#x}) was written {wrote:#x} and reads 0x0")), "{text}");
            assert!(fake.stopped());

            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            fake.unreadable.insert(msr);
            let error = kvm.restore(&mut fake, &image).expect_err("unreadable");
            assert_eq!(error.reason(), "PMU_KVM_RESTORE_CALL");
            assert!(error.to_string().contains(&format!("{msr:#x}")) && fake.stopped());
        }
    }
}

#[test]
fn calls_that_fail_as_a_whole_stop_the_pmu() {
    for shape in shapes() {
        let image = image(shape, 41);
        for call in 0..2 {
            let mut fake = dirty(shape, 42);
            let kvm = open(&mut fake);
            fake.fails.insert(call);
            let error = kvm.restore(&mut fake, &image).expect_err("fails");
            assert_eq!(error.reason(), "PMU_KVM_RESTORE_CALL");
            assert!(error.stop().expect("written").failed.is_empty() && fake.stopped(), "{shape} {call}");
        }
        let mut fake = dirty(shape, 42);
        let kvm = open(&mut fake);
        fake.overcount = 1;
        let error = kvm.restore(&mut fake, &image).expect_err("counts wrong");
        assert_eq!(error.reason(), "PMU_KVM_RESTORE_CALL");
        assert!(fake.stopped(), "{shape}");
    }
}

#[test]
fn an_image_that_is_not_the_guests_is_refused_before_any_write() {
    let shape: Shape = "amd:v1:6:48".parse().expect("shape");
    let refused = |change: &dyn Fn(&mut Image)| {
        let mut fake = FakeKvm::new(shape);
        let kvm = open(&mut fake);
        let mut image = image(shape, 51);
        change(&mut image);
        let error = kvm.restore(&mut fake, &image).expect_err("refused");
        assert!(fake.calls.is_empty() && error.stop().is_none(), "{error}");
        (error.reason(), error.to_string())
    };
    let (reason, text) = refused(&|i| i.shape = "amd:v2:6:48".parse().expect("shape"));
    assert!(reason == "PMU_KVM_SHAPE" && text.contains("amd:v2:6:48") && text.contains("amd:v1:6:48"));
    let (reason, text) = refused(&|i| {
        i.registers.remove(0);
    });
    assert!(reason == "PMU_KVM_REGISTERS" && text.contains("lacks [PERF_CTL0 (0xc0010200)]"), "{text}");
    // Two names of one counter: the last write would win.
    let (reason, text) = refused(&|i| i.registers.insert(0, (0xC001_0000, 0)));
    assert!(reason == "PMU_KVM_REGISTERS" && text.contains("has [PERF_CTL0 (0xc0010000)]"), "{text}");
    assert_eq!(refused(&|i| i.registers.swap(0, 1)).0, "PMU_IMAGE_ORDER");
    assert_eq!(refused(&|i| i.registers.push(i.registers[11])).0, "PMU_IMAGE_ORDER");
    let (reason, text) = refused(&|i| i.registers[1].1 = 1 << 48);
    assert!(reason == "PMU_IMAGE_VALUE" && text.contains("0xc0010201"), "{text}");
}

#[test]
fn status_bits_beyond_the_guests_are_masked_and_reported() {
    let shape: Shape = "amd:v2:6:48".parse().expect("shape");
    let mut image = image(shape, 61);
    let at = image.registers.iter().position(|r| r.0 == AMD_GLOBAL_STATUS).expect("status");
    image.registers[at].1 = 0x0C00_0000_0000_00C1;
    let mut fake = FakeKvm::new(shape);
    let kvm = open(&mut fake);
    let restored = kvm.restore(&mut fake, &image).expect("restored");
    assert_eq!(restored.status_masked, 0x0C00_0000_0000_00C0);
    assert_eq!(fake.values[&AMD_GLOBAL_STATUS], 1);
}

#[test]
fn off_on_both_sides_is_success_and_anything_else_is_rule_c7() {
    let mut fake = FakeKvm::new(Shape::none());
    let kvm = open(&mut fake);
    let empty =
        Image { shape: Shape::none(), registers: vec![], in_service: false, pmi_pending: false, pmis: 0 };
    assert_eq!(kvm.restore(&mut fake, &empty).expect("nothing").registers, 0);
    let zeros = Image { registers: vec![(0xC1, 0), (0x186, 0)], ..empty.clone() };
    assert_eq!(kvm.restore(&mut fake, &zeros).expect("nothing").registers, 0);
    let held = Image { registers: vec![(0xC1, 0), (0x186, 5)], ..empty };
    let error = kvm.restore(&mut fake, &held).expect_err("held");
    assert_eq!(error.reason(), "PMU_KVM_DISABLED");
    assert!(error.to_string().contains("IA32_PERFEVTSEL0 (0x186) = 0x5"), "{error}");
    let other = image("amd:v0:4:48".parse().expect("shape"), 0);
    let zero = Image { registers: other.registers.iter().map(|r| (r.0, 0)).collect(), ..other };
    assert_eq!(kvm.restore(&mut fake, &zero).expect_err("has a PMU").reason(), "PMU_KVM_SHAPE");
    assert!(fake.calls.is_empty());
}

#[test]
fn overflows_that_interrupt_and_are_not_acknowledged_are_told() {
    let shape: Shape = "intel:v5:2+2:48".parse().expect("shape");
    let mut image = image(shape, 0);
    for register in &mut image.registers {
        register.1 = match register.0 {
            0x187 => SEL_INT | SEL_EN,
            0x38D => 0x83,
            0x38E => 1 << 33 | 1 << 32 | 3,
            _ => 0,
        };
    }
    let mut fake = FakeKvm::new(shape);
    let kvm = open(&mut fake);
    let restored = kvm.restore(&mut fake, &image).expect("restored");
    assert_eq!(restored.armed_overflows, 1 << 33 | 2);
}
