//! Counters as a table for people. The mode stands at the top, and modelled counts say so.

use super::{output, vm};
use std::fmt::Write as _;
use std::time::Duration;
use vpmu_client::api::PmuShape;
use vpmu_client::units;
use vpmu_client::view::{PmuStateView, PmuView, ProbeView, VcpuView, shape_text};

/// A live reading, with rates where an earlier one is given.
pub(crate) fn live(
    pmu: &PmuView,
    shape: Option<&PmuShape>,
    earlier: Option<(Duration, &PmuView)>,
    registers: bool,
) -> String {
    let mut text = format!("{}: PMU mode {}", pmu.name, vm::mode_text(&pmu.mode));
    if !pmu.host_pmu.is_empty() {
        let _ = write!(text, ", host {}", pmu.host_pmu);
    }
    text.push('\n');
    if let Some(shape) = shape {
        let _ = writeln!(text, "guest sees {}", shape_text(shape));
    }
    if let Some(restored) = &pmu.restored {
        let (policy, count) = (&restored.policy, restored.losses_total);
        let _ = writeln!(text, "a migration ({policy}) left {count} registers behind or cut:");
        for loss in restored.losses.iter().take(8) {
            let _ = writeln!(text, "  {loss}");
        }
        if count > 8 {
            let _ = writeln!(text, "  and more: --output json");
        }
    }
    for vcpu in &pmu.vcpus {
        let before = earlier.and_then(|(elapsed, earlier)| {
            earlier.vcpus.iter().find(|candidate| candidate.vcpu == vcpu.vcpu).map(|found| (elapsed, found))
        });
        text += &one_vcpu(vcpu, before, registers);
    }
    if let Some(probe) = &pmu.probe {
        text += &probe_table(probe);
    }
    text.trim_end().to_owned()
}

/// A persisted state.
pub(crate) fn persisted(state: &PmuStateView, shape: Option<&PmuShape>, registers: bool) -> String {
    let mut text = format!("{}: persisted PMU state, mode {}\n", state.name, vm::mode_text(&state.mode));
    if let Some(shape) = shape {
        let _ = writeln!(text, "guest sees {}", shape_text(shape));
    }
    let _ = writeln!(
        text,
        "record {} of epoch {}, taken at {} because of {}",
        state.sequence,
        state.epoch,
        state.capture_time.as_deref().unwrap_or("an unknown time"),
        state.cause,
    );
    for vcpu in &state.vcpus {
        text += &one_vcpu(vcpu, None, registers);
    }
    text.trim_end().to_owned()
}

fn one_vcpu(vcpu: &VcpuView, earlier: Option<(Duration, &VcpuView)>, registers: bool) -> String {
    let mut text = format!("\nvCPU {} on core {}, {} PMIs", vcpu.vcpu, vcpu.core, units::grouped(vcpu.pmis));
    if vcpu.pmi_pending {
        text += ", one pending";
    }
    if vcpu.in_service {
        text += ", one in service";
    }
    let _ = writeln!(text, ", digest {}", vcpu.digest.get(..16).unwrap_or(&vcpu.digest));
    let mut header = vec!["counter", "value", "selector", "state"];
    if earlier.is_some() {
        header.insert(2, "a second");
    }
    let mut table = output::table(&header);
    for counter in &vcpu.counters {
        let mut state = vec![if counter.live { "counts" } else { "off" }];
        if counter.overflow {
            state.push("overflowed");
        }
        if counter.pmi_enabled {
            state.push("PMI");
        }
        let mut row = vec![
            counter.name.clone(),
            units::grouped(counter.value),
            format!("{:#x}", counter.selector),
            state.join(", "),
        ];
        if let Some((elapsed, earlier)) = earlier {
            let rate = earlier
                .counters
                .iter()
                .find(|candidate| candidate.name == counter.name)
                .and_then(|before| counter.value.checked_sub(before.value))
                .map(|events| units::grouped((events as f64 / elapsed.as_secs_f64().max(1e-6)) as u64));
            // A counter that took an overflow starts again below: no rate can be said of it.
            row.insert(2, rate.unwrap_or_else(|| "wrapped".to_owned()));
        }
        table.add_row(row);
    }
    let _ = writeln!(text, "{}", table.trim_fmt());
    if registers {
        let mut table = output::table(&["msr", "register", "value"]);
        for register in &vcpu.registers {
            table.add_row([
                format!("{:#x}", register.msr),
                register.name.clone(),
                format!("{:#x}", register.value),
            ]);
        }
        let _ = writeln!(text, "{}", table.trim_fmt());
    }
    text
}

fn probe_table(probe: &[ProbeView]) -> String {
    let mut text = "\nwhat the probe guest says of itself\n".to_owned();
    let mut table = output::table(&[
        "vcpu",
        "heartbeats",
        "pages dirtied",
        "PMIs taken",
        "faults",
        "longest gap",
        "since migration",
        "holes",
    ]);
    for report in probe {
        let faults = if report.faults == 0 {
            "0".to_owned()
        } else {
            format!("{} (first: code {})", report.faults, report.first_fault)
        };
        table.add_row([
            report.vcpu.to_string(),
            units::grouped(report.heartbeats),
            units::grouped(report.pages_dirtied),
            units::grouped(report.pmis),
            faults,
            format!("{:.3} ms", report.max_gap_ms),
            format!("{:.3} ms", report.last_gap_ms),
            report.gaps.to_string(),
        ]);
    }
    let _ = writeln!(text, "{}", table.trim_fmt());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_client::api::{Pmu, PmuCounter, VcpuPmu};

    fn reading(value: u64) -> PmuView {
        PmuView::from(&Pmu {
            name: "projects/default/virtualMachines/a/pmu".to_owned(),
            mode: "model".to_owned(),
            vcpus: vec![VcpuPmu {
                counters: vec![PmuCounter {
                    name: "gp0".to_owned(),
                    value,
                    live: true,
                    ..PmuCounter::default()
                }],
                ..VcpuPmu::default()
            }],
            ..Pmu::default()
        })
    }

    #[test]
    fn modelled_counts_say_so_and_rates_are_shown() {
        let text = live(&reading(3000), None, Some((Duration::from_secs(2), &reading(1000))), false);
        assert!(text.contains("modelled counts, not hardware"), "{text}");
        assert!(text.contains("1 000"), "{text}");
        let text = live(&reading(1000), None, Some((Duration::from_secs(2), &reading(3000))), false);
        assert!(text.contains("wrapped"), "{text}");
    }
}
