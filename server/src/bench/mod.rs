//! `vpmud bench`: what vpmud takes, beside what the bare kernel takes, or QEMU, in the same run.
//!
//! The hosts that are measured are processes of this same program, driven through the public API as any client would;
//! what needs no API (one exit, one kick) is measured in this process. Figures of a machine that is busy with other
//! things are not figures: both sides are measured in turns, so that at least their ratio says something.
//!
//! Invariants: a figure is a median of as many samples as stand beside it, or it is named otherwise; its floor comes from the
//! same run; standard output carries the result and nothing else with `--output json`.

mod boot;
mod error;
mod figure;
mod loops;
mod many;
mod memory;
mod migrate;
mod pause;
mod site;

use std::process::ExitCode;

use clap::{Args, Subcommand};

use error::BenchError;
use figure::{Figure, Report};

use crate::output::Output;

/// What is measured.
#[derive(Debug, Subcommand)]
pub enum BenchCommand {
    /// From the call that creates and starts a machine to its first serial byte.
    Boot(Common),
    /// Pause and resume of a busy guest through the API, beside a bare call.
    Pause(Common),
    /// One exit of the worker's run loop beside a bare KVM_RUN loop.
    Exit(Common),
    /// From the wish that a computing guest be left to user space, beside a bare signal.
    Kick(Common),
    /// Memory of a machine beyond its guest's pages.
    Memory(Common),
    /// Many machines created, run and listed, beside the bare ioctls.
    Many(ManyArgs),
    /// Live migration beside QEMU: same guest, same limits, TCP over loopback, in turns.
    Migrate(migrate::MigrateArgs),
    /// All of these but migration.
    All(Common),
}

/// Options of every measurement.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Samples of each figure of which one takes no more than a moment; medians are printed. `all` makes its many machines
    /// ten times at most.
    #[arg(long, default_value = "20", value_name = "N", value_parser = clap::value_parser!(u32).range(1..=10_000))]
    runs: u32,
    /// How the result is printed: a table for people, or one JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

const MANY: u32 = 500;
const AT_ONCE: u32 = 128;
const MANY_RUNS: u32 = 10;

/// Options of `many`.
#[derive(Debug, Clone, Args)]
pub struct ManyArgs {
    /// Machines at once.
    #[arg(long, default_value_t = MANY, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    vms: u32,
    /// How often all of them are made, each time on a new host; medians are printed.
    #[arg(long, default_value_t = MANY_RUNS, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: u32,
    /// How the result is printed: a table for people, or one JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// Calls that the client has under way at once. With few, the processors are idle while records are made durable.
    #[arg(long, default_value_t = AT_ONCE, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=128))]
    at_once: u32,
}

/// Runs a measurement. Exit code 0 if it could be done, whether or not targets are met; they are printed beside.
pub fn main(command: &BenchCommand) -> ExitCode {
    let output = match command {
        BenchCommand::Boot(c)
        | BenchCommand::Pause(c)
        | BenchCommand::Exit(c)
        | BenchCommand::Kick(c)
        | BenchCommand::Memory(c)
        | BenchCommand::All(c) => c.output,
        BenchCommand::Many(m) => m.output,
        BenchCommand::Migrate(m) => m.output,
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("vpmud bench: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(async {
        tokio::select! {
            result = run(command) => result,
            _ = tokio::signal::ctrl_c() => Err(BenchError::Interrupted),
        }
    });
    let report = match result {
        Ok(report) => report,
        Err(error) => {
            eprintln!("vpmud bench: [{}] {error}", error.reason());
            return ExitCode::FAILURE;
        }
    };
    let printed = match (report, output) {
        (Outcome::Figures(report), Output::Json) => report.print_json(),
        (Outcome::Figures(report), Output::Text) => report.print_table(),
        (Outcome::Migrations(table), Output::Json) => table.print_json(),
        (Outcome::Migrations(table), Output::Text) => table.print_table(),
    };
    match printed {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vpmud bench: cannot print the result: {error}");
            ExitCode::FAILURE
        }
    }
}

/// What was measured.
enum Outcome {
    Figures(Report),
    Migrations(migrate::Table),
}

async fn run(command: &BenchCommand) -> Result<Outcome, BenchError> {
    let figures: Vec<Figure> = match command {
        BenchCommand::Boot(c) => boot::run(c.runs).await?,
        BenchCommand::Pause(c) => pause::run(c.runs).await?,
        BenchCommand::Exit(_) => loops::exits().await?,
        BenchCommand::Kick(_) => loops::kicks().await?,
        BenchCommand::Memory(_) => memory::run().await?,
        BenchCommand::Many(m) => many::run(m.vms, m.at_once, m.runs).await?,
        BenchCommand::Migrate(m) => return Ok(Outcome::Migrations(Box::pin(migrate::run(m)).await?)),
        BenchCommand::All(c) => {
            let mut all = boot::run(c.runs).await?;
            all.extend(pause::run(c.runs).await?);
            all.extend(loops::exits().await?);
            all.extend(loops::kicks().await?);
            all.extend(memory::run().await?);
            all.extend(many::run(MANY, AT_ONCE, c.runs.min(MANY_RUNS)).await?);
            all
        }
    };
    Ok(Outcome::Figures(Report::new(figures)))
}

/// One line of what is going on, for people who wait.
fn say(text: &str) {
    // Nobody may be there to read it.
    let _ = std::io::Write::write_fmt(&mut std::io::stderr(), format_args!("{text}\n"));
}
