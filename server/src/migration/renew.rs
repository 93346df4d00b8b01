//! A new worker for a machine on this host, without a stop that anybody notices: for `vpmud upgrade`. Its memory is handed
//! over as in local mode; one daemon decides, so there is one journal and no peer.
//!
//! ```text
//! new worker built beside, incarnation i+1 ─▶ Open(e) ─▶ memory mapped there ─▶ Quiesced(e) ─▶ old one sealed at e,
//! state set in the new one ─▶ digests equal ─▶ Owned(e+1, i+1) durable: the decision ─▶ grant e+1 ─▶ old one ended
//!           before the decision anything may fail: Owned(e+1, i) durable ─▶ the old one goes on under e+1
//! ```
//!
//! | daemon dies with the journal at | old worker | then (`adopt`) |
//! |---|---|---|
//! | Open, Quiesced | lives | Owned(e+1, i): it goes on; the new one is ended |
//! | Quiesced | dead (it was threads of the daemon) | the new one, if READY: Owned(e+1, i+1), granted; else the copy is lost |
//! | Owned(e+1, i+1) | any | ended; the new one is granted e+1 |
//!
//! A worker that lives and does not answer its grant is still the machine: the machine's task has it then, and asks it until
//! it does (`vm::actor::reattach`).
//!
//! Invariants: a grant of e+1 goes to the worker whose incarnation the durable record names, and to no other; the new one
//! cannot write the memory before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{
    FinishMigrationResponse, IncomingProgress, MigrateOutRequest, PrepareIncomingRequest,
};

use super::record::{Backoff, Written, write};
use super::source::micros;
use super::{destination, hold, source_end};
use crate::daemon::Daemon;
use crate::handover::step::HandoverStep as Step;
use crate::names::MigrationName;
use crate::status::ApiError;
use crate::vm::command::{Command, Lease, Outcome};
use crate::vm::registry::VmHandle;
use crate::worker_link::{Launch, WorkerLink};

/// Bound on mapping the memory.
const MAP: Duration = Duration::from_secs(15);
/// Bound on the stop.
const FINISH: Duration = Duration::from_secs(30);
/// A worker that refuses this many grants is ended; one that does not answer as many is left to its machine, which goes on
/// asking it.
const GRANTS: u32 = 3;

/// What it came to.
pub struct Renewed {
    /// The new worker's process.
    pub pid: u32,
    /// vCPUs stopped to running (or granted, if paused), microseconds.
    pub blackout_us: u64,
    /// Everything, microseconds.
    pub total_us: u64,
    /// The new worker has the machine and did not answer its grant: why; the machine's task asks it on.
    pub unheard: Option<ApiError>,
}

struct Renewal<'a> {
    daemon: &'a Arc<Daemon>,
    handle: &'a VmHandle,
    lease: Lease,
    id: Uuid,
    cancel: CancellationToken,
    committed: Arc<AtomicBool>,
    /// The record that holds.
    held: OwnershipRecord,
}

/// What the new worker is ready with.
struct Ready {
    worker: WorkerLink,
    finish: FinishMigrationResponse,
    progress: IncomingProgress,
}

/// Gives the machine a worker of the image that the daemon is told to use. On an error it runs on where it was, unless
/// the error is of its worker's death, which its state shows.
pub async fn renew(daemon: &Arc<Daemon>, handle: &VmHandle) -> Result<Renewed, ApiError> {
    let begin = Instant::now();
    let id = Uuid::new_v4();
    let (cancel, committed) = (CancellationToken::new(), Arc::new(AtomicBool::new(false)));
    let name = MigrationName { vm: handle.name.clone(), id }.to_string();
    let lease = handle
        .ask(|reply| Command::BeginMigration {
            name,
            cancel: cancel.clone(),
            committed: Arc::clone(&committed),
            reply,
        })
        .await?;
    let held = lease.ownership.clone();
    let mut renewal = Renewal { daemon, handle, lease, id, cancel, committed, held };
    match renewal.prepare().await {
        Ok(ready) => renewal.enter(ready, begin).await,
        Err(error) => {
            let lost = renewal.back().await;
            let outcome = Outcome::Stayed { ownership: renewal.held, lost };
            handle.ask(|reply| Command::EndMigration { outcome, reply }).await?;
            Err(error)
        }
    }
}

impl Renewal<'_> {
    /// Everything up to the decision, and the decision. After an error the old worker is the machine.
    async fn prepare(&mut self) -> Result<Ready, ApiError> {
        let vm = self.lease.record.vm.clone().unwrap_or_default();
        let spec = vm.spec.unwrap_or_default();
        // The memory is there once, whoever maps it; it counts twice until nothing of the old worker runs.
        let grant =
            self.daemon.capacity.adopt(self.handle.name.vm(), &spec, self.lease.worker.cores().to_vec());
        let launch = Launch {
            vm_uid: &self.handle.uid,
            vm_name: self.handle.name.vm(),
            incarnation: self.held.incarnation + 1,
            spec: &spec,
            incoming: true,
            pmu_shape: self.lease.record.pmu_shape.clone(),
            restore: None,
            beside: true,
            first: false,
        };
        let (worker, _) = WorkerLink::launch(&self.daemon.workers, grant, launch).await?;
        match self.hand_over(&worker, spec.memory_bytes).await {
            Ok((finish, progress)) => Ok(Ready { worker, finish, progress }),
            // Whether the decision is durable is not known: the next daemon reads it and ends the other one.
            Err(error) if self.committed.load(Ordering::SeqCst) => {
                worker.keep();
                Err(error)
            }
            Err(error) => {
                worker.end().await;
                // The worker removes it when it has everything; one that died before does not.
                let _ = std::fs::remove_file(destination::data_socket(self.daemon, self.id));
                Err(error)
            }
        }
    }

    async fn hand_over(
        &mut self,
        fresh: &WorkerLink,
        memory_bytes: u64,
    ) -> Result<(FinishMigrationResponse, IncomingProgress), ApiError> {
        let id = self.id.to_string();
        self.save(Phase::Open, Step::SourcePersistOpen).await?;
        let mut token = Uuid::new_v4().as_bytes().to_vec();
        token.extend_from_slice(Uuid::new_v4().as_bytes());
        let incoming = PrepareIncomingRequest {
            migration_id: id.clone(),
            attempt: 1,
            token: token.clone(),
            listen: format!("unix:{}", destination::data_socket(self.daemon, self.id).display()),
            connections: 1,
            memory_bytes,
            local: true,
            ..PrepareIncomingRequest::default()
        };
        let data_address = fresh.prepare_incoming(incoming).await?.data_address;
        let mut arriving = fresh.watch_incoming(&id).await?;
        let old = self.lease.worker.clone();
        let request = MigrateOutRequest {
            migration_id: id.clone(),
            attempt: 1,
            data_address,
            token,
            connections: 1,
            local: true,
            ..MigrateOutRequest::default()
        };
        let mut leaving = old.migrate_out(request).await?;
        let mapped = async {
            while let Some(progress) = leaving.message().await? {
                if progress.converged {
                    return Ok(());
                }
            }
            Err(tonic::Status::internal("the worker ended the copy without a reason"))
        };
        bounded(MAP, mapped).await?;
        self.save(Phase::Quiesced, Step::SourcePersistQuiesced).await?;
        if self.cancel.is_cancelled() || self.daemon.shutdown.is_cancelled() {
            return Err(ApiError::cancelled("CANCELLED", "the machine is wanted for something else"));
        }
        hold::at(&self.daemon.hold_at, false, Some(Step::SourceSeal));
        let finish = old.finish_migration(&id, self.held.epoch, FINISH).await?;
        let ready = async {
            while let Some(progress) = arriving.message().await? {
                if progress.ready {
                    return Ok(progress);
                }
            }
            Err(tonic::Status::internal("the new worker ended without a reason"))
        };
        let progress = bounded(FINISH, ready).await?;
        if progress.state_digest != finish.state_digest {
            return Err(source_end::mismatch());
        }
        hold::at(&self.daemon.hold_at, true, Some(Step::SourceSeal));
        self.committed.store(true, Ordering::SeqCst);
        let decision = OwnershipRecord {
            epoch: self.held.epoch + 1,
            incarnation: self.held.incarnation + 1,
            ..self.owned()
        };
        self.decide(decision, Step::SourcePersistHandedOver).await?;
        Ok((finish, progress))
    }

    /// The new worker is the machine.
    async fn enter(self, ready: Ready, begin: Instant) -> Result<Renewed, ApiError> {
        let Ready { worker, finish, progress } = ready;
        let run = !self.lease.paused;
        let granted = grant(&worker, self.held.epoch, run).await;
        hold::at(&self.daemon.hold_at, true, Some(Step::DestinationGrant));
        let heard = match &granted {
            Ok(_) => true,
            Err(error) => !worker.may_live(error).await,
        };
        let running = match &granted {
            Ok(0) => vcpu_worker::host::monotonic_ns(),
            Ok(at) => *at,
            // It is the machine, whatever it did with the grant.
            Err(_) if !heard => 0,
            Err(error) => {
                let error = error.clone();
                // It may have run: the old one's state is no longer the machine's.
                worker.end().await;
                self.lease.worker.end().await;
                let outcome = Outcome::Stayed { ownership: self.held, lost: Some(error.clone()) };
                self.handle.ask(|reply| Command::EndMigration { outcome, reply }).await?;
                return Err(error);
            }
        };
        let pid = worker.pid();
        let ownership = self.held.clone();
        let images = progress.pmu;
        let told =
            self.handle.ask(|reply| Command::Renewed { worker, ownership, images, heard, reply }).await;
        hold::at(&self.daemon.hold_at, false, Some(Step::SourceRelease));
        self.lease.worker.depart(&self.daemon.workers.processes).await;
        told?;
        let blackout_us = running.saturating_sub(finish.stop_monotonic_ns) / 1000;
        Ok(Renewed { pid, blackout_us, total_us: micros(begin.elapsed()), unheard: granted.err() })
    }

    /// The old worker goes on; why not, if it is dead.
    async fn back(&mut self) -> Option<ApiError> {
        if self.committed.load(Ordering::SeqCst) {
            let why = "the decision between two workers of the machine could not be written; restart vpmud";
            return Some(ApiError::internal("OWNERSHIP_UNCERTAIN", why));
        }
        if !matches!(self.held.phase(), Phase::Open | Phase::Quiesced) {
            return None;
        }
        let record = OwnershipRecord { epoch: self.held.epoch + 1, ..self.owned() };
        if let Err(error) = self.decide(record, Step::SourcePersistOwned).await {
            return Some(error);
        }
        let old = &self.lease.worker;
        if let Err(error) = old.cancel_migration(&self.id.to_string()).await {
            tracing::debug!(vm = %self.handle.name, %error, "the hand-over had ended already");
        }
        grant(old, self.held.epoch, !self.lease.paused).await.err()
    }

    fn owned(&self) -> OwnershipRecord {
        OwnershipRecord {
            owner_host: self.daemon.host.host_id.clone(),
            phase: Phase::Owned as i32,
            digest: Vec::new(),
            peer_host: String::new(),
            ..self.held.clone()
        }
    }

    /// A record of the open renewal.
    async fn save(&mut self, phase: Phase, step: Step) -> Result<(), ApiError> {
        let record = OwnershipRecord {
            phase: phase as i32,
            migration_id: self.id.to_string(),
            peer_host: self.daemon.host.host_id.clone(),
            ..self.owned()
        };
        self.decide(record, step).await
    }

    /// Writes a record until it is durable, or is refused.
    async fn decide(&mut self, record: OwnershipRecord, step: Step) -> Result<(), ApiError> {
        hold::at(&self.daemon.hold_at, false, Some(step));
        let mut backoff = Backoff::new();
        loop {
            match write(&self.daemon.store, record.clone()).await {
                Written::Durable(record) => {
                    self.held = record;
                    hold::at(&self.daemon.hold_at, true, Some(step));
                    return Ok(());
                }
                Written::Refused(error) => return Err(error),
                Written::InDoubt(error) => {
                    tracing::error!(vm = %self.handle.name, %error, "a decision is not durable yet; trying again");
                    if !backoff.pause(&self.daemon.shutdown).await {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// Asks a few times: an answer may get lost, and the same right may be given again.
async fn grant(worker: &WorkerLink, epoch: u64, run: bool) -> Result<u64, ApiError> {
    let mut granted = worker.grant(epoch, run).await;
    for _ in 1..GRANTS {
        if granted.is_err() {
            granted = worker.grant(epoch, run).await;
        }
    }
    granted
}

async fn bounded<T>(
    within: Duration,
    what: impl Future<Output = Result<T, tonic::Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(within, what).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(status)) => Err(ApiError::from_status("worker", &status)),
        Err(_) => Err(ApiError::unavailable(
            "WORKER_TIMEOUT",
            format!("a worker did not answer within {} s", within.as_secs()),
        )),
    }
}
