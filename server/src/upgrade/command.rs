//! `vpmud upgrade` and `vpmud version`: the side of whoever asks.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use super::SOCKET;
use super::wire::{Ask, Outcome, Say, Version};

use crate::output::Output;

/// How long the new daemon may take until it serves.
const SERVES: Duration = Duration::from_secs(60);
/// How often it is looked for.
const LOOK: Duration = Duration::from_millis(20);
/// Bound on each answer while machines move; each move has shorter bounds of its own.
const ANSWER: Duration = Duration::from_secs(300);

/// Moves all machines of a running vpmud to a new binary, then the vpmud itself. Machines keep running; the API refuses
/// clients for a moment while the daemon is replaced: try again.
#[derive(Debug, clap::Args)]
pub struct UpgradeArgs {
    /// The new vpmud.
    #[arg(long, value_name = "PATH")]
    binary: PathBuf,
    /// State directory of the vpmud that runs.
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    /// How to show what happens.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Says what this binary is and speaks.
#[derive(Debug, clap::Args)]
pub struct VersionArgs {
    /// How.
    #[arg(long, value_enum, default_value = "text")]
    output: Output,
}

/// Runs `vpmud version`.
pub fn version(args: &VersionArgs) -> ExitCode {
    let own = Version::own();
    match args.output {
        Output::Json => println!("{}", serde_json::json!(own)),
        Output::Text => println!(
            "vpmud {} (worker protocol {}, peer protocol {}, store {}, machine state {})",
            own.version, own.worker_protocol, own.peer_protocol, own.store, own.state
        ),
    }
    ExitCode::SUCCESS
}

/// Runs `vpmud upgrade`.
pub fn main(args: &UpgradeArgs) -> ExitCode {
    match upgrade(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            if args.output == Output::Json {
                println!("{}", serde_json::json!({ "say": "failed", "message": error.to_string() }));
            }
            eprintln!("vpmud upgrade: {error}");
            ExitCode::FAILURE
        }
    }
}

fn upgrade(args: &UpgradeArgs) -> anyhow::Result<()> {
    let socket = args.state_dir.join(SOCKET);
    let binary = std::fs::canonicalize(&args.binary)
        .map_err(|e| anyhow::anyhow!("--binary {}: {e}", args.binary.display()))?;
    let Say::Hello { term: before, .. } = hello(&socket)
        .map_err(|e| anyhow::anyhow!("no vpmud answers at {}: {e}; is it running?", socket.display()))?
    else {
        anyhow::bail!("the daemon does not say who it is");
    };
    let mut stayed = 0;
    let mut switching = false;
    for said in ask(&socket, &Ask::Upgrade { binary: binary.clone() })? {
        let said = said?;
        show(args.output, &said);
        match said {
            Say::Machine { outcome: Outcome::Stayed { .. }, .. } => stayed += 1,
            Say::Switching => {
                switching = true;
                break;
            }
            Say::Refused { reason, message } => anyhow::bail!("[{reason}] {message}"),
            Say::Machine { .. } | Say::Hello { .. } => {}
        }
    }
    anyhow::ensure!(switching, "the daemon ended in the middle; start it again: its machines go on");
    let begin = Instant::now();
    let now = loop {
        match hello(&socket) {
            Ok(now @ Say::Hello { term, .. }) if term > before => break now,
            _ => anyhow::ensure!(
                begin.elapsed() < SERVES,
                "the new daemon does not serve after {} s; look at its log. The machines go on; start either binary",
                SERVES.as_secs()
            ),
        }
        std::thread::sleep(LOOK);
    };
    show(args.output, &now);
    if let Say::Hello { binary: serving, .. } = now {
        anyhow::ensure!(
            serving == binary,
            "{} did not come to serve and {} serves again; look at its log",
            binary.display(),
            serving.display()
        );
    }
    anyhow::ensure!(
        stayed == 0,
        "{stayed} machines stay on workers of the old binary; upgrade again for them"
    );
    Ok(())
}

fn hello(socket: &Path) -> anyhow::Result<Say> {
    ask(socket, &Ask::Hello)?.next().unwrap_or_else(|| Err(anyhow::anyhow!("it says nothing")))
}

fn ask(socket: &Path, what: &Ask) -> anyhow::Result<impl Iterator<Item = anyhow::Result<Say>>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(ANSWER))?;
    writeln!(stream, "{}", serde_json::to_string(what)?)?;
    Ok(BufReader::new(stream).lines().map(|line| Ok(serde_json::from_str(&line?)?)))
}

fn show(output: Output, said: &Say) {
    if output == Output::Json {
        println!("{}", serde_json::json!(said));
        return;
    }
    match said {
        Say::Machine { name, outcome: Outcome::Moved { pid, blackout_us, total_us } } => println!(
            "{name}: moved to process {pid}, stood still for {}.{:01} ms of {} ms",
            blackout_us / 1000,
            blackout_us % 1000 / 100,
            total_us / 1000
        ),
        Say::Machine { name, outcome: Outcome::Idle } => println!("{name}: does not run"),
        Say::Machine { name, outcome: Outcome::Stayed { reason, message, .. } } => {
            println!("{name}: STAYS on its worker [{reason}]: {message}");
        }
        Say::Switching => println!("the daemon is being replaced"),
        Say::Hello { version, pid, .. } => println!("vpmud {} serves as process {pid}", version.version),
        Say::Refused { .. } => {}
    }
}
