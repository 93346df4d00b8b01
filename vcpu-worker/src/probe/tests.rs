//! The probe guest on both hypervisors: the same expectations.

use std::sync::Arc;

use pmu::Shape;

use super::harness::{Machine, Start, config};
use super::*;
use crate::bitmap::PageBitmap;
use crate::hypervisor::Vm;
use crate::hypervisor::kvm::{KvmOptions, KvmVm};
use crate::hypervisor::simulated::{SimOptions, SimVm};
use crate::memory::GuestMemory;
use crate::testing::require_kvm;

const MEM: u64 = 16 << 20;

type Make = fn(GuestMemory, u32) -> Arc<dyn Vm>;

fn kvm(memory: GuestMemory, vcpus: u32) -> Arc<dyn Vm> {
    KvmVm::new(memory, KvmOptions { vcpus, filter_pmu_msrs: true, ..KvmOptions::default() }).unwrap()
}

fn simulated(memory: GuestMemory, _vcpus: u32) -> Arc<dyn Vm> {
    let turn = std::time::Duration::from_millis(1);
    SimVm::new(memory, SimOptions { turn, ..SimOptions::default() }).unwrap()
}

fn shape(text: &str) -> Shape {
    text.parse().unwrap()
}

fn start(make: Make, pmu: &str, vcpus: u32) -> Machine {
    let cfg = config(&shape(pmu), vcpus, MEM);
    Machine::start(make(GuestMemory::new("probe", MEM).unwrap(), vcpus), shape(pmu), cfg)
}

fn works(make: Make, pmu: &str, vcpus: u32) {
    let machine = start(make, pmu, vcpus);
    machine.wait("heartbeats, interrupts and dirty pages", |r| {
        r.heartbeats > 100 && r.pmis > 5 && r.pages_dirtied > 300 && r.loops > 100
    });
    machine.wait("checks", |r| details(machine.memory(), r.vcpu).unwrap().checks > 5);
    assert!(machine.reports().iter().all(|r| r.faults == 0), "{}", machine.describe());
    let last = format!("probe vcpu{} beats ", vcpus - 1);
    machine.wait("a whole progress report", |_| {
        let text = machine.serial();
        text.find(&last).is_some_and(|at| text[at..].contains(" faults 0\n"))
    });
    let serial = machine.serial();
    assert!(serial.starts_with("probe vcpu0 up\nprobe vcpu0 beats "), "{serial}");
    let cfg = machine.cfg.clone();
    let (vm, _) = machine.stop();
    let pages = verify_memory(vm.memory(), &cfg).unwrap();
    assert_eq!(pages, u64::from(vcpus) * cfg.ws_pages() + cfg.fill_pages());
    damage_is_found(vm.memory(), &cfg);
}

/// A byte that is wrong anywhere in the patterns does not escape the verifier.
fn damage_is_found(memory: &GuestMemory, cfg: &ProbeConfig) {
    let (_, next) = details(memory, 0).unwrap().working_set;
    let page = (next + 1) % cfg.ws_pages();
    for offset in [cfg.ws_offset(0) + page * 4096, cfg.fill_offset() + 4096 + 2048] {
        let mut byte = [0];
        memory.read_at(offset, &mut byte).unwrap();
        memory.write_at(offset, &[byte[0] ^ 1]).unwrap();
        assert!(verify_memory(memory, cfg).is_err(), "damage at {offset:#x}");
        memory.write_at(offset, &byte).unwrap();
    }
    verify_memory(memory, cfg).unwrap();
}

/// A wrong answer to each kind of check is a fault with its own code.
fn finds_faults(make: Make) {
    for (msr, code) in
        [(0xc8, layout::FAULT_PARKED), (0x187, layout::FAULT_SELECTOR), (0x38d, layout::FAULT_CONTROL)]
    {
        let machine = start(make, "intel:v5:8+4:48", 1);
        machine.wait("checks", |r| details(machine.memory(), r.vcpu).unwrap().checks > 1);
        assert_eq!(machine.reports()[0].faults, 0, "{}", machine.describe());
        machine.plant(msr);
        machine.wait("a fault", |r| r.faults == 1 && r.first_fault == code);
        assert_eq!(details(machine.memory(), 0).unwrap().first_fault[1], u64::from(msr));
        machine.stop();
    }
}

/// Live dirty tracking, then state and memory into a new VM: nothing is lost.
fn migrates(make: Make) {
    let machine = start(make, "intel:v5:8+4:48", 2);
    machine.wait("a filled area", |r| {
        let (_, share) = machine.cfg.fill_share(r.vcpu);
        details(machine.memory(), r.vcpu).unwrap().filled == share && r.pages_dirtied > 10
    });
    let copy = GuestMemory::new("probe-copy", MEM).unwrap();
    let copy_pages = |from: &GuestMemory, pages: &PageBitmap| {
        let mut page = [0u8; 4096];
        for (first, count) in pages.runs() {
            for p in first..first + count {
                from.read_at(p * 4096, &mut page).unwrap();
                copy.write_at(p * 4096, &page).unwrap();
            }
        }
    };
    machine.vm.start_dirty_tracking().unwrap();
    copy_pages(machine.memory(), &PageBitmap::full(copy.pages()));
    let dirtied: Vec<u64> = machine.reports().iter().map(|r| r.pages_dirtied).collect();
    let beats = machine.reports()[0].heartbeats;
    for round in 1..4 {
        machine.wait("a round of dirtying", |r| r.pages_dirtied > dirtied[r.vcpu as usize] + round * 50);
        let mut pages = PageBitmap::new(copy.pages());
        machine.vm.collect_dirty(&mut pages).unwrap();
        assert!(pages.count() >= 50 && pages.count() < 2000, "{} pages", pages.count());
        copy_pages(machine.memory(), &pages);
    }
    let cfg = machine.cfg.clone();
    let (source, stopped) = machine.stop();
    let mut pages = PageBitmap::new(copy.pages());
    source.collect_dirty(&mut pages).unwrap();
    copy_pages(source.memory(), &pages);
    let all = [(0, MEM)];
    assert_eq!(copy.crc32c(&all, 0).unwrap(), source.memory().crc32c(&all, 0).unwrap());
    verify_memory(&copy, &cfg).unwrap();

    let vm = make(copy, 2);
    vm.restore(&source.save().unwrap()).unwrap();
    mark_resumed(vm.memory());
    let before = report(vm.memory(), 0).unwrap();
    let starts = stopped.into_iter().map(|s| Start::Restored(Box::new(s))).collect();
    let machine = Machine::run(vm, shape("intel:v5:8+4:48"), cfg, starts);
    machine.wait("going on", |r| r.heartbeats > before.heartbeats + 50 && r.last_gap_ns > 0);
    assert!(before.heartbeats >= beats && before.last_gap_ns == 0);
    assert!(machine.reports().iter().all(|r| r.faults == 0), "{}", machine.describe());
    let cfg = machine.cfg.clone();
    let (vm, _) = machine.stop();
    verify_memory(vm.memory(), &cfg).unwrap();
}

#[test]
fn kvm_works_with_one_vcpu() {
    if require_kvm() {
        works(kvm, "intel:v5:8+4:48", 1);
    }
}

#[test]
fn kvm_works_with_two_vcpus_on_amd() {
    if require_kvm() {
        works(kvm, "amd:v2:6:48", 2);
    }
}

#[test]
fn kvm_works_with_two_counters() {
    if require_kvm() {
        works(kvm, "intel:v2:2+3:40", 1);
    }
}

#[test]
fn kvm_finds_faults() {
    if require_kvm() {
        finds_faults(kvm);
    }
}

#[test]
fn kvm_migrates() {
    if require_kvm() {
        migrates(kvm);
    }
}

#[test]
fn kvm_runs_without_a_pmu() {
    if require_kvm() {
        without_a_pmu(kvm);
    }
}

#[test]
fn simulated_works() {
    works(simulated, "intel:v5:8+4:48", 1);
    works(simulated, "amd:v2:6:48", 2);
}

#[test]
fn simulated_finds_faults() {
    finds_faults(simulated);
}

#[test]
fn simulated_migrates() {
    migrates(simulated);
}

#[test]
fn simulated_runs_without_a_pmu() {
    without_a_pmu(simulated);
}

fn without_a_pmu(make: Make) {
    let mut cfg = config(&shape("intel:v5:8+4:48"), 1, MEM);
    cfg.pmu = None;
    let vm = make(GuestMemory::new("probe", MEM).unwrap(), 1);
    let machine = Machine::start(vm, shape("intel:v5:8+4:48"), cfg);
    machine.wait("heartbeats", |r| r.heartbeats > 50);
    assert!(machine.reports().iter().all(|r| r.faults == 0 && r.pmis == 0), "{}", machine.describe());
    machine.stop();
}
