//! The command line of `vpmud`.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::config::{Address, HypervisorKind, Isolation, LocalMigration, PmuMode, ServeConfig};

/// Runs virtual machines on this host and gives their guests the processor's performance counters.
#[derive(Debug, Parser)]
#[command(name = "vpmud", version, about, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the control plane of this host.
    Serve(ServeArgs),
    /// Replaces a vpmud that runs by another binary; its machines go on.
    Upgrade(crate::upgrade::command::UpgradeArgs),
    /// Says what this binary is and speaks.
    Version(crate::upgrade::command::VersionArgs),
    /// Shows the whole path in front of you: two hosts, a machine, its counters, a live migration, a host that dies.
    Demo(crate::demo::DemoArgs),
    /// Measures this host: each figure of vpmud beside what the bare kernel takes, or QEMU, in the same run.
    #[command(subcommand)]
    Bench(crate::bench::BenchCommand),
    /// One machine in a process of its own; started by `serve --isolation process`.
    #[command(hide = true)]
    Worker(vcpu_worker::process::Args),
    /// Looks at this host.
    #[command(subcommand)]
    Host(HostCommand),
    /// Works on the state directory of a vpmud that is stopped.
    #[command(subcommand)]
    Store(StoreCommand),
}

#[derive(Debug, Subcommand)]
enum StoreCommand {
    Fence(crate::fence::FenceArgs),
}

#[derive(Debug, Subcommand)]
enum HostCommand {
    /// Says what this host can do for guests' performance counters, and what to change. Exits with 1 if something stops the
    /// mode. Where the kernel shares processors by session, two cores are kept busy for a second to see whether it does so fairly.
    Check(crate::host_check::HostCheckArgs),
    /// Takes the controllers of workers' cgroups back, so that a vpmud can be started in their parent again. For the unit's
    /// ExecStopPost=. The daemon's empty leaf (vpmud-daemon; daemon of earlier versions) is removed.
    ReleaseCgroup(crate::cgroup::controllers::ReleaseArgs),
    /// Competes for a core; started by `host check`.
    #[command(hide = true)]
    Rival(crate::sharing::rival::RivalArgs),
}

/// Options of `vpmud serve`.
#[derive(Debug, clap::Args)]
struct ServeArgs {
    /// Directory of the store, the ownership journal and the data plane's sockets; made if it is not there.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// Where the API is served: unix:PATH (mode 0600) or tcp:ADDR:PORT (loopback). Repeatable.
    #[arg(long, value_name = "ADDRESS", required = true)]
    listen: Vec<Address>,
    /// Where other hosts reach this one for migrations: unix:PATH or tcp:ADDR:PORT. Repeatable. Anything but loopback
    /// needs the three --peer-tls files. The API's listeners serve peers on this machine too.
    #[arg(long, value_name = "ADDRESS")]
    peer_listen: Vec<Address>,
    /// PEM file of the CA that vouches for hosts. With it every TCP connection between hosts is mutual TLS 1.3, and a
    /// machine's memory travels under TLS too. Changed files count from the next connection on.
    #[arg(long, value_name = "FILE", requires_all = ["peer_tls_cert", "peer_tls_key"])]
    peer_tls_ca: Option<PathBuf>,
    /// PEM file of this host's certificate, made out (subjectAltName) to the address of its --peer-listen, for
    /// both serverAuth and clientAuth.
    #[arg(long, value_name = "FILE", requires = "peer_tls_ca")]
    peer_tls_cert: Option<PathBuf>,
    /// PEM file of the certificate's private key, mode 0600.
    #[arg(long, value_name = "FILE", requires = "peer_tls_ca")]
    peer_tls_key: Option<PathBuf>,
    /// Talk only to hosts whose certificate has this DNS name or address. Repeatable; default: all that the CA vouches for.
    #[arg(long, value_name = "NAME", requires = "peer_tls_ca")]
    peer_tls_name: Vec<String>,
    /// Talk to other machines without TLS: whoever is on the network can then take machines over. For networks that
    /// nobody else is on.
    #[arg(long, conflicts_with = "peer_tls_ca")]
    peer_plaintext: bool,
    /// Host cores that vCPUs may use, e.g. 0,1; default: all that this process may use.
    #[arg(long, value_delimiter = ',', value_name = "CORES")]
    cores: Vec<u32>,
    /// Where workers live.
    #[arg(long, value_enum, default_value = "thread")]
    isolation: Isolation,
    /// What runs guests; default: kvm where /dev/kvm works, else simulated.
    #[arg(long, value_enum)]
    hypervisor: Option<HypervisorKind>,
    /// Who holds the guests' PMU.
    #[arg(long, value_enum, default_value = "auto")]
    pmu: PmuMode,
    /// The modelled host PMU.
    #[arg(long, value_name = "SHAPE", default_value = "intel:v5:8+4:48")]
    model_pmu: String,
    /// At SIGTERM end process-isolated machines too; thread-isolated ones always end with the daemon.
    #[arg(long)]
    stop_vms: bool,
    /// What a system call leads to that the sandbox of a worker process forbids: the worker ends, the kernel logs it
    /// (audit, or dmesg), or there is no filter; log and off are for diagnosis. Thread isolation has no sandbox.
    #[arg(long, value_enum, default_value = "enforce")]
    seccomp: vcpu_worker::sandbox::Mode,
    /// When the cgroups of worker processes get controllers (cgroup v2): vpmud then moves into a cgroup `daemon` below its
    /// own. Process isolation only.
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    cgroup_controllers: crate::cgroup::controllers::Controllers,
    /// Whether the host's processors are kept from sleeping while a machine starts, and while a migration begins or the
    /// machine stands still (up to 2 s at a time, through /dev/cpu_dma_latency).
    #[arg(long, value_enum, value_name = "WHEN", default_value = "auto")]
    keep_awake: crate::awake::KeepAwake,
    /// Worker processes (3 MiB each) kept ready, so that a machine's start need not wait for one: 0 to 16. The systemd unit
    /// keeps 1. Process isolation only.
    #[arg(long, value_name = "N", default_value_t = 0,
          value_parser = clap::value_parser!(u32).range(0..=crate::spare::MAX as i64))]
    spare_workers: u32,
    /// Threads that serve the API and whatever else waits for something; vCPUs, the store and copies of memory have
    /// threads of their own. Default: a quarter of the processors that vpmud may use, 1 to 16. Few are quicker than many:
    /// each one more is woken in vain, which costs tens of microseconds where processors are virtual.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=64))]
    api_threads: Option<u32>,
    /// For tests: worker threads of this kind make a forbidden system call.
    #[arg(long, value_enum, hide = true)]
    worker_violates: Option<vcpu_worker::sandbox::Kind>,
    /// When memory is handed to another vpmud on this machine instead of copied; auto needs a destination that is a Unix
    /// socket.
    #[arg(long, value_enum, default_value = "auto")]
    local_migration: LocalMigration,
    /// End in order when standard input ends, that is, with the process that started this one.
    #[arg(long)]
    exit_with_parent: bool,
    /// Where snapshots are written and read; made if it is not there. Default: `snapshots` in the state directory.
    #[arg(long, value_name = "DIR")]
    snapshot_dir: Option<PathBuf>,
    /// How long another host or a worker may be silent in a migration before it counts as unreachable, in milliseconds.
    /// Shorter waits shrink with it. Nothing that was committed is ever given up by it.
    #[arg(long, value_name = "MS", default_value_t = 30_000,
          value_parser = clap::value_parser!(u32).range(200..=600_000))]
    handover_timeout: u32,
    /// For tests: print a JSON line and stop this process before:STEP or after:STEP of a handover, once. Repeatable.
    #[arg(long, value_name = "POINT", hide = true)]
    hold_at: Vec<crate::handover::step::HoldPoint>,
}

impl From<ServeArgs> for ServeConfig {
    fn from(args: ServeArgs) -> Self {
        let peer_tls = match (args.peer_tls_ca, args.peer_tls_cert, args.peer_tls_key) {
            (Some(ca), Some(cert), Some(key)) => {
                Some(crate::peer::tls::Files { ca, cert, key, names: args.peer_tls_name })
            }
            // The parser lets all through or none.
            _ => None,
        };
        Self {
            peer_tls,
            peer_plaintext: args.peer_plaintext,
            state_dir: args.state_dir,
            listen: args.listen,
            peer_listen: args.peer_listen,
            cores: args.cores,
            isolation: args.isolation,
            hypervisor: args.hypervisor,
            pmu: args.pmu,
            model_pmu: args.model_pmu,
            stop_vms: args.stop_vms,
            seccomp: args.seccomp,
            cgroup_controllers: args.cgroup_controllers,
            keep_awake: args.keep_awake,
            spare_workers: args.spare_workers,
            api_threads: args.api_threads,
            worker_violates: args.worker_violates,
            local_migration: args.local_migration,
            exit_with_parent: args.exit_with_parent,
            snapshot_dir: args.snapshot_dir,
            handover_timeout: args.handover_timeout,
            hold_at: args.hold_at,
        }
    }
}

/// Parses the arguments and runs the command. Exit codes: 0 done, 1 refused or failed, 2 wrong usage.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let usage = error.use_stderr();
            let _ = error.print();
            return if usage { ExitCode::from(2) } else { ExitCode::SUCCESS };
        }
    };
    match cli.command {
        Command::Serve(args) => serve(args.into()),
        Command::Upgrade(args) => crate::upgrade::command::main(&args),
        Command::Version(args) => crate::upgrade::command::version(&args),
        Command::Demo(args) => crate::demo::main(&args),
        Command::Bench(command) => crate::bench::main(&command),
        Command::Worker(args) => match vcpu_worker::process::main(&args) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("vpmud worker: {error}");
                ExitCode::FAILURE
            }
        },
        Command::Host(HostCommand::Check(args)) => crate::host_check::main(&args),
        Command::Host(HostCommand::ReleaseCgroup(args)) => crate::cgroup::controllers::main(&args),
        Command::Host(HostCommand::Rival(args)) => crate::sharing::rival::main(&args),
        Command::Store(StoreCommand::Fence(args)) => crate::fence::main(&args),
    }
}

/// How many threads serve the API where nobody said: a quarter of the processors.
fn api_threads() -> usize {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    processors.div_ceil(4).min(16)
}

fn serve(config: ServeConfig) -> ExitCode {
    // Before there is another thread.
    vcpu_worker::host::heap::grow_in_large_steps();
    let log = crate::log::Log::begin();
    let lost = log.lost.clone();
    let state_dir = config.state_dir.clone();
    if let Err(error) = vcpu_worker::host::schedule::answer_quickly() {
        tracing::debug!(%error, "calls are answered when the guests' slices have passed");
    }
    // In threads the guests are in this very session.
    if config.isolation == Isolation::Process
        && let Err(error) = vcpu_worker::host::schedule::answer_before_other_sessions()
    {
        tracing::info!(%error, "this session has no greater share of the processors than a worker's");
    }
    if crate::sharing::by_session() && crate::sharing::kernel_is_suspect() {
        tracing::warn!(
            remedy = crate::sharing::REMEDY,
            "this kernel is known to let a session with several guests on a core starve others there, and its own threads; \
             `vpmud host check` tries it"
        );
    }
    vcpu_worker::host::features::ask();
    let threads = config.api_threads.map_or_else(api_threads, |threads| threads as usize);
    let runtime =
        match tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build() {
            Ok(runtime) => runtime,
            Err(error) => {
                eprintln!("vpmud: cannot start the async runtime: {error}");
                return ExitCode::FAILURE;
            }
        };
    let result = runtime.block_on(crate::serve::run(config, lost));
    // Blocking helpers (none should be left) get a moment, not for ever.
    runtime.shutdown_timeout(std::time::Duration::from_secs(5));
    // What is logged is written now.
    drop(log);
    match result {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(image)) => become_binary(&state_dir, &image),
        Err(error) => {
            eprintln!("vpmud: [{}] {error}", error.reason());
            if let Some(previous) = crate::upgrade::fallback() {
                eprintln!("vpmud: this binary does not come to serve: {} goes on", previous.display());
                let error = exec(&previous, None);
                eprintln!("vpmud: {} cannot be run: {error}", previous.display());
            }
            ExitCode::FAILURE
        }
    }
}

/// This process becomes another vpmud with the same command line; if the system refuses, the one before.
fn become_binary(state_dir: &std::path::Path, image: &std::path::Path) -> ExitCode {
    let previous = state_dir.join(crate::upgrade::PREVIOUS);
    let previous = std::path::absolute(&previous).unwrap_or(previous);
    let error = exec(image, Some(&previous));
    eprintln!("vpmud: {} cannot be run: {error}; this version goes on", image.display());
    let error = exec(&previous, None);
    eprintln!("vpmud: {} cannot be run: {error}; the machines go on, start vpmud again", previous.display());
    ExitCode::FAILURE
}

/// Returns only if it fails.
fn exec(image: &std::path::Path, came_from: Option<&std::path::Path>) -> std::io::Error {
    use std::os::unix::process::CommandExt as _;
    let mut command = std::process::Command::new(image);
    command.arg0("vpmud").args(std::env::args_os().skip(1));
    command.env(crate::upgrade::CAME_FROM, came_from.unwrap_or_else(|| std::path::Path::new("")));
    command.exec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_promised_command_line_parses() {
        let cli = Cli::try_parse_from([
            "vpmud",
            "serve",
            "--state-dir",
            "/tmp/x",
            "--listen",
            "unix:/tmp/x/a.sock",
            "--listen",
            "tcp:127.0.0.1:0",
            "--peer-listen",
            "unix:/tmp/x/p.sock",
            "--cores",
            "0,1",
            "--isolation",
            "thread",
            "--hypervisor",
            "kvm",
            "--pmu",
            "auto",
            "--model-pmu",
            "amd:v2:6:48",
            "--stop-vms",
        ])
        .expect("parses");
        let Command::Serve(args) = cli.command else { panic!("another command") };
        assert_eq!((args.listen.len(), args.cores), (2, vec![0, 1]));
    }

    #[test]
    fn the_defaults_are_those_that_are_documented() {
        let line = ["vpmud", "serve", "--state-dir", "/tmp/x", "--listen", "unix:/tmp/x/a.sock"];
        let Command::Serve(args) = Cli::try_parse_from(line).expect("parses").command else {
            panic!("another command")
        };
        let config = ServeConfig::from(args);
        assert_eq!(
            (config.isolation, config.pmu, config.hypervisor),
            (Isolation::Thread, PmuMode::Auto, None)
        );
        assert_eq!((config.seccomp, config.spare_workers), (vcpu_worker::sandbox::Mode::Enforce, 0));
        assert_eq!((config.local_migration, config.handover_timeout), (LocalMigration::Auto, 30_000));
        assert!(!config.stop_vms && !config.peer_plaintext && config.peer_tls.is_none());
        assert!(config.hold_at.is_empty() && config.worker_violates.is_none() && !config.exit_with_parent);
    }

    #[test]
    fn a_missing_listener_is_wrong_usage() {
        let error = Cli::try_parse_from(["vpmud", "serve", "--state-dir", "/tmp/x"]).expect_err("refused");
        assert_eq!(error.exit_code(), 2);
    }
}
