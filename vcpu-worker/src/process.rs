//! A worker in a process of its own (isolation = process): what it does at its start and its end, and the files of its
//! runtime directory, which a later daemon reads.
//!
//! | file | written | holds |
//! |---|---|---|
//! | `worker.sock` | by the daemon, which hands it over as standard input | where it listens, mode 0600; `socket` names a shorter path if this one is too long |
//! | `pid` | by the worker, before it answers | process id, start time (field 22 of /proc/PID/stat), boot id |
//! | `exit` | by the worker, when the guest ends | how, as a `GuestEnd`: a guest that shut down unseen is Stopped, not Failed |
//! | `violation` | by the worker, when it makes a forbidden system call | which, and what thread made it; see [`crate::sandbox`] |
//! | `console` | made by the daemon, on a tmpfs (a link where the directory is on none); written by the worker | what the guest printed last; see [`crate::console`] |
//! | `log` | standard error | at most [`LOG_BYTES`] of warnings |
//!
//! Invariants: `pid` and `exit` are replaced whole; a worker that no daemon gives a VM within [`UNCLAIMED`] ends by
//! itself, and so does a spare one when its daemon is gone, and any whose directory is deleted while no daemon is connected; the directory may be renamed while the worker runs; it leads a session of its own and has no parent-death signal, so that it outlives its daemon.

mod orphan;

use std::ffi::CString;
use std::io::{self, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use prost::Message as _;
use tokio::io::AsyncReadExt as _;
use tokio::net::UnixListener;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use vpmu_proto::worker::worker_service_server::WorkerServiceServer;
use vpmu_proto::worker::{GuestEnd, guest_end};

use crate::console::Console;
use crate::cores::{Backend, HostCores};
use crate::service::{Worker, WorkerOptions};

/// Largest message either way. PMU images of 256 vCPUs fit many times over.
const MAX_MESSAGE: usize = 4 << 20;

/// Bytes of log that a worker writes at most.
pub const LOG_BYTES: u64 = 1 << 20;
/// How long a worker waits for a daemon to give it a VM.
const UNCLAIMED: Duration = Duration::from_secs(120);
/// Threads for blocking work; idle ones end.
const MAX_BLOCKING: usize = 64;
/// File in the runtime directory that the console's ring is in.
pub const CONSOLE: &str = "console";
/// Largest file that is read from a runtime directory.
const MAX_FILE: u64 = 64 * 1024;

/// Runs one virtual machine and serves vpmu.worker.v1 on a Unix socket.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Where to listen; made with mode 0600, must not exist.
    #[arg(long)]
    pub socket: PathBuf,
    /// Standard input is the listener, bound to that path already.
    #[arg(long)]
    pub listen_stdin: bool,
    /// Where to leave the process id and how the guest ended, for a later daemon.
    #[arg(long)]
    pub runtime_dir: Option<PathBuf>,
    /// Shown as the process's name.
    #[arg(long, default_value = "")]
    pub name: String,
    /// Host cores that vCPUs may be pinned to, e.g. 0,1.
    #[arg(long, value_delimiter = ',', required = true)]
    pub cores: Vec<u32>,
    /// The host's PMU, or its model.
    #[arg(long, default_value = "intel:v5:8+4:48")]
    pub model_pmu: String,
    /// Who holds the guest's PMU: model, msr or kvm.
    #[arg(long, default_value = "model")]
    pub pmu_mode: String,
    /// It waits for a machine as long as standard output, a pipe, is not closed at its other end.
    #[arg(long)]
    pub spare: bool,
    /// What a forbidden system call leads to.
    #[arg(long, value_enum, default_value = "enforce")]
    pub seccomp: crate::sandbox::Mode,
    /// For tests: a thread of this kind makes a forbidden call.
    #[arg(long, value_enum, hide = true)]
    pub violate: Option<crate::sandbox::Kind>,
}

/// Who a runtime directory belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Process id.
    pub pid: u32,
    /// Clock ticks after boot at which it started: tells it from a later process of the same id.
    pub start_time: u64,
    /// Boot that both belong to.
    pub boot_id: String,
}

impl Identity {
    /// Of a process that lives now.
    ///
    /// # Errors
    /// If there is none, or /proc cannot be read.
    pub fn of(pid: u32) -> io::Result<Self> {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name is in parentheses and may hold anything; the state, field 3, follows the last one (proc(5)).
        let fields: Vec<&str> =
            stat.rsplit_once(')').map(|(_, rest)| rest.split_whitespace().collect()).unwrap_or_default();
        if matches!(fields.first(), Some(&("Z" | "X"))) {
            return Err(io::Error::new(io::ErrorKind::NotFound, format!("process {pid} has ended")));
        }
        let start_time = fields.get(19).and_then(|field| field.parse().ok());
        let start_time =
            start_time.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat is not understood")))?;
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned();
        Ok(Self { pid, start_time, boot_id })
    }

    /// As a runtime directory tells; none if no worker has started there.
    pub fn read(dir: &Path) -> Option<Self> {
        let text = String::from_utf8(read_bounded(&dir.join("pid"))?).ok()?;
        let mut words = text.split_whitespace();
        Some(Self {
            pid: words.next()?.parse().ok().filter(|pid| *pid > 0)?,
            start_time: words.next()?.parse().ok()?,
            boot_id: words.next()?.to_owned(),
        })
    }

    fn write(&self, dir: &Path) -> io::Result<()> {
        // Of no use after a crash of the host: no sync.
        replace_unsynced(
            &dir.join("pid"),
            format!("{} {} {}\n", self.pid, self.start_time, self.boot_id).as_bytes(),
        )
    }
}

/// How the guest ended, or which forbidden call ended the worker, if its worker wrote it down.
pub fn exit_record(dir: &Path) -> Option<GuestEnd> {
    if let Some(detail) = crate::sandbox::violation(dir) {
        return Some(GuestEnd { kind: guest_end::Kind::SeccompViolation.into(), vcpu: 0, detail });
    }
    GuestEnd::decode(read_bounded(&dir.join("exit"))?.as_slice()).ok()
}

fn read_bounded(path: &Path) -> Option<Vec<u8>> {
    let known = std::fs::metadata(path).ok()?;
    if known.len() > MAX_FILE { None } else { std::fs::read(path).ok() }
}

/// Replaces a file whole: a reader sees the old bytes or the new ones.
fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let mut file = std::fs::File::create(&fresh)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)
}

fn replace_unsynced(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    std::fs::write(&fresh, bytes)?;
    std::fs::rename(&fresh, path)
}

/// The whole life of a worker's process.
///
/// # Errors
/// With what was tried and why it failed.
pub fn main(args: &Args) -> io::Result<()> {
    tracing_subscriber::fmt()
        .with_max_level(tracing::Level::WARN)
        .with_ansi(false)
        .with_writer(bounded_stderr)
        .init();
    // Fails for a process that leads a group already, as one started from a shell does.
    if let Err(error) = rustix::process::setsid() {
        tracing::debug!(%error, "no session of its own");
    }
    if let Ok(name) = CString::new(format!("vm-{}", args.name)) {
        // Cut to 15 bytes by the kernel; only shown.
        rustix::thread::set_name(&name)?;
    }
    if let Err(error) = crate::host::schedule::answer_quickly() {
        tracing::debug!(%error, "calls are answered when the guests' slices have passed");
    }
    crate::sandbox::confine(args.seccomp, args.violate, args.runtime_dir.as_deref(), args.pmu_mode == "msr")
        .map_err(|e| failed("confining", "this process", &e))?;
    // One: nothing here computes for long, and a second one would be woken in vain with most calls.
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .max_blocking_threads(MAX_BLOCKING)
        .enable_all()
        .build()?
        .block_on(serve(args))
}

fn listen(args: &Args) -> io::Result<UnixListener> {
    if args.listen_stdin {
        let socket = std::os::unix::net::UnixListener::from(rustix::io::fcntl_dupfd_cloexec(io::stdin(), 3)?);
        socket.set_nonblocking(true)?;
        return UnixListener::from_std(socket);
    }
    let listener = UnixListener::bind(&args.socket)?;
    std::fs::set_permissions(&args.socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// In the file that the daemon made for it.
fn open_console(dir: &Path) -> Console {
    match Console::in_file(&dir.join(CONSOLE)) {
        Ok(console) => console,
        Err(error) => {
            // A daemon of a former version makes none.
            if error.kind() != io::ErrorKind::NotFound {
                tracing::warn!(%error, "what the guest prints is lost if this process is killed");
            }
            Console::default()
        }
    }
}

/// The pipe that standard output is.
fn lifeline() -> io::Result<Receiver> {
    Receiver::from_owned_fd(rustix::io::fcntl_dupfd_cloexec(io::stdout(), 3)?)
}

/// Returns once nobody holds the other end.
async fn broken(mut lifeline: Receiver) {
    let mut byte = [0];
    // Nothing is ever sent.
    while matches!(lifeline.read(&mut byte).await, Ok(1..)) {}
}

async fn serve(args: &Args) -> io::Result<()> {
    let shape = args.model_pmu.parse().map_err(|e| failed("--model-pmu", &args.model_pmu, &e))?;
    let backend = Backend::named(&args.pmu_mode)
        .ok_or_else(|| failed("--pmu-mode", &args.pmu_mode, &"give model, msr or kvm"))?;
    let cores = Arc::new(HostCores::with(backend, shape, &args.cores));
    let shutdown = CancellationToken::new();
    let mut terminate = signal(SignalKind::terminate())?;
    let shown = args.socket.display().to_string();
    // Held open: a spare's directory gets another name when a machine takes it.
    let held = args.runtime_dir.as_ref().map(std::fs::File::open).transpose()?.map(Arc::new);
    let runtime_dir = held.as_ref().map(|dir| PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())));
    let listener = listen(args).map_err(|e| failed("listening on", &shown, &e))?;
    let asked = tokio::task::spawn_blocking(crate::host::features::ask);
    if args.spare {
        // Nobody waits for this process yet.
        drop(asked.await);
        let filter = args.pmu_mode != "kvm";
        let made = tokio::task::spawn_blocking(move || crate::hypervisor::kvm::prepare(filter)).await;
        if let Ok(Err(error)) = made {
            tracing::debug!(%error, "this worker's machine will be made when it is asked for");
        }
    }
    // Last: who has read it may rename the directory.
    if let (Some(dir), Some(named)) = (&runtime_dir, &args.runtime_dir) {
        Identity::of(std::process::id())?
            .write(dir)
            .map_err(|e| failed("writing the pid file in", &named.display().to_string(), &e))?;
    }
    let console = Arc::new(runtime_dir.as_deref().map_or_else(Console::default, open_console));
    let options = WorkerOptions { own_process: true, console, ..WorkerOptions::new(cores, shutdown.clone()) };
    let worker = Worker::new(options);
    let lifeline = args.spare.then(lifeline).transpose()?;
    let connections = orphan::Connections::default();
    let why = Arc::new(OnceLock::new());
    // Nobody will ask for it when nobody has, or can have, the machine.
    let console_file = runtime_dir.as_ref().and_then(|dir| std::fs::canonicalize(dir.join(CONSOLE)).ok());
    tokio::spawn({
        let (shutdown, worker, why) = (shutdown.clone(), worker.clone(), Arc::clone(&why));
        let (connections, held) = (connections.clone(), held.clone());
        async move {
            let orphaned = async {
                match &held {
                    Some(dir) => orphan::orphaned(dir, &connections, orphan::LOOK).await,
                    None => std::future::pending().await,
                }
            };
            let unclaimed = async {
                match lifeline {
                    Some(lifeline) => broken(lifeline).await,
                    None => tokio::time::sleep(UNCLAIMED).await,
                }
                if !worker.is_empty() {
                    std::future::pending::<()>().await;
                }
            };
            tokio::select! {
                _ = terminate.recv() => {}
                () = unclaimed => {
                    tracing::warn!("no daemon gave this worker a machine: ending");
                    drop(console_file.map(std::fs::remove_file));
                }
                () = orphaned => {
                    // Set once, here.
                    let _ = why.set("its runtime directory was deleted while no daemon was connected: no daemon can find it again");
                    drop(console_file.map(std::fs::remove_file));
                }
            }
            shutdown.cancel();
        }
    });
    if let Some(dir) = runtime_dir {
        let worker = worker.clone();
        tokio::spawn(async move {
            let Some(end) = worker.guest_end().await else { return };
            let written =
                tokio::task::spawn_blocking(move || replace(&dir.join("exit"), &end.encode_to_vec())).await;
            if let Err(error) = written.map_err(io::Error::other).and_then(std::convert::identity) {
                tracing::error!(%error, "how the guest ended cannot be written down");
            }
        });
    }
    let service = WorkerServiceServer::new(worker.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let ended = worker.ended();
    let incoming =
        UnixListenerStream::new(listener).map(move |made| made.map(|stream| connections.count(stream)));
    let served = tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, ended.cancelled_owned())
        .await;
    let closed = worker.close().await;
    // Else it is the daemon's, which removes it with the directory, under whatever name that has by now.
    if !args.listen_stdin {
        std::fs::remove_file(&args.socket).map_err(|e| failed("removing", &shown, &e))?;
    }
    served.map_err(|e| failed("serving", &shown, &e))?;
    closed.map_err(|e| failed("ending the VM of", &shown, &e))?;
    match why.get() {
        Some(why) => Err(failed("this worker ended", &shown, why)),
        None => Ok(()),
    }
}

fn failed(what: &str, which: &str, why: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!("{what} {which}: {why}"))
}

/// Standard error until [`LOG_BYTES`] are written, nothing afterwards: it is a file that nobody rotates.
fn bounded_stderr() -> impl Write {
    static WRITTEN: AtomicU64 = AtomicU64::new(0);
    struct Bounded;
    impl Write for Bounded {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if WRITTEN.fetch_add(bytes.len() as u64, Ordering::Relaxed) < LOG_BYTES {
                // Nobody can be told that the log is full or gone.
                drop(io::stderr().write_all(bytes));
            }
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    Bounded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_is_read_back_and_damage_is_none() {
        let dir = tempfile::tempdir().unwrap();
        let own = Identity::of(std::process::id()).unwrap();
        assert_eq!(Identity::read(dir.path()), None);
        own.write(dir.path()).unwrap();
        assert_eq!(Identity::read(dir.path()), Some(own.clone()));
        for damaged in ["", "0 1 x", "12", "a b c", "-1 2 3"] {
            std::fs::write(dir.path().join("pid"), damaged).unwrap();
            assert_eq!(Identity::read(dir.path()), None, "{damaged:?}");
        }
    }

    #[test]
    fn an_exit_record_is_read_back() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(exit_record(dir.path()), None);
        let end = GuestEnd { kind: 1, vcpu: 1, detail: "port 0x604".to_owned() };
        replace(&dir.path().join("exit"), &end.encode_to_vec()).unwrap();
        assert_eq!(exit_record(dir.path()), Some(end));
    }
}
