//! `vpmuctl host ...`.

use super::failure::Failure;
use super::{Context, output, vm};
use clap::Subcommand;
use std::process::ExitCode;
use vpmu_client::view::{HostView, shape_text};

#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Show what the host runs machines with and which PMU it can give them.
    Info,
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
    for note in view.notes {
        output::line(&format!("note: {note}"))?;
    }
    Ok(ExitCode::SUCCESS)
}
