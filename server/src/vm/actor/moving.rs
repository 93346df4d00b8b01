//! A machine that leaves or arrives: the actor's side of a migration. The drivers are in `crate::migration`.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio_util::sync::CancellationToken;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::{OwnershipRecord, VmRecord};
use vpmu_proto::worker::PmuImage;

use super::Actor;
use super::restarting::{note, note_end, wall_ms};
use crate::status::ApiError;
use crate::vm::command::{Arrival, Command, Lease, Outcome};
use crate::vm::restart::Event;
use crate::vm::transitions::Action;
use crate::vm::view::ActiveMigration;
use crate::worker_link::WorkerLink;

impl Actor {
    pub(super) async fn begin_migration(
        &mut self,
        name: String,
        cancel: CancellationToken,
        committed: Arc<AtomicBool>,
    ) -> Result<Lease, ApiError> {
        let state = self.admit(Action::Migrate)?;
        let worker = self.worker.clone().ok_or_else(|| self.refuse(Action::Migrate))?;
        let paused = self.state() == State::Paused;
        // Whoever takes it back after a crash goes by the record.
        self.store_behind().await;
        self.vm.migration.clone_from(&name);
        self.migration = Some(ActiveMigration { name, cancel, committed });
        self.show(state);
        Ok(Lease { record: self.record(), worker, ownership: self.ownership.clone(), paused })
    }

    pub(super) async fn end_migration(&mut self, outcome: Outcome) -> Result<(), ApiError> {
        self.migration = None;
        self.vm.migration.clear();
        match outcome {
            Outcome::Left => Ok(()),
            Outcome::Stayed { ownership, lost: None } => {
                self.ownership = ownership;
                let paused = self.vm.desired_state() == DesiredState::Paused;
                let state = if paused { State::Paused } else { State::Running };
                self.change(state, "", "", Kind::Updated, |_| {}).await
            }
            Outcome::Stayed { ownership, lost: Some(error) } => {
                self.ownership = ownership;
                // Also one that was forced while it arrived.
                self.born = true;
                self.before_incoming = None;
                self.vm.moved_to.clear();
                if self.deferred.iter().any(|c| matches!(c, Command::Worker { .. })) {
                    // The guest or its worker ended meanwhile: that event, which is next, tells how.
                    return Ok(());
                }
                // Threads are joined, below; of a process only its answer or its end tells.
                if let Some(worker) = self.worker.clone().filter(|worker| worker.pid() != 0)
                    && worker.may_live(&error).await
                {
                    self.worker = None;
                    self.wait_for_answer(worker);
                    return Ok(());
                }
                // The daemon's end is no fault of the machine.
                let ended = matches!(error.reason(), "HOST_RESTARTED" | "SHUTTING_DOWN");
                let (state, reason) =
                    if ended { (State::Stopped, "HOST_RESTARTED") } else { (State::Failed, error.reason()) };
                // One whose ownership is not known is not ended: its copy may be the last.
                if error.reason() == "OWNERSHIP_UNCERTAIN" {
                    let edit = |vm: &mut VirtualMachine| note_end(vm, state, reason);
                    return self.change(state, reason, error.message(), Kind::Updated, edit).await;
                }
                self.ended(state, reason, error.message(), |_| {}).await
            }
            Outcome::Moved { ownership, moved_to } => {
                self.ownership = ownership;
                if let Some(worker) = self.worker.take() {
                    worker.end().await;
                }
                let message = format!("it runs on host {moved_to}");
                self.change(State::Moved, "MOVED", &message, Kind::Updated, |vm| vm.moved_to = moved_to).await
            }
        }
    }

    pub(super) async fn receive(
        &mut self,
        record: VmRecord,
        ownership: OwnershipRecord,
    ) -> Result<(), ApiError> {
        if self.born {
            self.admit(Action::Receive)?;
        }
        let ownership = match self.daemon.store.append_ownership(ownership).await {
            Ok(ownership) => ownership,
            Err(error) => {
                if !self.born {
                    self.forget();
                }
                return Err(error.into());
            }
        };
        self.forget_dead().await;
        if self.born {
            self.before_incoming = Some(self.record());
        }
        self.ownership = ownership;
        self.shape = record.pmu_shape;
        self.vm = record.vm.unwrap_or_default();
        let kind = if self.born { Kind::Updated } else { Kind::Created };
        // Stored now, so that an entry that is durable in the journal always finds its record.
        self.change(State::Incoming, "", "", kind, |_| {}).await
    }

    /// The machine runs here already (or is paused); this makes the records follow.
    pub(super) async fn adopt(&mut self, arrival: Arrival) -> Result<(), ApiError> {
        let Arrival { record, worker, ownership, images, paused, lost } = arrival;
        self.ownership = ownership;
        self.born = true;
        self.before_incoming = None;
        self.shape = record.pmu_shape;
        self.vm = record.vm.unwrap_or_default();
        self.worker = Some(worker.clone());
        self.vm.migration.clear();
        self.vm.moved_to.clear();
        note(&mut self.vm, Event::ByUser);
        self.daemon.host.hypervisor.clone_into(&mut self.vm.hypervisor);
        self.daemon.host.pmu_mode.clone_into(&mut self.vm.pmu_mode);
        let pmu = self.store_pmu(images, &worker.cores(), "migrate-in").await;
        let state = if paused { State::Paused } else { State::Running };
        let desired = if paused { DesiredState::Paused } else { DesiredState::Running };
        if let Some(error) = lost {
            let edit = |vm: &mut VirtualMachine| vm.set_desired_state(desired);
            return self.ended(State::Failed, error.reason(), error.message(), edit).await;
        }
        let edit = |vm: &mut VirtualMachine| {
            vm.set_desired_state(desired);
            note(vm, Event::Running { now: wall_ms() });
        };
        self.change(state, "", "", Kind::Updated, edit).await?;
        match self.follow_worker(&worker).await {
            Ok(()) => pmu,
            Err(error) => {
                // It died between its grant and this: nobody else would notice.
                let died = worker.died_of(&error).await;
                let error = if died { worker.obituary().await } else { error };
                self.give_up(&error).await
            }
        }
    }

    /// The machine is another worker of this host, which runs it if it was `heard`; this makes the records follow.
    pub(super) async fn renewed(
        &mut self,
        worker: WorkerLink,
        ownership: OwnershipRecord,
        images: Vec<PmuImage>,
        heard: bool,
    ) -> Result<(), ApiError> {
        self.migration = None;
        self.vm.migration.clear();
        self.ownership = ownership;
        if !heard {
            self.worker = None;
            let pmu = self.store_pmu(images, &worker.cores(), "migrate-in").await;
            self.wait_for_answer(worker);
            return pmu;
        }
        self.worker = Some(worker.clone());
        let pmu = self.store_pmu(images, &worker.cores(), "migrate-in").await;
        let paused = self.vm.desired_state() == DesiredState::Paused;
        let state = if paused { State::Paused } else { State::Running };
        self.change(state, "", "", Kind::Updated, |_| {}).await?;
        self.follow_worker(&worker).await?;
        pmu
    }

    pub(super) async fn drop_incoming(&mut self, ownership: OwnershipRecord) -> Result<(), ApiError> {
        self.ownership = ownership;
        if let Some(before) = self.before_incoming.take() {
            self.shape = before.pmu_shape;
            self.vm = before.vm.unwrap_or_default();
            self.announce(Kind::Updated);
            Ok(self.daemon.store.put_vm(self.record()).await?)
        } else {
            // The record goes before the name is free: the next arrival's record must not be hit.
            let deleted = self.daemon.store.delete_vm(&self.vm.uid).await;
            self.forget();
            Ok(deleted?)
        }
    }
}
