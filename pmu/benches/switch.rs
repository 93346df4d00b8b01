//! What a switch costs: `cargo bench -p pmu --bench switch`.
//!
//! 1. The table of reference section 3.4: accesses of the seed patch (RFC patch 23), of the merged kernel (Linux 7.0), of
//!    ours as counted on the model, and the lower bound. The two foreign sequences are written from the reference as
//!    ordered access lists, for counting only. A cell of ours that is not the bound ends the run with an error.
//! 2. Two guests in turn on one core.
//! 3. Our own cost on a back end that does nothing, as a ratio to a bare loop of the same accesses.
#![forbid(unsafe_code)]
#![allow(missing_docs)]

use std::hint::black_box;
use std::time::Instant;

use pmu::{
    Core, CpuMode, EventFilter, Events, GuestAccess, GuestId, GuestPmu, Hardware, HwError, ModelPmu, Policy,
    Shape, Vendor,
};

/// RDPMC, RDMSR, WRMSR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
struct Count(u32, u32, u32);

impl Count {
    fn sum(self) -> u32 {
        self.0 + self.1 + self.2
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(&format!("{}/{}/{}={}", self.0, self.1, self.2, self.sum()))
    }
}

/// One access of a foreign sequence.
#[derive(Debug, Clone, Copy)]
enum Access {
    Rdpmc,
    Rdmsr,
    Wrmsr,
}
use Access::{Rdmsr, Rdpmc, Wrmsr};

fn count(list: &[Access]) -> Count {
    list.iter().fold(Count::default(), |mut c, a| {
        match a {
            Rdpmc => c.0 += 1,
            Rdmsr => c.1 += 1,
            Wrmsr => c.2 += 1,
        }
        c
    })
}

/// A configuration: exposed counters, and how many of them are in use (selector and value not 0).
#[derive(Debug, Clone, Copy)]
struct Use {
    gp: u32,
    fixed: u32,
    k: u32,
    f: u32,
}

/// RFC patch 23, restore (reference section 2.2): hardware clean, status 0.
fn rfc_load(u: Use) -> Vec<Access> {
    let mut a = vec![Wrmsr, Rdmsr, Wrmsr]; // K = 0; status; STATUS_SET
    (0..u.gp).for_each(|_| a.extend([Wrmsr, Wrmsr])); // value, selector
    a.push(Wrmsr); // fixed control
    (0..u.fixed).for_each(|_| a.push(Wrmsr));
    a
}

/// RFC patch 23, save (reference section 2.1).
fn rfc_put(u: Use) -> Vec<Access> {
    let mut a = vec![Rdmsr];
    for i in 0..u.gp {
        a.extend([Rdpmc, Rdmsr]);
        if i < u.k {
            a.extend([Wrmsr, Wrmsr]);
        }
    }
    a.push(Rdmsr);
    if u.f > 0 {
        a.push(Wrmsr);
    }
    for i in 0..u.fixed {
        a.push(Rdpmc);
        if i < u.f {
            a.push(Wrmsr);
        }
    }
    a
}

/// Linux 7.0, load (reference section 2.3).
fn upstream_load(vendor: Vendor, u: Use) -> Vec<Access> {
    let mut a = vec![Wrmsr]; // K = 0
    for i in 0..u.gp {
        a.push(Rdpmc);
        if i < u.k {
            a.push(Wrmsr);
        }
        a.push(Wrmsr); // selector, unconditionally
    }
    for i in 0..u.fixed {
        a.push(Rdpmc);
        if i < u.f {
            a.push(Wrmsr);
        }
    }
    a.push(Rdmsr); // status
    match vendor {
        Vendor::Intel => a.push(Wrmsr),          // fixed control; K comes with VM-entry
        Vendor::Amd => a.extend([Wrmsr, Wrmsr]), // STATUS_SET unconditionally; K last
    }
    a
}

/// Linux 7.0, put (reference section 2.3).
fn upstream_put(vendor: Vendor, u: Use) -> Vec<Access> {
    let mut a = match vendor {
        Vendor::Intel => vec![Rdmsr],
        Vendor::Amd => vec![Rdmsr, Wrmsr, Rdmsr], // K read after the exit, K = 0, status
    };
    if u.f > 0 {
        a.push(Wrmsr);
    }
    for i in 0..u.gp {
        a.push(Rdpmc);
        if i < u.k {
            a.extend([Wrmsr, Wrmsr]);
        }
    }
    for i in 0..u.fixed {
        a.push(Rdpmc);
        if i < u.f {
            a.push(Wrmsr);
        }
    }
    a
}

/// The scrub bound (reference section 3.4).
fn bound(u: Use) -> (Count, Count) {
    let writes = 2 * u.k + u.f + u32::from(u.f > 0) + u32::from(u.k + u.f > 0);
    (Count(0, 0, writes), Count(u.k + u.f, 0, writes))
}

struct Counting {
    model: ModelPmu,
    count: Count,
}

impl Hardware for Counting {
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.count.1 += 1;
        self.model.rdmsr(msr)
    }
    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.count.2 += 1;
        self.model.wrmsr(msr, value)
    }
    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.count.0 += 1;
        self.model.rdpmc(index)
    }
}

/// A back end that does nothing but fold its operands, so that no access can be optimised away.
struct Nothing(u64);

impl Hardware for Nothing {
    #[inline]
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.0 ^= u64::from(msr);
        Ok(0)
    }
    #[inline]
    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.0 = self.0.wrapping_add(value ^ u64::from(msr));
        Ok(())
    }
    #[inline]
    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.0 ^= u64::from(index);
        Ok(1 << 21)
    }
}

fn guest<H: Hardware>(core: &mut Core<H>, id: u64, policy: Policy, u: Use) -> GuestPmu {
    let shape = core.host().guest(u.gp, u.fixed).expect("the host has these counters");
    let mut g = GuestPmu::new(GuestId(id), shape, policy, EventFilter::allow_all());
    let mut write = |msr, value| assert_eq!(core.guest_wrmsr(&mut g, msr, value), Ok(GuestAccess::Done));
    for i in 0..u.k {
        write(shape.counter_msr(i), 0x10_0000 + id + u64::from(i));
        write(shape.selector_msr(i), 0x43_00C0);
    }
    for i in 0..u.f {
        write(shape.fixed_msr(i), 0x20_0000 + id + u64::from(i));
    }
    if u.f > 0 {
        write(pmu::registers::IA32_FIXED_CTR_CTRL, 0x3333 & ((1 << (4 * u.f)) - 1));
    }
    write(shape.control_msr(), ((1 << u.k) - 1) | ((1 << u.f) - 1) << 32);
    g
}

const EVENTS: Events = Events { cycles: 900, instructions: 1000, ref_cycles: 300, slots: 4000, branches: 0 };

/// Load + resume and pause + put, in the steady state.
fn ours(host: Shape, policy: Policy, u: Use) -> (Count, Count) {
    let mut core = Core::new(Counting { model: ModelPmu::new(host), count: Count::default() }, host);
    core.clean().expect("clean start");
    let mut g = guest(&mut core, 1, policy, u);
    let mut out = (Count::default(), Count::default());
    for _ in 0..3 {
        core.hardware_mut().count = Count::default();
        core.load(&mut g).and_then(|()| core.resume(&mut g)).expect("load");
        out.0 = std::mem::take(&mut core.hardware_mut().count);
        core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
        core.put(&mut g).expect("put");
        out.1 = std::mem::take(&mut core.hardware_mut().count);
    }
    out
}

fn table() -> bool {
    let mut all_at_bound = true;
    println!("Accesses a switch, RDPMC/RDMSR/WRMSR=sum. Hardware clean at load, no overflow pending.\n");
    println!(
        "{:<12} {:<8} | {:>12} {:>14} | {:>12} {:>12} | {:>10} {:>12} | {:>10} {:>12} | {:>4} {:>4}",
        "host",
        "in use",
        "RFC load",
        "put",
        "7.0 load",
        "put",
        "ours load",
        "put",
        "bound load",
        "put",
        "lazy",
        "owner"
    );
    for (name, text, gp, fixed) in [
        ("8 GP + 3", "intel:v5:8+4:48", 8, 3),
        ("8 GP + 4", "intel:v5:8+4:48", 8, 4),
        ("AMD 6", "amd:v2:6:48", 6, 0),
    ] {
        let host: Shape = text.parse().expect("shape");
        for (k, f) in [(0, 0), (1, 0), (4, 0), (4, 3), (gp, fixed)] {
            if f > fixed {
                continue;
            }
            let u = Use { gp, fixed, k, f };
            let (strict, lazy, want) = (ours(host, Policy::Strict, u), ours(host, Policy::Lazy, u), bound(u));
            let owner = 2 * u32::from(k + f > 0);
            let ok = strict == want && lazy.0.sum() + lazy.1.sum() == owner;
            all_at_bound &= ok;
            let rfc = |c: Vec<Access>| {
                if host.vendor == Vendor::Intel { count(&c).to_string() } else { "n/a".into() }
            };
            println!(
                "{name:<12} {:<8} | {:>12} {:>14} | {:>12} {:>12} | {:>10} {:>12} | {:>10} {:>12} | {:>4} {:>4}{}",
                format!("{k}+{f}"),
                rfc(rfc_load(u)),
                rfc(rfc_put(u)),
                count(&upstream_load(host.vendor, u)),
                count(&upstream_put(host.vendor, u)),
                strict.0,
                strict.1,
                want.0,
                want.1,
                lazy.0.sum() + lazy.1.sum(),
                owner,
                if ok { "" } else { "  NOT AT THE BOUND" }
            );
        }
    }
    all_at_bound
}

/// Two lazy guests with the same counters and selectors: reads, values and two control writes (section 3.4, note 4).
fn in_turn() -> bool {
    let host: Shape = "intel:v5:8+4:48".parse().expect("shape");
    println!(
        "\nTwo lazy guests in turn on one core, 8 GP + 4 host, equal selectors, a switch from one to the other:"
    );
    let mut all = true;
    for (k, f) in [(1, 0), (4, 0), (4, 3), (8, 4)] {
        let u = Use { gp: 8, fixed: 4, k, f };
        let mut core = Core::new(Counting { model: ModelPmu::new(host), count: Count::default() }, host);
        let mut guests = [guest(&mut core, 1, Policy::Lazy, u), guest(&mut core, 1000, Policy::Lazy, u)];
        let mut last = Count::default();
        for round in 0..6 {
            let g = &mut guests[round % 2];
            core.hardware_mut().count = Count::default();
            core.load(g).and_then(|()| core.resume(g)).expect("load");
            core.hardware_mut().model.feed(&EVENTS, CpuMode::Guest);
            core.put(g).expect("put");
            last = core.hardware_mut().count;
        }
        let want = Count(k + f, 0, k + f + 2);
        all &= last == want;
        println!(
            "  {k}+{f}: ours {last}, bound {want}{}",
            if last == want { "" } else { "  NOT AT THE BOUND" }
        );
    }
    all
}

fn median_ns(mut run: impl FnMut()) -> f64 {
    const ROUNDS: u32 = 200_000;
    let mut samples: Vec<f64> = (0..11)
        .map(|_| {
            let begin = Instant::now();
            for _ in 0..ROUNDS {
                run();
            }
            begin.elapsed().as_nanos() as f64 / f64::from(ROUNDS)
        })
        .collect();
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}

fn own_cost() {
    let host: Shape = "intel:v5:8+4:48".parse().expect("shape");
    println!("\nOwn cost on a back end that does nothing, median of 11, nanoseconds:");
    for (k, f) in [(0, 0), (8, 4)] {
        let u = Use { gp: 8, fixed: 4, k, f };
        let mut core = Core::new(Nothing(0), host);
        core.clean().expect("clean");
        let mut g = guest(&mut core, 1, Policy::Strict, u);
        let (load, put) = bound(u);
        let mut hw = Nothing(0);
        let bare = median_ns(|| {
            for i in 0..load.2 {
                black_box(hw.wrmsr(black_box(i), u64::from(i))).ok();
            }
            for i in 0..put.0 {
                black_box(hw.rdpmc(black_box(i))).ok();
            }
            for i in 0..put.2 {
                black_box(hw.wrmsr(black_box(i), 0)).ok();
            }
        });
        black_box(hw.0);
        let mut switch = || {
            let (core, g) = (black_box(&mut core), black_box(&mut g));
            let done = core.load(g).is_ok() && core.resume(g).is_ok() && core.put(g).is_ok();
            assert!(done, "a back end that does nothing does not fail");
        };
        let ours = median_ns(&mut switch);
        // What an idle guest costs whose caller, as the vCPU thread does, resumes only if something is live.
        let mut idle = || {
            let (core, g) = (black_box(&mut core), black_box(&mut g));
            let done = core.load(g).is_ok() && core.put(g).is_ok();
            assert!(done, "a back end that does nothing does not fail");
        };
        let load_put = median_ns(&mut idle);
        println!(
            "  {k}+{f} in use: load, resume, put {ours:.1}; load, put {load_put:.1}; the bare accesses {bare:.1}, ratio {:.2}",
            ours / bare.max(0.1)
        );
    }
}

fn main() {
    let (table, turns) = (table(), in_turn());
    own_cost();
    if !(table && turns) {
        eprintln!("a cell is not at the bound");
        std::process::exit(1);
    }
}
