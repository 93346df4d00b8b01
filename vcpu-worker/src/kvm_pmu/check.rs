//! Whether an image is one of this guest's, before anything is written.

use pmu::image::MAX_REGISTERS;
use pmu::registers::{IA32_FIXED_CTR_CTRL, MSR_PERF_METRICS, Reg, SEL_INT, decode};
use pmu::registers::{STATUS_COND_CHGD, STATUS_CTR_FRZ, STATUS_LBR_FRZ, STATUS_OVF_BUF};
use pmu::{Image, Shape, Vendor, register_name};

use super::error::KvmPmuError;
use super::list;

/// Bits that the guest's overflow status can hold: what KVM's mask lets a host write.
pub(super) fn status_bits(shape: &Shape) -> u64 {
    let bits = shape.counter_bits() | list::metrics_bits(shape);
    match shape.vendor {
        Vendor::Intel if shape.version >= 4 => {
            bits | STATUS_LBR_FRZ | STATUS_CTR_FRZ | STATUS_OVF_BUF | STATUS_COND_CHGD
        }
        Vendor::Intel => bits | STATUS_OVF_BUF | STATUS_COND_CHGD,
        Vendor::Amd => bits,
    }
}

/// The image with its status masked to what the guest's can hold, and the bits that were masked (reference section 6.4, item 3).
pub(super) fn mask_status(image: &Image) -> (Image, u64) {
    let mut masked = image.clone();
    let (msr, allowed) = (image.shape.status_msr(), status_bits(&image.shape));
    let mut lost = 0;
    for register in masked.registers.iter_mut().filter(|r| image.shape.has_global() && r.0 == msr) {
        lost = register.1 & !allowed;
        register.1 &= allowed;
    }
    (masked, lost)
}

/// Every value fits its register; the status may hold anything. PERF_METRICS, which [`Image::validate`] does not know, fits always.
pub(super) fn values(image: &Image) -> Result<(), KvmPmuError> {
    let mut known = mask_status(image).0;
    let metrics = list::metrics_bits(&image.shape);
    let (status, control) = (image.shape.status_msr(), image.shape.control_msr());
    known.registers.retain(|r| metrics == 0 || r.0 != MSR_PERF_METRICS);
    for register in known.registers.iter_mut().filter(|r| r.0 == status || r.0 == control) {
        register.1 &= !metrics;
    }
    Ok(known.validate()?)
}

/// The image is of this shape and holds exactly its registers. [`values`] alone would let two names of one counter pass.
pub(super) fn belongs(image: &Image, shape: &Shape, expected: &[u32]) -> Result<(), KvmPmuError> {
    if image.shape != *shape {
        let show = |s: &Shape| format!("{s} with PERF_CAPABILITIES {:#x}", s.perf_capabilities);
        return Err(KvmPmuError::ShapeDiffers { image: show(&image.shape), guest: show(shape) });
    }
    let held: Vec<u32> = image.registers.iter().map(|r| r.0).collect();
    let missing = names(expected.iter().filter(|msr| !held.contains(msr)).copied(), shape.vendor);
    let extra = names(held.iter().filter(|msr| !expected.contains(msr)).copied(), shape.vendor);
    if missing.is_empty() && extra.is_empty() {
        Ok(())
    } else {
        Err(KvmPmuError::Registers { missing, extra })
    }
}

/// Status bits that are set and whose counter has its PMI enabled.
pub(super) fn armed_overflows(image: &Image) -> u64 {
    let shape = &image.shape;
    let mut armed = 0;
    for &(msr, value) in &image.registers {
        if let Some(Reg::GpSelector(i)) = decode(shape.vendor, shape.version, msr)
            && value & SEL_INT != 0
        {
            armed |= 1 << (i & 31);
        }
        if msr == IA32_FIXED_CTR_CTRL {
            armed |= (0..8).filter(|i| value >> (4 * i) & 8 != 0).fold(0, |all, i| all | 1u64 << (32 + i));
        }
    }
    armed & if shape.has_global() { image.get(shape.status_msr()).unwrap_or(0) } else { 0 }
}

/// Names and numbers for people, at most 64 of them; the number tells aliases apart.
pub(super) fn names(msrs: impl Iterator<Item = u32>, vendor: Vendor) -> String {
    let shown = msrs.take(MAX_REGISTERS).map(|msr| format!("{} ({msr:#x})", register_name(msr, vendor)));
    shown.collect::<Vec<_>>().join(", ")
}
