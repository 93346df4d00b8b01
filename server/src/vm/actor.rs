//! One tokio task a machine: it alone changes the machine's state, in the order of its mailbox.
//!
//! Invariants:
//! * an acknowledged change is durable before its answer leaves, and published only then. The one exception is whether
//!   a machine with a worker is paused or runs: that is the worker's to know (a daemon that comes back asks it), so the
//!   record follows the answer, within 20 ms; in thread isolation at once, and a daemon that dies in between forgets it. The PMU state of a pause is durable before it;
//! * states in passing (Starting, Stopping, MigratingOut, Incoming) are published but not stored: `observed_state` is
//!   recomputed at start;
//! * a right to run is journalled before the worker is told (grant), and taken from the worker before it is journalled;
//! * readers never wait for the actor: they use the published snapshot.
//!
//! What it does is in [`creating`], [`starting`], [`lifecycle`] and [`placing`] (users), [`moving`] (migrations), [`forcing`] (ForceOwner), [`reattach`]
//! (workers that outlived a daemon), [`restarting`] (the restart policy), [`ending`] (guests, workers and the daemon end),
//! [`snapshot`], and the table of `transitions`; what it keeps is in [`record`] and [`pmu`].

mod creating;
mod ending;
mod forcing;
mod lifecycle;
mod moving;
mod pausing;
mod placing;
mod pmu;
mod reattach;
mod record;
mod restarting;
mod snapshot;
mod starting;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::{PmuShape, VirtualMachine};
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use super::command::{Command, Mail};
use super::transitions::{Action, Verdict, refusal, verdict};
use super::view::{ActiveMigration, VmView};
use crate::daemon::Daemon;
use crate::names::VmName;
use crate::status::ApiError;
use crate::store::Batch;
use crate::worker_link::{ConsoleHistory, WorkerLink};
pub(crate) use ending::{ended_state, worker_died};
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
    /// Its worker is asked what it is and has not answered: it may run. Cancelled once who asks has let it go.
    waiting: Option<CancellationToken>,
    /// When the record is to be stored that an answer was given before.
    record_due: Option<Instant>,
    /// PMU images, the newest, that the store took no writes for.
    unstored: Option<Batch>,
    /// Runtime directory of a dead worker whose end is not stored yet.
    left: Option<String>,
    mailbox: mpsc::Receiver<Mail>,
    to_self: mpsc::WeakSender<Mail>,
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
        mailbox: mpsc::Receiver<Mail>,
        to_self: mpsc::WeakSender<Mail>,
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
            waiting: None,
            record_due: None,
            unstored: None,
            left: None,
            mailbox,
            to_self,
            publish,
            gone: false,
        }
    }

    pub(crate) async fn run(mut self) {
        // The first one in a while: a machine that has just begun has nothing that is not stored.
        let mut checkpoint = tokio::time::interval_at(Instant::now() + CHECKPOINT, CHECKPOINT);
        checkpoint.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        while !self.gone {
            let due = restarting::due(self.daemon.recovered.clone(), self.restart_in());
            let record_due = self.record_due;
            tokio::select! {
                command = self.mailbox.recv() => match command {
                    // In a box, for as long as it takes: every machine has this future, and most commands are long ago.
                    Some(command) => Box::pin(self.act(*command)).await,
                    None => break,
                },
                _ = checkpoint.tick() => self.checkpoint().await,
                () = due => Box::pin(self.restart()).await,
                () = until(record_due) => self.store_behind().await,
            }
            while self.migration.is_none() && !self.gone {
                match self.deferred.pop_front() {
                    Some(command) => Box::pin(self.act(command)).await,
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
                let result = self.begin_migration(name, cancel, committed).await;
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
            Command::Renewed { worker, ownership, images, heard, reply } => {
                let result = self.renewed(worker, ownership, images, heard).await;
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
            (Verdict::AfterAbort, Some(_)) => Some(ApiError::unavailable(
                "VM_BUSY",
                format!("{}: {MAX_DEFERRED} calls wait for the end of its migration; ask again", self.name),
            )),
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
}
