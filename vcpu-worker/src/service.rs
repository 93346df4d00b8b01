//! The worker's gRPC service: fences every command, then lets the machine do it.
//!
//! One worker holds one virtual machine. Commands that change its life run one at a time (`control`); `Seal` takes the
//! right to run away before it queues, so that nothing that came earlier can let a vCPU in again. KVM work happens on
//! vCPU threads and blocking threads, never on the runtime's.
//!
//! ```text
//! EMPTY ─CreateVm──▶ PAUSED ◀─Pause/Run─▶ RUNNING ──▶ ENDED         PAUSED/RUNNING ─Seal, FinishMigration─▶ SEALED
//!   └─CreateVm(incoming)─▶ INCOMING ─state set─▶ READY ─Grant─▶ PAUSED/RUNNING      SEALED ─Grant(e+1)─▶ PAUSED
//! ```

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, broadcast};
use tokio_util::sync::CancellationToken;
use vpmu_proto::worker::{self as proto, WorkerEvent, WorkerStatus, worker_status::State};

use crate::console::Console;
use crate::cores::HostCores;
use crate::dataplane::Identity;
use crate::error::WorkerError;
use crate::grant::{Grant, Rights, RunRight};
use crate::host::boottime_ns;
use crate::machine::Machine;
use crate::migrate::{IncomingMigration, OutgoingMigration, Phase};
use crate::snapshot::write::Progress;

mod command;
mod console;
mod create;
mod events;
mod migration;
mod placement;
mod rpc;
mod snapshot;

/// Events that a slow watcher may miss; it then sees the present state.
const EVENTS: usize = 16;

/// How a worker is made.
#[derive(Debug, Clone)]
pub struct WorkerOptions {
    /// Cores and their PMUs, shared by all workers of the process.
    pub cores: Arc<HostCores>,
    /// Ends the worker: streams, tasks, migrations, vCPU threads.
    pub shutdown: CancellationToken,
    /// Events a second that the model's clock feeds; the default is a 3 GHz core at one instruction a cycle.
    pub rates: pmu::Rates,
    /// Nothing else lives in this process, which takes the machine's name.
    pub own_process: bool,
    /// Where the guest's output goes; default: a ring in memory.
    pub console: Arc<Console>,
}

impl WorkerOptions {
    /// Options with the default rates.
    pub fn new(cores: Arc<HostCores>, shutdown: CancellationToken) -> Self {
        Self { cores, shutdown, rates: pmu::Rates::default(), own_process: false, console: Arc::default() }
    }
}

/// A worker; clones are the same one.
#[derive(Clone)]
pub struct Worker {
    inner: Arc<Inner>,
}

impl std::fmt::Debug for Worker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Worker").field("state", &self.inner.state()).finish_non_exhaustive()
    }
}

struct Inner {
    cores: Arc<HostCores>,
    rates: pmu::Rates,
    own_process: bool,
    console: Arc<Console>,
    shutdown: CancellationToken,
    rights: Mutex<Rights>,
    right: Arc<RunRight>,
    right_changed: Notify,
    control: tokio::sync::Mutex<()>,
    held: Mutex<Held>,
    events: broadcast::Sender<WorkerEvent>,
}

/// What the worker holds.
#[derive(Default)]
struct Held {
    machine: Option<Arc<Machine>>,
    outgoing: Option<Arc<OutgoingMigration>>,
    incoming: Option<Arc<IncomingMigration>>,
    /// Certificate of the migration that is about to begin here.
    identity: Option<(String, Arc<Identity>)>,
    /// A snapshot that is being written.
    saving: Option<Arc<Progress>>,
}

impl Worker {
    /// An empty worker. Must be called on a runtime: it watches the grant's deadline.
    pub fn new(options: WorkerOptions) -> Self {
        let inner = Arc::new(Inner {
            cores: options.cores,
            rates: options.rates,
            own_process: options.own_process,
            console: options.console,
            shutdown: options.shutdown.child_token(),
            rights: Mutex::default(),
            right: Arc::default(),
            right_changed: Notify::new(),
            control: tokio::sync::Mutex::default(),
            held: Mutex::default(),
            events: broadcast::Sender::new(EVENTS),
        });
        tokio::spawn(watch_deadline(Arc::clone(&inner)));
        Self { inner }
    }

    /// Cancelled when the worker has ended, by its options' token or by `Shutdown`.
    pub fn ended(&self) -> CancellationToken {
        self.inner.shutdown.clone()
    }

    /// Whether it holds no virtual machine.
    pub fn is_empty(&self) -> bool {
        self.inner.held().machine.is_none()
    }

    /// How the guest ended, once it has; none if the worker ends first.
    pub async fn guest_end(&self) -> Option<proto::GuestEnd> {
        use tokio_stream::StreamExt as _;
        let mut events = events::watch(&self.inner);
        while let Some(Ok(event)) = events.next().await {
            if event.end.is_some() {
                return event.end;
            }
        }
        None
    }

    /// Returns once it has ended and none of its vCPU threads is left: nothing of its guest can run any more.
    pub async fn over(&self) {
        self.inner.shutdown.cancelled().await;
        self.inner.right.unused().await;
    }

    /// Ends everything that the worker holds, and waits for its threads, within a bound. May be called more than once.
    pub async fn close(&self) -> Result<Vec<proto::PmuImage>, WorkerError> {
        // A migration that is being finished holds the lock until the destination answers.
        let (outgoing, incoming) = {
            let held = self.inner.held();
            (held.outgoing.clone(), held.incoming.clone())
        };
        if let Some(outgoing) = outgoing {
            outgoing.cancel();
        }
        if let Some(incoming) = incoming {
            incoming.cancel();
        }
        if let Some(saving) = &self.inner.held().saving {
            saving.cancel.store(true, std::sync::atomic::Ordering::Relaxed);
        }
        let _control = self.inner.control.lock().await;
        let result = self.inner.release().await;
        self.inner.shutdown.cancel();
        result
    }
}

impl Inner {
    fn rights(&self) -> MutexGuard<'_, Rights> {
        self.rights.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses what is not for this worker, or comes from a daemon that has been replaced.
    fn fence(&self, fence: Option<&proto::Fence>) -> Result<(), WorkerError> {
        let fence = fence.ok_or_else(|| WorkerError::invalid("fence", "missing", "say who asks"))?;
        Ok(self.rights().check(&fence.vm_uid, fence.incarnation, fence.term)?)
    }

    fn machine(&self) -> Result<Arc<Machine>, WorkerError> {
        self.held().machine.clone().ok_or(WorkerError::Empty)
    }

    /// A grant from the daemon.
    fn grant(&self, grant: Grant) -> Result<(), WorkerError> {
        let mut rights = self.rights();
        rights.grant(grant, boottime_ns())?;
        self.right.publish(&rights);
        drop(rights);
        self.right_changed.notify_one();
        Ok(())
    }

    /// Seals; vCPUs see it at their next loop head, the caller pauses them.
    fn seal(&self, epoch: u64) -> u64 {
        let mut rights = self.rights();
        let sealed = rights.seal(epoch);
        self.right.publish(&rights);
        sealed
    }

    fn may_run(&self) -> Result<(), WorkerError> {
        Ok(self.rights().may_run(boottime_ns())?)
    }

    fn state(&self) -> State {
        let held = self.held();
        let Some(machine) = &held.machine else { return State::Empty };
        if machine.end().is_some() {
            return State::Ended;
        }
        if let Some(incoming) = &held.incoming {
            match incoming.phase() {
                Phase::Entered => {}
                Phase::Ready => return State::Ready,
                Phase::Receiving | Phase::Failed => return State::Incoming,
            }
        }
        if machine.is_running() {
            return State::Running;
        }
        let rights = self.rights();
        if rights.sealed() > 0 && rights.current().is_none() { State::Sealed } else { State::Paused }
    }

    fn status(&self) -> WorkerStatus {
        let state = self.state();
        let (granted_epoch, sealed_epoch, term) = {
            let rights = self.rights();
            let granted = rights.current().map_or(0, |g| g.epoch);
            (granted, rights.sealed(), rights.attached().map_or(0, |a| a.term))
        };
        let held = self.held();
        let leaving = held.outgoing.as_ref().filter(|m| !m.is_over()).map(|m| m.id());
        let arriving = held.incoming.as_ref().filter(|m| m.phase() != Phase::Entered).map(|m| m.id());
        let migration_id = leaving.or(arriving).unwrap_or_default().to_owned();
        WorkerStatus {
            state: state.into(),
            granted_epoch,
            sealed_epoch,
            term,
            pid: std::process::id(),
            end: held.machine.as_ref().and_then(|m| m.end()),
            migration_id,
            missing_pages: held
                .outgoing
                .as_ref()
                .map_or(0, |m| m.following().missing_pages)
                .max(held.machine.as_ref().and_then(|m| m.lazy_stats()).map_or(0, |lazy| lazy.missing)),
            vcpus: held.machine.as_ref().map(|m| m.statistics()).unwrap_or_default(),
        }
    }

    /// Ends migrations and the machine.
    async fn release(&self) -> Result<Vec<proto::PmuImage>, WorkerError> {
        let (machine, outgoing, incoming) = {
            let mut held = self.held();
            (held.machine.take(), held.outgoing.take(), held.incoming.take())
        };
        if let Some(outgoing) = outgoing {
            outgoing.cancel();
            outgoing.joined().await;
        }
        if let Some(incoming) = incoming {
            incoming.cancel();
            incoming.joined().await;
        }
        match machine {
            Some(machine) => machine.stop().await,
            None => Ok(Vec::new()),
        }
    }
}

/// Takes the right to run away when its deadline passes. The loop head does the same; this is for a guest that does
/// not leave by itself.
async fn watch_deadline(inner: Arc<Inner>) {
    loop {
        let deadline = inner.right.deadline();
        let expire = async {
            match deadline {
                Some(at) => tokio::time::sleep(Duration::from_nanos(at.saturating_sub(boottime_ns()))).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = inner.shutdown.cancelled() => return,
            () = inner.right_changed.notified() => {}
            () = expire => {
                // A suspended host's sleep may end early or late: only the clock counts.
                if !inner.right.allows(boottime_ns)
                    && let Ok(machine) = inner.machine()
                    && let Err(error) = machine.pause().await
                {
                    tracing::error!(%error, "pausing at the end of the grant");
                }
                // Until a new grant comes there is nothing to watch.
                if inner.right.deadline() == deadline {
                    tokio::select! {
                        () = inner.shutdown.cancelled() => return,
                        () = inner.right_changed.notified() => {}
                    }
                }
            }
        }
    }
}
