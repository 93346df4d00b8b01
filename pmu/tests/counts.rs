//! I-16: every load, resume, pause and put costs exactly what switch.md section 4 says.

use pmu::{
    Core, CpuMode, EventFilter, Events, GuestAccess, GuestId, GuestPmu, Hardware, HwError, ModelPmu, Policy,
    Shape,
};

/// Counts accesses on their way to the model.
struct Counting {
    model: ModelPmu,
    rdmsr: u32,
    wrmsr: u32,
    rdpmc: u32,
}

impl Counting {
    fn take(&mut self) -> (u32, u32, u32) {
        let out = (self.rdpmc, self.rdmsr, self.wrmsr);
        (self.rdpmc, self.rdmsr, self.wrmsr) = (0, 0, 0);
        out
    }
}

impl Hardware for Counting {
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.rdmsr += 1;
        self.model.rdmsr(msr)
    }
    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.wrmsr += 1;
        self.model.wrmsr(msr, value)
    }
    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.rdpmc += 1;
        self.model.rdpmc(index)
    }
}

fn core(shape: &str) -> Core<Counting> {
    let shape: Shape = shape.parse().expect("shape");
    let mut core = Core::new(Counting { model: ModelPmu::new(shape), rdmsr: 0, wrmsr: 0, rdpmc: 0 }, shape);
    core.clean().expect("clean start");
    core.hardware_mut().take();
    core
}

fn write(core: &mut Core<Counting>, g: &mut GuestPmu, msr: u32, value: u64) {
    assert_eq!(core.guest_wrmsr(g, msr, value), Ok(GuestAccess::Done), "{msr:#x} <- {value:#x}");
}

/// A guest with `k` general-purpose and `f` fixed counters live, each with a value.
fn guest(
    core: &mut Core<Counting>,
    id: u64,
    policy: Policy,
    gp: u32,
    fixed: u32,
    k: u32,
    f: u32,
) -> GuestPmu {
    let shape = core.host().guest(gp, fixed).expect("subset");
    let mut g = GuestPmu::new(GuestId(id), shape, policy, EventFilter::allow_all());
    let instructions = 0x43_00C0;
    for i in 0..k {
        write(core, &mut g, shape.counter_msr(i), 1000 + u64::from(i));
        write(core, &mut g, shape.selector_msr(i), instructions);
    }
    for i in 0..f {
        write(core, &mut g, shape.fixed_msr(i), 2000 + u64::from(i));
    }
    if f > 0 {
        write(core, &mut g, 0x38D, 0x3333 & ((1 << (4 * f)) - 1));
    }
    if shape.has_global() {
        write(core, &mut g, shape.control_msr(), ((1 << k) - 1) | ((1 << f) - 1) << 32);
    }
    assert_eq!(
        core.hardware_mut().take(),
        (0, 0, 0),
        "programming a guest that is not loaded touches no hardware"
    );
    g
}

const EVENTS: Events = Events { cycles: 900, instructions: 1000, ref_cycles: 300, slots: 4000, branches: 0 };

#[test]
fn i16_strict_costs_the_scrub_bound() {
    for (host, gp, fixed) in [("intel:v5:8+4:48", 8, 3), ("intel:v5:8+4:48", 8, 4), ("amd:v2:6:48", 6, 0)] {
        for k in 0..=gp {
            for f in 0..=fixed {
                let mut core = core(host);
                let mut g = guest(&mut core, 1, Policy::Strict, gp, fixed, k, f);
                let any = u32::from(k + f > 0);
                let ctrl = u32::from(f > 0);
                for round in 0..3 {
                    core.load(&mut g).expect("load");
                    assert_eq!(
                        core.hardware_mut().take(),
                        (0, 0, 2 * k + f + ctrl),
                        "load {host} k={k} f={f} round={round}"
                    );
                    core.resume(&mut g).expect("resume");
                    assert_eq!(core.hardware_mut().take(), (0, 0, any), "resume");
                    core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
                    core.pause(&mut g).expect("pause");
                    assert_eq!(core.hardware_mut().take(), (0, 0, any), "pause");
                    core.put(&mut g).expect("put");
                    assert_eq!(
                        core.hardware_mut().take(),
                        (k + f, 0, 2 * k + f + ctrl),
                        "put {host} k={k} f={f}"
                    );
                }
            }
        }
    }
}

#[test]
fn i16_lazy_return_costs_one_and_one() {
    for (host, gp, fixed) in [("intel:v5:8+4:48", 8, 4), ("amd:v2:6:48", 6, 0)] {
        let mut core = core(host);
        let mut g = guest(&mut core, 1, Policy::Lazy, gp, fixed, gp, fixed);
        core.load(&mut g).expect("first load");
        core.resume(&mut g).expect("resume");
        core.put(&mut g).expect("put");
        core.hardware_mut().take();
        for _ in 0..3 {
            core.load(&mut g).expect("load");
            core.resume(&mut g).expect("resume");
            assert_eq!(core.hardware_mut().take(), (0, 0, 1));
            core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
            core.put(&mut g).expect("put");
            assert_eq!(core.hardware_mut().take(), (0, 0, 1));
        }
        core.sync(&mut g).expect("sync");
        assert_eq!(core.hardware_mut().take(), (gp + fixed, 0, 0), "reads happen at sync");
        core.sync(&mut g).expect("sync");
        assert_eq!(core.hardware_mut().take(), (0, 0, 0));
        assert_eq!(g.image().get(core.host().counter_msr(0)), Some(1000 + 3 * 1000));
    }
}

#[test]
fn i16_without_a_global_control_the_selectors_are_the_switch() {
    for (host, gp) in [("intel:v1:4+0:48", 4), ("amd:v0:4:48", 4), ("amd:v1:6:48", 6)] {
        for k in 0..=gp {
            let mut core = core(host);
            let mut g = guest(&mut core, 1, Policy::Strict, gp, 0, k, 0);
            core.load(&mut g).expect("load");
            assert_eq!(core.hardware_mut().take(), (0, 0, k), "{host} load writes counters");
            core.resume(&mut g).expect("resume");
            assert_eq!(core.hardware_mut().take(), (0, 0, k), "{host} resume writes selectors");
            core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
            core.put(&mut g).expect("put");
            assert_eq!(core.hardware_mut().take(), (k, 0, 2 * k), "{host} put");
        }
    }
}

#[test]
fn i16_two_lazy_guests_in_turn_cost_reads_values_and_two_control_writes() {
    let mut core = core("intel:v5:8+4:48");
    let mut a = guest(&mut core, 1, Policy::Lazy, 8, 4, 4, 3);
    let mut b = guest(&mut core, 2, Policy::Lazy, 8, 4, 4, 3);
    for g in [&mut a, &mut b] {
        core.load(g).expect("load");
        core.resume(g).expect("resume");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        core.put(g).expect("put");
    }
    core.hardware_mut().take();
    core.hardware_mut().model.feed(&EVENTS, CpuMode::Host);
    core.load(&mut a).expect("load");
    core.resume(&mut a).expect("resume");
    assert_eq!(
        core.hardware_mut().take(),
        (7, 0, 1),
        "b's counters are read; a's values happen to equal b's"
    );
    core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
    core.put(&mut a).expect("put");
    core.hardware_mut().take();
    core.load(&mut b).expect("load");
    core.resume(&mut b).expect("resume");
    assert_eq!(core.hardware_mut().take(), (7, 0, 7 + 1));
}

#[test]
fn i16_a_wrap_adds_a_read_and_a_reset_and_an_armed_pmi_a_read() {
    let mut core = core("intel:v5:8+4:48");
    let mut g = guest(&mut core, 1, Policy::Strict, 8, 4, 1, 0);
    write(&mut core, &mut g, 0x4C1, (1 << 48) - 10);
    core.load(&mut g).expect("load");
    core.resume(&mut g).expect("resume");
    core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
    core.hardware_mut().take();
    core.put(&mut g).expect("put");
    assert_eq!(core.hardware_mut().take(), (1, 1, 1 + 1 + 2));
    assert_eq!(g.image().get(0x38E), Some(1));
    assert!(!g.pmi_raised(), "INT is not set");

    write(&mut core, &mut g, 0x390, 1);
    write(&mut core, &mut g, 0x186, 0x53_00C0);
    write(&mut core, &mut g, 0x4C1, (1 << 48) - 10);
    core.load(&mut g).expect("load");
    core.resume(&mut g).expect("resume");
    core.hardware_mut().take();
    core.pause(&mut g).expect("pause");
    assert_eq!(core.hardware_mut().take(), (0, 1, 1), "armed, no overflow");
    core.resume(&mut g).expect("resume");
    core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
    core.hardware_mut().take();
    core.pause(&mut g).expect("pause");
    assert_eq!(core.hardware_mut().take(), (0, 1, 2), "armed, overflow: the status is reset");
    assert!(g.pmi_raised());
    assert!(g.judge_pmi(false));
    assert_eq!((g.pmis(), g.in_service()), (1, true));
    core.put(&mut g).expect("put");
    assert_eq!(core.hardware_mut().take(), (1, 0, 2), "the pause read the status");
}
