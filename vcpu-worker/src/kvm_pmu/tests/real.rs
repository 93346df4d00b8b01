//! The KVM of this machine. With a PMU: a round trip. Without: the refusals, by name.

use kvm_bindings::KVM_CAP_PMU_EVENT_FILTER;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use pmu::filter::{FLAG_MASKED_EVENTS, MAX_FILTER_EVENTS};
use pmu::{FilterSpec, Shape, Vendor};

use super::super::detect::{Observed, detect, observe};
use super::super::{KvmPmu, VcpuPort, set_event_filter};
use super::image;
use crate::host;
use crate::hypervisor::kvm::state_msrs;
use crate::sys;
use crate::testing::require_kvm;

fn vcpu() -> (VmFd, VcpuFd) {
    let kvm = Kvm::new().expect("/dev/kvm");
    let vm = kvm.create_vm().expect("vm");
    vm.create_irq_chip().expect("irqchip");
    let vcpu = vm.create_vcpu(0).expect("vcpu");
    let cpuid = kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES).expect("cpuid");
    vcpu.set_cpuid2(&cpuid).expect("cpuid");
    (vm, vcpu)
}

#[test]
fn real_kvm_saves_and_restores_its_pmu_or_is_refused_as_having_none() {
    if !require_kvm() {
        return;
    }
    let host = host::probe();
    let facts = host::pmu::facts(&host, None);
    let (_vm, vcpu) = vcpu();
    let listed = state_msrs().expect("list");
    let mut port = VcpuPort::new(&vcpu, &listed);
    match detect(&host, &facts) {
        Ok(found) => {
            println!("KVM's vPMU: {found:?}");
            let kvm = KvmPmu::new(found.shape, &mut port).expect("listed");
            let fresh = kvm.save(&mut port).expect("saved");
            assert!(fresh.is_reset(), "{fresh:?}");
            let mut other = image(found.shape, 5);
            other.registers.retain(|r| fresh.get(r.0).is_some());
            kvm.restore(&mut port, &other).expect("restored");
            assert_eq!(kvm.save(&mut port).expect("saved"), other);
            kvm.restore(&mut port, &fresh).expect("restored");
            assert_eq!(kvm.save(&mut port).expect("saved"), fresh);
        }
        Err(error) => {
            println!("{error}");
            assert_eq!(error.reason(), "PMU_KVM_NONE");
            assert!(error.to_string().contains("--pmu model"), "{error}");
            for text in ["intel:v1:2+0:48", "intel:v5:8+4:48", "amd:v0:4:48", "amd:v1:6:48", "amd:v2:6:48"] {
                let shape: Shape = text.parse().expect(text);
                let observed = observe(&mut port, &shape).expect("read");
                println!("{text}: {observed:?}");
                assert!(matches!(observed, Observed::Silent { .. }), "{text}: {observed:?}");
                let refused = KvmPmu::new(shape, &mut port).expect_err("not listed");
                assert_eq!(refused.reason(), "PMU_KVM_NOT_LISTED");
                let first = shape.counter_msr(0);
                assert!(refused.to_string().contains(&format!("{first:#x}")), "{refused}");
            }
            // Off on both sides.
            let kvm = KvmPmu::new(Shape::none(), &mut port).expect("nothing to list");
            let empty = kvm.save(&mut port).expect("saved");
            assert_eq!(kvm.restore(&mut port, &empty).expect("restored").registers, 0);
        }
    }
}

/// A host whose KVM lists registers that its vCPUs then refuse: the read says which.
#[test]
fn real_kvm_refuses_to_read_what_the_guest_does_not_have() {
    if !require_kvm() {
        return;
    }
    let (_vm, vcpu) = vcpu();
    let listed: Vec<u32> = vec![0xC1, 0x186, 0x38E, 0x38F];
    let mut port = VcpuPort::new(&vcpu, &listed);
    let shape: Shape = "intel:v2:1+0:48".parse().expect("shape");
    let kvm = KvmPmu::new(shape, &mut port).expect("as if listed");
    match kvm.save(&mut port) {
        Ok(image) => assert!(image.is_reset(), "{image:?}"),
        Err(error) => {
            println!("{error}");
            assert_eq!(error.reason(), "PMU_KVM_READ_REFUSED");
            let other = image(shape, 1);
            let error = kvm.restore(&mut port, &other).expect_err("refused");
            println!("{error}");
            assert_eq!(error.reason(), "PMU_KVM_WRITE_REFUSED");
            assert!(error.to_string().contains("IA32_PERF_GLOBAL_CTRL (0x38f) = 0x0 after 0 of"), "{error}");
            assert_eq!(error.stop().expect("tried").failed, ["IA32_PERF_GLOBAL_CTRL"]);
        }
    }
}

/// Without a vPMU KVM takes writes of the K7 registers and drops them: KVM_SET_MSRS reports success, only the read-back tells.
#[test]
fn real_kvm_that_drops_what_it_takes_is_found_out() {
    if !require_kvm() {
        return;
    }
    let host = host::probe();
    if let Ok(found) = detect(&host, &host::pmu::facts(&host, None)) {
        // The round trip above covers such a host.
        println!("not applicable: KVM has a vPMU here ({found:?})");
        return;
    }
    let (_vm, vcpu) = vcpu();
    let shape: Shape = "amd:v0:4:48".parse().expect("shape");
    let listed: Vec<u32> = (0xC001_0000..0xC001_0008).collect();
    let mut port = VcpuPort::new(&vcpu, &listed);
    let kvm = KvmPmu::new(shape, &mut port).expect("as if listed");
    let error = kvm.restore(&mut port, &image(shape, 2)).expect_err("no vPMU");
    println!("{error}");
    assert!(["PMU_KVM_NOT_VERIFIED", "PMU_KVM_WRITE_REFUSED"].contains(&error.reason()), "{error}");
    assert!(error.to_string().contains("PERF_CTL0 (0xc0010000)"), "{error}");
}

#[test]
fn real_kvm_takes_an_event_filter_or_is_refused_as_having_none() {
    if !require_kvm() {
        return;
    }
    let (vm, _vcpu) = vcpu();
    let spec = FilterSpec {
        action: 0,
        flags: 0,
        fixed_counter_bitmap: 7,
        events: (0..MAX_FILTER_EVENTS as u64).collect(),
    };
    if vm.check_extension_raw(KVM_CAP_PMU_EVENT_FILTER.into()) <= 0 {
        let error = set_event_filter(&vm, Vendor::Amd, &spec).expect_err("no capability");
        assert_eq!(error.reason(), "PMU_KVM_FILTER_MISSING");
        return;
    }
    set_event_filter(&vm, Vendor::Amd, &spec).expect("300 events");
    let deny = FilterSpec { action: 1, events: vec![], ..spec.clone() };
    set_event_filter(&vm, Vendor::Amd, &deny).expect("none, replacing the other");
    let refused = |spec: FilterSpec| set_event_filter(&vm, Vendor::Amd, &spec).expect_err("bad").reason();
    assert_eq!(refused(FilterSpec { action: 2, ..spec.clone() }), "FILTER_ACTION");
    assert_eq!(
        refused(FilterSpec { events: vec![0; MAX_FILTER_EVENTS + 1], ..spec.clone() }),
        "FILTER_TOO_MANY"
    );
    assert_eq!(
        refused(FilterSpec { flags: FLAG_MASKED_EVENTS, events: vec![1 << 40], ..spec.clone() }),
        "FILTER_RESERVED"
    );
    // Not by us, but by KVM.
    let mut bytes = super::super::event_filter_bytes(&spec).expect("bytes");
    bytes[0] = 9;
    assert_eq!(
        sys::set_pmu_event_filter(&vm, &bytes).expect_err("action 9").reason(),
        "HYPERVISOR_CALL_FAILED"
    );
    // A count that is not the length never reaches it.
    bytes.truncate(40);
    assert!(sys::set_pmu_event_filter(&vm, &bytes).expect_err("length").to_string().contains("300 events"));
}
