//! How worker processes are made, found again and cleared away: one runtime directory each.
//!
//! Invariant: a directory is used for a new worker only after the process that its pid file names is proven dead: it has ended,
//! or its first thread has and it was killed ([`super::departing`]).

use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tonic::transport::Channel;
use vcpu_worker::process::Identity;
use vpmu_proto::worker::{ConsoleState, GuestEnd};

use super::{Departing, READY, WorkerProcess, choose_socket, clear, console_file, socket_of};
use crate::spare::{PREFIX, Spare, Spares};

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
    /// Workers that are past running and have not ended yet.
    pub departing: Departing,
}

/// What a runtime directory of an earlier run shows.
pub enum Found {
    /// A process that lives.
    Live(Box<WorkerProcess>),
    /// It has died; how its guest had ended before, if it had.
    Dead(Option<GuestEnd>),
    /// Nothing that says anything: no worker had started there, or the machine was booted since.
    Nothing,
}

/// A runtime directory that was looked at.
pub struct Seen {
    /// Its name.
    pub name: String,
    /// What it shows.
    pub found: Found,
    /// What the guest of a dead worker printed last.
    pub output: Option<ConsoleState>,
}

/// Ends a worker; an error if it is not seen to have ended: its place is not free.
async fn ended(old: &WorkerProcess) -> io::Result<()> {
    if old.end().await {
        return Ok(());
    }
    Err(io::Error::other(format!(
        "its former worker, process {}, does not end; try again when it has",
        old.pid
    )))
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
            departing: Departing::default(),
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

    /// Names of runtime directories: uids, and those of [`Self::start_beside`]. Blocks.
    pub fn uids(&self) -> io::Result<Vec<String>> {
        match std::fs::read_dir(&self.run_dir) {
            Ok(entries) => entries.map(|e| Ok(e?.file_name().to_string_lossy().into_owned())).collect(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// All runtime directories that there are.
    pub async fn all(self: &Arc<Self>) -> io::Result<Vec<String>> {
        self.aside(Self::uids).await
    }

    /// What became of these workers; of the dead with what they printed last. Their directories stay until [`Self::forget`].
    pub async fn look(self: &Arc<Self>, names: Vec<String>) -> io::Result<Vec<Seen>> {
        self.aside(move |this| {
            let look = |name: String| {
                let found = this.find(&name)?;
                let output = matches!(found, Found::Dead(_)).then(|| this.last_output(&name)).flatten();
                if matches!(found, Found::Nothing) {
                    this.clear(&name);
                }
                Ok(Seen { name, found, output })
            };
            names.into_iter().map(look).collect()
        })
        .await
    }

    /// Removes what dead workers left, which is all that tells of their ends.
    pub async fn forget(self: &Arc<Self>, names: Vec<String>) {
        let cleared = self.aside(move |this| {
            for name in &names {
                this.clear(name);
            }
            Ok(())
        });
        if let Err(error) = cleared.await {
            tracing::warn!(%error, "what dead workers left is not removed");
        }
    }

    /// Looks at a runtime directory. Blocks; must be called on a runtime.
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
        Ok(Found::Live(Box::new(process)))
    }

    /// What the guest of a dead worker printed last. Blocks.
    fn last_output(&self, uid: &str) -> Option<ConsoleState> {
        console_file::read(&self.run_dir.join(uid))
    }

    /// Removes what a dead worker left.
    fn clear(&self, uid: &str) {
        clear(&self.run_dir.join(uid));
    }

    /// Does what may wait for a disk where it holds up nobody else: while much is written back, a file system lets even a
    /// rename wait for seconds.
    async fn aside<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Self) -> io::Result<T> + Send + 'static,
    ) -> io::Result<T> {
        let this = Arc::clone(self);
        tokio::task::spawn_blocking(move || work(&this)).await.map_err(io::Error::other)?
    }

    /// Clears what dead workers of a machine left; those that live. Blocks; must be called on a runtime.
    fn clear_dead(&self, uid: &str) -> io::Result<Vec<(String, Box<WorkerProcess>)>> {
        let mut living = Vec::new();
        for name in self.names_of(uid)? {
            match self.find(&name)? {
                Found::Live(old) => living.push((name, old)),
                Found::Dead(_) | Found::Nothing => self.clear(&name),
            }
        }
        Ok(living)
    }

    /// Ends a worker that nobody holds, if there is one.
    pub async fn end_unheld(self: &Arc<Self>, uid: &str) -> io::Result<()> {
        self.departing.gone(Some(uid)).await;
        self.end_living(uid).await
    }

    async fn end_living(self: &Arc<Self>, uid: &str) -> io::Result<()> {
        let of = uid.to_owned();
        for (name, old) in self.aside(move |this| this.clear_dead(&of)).await? {
            tracing::warn!(uid, pid = old.pid, "a worker that nobody holds is ended");
            ended(&old).await?;
            self.aside(move |this| {
                this.clear(&name);
                Ok(())
            })
            .await?;
        }
        Ok(())
    }

    /// Starts a worker for a machine that has none, or takes a spare one, and connects to it. One at a time for each uid. If
    /// nobody waits for it any more, the new process is ended.
    pub async fn start(self: &Arc<Self>, uid: &str, name: &str) -> io::Result<(Channel, WorkerProcess)> {
        self.departing.gone(Some(uid)).await;
        let of = uid.to_owned();
        if !self.aside(move |this| this.clear_dead(&of)).await?.is_empty() {
            self.end_living(uid).await?;
        }
        self.start_first(uid, name).await
    }

    /// The same for a machine that has never had one: none is looked for. Of a spare, [`WorkerProcess::claimed`] is still to
    /// be waited for.
    pub async fn start_first(
        self: &Arc<Self>,
        uid: &str,
        name: &str,
    ) -> io::Result<(Channel, WorkerProcess)> {
        let spare = if self.image().is_none() { self.spares.take() } else { None };
        let started = if let Some(Spare { process, lifeline, channel }) = spare {
            Ok((channel, process.claim(self.run_dir.join(uid), lifeline)))
        } else {
            let (of, called) = (uid.to_owned(), name.to_owned());
            self.aside(move |this| this.start_in(&of, &called)).await
        };
        self.refill();
        started
    }

    /// A worker that waits for a machine, connected to. Blocks; must be called on a runtime.
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
        let channel = process.connect();
        let answers =
            tokio::runtime::Handle::current().block_on(crate::worker_link::acquaint(channel.clone()));
        if !answers {
            let (words, dir) = (process.last_words(), process.dir());
            drop(process);
            clear(&dir);
            return Err(io::Error::other(format!("a spare worker does not answer; {words}")));
        }
        Ok(Spare { process, lifeline, channel })
    }

    /// Starts a worker for a machine that has one already, in the runtime directory `UID.INCARNATION`.
    pub async fn start_beside(
        self: &Arc<Self>,
        uid: &str,
        incarnation: u64,
        name: &str,
    ) -> io::Result<(Channel, WorkerProcess)> {
        self.departing.gone(Some(uid)).await;
        let dir = format!("{uid}.{incarnation}");
        let there = dir.clone();
        if let Found::Live(old) = self.aside(move |this| this.find(&there)).await? {
            ended(&old).await?;
        }
        let called = name.to_owned();
        self.aside(move |this| {
            this.clear(&dir);
            this.start_in(&dir, &called)
        })
        .await
    }

    /// Blocks; must be called on a runtime.
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
        console_file::make(&dir);
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
        let image = self.image();
        let own_binary = image.is_none();
        let mut command = Command::new(image.unwrap_or_else(|| PathBuf::from("/proc/self/exe")));
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
                let (dir, socket) = (dir.to_owned(), socket.to_owned());
                let mut process = WorkerProcess::new(child.id(), pidfd, Some(child), dir, socket)?;
                process.own_binary = own_binary;
                Ok(process)
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
