//! KVM's vPMU against the recording fake, and what can be shown on the KVM of this machine.

mod detection;
mod lists;
mod real;
mod restore;
mod save;

use pmu::registers::{
    AMD_SEL_RESERVED, CAP_PERF_METRICS, IA32_FIXED_CTR_CTRL, MSR_PERF_METRICS, Reg, SEL_ANY, decode,
};
use pmu::{Image, Shape, Vendor};

use super::fake::FakeKvm;
use super::{KvmPmu, check, list};

/// One shape of each flavour, gaps and PERF_METRICS included.
fn shapes() -> Vec<Shape> {
    let texts = [
        "intel:v1:2+0:40",
        "intel:v2:4+0:48",
        "intel:v2:4+3:48+40",
        "intel:v5:8+4:48",
        "intel:v5:0xb5+0xb:48",
        "amd:v0:4:48",
        "amd:v1:6:48",
        "amd:v2:6:48",
    ];
    let mut shapes: Vec<Shape> = texts.iter().map(|text| text.parse().expect(text)).collect();
    shapes.push(metrics());
    shapes
}

/// Ice Lake: four fixed counters and PERF_METRICS.
fn metrics() -> Shape {
    let mut shape: Shape = "intel:v5:8+4:48".parse().expect("shape");
    shape.perf_capabilities |= CAP_PERF_METRICS;
    shape
}

/// A sequence of words that look random (splitmix64).
fn words(mut seed: u64) -> impl FnMut() -> u64 {
    move || {
        seed = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = seed;
        z = (z ^ z >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ z >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ z >> 31
    }
}

/// An image whose registers hold anything that they can.
fn image(shape: Shape, seed: u64) -> Image {
    let mut next = words(seed);
    let registers = list::expected(&shape)
        .into_iter()
        .map(|msr| {
            let mask = match decode(shape.vendor, shape.version, msr) {
                Some(Reg::GpCounter(_) | Reg::GpCounterLegacy(_)) => shape.gp_mask(),
                Some(Reg::GpSelector(_)) if shape.vendor == Vendor::Intel => 0xFFFF_FFFF & !SEL_ANY,
                Some(Reg::GpSelector(_)) => !AMD_SEL_RESERVED,
                Some(Reg::FixedCounter(_)) => shape.fixed_mask(),
                Some(Reg::FixedControl) => shape.fixed_control_bits(),
                Some(Reg::Status) => check::status_bits(&shape),
                Some(Reg::Control) => shape.counter_bits() | list::metrics_bits(&shape),
                _ => u64::MAX,
            };
            (msr, next() & mask)
        })
        .collect();
    Image { shape, registers, in_service: false, pmi_pending: false, pmis: 0 }
}

fn open(fake: &mut FakeKvm) -> KvmPmu {
    KvmPmu::new(fake.shape, fake).expect("listed")
}

/// All registers of a fake as an image lists them.
fn contents(fake: &FakeKvm) -> Vec<(u32, u64)> {
    fake.values.iter().map(|(msr, value)| (*msr, *value)).collect()
}

#[test]
fn images_of_the_tests_are_ones() {
    for shape in shapes() {
        let image = image(shape, 7);
        check::values(&image).expect("fits");
        check::belongs(&image, &shape, &list::expected(&shape)).expect("belongs");
        assert_eq!(image.get(MSR_PERF_METRICS).is_some(), shape == metrics());
        assert_eq!(image.get(IA32_FIXED_CTR_CTRL).is_some(), shape.fixed != 0);
    }
}
