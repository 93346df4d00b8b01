//! A machine is created: as a record, or as a record and a worker that runs it at once.
//!
//! Invariant: whoever is refused, or dies in between, leaves nothing.

use uuid::Uuid;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use super::Actor;
use super::restarting::{note, wall_ms};
use crate::ops::{Running, Seed};
use crate::status::ApiError;
use crate::store::Batch;
use crate::vm::command::Reply;
use crate::vm::restart::Event;
use crate::worker_link::Launch;

impl Actor {
    pub(super) async fn create(&mut self, seed: Seed, start: bool, reply: Reply<Uuid>) {
        if self.born {
            let _ = reply.send(Err(ApiError::already_exists(
                "VirtualMachine",
                &self.name.to_string(),
                "look at it",
            )));
            return;
        }
        if start {
            return self.create_started(seed, reply).await;
        }
        let Some(running) = self.begin(seed, reply).await else {
            self.forget();
            return;
        };
        match self.do_create().await {
            Ok(()) => running.finish(Ok(self.answer())).await,
            Err(error) => {
                self.forget();
                running.finish(Err(error)).await;
            }
        }
    }

    /// Creates a machine that is to run at once. The operation's and the ownership's records are made durable while the
    /// worker builds the machine, which it cannot run before it is granted, and it is granted once they are; the machine's
    /// record and the operation's end are one write. A daemon that dies in between leaves no machine: what it finds of the
    /// worker it ends.
    async fn create_started(&mut self, seed: Seed, reply: Reply<Uuid>) {
        let _awake = self.daemon.awake.hold();
        let spec = self.vm.spec.clone().unwrap_or_default();
        let grant = self.daemon.capacity.grant(self.name.vm(), &spec);
        let refused = grant.is_err();
        let incarnation = u64::from(!refused);
        let first = self.first(incarnation);
        let daemon = std::sync::Arc::clone(&self.daemon);
        let (permit, permitted) = tokio::sync::oneshot::channel();
        let recorded = async {
            let (begun, owned) = tokio::join!(self.begin(seed, reply), daemon.store.append_ownership(first));
            if let (Some(_), Ok(owned)) = (&begun, &owned) {
                // Nobody waits for it if there is no worker.
                let _ = permit.send(owned.epoch);
            }
            (begun, owned)
        };
        let launched = async {
            let plan = Launch { first: true, ..self.plan(incarnation, &spec, None) };
            self.launch(grant?, plan, async { permitted.await.ok() }).await
        };
        // The worker first: it takes longer, on other cores.
        let (launched, (begun, owned)) = tokio::join!(biased; launched, recorded);
        let failed = match (&begun, &owned) {
            (Some(_), Ok(_)) => None,
            (_, Err(error)) => Some(ApiError::from(error.clone())),
            (None, Ok(_)) => Some(ApiError::shutting_down()),
        };
        if let Ok(owned) = owned {
            self.ownership = owned;
        }
        let Some(running) = begun else {
            // The caller was refused: nothing of it stays.
            if let Ok(launched) = launched {
                launched.worker.end().await;
            }
            let gone = OwnershipRecord { phase: Phase::Deleted as i32, ..self.ownership.clone() };
            if let Err(error) = daemon.store.append_ownership(gone).await {
                tracing::warn!(vm = %self.name, %error, "the record of a machine that was refused stays");
            }
            return self.forget();
        };
        if let Some(error) = failed {
            if let Ok(launched) = launched {
                launched.worker.end().await;
            }
            self.forget();
            return running.finish(Err(error)).await;
        }
        let mut running = running;
        let started = match launched {
            Ok(launched) => {
                let runs = launched.runs;
                self.take_worker(launched);
                self.run_and_record(&mut running, runs).await
            }
            Err(error) => Err(error),
        };
        self.born = true;
        let Err(mut error) = started else {
            self.announce(Kind::Created);
            return running.show_end();
        };
        if let Some(worker) = self.worker.take() {
            error = worker.cause(error).await;
            worker.end().await;
        }
        // Without room for it nothing of the machine failed: it waits to be started.
        let (state, reason, message) =
            if refused { (State::Stopped, "", "") } else { (State::Failed, error.reason(), error.message()) };
        self.edit(state, reason, message, |vm| {
            vm.set_desired_state(DesiredState::Stopped);
            vm.create_time = Some(crate::ops::now());
        });
        let batch = Batch::new().put_vm(self.record()).unwrap_or_default();
        // Logged there.
        let _ = running.finish_with(batch, Err(error)).await;
        self.announce(Kind::Created);
    }

    /// Lets a new machine run, unless it `runs` already, while its record and the operation's end are made durable. Nobody
    /// sees either before both are done; if the daemon dies in between, it is as if it had died right afterwards.
    async fn run_and_record(&mut self, running: &mut Running, runs: bool) -> Result<(), ApiError> {
        self.edit(State::Running, "", "", |vm| {
            vm.set_desired_state(DesiredState::Running);
            vm.create_time = Some(crate::ops::now());
            note(vm, Event::Running { now: wall_ms() });
        });
        let batch = Batch::new().put_vm(self.record())?;
        let batch = running.record_end(batch, Ok(self.answer()))?;
        let (runs, stored) = tokio::join!(self.let_run(true, runs), self.daemon.store.commit(batch));
        runs?;
        Ok(stored?)
    }

    /// The first ownership record.
    fn first(&self, incarnation: u64) -> OwnershipRecord {
        OwnershipRecord {
            vm_uid: self.vm.uid.clone(),
            epoch: 1,
            owner_host: self.daemon.host.host_id.clone(),
            incarnation,
            phase: Phase::Owned as i32,
            ..OwnershipRecord::default()
        }
    }

    pub(super) async fn do_create(&mut self) -> Result<(), ApiError> {
        self.ownership = self.daemon.store.append_ownership(self.first(0)).await?;
        self.change(State::Stopped, "", "", Kind::Created, |vm| {
            vm.set_desired_state(DesiredState::Stopped);
            vm.create_time = Some(crate::ops::now());
        })
        .await?;
        self.born = true;
        Ok(())
    }
}
