//! An arrival whose worker outlived the daemon with a complete copy: the row "Incoming or Ready, complete" of handover.md
//! section 3. It stays ready, asks the source, and goes on in `destination_run` as if nothing had been.
//!
//! Invariant: nothing is dropped here. The copy may have been promised, so that only the source's word, or the worker's
//! death, ends it.

use std::sync::Arc;

use tokio::sync::mpsc;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::DesiredState;
use vpmu_proto::peer::PrepareRequest;
use vpmu_proto::peer::destination_message::Ready;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use super::destination::{Incoming, Way, arriving};
use super::destination_run::Work;
use super::force::Ear;
use crate::daemon::Daemon;
use crate::handover::destination::{Destination, Effect};
use crate::handover::recovery::Worker;
use crate::handover::{self, Handover};
use crate::names::VmName;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// An arrival that goes on.
pub(super) struct Resumed {
    arrival: Incoming,
    first: Vec<Effect>,
}

impl Resumed {
    /// Shows the machine as arriving again, and makes it reachable for its source.
    pub(super) async fn new(
        daemon: &Arc<Daemon>,
        record: Option<VmRecord>,
        held: OwnershipRecord,
        worker: &WorkerLink,
    ) -> Result<Self, ApiError> {
        let bad = |text: &str| ApiError::internal("WORKER_NOT_WHOLE", text);
        let mut record = record.ok_or_else(|| bad("the store knows nothing of its machine"))?;
        let vm = arriving(record.vm.take().unwrap_or_default());
        let (name, run) =
            (VmName::parse("vm.name", &vm.name, "")?, vm.desired_state() != DesiredState::Paused);
        record.vm = Some(VirtualMachine { epoch: held.epoch, incarnation: held.incarnation, ..vm });
        let id =
            uuid::Uuid::try_parse(&held.migration_id).map_err(|_| bad("its migration's id is not a UUID"))?;
        let ready = Self::ready(daemon, worker, &held.migration_id).await?;
        let digest =
            handover::digest(&ready.state_digest).ok_or_else(|| bad("its digest has not 32 bytes"))?;
        let handover = Handover::of(&held, &daemon.host.host_id, run);
        let (machine, first) = Destination::recovered(handover, &held, Worker::Complete { digest })
            .ok_or_else(|| bad("its record does not go on"))?;
        let ear = Ear::of(daemon, &held.vm_uid);
        let handle = daemon.registry.insert(daemon, &name, record.clone(), held.clone(), false)?;
        let voice = daemon.migrations.answers.voice(&held.migration_id, machine.answer());
        let (door, streams) = mpsc::channel(1);
        daemon.migrations.incoming().insert(id, door);
        daemon.migrations.arriving().insert(id, worker.clone());
        tracing::info!(vm = %name, pid = worker.pid(), "a complete copy outlived vpmud; asking its source");
        let arrival = Incoming {
            daemon: Arc::clone(daemon),
            handle,
            record,
            id,
            request: PrepareRequest::default(),
            way: Way::Unix,
            ownership: held,
            worker: Some(worker.clone()),
            work: Work::resumed(machine, voice, ready, streams, ear),
        };
        Ok(Self { arrival, first })
    }

    /// What the worker has received.
    async fn ready(daemon: &Daemon, worker: &WorkerLink, migration: &str) -> Result<Ready, ApiError> {
        let mut progress = worker.watch_incoming(migration).await?;
        let told = tokio::time::timeout(daemon.limits.command, progress.message()).await;
        let told = told.map_err(|_| ApiError::internal(crate::worker_link::SILENT, "it does not answer"))?;
        match told.map_err(|status| ApiError::from_status("worker", &status))? {
            Some(p) if p.ready => {
                // What was asked of the PMU is not known any more; what it is now is in the images.
                let vcpu_cores = worker.cores().to_vec();
                let (state_digest, pmu, restore_us) = (p.state_digest, p.pmu, p.restore_us);
                Ok(Ready { state_digest, pmu, restore_us, vcpu_cores, ..Ready::default() })
            }
            _ => Err(ApiError::internal("WORKER_NOT_WHOLE", "its copy is not complete")),
        }
    }

    pub(super) fn uid(&self) -> String {
        self.arrival.ownership.vm_uid.clone()
    }

    /// To the end, whatever the source says.
    pub(super) async fn run(self) {
        let Self { mut arrival, first } = self;
        for effect in first {
            arrival.execute(effect).await;
        }
        Box::pin(arrival.run()).await;
    }
}
