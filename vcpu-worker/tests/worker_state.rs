//! State from outside: what does not fit is refused by name before anything is set, and nothing makes a worker panic.

mod worker_common;

use std::sync::Arc;

use proptest::prelude::*;
use prost::Message as _;
use vcpu_worker::grant::RunRight;
use vcpu_worker::machine::Machine;
use vcpu_worker::machine::build::{BuildOptions, Loads, Plan, build};
use vpmu_proto::worker::*;
use worker_common::*;

fn machine(incoming: bool) -> (Arc<Machine>, Loads) {
    machine_of("simulated", probe_spec(1, 32), incoming)
}

fn machine_of(
    hypervisor: &str,
    spec: vpmu_proto::api::VirtualMachineSpec,
    incoming: bool,
) -> (Arc<Machine>, Loads) {
    let request = CreateVmRequest {
        fence: None,
        vm_name: "state".to_owned(),
        spec: Some(spec),
        vcpu_cores: vec![0],
        hypervisor: hypervisor.to_owned(),
        pmu_mode: "model".to_owned(),
        model_pmu: MODEL.to_owned(),
        incoming,
        ..CreateVmRequest::default()
    };
    let plan = Plan::new(&request, &host_cores()).expect("plan");
    let options = BuildOptions {
        right: Arc::new(RunRight::default()),
        rates: pmu::Rates::default(),
        console: Arc::default(),
    };
    let (machine, loads, _) = build(plan, &options).expect("build");
    (Arc::new(machine), loads)
}

async fn saved() -> VmState {
    let (machine, loads) = machine(false);
    machine.load(loads).await.expect("load");
    machine.console().write(b"hello");
    let state = machine.finish_save(machine.begin_save(), true).await.expect("save");
    machine.stop().await.expect("stop");
    state
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_named() {
    let good = saved().await;
    let (target, _) = machine(true);
    let images = target.restore(good.clone()).await.expect("restore");
    assert_eq!(images.len(), 1);
    assert_eq!(target.console().read(0).1, b"hello");
    let again = target.finish_save(target.begin_save(), true).await.expect("save");
    assert_eq!(again.vcpus, good.vcpus, "what was set is what is read");

    type Change = (fn(&mut VmState), &'static str);
    let changes: [Change; 10] = [
        (|s| s.version = 2, "STATE_REJECTED"),
        (|s| s.hypervisor = "kvm".to_owned(), "STATE_REJECTED"),
        (|s| s.vcpus.clear(), "STATE_REJECTED"),
        (|s| s.vcpus.push(VcpuState::default()), "STATE_REJECTED"),
        (|s| s.vcpus[0].vcpu = 1, "STATE_REJECTED"),
        (|s| s.vcpus[0].pieces.resize(100, StatePiece::default()), "STATE_REJECTED"),
        (|s| s.vcpus[0].pmu = None, "PMU_IMAGE_REJECTED"),
        (|s| s.vcpus[0].pmu.as_mut().unwrap().registers[0].value ^= 1, "PMU_IMAGE_REJECTED"),
        (|s| s.devices[0].data.truncate(5), "STATE_REJECTED"),
        (|s| s.devices[0].kind = "floppy".to_owned(), "STATE_REJECTED"),
    ];
    for (i, (change, why)) in changes.into_iter().enumerate() {
        let mut bad = good.clone();
        change(&mut bad);
        let error = target.restore(bad).await.expect_err("refused");
        assert_eq!(error.reason(), why, "change {i}: {error}");
    }
    target.stop().await.expect("stop");
}

#[test]
fn damaged_state_is_answered() {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("runtime");
    let good = runtime.block_on(saved()).encode_to_vec();
    let (target, _) = runtime.block_on(async { machine(true) });
    proptest!(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() }, |(at in 0..good.len(), bits in 1u8..=255, cut in any::<bool>())| {
        let mut bytes = good.clone();
        bytes[at] ^= bits;
        if cut {
            bytes.truncate(at);
        }
        // Some damage is not seen here (console text, a register's value): the data plane's digest is for that. What is
        // asked is an answer.
        if let Ok(state) = VmState::decode(bytes.as_slice()) {
            let _ = runtime.block_on(target.restore(state));
        }
        prop_assert_eq!(target.statistics().len(), 1);
    });
    runtime.block_on(target.stop()).expect("its thread is still there");
}

/// Every (leaf, subleaf, register) of a machine's CPUID as it travels in its state.
async fn cpuid_of(machine: &Arc<Machine>) -> std::collections::BTreeMap<(u32, u32, usize), u32> {
    let state = machine.finish_save(machine.begin_save(), true).await.expect("save");
    let pieces = &state.vcpus[0].pieces;
    let bytes = &pieces.iter().find(|piece| piece.kind == "cpuid").expect("cpuid").data;
    let word = |e: &[u8], at: usize| u32::from_le_bytes(e[at * 4..at * 4 + 4].try_into().expect("4"));
    // struct kvm_cpuid_entry2: function, index, flags, EAX to EDX.
    let entries = bytes.chunks_exact(40);
    entries.flat_map(|e| (0..4).map(move |at| ((word(e, 0), word(e, 1), at), word(e, 3 + at)))).collect()
}

/// The policy of the spec is the one that the machine's CPUID is made by: bits that a list leaves out are not there, but for
/// those that KVM forces, which are told.
#[tokio::test(flavor = "multi_thread")]
async fn the_cpuid_policy_of_the_spec_reaches_the_guest() {
    use vpmu_proto::api::{CpuidSpec, cpuid_spec::Policy};
    if !kvm() {
        return;
    }
    let mut seen = Vec::new();
    for (policy, features) in [(Policy::Host, vec![]), (Policy::List, vec!["cx16".to_owned()])] {
        let cpuid = Some(CpuidSpec { policy: policy.into(), features });
        let spec = vpmu_proto::api::VirtualMachineSpec { cpuid, ..probe_spec(1, 32) };
        let (machine, loads) = machine_of("kvm", spec, false);
        machine.load(loads).await.expect("load");
        seen.push((cpuid_of(&machine).await, machine.vm().cpuid_differences()));
        machine.stop().await.expect("stop");
    }
    let [(host, _), (list, told)] = &seen[..] else { panic!("two") };
    let names = vcpu_worker::hypervisor::kvm::features::names;
    let (mut hidden, mut shown) = (Vec::new(), Vec::new());
    for (at @ (leaf, subleaf, register), value) in list {
        let forced = told.iter().find(|d| (d.leaf, d.subleaf) == (*leaf, *subleaf));
        let forced = forced.map_or(0, |d| d.stored[*register] & !d.asked[*register]);
        shown.extend(names(*leaf, *subleaf, *register, value & !forced));
        hidden.extend(names(*leaf, *subleaf, *register, host[at] & !value));
    }
    assert_eq!(shown, ["cx16"], "what KVM did not force is what was listed");
    assert!(
        !hidden.is_empty() && !hidden.contains(&"cx16"),
        "it hides some of what the host shows: {hidden:?}"
    );
    println!("hidden: {hidden:?}");
}
