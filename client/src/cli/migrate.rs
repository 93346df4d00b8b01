//! `vpmuctl migrate`: moves a machine, in front of the user.

use super::failure::Failure;
use super::{Context, output};
use clap::{Args, ValueEnum};
use std::process::ExitCode;
use std::time::Duration;
use vpmu_client::api::{Migration, MigrationSpec, migration, migration_spec};
use vpmu_client::progress::MigrationBar;
use vpmu_client::view::{CheckView, MigrationView};
use vpmu_client::{Client, ClientError, Endpoint, names, units, wait};

const EXAMPLES: &str = "\
Examples:
  # Is anything in the way? Nothing is moved.
  vpmuctl migrate web-1 --to unix:/tmp/b-peer.sock --check
  # Move it, with the machine stopped for at most 20 ms.
  vpmuctl migrate web-1 --to unix:/tmp/b-peer.sock --max-blackout 20ms
  # A machine that dirties memory faster than it can be copied moves all the same: first it, then the rest of its memory.
  vpmuctl migrate web-1 --to unix:/tmp/b-peer.sock --max-blackout 20ms --allow-postcopy
  # Over TCP on loopback, four data connections.
  vpmuctl migrate web-1 --to tcp:127.0.0.1:7171 --connections 4 --plaintext

--to names the destination's --peer-listen, not its --listen. Ctrl-C cancels as long as nothing is committed; the machine
then runs on where it was. While memory follows (--allow-postcopy) nothing can be cancelled: a lost connection is opened
anew for 20 s, in which the guest waits where it needs a page; after that, or as soon as the source's host says that its
worker has ended, it ends as POSTCOPY_SOURCE_LOST.";

/// What the server assumes where no duration is given, plus time for its own clean-up.
const PATIENCE: Duration = Duration::from_secs(660);

/// Move a running machine to another host.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct MigrateArgs {
    /// The machine.
    name: String,
    /// The destination's peer listener: unix:PATH or tcp:ADDR:PORT.
    #[arg(long, value_name = "PEER")]
    to: Endpoint,
    /// How long the machine may stand still; unset means 300ms.
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    max_blackout: Option<Duration>,
    /// Give up after this long; unset means 600s.
    #[arg(long, value_parser = units::parse_duration, value_name = "TIME")]
    max_duration: Option<Duration>,
    /// Most bytes a second, e.g. 100MiB; unset means no bound.
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    max_bandwidth: Option<u64>,
    /// How memory moves.
    #[arg(long, value_enum, default_value = "auto")]
    mode: Mode,
    /// Data connections, 1 to 16.
    #[arg(long, default_value_t = 1, value_name = "N")]
    connections: u32,
    /// What happens to PMU state that does not fit the destination.
    #[arg(long, value_enum, default_value = "require")]
    pmu_restore: PmuRestore,
    /// Memory may go over the wire without TLS; without this, TCP to another host uses TLS.
    #[arg(long, conflicts_with = "tls")]
    plaintext: bool,
    /// TLS for memory on loopback too.
    #[arg(long)]
    tls: bool,
    /// Compression of memory on the wire; "auto" measures the network and takes what is fastest.
    #[arg(long, value_enum, default_value = "none")]
    compression: Compression,
    /// The machine may be slowed down while copying does not keep up with it.
    #[arg(long)]
    allow_throttle: bool,
    /// Where copying cannot meet the goals, the machine may move first and its memory follow; until all of it is there, the
    /// loss of either host is the loss of the machine.
    #[arg(long)]
    allow_postcopy: bool,
    /// Only check what is in the way.
    #[arg(long)]
    check: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Mode {
    /// The best that both hosts can do.
    Auto,
    /// Iterative copy while it runs.
    Precopy,
    /// Same machine: memory is handed over, not copied.
    Local,
    /// One round of copying; if the goals are not met by then it moves, and the rest of its memory follows.
    Postcopy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Compression {
    None,
    Lz4,
    Zstd,
    Auto,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum PmuRestore {
    /// The migration fails before it starts.
    Require,
    /// What fits is restored; what was dropped is in the migration's actions and in `pmu show`.
    BestEffort,
    /// The PMU starts anew; what it held is reported.
    Reset,
}

pub(crate) async fn run(context: &Context, args: MigrateArgs) -> Result<ExitCode, Failure> {
    let spec = spec(&args)?;
    if args.check {
        return check(context, &args.name, spec).await;
    }
    let patience = args.max_duration.map_or(PATIENCE, |bound| bound + Duration::from_secs(60));
    let operation = context.client.create_migration(&args.name, spec).await?;
    let name = Client::migration_of(&operation)?.name;
    let bar = MigrationBar::new(&args.name, !context.json());

    let follow = context.client.follow_migration(&name, patience, |migration| bar.update(migration));
    tokio::pin!(follow);
    let followed = tokio::select! {
        followed = &mut follow => followed,
        _ = tokio::signal::ctrl_c() => {
            eprintln!("cancelling; the machine runs on where it is unless the handover is committed");
            // Too late is no error: then the migration simply goes on to its end.
            if let Err(error) = context.client.cancel_migration(&name).await {
                eprintln!("not cancelled: {error}");
            }
            follow.await
        }
    };
    bar.finish();
    // The stream is for the eyes, the operation has the verdict: a lost stream is not a failed migration.
    if let Err(error @ ClientError::Deadline { .. }) = followed {
        return Err(error.into());
    }
    let done = context.client.wait_operation(operation, patience, |_| {}).await?;
    let migration: Migration = wait::response(&done)?;
    show(context, &migration)?;
    Ok(verdict(&migration))
}

fn spec(args: &MigrateArgs) -> Result<MigrationSpec, Failure> {
    let mode = match args.mode {
        Mode::Auto => migration_spec::Mode::Auto,
        Mode::Precopy => migration_spec::Mode::PrecopyOnly,
        Mode::Local => migration_spec::Mode::Local,
        Mode::Postcopy => migration_spec::Mode::Postcopy,
    };
    let pmu_restore = match args.pmu_restore {
        PmuRestore::Require => migration_spec::PmuRestore::Require,
        PmuRestore::BestEffort => migration_spec::PmuRestore::BestEffort,
        PmuRestore::Reset => migration_spec::PmuRestore::Reset,
    };
    let compression = match args.compression {
        Compression::None => migration_spec::Compression::None,
        Compression::Lz4 => migration_spec::Compression::Lz4,
        Compression::Zstd => migration_spec::Compression::Zstd,
        Compression::Auto => migration_spec::Compression::Adaptive,
    };
    Ok(MigrationSpec {
        destination: args.to.to_string(),
        max_blackout: proto_duration(args.max_blackout, "--max-blackout")?,
        max_duration: proto_duration(args.max_duration, "--max-duration")?,
        max_bandwidth: args.max_bandwidth.unwrap_or_default(),
        connections: args.connections,
        mode: mode.into(),
        pmu_restore: pmu_restore.into(),
        allow_plaintext: args.plaintext,
        require_tls: args.tls,
        compression: compression.into(),
        allow_throttle: args.allow_throttle,
        allow_postcopy: args.allow_postcopy,
    })
}

fn proto_duration(
    duration: Option<Duration>,
    option: &str,
) -> Result<Option<prost_types::Duration>, Failure> {
    duration
        .map(|duration| {
            duration
                .try_into()
                .map_err(|_| Failure::usage(format!("{option} {} s is too long", duration.as_secs())))
        })
        .transpose()
}

async fn check(context: &Context, name: &str, spec: MigrationSpec) -> Result<ExitCode, Failure> {
    let view = CheckView::from(&context.client.check_migration(name, spec).await?);
    if context.json() {
        output::json(&view)?;
    } else {
        for mismatch in &view.mismatches {
            let kind = if mismatch.warning { "warning" } else { "in the way" };
            output::line(&format!("{kind} [{}]: {}", mismatch.rule, mismatch.message))?;
            if !mismatch.remedy.is_empty() {
                output::line(&format!("  try: {}", mismatch.remedy))?;
            }
        }
        let verdict = if view.compatible { "can move to" } else { "cannot move to" };
        output::line(&format!("{name} {verdict} host {}", view.destination_host))?;
    }
    Ok(if view.compatible { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Prints a migration: what it cost, or how far it is.
pub(crate) fn show(context: &Context, migration: &Migration) -> Result<(), Failure> {
    let view = MigrationView::from(migration);
    if context.json() {
        output::json(&view)?;
        return Ok(());
    }
    let time = |ms: Option<f64>| ms.map(|ms| format!("{ms:.3} ms")).unwrap_or_default();
    let breakdown = view.breakdown.as_ref().map(|b| {
        format!(
            "stop {:.3}, save {:.3}, transfer {:.3}, persist {:.3}, restore {:.3}, resume {:.3} ms",
            b.stop_ms, b.save_ms, b.transfer_ms, b.persist_ms, b.restore_ms, b.resume_ms
        )
    });
    let reason =
        if view.reason.is_empty() { String::new() } else { format!("[{}] {}", view.reason, view.message) };
    let digest = view.pmu_digest.filter(|digest| !digest.is_empty());
    let compressed = match (&view.compression, view.page_bytes, view.page_wire_bytes) {
        (Some(how), Some(before), Some(after)) if how != "none" && !how.is_empty() => {
            format!("{how}, {} of pages in {}", units::bytes(before), units::bytes(after))
        }
        _ => String::new(),
    };
    let throttled = match view.throttle_percent_max {
        0 => String::new(),
        percent => format!("vCPUs rested up to {percent} % of the time"),
    };
    let followed = match view.postcopy_pages {
        0 => String::new(),
        pages => format!("{} after the machine had moved", units::bytes(pages.saturating_mul(4096))),
    };
    let actions: Vec<String> = view
        .actions
        .iter()
        .map(|a| format!("{:.0} ms {}: {}", a.at_ms, a.code.to_lowercase(), a.detail))
        .collect();
    output::facts(&[
        ("vm", view.vm),
        ("migration", names::short(&view.name).to_owned()),
        ("state", view.state.to_lowercase()),
        ("reason", reason),
        ("from host", view.source_host),
        ("to host", view.destination_host),
        ("total", time(view.total_ms)),
        ("blackout", time(view.blackout_ms)),
        ("of which", breakdown.unwrap_or_default()),
        ("guest saw", view.guest_gap_ms.map(|ms| format!("a gap of {ms:.3} ms")).unwrap_or_default()),
        ("sent", units::bytes(view.bytes)),
        ("rounds", view.rounds.to_string()),
        ("mode", view.mode.unwrap_or_default()),
        ("transport", view.transport.unwrap_or_default()),
        ("compression", compressed),
        ("throttled", throttled),
        ("followed", followed),
        ("did", actions.join("\n")),
        ("pmu digest", digest.map(|digest| format!("{digest} on both hosts")).unwrap_or_default()),
    ])?;
    Ok(())
}

/// The exit code of a migration that has ended.
pub(crate) fn verdict(migration: &Migration) -> ExitCode {
    if migration.state() == migration::State::Succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
