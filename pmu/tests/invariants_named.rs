//! One test an invariant of the reference (section 4), its id in its name: the plain case of each. The same statements
//! are checked after every step of random schedules in `invariants.rs` (I-4, I-10, I-15, I-19, I-22 to I-24 are there
//! only), counts (I-16) in `counts.rs`, the pinned core (I-17) beside the msr device, and the order of a restore into
//! KVM's own vPMU (I-20) in `vcpu-worker/src/kvm_pmu`.
#![allow(clippy::pedantic, clippy::manual_is_multiple_of)]

mod support;

use pmu::registers::{SEL_EN, STATUS_CTR_FRZ};
use pmu::{
    Core, CpuMode, EventFilter, Events, FilterSpec, GuestAccess, GuestId, GuestPmu, Policy, Shape, Vendor,
};
use support::reference::Reference;
use support::rig::{Rig, all_registers};
use support::world::{Op, World};

const HOSTS: [&str; 7] = [
    "intel:v5:8+4:48",
    "intel:v4:4+3:48",
    "intel:v2:2+3:40",
    "intel:v1:2+0:40",
    "amd:v2:6:48",
    "amd:v1:6:48",
    "amd:v0:4:48",
];
const EVENTS: Events = Events { cycles: 900, instructions: 1000, ref_cycles: 300, slots: 40, branches: 0 };

fn shapes() -> impl Iterator<Item = (Shape, u64)> {
    HOSTS.iter().map(|text| {
        let shape: Shape = text.parse().expect("shape");
        (shape, if shape.vendor == Vendor::Intel { 0x43_003C } else { 0x43_0076 })
    })
}

/// A host's leftovers in every register.
fn dirty_host(world: &mut World, host: &Shape) {
    for msr in all_registers(host) {
        world.step(Op::HostSet(msr, 0x43_00C0)).expect("host");
    }
}

fn program(world: &mut World, g: usize, host: &Shape, cycles: u64) {
    for op in [
        Op::Write(g, host.selector_msr(0), cycles),
        Op::Write(g, host.counter_msr(0), 77),
        Op::Write(g, host.control_msr(), host.counter_bits() & 1),
    ] {
        // Without a global control its number faults, in the reference too.
        world.step(op).expect("programmed");
    }
}

#[test]
fn i01_after_a_strict_put_no_register_holds_anything() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Strict)], &[], None);
        dirty_host(&mut world, &host);
        program(&mut world, 0, &host, cycles);
        for op in [Op::Load(0), Op::Resume(0), Op::Count(EVENTS), Op::Put(0)] {
            world.step(op).unwrap_or_else(|e| panic!("{host}: {e}"));
        }
        for msr in all_registers(&host) {
            assert_eq!(world.core_mut().hardware().model.raw(msr), Some(0), "{host} {msr:#x}");
        }
    }
}

#[test]
fn i02_a_lazy_guest_is_quiet_and_the_next_owner_consumes_its_record() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Lazy), (1, 0, Policy::Strict)], &[], None);
        program(&mut world, 0, &host, cycles);
        for op in [
            Op::Load(0),
            Op::Resume(0),
            Op::Count(EVENTS),
            Op::Put(0),
            Op::Count(EVENTS),
            Op::Load(1),
            Op::Put(1),
        ] {
            world.step(op).unwrap_or_else(|e| panic!("{host}: {e}"));
        }
        world.step(Op::Read(0, host.counter_msr(0))).unwrap_or_else(|e| panic!("{host}: {e}"));
        assert_eq!(world.trace(0), [Some(977)], "{host}");
    }
}

#[test]
fn i03_i05_nothing_of_the_host_is_visible_and_unexposed_counters_are_zero() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Strict)], &[], None);
        dirty_host(&mut world, &host);
        program(&mut world, 0, &host, cycles);
        world.step(Op::Load(0)).unwrap_or_else(|e| panic!("{host}: {e}"));
        for i in (1..16).filter(|&i| host.has_gp(i)) {
            let model = &world.core_mut().hardware().model;
            assert_eq!(model.raw(host.counter_msr(i)), Some(0), "{host} counter {i}");
            assert_eq!(model.raw(host.selector_msr(i)), Some(0), "{host} selector {i}");
        }
        world.step(Op::Rdpmc(0, 1)).expect("faults, as for the reference");
        assert_eq!(world.trace(0), [None]);
    }
}

#[test]
fn i06_no_register_is_written_while_what_it_concerns_is_enabled() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Strict), (1, 0, Policy::Lazy)], &[], None);
        dirty_host(&mut world, &host);
        for g in [0, 1] {
            program(&mut world, g, &host, cycles);
            for op in [
                Op::Load(g),
                Op::Resume(g),
                Op::Count(EVENTS),
                Op::Write(g, host.counter_msr(0), 5),
                Op::Write(g, host.selector_msr(0), cycles | 1 << 20),
                Op::Write(g, host.status_reset_msr(), 1),
                Op::Put(g),
            ] {
                world.step(op).unwrap_or_else(|e| panic!("{host}: {e}"));
            }
        }
        assert_eq!(world.core_mut().hardware().unquiesced, []);
    }
}

#[test]
fn i07_a_stale_freeze_bit_never_reaches_the_next_owner() {
    let host: Shape = "intel:v4:4+3:48".parse().expect("shape");
    let mut world = World::new(host, &[(1, 0, Policy::Strict)], &[], None);
    world.step(Op::HostSet(0x38E, STATUS_CTR_FRZ)).expect("host");
    program(&mut world, 0, &host, 0x43_003C);
    for op in [Op::Load(0), Op::Resume(0), Op::Count(EVENTS), Op::Read(0, 0xC1), Op::Read(0, 0x38E)] {
        world.step(op).expect("holds");
    }
    assert_eq!(world.trace(0), [Some(977), Some(0)], "it counts, and sees no freeze");
}

#[test]
fn i08_i09_every_overflow_is_seen_once_and_interrupts_once() {
    for (host, cycles) in shapes() {
        let mut core = Core::new(Rig::new(host), host);
        let mut g = GuestPmu::new(
            GuestId(1),
            host.guest(1, 0).expect("one"),
            Policy::Strict,
            EventFilter::allow_all(),
        );
        let write = |core: &mut Core<Rig>, g: &mut GuestPmu, msr, value| {
            core.guest_wrmsr(g, msr, value).expect("write");
        };
        write(&mut core, &mut g, host.selector_msr(0), cycles | 1 << 20);
        if host.has_global() {
            write(&mut core, &mut g, host.control_msr(), 1);
        }
        let mut wraps = 0;
        for _ in 0..200 {
            core.load(&mut g).expect("load");
            core.resume(&mut g).expect("resume");
            let step = Events { cycles: 1 << 30, ..Events::default() };
            let before = core.hardware().model.raw(host.counter_msr(0)).expect("counter");
            core.hardware_mut().model.feed(&step, CpuMode::Guest);
            let after = core.hardware().model.raw(host.counter_msr(0)).expect("counter");
            core.put(&mut g).expect("put");
            let wrapped = after < before;
            assert_eq!(g.pmi_raised(), wrapped, "{host}");
            if wrapped {
                wraps += 1;
                assert!(g.judge_pmi(false));
                if host.has_global() {
                    assert_eq!(g.image().get(host.status_msr()), Some(1), "{host}");
                    write(&mut core, &mut g, host.status_reset_msr(), 1);
                }
                assert!(!g.in_service());
                // Near the top again, so that the next feed wraps.
                write(&mut core, &mut g, host.counter_write_msr(0), host.gp_mask() - 5);
            } else if wraps == 0 {
                write(&mut core, &mut g, host.counter_write_msr(0), host.gp_mask() - 5);
            }
        }
        assert_eq!(g.pmis(), wraps);
        assert!(wraps > 100, "{host}: {wraps}");
    }
}

#[test]
fn i11_the_image_is_the_old_one_until_a_put_has_read_everything() {
    for (host, cycles) in shapes() {
        let mut core = Core::new(Rig::new(host), host);
        let mut g = GuestPmu::new(
            GuestId(1),
            host.guest(2, 0).expect("two"),
            Policy::Strict,
            EventFilter::allow_all(),
        );
        for i in [0, 1] {
            core.guest_wrmsr(&mut g, host.selector_msr(i), cycles).expect("write");
        }
        core.load(&mut g).expect("load");
        core.resume(&mut g).expect("resume");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        let old = g.image();
        // The second counter's read fails: the first one's value must not show.
        let next = core.hardware().count;
        core.hardware_mut().fail_at = Some(next + if host.has_global() { 2 } else { 3 });
        core.put(&mut g).expect_err("the injected failure");
        assert_eq!(g.image(), old, "{host}");
        core.put(&mut g).expect("retry");
        assert_eq!(g.image().get(host.counter_msr(0)), Some(900), "{host}");
        assert_eq!(g.image().get(host.counter_msr(1)), Some(900), "{host}");
    }
}

#[test]
fn i12_what_a_guest_reads_is_the_same_loaded_resident_or_neither() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Lazy), (1, 0, Policy::Strict)], &[], None);
        program(&mut world, 0, &host, cycles);
        let read = [Op::Read(0, host.counter_msr(0)), Op::Rdpmc(0, 0), Op::Read(0, host.status_msr())];
        let mut script = vec![Op::Load(0), Op::Resume(0), Op::Count(EVENTS)];
        script.extend(read);
        script.push(Op::Put(0));
        script.extend(read);
        script.extend([Op::Load(1), Op::Put(1)]);
        script.extend(read);
        for op in script {
            world.step(op).unwrap_or_else(|e| panic!("{host}: {e}"));
        }
        let trace = world.trace(0);
        assert_eq!((&trace[..3], &trace[..3]), (&trace[3..6], &trace[6..9]), "{host}");
    }
}

/// Every PMU register of both vendors and a few others, with values at every edge, against the reference, for guests
/// that have fewer counters than their host.
#[test]
fn i13_faults_and_silent_drops_follow_the_guests_cpuid() {
    let values = [
        0,
        1,
        0xFFFF_FFFF,
        1 << 31,
        1 << 32,
        1 << 39,
        1 << 47,
        1 << 48,
        1 << 59,
        1 << 62,
        u64::MAX,
        1 << 21,
        0x43_00C0,
        4,
        0xB,
        0xB0,
    ];
    let mut msrs: Vec<u32> = pmu::PMU_MSR_RANGES.iter().flat_map(|&(first, n)| first..first + n).collect();
    msrs.extend([0x10, 0x1D9, 0x122, 0xCB, 0x190]);
    for (host, _) in shapes() {
        for (gp, fixed) in [(0, 0), (1, 0), (host.gp_count(), host.fixed_count())] {
            let shape = host.guest(gp, fixed).expect("subset");
            for fw in [true, false] {
                let shape =
                    Shape { perf_capabilities: if fw { shape.perf_capabilities } else { 0 }, ..shape };
                let mut core = Core::new(Rig::new(host), host);
                let mut g = GuestPmu::new(GuestId(1), shape, Policy::Strict, EventFilter::allow_all());
                let mut reference = Reference::new(shape, &[]);
                for &msr in &msrs {
                    for value in values {
                        let got = core.guest_wrmsr(&mut g, msr, value).expect("no hardware");
                        let want =
                            reference.wrmsr(msr, value).map_or(GuestAccess::Fault, |()| GuestAccess::Done);
                        assert_eq!(got, want, "{shape} WRMSR {msr:#x} {value:#x}");
                        let got = core.guest_rdmsr(&mut g, msr).expect("no hardware");
                        let want = reference.rdmsr(msr).map_or(GuestAccess::Fault, GuestAccess::Value);
                        assert_eq!(got, want, "{shape} RDMSR {msr:#x} after {value:#x}");
                    }
                }
            }
        }
    }
}

#[test]
fn i14_a_load_writes_exactly_the_value_that_was_saved() {
    for (host, cycles) in shapes().filter(|(h, _)| h.vendor == Vendor::Amd || h.has_full_width_writes()) {
        for value in [0x8000_0000, 0xFFFF_FFFF, 1 << (host.gp_width - 1), host.gp_mask()] {
            let mut core = Core::new(Rig::new(host), host);
            let mut g = GuestPmu::new(
                GuestId(1),
                host.guest(1, 0).expect("one"),
                Policy::Strict,
                EventFilter::allow_all(),
            );
            core.guest_wrmsr(&mut g, host.counter_write_msr(0), value).expect("write");
            core.guest_wrmsr(&mut g, host.selector_msr(0), cycles).expect("write");
            core.load(&mut g).expect("load");
            assert_eq!(core.hardware().model.raw(host.counter_msr(0)), Some(value), "{host} {value:#x}");
        }
    }
}

#[test]
fn i18_a_denied_selector_is_never_enabled_in_hardware_and_reads_back() {
    for (host, cycles) in shapes() {
        let mut core = Core::new(Rig::new(host), host);
        let spec = FilterSpec { action: 1, events: vec![cycles & 0xFFFF], ..FilterSpec::default() };
        let filter = EventFilter::new(host.vendor, spec).expect("filter");
        let mut g = GuestPmu::new(GuestId(1), host.guest(1, 0).expect("one"), Policy::Strict, filter);
        core.load(&mut g).expect("load");
        core.resume(&mut g).expect("resume");
        core.guest_wrmsr(&mut g, host.selector_msr(0), cycles).expect("write");
        assert_eq!(core.hardware().model.raw(host.selector_msr(0)).expect("selector") & SEL_EN, 0, "{host}");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        assert_eq!(core.guest_rdmsr(&mut g, host.selector_msr(0)), Ok(GuestAccess::Value(cycles)), "{host}");
        assert_eq!(core.guest_rdmsr(&mut g, host.counter_msr(0)), Ok(GuestAccess::Value(0)), "{host}");
    }
}

/// A guest whose DEBUGCTL freezes on a PMI: v4 sets CTR_Frz, before v4 the guest's control is cleared; what its handler
/// writes to the frozen counter stays, and clearing the freeze lets it count on.
#[test]
fn i07_freeze_on_pmi_in_both_generations() {
    for (text, frozen) in [("intel:v4:4+3:48", true), ("intel:v3:4+3:48", false)] {
        let host: Shape = text.parse().expect("shape");
        let mut core = Core::new(Rig::new(host), host);
        let mut g = GuestPmu::new(
            GuestId(1),
            host.guest(1, 0).expect("one"),
            Policy::Strict,
            EventFilter::allow_all(),
        );
        g.set_freeze_on_pmi(true);
        let write = |core: &mut Core<Rig>, g: &mut GuestPmu, msr, value| {
            assert_eq!(core.guest_wrmsr(g, msr, value), Ok(GuestAccess::Done), "{text} {msr:#x}");
        };
        write(&mut core, &mut g, 0x186, 0x53_00C0);
        write(&mut core, &mut g, 0x4C1, host.gp_mask() - 99);
        write(&mut core, &mut g, 0x38F, 1);
        core.load(&mut g).expect("load");
        core.resume(&mut g).expect("resume");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        core.pause(&mut g).expect("pause");
        assert!(g.judge_pmi(false));
        assert!(!g.any_live(), "{text}: frozen");
        let status = core.guest_rdmsr(&mut g, 0x38E).expect("read");
        let control = core.guest_rdmsr(&mut g, 0x38F).expect("read");
        let want_status = if frozen { 1 | 3 << 58 } else { 1 };
        assert_eq!(
            (status, control),
            (GuestAccess::Value(want_status), GuestAccess::Value(u64::from(frozen))),
            "{text}"
        );
        // The handler: a new period, status cleared, control on again.
        write(&mut core, &mut g, 0x4C1, 5000);
        core.resume(&mut g).expect("resume");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        core.pause(&mut g).expect("pause");
        assert_eq!(core.guest_rdmsr(&mut g, 0xC1), Ok(GuestAccess::Value(5000)), "{text}: still frozen");
        write(&mut core, &mut g, 0x390, if frozen { 1 | 3 << 58 } else { 1 });
        write(&mut core, &mut g, 0x38F, 1);
        assert!(!g.in_service());
        core.resume(&mut g).expect("resume");
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        core.put(&mut g).expect("put");
        assert_eq!(g.image().get(0xC1), Some(6000), "{text}");
    }
}

/// A release of an idle guest beside a resident one takes nothing from the resident.
#[test]
fn i04_a_release_reads_the_resident_first() {
    for (host, cycles) in shapes() {
        let mut world = World::new(host, &[(1, 0, Policy::Lazy), (1, 0, Policy::Lazy)], &[], None);
        program(&mut world, 0, &host, cycles);
        for op in [Op::Load(0), Op::Resume(0), Op::Count(EVENTS), Op::Put(0), Op::Load(1), Op::Release(1)] {
            world.step(op).unwrap_or_else(|e| panic!("{host}: {e}"));
        }
        world.step(Op::Read(0, host.counter_msr(0))).unwrap_or_else(|e| panic!("{host}: {e}"));
        assert_eq!(world.trace(0), [Some(977)], "{host}");
    }
}

/// After an access fails under a running guest, the next one that succeeds lets it count on.
#[test]
fn i10_a_running_guest_counts_on_after_a_failed_trap() {
    for (host, cycles) in shapes() {
        for write in [false, true] {
            let mut core = Core::new(Rig::new(host), host);
            let mut g = GuestPmu::new(
                GuestId(1),
                host.guest(1, 0).expect("one"),
                Policy::Strict,
                EventFilter::allow_all(),
            );
            core.guest_wrmsr(&mut g, host.selector_msr(0), cycles).expect("write");
            core.load(&mut g).expect("load");
            core.resume(&mut g).expect("resume");
            core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
            let access = |core: &mut Core<Rig>, g: &mut GuestPmu| {
                if write {
                    core.guest_wrmsr(g, host.counter_msr(0), 900).map(|_| ())
                } else {
                    core.guest_rdmsr(g, host.counter_msr(0))
                        .map(|value| assert_eq!(value, GuestAccess::Value(900)))
                }
            };
            let next = core.hardware().count;
            core.hardware_mut().fail_at = Some(next);
            access(&mut core, &mut g).expect_err("the injected failure");
            access(&mut core, &mut g).expect("retry");
            core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
            core.put(&mut g).expect("put");
            assert_eq!(g.image().get(host.counter_msr(0)), Some(1800), "{host} write={write}");
        }
    }
}
