//! `vpmuctl vm stats`.

use super::failure::Failure;
use super::{Context, output};
use serde_json::{Map, Value, json};
use vpmu_client::api::{HypervisorStatistic, VirtualMachineStats};

/// Shows the figures of a machine.
pub(crate) async fn run(context: &Context, name: &str) -> Result<(), Failure> {
    let stats = context.client.vm_stats(name).await?;
    if context.json() {
        return Ok(output::json(&as_json(&stats))?);
    }
    let mut table = output::table(&[
        "vcpu",
        "core",
        "exits",
        "pmu msr exits",
        "pmis",
        "guest ms",
        "hypervisor (not zero)",
    ]);
    for v in &stats.vcpus {
        table.add_row([
            v.vcpu.to_string(),
            v.core.to_string(),
            v.exits.to_string(),
            v.pmu_msr_exits.to_string(),
            v.pmis.to_string(),
            (v.guest_ns / 1_000_000).to_string(),
            words(&v.hypervisor),
        ]);
    }
    output::print(&table)?;
    if !stats.hypervisor.is_empty() {
        output::line(&format!("machine: {}", words(&stats.hypervisor)))?;
    }
    if let Some(memory) = stats.arriving_memory {
        output::line(&format!(
            "memory: {} pages came, {} are yet to come, {} faults waited",
            memory.placed_pages, memory.missing_pages, memory.faults
        ))?;
    }
    Ok(())
}

/// Single values that are not zero; histograms are in the JSON.
fn words(figures: &[HypervisorStatistic]) -> String {
    let shown = figures.iter().filter_map(|f| match f.values.as_slice() {
        [value] if *value != 0 => Some(format!("{} {value}", f.name)),
        _ => None,
    });
    shown.collect::<Vec<_>>().join(", ")
}

fn figures(figures: &[HypervisorStatistic]) -> Value {
    let one = |f: &HypervisorStatistic| match f.values.as_slice() {
        [value] => json!(value),
        many => json!(many),
    };
    Value::Object(figures.iter().map(|f| (f.name.clone(), one(f))).collect::<Map<_, _>>())
}

fn as_json(stats: &VirtualMachineStats) -> Value {
    let vcpus: Vec<Value> = stats
        .vcpus
        .iter()
        .map(|v| {
            json!({
                "vcpu": v.vcpu,
                "core": v.core,
                "exits": v.exits,
                "pmu_msr_exits": v.pmu_msr_exits,
                "pmis": v.pmis,
                "guest_ns": v.guest_ns,
                "hypervisor": figures(&v.hypervisor),
            })
        })
        .collect();
    let memory = stats.arriving_memory.map(
        |m| json!({ "missing_pages": m.missing_pages, "placed_pages": m.placed_pages, "faults": m.faults }),
    );
    json!({ "name": stats.name, "vcpus": vcpus, "hypervisor": figures(&stats.hypervisor), "arriving_memory": memory })
}
