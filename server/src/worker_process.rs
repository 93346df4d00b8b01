//! One worker as a process: its connection, its end, and the proof that it has ended. [`Processes`] makes and finds them.
//!
//! Invariants: signals go through a pidfd, never to a number that may have been given to another process; a worker that this
//! process started, and that is neither kept ([`WorkerProcess::keep`]) nor ended, is killed when the last holder drops it;
//! one that it found lives on. It is waited for through its pidfd, so that an adopted worker, which is no child of this
//! process, is watched in the same way.

mod claim;
mod console_file;
mod departing;
mod factory;
mod vm_fd;

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustix::process::{Signal, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use vpmu_proto::worker::{ConsoleState, GuestEnd};

use crate::config::MAX_SOCKET_PATH;

pub use console_file::sweep as sweep_consoles;
pub use departing::Departing;
pub use factory::{Found, Processes, Seen};

/// How long a worker may take to end in order.
const TERM: Duration = Duration::from_secs(10);
/// How long a spare worker may take until it is ready.
pub(crate) const READY: Duration = Duration::from_secs(20);
/// How long the kernel may take to end one that was killed.
const KILL: Duration = Duration::from_secs(10);

/// Signals, and how long the process may take to end after each.
type Steps = &'static [(Signal, Duration)];
const END: Steps = &[(Signal::TERM, TERM), (Signal::KILL, KILL)];
const RELEASE: Steps = &[(Signal::KILL, KILL)];

/// A worker's process.
pub struct WorkerProcess {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// None if it was adopted.
    child: Mutex<Option<Child>>,
    dir: Mutex<PathBuf>,
    /// Until that is the machine's, for one that was a spare.
    claim: tokio::sync::Mutex<Option<claim::Claim>>,
    /// That very directory, under whatever name: its own name another worker's may have by now.
    home: Option<File>,
    /// Where it listens; a spare's moves when it is claimed, and connections made before that are made anew there.
    socket: Arc<Mutex<PathBuf>>,
    sandbox: String,
    /// It runs the binary that this process runs.
    own_binary: bool,
    /// The worker ends if this breaks before it has a machine: it was a spare.
    lifeline: Mutex<Option<OwnedFd>>,
    /// Puts it into its cgroup.
    placing: Mutex<Option<tokio::task::JoinHandle<()>>>,
    settled: AtomicBool,
    /// The console of one that has ended.
    last: Mutex<Option<Box<ConsoleState>>>,
    /// Its VM, from when it is to end until it has.
    vm: Mutex<Option<vm_fd::VmFd>>,
    /// Held while it is being ended; whether SIGKILL was in vain.
    ending: tokio::sync::Mutex<bool>,
}

impl WorkerProcess {
    fn new(
        pid: u32,
        pidfd: OwnedFd,
        child: Option<Child>,
        dir: PathBuf,
        socket: PathBuf,
    ) -> io::Result<Self> {
        // Sound here: the descriptor is owned, never swapped, and closed only after it was taken out of the poller.
        #[expect(deprecated, reason = "its successor is unsafe, and an OwnedFd keeps its promise")]
        let pidfd = match AsyncFd::with_interest(pidfd, Interest::READABLE) {
            Ok(pidfd) => pidfd,
            Err(error) => {
                // Nobody would know of it.
                if let Some(mut child) = child {
                    drop(child.kill());
                    drop(child.wait());
                }
                return Err(error);
            }
        };
        let (child, settled, ending) =
            (Mutex::new(child), AtomicBool::new(false), tokio::sync::Mutex::default());
        let (placing, lifeline, last) = (Mutex::new(None), Mutex::new(None), Mutex::new(None));
        let (vm, claim) = (Mutex::new(None), tokio::sync::Mutex::default());
        let sandbox = std::fs::read_to_string(dir.join("sandbox")).unwrap_or_default();
        let sandbox = crate::status::clip(&sandbox, 256);
        let home = File::open(&dir).ok();
        let (socket, dir) = (Arc::new(Mutex::new(socket)), Mutex::new(dir));
        Ok(Self {
            pid,
            pidfd,
            child,
            dir,
            claim,
            home,
            socket,
            sandbox,
            own_binary: false,
            lifeline,
            placing,
            settled,
            last,
            vm,
            ending,
        })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it is known to run the binary that this process runs, and to understand all that this process says.
    pub fn is_of_own_binary(&self) -> bool {
        self.own_binary
    }

    /// How it was confined when it was started.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// Its runtime directory.
    fn dir(&self) -> PathBuf {
        self.dir.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether it has not ended, as far as can be seen now.
    pub fn is_running(&self) -> bool {
        let fd = self.pidfd.get_ref().as_fd();
        let mut fds = [rustix::event::PollFd::new(&fd, rustix::event::PollFlags::IN)];
        let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
        matches!(rustix::event::poll(&mut fds, Some(&now)), Ok(0))
    }

    /// A connection, made when it is first used.
    pub fn connect(&self) -> Channel {
        let socket = Arc::clone(&self.socket);
        let connect = tower::service_fn(move |_: Uri| {
            let socket = socket.lock().unwrap_or_else(PoisonError::into_inner).clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        // The address is never looked up: the connector ignores it.
        Endpoint::from_static("http://worker.invalid").connect_with_connector_lazy(connect)
    }

    /// Returns once the process has ended.
    pub async fn exited(&self) {
        // A pidfd is readable from the end of its process on. One that cannot be polled proves nothing.
        if let Err(error) = self.pidfd.readable().await {
            tracing::error!(pid = self.pid, %error, "a worker's process cannot be watched");
            std::future::pending::<()>().await;
        }
    }

    /// How its guest ended, if it had before the process did. Blocks.
    pub fn guest_end(&self) -> Option<GuestEnd> {
        vcpu_worker::process::exit_record(&self.dir())
    }

    /// What its guest printed last, also when it has ended. Blocks.
    pub fn last_output(&self) -> Option<ConsoleState> {
        let kept = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        kept.map(|kept| *kept).or_else(|| console_file::read(&self.dir()))
    }

    /// It lives on when this is dropped.
    pub fn keep(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// It is about to be told to end: nobody waits for the kernel to take its VM apart.
    pub fn will_end(&self) {
        let mut vm = self.vm.lock().unwrap_or_else(PoisonError::into_inner);
        if vm.is_none() {
            *vm = vm_fd::VmFd::of(self.pid, self.pidfd.get_ref().as_fd());
        }
    }

    /// Ends the process, in order if it lets itself, and removes its runtime directory. Says whether it is seen to have
    /// ended.
    pub async fn end(&self) -> bool {
        self.end_by(END).await
    }

    /// The same at once, of one whose machine is another's for good: it has nothing to put in order, and its console went
    /// with the machine.
    pub async fn release(&self) -> bool {
        self.end_by(RELEASE).await
    }

    async fn end_by(&self, steps: Steps) -> bool {
        let mut in_vain = self.ending.lock().await;
        if self.settled.load(Ordering::Acquire) {
            // The directory may be another worker's by now.
            return !self.is_running();
        }
        // One that SIGKILL has not ended can only be waited for.
        if *in_vain && self.is_running() {
            return false;
        }
        self.will_end();
        let mut ended = false;
        for &(signal, within) in steps {
            if signal == Signal::KILL && steps == END {
                tracing::warn!(pid = self.pid, "a worker does not end: SIGKILL");
            }
            self.signal(signal);
            ended = tokio::time::timeout(within, self.exited()).await.is_ok();
            if ended {
                break;
            }
        }
        if !ended {
            // The directory stays: it is what shows that this one may still live.
            tracing::error!(pid = self.pid, "the kernel does not end a worker");
            *in_vain = true;
            return false;
        }
        self.settled.store(true, Ordering::Release);
        drop(self.vm.lock().unwrap_or_else(PoisonError::into_inner).take());
        self.reap();
        let placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(placing) = placing {
            // It writes into the directory that is removed now.
            drop(placing.await);
        }
        // Where it was, if not where it was to be.
        drop(self.claimed().await);
        if !self.is_at_home() {
            return true;
        }
        let (dir, released) = (self.dir(), steps == RELEASE);
        // A cgroup may need a moment until it can be removed.
        let cleared = tokio::task::spawn_blocking(move || {
            let last = if released { None } else { console_file::read(&dir) };
            clear(&dir);
            last
        });
        let last = cleared.await.unwrap_or_default();
        if !released {
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = last.map(Box::new);
        }
        true
    }

    /// Whether the directory is still the one that it was given: somebody who ended it may have made room for the next.
    fn is_at_home(&self) -> bool {
        self.home.as_ref().is_none_or(|home| home.metadata().is_ok_and(|known| known.nlink() > 0))
    }

    /// It has ended and nobody knew it: removes what it left.
    pub fn bury(&self) {
        self.settled.store(true, Ordering::Release);
        self.reap();
        if self.is_at_home() {
            clear(&self.dir());
        }
    }

    fn signal(&self, signal: Signal) {
        match pidfd_send_signal(self.pidfd.get_ref(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(error) => tracing::error!(pid = self.pid, ?signal, %error, "a worker cannot be signalled"),
        }
    }

    /// The process has ended: this does not wait.
    fn reap(&self) {
        if let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            drop(child.wait());
        } else {
            // An adopted one is a child where this process is the one that started it, before an upgrade.
            use rustix::process::{WaitId, WaitIdOptions, waitid};
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
            // Else it is no child, and whoever has it for one waits for it.
            let _ = waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options);
        }
    }

    /// The end of its log, for one that has ended early.
    pub fn last_words(&self) -> String {
        let log = std::fs::read(self.dir().join("log")).unwrap_or_default();
        let tail = log.get(log.len().saturating_sub(512)..).unwrap_or_default();
        format!("the end of its log: {}", crate::status::clip(&String::from_utf8_lossy(tail), 512))
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if self.settled.load(Ordering::Acquire) {
            return;
        }
        // One that was found may hold a machine that runs: a start that fails, whatever for, ends none. The next daemon
        // finds it again.
        let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() else {
            return;
        };
        self.signal(Signal::KILL);
        // Takes as long as the kernel needs to free a VM. The directory tells the next start that it is dead.
        drop(std::thread::Builder::new().name("reap".to_owned()).spawn(move || child.wait()));
    }
}

/// Where the worker of a directory listens.
fn socket_of(dir: &Path) -> PathBuf {
    let named = std::fs::read_to_string(dir.join("socket")).ok().filter(|s| s.len() <= MAX_SOCKET_PATH);
    named.map_or_else(|| dir.join("worker.sock"), PathBuf::from)
}

/// A path that the kernel takes: in the directory, or, recorded there, in a directory of its own under the temporary one.
fn choose_socket(dir: &Path) -> io::Result<PathBuf> {
    let socket = dir.join("worker.sock");
    if socket.as_os_str().len() <= MAX_SOCKET_PATH {
        return Ok(socket);
    }
    let short =
        std::env::temp_dir().join(format!("vpmud-{}", &uuid::Uuid::new_v4().simple().to_string()[..16]));
    let socket = short.join("s");
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(io::Error::other(format!(
            "{} is too long for a socket; set TMPDIR to a shorter path",
            socket.display()
        )));
    }
    let text =
        socket.to_str().ok_or_else(|| io::Error::other("the temporary directory's path is not UTF-8"))?;
    std::fs::write(dir.join("socket"), text)?;
    // Fails if it exists: nobody else's directory is used.
    DirBuilder::new().mode(0o700).create(&short)?;
    Ok(socket)
}

fn clear(dir: &Path) {
    crate::cgroup::remove(dir);
    console_file::remove(dir);
    let socket = socket_of(dir);
    if !socket.starts_with(dir) {
        drop(std::fs::remove_file(&socket));
        // Only if it is empty.
        drop(socket.parent().map(std::fs::remove_dir));
    }
    match std::fs::remove_dir_all(dir) {
        Ok(()) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(dir = %dir.display(), %error, "a runtime directory cannot be removed"),
    }
}

#[cfg(test)]
mod tests;
