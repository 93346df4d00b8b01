//! What the demo found: the object that `--output json` prints. It is filled step by step, so that a demo that breaks off
//! still says how far it came.

use serde::Serialize;
use std::collections::BTreeMap;
use vpmu_client::api::{Migration, VcpuPmu};

/// The result.
#[derive(Debug, Default, Serialize)]
pub(super) struct Report {
    /// `kvm` or `simulated`.
    pub(super) hypervisor: String,
    /// `model`, `msr` or `kvm`: counts in mode `model` are modelled.
    pub(super) pmu_mode: String,
    /// The host's PMU, or its model.
    pub(super) host_pmu: String,
    /// vCPUs of the machine.
    pub(super) vcpus: u32,
    /// Its memory.
    pub(super) memory_mib: u64,
    /// What the migration cost.
    pub(super) migration: Option<MigrationFigures>,
    /// Each counter that counts, of each vCPU.
    pub(super) counters: Vec<CounterLine>,
    /// Overflow interrupts that the guest's handler took, over both hosts.
    pub(super) pmis: u64,
    /// Faults that the guest found in its own view.
    pub(super) guest_faults: u64,
    /// Everything that must hold.
    pub(super) checks: Vec<Check>,
    /// How long the demo took.
    pub(super) seconds: f64,
}

/// What the migration cost.
#[derive(Debug, Serialize)]
pub(super) struct MigrationFigures {
    /// Accepted to released.
    pub(super) total_ms: f64,
    /// vCPUs stopped on the source to running on the destination.
    pub(super) blackout_ms: f64,
    /// The hole as the guest saw it.
    pub(super) guest_gap_ms: Option<f64>,
    /// Bytes over the data connections.
    pub(super) bytes: u64,
    /// Pre-copy rounds.
    pub(super) rounds: u32,
    /// `precopy` or `local`.
    pub(super) mode: String,
    /// `unix` or `tcp`.
    pub(super) transport: String,
}

impl MigrationFigures {
    /// From a migration that succeeded.
    pub(super) fn of(migration: &Migration) -> Option<Self> {
        let result = migration.result.as_ref()?;
        Some(Self {
            total_ms: vpmu_client::view::ms(result.total_us),
            blackout_ms: vpmu_client::view::ms(result.blackout_us),
            guest_gap_ms: result.guest_gap_us.map(vpmu_client::view::ms),
            bytes: result.bytes,
            rounds: result.rounds,
            mode: result.mode.clone(),
            transport: result.transport.clone(),
        })
    }
}

/// One counter at four moments.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct CounterLine {
    /// vCPU index.
    pub(super) vcpu: u32,
    /// `gp0`, `fixed1`.
    pub(super) counter: String,
    /// On the first host, before the migration.
    pub(super) before: u64,
    /// On the first host, when it stopped for good.
    pub(super) at_stop: u64,
    /// On the second host, before it ran.
    pub(super) at_resume: u64,
    /// On the second host, running.
    pub(super) after: u64,
    /// It takes overflows, so it starts again and again.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) pmi: bool,
}

impl CounterLine {
    /// It never went back, where it is not made to.
    pub(super) fn monotonic(&self) -> bool {
        self.pmi || (self.before <= self.at_stop && self.at_resume <= self.after && self.before <= self.after)
    }
}

/// Something that must hold.
#[derive(Debug, Serialize)]
pub(super) struct Check {
    /// Stable name.
    pub(super) name: &'static str,
    /// It holds.
    pub(super) ok: bool,
    /// What was found.
    pub(super) detail: String,
}

impl Report {
    /// Adds a check.
    pub(super) fn check(&mut self, name: &'static str, ok: bool, detail: impl Into<String>) {
        self.checks.push(Check { name, ok, detail: detail.into() });
    }

    /// The first check that does not hold.
    pub(super) fn first_failure(&self) -> Option<&Check> {
        self.checks.iter().find(|check| !check.ok)
    }
}

/// Joins the four readings. Counters that count at any of the moments are listed, in the order of the first reading.
pub(super) fn join(
    before: &[VcpuPmu],
    at_stop: &[VcpuPmu],
    at_resume: &[VcpuPmu],
    after: &[VcpuPmu],
) -> Vec<CounterLine> {
    let (stop, resume, end) = (index(at_stop), index(at_resume), index(after));
    let mut lines = Vec::new();
    for vcpu in before {
        for counter in &vcpu.counters {
            let key = (vcpu.vcpu, counter.name.as_str());
            let moments = [stop.get(&key), resume.get(&key), end.get(&key)];
            let found = moments.map(|moment| moment.copied().unwrap_or_default());
            if !(counter.live || found.iter().any(|at| at.live)) {
                continue;
            }
            let [stop, resume, end] = found;
            lines.push(CounterLine {
                vcpu: vcpu.vcpu,
                counter: counter.name.clone(),
                before: counter.value,
                at_stop: stop.value,
                at_resume: resume.value,
                after: end.value,
                pmi: counter.pmi_enabled || stop.pmi_enabled,
            });
        }
    }
    lines
}

#[derive(Clone, Copy, Default)]
struct At {
    value: u64,
    live: bool,
    pmi_enabled: bool,
}

fn index(vcpus: &[VcpuPmu]) -> BTreeMap<(u32, &str), At> {
    vcpus
        .iter()
        .flat_map(|vcpu| {
            vcpu.counters.iter().map(|counter| {
                let at = At { value: counter.value, live: counter.live, pmi_enabled: counter.pmi_enabled };
                ((vcpu.vcpu, counter.name.as_str()), at)
            })
        })
        .collect()
}

/// The counters as a table for people.
pub(super) fn table(lines: &[CounterLine]) -> String {
    use std::fmt::Write as _;
    use vpmu_client::units::grouped;
    let mut text = format!(
        "  {:4} {:8} {:>20} {:>20} {:>20} {:>20}",
        "vCPU", "counter", "before", "at stop", "at resume", "after"
    );
    for line in lines {
        let _ = write!(
            text,
            "\n  {:<4} {:8} {:>20} {:>20} {:>20} {:>20}{}",
            line.vcpu,
            line.counter,
            grouped(line.before),
            grouped(line.at_stop),
            grouped(line.at_resume),
            grouped(line.after),
            if line.pmi { "  takes overflows" } else { "" },
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_client::api::PmuCounter;

    fn vcpu(values: &[(&str, u64, bool, bool)]) -> Vec<VcpuPmu> {
        let counters = values
            .iter()
            .map(|&(name, value, live, pmi_enabled)| PmuCounter {
                name: name.to_owned(),
                value,
                live,
                pmi_enabled,
                ..PmuCounter::default()
            })
            .collect();
        vec![VcpuPmu { counters, ..VcpuPmu::default() }]
    }

    #[test]
    fn readings_are_joined_by_counter() {
        let lines = join(
            &vcpu(&[("gp0", 10, true, false), ("gp1", 0, false, false), ("gp2", 90, true, true)]),
            &vcpu(&[("gp0", 20, true, false), ("gp1", 0, false, false), ("gp2", 5, true, true)]),
            &vcpu(&[("gp0", 20, true, false), ("gp1", 0, false, false), ("gp2", 5, true, true)]),
            &vcpu(&[("gp0", 30, true, false), ("gp1", 0, false, false), ("gp2", 50, true, true)]),
        );
        assert_eq!(lines.len(), 2);
        assert_eq!((lines[0].before, lines[0].at_stop, lines[0].after), (10, 20, 30));
        assert!(lines[1].pmi && lines.iter().all(CounterLine::monotonic));
    }

    #[test]
    fn a_counter_that_is_missing_or_went_back_is_seen() {
        let lines = join(
            &vcpu(&[("gp0", 10, true, false)]),
            &[],
            &vcpu(&[("gp0", 9, true, false)]),
            &vcpu(&[("gp0", 9, true, false)]),
        );
        assert_eq!(lines[0].at_stop, 0);
        assert!(!lines[0].monotonic());
    }
}
