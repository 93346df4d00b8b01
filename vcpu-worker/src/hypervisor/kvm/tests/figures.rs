//! What the VM layer costs beside bare ioctls. Printed, not asserted: `cargo test --release -p vcpu-worker -- --ignored
//! --nocapture figures`.

use std::time::Instant;

use super::super::shell::{IDENTITY_MAP_ADDRESS, SRCU_QUIET, TSS_ADDRESS};
use super::*;

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

/// Median microseconds of `count` calls.
fn each(count: usize, mut call: impl FnMut()) -> f64 {
    median(
        (0..count)
            .map(|_| {
                let begin = Instant::now();
                call();
                begin.elapsed().as_nanos() as f64 / 1000.0
            })
            .collect(),
    )
}

#[test]
#[ignore = "prints figures: cargo test --release -p vcpu-worker --lib -- --ignored --nocapture figures"]
fn figures() {
    if !require_kvm() {
        return;
    }
    let ours = memory(2 * MIB);
    let (_vm, mut vcpu) = start(&ours, guest::doorbell(), EntryMode::Long);
    // The bare loop: the same guest on a VM of the same kind, entered by nothing but the ioctl.
    let bare_memory = memory(2 * MIB);
    let (_bare_vm, mut bare) = start(&bare_memory, guest::doorbell(), EntryMode::Long);
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..10 {
        a.push(each(2000, || {
            vcpu.run().expect("run");
        }));
        b.push(each(2000, || {
            bare.run_bare().expect("run");
        }));
    }
    let least = |v: &[f64]| v.iter().copied().fold(f64::INFINITY, f64::min);
    println!(
        "OUT from ring 0: {:.2} us ours, {:.2} us bare, ratio {:.3}",
        least(&a),
        least(&b),
        least(&a) / least(&b)
    );

    let msr_memory = memory(2 * MIB);
    let (_msr_vm, mut msr) = start(&msr_memory, guest::msr(), EntryMode::Long);
    let rdmsr = each(2000, || {
        msr.run().expect("run");
        msr.complete(Completion::Value(7)).expect("answered");
    });
    println!("RDMSR exit and answer: {rdmsr:.2} us");
    println!("finish_pending: {:.2} us", each(500, || drop(msr.finish_pending().expect("finished"))));
    println!("lvtpc: {:.2} us", each(500, || _ = msr.lvtpc().expect("lvtpc")));

    let state_memory = memory(2 * MIB);
    let (vm, mut vcpu) = start(&state_memory, guest::spin(), EntryMode::LongUser);
    let pieces = vcpu.save().expect("saved");
    let vm_pieces = vm.save().expect("saved");
    let bytes: usize = pieces.iter().chain(&vm_pieces).map(|p| p.data.len()).sum();
    println!("state: {bytes} bytes");
    println!("vCPU save: {:.1} us", each(200, || drop(vcpu.save().expect("saved"))));
    println!("VM save: {:.1} us", each(200, || drop(vm.save().expect("saved"))));
    println!("vCPU restore: {:.1} us", each(200, || vcpu.restore(&pieces).expect("restored")));
    println!("VM restore: {:.1} us", each(200, || vm.restore(&vm_pieces).expect("restored")));

    let (mut create, mut create_vcpu) = (Vec::new(), Vec::new());
    for _ in 0..50 {
        let memory = memory(16 * MIB);
        let begin = Instant::now();
        let vm = make_vm(&memory, 1);
        create.push(begin.elapsed().as_nanos() as f64 / 1000.0);
        let begin = Instant::now();
        let vcpu = vm.create_vcpu(0).expect("vcpu");
        create_vcpu.push(begin.elapsed().as_nanos() as f64 / 1000.0);
        drop(vcpu);
    }
    println!("VM creation: {:.0} us, and a vCPU: {:.0} us", median(create), median(create_vcpu));
}

/// Where the time of making a VM goes.
#[test]
#[ignore = "prints figures: cargo test --release -p vcpu-worker --lib -- --ignored --nocapture figures"]
fn creation_step_by_step() {
    if !require_kvm() {
        return;
    }
    let system = system().expect("kvm");
    let names = ["create", "identity map", "tss", "quiet", "msr filter", "slots", "irqchip", "pit2", "vcpu"];
    let mut steps: Vec<Vec<f64>> = vec![Vec::new(); names.len()];
    for _ in 0..30 {
        let memory = memory(16 * MIB);
        let mut begin = Instant::now();
        let mut step = 0;
        let mut lap = |steps: &mut Vec<Vec<f64>>| {
            steps[step].push(begin.elapsed().as_nanos() as f64 / 1000.0);
            step += 1;
            begin = Instant::now();
        };
        let fd = system.kvm.create_vm().expect("vm");
        lap(&mut steps);
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).expect("identity map");
        lap(&mut steps);
        fd.set_tss_address(TSS_ADDRESS).expect("tss");
        lap(&mut steps);
        std::thread::sleep(SRCU_QUIET);
        lap(&mut steps);
        msr_filter::filter_pmu(&fd).expect("filter");
        lap(&mut steps);
        let _log = dirty::DirtyLog::new(&fd, &memory, false).expect("slots");
        lap(&mut steps);
        fd.create_irq_chip().expect("irqchip");
        lap(&mut steps);
        fd.create_pit2(kvm_pit_config::default()).expect("pit2");
        lap(&mut steps);
        fd.create_vcpu(0).expect("vcpu");
        lap(&mut steps);
    }
    for (name, samples) in names.iter().zip(steps) {
        println!("{name}: {:.0} us", median(samples));
    }
}
