//! The machine's record: how it changes, is stored, and is shown to readers and watchers.
//!
//! Invariant: an ordinary change is durable before it is shown. What is shown without that is a state in passing, or
//! what is so whether or not the store can say it; [`Actor::store_again`] then writes it when the store takes writes.

use std::sync::Arc;

use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::VmRecord;

use super::Actor;
use crate::ops::pack;
use crate::status::ApiError;
use crate::vm::view::{VmView, whole};
use crate::worker_link::WorkerLink;

impl Actor {
    /// The record as the store keeps it.
    pub(super) fn record(&self) -> VmRecord {
        VmRecord { vm: Some(self.vm.clone()), pmu_shape: self.shape.clone() }
    }

    /// The record as the answer of an operation.
    pub(super) fn answer(&self) -> prost_types::Any {
        pack("VirtualMachine", &whole(self.vm.clone()))
    }

    /// Shows a state in passing.
    pub(super) fn show(&mut self, state: State) {
        self.vm.set_observed_state(state);
        self.announce(Kind::Updated);
    }

    /// Publishes what is and tells watchers.
    pub(super) fn announce(&self, kind: Kind) {
        self.publish_view();
        self.daemon.events.send(kind, &self.vm);
    }

    /// Publishes what is, without an event.
    pub(super) fn publish_view(&self) {
        self.publish.send_replace(Arc::new(self.view(None)));
    }

    /// Publishes what is, and that this worker is building the machine.
    pub(super) fn publish_opening(&self, opening: &WorkerLink) {
        self.publish.send_replace(Arc::new(self.view(Some(opening.clone()))));
    }

    fn view(&self, opening: Option<WorkerLink>) -> VmView {
        VmView {
            vm: self.vm.clone(),
            pmu_shape: self.shape.clone(),
            worker: self.worker.clone(),
            opening,
            console: Arc::clone(&self.console),
            migration: self.migration.clone(),
            deleted: self.gone,
        }
    }

    /// Changes the record durably, then shows it. If the store refuses, the change is shown all the same when it
    /// describes what is (a guest that ended has ended), and the error is returned.
    pub(super) async fn change(
        &mut self,
        state: State,
        reason: &str,
        message: &str,
        kind: Kind,
        edit: impl FnOnce(&mut VirtualMachine),
    ) -> Result<(), ApiError> {
        self.edit(state, reason, message, edit);
        let stored = self.daemon.store.put_vm(self.record()).await;
        self.announce(kind);
        Ok(stored?)
    }

    /// Changes the record in memory.
    pub(super) fn edit(
        &mut self,
        state: State,
        reason: &str,
        message: &str,
        edit: impl FnOnce(&mut VirtualMachine),
    ) {
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

    /// What changed while the store took no writes is in memory only. The end of an open migration is stored at its time.
    pub(super) async fn store_again(&mut self) -> Result<(), ApiError> {
        if !self.born || self.migration.is_some() || self.before_incoming.is_some() {
            return Ok(());
        }
        // The record comes last: the one that was refused with the images may be older.
        let batch = self.unstored.clone().unwrap_or_default().put_vm(self.record())?;
        self.daemon.store.commit(batch).await?;
        self.unstored = None;
        self.forget_dead().await;
        Ok(())
    }
}
