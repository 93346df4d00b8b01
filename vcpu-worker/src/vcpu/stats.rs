//! Figures of one vCPU thread, written by it and read by anyone without stopping it.

use std::sync::atomic::{AtomicU64, Ordering};

/// Counters that only grow. Each has one writer, so a plain load and store is enough and keeps the run loop free of
/// locked instructions.
#[derive(Debug, Default)]
pub struct Stats {
    exits: AtomicU64,
    pmu_msr_exits: AtomicU64,
    pmis: AtomicU64,
    guest_ns: AtomicU64,
}

/// What they were at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Snapshot {
    /// Times that running the guest returned.
    pub exits: u64,
    /// PMU register accesses that were trapped.
    pub pmu_msr_exits: u64,
    /// PMIs injected by this thread.
    pub pmis: u64,
    /// CPU time of the thread in the guest, in nanoseconds: exact while something counts, otherwise the run loop's
    /// own time is included and the figure is brought up to date at each kick.
    pub guest_ns: u64,
}

impl Stats {
    pub(super) fn exit(&self) {
        add(&self.exits, 1);
    }

    pub(super) fn pmu_msr(&self) {
        add(&self.pmu_msr_exits, 1);
    }

    pub(super) fn set_pmis(&self, n: u64) {
        self.pmis.store(n, Ordering::Relaxed);
    }

    pub(super) fn guest_ns(&self, ns: u64) {
        add(&self.guest_ns, ns);
    }

    /// Reads all of them, each by itself.
    pub fn snapshot(&self) -> Snapshot {
        Snapshot {
            exits: self.exits.load(Ordering::Relaxed),
            pmu_msr_exits: self.pmu_msr_exits.load(Ordering::Relaxed),
            pmis: self.pmis.load(Ordering::Relaxed),
            guest_ns: self.guest_ns.load(Ordering::Relaxed),
        }
    }
}

fn add(to: &AtomicU64, n: u64) {
    to.store(to.load(Ordering::Relaxed).wrapping_add(n), Ordering::Relaxed);
}
