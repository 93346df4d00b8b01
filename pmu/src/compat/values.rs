//! C4 and C9: what every register of an image holds, against what the guest's and the target's registers can hold.

use super::Mismatch;
use crate::image::Image;
use crate::registers::{
    AMD_SEL_RESERVED, Reg, SEL_ANY, STATUS_COND_CHGD, STATUS_CTR_FRZ, STATUS_LBR_FRZ, STATUS_OVF_BUF, decode,
    register_name,
};
use crate::shape::{Shape, Vendor};

/// The GP selectors of an image with their counter's index.
pub(super) fn selectors(image: &Image) -> impl Iterator<Item = (u32, u64)> + '_ {
    image.registers.iter().filter_map(|&(msr, value)| {
        match decode(image.shape.vendor, image.shape.version, msr) {
            Some(Reg::GpSelector(i)) => Some((i, value)),
            _ => None,
        }
    })
}

/// The 4-bit fields of fixed control with their counter's index.
pub(super) fn fixed_fields(image: &Image) -> impl Iterator<Item = (u32, u64)> + '_ {
    let control = image.registers.iter().find_map(|&(msr, value)| {
        (decode(image.shape.vendor, image.shape.version, msr) == Some(Reg::FixedControl)).then_some(value)
    });
    let fixed = image.shape.fixed;
    control.into_iter().flat_map(move |value| {
        (0..16u32).filter(move |i| fixed >> i & 1 == 1).map(move |i| (i, value >> (4 * i) & 0xF))
    })
}

/// Checks every register.
pub(super) fn check(image: &Image, target: &Shape, status_set: bool, found: &mut Vec<Mismatch>) {
    let guest = &image.shape;
    let limit = if guest.vendor == target.vendor { common(guest, target) } else { *guest };
    let remedy = "choose a target with the source's PMU, or restore with the policy best_effort or reset";
    let mut previous = None;
    for &(msr, value) in &image.registers {
        let name = || register_name(msr, guest.vendor);
        if previous.is_some_and(|before| before >= msr) {
            let message = format!("register {} is out of order or present twice", name());
            found.push(Mismatch::refusal("C4", message, "take the image from the source again"));
        }
        previous = Some(msr);
        let reg = decode(guest.vendor, guest.version, msr);
        let (guest_mask, mask) = (mask(guest, reg), mask(&limit, reg));
        let (Some(guest_mask), Some(mask)) = (guest_mask, mask) else {
            let message = format!("register {} ({msr:#x}) is no state of a PMU of shape {guest}", name());
            found.push(Mismatch::refusal("C4", message, remedy));
            continue;
        };
        let lost = value & !(guest_mask & mask);
        if lost == 0 {
            // It fits.
        } else if reg == Some(Reg::Status) && value & !guest_mask == 0 {
            let message =
                format!("{} holds {value:#x}; the target cannot hold {lost:#x}, which is masked", name());
            found.push(Mismatch::warning(
                "C4",
                message,
                "none: overflows that the guest has not read yet are lost for these bits",
            ));
        } else {
            let whose =
                if value & !guest_mask == 0 { "the target's register" } else { "the guest's register" };
            found.push(Mismatch::refusal(
                "C4",
                format!("{} holds {value:#x}: {whose} cannot hold {lost:#x}", name()),
                remedy,
            ));
        }
        if reg == Some(Reg::Status) && value != 0 && !status_set {
            let message = format!(
                "{} holds {value:#x}, and the target has no way to set status bits (below v4)",
                name()
            );
            found.push(Mismatch::refusal(
                "C9",
                message,
                "choose a target of version 4 or later, or one that keeps the status in software",
            ));
        }
    }
}

/// What both have.
pub(super) fn common(guest: &Shape, target: &Shape) -> Shape {
    Shape {
        version: guest.version.min(target.version),
        gp: guest.gp & target.gp,
        fixed: guest.fixed & target.fixed,
        gp_width: guest.gp_width.min(target.gp_width),
        fixed_width: guest.fixed_width.min(target.fixed_width),
        ..*guest
    }
}

/// The bits that a register of this shape can hold; 0 for a counter it does not have, `None` if it is no saved state.
pub(super) fn mask(shape: &Shape, reg: Option<Reg>) -> Option<u64> {
    let if_gp = |i, bits| Some(if shape.has_gp(i) { bits } else { 0 });
    match reg? {
        Reg::GpCounterLegacy(i) => if_gp(i, shape.gp_mask()),
        Reg::GpCounter(i) if shape.vendor == Vendor::Amd => if_gp(i, shape.gp_mask()),
        Reg::GpSelector(i) => if_gp(
            i,
            match shape.vendor {
                Vendor::Intel => 0xFFFF_FFFF & !SEL_ANY,
                Vendor::Amd => !AMD_SEL_RESERVED,
            },
        ),
        Reg::FixedCounter(i) => Some(if shape.has_fixed(i) { shape.fixed_mask() } else { 0 }),
        Reg::FixedControl => Some(shape.fixed_control_bits()),
        Reg::Control => Some(if shape.has_global() { shape.counter_bits() } else { 0 }),
        Reg::Status => Some(status_mask(shape)),
        _ => None,
    }
}

fn status_mask(shape: &Shape) -> u64 {
    match shape.vendor {
        _ if !shape.has_global() => 0,
        Vendor::Amd => shape.counter_bits(),
        Vendor::Intel => {
            let freeze = if shape.version >= 4 { STATUS_LBR_FRZ | STATUS_CTR_FRZ } else { 0 };
            shape.counter_bits() | STATUS_OVF_BUF | STATUS_COND_CHGD | freeze
        }
    }
}
