//! The command tree and its dispatch. One file a command family; [`output`] prints, [`failure`] reports.

mod console;
mod create;
pub(crate) mod failure;
mod host;
mod migrate;
mod migration;
mod operation;
mod output;
mod placement;
mod pmu;
mod pmu_table;
mod raw_mode;
mod stats;
mod vm;

use clap::{Parser, Subcommand, ValueEnum};
use failure::Failure;
use std::process::ExitCode;
use std::time::Duration;
use vpmu_client::{Client, Endpoint, units};

/// Time for the connection to be made: a listener on this host or nearby answers at once or not at all.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Table,
    /// For programs: one object on standard output (streams: one a line); errors as JSON on standard error.
    Json,
}

/// Runs and moves virtual machines on hosts that run vpmud, and shows their performance counters.
#[derive(Debug, Parser)]
#[command(name = "vpmuctl", version, propagate_version = true, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Cli {
    /// Where vpmud listens: unix:PATH or tcp:ADDR:PORT.
    #[arg(long, global = true, env = "VPMU_HOST", value_name = "ENDPOINT")]
    host: Option<Endpoint>,
    /// How answers are printed.
    #[arg(long, global = true, value_enum, default_value = "table")]
    pub(crate) output: Output,
    /// How long to wait for something to be done (migrations have a bound of their own).
    #[arg(long, global = true, default_value = "120s", value_parser = units::parse_duration, value_name = "TIME")]
    timeout: Duration,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  vpmud serve --state-dir /tmp/a --listen unix:/tmp/a.sock &   # a host
  export VPMU_HOST=unix:/tmp/a.sock
  vpmuctl vm create web-1 --vcpus 2 --memory 256MiB --probe --start
  vpmuctl pmu show web-1                 # its counters, now
  vpmuctl pmu watch web-1                # and how they move
  vpmuctl vm console web-1               # Ctrl-] leaves
  vpmuctl migrate web-1 --to unix:/tmp/b-peer.sock --max-blackout 20ms
  vpmuctl --output json vm get web-1     # for scripts

Exit codes: 0 done, 1 refused or failed (the message says what to do), 2 wrong usage.";

#[derive(Debug, Subcommand)]
enum Command {
    /// Create, run and end virtual machines.
    #[command(subcommand)]
    Vm(vm::VmCommand),
    /// Show a machine's performance counters.
    #[command(subcommand)]
    Pmu(pmu::PmuCommand),
    /// Move a running machine to another host.
    Migrate(migrate::MigrateArgs),
    /// List, get, watch or cancel migrations.
    #[command(subcommand)]
    Migration(migration::MigrationCommand),
    /// List, get, wait for or cancel long-running operations.
    #[command(subcommand)]
    Operation(operation::OperationCommand),
    /// Show what a host offers.
    #[command(subcommand)]
    Host(host::HostCommand),
}

/// What every command needs.
#[derive(Debug)]
pub(crate) struct Context {
    client: Client,
    output: Output,
    timeout: Duration,
}

impl Context {
    fn json(&self) -> bool {
        self.output == Output::Json
    }
}

/// Runs one command.
pub(crate) async fn run(cli: Cli) -> Result<ExitCode, Failure> {
    let Some(host) = cli.host else {
        return Err(Failure::usage("no host: give --host unix:PATH|tcp:ADDR:PORT or set VPMU_HOST"));
    };
    let client = Client::connect(&host, CONNECT_DEADLINE.min(cli.timeout)).await?;
    let context = Context { client, output: cli.output, timeout: cli.timeout };
    match cli.command {
        Command::Vm(command) => Box::pin(vm::run(&context, command)).await,
        Command::Pmu(command) => pmu::run(&context, command).await,
        Command::Migrate(args) => migrate::run(&context, args).await,
        Command::Migration(command) => migration::run(&context, command).await,
        Command::Operation(command) => operation::run(&context, command).await,
        Command::Host(command) => host::run(&context, command).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_tree_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_promised_forms_parse() {
        for line in [
            "vpmuctl --host unix:/a.sock --output json vm create n --vcpus 2 --memory 256MiB --probe",
            "vpmuctl --host unix:/a.sock vm create n --vcpus 1 --memory 1GiB --probe --pmu-gp 8 --pmu-fixed 3 --start",
            "vpmuctl --host tcp:127.0.0.1:7070 vm create n --vcpus 1 --memory 64MiB --kernel /k --initrd /i --cmdline a=b",
            "vpmuctl --host unix:/a.sock vm start n",
            "vpmuctl --host unix:/a.sock vm stop n",
            "vpmuctl --host unix:/a.sock vm pause n",
            "vpmuctl --host unix:/a.sock vm resume n",
            "vpmuctl --host unix:/a.sock vm get n --output json",
            "vpmuctl --host unix:/a.sock vm delete n",
            "vpmuctl --host unix:/a.sock vm list",
            "vpmuctl --host unix:/a.sock vm watch",
            "vpmuctl --host unix:/a.sock vm console n --history",
            "vpmuctl --host unix:/a.sock pmu show n --persisted",
            "vpmuctl --host unix:/a.sock pmu watch n --interval 1s",
            "vpmuctl --host unix:/a.sock migrate n --to unix:/b.sock --max-blackout 20ms --mode precopy --connections 4 --plaintext",
            "vpmuctl --host unix:/a.sock migrate n --to tcp:127.0.0.1:1 --mode local --check",
            "vpmuctl --host unix:/a.sock host info",
            "vpmuctl --host unix:/a.sock operation list",
            "vpmuctl --host unix:/a.sock operation cancel x",
            "vpmuctl --host unix:/a.sock migration watch n m",
            "vpmuctl --host unix:/a.sock vm force-owner n --fence-token t --reason burnt",
            "vpmuctl --host unix:/a.sock vm force-owner n --dead-host h --boot-id b --epoch 3 --reason burnt",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|error| panic!("{line}: {error}"));
        }
    }

    #[test]
    fn wrong_usage_is_refused() {
        for line in [
            "vpmuctl vm create n --vcpus 2 --memory 256MiB",
            "vpmuctl vm create n --vcpus 2 --memory 256MiB --probe --kernel /k",
            "vpmuctl vm create n --vcpus 2 --memory 256MB --probe",
            "vpmuctl vm create n --vcpus two --memory 256MiB --probe",
            "vpmuctl vm create n --vcpus 2 --memory 256MiB --probe --cmdline x",
            "vpmuctl vm create n --vcpus 2 --memory 256MiB --kernel /k --working-set 1MiB",
            "vpmuctl --host http://x vm list",
            "vpmuctl migrate n",
            "vpmuctl migrate n --to nowhere",
            "vpmuctl migrate n --to unix:/b --max-blackout 20",
            "vpmuctl vm",
            "vpmuctl vm force-owner n --reason r",
            "vpmuctl vm force-owner n --fence-token t",
            "vpmuctl vm force-owner n --dead-host h --reason r",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
