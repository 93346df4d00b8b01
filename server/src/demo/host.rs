//! One host of the demo: a `vpmud serve` process of its own.
//!
//! The child ends with us on every path: it is told to end when its standard input closes, which the kernel does for us
//! even at SIGKILL; it is in a process group of its own, so that Ctrl-C reaches us and not it.

use super::error::{DemoError, Step as _};
use rustix::process::{Pid, Signal, kill_process};
use serde::Deserialize;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use vpmu_client::{Client, Endpoint};

/// From exec to the ready line. Generous: a debug build on a busy machine.
const READY: Duration = Duration::from_secs(30);
/// From SIGTERM to the end.
const END: Duration = Duration::from_secs(15);

/// A running host.
#[derive(Debug)]
pub(crate) struct Host {
    name: &'static str,
    child: Child,
    log: PathBuf,
    /// The host's API.
    pub(crate) client: Client,
    /// Where other hosts reach it.
    pub(crate) peer: Endpoint,
}

/// The first line that `vpmud serve` prints.
#[derive(Deserialize)]
struct Ready {
    ready: bool,
}

impl Host {
    /// Starts host `name` in `directory` and waits until it serves. A second start finds the first one's state.
    pub(super) async fn start(
        name: &'static str,
        directory: &Path,
        hypervisor: &str,
    ) -> Result<Self, DemoError> {
        let peer = Endpoint::unix(&directory.join(format!("{name}-peer.sock")))?;
        // They end with their machines, whatever the default.
        Self::start_with(name, directory, hypervisor, peer, &["--isolation", "thread"]).await
    }

    /// [`Self::start`] with a peer listener of the caller's choice and more options of `vpmud serve`.
    pub(crate) async fn start_with(
        name: &'static str,
        directory: &Path,
        hypervisor: &str,
        peer: Endpoint,
        options: &[&str],
    ) -> Result<Self, DemoError> {
        let api = Endpoint::unix(&directory.join(format!("{name}.sock")))?;
        let log = directory.join(format!("{name}.log"));
        let log_file = File::options()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(|error| DemoError::io(format!("open {}", log.display()), error))?;
        let program =
            std::env::current_exe().map_err(|error| DemoError::io("find this program's own file", error))?;
        let mut child = Command::new(program)
            .arg("serve")
            .arg("--state-dir")
            .arg(directory.join(name))
            .args(["--listen", &api.to_string(), "--peer-listen", &peer.to_string()])
            .args(["--hypervisor", hypervisor, "--exit-with-parent"])
            // The two stand for two machines: memory is copied between them.
            .args(["--local-migration", "asked"])
            .args(options)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log_file)
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| DemoError::io("start vpmud serve", error))?;
        let not_ready = |problem: String| DemoError::NotReady { host: name, problem };
        let stdout = child.stdout.take().ok_or_else(|| not_ready("it has no standard output".to_owned()))?;
        let mut lines = BufReader::new(stdout).lines();
        let line = tokio::time::timeout(READY, lines.next_line())
            .await
            .map_err(|_| not_ready(format!("no ready line within {} s", READY.as_secs())))?
            .map_err(|error| not_ready(error.to_string()))?
            .ok_or_else(|| {
                not_ready(format!("it ended; its log says: {}", tail(&log, 3).replace('\n', " | ")))
            })?;
        if !serde_json::from_str::<Ready>(&line).is_ok_and(|ready| ready.ready) {
            return Err(not_ready(format!("its first line is {line:?}")));
        }
        let client = Client::connect(&api, READY).await.step("connect to a host")?;
        Ok(Self { name, child, log, client, peer })
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id().unwrap_or_default()
    }

    /// SIGKILL, as a power cut would: no clean-up of any kind on its side.
    pub(super) async fn kill(&mut self) -> Result<(), DemoError> {
        self.child.kill().await.map_err(|error| DemoError::io(format!("kill host {}", self.name), error))
    }

    /// SIGTERM, then waits for a clean end; SIGKILL for what does not end.
    pub(crate) async fn end(mut self) -> Result<(), DemoError> {
        let failed = |problem: String| DemoError::NotEnded { host: self.name, problem };
        if let Some(pid) = self.child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw) {
            kill_process(pid, Signal::TERM).map_err(|error| failed(error.to_string()))?;
        }
        match tokio::time::timeout(END, self.child.wait()).await {
            Ok(Ok(status)) if status.success() => Ok(()),
            Ok(Ok(status)) => Err(failed(status.to_string())),
            Ok(Err(error)) => Err(failed(error.to_string())),
            Err(_) => {
                // The wait after the kill reaps it.
                let _ = self.child.kill().await;
                Err(failed(format!("still there {} s after SIGTERM, killed", END.as_secs())))
            }
        }
    }

    /// The last lines of its log, on standard error.
    pub(crate) fn show_log(&self) {
        eprintln!("--- last lines of host {}'s log ---\n{}", self.name, tail(&self.log, 15));
    }
}

/// The last lines of a file.
fn tail(path: &Path, lines: usize) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
