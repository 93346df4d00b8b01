//! The invariants of the reference, over random guest programs, host states and schedules of several vCPUs and the host
//! on one core, each guest beside a private reference PMU; and exhaustively where the world is small.

#![allow(clippy::pedantic, clippy::manual_is_multiple_of)]

mod support;

use pmu::{Core, CpuMode, EventFilter, Events, GuestAccess, GuestId, GuestPmu, Policy, Shape};
use proptest::prelude::*;
use support::rig::{Mutant, Rig, all_registers};
use support::world::{Op, World};

/// Every flavour, with gaps and narrow counters among them.
const HOSTS: [&str; 12] = [
    "intel:v5:8+4:48",
    "intel:v4:4+3:48",
    "intel:v3:4+3:48",
    "intel:v2:2+3:40",
    "intel:v2:4+3:32",
    "intel:v1:2+0:40",
    "intel:v5:0xb5+0xb:48",
    "intel:v5:8+0:64",
    "amd:v2:6:48",
    "amd:v1:6:48",
    "amd:v0:4:48",
    "intel:v4:8+4:48+40",
];

const EVENT_SELECTS: [u64; 5] = [0x00C0, 0x003C, 0x013C, 0x0076, 0x412E];

fn value(width: u8) -> impl Strategy<Value = u64> {
    let top = u64::MAX >> (64 - width);
    prop_oneof![
        Just(0),
        (0u64..5000).prop_map(move |n| top - n),
        (0u64..5000).prop_map(move |n| top - n),
        Just(0x8000_0000),
        Just(0xFFFF_FFFF),
        Just(1u64 << (width - 1)),
        any::<u64>(),
    ]
}

fn selector() -> impl Strategy<Value = u64> {
    let common = (0usize..EVENT_SELECTS.len(), any::<bool>(), any::<bool>(), 0u64..4).prop_map(
        |(e, en, int, privilege)| {
            EVENT_SELECTS[e] | u64::from(en) << 22 | u64::from(int) << 20 | privilege << 16
        },
    );
    prop_oneof![8 => common, 1 => Just(0), 1 => any::<u64>(), 1 => any::<u32>().prop_map(u64::from)]
}

fn msr(host: Shape) -> impl Strategy<Value = u32> {
    let mut known = all_registers(&host);
    known.extend([
        0x38D, 0x38E, 0x38F, 0x390, 0x391, 0x392, 0x345, 0x4C1, 0x4C2, 0xC1, 0xC2, 0x186, 0x187, 0x329, 0x3F1,
    ]);
    known.extend([
        0xC000_0300,
        0xC000_0301,
        0xC000_0302,
        0xC000_0303,
        0xC001_0000,
        0xC001_0004,
        0xC001_0201,
        0xC001_0202,
    ]);
    prop::sample::select(known)
}

fn written(host: Shape, msr: u32) -> BoxedStrategy<u64> {
    let bits = host.counter_bits();
    match msr {
        0x186..=0x18F | 0xC001_0000..=0xC001_0003 => selector().boxed(),
        0xC001_0200..=0xC001_021F if msr % 2 == 0 => selector().boxed(),
        0x38D => prop_oneof![6 => any::<u64>().prop_map(move |v| v & host.fixed_control_bits()), 1 => any::<u64>()].boxed(),
        0x38F | 0xC000_0301 => prop_oneof![4 => Just(bits), 4 => any::<u64>().prop_map(move |v| v & bits), 1 => any::<u64>()].boxed(),
        0x390 | 0xC000_0302 => prop_oneof![
            4 => Just(bits), 3 => any::<u64>().prop_map(move |v| v & bits), 2 => Just(1 << 59), 1 => any::<u64>()
        ].boxed(),
        0x391 | 0xC000_0303 => prop_oneof![3 => any::<u64>().prop_map(move |v| v & bits), 1 => Just(1 << 59), 1 => any::<u64>()].boxed(),
        0x309..=0x310 => value(host.fixed_width).boxed(),
        _ => value(host.gp_width).boxed(),
    }
}

fn events() -> impl Strategy<Value = Events> {
    (0u64..4000, 0u64..4000, 0u64..4000, 0u64..4000).prop_map(|(cycles, instructions, ref_cycles, slots)| {
        Events { cycles, instructions, ref_cycles, slots, branches: 0 }
    })
}

fn op(host: Shape, guests: usize) -> impl Strategy<Value = Op> {
    let g = 0..guests;
    let write = (g.clone(), msr(host))
        .prop_flat_map(move |(g, m)| written(host, m).prop_map(move |v| Op::Write(g, m, v)));
    prop_oneof![
        5 => g.clone().prop_map(Op::Load),
        5 => g.clone().prop_map(Op::Resume),
        3 => g.clone().prop_map(Op::Pause),
        4 => g.clone().prop_map(Op::Put),
        1 => g.clone().prop_map(Op::Sync),
        1 => g.clone().prop_map(Op::Release),
        12 => write,
        6 => (g.clone(), msr(host)).prop_map(|(g, m)| Op::Read(g, m)),
        2 => (g, prop_oneof![0u32..18, (1u32 << 30)..(1 << 30) + 9, any::<u32>()]).prop_map(|(g, i)| Op::Rdpmc(g, i)),
        6 => events().prop_map(Op::Count),
        1 => (msr(host), any::<u64>()).prop_map(|(m, v)| Op::HostSet(m, v)),
    ]
}

fn policy() -> impl Strategy<Value = Policy> {
    prop_oneof![Just(Policy::Strict), Just(Policy::Lazy)]
}

/// A world and what happens in it: host, guests, whether events are filtered, operations.
type Scenario = (Shape, Vec<(u32, u32, Policy)>, bool, Vec<Op>);

fn scenario(steps: usize) -> impl Strategy<Value = Scenario> {
    prop::sample::select(HOSTS.to_vec()).prop_flat_map(move |text| {
        let host: Shape = text.parse().expect("shape");
        let guest = (0..=host.gp_count(), 0..=host.fixed_count(), policy());
        (Just(host), prop::collection::vec(guest, 1..4), any::<bool>()).prop_flat_map(
            move |(host, guests, filtered)| {
                let n = guests.len();
                (Just(host), Just(guests), Just(filtered), prop::collection::vec(op(host, n), 1..steps))
            },
        )
    })
}

fn denied(filtered: bool) -> &'static [u64] {
    if filtered { &[0x013C] } else { &[] }
}

/// 1,000 random worlds, or as many as `VPMU_PROPTEST_CASES` says.
fn cases() -> u32 {
    std::env::var("VPMU_PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(1000)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: cases(), max_shrink_iters: 4000, failure_persistence: None, ..ProptestConfig::default()
    })]

    /// I-1 to I-9, I-11 to I-14, I-18: everything that `World::step` checks.
    #[test]
    fn i01_to_i14_and_i18_hold_for_every_schedule((host, guests, filtered, ops) in scenario(60)) {
        let mut world = World::new(host, &guests, denied(filtered), None);
        for op in ops {
            if let Err(error) = world.step(op) {
                return Err(TestCaseError::fail(error));
            }
        }
    }

    /// I-4, non-interference: what guest 0 reads does not depend on what its neighbours do with their PMUs.
    #[test]
    fn i04_a_guests_trace_is_independent_of_its_neighbours((host, guests, filtered, ops) in scenario(60)) {
        let run = |quiet_neighbours: bool| {
            let mut world = World::new(host, &guests, denied(filtered), None);
            for &op in &ops {
                let foreign = matches!(op, Op::Write(g, ..) | Op::Read(g, _) | Op::Rdpmc(g, _) if g != 0);
                if !(quiet_neighbours && foreign) {
                    world.step(op).expect("holds");
                }
            }
            world.trace(0).to_vec()
        };
        prop_assert_eq!(run(false), run(true));
    }
}

/// All sequences of six operations from a small alphabet, for two general-purpose counters and a fixed one.
#[test]
fn exhaustive_orders_of_six_operations_for_two_gp_and_one_fixed() {
    let host: Shape = "intel:v4:2+1:48".parse().expect("shape");
    let events = Events { cycles: 3, instructions: 5, ref_cycles: 2, slots: 1, branches: 0 };
    let alphabet = [
        Op::Load(0),
        Op::Resume(0),
        Op::Pause(0),
        Op::Put(0),
        Op::Count(events),
        Op::Write(0, 0x4C1, (1 << 48) - 4),
        Op::Write(0, 0x390, 0x1_0000_0003),
        Op::Read(0, 0x38E),
    ];
    let n = alphabet.len() as u64;
    for policy in [Policy::Strict, Policy::Lazy] {
        for code in 0..n.pow(6) {
            let mut world = World::new(host, &[(2, 1, policy)], &[], None);
            for op in [
                Op::Write(0, 0x38D, 0xB),
                Op::Write(0, 0x38F, 0x1_0000_0003),
                Op::Write(0, 0x187, 0x43_003C),
                Op::Write(0, 0x186, 0x53_00C0),
            ] {
                world.step(op).expect("set-up");
            }
            let mut rest = code;
            for _ in 0..6 {
                let op = alphabet[(rest % n) as usize];
                rest /= n;
                world.step(op).unwrap_or_else(|e| panic!("sequence {code}: {e}"));
            }
        }
    }
}

/// A guest with `k` + `f` counters live, programmed while it is not loaded.
fn programmed(core: &mut Core<Rig>, policy: Policy, k: u32, f: u32) -> GuestPmu {
    let host = *core.host();
    let mut g = GuestPmu::new(
        GuestId(1),
        host.guest(host.gp_count(), host.fixed_count()).expect("all"),
        policy,
        EventFilter::allow_all(),
    );
    let mut write = |msr, value| assert_eq!(core.guest_wrmsr(&mut g, msr, value), Ok(GuestAccess::Done));
    for i in (0..16).filter(|&i| host.has_gp(i)).take(k as usize) {
        write(host.counter_msr(i), 100 + u64::from(i));
        write(host.selector_msr(i), 0x43_00C0);
    }
    let mut fields = 0;
    for i in (0..8).filter(|&i| host.has_fixed(i)).take(f as usize) {
        write(host.fixed_msr(i), 200 + u64::from(i));
        fields |= 3 << (4 * i);
    }
    if f > 0 {
        write(0x38D, fields);
    }
    if host.has_global() {
        write(host.control_msr(), host.counter_bits());
    }
    g
}

/// I-10: every access of load, resume, pause and put, for every shape of the reference's set, fails once. The error names
/// the access, K = 0 was attempted, a failed load changes no image, and a retry ends as if nothing had failed.
#[test]
fn i10_every_failing_access_leaves_the_image_whole_and_a_retry_repairs() {
    let feed = Events { cycles: 10, instructions: 20, ref_cycles: 5, slots: 7, branches: 0 };
    use pmu::HwError::{Fault, Injected, Io};
    // #GP (EIO), EPERM, ENXIO (the core went offline), and whatever else.
    let errors = [Fault, Io(1), Io(6), Injected];
    for (gp, fixed) in [2, 4, 6, 8].into_iter().flat_map(|gp| [0, 3, 4].map(|fixed| (gp, fixed))) {
        for vendor in ["intel:v5", "amd:v2", "amd:v0", "intel:v1"] {
            let intel2 = vendor == "intel:v5";
            if (fixed > 0 && !intel2) || (vendor == "amd:v0" && gp > 4) {
                continue;
            }
            let text = if vendor.starts_with("intel") {
                format!("{vendor}:{gp}+{fixed}:48")
            } else {
                format!("{vendor}:{gp}:48")
            };
            let host: Shape = text.parse().expect("shape");
            for (k, f) in [(0, 0), (1, 0), (gp, 0), (gp, fixed), (1, fixed.min(1))] {
                let cycle = |fail_at: Option<u64>, with: pmu::HwError| -> (pmu::Image, u64, bool) {
                    let mut core = Core::new(Rig::new(host), host);
                    let mut g = programmed(&mut core, Policy::Strict, k, f);
                    core.hardware_mut().fail_at = fail_at;
                    core.hardware_mut().fail_with = with;
                    let mut failed = false;
                    let mut attempt = |core: &mut Core<Rig>,
                                       g: &mut GuestPmu,
                                       step: fn(
                        &mut Core<Rig>,
                        &mut GuestPmu,
                    ) -> Result<(), pmu::SwitchError>| {
                        let before = g.image();
                        let Err(error) = step(core, g) else { return };
                        failed = true;
                        let pmu::SwitchError::Access { quiesced, source, .. } = error else {
                            panic!("{error}")
                        };
                        assert_eq!((quiesced, source), (Ok(()), with));
                        if host.has_global() {
                            assert_eq!(
                                core.hardware().model.raw(host.control_msr()),
                                Some(0),
                                "K is 0 after a failure"
                            );
                        }
                        if core.is_loaded(g) || !core.is_busy() && before == g.image() {
                            step(core, g).expect("a retry succeeds");
                        }
                    };
                    attempt(&mut core, &mut g, |c, g| c.load(g));
                    attempt(&mut core, &mut g, |c, g| c.resume(g));
                    core.hardware_mut().model.feed(&feed, CpuMode::Guest);
                    attempt(&mut core, &mut g, |c, g| c.pause(g));
                    attempt(&mut core, &mut g, |c, g| c.put(g));
                    let total = core.hardware().count;
                    // Whatever the put left behind, the next load scrubs it.
                    core.clean().expect("clean");
                    for msr in all_registers(&host) {
                        assert_eq!(core.hardware().model.raw(msr), Some(0), "{text} {msr:#x}");
                    }
                    (g.image(), total, failed)
                };
                let (whole, accesses, _) = cycle(None, Injected);
                for n in 0..accesses {
                    let (image, _, failed) = cycle(Some(n), errors[n as usize % errors.len()]);
                    assert!(failed, "{text} k={k} f={f}: access {n} exists");
                    assert_eq!(image, whole, "{text} k={k} f={f}: access {n} failed");
                }
            }
        }
    }
}

/// I-15: load;load and put;put are load and put; a round trip without execution changes nothing, and costs nothing when
/// nothing is live.
#[test]
fn i15_load_and_put_are_idempotent() {
    for text in HOSTS {
        let host: Shape = text.parse().expect("shape");
        for policy in [Policy::Strict, Policy::Lazy] {
            for k in [0, 1, host.gp_count()] {
                let mut core = Core::new(Rig::new(host), host);
                core.clean().expect("clean");
                let mut g = programmed(&mut core, policy, k, 0);
                let image = g.image();
                let start = core.hardware().count;
                core.load(&mut g).expect("load");
                let loaded = core.hardware().count;
                core.load(&mut g).expect("load again");
                assert_eq!(core.hardware().count, loaded);
                core.put(&mut g).expect("put");
                let put = core.hardware().count;
                core.put(&mut g).expect("put again");
                assert_eq!(core.hardware().count, put);
                core.sync(&mut g).expect("sync");
                assert_eq!(g.image(), image, "{text}");
                assert!(k > 0 || core.hardware().count == start, "{text}: nothing live, nothing touched");
            }
        }
    }
}

/// I-9 without an overflow status: a wrap that one pause has seen is not seen again by the next. (Found by
/// `i04_a_guests_trace_is_independent_of_its_neighbours`.)
#[test]
fn i09_a_wrap_interrupts_once_without_an_overflow_status() {
    for text in ["intel:v1:2+0:40", "amd:v0:4:48", "amd:v1:6:48"] {
        let host: Shape = text.parse().expect("shape");
        for policy in [Policy::Strict, Policy::Lazy] {
            let mut world = World::new(host, &[(1, 0, policy)], &[], None);
            let wrap = Events { cycles: 0, instructions: 448, ref_cycles: 0, slots: 0, branches: 0 };
            let top = if host.vendor == pmu::Vendor::Intel { 0xFFFF_FFFF } else { host.gp_mask() };
            for op in [
                Op::Write(0, host.selector_msr(0), 0x53_00C0),
                Op::Write(0, host.counter_msr(0), top),
                Op::Load(0),
                Op::Resume(0),
                Op::Count(wrap),
                Op::Pause(0),
                Op::Resume(0),
                Op::Pause(0),
                Op::Resume(0),
                Op::Put(0),
            ] {
                world.step(op).unwrap_or_else(|e| panic!("{text}: {e}"));
            }
        }
    }
}

/// I-23: reset zeroes everything on both vendors; global control becomes the low bits.
#[test]
fn i23_reset_is_the_power_on_state() {
    for text in HOSTS {
        let host: Shape = text.parse().expect("shape");
        let mut core = Core::new(Rig::new(host), host);
        let mut g = programmed(&mut core, Policy::Strict, host.gp_count(), host.fixed_count());
        g.reset();
        assert!(g.image().is_reset(), "{text}");
        if host.has_global() {
            assert_eq!(g.image().get(host.control_msr()), Some(host.gp), "{text}");
        }
        assert!(!g.any_live());
    }
}

/// I-19, I-14, I-22: an image restored on the same shape is indistinguishable; another vendor's is refused by rule C1
/// and nothing changes.
#[test]
fn i19_i22_restore_is_exact_or_refused_whole() {
    use pmu::{ImportOutcome, RestorePolicy};
    for text in HOSTS {
        let host: Shape = text.parse().expect("shape");
        let mut core = Core::new(Rig::new(host), host);
        let g = programmed(&mut core, Policy::Strict, host.gp_count(), host.fixed_count());
        let image = g.image();
        image.validate().expect("valid");
        let mut twin = GuestPmu::new(GuestId(2), *g.shape(), Policy::Strict, EventFilter::allow_all());
        assert_eq!(twin.import(&image, RestorePolicy::Require), ImportOutcome::Applied { dropped: vec![] });
        assert_eq!((twin.image(), twin.image().digest()), (image.clone(), image.digest()));
        let other: Shape =
            if text.starts_with("amd") { "intel:v5:8+4:48" } else { "amd:v2:6:48" }.parse().expect("shape");
        let mut foreign = GuestPmu::new(GuestId(3), other, Policy::Strict, EventFilter::allow_all());
        let before = foreign.image();
        for policy in [RestorePolicy::Require, RestorePolicy::BestEffort] {
            let outcome = foreign.import(&image, policy);
            assert!(matches!(outcome, ImportOutcome::Rejected { rule: "C1", .. }), "{text}: {outcome:?}");
            assert_eq!(foreign.image(), before);
        }
    }
}

/// Two numbers of one counter in an image would depend on their order: only the canonical one is taken. (Found by the
/// fuzz target `image_import`.)
#[test]
fn i19_an_image_with_an_alias_is_rejected() {
    use pmu::{ImportOutcome, RestorePolicy};
    for (text, alias) in [("intel:v5:8+4:48", 0x4C1), ("amd:v2:6:48", 0xC001_0000)] {
        let shape: Shape = text.parse().expect("shape");
        let mut g = GuestPmu::new(GuestId(1), shape, Policy::Strict, EventFilter::allow_all());
        let mut image = g.image();
        image.registers.push((alias, 5));
        image.registers.sort_unstable();
        assert!(
            matches!(g.import(&image, RestorePolicy::Require), ImportOutcome::Rejected { rule: "C4", .. }),
            "{text}"
        );
    }
}

/// I-24, second half: somebody else's write is found, and the core starts clean afterwards.
#[test]
fn i24_an_audit_finds_foreign_writers() {
    let host: Shape = "intel:v5:8+4:48".parse().expect("shape");
    let mut core = Core::new(Rig::new(host), host);
    core.clean().expect("clean");
    assert_eq!(core.audit().expect("audit"), vec![]);
    core.hardware_mut().model.host_set(0x188, 0x43_00C0).expect("host");
    let found = core.audit().expect("audit");
    assert_eq!((found.len(), found[0].msr, found[0].found), (1, 0x188, 0x43_00C0));
    let mut g = programmed(&mut core, Policy::Strict, 1, 0);
    core.load(&mut g).expect("load");
    assert_eq!(core.hardware().model.raw(0x188), Some(0), "the next load starts clean");
}

/// The mutation check: each deliberately wrong switcher is caught by the schedules below, and the right one is not.
#[test]
fn every_mutant_is_caught() {
    let host: Shape = "intel:v4:4+3:48".parse().expect("shape");
    let tick = Op::Count(Events { cycles: 900, instructions: 1000, ref_cycles: 300, slots: 40, branches: 0 });
    let mut script = Vec::new();
    for msr in all_registers(&host) {
        script
            .push(Op::HostSet(msr, if msr == 0x38E { 1 << 59 | 1 } else { 0x43_00C0 & 0x3F_FFFF | 1 << 22 }));
    }
    for g in [0, 1] {
        script.extend([
            Op::Write(g, 0x186, 0x53_00C0),
            Op::Write(g, 0x187, 0x43_003C),
            Op::Write(g, 0x4C1, (1 << 48) - 1500),
            Op::Write(g, 0x4C2, 0xDEAD_BEEF),
            Op::Write(g, 0x309, 77),
            Op::Write(g, 0x38D, 0x3),
            Op::Write(g, 0x38F, 0x1_0000_0001 | (1 + g as u64)),
        ]);
    }
    for round in 0..3 {
        for g in [0, 1] {
            script.extend([
                Op::Load(g),
                Op::Resume(g),
                tick,
                Op::Pause(g),
                Op::Resume(g),
                tick,
                Op::Put(g),
                tick,
            ]);
            script.extend([Op::Read(g, 0xC1), Op::Read(g, 0xC2), Op::Read(g, 0x309), Op::Read(g, 0x38E)]);
            script.extend([Op::Write(g, 0x390, 1), Op::Write(g, 0x4C1, (1 << 48) - 1500 + round)]);
        }
    }
    // Rules 5 and 6 of the design: a failure leaves the PMU quiesced, and no access is made that is not needed.
    let failure_and_count = |mutant| -> Option<String> {
        let mut core = Core::new(Rig::new(host), host);
        core.hardware_mut().mutant = mutant;
        let mut g = programmed(&mut core, Policy::Strict, 2, 1);
        core.load(&mut g).and_then(|()| core.resume(&mut g)).ok()?;
        let before = core.hardware().count;
        core.put(&mut g).ok()?;
        // K, 3 reads, 2 selectors, fixed control, 3 values.
        let accesses = core.hardware().count - before;
        if accesses != 10 {
            return Some(format!("I-16: put made {accesses} accesses, the bound is 10"));
        }
        core.load(&mut g).and_then(|()| core.resume(&mut g)).ok()?;
        core.hardware_mut().fail_at = Some(core.hardware().count);
        core.put(&mut g).err()?;
        let control = core.hardware().model.raw(host.control_msr());
        (control != Some(0)).then(|| format!("I-10: control is {control:x?} after a failure"))
    };
    let caught = |mutant| {
        let mut world = World::new(host, &[(2, 2, Policy::Strict), (2, 1, Policy::Strict)], &[], mutant);
        script.iter().find_map(|&op| world.step(op).err()).or_else(|| failure_and_count(mutant))
    };
    assert_eq!(caught(None), None, "the right switcher passes");
    for mutant in Mutant::ALL {
        let by = caught(Some(mutant));
        println!("{mutant:?}: {}", by.as_deref().unwrap_or("NOT CAUGHT"));
        assert!(by.is_some(), "{mutant:?} is not caught");
    }
}
