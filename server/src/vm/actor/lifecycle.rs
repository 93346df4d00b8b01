//! What users ask of a machine: start, stop, delete.

use std::time::Duration;

use uuid::Uuid;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use super::Actor;
use super::restarting::{note, wall_ms};
use crate::ops::{Running, Seed, pack_empty};
use crate::status::ApiError;
use crate::vm::command::Reply;
use crate::vm::restart::Event;
use crate::vm::transitions::Action;

/// How long a worker that was waited for may take to be let go once it has ended.
const FREED: Duration = Duration::from_secs(1);

impl Actor {
    /// Begins an operation and answers with its id; none if the caller was refused.
    pub(super) async fn begin(&self, seed: Seed, reply: Reply<Uuid>) -> Option<Running> {
        match seed.begin().await {
            Ok(running) => {
                let _ = reply.send(Ok(running.id()));
                Some(running)
            }
            Err(error) => {
                let _ = reply.send(Err(error));
                None
            }
        }
    }

    pub(super) async fn start(&mut self, seed: Seed, reply: Reply<Uuid>) {
        if let Err(error) = self.admit(Action::Start) {
            let _ = reply.send(Err(error));
            return;
        }
        let Some(running) = self.begin(seed, reply).await else { return };
        note(&mut self.vm, Event::ByUser);
        let started = self.do_start().await;
        running.finish(started.map(|()| self.answer())).await;
    }

    pub(super) async fn do_start(&mut self) -> Result<(), ApiError> {
        let previous = (self.state(), self.vm.reason.clone(), self.vm.message.clone());
        // A failed machine may still have its worker.
        self.retire_worker("stop").await;
        self.end_silent().await?;
        self.show(State::Starting);
        let spec = self.vm.spec.clone().unwrap_or_default();
        let grant = match self.daemon.capacity.grant(self.name.vm(), &spec) {
            Ok(grant) => grant,
            Err(error) => {
                // Nothing of the machine failed: it is what it was.
                (self.vm.reason, self.vm.message) = (previous.1, previous.2);
                self.show(previous.0);
                return Err(error);
            }
        };
        match self.launch_and_run(grant, &spec, None, true).await {
            Ok(()) => {
                let edit = |vm: &mut VirtualMachine| {
                    vm.set_desired_state(DesiredState::Running);
                    note(vm, Event::Running { now: wall_ms() });
                };
                self.change(State::Running, "", "", Kind::Updated, edit).await
            }
            Err(mut error) => {
                if let Some(worker) = self.worker.take() {
                    error = worker.cause(error).await;
                    worker.end().await;
                }
                let (reason, message) = (error.reason().to_owned(), error.message().to_owned());
                let _ = self.change(State::Failed, &reason, &message, Kind::Updated, |_| {}).await;
                Err(error)
            }
        }
    }

    /// The ownership record as plain Owned at its epoch. It goes on to name the migration that the machine came with,
    /// whose source may not have heard of that yet.
    pub(super) fn owned(&self) -> OwnershipRecord {
        OwnershipRecord {
            owner_host: self.daemon.host.host_id.clone(),
            phase: Phase::Owned as i32,
            digest: Vec::new(),
            lsn: 0,
            ..self.ownership.clone()
        }
    }

    pub(super) async fn stop(&mut self, seed: Seed, reply: Reply<Uuid>) {
        let Some(running) = self.begin(seed, reply).await else { return };
        // Durable before the worker is told: whoever dies in between, the next daemon ends what the user has ended.
        let before = self.vm.desired_state();
        self.vm.set_desired_state(DesiredState::Stopped);
        if let Err(error) = self.daemon.store.put_vm(self.record()).await {
            self.vm.set_desired_state(before);
            return running.finish(Err(error.into())).await;
        }
        self.show(State::Stopping);
        self.retire_worker("stop").await;
        if let Err(error) = self.end_unheld().await {
            self.show(State::Failed);
            running.finish(Err(error)).await;
            return;
        }
        let edit = |vm: &mut VirtualMachine| {
            vm.set_desired_state(DesiredState::Stopped);
            note(vm, Event::ByUser);
        };
        let stored = self.change(State::Stopped, "", "", Kind::Updated, edit).await;
        running.finish(stored.map(|()| self.answer())).await;
    }

    pub(super) async fn delete(&mut self, etag: &str, seed: Seed, reply: Reply<Uuid>) {
        if let Err(error) = self.may_delete(etag) {
            let _ = reply.send(Err(error));
            return;
        }
        let Some(running) = self.begin(seed, reply).await else { return };
        let previous = self.state();
        self.show(State::Stopping);
        // Durable before the worker is told: whoever dies in between, the next daemon finds a worker without a machine.
        let gone = OwnershipRecord { phase: Phase::Deleted as i32, ..self.ownership.clone() };
        match self.daemon.store.append_ownership(gone).await {
            Ok(gone) => self.ownership = gone,
            Err(error) => {
                self.show(previous);
                return running.finish(Err(error.into())).await;
            }
        }
        if let Some(worker) = self.worker.take()
            && let Err(error) = worker.shutdown().await
        {
            tracing::warn!(vm = %self.name, %error, "the worker of a deleted machine did not end in order");
        }
        match self.do_delete().await {
            Ok(()) => {
                self.forget();
                running.finish(Ok(pack_empty())).await;
            }
            Err(error) => {
                // Asked again, it goes on from here.
                let state = if previous == State::Moved { State::Moved } else { State::Stopped };
                self.show(state);
                running.finish(Err(error)).await;
            }
        }
    }

    /// Refuses a change that was meant for an earlier record.
    pub(super) fn check_etag(&self, etag: &str) -> Result<(), ApiError> {
        if !etag.is_empty() && etag != self.vm.etag {
            return Err(ApiError::aborted(
                "ETAG_MISMATCH",
                &self.name.to_string(),
                format!(
                    "{}: etag {:?} is not the current one; get it again",
                    self.name,
                    crate::status::clip(etag, 64)
                ),
            ));
        }
        Ok(())
    }

    fn may_delete(&self, etag: &str) -> Result<(), ApiError> {
        self.check_etag(etag)?;
        if self.ownership.phase() == Phase::HandedOver {
            return Err(ApiError::precondition(
                "HANDOVER_OPEN",
                &self.name.to_string(),
                format!("{}: the destination has not confirmed yet; delete it once it has", self.name),
            ));
        }
        Ok(())
    }

    pub(super) async fn do_delete(&mut self) -> Result<(), ApiError> {
        self.end_unheld().await?;
        self.daemon.store.delete_vm(&self.vm.uid).await?;
        Ok(())
    }

    /// A start ends a worker that did not answer, and has its cores and memory back before it asks for them.
    async fn end_silent(&mut self) -> Result<(), ApiError> {
        let Some(over) = self.waiting.take() else { return Ok(()) };
        self.end_unheld().await?;
        // Who waits for it sees its end by itself; if not in time, the start may be refused for want of resources.
        let _ = tokio::time::timeout(FREED, over.cancelled()).await;
        Ok(())
    }

    /// Ends a process that outlived a daemon and refused the next one, or does not answer it.
    pub(super) async fn end_unheld(&self) -> Result<(), ApiError> {
        self.daemon.workers.processes.end_unheld(&self.vm.uid).await.map_err(|e| {
            ApiError::internal(
                "WORKER_UNKNOWN",
                format!("whether a worker of {} lives cannot be told: {e}", self.name),
            )
        })
    }

    /// Leaves the registry; the actor ends.
    pub(super) fn forget(&mut self) {
        self.gone = true;
        self.daemon.registry.remove(&self.name, &self.vm.uid);
        self.announce(Kind::Deleted);
    }
}
