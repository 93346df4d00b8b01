//! Which registers of a given PMU the probe programs, with what, and how it checks them. Pure: a PMU and a period in,
//! tables out; the assembly and the simulated guest only walk them.
//!
//! Roles of the general-purpose counters, in ascending order of their numbers: with three or more the last is parked
//! (programmed but disabled), the one before it takes overflows, all others count; with two the last takes overflows;
//! a single one takes overflows. Counting ones alternate between instructions and core cycles.

use super::config::ProbePmu;
use super::layout::{self, CHECK_EQUAL, CHECK_MONOTONIC, CHECK_OVERFLOW, CHECK_RDPMC};

/// Counters used at most, of those that the PMU has.
const MAX_GP: usize = 24;
const MAX_FIXED: usize = 8;
/// What the parked counter holds: below 2^31, so that no write sign-extends it.
pub(super) const PARKED: u64 = 0x1234_5678;

const USR: u64 = 1 << 16;
const OS: u64 = 1 << 17;
const INT: u64 = 1 << 20;
const EN: u64 = 1 << 22;
const INSTRUCTIONS: u64 = 0xc0;
/// SDM table 20-1: unhalted core cycles.
const CYCLES_INTEL: u64 = 0x3c;
/// PPR: cycles not in halt.
const CYCLES_AMD: u64 = 0x76;
const FIXED_CTR_CTRL: u32 = 0x38d;
const FIXED_CTR0: u32 = 0x309;

/// One register write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Programmed {
    /// MSR.
    pub msr: u32,
    /// Value.
    pub value: u64,
}

/// One check of the guest's own view.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// MSR, or RDPMC index.
    pub msr: u32,
    /// `CHECK_*` of [`layout`].
    pub kind: u32,
    /// Expected value, or 64 less the counter's width.
    pub operand: u64,
    /// Where the last value is kept.
    pub slot: u64,
    /// Fault code.
    pub fault: u64,
}

/// Everything that depends on the PMU.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Writes in order.
    pub setup: Vec<Programmed>,
    /// Checks in order.
    pub checks: Vec<Check>,
    /// Overflow status register; 0 without one.
    pub status_msr: u32,
    /// Register that clears overflow status.
    pub clear_msr: u32,
    /// The overflow counter's bit there.
    pub status_bit: u32,
    /// The overflow counter; 0 without one.
    pub overflow_msr: u32,
    /// Value from which it overflows after the period.
    pub preset: u64,
    /// MSR of RDPMC index 0.
    pub rdpmc_gp: u32,
    /// Step from one RDPMC index to the next.
    pub rdpmc_stride: u32,
    /// What to add to a fixed counter's RDPMC index for its MSR.
    pub rdpmc_fixed: u32,
}

/// MSR numbers of a PMU.
struct Numbers {
    selector: u32,
    counter: u32,
    stride: u32,
    status: u32,
    clear: u32,
    control: u32,
}

fn numbers(pmu: &ProbePmu) -> Numbers {
    match (pmu.amd, pmu.version) {
        (false, 0 | 1) => {
            Numbers { selector: 0x186, counter: 0xc1, stride: 1, status: 0, clear: 0, control: 0 }
        }
        (false, _) => {
            Numbers { selector: 0x186, counter: 0xc1, stride: 1, status: 0x38e, clear: 0x390, control: 0x38f }
        }
        (true, 0) => Numbers {
            selector: 0xc001_0000,
            counter: 0xc001_0004,
            stride: 1,
            status: 0,
            clear: 0,
            control: 0,
        },
        (true, 1) => Numbers {
            selector: 0xc001_0200,
            counter: 0xc001_0201,
            stride: 2,
            status: 0,
            clear: 0,
            control: 0,
        },
        (true, _) => Numbers {
            selector: 0xc001_0200,
            counter: 0xc001_0201,
            stride: 2,
            status: 0xc000_0300,
            clear: 0xc000_0302,
            control: 0xc000_0301,
        },
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    Counting,
    Overflow,
    Parked,
}

fn role(place: usize, of: usize) -> Role {
    if of >= 3 && place == of - 1 {
        Role::Parked
    } else if place == if of >= 3 { of - 2 } else { of - 1 } {
        Role::Overflow
    } else {
        Role::Counting
    }
}

fn bits(map: u64, below: u32, most: usize) -> Vec<u32> {
    (0..below).filter(|i| map >> i & 1 == 1).take(most).collect()
}

/// Makes the plan for a PMU and an overflow period that `ProbeConfig::validate` has accepted.
pub(super) fn plan(pmu: &ProbePmu, period: u64) -> Plan {
    let n = numbers(pmu);
    let gp = bits(pmu.gp, 32, MAX_GP);
    let fixed = if pmu.amd || pmu.version < 2 { Vec::new() } else { bits(pmu.fixed, 16, MAX_FIXED) };
    let mask = (1u64 << pmu.gp_width) - 1;
    let gp_shift = 64 - u64::from(pmu.gp_width);
    let fixed_shift = 64 - u64::from(pmu.fixed_width);
    let mut p = Plan {
        status_msr: n.status,
        clear_msr: n.clear,
        rdpmc_gp: n.counter,
        rdpmc_stride: n.stride,
        rdpmc_fixed: FIXED_CTR0.wrapping_sub(1 << 30),
        ..Plan::default()
    };
    let mut control = 0u64;
    let mut slots = 0u64;
    if n.control != 0 {
        p.setup.push(Programmed { msr: n.control, value: 0 });
    }
    for (place, &i) in gp.iter().enumerate() {
        let role = role(place, gp.len());
        let (selector, counter) = (n.selector + i * n.stride, n.counter + i * n.stride);
        let cycles = if pmu.amd { CYCLES_AMD } else { CYCLES_INTEL };
        let event = if role == Role::Counting && place % 2 == 1 { cycles } else { INSTRUCTIONS };
        let flags = USR
            | OS
            | match role {
                Role::Counting => EN,
                Role::Overflow => EN | INT,
                Role::Parked => 0,
            };
        control |= 1 << i;
        let equal = |msr, operand, fault| Check { msr, kind: CHECK_EQUAL, operand, slot: 0, fault };
        let (write_to, value) = match role {
            Role::Counting => {
                let check = Check {
                    msr: counter,
                    kind: CHECK_MONOTONIC,
                    operand: gp_shift,
                    slot: slots,
                    fault: layout::FAULT_BACKWARDS,
                };
                p.checks.push(check);
                if slots == 0 {
                    p.checks.push(Check { msr: i, kind: CHECK_RDPMC, ..check });
                }
                slots += 1;
                (counter, 0)
            }
            Role::Overflow => {
                // A write to 0xC1 sign-extends bit 31, so the negative of a period up to 2^31 arrives whole.
                let wide = !pmu.amd && period > 1 << 31;
                let msr = if wide { 0x4c1 + i } else { counter };
                let sign_extends = !pmu.amd && !wide;
                p.status_bit = 1 << i;
                p.overflow_msr = msr;
                p.preset = period.wrapping_neg() & if sign_extends { 0xffff_ffff } else { mask };
                p.checks.push(Check {
                    msr: counter,
                    kind: CHECK_OVERFLOW,
                    operand: gp_shift,
                    slot: 0,
                    fault: layout::FAULT_LOST_PMI,
                });
                (msr, p.preset)
            }
            Role::Parked => {
                p.checks.push(equal(counter, PARKED, layout::FAULT_PARKED));
                (counter, PARKED)
            }
        };
        p.setup.push(Programmed { msr: selector, value: 0 });
        p.setup.push(Programmed { msr: write_to, value });
        p.setup.push(Programmed { msr: selector, value: event | flags });
        p.checks.push(equal(selector, event | flags, layout::FAULT_SELECTOR));
    }
    let mut fixed_control = 0u64;
    for &j in &fixed {
        fixed_control |= 3 << (4 * j);
        control |= 1 << (32 + j);
        p.setup.push(Programmed { msr: FIXED_CTR0 + j, value: 0 });
        p.checks.push(Check {
            msr: FIXED_CTR0 + j,
            kind: CHECK_MONOTONIC,
            operand: fixed_shift,
            slot: slots,
            fault: layout::FAULT_BACKWARDS,
        });
        slots += 1;
    }
    let mut last = |msr, value| {
        p.setup.push(Programmed { msr, value });
        p.checks.push(Check {
            msr,
            kind: CHECK_EQUAL,
            operand: value,
            slot: 0,
            fault: layout::FAULT_CONTROL,
        });
    };
    if !fixed.is_empty() {
        last(FIXED_CTR_CTRL, fixed_control);
    }
    if n.control != 0 {
        last(n.control, control);
    }
    p
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn intel(version: u8, gp: u64, fixed: u64) -> ProbePmu {
        ProbePmu { amd: false, version, gp, fixed, gp_width: 48, fixed_width: 48, full_width_writes: true }
    }

    #[test]
    fn intel_v5_uses_every_counter_and_one_of_each_role() {
        let p = plan(&intel(5, 0xff, 0xf), 50_000_000);
        let value = |msr| p.setup.iter().rev().find(|w| w.msr == msr).map(|w| w.value);
        assert_eq!(value(0x186), Some(0x43_00c0), "instructions");
        assert_eq!(value(0x187), Some(0x43_003c), "cycles");
        assert_eq!(value(0x186 + 6), Some(0x53_00c0), "overflow counter with INT");
        assert_eq!(value(0x186 + 7), Some(0x03_00c0), "parked counter without EN");
        assert_eq!(value(0xc1 + 7), Some(PARKED));
        assert_eq!(value(0x38d), Some(0x3333));
        assert_eq!(value(0x38f), Some(0xf_0000_00ff));
        assert_eq!(p.setup.last().map(|w| w.msr), Some(0x38f), "global control comes last");
        assert_eq!((p.overflow_msr, p.status_bit), (0xc7, 1 << 6));
        assert_eq!((p.preset as u32).cast_signed(), -50_000_000);
        assert_eq!(p.checks.iter().filter(|c| c.kind == CHECK_RDPMC).count(), 1);
    }

    #[test]
    fn amd_and_old_versions_use_their_own_numbers() {
        let mut amd = intel(2, 0x3f, 0);
        amd.amd = true;
        let p = plan(&amd, 1 << 40);
        assert_eq!(
            (p.status_msr, p.clear_msr, p.rdpmc_gp, p.rdpmc_stride),
            (0xc000_0300, 0xc000_0302, 0xc001_0201, 2)
        );
        assert_eq!(p.preset, (1 << 48) - (1 << 40));
        assert!(p.setup.iter().all(|w| w.msr >= 0xc000_0000));
        let v1 = plan(&intel(1, 0x3, 0), 20_000);
        assert_eq!((v1.status_msr, v1.overflow_msr), (0, 0xc2));
        assert!(v1.setup.iter().all(|w| w.msr < 0x300));
    }

    proptest! {
        #[test]
        fn every_plan_fits_its_tables(
            amd: bool, version in 0u8..6, gp: u64, fixed: u64, width in 32u8..=63, period in 10_000u64..(1 << 31),
        ) {
            let pmu = ProbePmu { amd, version, gp, fixed, gp_width: width, fixed_width: width, full_width_writes: false };
            let p = plan(&pmu, period);
            prop_assert!(p.setup.len() <= layout::SETUP_MAX);
            prop_assert!(p.checks.len() <= layout::CHECKS_MAX);
            prop_assert!(p.checks.iter().all(|c| c.slot < layout::CHECKS_MAX as u64));
            prop_assert_eq!(p.overflow_msr == 0, gp.trailing_zeros() >= 32);
        }
    }
}
