//! One worker as a process: its runtime directory, its start, its end, and the proof that it has ended.
//!
//! Invariants: signals go through a pidfd, never to a number that may have been given to another process; a directory
//! is used for a new worker only after the process that its pid file names is proven dead; a worker that is neither
//! kept ([`WorkerProcess::keep`]) nor ended is killed when the last holder drops it. It is waited for through its pidfd, so
//! that an adopted worker, which is no child of this process, is watched in the same way.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use vcpu_worker::process::Identity;
use vpmu_proto::worker::GuestEnd;

use crate::config::MAX_SOCKET_PATH;
use crate::spare::{PREFIX, Spare, Spares};

/// How long a worker may take to end in order.
const TERM: Duration = Duration::from_secs(10);
/// How long a spare worker may take until it is ready.
pub(crate) const READY: Duration = Duration::from_secs(20);
/// How long the kernel may take to end one that was killed.
const KILL: Duration = Duration::from_secs(10);

/// How worker processes are made on this host.
#[derive(Debug)]
pub struct Processes {
    /// Runtime directories, one a machine's uid.
    pub run_dir: PathBuf,
    /// Host cores that vCPUs may use.
    pub cores: Vec<u32>,
    /// The host's PMU, or its model.
    pub model_pmu: String,
    /// "model", "msr" or "kvm".
    pub pmu_mode: &'static str,
    /// New workers are processes; those that exist are looked after in any case.
    pub enabled: bool,
    /// They end with the daemon.
    pub stop_vms: bool,
    /// What a forbidden system call leads to.
    pub seccomp: vcpu_worker::sandbox::Mode,
    /// For tests: threads of this kind make a forbidden call.
    pub violate: Option<vcpu_worker::sandbox::Kind>,
    /// Where workers get cgroups of their own.
    pub cgroups: Arc<crate::cgroup::Cgroups>,
    /// Binary of new workers, which are processes then in any case; none: this process's own.
    pub image: Mutex<Option<PathBuf>>,
    /// Workers that wait for a machine.
    pub spares: Spares,
}

/// What a runtime directory of an earlier run shows.
pub enum Found {
    /// A process that lives.
    Live(WorkerProcess),
    /// It has died; how its guest had ended before, if it had.
    Dead(Option<GuestEnd>),
    /// Nothing that says anything: no worker had started there, or the machine was booted since.
    Nothing,
}

/// A worker's process.
pub struct WorkerProcess {
    pid: u32,
    pidfd: AsyncFd<OwnedFd>,
    /// None if it was adopted.
    child: Mutex<Option<Child>>,
    dir: PathBuf,
    socket: PathBuf,
    sandbox: String,
    /// The worker ends if this breaks before it has a machine: it was a spare.
    lifeline: Mutex<Option<OwnedFd>>,
    /// Puts it into its cgroup.
    placing: Mutex<Option<tokio::task::JoinHandle<()>>>,
    settled: AtomicBool,
    ending: tokio::sync::Mutex<()>,
}

impl Processes {
    /// Those of a vpmud that does not run: to look at what it left, not to start any.
    pub fn of_stopped(run_dir: PathBuf) -> Self {
        Self {
            run_dir,
            cores: Vec::new(),
            model_pmu: String::new(),
            pmu_mode: "model",
            enabled: false,
            stop_vms: false,
            seccomp: vcpu_worker::sandbox::Mode::Enforce,
            violate: None,
            cgroups: Arc::default(),
            image: Mutex::default(),
            spares: Spares::default(),
        }
    }

    /// Sets the binary of new workers: an upgrade is under way.
    pub fn set_image(&self, image: Option<PathBuf>) {
        *self.image.lock().unwrap_or_else(PoisonError::into_inner) = image;
    }

    fn image(&self) -> Option<PathBuf> {
        self.image.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether new workers are processes.
    pub fn isolated(&self) -> bool {
        self.enabled || self.image().is_some()
    }

    /// Runtime directories of one machine: `UID`, and `UID.INCARNATION` for a worker that was made beside another.
    fn names_of(&self, uid: &str) -> io::Result<Vec<String>> {
        let mut names = self.uids()?;
        names.retain(|name| name.split('.').next() == Some(uid));
        Ok(names)
    }

    /// Names of runtime directories: uids, and those of [`Self::start_beside`].
    pub fn uids(&self) -> io::Result<Vec<String>> {
        match std::fs::read_dir(&self.run_dir) {
            Ok(entries) => entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Looks at a runtime directory. Must be called on a runtime.
    pub fn find(&self, uid: &str) -> io::Result<Found> {
        let dir = self.run_dir.join(uid);
        let Some(identity) = Identity::read(&dir) else { return Ok(Found::Nothing) };
        if Identity::of(std::process::id())?.boot_id != identity.boot_id {
            return Ok(Found::Nothing);
        }
        let end = || Found::Dead(vcpu_worker::process::exit_record(&dir));
        let Some(pid) = identity.pid.try_into().ok().and_then(Pid::from_raw) else { return Ok(end()) };
        // Opened first: what is read afterwards is about the process that it holds, or that process is gone.
        let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(end()),
            Err(error) => return Err(error.into()),
        };
        if Identity::of(identity.pid).ok().as_ref() != Some(&identity) {
            return Ok(end());
        }
        let socket = socket_of(&dir);
        let process = WorkerProcess::new(identity.pid, pidfd, None, dir, socket)?;
        Ok(Found::Live(process))
    }

    /// Removes what a dead worker left.
    pub fn clear(&self, uid: &str) {
        clear(&self.run_dir.join(uid));
    }

    /// Ends a worker that nobody holds, if there is one.
    pub async fn end_unheld(&self, uid: &str) -> io::Result<()> {
        for name in self.names_of(uid)? {
            if let Found::Live(old) = self.find(&name)? {
                tracing::warn!(uid, pid = old.pid, "a worker that nobody holds is ended");
                old.end().await;
            }
            self.clear(&name);
        }
        Ok(())
    }

    /// Starts a worker for a machine that has none, or takes a spare one, and connects to it.
    pub async fn start(self: &Arc<Self>, uid: &str, name: &str) -> io::Result<(Channel, WorkerProcess)> {
        self.end_unheld(uid).await?;
        let spare = if self.image().is_none() { self.spares.take() } else { None };
        let started = match spare {
            Some(spare) => spare.process.claim(&self.run_dir.join(uid), spare.lifeline),
            None => self.start_in(uid, name),
        };
        self.refill();
        started
    }

    /// A worker that waits for a machine. Blocks.
    pub(crate) fn make_spare(&self) -> io::Result<Spare> {
        let id = uuid::Uuid::new_v4().to_string();
        let dir = format!("{PREFIX}{}", &id[PREFIX.len()..]);
        let (broken, lifeline) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)?;
        let (process, dir) = self.make(&dir, PREFIX, Some(broken))?;
        // Before that file is there the directory must not be renamed.
        let until = std::time::Instant::now() + READY;
        while Identity::read(&dir).is_none() {
            if std::time::Instant::now() > until || !process.is_running() {
                let words = process.last_words();
                drop(process);
                clear(&dir);
                return Err(io::Error::other(format!("a spare worker does not get ready; {words}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        self.cgroups.place(&dir.file_name().unwrap_or_default().to_string_lossy(), process.pid, &dir);
        Ok(Spare { process, lifeline })
    }

    /// Starts a worker for a machine that has one already, in the runtime directory `UID.INCARNATION`.
    pub async fn start_beside(
        &self,
        uid: &str,
        incarnation: u64,
        name: &str,
    ) -> io::Result<(Channel, WorkerProcess)> {
        let dir = format!("{uid}.{incarnation}");
        if let Found::Live(old) = self.find(&dir)? {
            old.end().await;
        }
        self.clear(&dir);
        self.start_in(&dir, name)
    }

    fn start_in(&self, uid: &str, name: &str) -> io::Result<(Channel, WorkerProcess)> {
        let (process, dir) = self.make(uid, name, None)?;
        let placing = tokio::task::spawn_blocking({
            let (cgroups, uid, pid) = (Arc::clone(&self.cgroups), uid.to_owned(), process.pid);
            move || cgroups.place(&uid, pid, &dir)
        });
        *process.placing.lock().unwrap_or_else(PoisonError::into_inner) = Some(placing);
        Ok((process.connect(), process))
    }

    /// A process and its runtime directory.
    fn make(&self, uid: &str, name: &str, lifeline: Option<OwnedFd>) -> io::Result<(WorkerProcess, PathBuf)> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.run_dir)?;
        let dir = self.run_dir.join(uid);
        DirBuilder::new().mode(0o700).create(&dir)?;
        let made = choose_socket(&dir).and_then(|socket| self.spawn(&dir, &socket, name, lifeline));
        match made {
            Ok(process) => Ok((process, dir)),
            Err(error) => {
                clear(&dir);
                Err(error)
            }
        }
    }

    /// The worker gets its listener as standard input: what is sent to it waits there until it is ready, and nobody has
    /// to look when that is. One that gets a lifeline, as standard output, is a spare.
    fn spawn(
        &self,
        dir: &Path,
        socket: &Path,
        name: &str,
        lifeline: Option<OwnedFd>,
    ) -> io::Result<WorkerProcess> {
        let listener = std::os::unix::net::UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        let log = File::create(dir.join("log"))?;
        let sandbox = format!("seccomp={} cgroup={}", self.seccomp.as_str(), self.cgroups.describe());
        std::fs::write(dir.join("sandbox"), sandbox)?;
        let cores: Vec<_> = self.cores.iter().map(ToString::to_string).collect();
        let violate = self.violate.and_then(|kind| clap::ValueEnum::to_possible_value(&kind));
        // The running image itself, also when the file has been replaced by an upgrade.
        let mut command = Command::new(self.image().unwrap_or_else(|| PathBuf::from("/proc/self/exe")));
        command
            .env_remove(crate::upgrade::CAME_FROM)
            .arg0("vpmud")
            .arg("worker")
            .arg("--socket")
            .arg(socket)
            .arg("--listen-stdin")
            .arg("--runtime-dir")
            .arg(dir)
            .arg(format!("--name={name}"))
            .args(["--cores", &cores.join(","), "--model-pmu", &self.model_pmu])
            .args(["--pmu-mode", self.pmu_mode])
            .args(["--seccomp", self.seccomp.as_str()])
            .args(violate.map(|kind| format!("--violate={}", kind.get_name())))
            .args(lifeline.is_some().then_some("--spare"))
            .stdin(Stdio::from(OwnedFd::from(listener)))
            .stdout(lifeline.map_or_else(Stdio::null, Stdio::from))
            .stderr(log);
        let mut child = command.spawn()?;
        let pidfd = child.id().try_into().ok().and_then(Pid::from_raw).ok_or(rustix::io::Errno::SRCH);
        match pidfd.and_then(|pid| pidfd_open(pid, PidfdFlags::empty())) {
            Ok(pidfd) => {
                WorkerProcess::new(child.id(), pidfd, Some(child), dir.to_owned(), socket.to_owned())
            }
            Err(error) => {
                // A child that is not waited for keeps its number: this cannot hit another.
                drop(child.kill());
                drop(child.wait());
                Err(error.into())
            }
        }
    }
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
        let pidfd = AsyncFd::with_interest(pidfd, Interest::READABLE)?;
        let (child, settled, ending) =
            (Mutex::new(child), AtomicBool::new(false), tokio::sync::Mutex::default());
        let (placing, lifeline) = (Mutex::new(None), Mutex::new(None));
        let sandbox = std::fs::read_to_string(dir.join("sandbox")).unwrap_or_default();
        let sandbox = crate::status::clip(&sandbox, 256);
        Ok(Self { pid, pidfd, child, dir, socket, sandbox, lifeline, placing, settled, ending })
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// How it was confined when it was started.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// Makes a spare the worker of the machine whose runtime directory this is to be. It ends by itself if this process
    /// does before [`Self::has_machine`].
    fn claim(mut self, dir: &Path, lifeline: OwnedFd) -> io::Result<(Channel, Self)> {
        let renamed = std::fs::rename(&self.dir, dir);
        if let Err(error) = renamed {
            let old = self.dir.clone();
            drop(self);
            clear(&old);
            return Err(error);
        }
        dir.clone_into(&mut self.dir);
        self.socket = socket_of(dir);
        *self.lifeline.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(lifeline);
        Ok((self.connect(), self))
    }

    /// It has its machine: from now on it outlives this process.
    pub fn has_machine(&self) {
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner).take();
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
        let socket: Arc<Path> = Arc::from(self.socket.as_path());
        let connect = tower::service_fn(move |_: Uri| {
            let socket = Arc::clone(&socket);
            async move { UnixStream::connect(&*socket).await.map(TokioIo::new) }
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

    /// How its guest ended, if it had before the process did.
    pub fn guest_end(&self) -> Option<GuestEnd> {
        vcpu_worker::process::exit_record(&self.dir)
    }

    /// It lives on when this is dropped.
    pub fn keep(&self) {
        self.settled.store(true, Ordering::Release);
    }

    /// Ends the process, in order if it lets itself, and removes its runtime directory.
    pub async fn end(&self) {
        let _ending = self.ending.lock().await;
        if self.settled.load(Ordering::Acquire) {
            // The directory may be another worker's by now.
            return;
        }
        self.signal(Signal::TERM);
        if tokio::time::timeout(TERM, self.exited()).await.is_err() {
            tracing::warn!(pid = self.pid, "a worker does not end: SIGKILL");
            self.signal(Signal::KILL);
            if tokio::time::timeout(KILL, self.exited()).await.is_err() {
                // The directory stays: it is what shows that this one may still live.
                tracing::error!(pid = self.pid, "the kernel does not end a worker");
                return;
            }
        }
        self.settled.store(true, Ordering::Release);
        self.reap();
        let placing = self.placing.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(placing) = placing {
            // It writes into the directory that is removed now.
            drop(placing.await);
        }
        clear(&self.dir);
    }

    /// It has ended and nobody knew it: removes what it left.
    pub fn bury(&self) {
        self.settled.store(true, Ordering::Release);
        self.reap();
        clear(&self.dir);
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
        let log = std::fs::read(self.dir.join("log")).unwrap_or_default();
        let tail = log.get(log.len().saturating_sub(512)..).unwrap_or_default();
        format!("the end of its log: {}", crate::status::clip(&String::from_utf8_lossy(tail), 512))
    }
}

impl Drop for WorkerProcess {
    fn drop(&mut self) {
        if self.settled.load(Ordering::Acquire) {
            return;
        }
        self.signal(Signal::KILL);
        if let Some(mut child) = self.child.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Takes as long as the kernel needs to free a VM. The directory tells the next start that it is dead.
            drop(std::thread::Builder::new().name("reap".to_owned()).spawn(move || child.wait()));
        }
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
