//! Rows 38 and 39 of the patch table: instructions that the VMM completes for the guest count as if the processor had run them.

use pmu::{
    Core, CpuMode, EventFilter, Events, GuestAccess, GuestId, GuestPmu, ModelPmu, Policy, Shape, SwitchError,
};

const INSTRUCTIONS: u64 = 0x43_00C0;
const BRANCHES: u64 = 0x43_00C4;
const CYCLES: u64 = 0x43_003C;
const INT: u64 = 1 << 20;
const TOP: u64 = (1 << 48) - 1;

fn guest(host: &str, writes: &[(u32, u64)]) -> (Core<ModelPmu>, GuestPmu) {
    let host: Shape = host.parse().expect("shape");
    let mut core = Core::new(ModelPmu::new(host), host);
    let shape = host.guest(host.gp_count(), host.fixed_count()).expect("subset");
    let mut guest = GuestPmu::new(GuestId(1), shape, Policy::Strict, EventFilter::allow_all());
    for &(msr, value) in writes {
        assert_eq!(core.guest_wrmsr(&mut guest, msr, value), Ok(GuestAccess::Done), "{msr:#x} <- {value:#x}");
    }
    core.load(&mut guest).expect("load");
    (core, guest)
}

fn read(core: &mut Core<ModelPmu>, guest: &mut GuestPmu, msr: u32) -> u64 {
    match core.guest_rdmsr(guest, msr).expect("rdmsr") {
        GuestAccess::Value(value) => value,
        other => panic!("{msr:#x}: {other:?}"),
    }
}

#[test]
fn row38_completed_instructions_count_by_event_running_or_paused() {
    let writes = [
        (0x186, INSTRUCTIONS),
        (0x187, BRANCHES),
        (0x188, CYCLES),
        (0x189, INSTRUCTIONS | 2 << 24), // a counter mask counts cycles, not instructions
        (0x38D, 0x33),
        (0x38F, 0xF | 3 << 32),
    ];
    let (mut core, mut g) = guest("intel:v5:8+4:48", &writes);
    core.emulated(&mut g, 3, 1).expect("paused");
    core.resume(&mut g).expect("resume");
    core.hardware_mut().feed(&Events { cycles: 50, instructions: 100, ..Events::ZERO }, CpuMode::Guest);
    core.emulated(&mut g, 22, 5).expect("running");
    core.hardware_mut().feed(&Events { cycles: 50, instructions: 100, ..Events::ZERO }, CpuMode::Guest);
    for (msr, want) in [(0xC1, 225), (0xC2, 6), (0xC3, 100), (0xC4, 0), (0x309, 225), (0x30A, 100)] {
        assert_eq!(read(&mut core, &mut g, msr), want, "{msr:#x}");
    }
    core.put(&mut g).expect("put");
    assert_eq!((g.image().get(0xC1), g.image().get(0x309)), (Some(225), Some(225)));
}

#[test]
fn row38_an_increment_to_zero_sets_the_status_and_raises_one_pmi() {
    let writes = [(0x4C1, TOP), (0x186, INSTRUCTIONS | INT), (0x38F, 1)];
    let (mut core, mut g) = guest("intel:v5:8+4:48", &writes);
    core.resume(&mut g).expect("resume");
    core.emulated(&mut g, 1, 0).expect("emulated");
    assert_eq!((read(&mut core, &mut g, 0xC1), read(&mut core, &mut g, 0x38E)), (0, 1));
    assert!(g.judge_pmi(false) && !g.judge_pmi(false));
    core.hardware_mut().feed(&Events { instructions: 7, ..Events::ZERO }, CpuMode::Guest);
    core.pause(&mut g).expect("pause");
    assert!(!g.pmi_raised(), "the same overflow is not seen twice");
    assert_eq!((read(&mut core, &mut g, 0xC1), read(&mut core, &mut g, 0x38E)), (7, 1));
}

#[test]
fn row38_on_amd_and_where_nothing_counts() {
    let (mut core, mut g) =
        guest("amd:v2:6:48", &[(0xC001_0200, INSTRUCTIONS), (0xC001_0202, 0x43_00C2), (0xC000_0301, 3)]);
    core.emulated(&mut g, 4, 2).expect("emulated");
    assert_eq!((read(&mut core, &mut g, 0xC001_0201), read(&mut core, &mut g, 0xC001_0203)), (4, 2));
    let (mut core, mut idle) = guest("intel:v5:8+4:48", &[(0x186, INSTRUCTIONS), (0x38F, 0)]);
    core.emulated(&mut idle, 4, 2).expect("emulated");
    assert_eq!(read(&mut core, &mut idle, 0xC1), 0, "its global control is closed");
    core.put(&mut idle).expect("put");
    assert_eq!(core.emulated(&mut idle, 1, 0), Err(SwitchError::NotLoaded(1)));
}
