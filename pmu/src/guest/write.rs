//! What a guest may access: validation against the *guest's* shape (I-13), by switch.md section 7 and the fault matrix
//! of reference section 1.8. Pure: it says what an access means and changes nothing.

use super::regs::Regs;
use crate::registers::{
    AMD_SEL_RESERVED, IA32_PERFEVTSEL0, IA32_PMC0, Reg, STATUS_COND_CHGD, STATUS_CTR_FRZ, STATUS_LBR_FRZ,
    STATUS_OVF_BUF, decode,
};
use crate::shape::{Shape, Vendor};

/// What a guest's write means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Write {
    /// #GP.
    Fault,
    /// Silently dropped.
    Drop,
    /// General-purpose counter.
    Gp(u32, u64),
    /// Fixed counter.
    Fixed(u32, u64),
    /// Event select.
    Selector(u32, u64),
    /// Fixed control.
    FixedControl(u64),
    /// Global control.
    Control(u64),
    /// Clears status bits.
    StatusReset(u64),
    /// Sets status bits; never raises a PMI.
    StatusSet(u64),
}

/// What a guest's read means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Read {
    /// #GP.
    Fault,
    /// A value that needs no hardware.
    Value(u64),
    /// General-purpose counter.
    Gp(u32),
    /// Fixed counter.
    Fixed(u32),
    /// Overflow status: image or hardware.
    Status,
}

/// Bits that an event select of this guest can hold.
pub(crate) const fn selector_bits(shape: &Shape) -> u64 {
    match shape.vendor {
        // 63:32 and AnyThread are reserved.
        Vendor::Intel => 0xFFDF_FFFF,
        Vendor::Amd => !AMD_SEL_RESERVED,
    }
}

/// Bits that the status ports of this guest take (switch.md section 7), which are those its status can hold.
pub(crate) const fn status_bits(shape: &Shape) -> u64 {
    match shape.vendor {
        Vendor::Intel => {
            let freeze = if shape.version >= 4 { STATUS_LBR_FRZ | STATUS_CTR_FRZ } else { 0 };
            shape.counter_bits() | freeze | STATUS_OVF_BUF | STATUS_COND_CHGD
        }
        Vendor::Amd => shape.counter_bits(),
    }
}

/// The P6 registers that KVM lets any guest write into nothing.
fn dropped_when_absent(shape: &Shape, msr: u32) -> bool {
    matches!(msr.wrapping_sub(IA32_PMC0), 0 | 1)
        || matches!(msr.wrapping_sub(IA32_PERFEVTSEL0), 0 | 1)
        || (shape.gp == 0 && shape.vendor == Vendor::Amd && (0xC001_0000..=0xC001_0007).contains(&msr))
}

/// Which registers the shape has at all; counters that do not exist are absent.
fn present(shape: &Shape, reg: Reg) -> bool {
    match reg {
        Reg::GpCounterLegacy(i) | Reg::GpSelector(i) => shape.has_gp(i),
        Reg::GpCounter(i) => {
            shape.has_gp(i) && (shape.vendor == Vendor::Amd || shape.has_full_width_writes())
        }
        Reg::FixedCounter(i) => shape.has_fixed(i),
        Reg::FixedControl | Reg::Status | Reg::Control | Reg::StatusReset => shape.has_global(),
        Reg::StatusSet => shape.has_global() && (shape.vendor == Vendor::Amd || shape.version >= 4),
        Reg::InUse => shape.version >= 4,
        Reg::Capabilities => shape.version > 0,
        Reg::Unsupported => false,
    }
}

/// Classifies a WRMSR.
pub(crate) fn classify_write(shape: &Shape, msr: u32, value: u64) -> Write {
    let Some(reg) = decode(shape.vendor, shape.version, msr).filter(|&r| present(shape, r)) else {
        return if dropped_when_absent(shape, msr) { Write::Drop } else { Write::Fault };
    };
    match shape.vendor {
        Vendor::Intel => intel_write(shape, reg, value),
        Vendor::Amd => amd_write(shape, reg, value),
    }
}

fn intel_write(shape: &Shape, reg: Reg, value: u64) -> Write {
    let only = |mask: u64, write: Write| if value & !mask == 0 { write } else { Write::Fault };
    match reg {
        // Sign-extension of bit 31; EDX is ignored (SDM, IA32_PMCx).
        Reg::GpCounterLegacy(i) => {
            Write::Gp(i, i64::from((value as u32).cast_signed()) as u64 & shape.gp_mask())
        }
        Reg::GpCounter(i) => only(shape.gp_mask(), Write::Gp(i, value)),
        Reg::GpSelector(i) => only(selector_bits(shape), Write::Selector(i, value)),
        Reg::FixedCounter(i) => only(shape.fixed_mask(), Write::Fixed(i, value)),
        Reg::FixedControl => only(shape.fixed_control_bits(), Write::FixedControl(value)),
        Reg::Control => only(shape.counter_bits(), Write::Control(value)),
        Reg::StatusReset => only(status_bits(shape), Write::StatusReset(value)),
        Reg::StatusSet => only(status_bits(shape), Write::StatusSet(value)),
        Reg::Status | Reg::InUse | Reg::Capabilities | Reg::Unsupported => Write::Fault,
    }
}

/// AMD drops what Intel faults.
fn amd_write(shape: &Shape, reg: Reg, value: u64) -> Write {
    match reg {
        Reg::GpCounter(i) | Reg::GpCounterLegacy(i) => Write::Gp(i, value & shape.gp_mask()),
        Reg::GpSelector(i) => Write::Selector(i, value & selector_bits(shape)),
        Reg::Control => Write::Control(value & shape.counter_bits()),
        Reg::StatusReset => Write::StatusReset(value & status_bits(shape)),
        Reg::StatusSet => Write::StatusSet(value & status_bits(shape)),
        Reg::Status => Write::Drop,
        Reg::FixedCounter(_) | Reg::FixedControl | Reg::InUse | Reg::Capabilities | Reg::Unsupported => {
            Write::Fault
        }
    }
}

/// Classifies a RDMSR.
pub(crate) fn classify_read(shape: &Shape, regs: &Regs, msr: u32) -> Read {
    let Some(reg) = decode(shape.vendor, shape.version, msr).filter(|&r| present(shape, r)) else {
        return if dropped_when_absent(shape, msr) { Read::Value(0) } else { Read::Fault };
    };
    match reg {
        Reg::GpCounterLegacy(i) | Reg::GpCounter(i) => Read::Gp(i),
        Reg::FixedCounter(i) => Read::Fixed(i),
        Reg::GpSelector(i) => Read::Value(regs.sel[i as usize]),
        Reg::FixedControl => Read::Value(regs.fixed_ctrl),
        Reg::Control => Read::Value(regs.global),
        Reg::Status => Read::Status,
        Reg::StatusReset | Reg::StatusSet => Read::Value(0),
        Reg::InUse => Read::Value(in_use(shape, regs)),
        Reg::Capabilities => Read::Value(shape.perf_capabilities),
        Reg::Unsupported => Read::Fault,
    }
}

/// Classifies a RDPMC (reference section 1.3).
pub(crate) fn classify_rdpmc(shape: &Shape, index: u32) -> Read {
    match (shape.vendor, index >> 30) {
        (_, 0) if shape.has_gp(index) => Read::Gp(index),
        (Vendor::Intel, 1) if shape.has_fixed(index & !(1 << 30)) => Read::Fixed(index & !(1 << 30)),
        _ => Read::Fault,
    }
}

/// IA32_PERF_GLOBAL_INUSE: bit i = event byte is not 0, 32+i = fixed field enables, 63 = some PMI enable is set.
fn in_use(shape: &Shape, regs: &Regs) -> u64 {
    let mut out = 0;
    for i in super::regs::bits(shape.gp) {
        let sel = regs.sel[i as usize];
        out |= u64::from(sel & 0xFF != 0) << i | u64::from(sel & crate::registers::SEL_INT != 0) << 63;
    }
    for i in super::regs::bits(shape.fixed) {
        let field = regs.fixed_ctrl >> (4 * i) & 0xF;
        out |= u64::from(field & 3 != 0) << (32 + i) | u64::from(field & 8 != 0) << 63;
    }
    out
}
