//! One tokio task a machine: it alone changes the machine's state, in the order of its mailbox.
//!
//! Invariants:
//! * an acknowledged change is durable before its answer leaves, and published only then. The one exception is whether
//!   a machine with a worker is paused or runs: that is the worker's to know (a daemon that comes back asks it), so the
//!   record follows the answer. The PMU state of a pause is durable before it;
//! * states in passing (Starting, Stopping, MigratingOut, Incoming) are published but not stored: `observed_state` is
//!   recomputed at start;
//! * a right to run is journalled before the worker is told (grant), and taken from the worker before it is journalled;
//! * readers never wait for the actor: they use the published snapshot.
//!
//! What it does is in [`lifecycle`] and [`placing`] (users), [`moving`] (migrations), [`forcing`] (ForceOwner), [`reattach`] (workers that outlived a daemon),
//! [`restarting`] (the restart policy), [`snapshot`] and the table of `transitions`.

mod forcing;
mod lifecycle;
mod moving;
mod placing;
mod reattach;
mod restarting;
mod snapshot;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::api::{PmuShape, VirtualMachine};
use vpmu_proto::store::{OwnershipRecord, VmRecord};
use vpmu_proto::worker::{GuestEnd, PmuImage, WorkerEvent, guest_end, worker_status};

use super::command::Command;
use super::transitions::{Action, Verdict, refusal, verdict};
use super::view::{ActiveMigration, VmView};
use crate::daemon::Daemon;
use crate::names::VmName;
use crate::status::ApiError;
use crate::store::Batch;
use crate::worker_link::{ConsoleHistory, SILENT, WorkerLink};
pub(crate) use restarting::wall_ms;

/// How often a running machine's PMU state is stored.
const CHECKPOINT: Duration = Duration::from_secs(5);
/// Commands that may wait for the end of a migration.
const MAX_DEFERRED: usize = 8;

/// Returns then; never if there is no such moment.
async fn until(when: Option<Instant>) {
    match when {
        Some(when) => tokio::time::sleep_until(when).await,
        None => std::future::pending().await,
    }
}

/// The actor of one machine.
pub(crate) struct Actor {
    daemon: Arc<Daemon>,
    name: VmName,
    vm: VirtualMachine,
    shape: Option<PmuShape>,
    ownership: OwnershipRecord,
    /// It is known to the store (or was, before it moved).
    born: bool,
    /// What it was before it began to arrive here again.
    before_incoming: Option<VmRecord>,
    worker: Option<WorkerLink>,
    console: Arc<ConsoleHistory>,
    migration: Option<ActiveMigration>,
    /// What waits for the end of a migration.
    deferred: VecDeque<Command>,
    /// When the record is to be stored that an answer was given before.
    record_due: Option<Instant>,
    /// PMU images, the newest, that the store took no writes for.
    unstored: Option<Batch>,
    mailbox: mpsc::Receiver<Command>,
    to_self: mpsc::WeakSender<Command>,
    publish: watch::Sender<Arc<VmView>>,
    gone: bool,
}

impl Actor {
    #[expect(clippy::too_many_arguments, reason = "made in one place only")]
    pub(crate) fn new(
        daemon: Arc<Daemon>,
        name: VmName,
        record: VmRecord,
        ownership: OwnershipRecord,
        born: bool,
        mailbox: mpsc::Receiver<Command>,
        to_self: mpsc::WeakSender<Command>,
        publish: watch::Sender<Arc<VmView>>,
    ) -> Self {
        Self {
            daemon,
            name,
            vm: record.vm.unwrap_or_default(),
            shape: record.pmu_shape,
            ownership,
            born,
            before_incoming: None,
            worker: None,
            console: Arc::default(),
            migration: None,
            deferred: VecDeque::new(),
            record_due: None,
            unstored: None,
            mailbox,
            to_self,
            publish,
            gone: false,
        }
    }

    pub(crate) async fn run(mut self) {
        let mut checkpoint = tokio::time::interval(CHECKPOINT);
        checkpoint.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.gone {
            let due = restarting::due(self.daemon.recovered.clone(), self.restart_in());
            let record_due = self.record_due;
            tokio::select! {
                command = self.mailbox.recv() => match command {
                    Some(command) => self.act(command).await,
                    None => break,
                },
                _ = checkpoint.tick() => self.checkpoint().await,
                () = due => self.restart().await,
                () = until(record_due) => self.store_behind().await,
            }
            while self.migration.is_none() && !self.gone {
                match self.deferred.pop_front() {
                    Some(command) => self.act(command).await,
                    None => break,
                }
            }
        }
        self.store_behind().await;
    }

    async fn act(&mut self, command: Command) {
        match command {
            Command::Create { seed, start, reply } => self.create(seed, start, reply).await,
            Command::Restore { from, paused, seed, reply } => {
                Box::pin(self.restore(from, paused, seed, reply)).await;
            }
            Command::Snapshot { file, seed, reply } => Box::pin(self.snapshot(&file, seed, reply)).await,
            Command::Start { seed, reply } => self.start(seed, reply).await,
            command @ (Command::Stop { .. } | Command::Delete { .. }) => self.stop_or_delete(command).await,
            Command::Pause { reply } => {
                let result = self.pause().await;
                let _ = reply.send(result);
            }
            Command::Resume { reply } => {
                let result = self.resume().await;
                let _ = reply.send(result);
            }
            Command::Place { placement, etag, reply } => {
                let result = self.place(placement, &etag).await;
                let _ = reply.send(result);
            }
            Command::Worker { incarnation, event } => self.worker_event(incarnation, event).await,
            Command::BeginMigration { name, cancel, committed, reply } => {
                let result = self.begin_migration(name, cancel, committed);
                let _ = reply.send(result);
            }
            Command::EndMigration { outcome, reply } => {
                let result = self.end_migration(outcome).await;
                let _ = reply.send(result);
            }
            Command::Receive { record, ownership, reply } => {
                let result = self.receive(*record, ownership).await;
                let _ = reply.send(result);
            }
            Command::Adopt { arrival, reply } => {
                let result = self.adopt(*arrival).await;
                let _ = reply.send(result);
            }
            Command::Renewed { worker, ownership, images, reply } => {
                let result = self.renewed(worker, ownership, images).await;
                let _ = reply.send(result);
            }
            Command::DropIncoming { ownership, reply } => {
                let result = self.drop_incoming(ownership).await;
                let _ = reply.send(result);
            }
            Command::Force { claim, note, reply } => {
                let result = Box::pin(self.force(claim, note)).await;
                let _ = reply.send(result);
            }
            Command::Yield { epoch, owner, reply } => {
                let result = Box::pin(self.give_way(epoch, owner)).await;
                let _ = reply.send(result);
            }
            Command::Reattach { survivor, reply } => {
                let result = self.reattach(*survivor).await;
                let _ = reply.send(result);
            }
            Command::StoreAgain { reply } => {
                let result = self.store_again().await;
                let _ = reply.send(result);
            }
            // The migration's driver sees the daemon's end by itself and reports back first.
            Command::End { reply } if self.migration.is_some() => {
                self.deferred.push_back(Command::End { reply });
            }
            Command::End { reply } => {
                self.end().await;
                let _ = reply.send(());
            }
        }
    }

    fn state(&self) -> State {
        self.vm.observed_state()
    }

    /// Judges an action by the table.
    fn admit(&self, action: Action) -> Result<State, ApiError> {
        match verdict(self.state(), action) {
            Verdict::Via(state) => Ok(state),
            Verdict::AfterAbort | Verdict::Illegal => Err(self.refuse(action)),
        }
    }

    fn refuse(&self, action: Action) -> ApiError {
        refusal(&self.name.to_string(), self.state(), action, &self.vm.moved_to)
    }

    /// Stop and Delete of a machine that is being migrated wait until the migration has been aborted.
    async fn stop_or_delete(&mut self, command: Command) {
        let action = if matches!(command, Command::Stop { .. }) { Action::Stop } else { Action::Delete };
        let early = match (verdict(self.state(), action), &self.migration) {
            (Verdict::AfterAbort, Some(open)) if open.committed.load(Ordering::Acquire) => {
                Some(ApiError::precondition(
                    "MIGRATION_COMMITTED",
                    &open.name,
                    format!(
                        "{}: its migration is committed and can no longer be undone; ask the destination",
                        self.name
                    ),
                ))
            }
            (Verdict::AfterAbort, Some(open)) if self.deferred.len() < MAX_DEFERRED => {
                open.cancel.cancel();
                self.deferred.push_back(command);
                return;
            }
            (Verdict::Via(_), _) => None,
            _ => Some(self.refuse(action)),
        };
        match (command, early) {
            (Command::Stop { reply, .. } | Command::Delete { reply, .. }, Some(error)) => {
                let _ = reply.send(Err(error));
            }
            (Command::Stop { seed, reply }, None) => self.stop(seed, reply).await,
            (Command::Delete { etag, seed, reply }, None) => self.delete(&etag, seed, reply).await,
            _ => {}
        }
    }

    /// The record as the store keeps it.
    fn record(&self) -> VmRecord {
        VmRecord { vm: Some(self.vm.clone()), pmu_shape: self.shape.clone() }
    }

    /// Shows a state in passing.
    fn show(&mut self, state: State) {
        self.vm.set_observed_state(state);
        self.announce(Kind::Updated);
    }

    /// Publishes what is and tells watchers.
    fn announce(&self, kind: Kind) {
        self.publish_view();
        self.daemon.events.send(kind, &self.vm);
    }

    /// Publishes what is, without an event.
    fn publish_view(&self) {
        self.publish.send_replace(Arc::new(VmView {
            vm: self.vm.clone(),
            pmu_shape: self.shape.clone(),
            worker: self.worker.clone(),
            console: Arc::clone(&self.console),
            migration: self.migration.clone(),
            deleted: self.gone,
        }));
    }

    /// Changes the record durably, then shows it. If the store refuses, the change is shown all the same when it
    /// describes what is (a guest that ended has ended), and the error is returned.
    async fn change(
        &mut self,
        state: State,
        reason: &str,
        message: &str,
        kind: Kind,
        edit: impl FnOnce(&mut VirtualMachine),
    ) -> Result<(), ApiError> {
        self.edit(state, reason, message, edit);
        let stored = self.daemon.store.put_vm(&self.record()).await;
        self.announce(kind);
        Ok(stored?)
    }

    /// Changes the record in memory.
    fn edit(&mut self, state: State, reason: &str, message: &str, edit: impl FnOnce(&mut VirtualMachine)) {
        self.vm.set_observed_state(state);
        reason.clone_into(&mut self.vm.reason);
        message.clone_into(&mut self.vm.message);
        edit(&mut self.vm);
        self.vm.epoch = self.ownership.epoch;
        self.vm.incarnation = self.ownership.incarnation;
        self.vm.vcpu_cores = self.worker.as_ref().map(|w| w.cores().to_vec()).unwrap_or_default();
        self.vm.worker_pid = self.worker.as_ref().map_or(0, WorkerLink::pid);
        self.vm.sandbox = self.worker.as_ref().map(|w| w.sandbox().to_owned()).unwrap_or_default();
        self.vm.update_time = Some(crate::ops::now());
        self.vm.etag = uuid::Uuid::new_v4().simple().to_string();
    }

    /// Stores PMU images.
    async fn store_pmu(&mut self, images: Vec<PmuImage>, cores: &[u32], cause: &str) -> Result<(), ApiError> {
        if images.is_empty() {
            return Ok(());
        }
        let batch = self.with_pmu(Batch::new(), images, cores, cause)?;
        self.commit_pmu(batch).await
    }

    /// Commits a batch with PMU images. What a full disk refuses is kept, until it takes writes again or newer ones come.
    async fn commit_pmu(&mut self, batch: Batch) -> Result<(), ApiError> {
        let stored = self.daemon.store.commit(batch.clone()).await;
        match &stored {
            Ok(()) => self.unstored = None,
            Err(error) if crate::ops::is_failing(error) => self.unstored = Some(batch),
            Err(_) => {}
        }
        stored?;
        Ok(())
    }

    /// What changed while the store took no writes is in memory only. The end of an open migration is stored at its time.
    async fn store_again(&mut self) -> Result<(), ApiError> {
        if !self.born || self.migration.is_some() || self.before_incoming.is_some() {
            return Ok(());
        }
        // The record comes last: the one that was refused with the images may be older.
        let batch = self.unstored.clone().unwrap_or_default().put_vm(&self.record())?;
        self.daemon.store.commit(batch).await?;
        self.unstored = None;
        Ok(())
    }

    /// Adds PMU images to a batch.
    fn with_pmu(
        &self,
        batch: Batch,
        images: Vec<PmuImage>,
        cores: &[u32],
        cause: &str,
    ) -> Result<Batch, ApiError> {
        let mode = self.daemon.host.pmu_mode;
        let records =
            crate::pmu_view::records(&self.vm.uid, images, cores, self.ownership.epoch, cause, mode);
        Ok(records.iter().try_fold(batch, Batch::put_pmu)?)
    }

    async fn checkpoint(&mut self) {
        let Some(worker) = self.worker.clone().filter(|_| self.state() == State::Running) else { return };
        let stored = match worker.pmu().await {
            Ok(images) => self.store_pmu(images, &worker.cores(), "checkpoint").await,
            Err(error) => Err(error),
        };
        if let Err(error) = stored {
            tracing::warn!(vm = %self.name, %error, "PMU checkpoint failed");
        }
    }

    /// Forwards the worker's events to the mailbox. One that does not answer may live, with the only copy: it is asked
    /// until it answers, or says by its end that it does not.
    async fn follow_worker(&self, worker: &WorkerLink) -> Result<(), ApiError> {
        let first = match worker.watch_events().await {
            Err(error) if error.reason() == SILENT => None,
            answer => Some(answer?),
        };
        let worker = worker.downgrade();
        let to_self = self.to_self.clone();
        let incarnation = self.ownership.incarnation;
        let shutdown = self.daemon.shutdown.clone();
        self.daemon.tasks.spawn(async move {
            let mut stream = first;
            loop {
                let next = async {
                    let stream = match &mut stream {
                        Some(stream) => stream,
                        None => stream.insert(worker.watch_until_answered().await?),
                    };
                    stream.message().await.map_err(|status| ApiError::from_status("worker", &status))
                };
                let event = tokio::select! {
                    () = shutdown.cancelled() => return,
                    event = next => event,
                };
                let (event, last) = match event {
                    Ok(Some(event)) => (event, false),
                    Ok(None) => (worker.death("the worker closed its event stream").await, true),
                    Err(error) => (worker.death(error.message()).await, true),
                };
                let Some(sender) = to_self.upgrade() else { return };
                if sender.send(Command::Worker { incarnation, event }).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(())
    }

    async fn worker_event(&mut self, incarnation: u64, event: WorkerEvent) {
        let ended = event.state() == worker_status::State::Ended;
        if !ended || incarnation != self.ownership.incarnation || self.worker.is_none() {
            return;
        }
        if self.migration.is_some() {
            // The driver sees the end by its own calls; what is left of it is looked at when it is over.
            if self.deferred.len() < MAX_DEFERRED {
                self.deferred.push_back(Command::Worker { incarnation, event });
            }
            return;
        }
        let end = event.end.unwrap_or_default();
        let dead = match &self.worker {
            Some(worker) => worker.is_dead().await,
            None => true,
        };
        let (state, reason) = ended_state(&end, dead);
        let message = format!("vCPU {}: {}", end.vcpu, crate::status::clip(&end.detail, 512));
        tracing::info!(vm = %self.name, reason, %message, "the guest ended");
        if let Err(error) = self.ended(state, reason, &message, |_| {}).await {
            tracing::error!(vm = %self.name, %error, "the guest's end could not be stored");
        }
    }

    /// The machine ended by itself. That is durable before the worker's runtime directory goes, which is all else that
    /// tells of it, and shown once the worker's resources are free.
    async fn ended(
        &mut self,
        state: State,
        reason: &str,
        message: &str,
        edit: impl FnOnce(&mut VirtualMachine),
    ) -> Result<(), ApiError> {
        let worker = self.worker.take();
        self.edit(state, reason, message, |vm| {
            edit(vm);
            restarting::note_end(vm, state, reason);
        });
        let stored = self.daemon.store.put_vm(&self.record()).await;
        self.worker = worker;
        self.retire_worker("stop").await;
        self.announce(Kind::Updated);
        Ok(stored?)
    }

    /// Ends the worker, keeping console and PMU state.
    async fn retire_worker(&mut self, cause: &str) {
        let Some(worker) = self.worker.take() else { return };
        self.console = Arc::new(worker.console_history().await);
        let stored = match worker.shutdown().await {
            Ok(images) => self.store_pmu(images, &worker.cores(), cause).await,
            Err(error) => Err(error),
        };
        if let Err(error) = stored {
            tracing::warn!(vm = %self.name, %error, "the last PMU state could not be stored");
        }
    }

    /// The daemon ends, and in thread isolation the machine with it; in process isolation it goes on unless told otherwise.
    async fn end(&mut self) {
        let upgrading = self.daemon.upgrading.load(Ordering::SeqCst);
        let stays = self.worker.clone().filter(|worker| worker.outlives_daemon(upgrading));
        if let Some(worker) = stays {
            self.checkpoint().await;
            worker.keep();
        } else if self.worker.is_some() && matches!(self.state(), State::Running | State::Paused) {
            self.retire_worker("stop").await;
            let message = "vpmud was ended and the machine with it; start it again";
            let stored = self.change(State::Stopped, "HOST_RESTARTED", message, Kind::Updated, |_| {}).await;
            if let Err(error) = stored {
                tracing::error!(vm = %self.name, %error, "the stop could not be stored");
            }
        } else if let Some(worker) = self.worker.take() {
            worker.end().await;
        }
        self.gone = true;
    }
}

/// What a guest's end makes of its machine. `dead`: the worker's process has ended too.
pub(crate) fn ended_state(end: &GuestEnd, dead: bool) -> (State, &'static str) {
    match end.kind() {
        guest_end::Kind::Shutdown => (State::Stopped, "GUEST_SHUTDOWN"),
        guest_end::Kind::Reset => (State::Stopped, "GUEST_RESET"),
        guest_end::Kind::TripleFault => (State::Failed, "GUEST_TRIPLE_FAULT"),
        guest_end::Kind::InternalError => (State::Failed, "HYPERVISOR_INTERNAL_ERROR"),
        guest_end::Kind::SeccompViolation => (State::Failed, "SECCOMP_VIOLATION"),
        guest_end::Kind::PostcopySourceLost => (State::Failed, "POSTCOPY_SOURCE_LOST"),
        guest_end::Kind::WorkerError | guest_end::Kind::Unspecified if dead => (State::Failed, "WORKER_DIED"),
        guest_end::Kind::WorkerError | guest_end::Kind::Unspecified => (State::Failed, "WORKER_FAILED"),
    }
}

pub(crate) fn worker_died(detail: &str) -> WorkerEvent {
    WorkerEvent {
        state: worker_status::State::Ended as i32,
        end: Some(GuestEnd {
            kind: guest_end::Kind::WorkerError as i32,
            vcpu: 0,
            detail: crate::status::clip(detail, 256),
        }),
    }
}
