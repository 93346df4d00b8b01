//! Saving.

use pmu::Shape;
use pmu::registers::AMD_GLOBAL_STATUS;

use super::super::fake::Call;
use super::super::{KvmPmu, list};
use super::{FakeKvm, image, metrics, open, shapes};

#[test]
fn a_save_is_two_equal_reads_of_everything_and_no_write() {
    for shape in shapes() {
        let image = image(shape, 1);
        let mut fake = FakeKvm::holding(&image);
        let kvm = open(&mut fake);
        assert_eq!(kvm.save(&mut fake).expect("saved"), image);
        let all = Call::Get(list::expected(&shape));
        assert_eq!(fake.calls, [all.clone(), all], "{shape}");
        if shape != metrics() {
            // PERF_METRICS is no register of the other modes.
            image.validate().expect("an image like those of the other modes");
        }
    }
}

#[test]
fn a_register_that_cannot_be_read_is_named_at_every_index() {
    for shape in shapes() {
        for (index, msr) in list::expected(&shape).into_iter().enumerate() {
            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            fake.unreadable.insert(msr);
            let error = kvm.save(&mut fake).expect_err("unreadable");
            assert_eq!(error.reason(), "PMU_KVM_READ_REFUSED");
            let text = error.to_string();
            assert!(
                text.contains(&format!("{msr:#x}")) && text.contains(&format!("after {index} of")),
                "{text}"
            );
        }
    }
}

#[test]
fn a_register_that_moves_between_the_reads_is_named_with_both_values() {
    for shape in shapes() {
        for msr in list::expected(&shape) {
            let mut fake = FakeKvm::new(shape);
            let kvm = open(&mut fake);
            let before = fake.values[&msr];
            fake.moves = Some(msr);
            let error = kvm.save(&mut fake).expect_err("moved");
            assert_eq!(error.reason(), "PMU_KVM_MOVED");
            let text = error.to_string();
            assert!(text.contains(&format!("from {before:#x} to {:#x}", before + 1)), "{text}");
            assert!(text.contains(&pmu::register_name(msr, shape.vendor)), "{text}");
        }
    }
}

#[test]
fn a_call_that_fails_or_counts_wrong_is_an_error() {
    let shape: Shape = "amd:v2:6:48".parse().expect("shape");
    for call in 0..2 {
        let mut fake = FakeKvm::new(shape);
        let kvm = open(&mut fake);
        fake.fails.insert(call);
        assert_eq!(kvm.save(&mut fake).expect_err("fails").reason(), "HYPERVISOR_CALL_FAILED");
    }
    let mut fake = FakeKvm::new(shape);
    let kvm = open(&mut fake);
    fake.overcount = 1;
    assert_eq!(kvm.save(&mut fake).expect_err("too many").reason(), "PMU_KVM_COUNT");
}

#[test]
fn a_value_that_no_guest_of_the_shape_can_have_is_an_error() {
    let shape: Shape = "intel:v2:4+3:48".parse().expect("shape");
    let mut fake = FakeKvm::new(shape);
    let kvm = open(&mut fake);
    fake.values.insert(0xC2, 1 << 48);
    let error = kvm.save(&mut fake).expect_err("too wide");
    assert_eq!(error.reason(), "PMU_IMAGE_VALUE");
    assert!(error.to_string().contains("0xc2"));
}

/// AMD Turin shows bits 7:6 and 59:58 that six counters do not have.
#[test]
fn status_bits_beyond_the_guests_are_saved_raw_and_sent_masked() {
    let shape: Shape = "amd:v2:6:48".parse().expect("shape");
    let mut fake = FakeKvm::new(shape);
    let kvm = open(&mut fake);
    fake.values.insert(AMD_GLOBAL_STATUS, 0x0C00_0000_0000_00FF);
    let image = kvm.save(&mut fake).expect("saved");
    assert_eq!(image.get(AMD_GLOBAL_STATUS), Some(0x0C00_0000_0000_00FF));
    let (sent, lost) = KvmPmu::transmittable(&image);
    assert_eq!((sent.get(AMD_GLOBAL_STATUS), lost), (Some(0x3F), 0x0C00_0000_0000_00C0));
    sent.validate().expect("can be sent");
}

#[test]
fn a_guest_without_a_pmu_has_an_empty_image() {
    let mut fake = FakeKvm::new(Shape::none());
    let kvm = open(&mut fake);
    let image = kvm.save(&mut fake).expect("saved");
    assert!(image.registers.is_empty() && fake.calls.is_empty());
    assert_eq!(kvm.restore(&mut fake, &image).expect("restored").registers, 0);
}
