//! `vpmuctl host ...`.

use super::failure::Failure;
use super::{Context, output, vm};
use clap::Subcommand;
use std::fmt::Write as _;
use std::process::ExitCode;
use vpmu_client::view::{HostCpuView, HostView, shape_text};

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Show what the host runs machines with and which PMU it can give them.
    Info,
}

/// `cpu 3: package 0, node 0, core 1, cache 0; isolated; dedicated to web-1; 1 vCPU`
fn cpu_line(cpu: &HostCpuView) -> String {
    let mut line = format!(
        "cpu {}: package {}, node {}, core {}, cache {}",
        cpu.cpu, cpu.package, cpu.node, cpu.core, cpu.cache
    );
    for (is, what) in
        [(cpu.isolated, "isolated"), (cpu.nohz_full, "nohz_full"), (!cpu.usable, "not for vCPUs")]
    {
        if is {
            line.push_str("; ");
            line.push_str(what);
        }
    }
    if !cpu.dedicated_to.is_empty() {
        line.push_str("; dedicated to ");
        line.push_str(&cpu.dedicated_to);
    }
    if cpu.vcpus != 0 {
        // Writing to a string cannot fail.
        let _ = write!(line, "; {} vCPU{}", cpu.vcpus, if cpu.vcpus == 1 { "" } else { "s" });
    }
    line
}

pub(crate) async fn run(context: &Context, command: HostCommand) -> Result<ExitCode, Failure> {
    let HostCommand::Info = command;
    let host = context.client.host_capabilities().await?;
    let view = HostView::from(&host);
    if context.json() {
        output::json(&view)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::facts(&[
        ("host id", view.host_id),
        ("vpmud", view.daemon_version),
        ("hypervisor", view.hypervisor),
        ("pmu mode", vm::mode_text(&view.pmu_mode)),
        ("host pmu", view.host_pmu),
        ("guests get", host.shape.as_ref().map(shape_text).unwrap_or_default()),
        ("cores", view.cores.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")),
    ])?;
    for cpu in &view.topology {
        output::line(&cpu_line(cpu))?;
    }
    for note in view.notes {
        output::line(&format!("note: {note}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
