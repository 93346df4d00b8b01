//! A machine is paused and resumed, and the record of that, which may be a little behind.

use std::time::Duration;

use tokio::time::Instant;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;

use super::Actor;
use crate::status::ApiError;
use crate::store::Batch;
use crate::vm::transitions::Action;

/// How long the record of whether a machine is paused may be behind: one write then stands for several.
const BEHIND: Duration = Duration::from_millis(20);
/// The same in thread isolation, where nobody else would know after the daemon's death: not much longer than the write
/// itself takes.
const BEHIND_IN_THREAD: Duration = Duration::from_millis(5);

impl Actor {
    pub(super) async fn pause(&mut self) -> Result<VirtualMachine, ApiError> {
        self.admit(Action::Pause)?;
        let worker = self.worker.clone().ok_or_else(|| self.refuse(Action::Pause))?;
        let images = match worker.pause().await {
            Ok(images) => images,
            Err(error) => {
                // Some vCPUs may be out of the guest. The record says RUNNING, so they go on.
                if let Err(again) = worker.run().await {
                    tracing::error!(vm = %self.vm.name, %again, "a machine that could not be paused does not go on");
                }
                return Err(error);
            }
        };
        let edit = |vm: &mut VirtualMachine| vm.set_desired_state(DesiredState::Paused);
        self.edit(State::Paused, "", "", edit);
        let stored = if images.is_empty() {
            self.store_soon()
        } else {
            let batch = match Batch::new().put_vm(self.record()) {
                Ok(batch) => self.with_pmu(batch, images, &worker.cores(), "pause"),
                Err(error) => Err(error.into()),
            };
            match batch {
                Ok(batch) => self.commit_pmu(batch).await,
                Err(error) => Err(error),
            }
        };
        self.announce(Kind::Updated);
        stored?;
        Ok(self.vm.clone())
    }

    pub(super) async fn resume(&mut self) -> Result<VirtualMachine, ApiError> {
        self.admit(Action::Resume)?;
        let worker = self.worker.clone().ok_or_else(|| self.refuse(Action::Resume))?;
        worker.run().await?;
        let edit = |vm: &mut VirtualMachine| vm.set_desired_state(DesiredState::Running);
        self.edit(State::Running, "", "", edit);
        let stored = self.store_soon();
        self.announce(Kind::Updated);
        stored?;
        Ok(self.vm.clone())
    }

    /// What a live worker knows better follows the answer, together with whatever else happens in between.
    fn store_soon(&mut self) -> Result<(), ApiError> {
        if let crate::store::Health::ReadOnly { cause } = self.daemon.store.health() {
            return Err(crate::store::StoreError::ReadOnly { cause }.into());
        }
        let behind = if self.vm.worker_pid == 0 { BEHIND_IN_THREAD } else { BEHIND };
        self.record_due.get_or_insert_with(|| Instant::now() + behind);
        Ok(())
    }

    /// Stores the record as it is now, if it is behind; in order with all other writes of this machine.
    pub(super) async fn store_behind(&mut self) {
        if self.record_due.take().is_none() || self.gone {
            return;
        }
        let stored = match Batch::new().put_vm(self.record()) {
            Ok(batch) => self.daemon.store.enqueue(batch).await,
            Err(error) => Err(error),
        };
        let queued = match stored {
            Ok(queued) => queued,
            Err(error) => {
                tracing::error!(vm = %self.name, %error, "whether it is paused could not be stored");
                return;
            }
        };
        let vm = self.name.to_string();
        self.daemon.tasks.spawn(async move {
            if let Err(error) = queued.durable().await {
                tracing::error!(%vm, %error, "whether it is paused could not be stored");
            }
        });
    }
}
