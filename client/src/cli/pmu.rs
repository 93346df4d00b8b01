//! `vpmuctl pmu ...`.

use super::failure::Failure;
use super::pmu_table;
use super::{Context, output};
use clap::{Args, Subcommand};
use std::io::IsTerminal as _;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use vpmu_client::units;
use vpmu_client::view::{PmuAuditView, PmuStateView, PmuView};

#[derive(Debug, Subcommand)]
pub(crate) enum PmuCommand {
    /// Show a machine's counters now, or with --persisted as they stand in the host's store.
    Show(ShowArgs),
    /// Show a machine's counters again and again, with their rates, until interrupted.
    Watch(WatchArgs),
    /// Compare the PMU registers of a machine's cores with what was left there, to find who else writes them.
    ///
    /// Exits with 1 if it finds any. Costs a running vCPU one switch; such a core is cleaned before it is used again.
    Audit(AuditArgs),
}

#[derive(Debug, Args)]
pub(crate) struct AuditArgs {
    /// The machine.
    name: String,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArgs {
    /// The machine.
    name: String,
    /// What is persisted in the store, which also works for a stopped machine.
    #[arg(long)]
    persisted: bool,
    /// Show every register too.
    #[arg(long)]
    registers: bool,
}

#[derive(Debug, Args)]
pub(crate) struct WatchArgs {
    /// The machine.
    name: String,
    /// Time between two readings.
    #[arg(long, default_value = "1s", value_parser = units::parse_duration, value_name = "TIME")]
    interval: Duration,
    /// End after this many readings.
    #[arg(long, value_name = "N")]
    count: Option<u64>,
}

/// Shortest time between two readings: each costs every vCPU an exit.
const MIN_INTERVAL: Duration = Duration::from_millis(50);

pub(crate) async fn run(context: &Context, command: PmuCommand) -> Result<ExitCode, Failure> {
    match command {
        PmuCommand::Show(args) if args.persisted => {
            let state = context.client.get_pmu_state(&args.name).await?;
            let view = PmuStateView::from(&state);
            if context.json() {
                output::json(&view)?;
            } else {
                output::line(&pmu_table::persisted(&view, state.shape.as_ref(), args.registers))?;
            }
        }
        PmuCommand::Show(args) => {
            let pmu = context.client.get_pmu(&args.name).await?;
            let view = PmuView::from(&pmu);
            if context.json() {
                output::json(&view)?;
            } else {
                output::line(&pmu_table::live(&view, pmu.shape.as_ref(), None, args.registers))?;
            }
        }
        PmuCommand::Watch(args) => watch(context, args).await?,
        PmuCommand::Audit(args) => return audit(context, &args.name).await,
    }
    Ok(ExitCode::SUCCESS)
}

async fn audit(context: &Context, name: &str) -> Result<ExitCode, Failure> {
    let audit = context.client.audit_pmu(name).await?;
    let clean = audit.foreign.is_empty();
    if context.json() {
        output::json(&PmuAuditView::from(&audit))?;
    } else {
        for f in &audit.foreign {
            output::line(&format!(
                "vCPU {} on core {}: {} ({:#x}) was left at {:#x} and holds {:#x}",
                f.vcpu, f.core, f.register, f.msr, f.expected, f.found
            ))?;
        }
        let found = match (audit.mode.as_str(), clean) {
            ("kvm", _) => "the kernel owns the registers in mode kvm: nothing to audit".to_owned(),
            (_, true) => format!("{} vCPUs' cores hold what was left there", audit.vcpus),
            (_, false) => {
                "somebody else writes these registers: stop the profilers on these cores".to_owned()
            }
        };
        output::line(&format!("{name}: {found}"))?;
    }
    Ok(if clean { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn watch(context: &Context, args: WatchArgs) -> Result<(), Failure> {
    if args.interval < MIN_INTERVAL {
        return Err(Failure::usage("--interval is below 50ms, and each reading costs every vCPU an exit"));
    }
    let redraw = std::io::stdout().is_terminal() && !context.json();
    let mut ticks = tokio::time::interval(args.interval);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut earlier: Option<(Instant, PmuView)> = None;
    let mut left = args.count.unwrap_or(u64::MAX);
    while left > 0 {
        ticks.tick().await;
        let pmu = context.client.get_pmu(&args.name).await?;
        let (now, view) = (Instant::now(), PmuView::from(&pmu));
        if context.json() {
            output::json(&view)?;
        } else {
            let text = pmu_table::live(
                &view,
                pmu.shape.as_ref(),
                earlier.as_ref().map(|(at, view)| (now.duration_since(*at), view)),
                false,
            );
            // Cursor home, the text with each line's rest erased, then the rest of the screen erased: no flicker.
            if redraw {
                output::raw(format!("\x1b[H{}\x1b[K\n\x1b[J", text.replace('\n', "\x1b[K\n")).as_bytes())?;
            } else {
                output::line(&format!("{text}\n"))?;
            }
        }
        earlier = Some((now, view));
        left -= 1;
    }
    Ok(())
}
