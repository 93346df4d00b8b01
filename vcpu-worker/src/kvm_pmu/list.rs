//! Which MSRs are a guest's PMU (reference section 6.1), and in which order they are written (6.2, step 5).
//!
//! | guest | registers |
//! |---|---|
//! | Intel v1 | selectors, counters (0xC1, which host-initiated writes do not sign-extend) |
//! | Intel v2 and later | and global control, status, fixed counters, fixed control; PERF_METRICS if PERF_CAPABILITIES has it |
//! | AMD K7 | C001_0000 to 7 |
//! | AMD PerfCtrExtCore | C001_0200 and up, never the K7 aliases too |
//! | AMD PerfMonV2 | and C000_0300, C000_0301 |
//!
//! Not here: the write-only ports (KVM ignores what a host writes to them), PERF_CAPABILITIES and CPUID (configuration), DEBUGCTL and the
//! LAPIC (they travel with the vCPU's other state). Fixed control of a guest without fixed counters is always 0 and left out.

use pmu::registers::{CAP_PERF_METRICS, IA32_FIXED_CTR_CTRL, MAX_FIXED, MAX_GP, MSR_PERF_METRICS};
use pmu::{Shape, is_pmu_msr};

/// The bit of PERF_METRICS in global control and status.
const METRICS_BIT: u64 = 1 << 48;

/// The guest has PERF_METRICS.
pub(super) const fn has_metrics(shape: &Shape) -> bool {
    shape.has_global() && shape.perf_capabilities & CAP_PERF_METRICS != 0
}

/// Bits of global control and status that PERF_METRICS adds.
pub(super) const fn metrics_bits(shape: &Shape) -> u64 {
    if has_metrics(shape) { METRICS_BIT } else { 0 }
}

fn gp(shape: &Shape) -> impl Iterator<Item = u32> + '_ {
    (0..MAX_GP as u32).filter(|i| shape.has_gp(*i))
}

fn fixed(shape: &Shape) -> impl Iterator<Item = u32> + '_ {
    (0..MAX_FIXED as u32).filter(|i| shape.has_fixed(*i))
}

fn fixed_control(shape: &Shape) -> Option<u32> {
    (shape.has_global() && shape.fixed != 0).then_some(IA32_FIXED_CTR_CTRL)
}

fn when(condition: bool, msr: u32) -> Option<u32> {
    condition.then_some(msr)
}

/// Every register in the order in which it is written, once the PMU is stopped.
fn ordered(shape: &Shape) -> Vec<u32> {
    let global = shape.has_global();
    let mut order: Vec<u32> = fixed(shape).map(|i| shape.fixed_msr(i)).collect();
    order.extend(gp(shape).map(|i| shape.counter_msr(i)));
    order.extend(gp(shape).map(|i| shape.selector_msr(i)));
    // Behind fixed counter 3, whose write resets it.
    order.extend(when(has_metrics(shape), MSR_PERF_METRICS));
    order.extend(when(global, shape.status_msr()));
    order.extend(fixed_control(shape));
    order.extend(when(global, shape.control_msr()));
    order
}

/// Every register of a guest's PMU, ascending.
pub(super) fn expected(shape: &Shape) -> Vec<u32> {
    let mut list = ordered(shape);
    list.sort_unstable();
    list
}

/// Registers that are set to 0 to stop the PMU: global control and fixed control; every selector where there is no global control.
pub(super) fn stop(shape: &Shape) -> Vec<u32> {
    if shape.has_global() {
        std::iter::once(shape.control_msr()).chain(fixed_control(shape)).collect()
    } else {
        gp(shape).map(|i| shape.selector_msr(i)).collect()
    }
}

/// The writes of a restore: stopped first, started by the last one.
pub(super) fn writes(shape: &Shape, value: impl Fn(u32) -> u64) -> Vec<(u32, u64)> {
    let stop = stop(shape).into_iter().map(|msr| (msr, 0));
    stop.chain(ordered(shape).into_iter().map(|msr| (msr, value(msr)))).collect()
}

/// The guest's registers against KVM's list: those that KVM lacks, and PMU registers that it lists and the guest does not have.
pub(super) fn intersect(expected: &[u32], listed: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let missing = expected.iter().copied().filter(|msr| !listed.contains(msr)).collect();
    let skipped = listed.iter().copied().filter(|msr| is_pmu_msr(*msr) && !expected.contains(msr)).collect();
    (missing, skipped)
}
