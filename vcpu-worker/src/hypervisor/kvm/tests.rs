//! Tests on real KVM, with guests of a few instructions.

mod dirty_tracking;
mod figures;
mod guest;
mod hops;
mod inbox;
mod kicks;
mod lazy;
mod order;
mod policies;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::vcpu::KvmVcpu;
use super::*;
use crate::hypervisor::{Completion, EntryMode, Exit};
use crate::memory::PAGE_SIZE;
use crate::sys;
use crate::testing::require_kvm;
use guest::{DEVICE, RESULT};

const MIB: u64 = 1 << 20;

fn memory(bytes: u64) -> GuestMemory {
    GuestMemory::new("test", bytes).expect("memory")
}

fn make_vm(memory: &GuestMemory, vcpus: u32) -> Arc<KvmVm> {
    let options = KvmOptions { vcpus, filter_pmu_msrs: true, ..KvmOptions::default() };
    KvmVm::new(memory.clone(), options).expect("vm")
}

/// A VM with one vCPU about to run `code`.
fn start(memory: &GuestMemory, code: &[u8], mode: EntryMode) -> (Arc<KvmVm>, KvmVcpu) {
    let regs = guest::load(memory, code, mode, None);
    let vm = make_vm(memory, 1);
    let mut vcpu = vm.make_vcpu(0).expect("vcpu");
    vcpu.set_initial(&regs).expect("start state");
    (vm, vcpu)
}

/// Lets the guest use AVX.
fn enable_avx(vcpu: &KvmVcpu) {
    let mut xcrs = sys::XCRS.read(&vcpu.fd, &[]).expect("xcrs");
    // One entry, XCR0 = x87, SSE, AVX.
    xcrs[0..4].copy_from_slice(&1u32.to_le_bytes());
    xcrs[16..24].copy_from_slice(&7u64.to_le_bytes());
    sys::XCRS.write(&vcpu.fd, "xcrs", &xcrs).expect("xcr0");
}

fn set_general(vcpu: &KvmVcpu, change: impl Fn(&mut kvm_regs)) {
    let mut regs = vcpu.fd.get_regs().expect("regs");
    change(&mut regs);
    vcpu.fd.set_regs(&regs).expect("regs");
}

#[test]
fn every_exit_is_translated_and_answered() {
    if !require_kvm() {
        return;
    }
    let memory = memory(16 * MIB);
    let regs = guest::load(&memory, guest::exits(), EntryMode::Long, Some(guest::CODE + guest::exits_gp()));
    let wide: [u8; 16] = std::array::from_fn(|i| 0xa0 + i as u8);
    memory.write(RESULT + 64, &wide).expect("inside");
    let vm = make_vm(&memory, 1);
    let mut vcpu = vm.create_vcpu(0).expect("vcpu");
    vcpu.set_initial(&regs).expect("start state");
    let mut expect = |exit: Exit, answer: Option<Completion>| {
        assert_eq!(vcpu.run().expect("run"), exit, "{}", vcpu.describe());
        if let Some(answer) = answer {
            vcpu.complete(answer).expect("answered");
        }
    };
    let value = |v| Some(Completion::Value(v));
    expect(Exit::RdMsr { index: 0x38f }, value(0x0123_4567_89ab_cdef));
    expect(Exit::WrMsr { index: 0xc1, value: 0x5566_7788_1122_3344 }, Some(Completion::Done));
    expect(Exit::PioIn { port: 0x60, size: 1 }, value(0x5a));
    expect(Exit::PioIn { port: 0x60, size: 2 }, value(0xbeef));
    expect(Exit::PioIn { port: 0x60, size: 4 }, value(0x0bad_cafe));
    expect(Exit::PioOut { port: 0x3f8, size: 4, data: 0xdead_beef }, None);
    expect(Exit::PioOut { port: 0x3f8, size: 1, data: 0xef }, Some(Completion::Done));
    for element in 1..=5u64 {
        expect(Exit::PioIn { port: 0x64, size: 1 }, value(element));
    }
    expect(Exit::MmioRead { addr: DEVICE + 8, size: 8 }, value(0x8877_6655_4433_2211));
    expect(Exit::MmioRead { addr: DEVICE + 2, size: 2 }, value(0x4242));
    expect(Exit::MmioWrite { addr: DEVICE + 16, size: 2, data: 0x1234 }, None);
    expect(Exit::MmioWrite { addr: DEVICE + 24, size: 8, data: 0x8877_6655_4433_2211 }, None);
    // 16 bytes are two exits of one instruction: the second comes from finish_pending as well as from run.
    let low = u64::from_le_bytes(wide[..8].try_into().expect("8"));
    let high = u64::from_le_bytes(wide[8..].try_into().expect("8"));
    expect(Exit::MmioWrite { addr: DEVICE + 32, size: 8, data: low }, None);
    let second = vcpu.finish_pending().expect("finished");
    assert_eq!(second, Some(Exit::MmioWrite { addr: DEVICE + 40, size: 8, data: high }));
    assert_eq!(vcpu.finish_pending().expect("finished"), None);
    assert_eq!(vcpu.run().expect("run"), Exit::RdMsr { index: 0x186 });
    assert!(vcpu.complete(Completion::Done).is_err(), "a read wants a value");
    vcpu.complete(Completion::Fault).expect("answered");
    assert_eq!(vcpu.run().expect("run"), Exit::PioOut { port: 0x80, size: 1, data: 0x0d }, "#GP was taken");
    let mut seen = [0u8; 36];
    memory.read(RESULT, &mut seen).expect("inside");
    assert_eq!(u64::from_le_bytes(seen[..8].try_into().expect("8")), 0x0123_4567_89ab_cdef);
    assert_eq!(seen[8], 0x5a);
    assert_eq!(seen[10..12], 0xbeefu16.to_le_bytes());
    assert_eq!(seen[12..16], 0x0bad_cafeu32.to_le_bytes());
    assert_eq!(seen[16..21], [1, 2, 3, 4, 5], "string input, element by element");
    assert_eq!(seen[32..36], 0x4242u32.to_le_bytes());
}

#[test]
fn every_pmu_msr_exits() {
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&memory, guest::msr(), EntryMode::Long);
    let listed = [
        0xc1u32,
        0xc8,
        0x186,
        0x18d,
        0x309,
        0x30a,
        0x30b,
        0x329,
        0x345,
        0x38d,
        0x38e,
        0x38f,
        0x390,
        0x391,
        0x392,
        0x3f1,
        0x4c1,
        0x4c8,
        0x600,
        0xc001_0000,
        0xc001_0007,
        0xc001_0200,
        0xc001_020b,
        0xc000_0300,
        0xc000_0301,
        0xc000_0302,
        0xc000_0303,
    ];
    for msr in listed {
        set_general(&vcpu, |r| r.rcx = u64::from(msr));
        set_general(&vcpu, |r| r.rip = guest::CODE + 5);
        assert_eq!(vcpu.run().expect("run"), Exit::RdMsr { index: msr });
        vcpu.complete(Completion::Value(1)).expect("answered");
        assert_eq!(vcpu.finish_pending().expect("finished"), None);
        assert!(pmu::is_pmu_msr(msr));
    }
}

#[test]
fn bad_state_is_refused_by_name() {
    if !require_kvm() {
        return;
    }
    let memory = memory(2 * MIB);
    let (vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
    let good = vcpu.save().expect("saved");
    let refuse = |vcpu: &mut KvmVcpu, kind: &str, change: &dyn Fn(&mut StatePiece)| {
        let mut pieces = good.clone();
        change(pieces.iter_mut().find(|p| p.kind == kind).expect("piece"));
        let error = vcpu.restore(&pieces).expect_err(kind);
        assert_eq!(error.reason(), "STATE_REJECTED");
        assert!(error.to_string().contains(kind), "{error}");
    };
    for piece in &good {
        refuse(&mut vcpu, &piece.kind, &|p| p.data.truncate(p.data.len() - 1));
        refuse(&mut vcpu, &piece.kind, &|p| p.version = 9);
        let without: Vec<StatePiece> = good.iter().filter(|p| p.kind != piece.kind).cloned().collect();
        assert!(piece.kind == "tsc" || vcpu.restore(&without).is_err(), "{}", piece.kind);
    }
    // CR4 with a reserved bit; a mode that is none; an MSR that does not exist.
    refuse(&mut vcpu, "sregs2", &|p| p.data[248 + 7] = 0x80);
    refuse(&mut vcpu, "mp_state", &|p| p.data[0] = 200);
    refuse(&mut vcpu, "msrs", &|p| {
        p.data.extend([0xef, 0xbe, 0xad, 0xde, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    });
    refuse(&mut vcpu, "msrs", &|p| p.data.extend([0x10, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]));
    vcpu.restore(&good).expect("the good state still goes in");
    let vm_good = vm.save().expect("saved");
    let mut swapped = vm_good.clone();
    swapped[0].kind = "irqchip1".to_owned();
    swapped[1].kind = "irqchip0".to_owned();
    assert!(vm.restore(&swapped).expect_err("swapped").to_string().contains("holds chip"));
    assert!(vm.restore(&vm_good[1..]).is_err());
    vm.restore(&vm_good).expect("good");
}

#[test]
fn two_vcpus_and_their_identity() {
    if !require_kvm() {
        return;
    }
    let memory = memory(4 * MIB);
    let regs = guest::load(&memory, guest::doorbell(), EntryMode::Long, None);
    let vm = make_vm(&memory, 2);
    assert!(vm.create_vcpu(2).is_err());
    let runs = |index: u32| {
        let (vm, regs) = (Arc::clone(&vm), regs.clone());
        std::thread::spawn(move || {
            let mut vcpu = vm.make_vcpu(index).expect("vcpu");
            assert_eq!(vcpu.lvtpc().expect("lvtpc"), 0x1_0000, "masked after reset");
            let entries = cpuid::from_bytes(&vcpu.cpuid).expect("cpuid");
            let leaf1 = entries.iter().find(|e| e.function == 1).expect("leaf 1");
            assert_eq!((leaf1.ebx >> 24, leaf1.ecx >> 31), (index, 1), "APIC id and hypervisor bit");
            for hidden in [0xa, 0x8000_0022] {
                let shown = entries.iter().find(|e| e.function == hidden);
                assert!(shown.is_none_or(|e| [e.eax, e.ebx, e.ecx, e.edx] == [0; 4]), "{shown:x?}");
            }
            println!("vCPU {index}: CPUID as stored differs in {:x?}", vcpu.cpuid_differences());
            vcpu.set_initial(&regs).expect("start state");
            vcpu.set_runnable().expect("runnable");
            for _ in 0..100 {
                assert!(matches!(vcpu.run().expect("run"), Exit::PioOut { port: 0x80, size: 1, .. }));
            }
            vcpu.inject_nmi().expect("nmi");
        })
    };
    let threads = [runs(0), runs(1)];
    for thread in threads {
        thread.join().expect("vcpu thread");
    }
}

/// An application processor waits in KVM_RUN until the boot processor sends INIT and SIPI, and begins in real mode;
/// KVM_RUN's EAGAIN on the way is not seen.
#[test]
fn an_application_processor_starts_by_sipi() {
    if !require_kvm() {
        return;
    }
    let memory = memory(4 * MIB);
    let mut regs = guest::load(&memory, guest::sipi(), EntryMode::Long, None);
    regs.rbx = 0xfee0_0000;
    // Real mode at 0x8000: mov al, 0x33; out 0x81, al; jmp $.
    memory.write(0x8000, &[0xb0, 0x33, 0xe6, 0x81, 0xeb, 0xfe]).expect("inside");
    let vm = make_vm(&memory, 2);
    let (send, receive) = std::sync::mpsc::channel();
    let second = {
        let vm = Arc::clone(&vm);
        std::thread::spawn(move || {
            let mut vcpu = vm.create_vcpu(1).expect("vcpu");
            send.send(vcpu.kicker()).expect("sent");
            loop {
                match vcpu.run().expect("run") {
                    // The kick below: a waiting processor can be got out too.
                    Exit::Interrupted => {
                        vcpu.clear_kick();
                        assert_eq!(vcpu.finish_pending().expect("finished"), None);
                        send.send(vcpu.kicker()).expect("sent");
                    }
                    exit => return exit,
                }
            }
        })
    };
    let deadline = Duration::from_secs(20);
    receive.recv_timeout(deadline).expect("made").kick();
    receive.recv_timeout(deadline).expect("kicked out");
    let mut first = vm.create_vcpu(0).expect("vcpu");
    first.set_initial(&regs).expect("start state");
    assert!(matches!(first.run().expect("run"), Exit::PioOut { port: 0x80, .. }), "{}", first.describe());
    assert_eq!(second.join().expect("thread"), Exit::PioOut { port: 0x81, size: 1, data: 0x33 });
}

#[test]
fn bad_options_are_refused() {
    if !require_kvm() {
        return;
    }
    for vcpus in [0, MAX_VCPUS + 1, u32::MAX] {
        let options = KvmOptions { vcpus, ..KvmOptions::default() };
        assert_eq!(
            KvmVm::new(memory(2 * MIB), options).expect_err("refused").reason(),
            "HYPERVISOR_UNSUPPORTED"
        );
    }
}

/// KVM's figures are read while the guest spins, which they count, and nobody is stopped for it.
#[test]
fn statistics_are_read_while_the_guest_runs() {
    if !require_kvm() {
        return;
    }
    let memory = memory(64 * MIB);
    let value = |vm: &KvmVm, vcpu: Option<u32>, name: &str| {
        let all = vm.statistics().expect("read");
        let found = all.into_iter().find(|s| s.vcpu == vcpu && s.name == name);
        found.unwrap_or_else(|| panic!("{name} of {vcpu:?}")).values[0]
    };
    // Exactly as many MMIO exits as bursts.
    let (vm, mut vcpu) = start(&memory, guest::dirty(), EntryMode::LongUser);
    for (at, word) in [(0, 1u64), (8, 1), (16, 32 * MIB)] {
        memory.store_u64(RESULT + at, word).expect("inside");
    }
    let before = value(&vm, Some(0), "mmio_exits");
    for _ in 0..100 {
        assert!(matches!(vcpu.run().expect("run"), Exit::MmioWrite { .. }));
    }
    assert_eq!(value(&vm, Some(0), "mmio_exits") - before, 100);
    assert!(vm.statistics().expect("read").iter().any(|s| s.vcpu.is_none()), "the machine has figures too");
    assert!(vm.statistics().expect("read").iter().any(|s| s.values.len() > 1), "histograms are whole");
    // From another thread while it spins: a call that waited for the vCPU would never come back.
    let (send, receive) = std::sync::mpsc::channel();
    let spinning = std::thread::spawn(move || {
        let memory = GuestMemory::new("spin", 2 * MIB).expect("memory");
        let (vm, mut vcpu) = start(&memory, guest::spin(), EntryMode::LongUser);
        send.send((vm, vcpu.kicker())).expect("sent");
        assert_eq!(vcpu.run().expect("run"), Exit::Interrupted);
    });
    let (vm, kicker) = receive.recv().expect("a vCPU");
    for _ in 0..100 {
        value(&vm, Some(0), "exits");
    }
    assert!(!spinning.is_finished());
    kicker.kick();
    spinning.join().expect("thread");
}

/// What a policy shows is what is stored, but for what KVM forces, and that is named.
#[test]
fn cpuid_policies_are_read_back() {
    if !require_kvm() {
        return;
    }
    let shown = |features: features::CpuidPolicy| {
        let memory = memory(2 * MIB);
        let vm = KvmVm::new(memory, KvmOptions { vcpus: 1, features, ..KvmOptions::default() }).expect("vm");
        let vcpu = vm.make_vcpu(0).expect("vcpu");
        let stored = cpuid::from_bytes(&vcpu.cpuid).expect("entries");
        let leaf7 = stored.iter().find(|e| (e.function, e.index) == (7, 0)).expect("leaf 7").ebx;
        let forced: Vec<&str> = vm
            .cpuid_differences()
            .iter()
            .filter(|d| (d.leaf, d.subleaf) == (7, 0))
            .flat_map(|d| features::names(7, 0, 1, d.stored[1] & !d.asked[1]))
            .collect();
        (features::names(7, 0, 1, leaf7), forced)
    };
    let list = features::CpuidPolicy::Features(vec!["avx".to_owned(), "avx2".to_owned(), "xsave".to_owned()]);
    if features::check(&list).expect("asked") == Ok(()) {
        let (names, forced) = shown(list);
        println!("forced by this KVM: {forced:?}");
        assert!(names.contains(&"avx2"));
        let extra: Vec<_> = names.into_iter().filter(|n| *n != "avx2").collect();
        assert_eq!(extra, forced, "all else is what KVM forces, and named");
    }
    let none = features::CpuidPolicy::Features(vec!["warp_drive".to_owned()]);
    assert_eq!(features::check(&none).expect("asked").expect_err("refused").feature, "warp_drive");
    let memory = memory(2 * MIB);
    let options = KvmOptions { vcpus: 1, features: none, ..KvmOptions::default() };
    let vm = KvmVm::new(memory, options).expect("vm");
    assert!(vm.make_vcpu(0).err().expect("refused").to_string().contains("warp_drive"));
}

/// A guest that runs from huge pages, where this process may set some aside.
#[test]
fn a_guest_runs_from_huge_pages() {
    const POOL: &str = "/proc/sys/vm/nr_hugepages";
    if !require_kvm() {
        return;
    }
    let before: u64 = std::fs::read_to_string(POOL).map_or(0, |s| s.trim().parse().unwrap_or(0));
    if std::fs::write(POOL, (before + 8).to_string()).is_err() {
        println!("skipped: {POOL} cannot be written");
        return;
    }
    let memory = GuestMemory::with_pages("huge", 16 * MIB, crate::memory::HugePages::Hugetlb);
    let memory = memory.inspect_err(|_| drop(std::fs::write(POOL, before.to_string()))).expect("set aside");
    assert!(memory.is_hugetlb());
    memory.prefault().expect("populated");
    let (vm, mut vcpu) = start(&memory, guest::dirty(), EntryMode::LongUser);
    for (at, word) in [(0, 100u64), (8, 64), (16, 8 * MIB)] {
        memory.store_u64(RESULT + at, word).expect("inside");
    }
    assert!(matches!(vcpu.run().expect("run"), Exit::MmioWrite { .. }));
    drop((vm, vcpu));
    drop(memory);
    std::fs::write(POOL, before.to_string()).expect("given back");
}
