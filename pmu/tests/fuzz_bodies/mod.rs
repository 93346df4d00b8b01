//! Bodies of the fuzz targets: what outside bytes may reach. The same functions run under libFuzzer (`pmu/fuzz`) and, on
//! stable, as property tests (`fuzz_bodies.rs`).
#![allow(dead_code, unreachable_pub)]

use pmu::cpuid::{Capabilities, CpuidLeaves, GuestLeaves, Leaf};
use pmu::{
    EventFilter, GuestId, GuestPmu, Image, ImportOutcome, Policy, RestorePolicy, Shape, Vendor, counters,
};

/// Takes integers off a byte string; zeros once it is used up.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn u8(&mut self) -> u8 {
        let (first, rest) = self.0.split_first().map_or((0, &[][..]), |(f, r)| (*f, r));
        self.0 = rest;
        first
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes([self.u8(), self.u8(), self.u8(), self.u8()])
    }

    fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }
}

/// Registers that a hostile image names most of the time, so that values are reached and not only numbers.
const NUMBERS: [u32; 16] = [
    0xC1,
    0xC2,
    0xC8,
    0x186,
    0x187,
    0x18D,
    0x309,
    0x30C,
    0x38D,
    0x38E,
    0x38F,
    0xC001_0200,
    0xC001_0201,
    0xC000_0300,
    0xC000_0301,
    0xC001_0004,
];

/// An image from outside is validated and imported into guests of several shapes under every policy: no panic; a
/// rejected one changes nothing; an applied one reads back as it was.
pub fn image_import(data: &[u8]) {
    let mut b = Bytes(data);
    let (vendor, version) = (if b.u8() & 1 == 0 { Vendor::Intel } else { Vendor::Amd }, b.u8() % 8);
    let mut shape = Shape {
        vendor,
        version,
        gp: b.u64(),
        fixed: b.u64(),
        gp_width: b.u8(),
        fixed_width: b.u8(),
        perf_capabilities: b.u64(),
    };
    if b.u8() & 3 != 0 {
        // Mostly a shape that can be.
        (shape.gp, shape.fixed) =
            (shape.gp & 0xFF, if vendor == Vendor::Intel { shape.fixed & 0xF } else { 0 });
        (shape.version, shape.gp_width, shape.fixed_width) =
            (version % 3 + 2 * u8::from(vendor == Vendor::Intel), 48, 48);
    }
    let flags = b.u8();
    let mut registers = Vec::new();
    while !b.0.is_empty() && registers.len() < 80 {
        let msr = if b.u8() & 7 == 0 { b.u32() } else { NUMBERS[usize::from(b.u8() & 15)] };
        let value = b.u64() >> (b.u8() & 63);
        registers.push((msr, value));
    }
    if flags & 4 == 0 {
        registers.sort_unstable();
        registers.dedup_by_key(|r| r.0);
    }
    let image = Image {
        shape,
        registers,
        in_service: flags & 1 != 0,
        pmi_pending: flags & 2 != 0,
        pmis: u64::from(flags),
    };
    let _digest = image.digest();
    let valid = image.validate();
    if shape.validate().is_ok() {
        let _views = counters(&image);
    }
    for own in ["intel:v5:8+4:48", "intel:v2:2+3:40", "intel:v1:2+0:40", "amd:v2:6:48", "amd:v0:4:48"] {
        let own: Shape = own.parse().expect("a constant");
        for policy in [RestorePolicy::Require, RestorePolicy::BestEffort, RestorePolicy::Reset] {
            let mut guest = GuestPmu::new(GuestId(1), own, Policy::Strict, EventFilter::allow_all());
            let before = guest.image();
            match guest.import(&image, policy) {
                ImportOutcome::Rejected { .. } => {
                    assert_eq!(guest.image(), before, "a rejected image changes nothing")
                }
                ImportOutcome::NotApplicable { .. } => assert!(guest.image().is_reset()),
                ImportOutcome::Applied { dropped } => {
                    assert!(valid.is_ok(), "an invalid image was applied: {valid:?}");
                    assert!(policy == RestorePolicy::BestEffort || dropped.is_empty());
                    let now = guest.image();
                    now.validate().expect("what a guest holds is valid");
                    for (msr, value) in &image.registers {
                        assert!(dropped.contains(msr) || now.get(*msr) == Some(*value), "{msr:#x}");
                    }
                }
            }
        }
    }
}

/// CPUID of a described host: no panic, and a shape that comes out is valid and survives the way to a guest's leaves.
pub fn cpuid(data: &[u8]) {
    let mut b = Bytes(data);
    let mut leaf = || Leaf { eax: b.u32(), ebx: b.u32(), ecx: b.u32(), edx: b.u32() };
    let mut leaves = CpuidLeaves {
        vendor: leaf(),
        features: leaf(),
        extended_features: leaf(),
        perfmon: leaf(),
        perfmon_ext: leaf(),
        perfmon_ext_counters: leaf(),
        amd_features: leaf(),
        amd_perfmon: leaf(),
        perf_capabilities: 0,
    };
    leaves.perf_capabilities = b.u64();
    let genuine = match b.u8() & 3 {
        0 => None,
        1 => Some(*b"AuthenticAMD"),
        _ => Some(*b"GenuineIntel"),
    };
    if let Some(name) = genuine {
        let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
        (leaves.vendor.ebx, leaves.vendor.edx, leaves.vendor.ecx) = (word(0), word(4), word(8));
    }
    if let Ok(capabilities) = Capabilities::from_cpuid(&leaves) {
        capabilities.shape.validate().expect("a shape from CPUID is valid");
        let _leaves = GuestLeaves::of(&capabilities.shape, capabilities.arch_events);
    }
}
