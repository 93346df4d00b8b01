//! A worker that outlived the last daemon comes back to its machine: the rows "Owned" and "Entered" of handover.md
//! section 3.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{WorkerEvent, WorkerStatus, worker_status};

use super::restarting::note_end;
use super::{Actor, ended_state, worker_died};
use crate::adopt::Survivor;
use crate::status::ApiError;
use crate::vm::command::Command;
use crate::worker_link::{SILENT, WorkerLink};

/// What the table says about a live worker of a machine that is owned here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Row {
    /// It goes on as it is.
    Adopt,
    /// It needs the right of this epoch first; then it runs if asked.
    Grant { run: bool },
    /// Its guest has ended.
    Ended,
    /// It knows more than the journal: it must not run.
    Uncertain,
    /// It holds no machine that could run.
    Useless,
}

fn row(epoch: u64, status: &WorkerStatus, wants_to_run: bool) -> Row {
    use worker_status::State as S;
    let above = status.granted_epoch > epoch || status.sealed_epoch >= epoch;
    match status.state() {
        S::Running | S::Paused | S::Sealed | S::Ready if above => Row::Uncertain,
        S::Running | S::Paused if status.granted_epoch == epoch => Row::Adopt,
        S::Running => Row::Grant { run: true },
        S::Paused | S::Sealed | S::Ready => Row::Grant { run: wants_to_run },
        S::Ended => Row::Ended,
        S::Empty | S::Incoming | S::Unspecified => Row::Useless,
    }
}

fn useless(status: &WorkerStatus) -> bool {
    row(0, status, false) == Row::Useless
}

impl Actor {
    /// What a dead worker left is removed once its end is stored, which is not before a migration that is open is decided.
    pub(super) async fn reattach(&mut self, survivor: Survivor) -> Result<(), ApiError> {
        if let Survivor::Dead { left: Some(left), .. } = &survivor
            // Else the machine has another by now, in the same directory.
            && self.worker.is_none()
        {
            self.left = Some(left.clone());
        }
        self.take_in(survivor).await?;
        let phase = self.ownership.phase();
        if !matches!(phase, Phase::Open | Phase::Quiesced | Phase::Committing | Phase::Uncertain) {
            self.forget_dead().await;
        }
        Ok(())
    }

    /// Before the machine has another worker, which may have the same directory.
    pub(super) async fn forget_dead(&mut self) {
        if self.worker.is_none()
            && let Some(left) = self.left.take()
        {
            self.daemon.workers.processes.forget(vec![left]).await;
        }
    }

    async fn take_in(&mut self, survivor: Survivor) -> Result<(), ApiError> {
        if self.migration.is_none()
            && let Some(held) = self.daemon.store.ownership(&self.vm.uid)
        {
            // Settling a migration may have decided since this actor was made.
            self.ownership = held;
        }
        if self.worker.is_some() && matches!(survivor, Survivor::Dead { .. } | Survivor::Refused(_)) {
            // Of a worker that was waited for; the machine has been started since, with another.
            return Ok(());
        }
        let owned = matches!(self.ownership.phase(), Phase::Owned | Phase::Entered);
        let unwanted = self.vm.desired_state() == DesiredState::Stopped;
        // Recovery shows a machine that had run, or may have, as ended with the last daemon.
        // One that a migration gave back is shown as what it was on its way to.
        let had_run = ["HOST_RESTARTED", SILENT].contains(&&*self.vm.reason)
            || !matches!(self.state(), State::Stopped | State::Failed);
        self.waiting = None;
        match survivor {
            // The user has ended it, and nobody could say so; or a start that was not acknowledged had not come far.
            Survivor::Live { worker, status } if owned && (unwanted || !had_run && useless(&status)) => {
                worker.end().await;
                if had_run {
                    self.change(State::Stopped, "", "", Kind::Updated, |_| {}).await
                } else {
                    Ok(())
                }
            }
            // How its guest ended had been stored, and its worker was about to be ended.
            Survivor::Live { worker, status }
                if owned && !had_run && status.state() == worker_status::State::Ended =>
            {
                worker.end().await;
                Ok(())
            }
            Survivor::Dead { console, .. } if owned && had_run && unwanted => {
                self.console = Arc::new(console);
                self.change(State::Stopped, "", "", Kind::Updated, |_| {}).await
            }
            Survivor::Live { worker, .. } if self.replaced(&worker) => {
                worker.end().await;
                Ok(())
            }
            Survivor::Live { worker, status } if owned => self.take_back(worker, *status).await,
            Survivor::Silent { worker } if owned && !self.replaced(&worker) => {
                self.wait_for_answer(worker);
                Ok(())
            }
            Survivor::Live { worker, .. } | Survivor::Silent { worker } => {
                worker.end().await;
                Ok(())
            }
            Survivor::Dead { end, console, .. } if owned && had_run => {
                self.console = Arc::new(console);
                let end =
                    end.or_else(|| worker_died("it died while no vpmud watched it").end).unwrap_or_default();
                let (state, reason) = ended_state(&end, true);
                let message = super::ending::end_message(&end);
                let edit = |vm: &mut VirtualMachine| note_end(vm, state, reason);
                self.change(state, reason, &message, Kind::Updated, edit).await
            }
            Survivor::Refused(error) if owned && had_run => {
                self.change(State::Failed, error.reason(), error.message(), Kind::Updated, |_| {}).await
            }
            Survivor::Dead { .. } | Survivor::Refused(_) => Ok(()),
        }
    }

    async fn take_back(&mut self, worker: WorkerLink, status: WorkerStatus) -> Result<(), ApiError> {
        let epoch = self.ownership.epoch;
        let wants_to_run = self.vm.desired_state() != DesiredState::Paused;
        let row = row(epoch, &status, wants_to_run);
        tracing::info!(vm = %self.name, pid = worker.pid(), state = status.state().as_str_name(), ?row, "a worker outlived vpmud");
        self.worker = Some(worker.clone());
        let running = match row {
            Row::Adopt => status.state() == worker_status::State::Running,
            Row::Grant { run } => {
                let migration = self.ownership.migration_id.clone();
                // One that was silent when its migration was aborted has not heard of that.
                if !migration.is_empty()
                    && let Err(error) = worker.cancel_migration(&migration).await
                {
                    tracing::info!(migration, %error, "the copy had ended already");
                }
                match worker.grant(epoch, run).await {
                    Ok(_) => run,
                    // It may run by now, or may yet: only its own word tells.
                    Err(error) if worker.may_live(&error).await => {
                        self.worker = None;
                        self.wait_for_answer(worker);
                        return Ok(());
                    }
                    Err(error) => return self.give_up(&error).await,
                }
            }
            Row::Ended => {
                let incarnation = self.ownership.incarnation;
                let event = WorkerEvent { state: status.state, end: status.end };
                self.worker_event(incarnation, event).await;
                return Ok(());
            }
            Row::Uncertain => {
                // Its copy may be the newest there is: it is kept, and cannot run.
                let highest = epoch.max(status.granted_epoch).max(status.sealed_epoch);
                if let Err(error) = worker.seal("", highest).await {
                    if !worker.may_live(&error).await {
                        return self.give_up(&error).await;
                    }
                    self.worker = None;
                    self.wait_for_answer(worker);
                    return Ok(());
                }
                let message = format!(
                    "the worker was granted or sealed at epoch {highest} and the journal knows {epoch}: records were lost"
                );
                return self
                    .change(State::Failed, "OWNERSHIP_UNCERTAIN", &message, Kind::Updated, |_| {})
                    .await;
            }
            Row::Useless => {
                let message = format!("the worker that outlived vpmud is {}", status.state().as_str_name());
                return self.give_up(&ApiError::internal("WORKER_NOT_WHOLE", message)).await;
            }
        };
        let (state, desired) = if running {
            (State::Running, DesiredState::Running)
        } else {
            (State::Paused, DesiredState::Paused)
        };
        let edit = |vm: &mut VirtualMachine| {
            vm.set_desired_state(desired);
            vm.next_restart_time = None;
            vm.moved_to.clear();
        };
        self.change(state, "", "", Kind::Updated, edit).await?;
        match self.follow_worker(&worker).await {
            Ok(()) => Ok(()),
            Err(error) => self.give_up(&error).await,
        }
    }

    /// The machine has had another worker since.
    fn replaced(&self, worker: &WorkerLink) -> bool {
        self.worker.is_some() || worker.incarnation() != self.ownership.incarnation
    }

    /// The machine is shown as failed, and whoever starts, stops or deletes it ends the worker; the restart policy does
    /// not. Until then the worker is asked, and what it answers is what the machine is.
    pub(super) fn wait_for_answer(&mut self, worker: WorkerLink) {
        let over = CancellationToken::new();
        self.waiting = Some(over.clone());
        let message = "its worker lives and does not answer; it is asked until it does, or stop the machine";
        self.edit(State::Failed, SILENT, message, |_| {});
        self.announce(Kind::Updated);
        tracing::warn!(vm = %self.name, pid = worker.pid(), "a worker does not answer; it is asked until it does");
        let to_self = self.to_self.clone();
        let daemon = Arc::clone(&self.daemon);
        self.daemon.tasks.spawn(async move {
            let answered = async {
                loop {
                    // Each question waits for its deadline, or for the process to end: no pause is needed between them.
                    match Survivor::ask(worker.clone()).await {
                        Survivor::Silent { .. } => {}
                        survivor => return survivor,
                    }
                }
            };
            let heard = tokio::select! {
                () = daemon.shutdown.cancelled() => None,
                survivor = answered => Some(survivor),
            };
            if matches!(heard, Some(Survivor::Dead { .. })) {
                // Its cores and memory are free before anybody hears of it.
                worker.end().await;
                over.cancel();
            }
            let told = match heard {
                None => false,
                Some(survivor) => match to_self.upgrade() {
                    Some(sender) => {
                        let (reply, _nobody) = oneshot::channel();
                        let command = Command::Reattach { survivor: Box::new(survivor), reply };
                        sender.send(Box::new(command)).await.is_ok()
                    }
                    None => false,
                },
            };
            if told {
                // The machine's task has it now.
            } else if worker.outlives_daemon(daemon.upgrading.load(Ordering::SeqCst)) {
                worker.keep();
            } else {
                worker.end().await;
            }
        });
    }

    pub(super) async fn give_up(&mut self, error: &ApiError) -> Result<(), ApiError> {
        let worker = self.worker.take();
        let edit = |vm: &mut VirtualMachine| note_end(vm, State::Failed, error.reason());
        self.edit(State::Failed, error.reason(), error.message(), edit);
        // Durable before its runtime directory goes, and shown once its resources are free.
        let stored = self.daemon.store.put_vm(self.record()).await;
        if let Some(worker) = worker {
            worker.end().await;
            self.console = Arc::new(worker.last_output().await);
        }
        self.announce(Kind::Updated);
        Ok(stored?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use worker_status::State as S;

    fn status(state: S, granted_epoch: u64, sealed_epoch: u64) -> WorkerStatus {
        WorkerStatus { state: state.into(), granted_epoch, sealed_epoch, ..WorkerStatus::default() }
    }

    #[test]
    fn the_rows_of_the_table() {
        assert_eq!(row(3, &status(S::Running, 3, 0), true), Row::Adopt);
        assert_eq!(row(3, &status(S::Paused, 3, 2), false), Row::Adopt);
        assert_eq!(row(3, &status(S::Running, 2, 0), true), Row::Grant { run: true });
        assert_eq!(row(3, &status(S::Sealed, 0, 2), false), Row::Grant { run: false });
        assert_eq!(row(3, &status(S::Ready, 0, 0), true), Row::Grant { run: true });
        assert_eq!(row(3, &status(S::Running, 4, 0), true), Row::Uncertain);
        assert_eq!(row(3, &status(S::Sealed, 0, 3), true), Row::Uncertain);
        assert_eq!(row(3, &status(S::Ended, 3, 0), true), Row::Ended);
        assert_eq!(row(3, &status(S::Empty, 0, 0), true), Row::Useless);
        assert_eq!(row(3, &status(S::Incoming, 0, 0), true), Row::Useless);
    }
}
