//! `vpmud demo`: the main job end to end, in front of the user, through the public API as any user would.
//!
//! Two hosts as processes with stores of their own, a machine with moving counters, a live migration, each counter
//! continuing on the second host, that host killed with SIGKILL and restarted, and the persisted PMU state intact.
//!
//! Invariants: whatever happens (an error, a signal, a panic, SIGKILL of the demo itself) no process is left running, and
//! nothing is left behind that keeps the next demo from running. Standard output carries the result and nothing else with
//! `--output json`; the story is then told on standard error.

pub(crate) mod error;
pub(crate) mod host;
mod report;
mod say;
mod scenario;
pub(crate) mod workdir;

use clap::{Args, ValueEnum};
use error::DemoError;
use report::Report;
use say::Say;
use std::process::ExitCode;
use std::time::Duration;
use workdir::WorkDir;

use crate::output::Output;

/// A demo that takes longer than this has gone wrong.
const DEADLINE: Duration = Duration::from_secs(120);

/// Options of `vpmud demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// How the result is printed: a story for people, or one JSON object.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
    /// What runs the guest; default: kvm where /dev/kvm works, else simulated.
    #[arg(long, value_enum)]
    hypervisor: Option<Hypervisor>,
    /// Keep the hosts' directories, with their stores and logs, and say where they are.
    #[arg(long)]
    keep: bool,
}

/// What runs the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Hypervisor {
    /// KVM.
    Kvm,
    /// A scripted guest on the same threads, switcher, memory and migration.
    Simulated,
}

impl Hypervisor {
    fn as_str(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Simulated => "simulated",
        }
    }
}

/// Runs the demo. Exit code 0 if every check holds, else 1 with the reason on standard error.
pub fn main(args: &DemoArgs) -> ExitCode {
    let say = Say::new(args.output == Output::Json);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("vpmud demo: cannot start the async runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    let mut report = Report::default();
    let result = runtime.block_on(run(args, say, &mut report));
    // Killed children are reaped here at the latest.
    runtime.shutdown_timeout(Duration::from_secs(5));
    if let Err(error) = &result {
        report.check("completed", false, error.to_string());
    }
    let printed =
        if args.output == Output::Json { say::print_json(&report) } else { say::print_summary(&report) };
    if let Err(error) = &result {
        eprintln!("vpmud demo: [{}] {error}", error.reason());
        return ExitCode::FAILURE;
    }
    if let Some(failed) = report.first_failure() {
        eprintln!("vpmud demo: check {} failed: {}", failed.name, failed.detail);
        return ExitCode::FAILURE;
    }
    if printed.is_err() { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

/// Owns the directory and the hosts for as long as the scenario runs; they end with this function on every path.
async fn run(args: &DemoArgs, say: Say, report: &mut Report) -> Result<(), DemoError> {
    let mut signals = Signals::new()?;
    let workdir = WorkDir::new(args.keep)?;
    let hypervisor = args.hypervisor.unwrap_or_else(|| choose_hypervisor(say));
    if args.keep {
        say.line(&format!("stores and logs stay in {}", workdir.path().display()));
    }
    let mut hosts = scenario::Hosts::default();
    let outcome = tokio::select! {
        outcome = scenario::run(&workdir, hypervisor.as_str(), say, &mut hosts, report) => outcome,
        signal = signals.any() => Err(DemoError::Interrupted { signal }),
        () = tokio::time::sleep(DEADLINE) => Err(DemoError::TooLong { waited: DEADLINE }),
    };
    if let Err(error) = &outcome
        && !matches!(error, DemoError::Interrupted { .. })
    {
        hosts.show_logs();
    }
    let ended = hosts.end().await;
    outcome?;
    report.check(
        "hosts_end_cleanly",
        ended.is_ok(),
        match &ended {
            Ok(()) => "both ended on SIGTERM with exit code 0".to_owned(),
            Err(error) => error.to_string(),
        },
    );
    Ok(())
}

/// KVM where it can be used; says so in one line where it cannot.
fn choose_hypervisor(say: Say) -> Hypervisor {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Ok(_) => Hypervisor::Kvm,
        Err(error) => {
            say.line(&format!("no /dev/kvm ({error}): the guest is simulated, everything else is the same"));
            Hypervisor::Simulated
        }
    }
}

/// The signals that end the demo in good order.
struct Signals {
    interrupt: tokio::signal::unix::Signal,
    terminate: tokio::signal::unix::Signal,
    hangup: tokio::signal::unix::Signal,
}

impl Signals {
    fn new() -> Result<Self, DemoError> {
        use tokio::signal::unix::{SignalKind, signal};
        let listen = |kind| signal(kind).map_err(|error| DemoError::io("listen for signals", error));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    async fn any(&mut self) -> &'static str {
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }
}
