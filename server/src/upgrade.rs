//! `vpmud upgrade`: every machine of a running daemon moves to a worker of a new binary, then the daemon becomes it.
//!
//! ```text
//! vpmud upgrade ──DIR/upgrade.sock──▶ daemon:  versions fit? ─▶ each running or paused machine: `migration::renew`
//!      ◀── one JSON line a machine ──                         ─▶ end as at SIGTERM, machines go on ─▶ exec(new binary)
//!      ◀── Hello of the next term ─── new daemon: adopts the workers, serves
//! ```
//!
//! Why this order: a machine on threads of the daemon cannot outlive its exec, so it must have a process before; and a
//! new worker that does not work is seen while the old daemon, which the machine can stay with, is still there. Why
//! exec: the process id stays, so that a service manager sees one service; the command line stays what it was. Listening
//! sockets are opened anew: a client that is refused in between (well under a second) tries again.
//!
//! Invariants: nothing is changed before the new binary has shown that it speaks this one's protocols; a machine that
//! cannot move stays on its worker and is reported, as is one whose new worker does not answer yet; if one of the former
//! is on threads of the daemon, the daemon stays too; a new binary that does not come to serve is replaced by the one
//! before, kept in `DIR/vpmud.previous` until then.

pub mod command;
pub mod wire;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use vpmu_proto::api::virtual_machine::State;

use self::wire::{Ask, Outcome, Say, Version};
use crate::config::{Address, MAX_SOCKET_PATH};
use crate::daemon::Daemon;
use crate::listen::{self, Socket, SocketFile};
use crate::status::ApiError;
use crate::vm::registry::VmHandle;

/// Where the daemon listens for it, in the state directory.
pub const SOCKET: &str = "upgrade.sock";
/// The binary that goes on if the next one does not, in the state directory.
pub const PREVIOUS: &str = "vpmud.previous";
/// Set for a daemon that came by an upgrade: where the one before is; empty if there is nothing to go back to.
pub const CAME_FROM: &str = "VPMUD_CAME_FROM";
/// Longest request in bytes.
const MAX_ASK: u64 = 8 << 10;
/// Bound on reading a request and on each answer.
const TALK: Duration = Duration::from_secs(5);
/// Bound on asking a binary for its version.
const VERSION: Duration = Duration::from_secs(10);

/// This process has come to serve: from here on an error is no reason to go back to the binary before.
static SERVES: AtomicBool = AtomicBool::new(false);

/// The daemon is ready; the binary before it is needed no longer.
pub fn serves(state_dir: &Path) {
    SERVES.store(true, Ordering::SeqCst);
    if is_successor() {
        // It may never have been written.
        let _ = std::fs::remove_file(state_dir.join(PREVIOUS));
    }
}

/// The binary before this one, if this process came by an upgrade.
pub fn came_from() -> Option<PathBuf> {
    std::env::var_os(CAME_FROM).map(PathBuf::from).filter(|path| !path.as_os_str().is_empty())
}

/// This process was another vpmud before: whoever waited for that one's ready line may be gone.
pub fn is_successor() -> bool {
    std::env::var_os(CAME_FROM).is_some()
}

/// What to go back to after an error: the binary before, if this one never came to serve.
pub fn fallback() -> Option<PathBuf> {
    came_from().filter(|path| !SERVES.load(Ordering::SeqCst) && path.exists())
}

/// Serves upgrade requests until the daemon ends. The binary to become is sent to `switch`, once.
pub async fn serve(daemon: &Arc<Daemon>, switch: mpsc::Sender<PathBuf>) {
    let path = std::path::absolute(daemon.store.dir().join(SOCKET));
    let path = path.unwrap_or_else(|_| daemon.store.dir().join(SOCKET));
    if path.as_os_str().len() > MAX_SOCKET_PATH {
        tracing::warn!(path = %path.display(), "the path is too long for a socket: vpmud upgrade cannot reach this daemon");
        return;
    }
    let listener = match listen::open(&Address::Unix(path)).await {
        Ok(listener) => listener,
        Err(error) => return tracing::warn!(%error, "vpmud upgrade cannot reach this daemon"),
    };
    let Socket::Unix(socket) = listener.socket else { return };
    let file: Option<SocketFile> = listener.file;
    let daemon = Arc::clone(daemon);
    let tasks = daemon.tasks.clone();
    tasks.spawn(async move {
        // One at a time: an upgrade that is under way is not disturbed by another.
        loop {
            let stream = tokio::select! {
                () = daemon.shutdown.cancelled() => break,
                stream = socket.accept() => stream,
            };
            let Ok((stream, _)) = stream else { continue };
            if let Some(image) = Box::pin(talk(&daemon, stream)).await
                && switch.send(image).await.is_err()
            {
                break;
            }
        }
        drop(file);
    });
}

/// One connection; the binary to become, if that is what comes of it.
async fn talk(daemon: &Arc<Daemon>, stream: UnixStream) -> Option<PathBuf> {
    let own = rustix::process::geteuid().as_raw();
    if !stream.peer_cred().is_ok_and(|peer| peer.uid() == own || peer.uid() == 0) {
        return None;
    }
    let (from, to) = stream.into_split();
    let mut say = Speaker(to);
    let mut line = String::new();
    let mut from = BufReader::new(from.take(MAX_ASK));
    tokio::time::timeout(TALK, from.read_line(&mut line)).await.ok()?.ok()?;
    match serde_json::from_str(&line) {
        Ok(Ask::Hello) => {
            say.say(&hello(daemon)).await;
            None
        }
        Ok(Ask::Upgrade { binary }) => match upgrade(daemon, &binary, &mut say).await {
            Ok(image) => {
                say.say(&Say::Switching).await;
                Some(image)
            }
            Err(error) => {
                tracing::error!(%error, "the upgrade was given up");
                say.refuse(&error).await;
                None
            }
        },
        Err(error) => {
            let why = ApiError::invalid("ask", "", "BAD_REQUEST", "is not understood", &error.to_string());
            say.refuse(&why).await;
            None
        }
    }
}

struct Speaker(tokio::net::unix::OwnedWriteHalf);

impl Speaker {
    /// Whoever asked may have gone: the upgrade goes on all the same.
    async fn say(&mut self, what: &Say) {
        let Ok(mut line) = serde_json::to_string(what) else { return };
        line.push('\n');
        let _ = tokio::time::timeout(TALK, self.0.write_all(line.as_bytes())).await;
    }

    async fn refuse(&mut self, error: &ApiError) {
        self.say(&Say::Refused { reason: error.reason().to_owned(), message: error.message().to_owned() })
            .await;
    }
}

fn hello(daemon: &Daemon) -> Say {
    Say::Hello {
        version: Version::own(),
        pid: std::process::id(),
        term: daemon.store.term(),
        binary: std::env::current_exe().unwrap_or_default(),
    }
}

/// Moves the machines; the binary to become.
async fn upgrade(daemon: &Arc<Daemon>, binary: &Path, say: &mut Speaker) -> Result<PathBuf, ApiError> {
    let image = judge(binary).await?;
    tracing::info!(binary = %image.display(), "upgrading");
    keep_previous(daemon.store.dir().to_owned()).await?;
    let processes = &daemon.workers.processes;
    processes.set_image(Some(image.clone()));
    let mut bound = Vec::new();
    for handle in daemon.registry.list(None) {
        let outcome = one(daemon, &handle).await;
        if let Outcome::Stayed { pid: 0, .. } = outcome {
            bound.push(handle.name.to_string());
        }
        say.say(&Say::Machine { name: handle.name.to_string(), outcome }).await;
    }
    if let Some(first) = bound.first() {
        processes.set_image(None);
        return Err(ApiError::precondition(
            "MACHINES_STAY",
            first,
            format!(
                "{} of the machines would end with this daemon's process, {first} first, and did not move: the daemon stays; those that moved run on as processes of the new binary",
                bound.len()
            ),
        ));
    }
    // While the API is still served.
    processes.departing.gone(None).await;
    daemon.upgrading.store(true, Ordering::SeqCst);
    Ok(image)
}

async fn one(daemon: &Arc<Daemon>, handle: &VmHandle) -> Outcome {
    let view = handle.view();
    let pid = view.worker.as_ref().map_or(0, crate::worker_link::WorkerLink::pid);
    match view.state() {
        State::Running | State::Paused if view.worker.is_some() => {}
        State::Stopped | State::Failed | State::Moved => return Outcome::Idle,
        state => {
            let message = format!("it is {}; upgrade again when that is over", state.as_str_name());
            return Outcome::Stayed { pid, reason: "VM_BUSY".to_owned(), message };
        }
    }
    match Box::pin(crate::migration::renew::renew(daemon, handle)).await {
        Ok(crate::migration::renew::Renewed { pid, unheard: Some(error), .. }) => {
            tracing::error!(vm = %handle.name, pid, %error, "a machine's new worker does not answer");
            let message = format!(
                "its new worker, process {pid}, has it and does not answer; it is asked until it does, or stop the machine"
            );
            Outcome::Stayed { pid, reason: error.reason().to_owned(), message }
        }
        Ok(done) => Outcome::Moved { pid: done.pid, blackout_us: done.blackout_us, total_us: done.total_us },
        Err(error) => {
            tracing::error!(vm = %handle.name, %error, "a machine stays on its worker");
            // It may have died of it.
            let pid = handle.view().worker.as_ref().map_or(pid, crate::worker_link::WorkerLink::pid);
            Outcome::Stayed { pid, reason: error.reason().to_owned(), message: error.message().to_owned() }
        }
    }
}

/// The binary that goes on if the next does not come to serve. A copy: the file itself may be replaced at any time.
async fn keep_previous(dir: PathBuf) -> Result<(), ApiError> {
    let copied = tokio::task::spawn_blocking(move || {
        let fresh = dir.join(format!("{PREVIOUS}.new"));
        std::fs::copy("/proc/self/exe", &fresh)?;
        std::fs::rename(fresh, dir.join(PREVIOUS))
    });
    copied.await.map_err(std::io::Error::other).and_then(std::convert::identity).map_err(|e| {
        ApiError::internal("PREVIOUS_NOT_KEPT", format!("a copy of this binary cannot be kept: {e}"))
    })
}

/// Runs the new binary as far as its version, and compares.
async fn judge(binary: &Path) -> Result<PathBuf, ApiError> {
    let shown = binary.display().to_string();
    let refuse = |why: String| {
        let remedy = "give the absolute path of a vpmud of this or the next version";
        ApiError::invalid("binary", &shown, "BAD_BINARY", &why, remedy)
    };
    if !binary.is_absolute() {
        return Err(refuse("is not an absolute path".to_owned()));
    }
    let image = std::fs::canonicalize(binary).map_err(|e| refuse(format!("cannot be found: {e}")))?;
    let asked = tokio::process::Command::new(&image)
        .args(["version", "--output", "json"])
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = match tokio::time::timeout(VERSION, asked).await {
        Ok(Ok(output)) if output.status.success() => output,
        Ok(Ok(output)) => return Err(refuse(format!("does not say its version: {}", output.status))),
        Ok(Err(error)) => return Err(refuse(format!("cannot be run: {error}"))),
        Err(_) => return Err(refuse("does not say its version in time".to_owned())),
    };
    let theirs: Version = serde_json::from_slice(&output.stdout)
        .map_err(|e| refuse(format!("says a version that is not understood: {e}")))?;
    Version::own().can_become(&theirs).map_err(|why| {
        ApiError::precondition("UPGRADE_INCOMPATIBLE", &shown, format!("{shown}: {why}; upgrade by steps"))
    })?;
    Ok(image)
}
