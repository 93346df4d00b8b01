//! What only the simulated hypervisor promises; what it shares with KVM is tested in `probe::tests`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;
use crate::hypervisor::{Completion, EntryMode, Exit, InitialRegs};
use crate::probe::{self, ProbeConfig, layout};

const MEM: u64 = 4 << 20;

fn vm() -> (Arc<SimVm>, Vec<InitialRegs>) {
    let memory = GuestMemory::new("sim", MEM).unwrap();
    let cfg = ProbeConfig::new(1, MEM, 2_000_000, None);
    let starts = probe::load(&memory, &cfg).unwrap();
    (SimVm::new(memory, SimOptions::default()).unwrap(), starts)
}

fn run_until(vcpu: &mut dyn Vcpu, wanted: &Exit) -> u32 {
    let deadline = Instant::now() + Duration::from_secs(20);
    let mut others = 0;
    loop {
        let exit = vcpu.run().unwrap();
        if exit == *wanted {
            return others;
        }
        others += 1;
        assert!(Instant::now() < deadline, "{wanted:?}, last {exit:?}");
    }
}

#[test]
fn a_kick_stays_in_force_until_it_is_cleared() {
    let (vm, starts) = vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(&starts[0]).unwrap();
    run_until(&mut *vcpu, &Exit::Hlt);
    let kick = vcpu.kicker();
    std::thread::spawn(move || kick.kick()).join().unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    assert_eq!(vcpu.run().unwrap(), Exit::Interrupted);
    vcpu.clear_kick();
    run_until(&mut *vcpu, &Exit::Hlt);
}

#[test]
fn only_the_probe_runs() {
    let (vm, starts) = vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    assert_eq!(vcpu.run().unwrap_err().reason(), "STATE_REJECTED", "no start state");
    let pvh = InitialRegs { mode: EntryMode::Protected32, ..starts[0].clone() };
    assert_eq!(vcpu.set_initial(&pvh).unwrap_err().reason(), "HYPERVISOR_UNSUPPORTED");
    let mut other = vm.create_vcpu(1).unwrap();
    assert!(other.set_initial(&starts[0]).is_err(), "another vCPU's block");
    assert!(vm.create_vcpu(256).is_err());
}

#[test]
fn an_exit_must_be_answered_before_anything_else() {
    let memory = GuestMemory::new("sim", MEM).unwrap();
    let shape = "intel:v5:8+4:48".parse().unwrap();
    let pmu = probe::harness::probe_pmu(&shape);
    let starts = probe::load(&memory, &ProbeConfig::new(1, MEM, 2_000_000, Some(pmu))).unwrap();
    let vm = SimVm::new(memory, SimOptions::default()).unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(&starts[0]).unwrap();
    assert_eq!(vcpu.run().unwrap(), Exit::WrMsr { index: 0x38f, value: 0 });
    assert!(vcpu.run().is_err() && vcpu.save().is_err() && vcpu.finish_pending().is_err());
    assert!(vcpu.complete(Completion::Value(1)).is_ok(), "KVM takes a value for a write too");
    assert!(matches!(vcpu.run().unwrap(), Exit::WrMsr { index: 0x186, .. }));
    // #GP when programming is the guest's fault number 5.
    vcpu.complete(Completion::Fault).unwrap();
    let report = probe::report(vm.memory(), 0).unwrap();
    assert_eq!((report.faults, report.first_fault), (1, layout::FAULT_SETUP));
    assert!(vcpu.complete(Completion::Value(1)).is_err(), "nothing waits");
}

#[test]
fn saved_state_is_the_same_after_a_round_trip() {
    let (vm, starts) = vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(&starts[0]).unwrap();
    run_until(&mut *vcpu, &Exit::Hlt);
    vm.signal_msi(0xfee0_0000, 0x42).unwrap();
    let saved = vcpu.save().unwrap();
    vcpu.restore(&saved).unwrap();
    assert_eq!(vcpu.save().unwrap(), saved);
    let mut fresh = vm.create_vcpu(0).unwrap();
    fresh.restore(&saved).unwrap();
    assert_eq!(fresh.save().unwrap(), saved, "the pending interrupt travels");
    assert!(vm.restore(&saved).is_err(), "a vCPU's state is no VM state");
}

#[test]
fn the_dirty_log_is_exact() {
    let (vm, starts) = vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(&starts[0]).unwrap();
    run_until(&mut *vcpu, &Exit::Hlt);
    assert!(vm.collect_dirty(&mut PageBitmap::new(MEM / 4096)).is_err(), "not on");
    vm.start_dirty_tracking().unwrap();
    let snapshot = |page: u64| {
        let mut bytes = vec![0u8; 4096];
        vm.memory().read_at(page * 4096, &mut bytes).unwrap();
        bytes
    };
    let before: Vec<_> = (0..MEM / 4096).map(snapshot).collect();
    let deadline = Instant::now() + Duration::from_secs(20);
    while probe::report(vm.memory(), 0).unwrap().pages_dirtied < 50 {
        assert!(Instant::now() < deadline);
        vcpu.run().unwrap();
    }
    let mut dirty = PageBitmap::new(MEM / 4096);
    vm.collect_dirty(&mut dirty).unwrap();
    for (page, old) in (0..).zip(&before) {
        assert_eq!(dirty.get(page), snapshot(page) != *old, "page {page}");
    }
    let mut again = PageBitmap::new(MEM / 4096);
    vm.collect_dirty(&mut again).unwrap();
    assert!(again.is_empty());
    vm.stop_dirty_tracking().unwrap();
}

#[test]
fn a_damaged_guest_halts_and_nothing_else() {
    let (vm, starts) = vm();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_initial(&starts[0]).unwrap();
    run_until(&mut *vcpu, &Exit::Hlt);
    vm.memory().store_u64(layout::block(0) + layout::P_WS, u64::MAX - 8).unwrap();
    let deadline = Instant::now() + Duration::from_secs(20);
    while probe::report(vm.memory(), 0).unwrap().faults == 0 {
        assert!(Instant::now() < deadline);
        vcpu.run().unwrap();
    }
    assert_eq!(probe::report(vm.memory(), 0).unwrap().first_fault, layout::FAULT_EXCEPTION + 14);
    assert_eq!(vcpu.run().unwrap(), Exit::Hlt);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]
    /// Guest memory may come from a peer: whatever its block says, the script neither panics nor writes elsewhere.
    #[test]
    fn damaged_blocks_never_panic(
        damage in proptest::collection::vec((0u64..layout::BLOCK / 8, prop_oneof![any::<u64>(), 0u64..70]), 1..20),
        answers in proptest::collection::vec(any::<u64>(), 60),
    ) {
        let memory = GuestMemory::new("sim", MEM).unwrap();
        let shape = "intel:v5:8+4:48".parse().unwrap();
        let mut cfg = ProbeConfig::new(1, MEM, 2_000_000, Some(probe::harness::probe_pmu(&shape)));
        cfg.fill_bytes = 64 << 10;
        let starts = probe::load(&memory, &cfg).unwrap();
        let options = SimOptions { turn: Duration::ZERO, burn: Duration::ZERO, share: Duration::ZERO };
        let vm = SimVm::new(memory, options).unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        vcpu.set_initial(&starts[0]).unwrap();
        for (i, answer) in answers.into_iter().enumerate() {
            if i == 30 {
                for (word, value) in &damage {
                    vm.memory().store_u64(layout::block(0) + word * 8, *value).unwrap();
                }
                vm.signal_msi(0xfee0_0000, layout::PMI_VECTOR.into()).unwrap();
            }
            match vcpu.run().unwrap() {
                Exit::RdMsr { .. } => vcpu.complete(Completion::Value(answer)).unwrap(),
                Exit::WrMsr { .. } => vcpu.complete(Completion::Done).unwrap(),
                _ => {}
            }
        }
        let _ = (probe::report(vm.memory(), 0), probe::details(vm.memory(), 0));
        let _ = probe::verify_memory(vm.memory(), &cfg);
        probe::mark_resumed(vm.memory());
    }
}
