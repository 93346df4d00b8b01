//! An arrival whose worker outlived the daemon with a complete copy: the row "Incoming or Ready, complete" of handover.md
//! section 3. It stays ready, asks the source, and goes on in `destination_run` as if nothing had been. If the worker does
//! not answer, what its copy is worth is not known, and its machine waits for it.
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
use crate::adopt::{Worth, seal_uncertain, worth};
use crate::daemon::Daemon;
use crate::handover::destination::{Destination, Effect};
use crate::handover::recovery::Worker;
use crate::handover::{self, Handover};
use crate::names::VmName;
use crate::status::ApiError;
use crate::vm::registry::VmHandle;
use crate::worker_link::WorkerLink;

/// An arrival that goes on.
pub(super) struct Resumed {
    arrival: Incoming,
    first: Vec<Effect>,
}

/// An arrival whose machine is shown again, and about which nobody else decides meanwhile.
pub(super) struct Shown {
    daemon: Arc<Daemon>,
    handle: VmHandle,
    record: VmRecord,
    held: OwnershipRecord,
    id: uuid::Uuid,
    run: bool,
    ear: Ear,
}

/// What a worker that was silent turned out to be.
pub(super) enum Waited {
    /// Its copy is complete.
    Whole(Box<Resumed>),
    /// It is dead, or holds no copy; its machine is still shown.
    Lost(VmHandle),
    /// It had been granted: its machine is uncertain now.
    Uncertain(VmHandle),
    /// The daemon ends first, or nobody can say.
    Left,
}

impl Shown {
    /// Shows the machine as arriving again.
    pub(super) fn new(
        daemon: &Arc<Daemon>,
        record: Option<VmRecord>,
        held: OwnershipRecord,
    ) -> Result<Self, ApiError> {
        let mut record = record.ok_or_else(|| bad("the store knows nothing of its machine"))?;
        let vm = arriving(record.vm.take().unwrap_or_default());
        let (name, run) =
            (VmName::parse("vm.name", &vm.name, "")?, vm.desired_state() != DesiredState::Paused);
        record.vm = Some(VirtualMachine { epoch: held.epoch, incarnation: held.incarnation, ..vm });
        let id =
            uuid::Uuid::try_parse(&held.migration_id).map_err(|_| bad("its migration's id is not a UUID"))?;
        let ear = Ear::of(daemon, &held.vm_uid);
        let handle = daemon.registry.insert(daemon, &name, record.clone(), held.clone(), false)?;
        Ok(Self { daemon: Arc::clone(daemon), handle, record, held, id, run, ear })
    }

    /// Asks a worker that does not answer what it is, until it answers, dies or the daemon ends. Until then nothing is
    /// known that an order to take the machine by force could be judged by.
    pub(super) async fn wait(mut self, worker: WorkerLink) -> Waited {
        tracing::warn!(vm = %self.handle.name, pid = worker.pid(), "a worker with a copy that arrives does not answer; it is asked until it does");
        let (daemon, held) = (Arc::clone(&self.daemon), self.held.clone());
        let answered = answer_of(&daemon, &held, &worker);
        tokio::pin!(answered);
        let answer = loop {
            tokio::select! {
                answer = &mut answered => break answer,
                order = self.ear.hear() => drop(self.ear.answer(order, false)),
                () = self.daemon.shutdown.cancelled() => {
                    let upgrading = self.daemon.upgrading.load(std::sync::atomic::Ordering::SeqCst);
                    if worker.outlives_daemon(upgrading) {
                        worker.keep();
                    } else {
                        worker.end().await;
                    }
                    return Waited::Left;
                }
            }
        };
        match answer {
            Answer::Ready(ready) => {
                let handle = self.handle.clone();
                match Resumed::of(self, *ready, &worker) {
                    Ok(resumed) => Waited::Whole(Box::new(resumed)),
                    Err(error) => {
                        // Its record would not go on: nothing is decided by that.
                        tracing::error!(vm = %handle.name, %error, "a copy that outlived the last vpmud cannot be used");
                        worker.keep();
                        Waited::Left
                    }
                }
            }
            Answer::Lost => Waited::Lost(self.handle),
            Answer::Uncertain => Waited::Uncertain(self.handle),
        }
    }
}

enum Answer {
    Ready(Box<Ready>),
    Lost,
    Uncertain,
}

async fn answer_of(daemon: &Arc<Daemon>, held: &OwnershipRecord, worker: &WorkerLink) -> Answer {
    let uid = &held.vm_uid;
    loop {
        // Each question waits for its deadline, or for the process to end: no pause is needed between them.
        let status = match worker.status().await {
            Ok(status) => status,
            Err(error) if worker.may_live(&error).await => {
                tracing::warn!(%uid, %error, "a worker with a copy is asked again");
                continue;
            }
            Err(error) => {
                tracing::error!(%uid, %error, "a worker with a copy that arrives is of no use");
                break;
            }
        };
        match worth(held.phase(), &status) {
            Worth::Copy => match Resumed::ready(daemon, worker, &held.migration_id).await {
                Ok(ready) => return Answer::Ready(Box::new(ready)),
                Err(error) if worker.may_live(&error).await => {}
                Err(error) => {
                    tracing::error!(%uid, %error, "a copy that outlived the last vpmud cannot be used");
                    break;
                }
            },
            Worth::Unrecorded => {
                seal_uncertain(daemon, held.clone(), worker, &status).await;
                return Answer::Uncertain;
            }
            Worth::Ended | Worth::Runaway | Worth::Nothing => break,
        }
    }
    if !worker.end().await {
        tracing::error!(%uid, pid = worker.pid(), "a worker was ended and may still live; waiting");
        worker.died().await;
        worker.end().await;
    }
    Answer::Lost
}

fn bad(text: &str) -> ApiError {
    ApiError::internal("WORKER_NOT_WHOLE", text)
}

impl Resumed {
    /// Makes a machine that is shown as arriving again reachable for its source.
    pub(super) fn of(shown: Shown, ready: Ready, worker: &WorkerLink) -> Result<Self, ApiError> {
        let Shown { daemon, handle, record, held, id, run, ear } = shown;
        let digest =
            handover::digest(&ready.state_digest).ok_or_else(|| bad("its digest has not 32 bytes"))?;
        let handover = Handover::of(&held, &daemon.host.host_id, run);
        let (machine, first) = Destination::recovered(handover, &held, Worker::Complete { digest })
            .ok_or_else(|| bad("its record does not go on"))?;
        let voice = daemon.migrations.answers.voice(&held.migration_id, machine.answer());
        let (door, streams) = mpsc::channel(1);
        daemon.migrations.incoming().insert(id, door);
        daemon.migrations.arriving().insert(id, worker.clone());
        tracing::info!(vm = %handle.name, pid = worker.pid(), "a complete copy outlived vpmud; asking its source");
        let arrival = Incoming {
            daemon,
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
    pub(super) async fn ready(
        daemon: &Daemon,
        worker: &WorkerLink,
        migration: &str,
    ) -> Result<Ready, ApiError> {
        let mut progress = worker.watch_incoming(migration).await?;
        let told = tokio::time::timeout(daemon.limits.command, progress.message()).await;
        let told = told.map_err(|_| ApiError::internal(crate::worker_link::SILENT, "it does not answer"))?;
        match told.map_err(|status| ApiError::from_status("worker", &status))? {
            Some(p) if p.ready && handover::digest(&p.state_digest).is_none() => {
                Err(bad("its digest has not 32 bytes"))
            }
            Some(p) if p.ready => {
                // What was asked of the PMU is not known any more; what it is now is in the images.
                let vcpu_cores = worker.cores().to_vec();
                let (state_digest, pmu, restore_us) = (p.state_digest, p.pmu, p.restore_us);
                Ok(Ready { state_digest, pmu, restore_us, vcpu_cores, ..Ready::default() })
            }
            _ => Err(bad("its copy is not complete")),
        }
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
