//! What a daemon does at its start about worker processes that outlived the last one (handover.md section 3).
//!
//! Recovery from the journal takes every worker for dead. So, before it: a worker that it would be wrong about is
//! brought into a state in which nothing depends on it. After it: every worker of a machine that is owned here is given to the machine's actor.
//!
//! | journal | live worker | before recovery | after recovery |
//! |---|---|---|---|
//! | Owned, Entered | any | attached; one that refuses stays, its machine is Failed | the actor adopts it, or seals it and says why not |
//! | Open | whole | Owned(e+1) is journalled | adopted under a grant of e+1 |
//! | Quiesced | whole | attached; its copy is kept | the destination is asked; Owned(e+1), unless a later owner exists there |
//! | Committing, HandedOver | any but one that runs | attached; its copy is kept | sealed again, Go sent again, until released or given back |
//! | Incoming, Ready | complete | attached; its copy is kept | stays ready, and the source is asked |
//! | Incoming, Ready | with a right to run | sealed, Uncertain | – |
//! | Uncertain; none, in a store with holes | any | left alone | – |
//! | Deleted, Released and all else, none | any | ended | – |
//!
//! A worker that does not answer is not dead. Where its row needs no word of it (Owned, Entered, Open, a renewal) the
//! journal is settled at once and its actor waits for it; from Quiesced on who settles its migration does. The
//! start itself waits for one deadline of a call, whatever their number.
//!
//! Invariant: when recovery begins, each machine has at most one live worker, which obeys this daemon's term or has not
//! answered.

mod sorting;
mod worth;

use std::collections::BTreeMap;
use std::sync::Arc;

use futures_util::StreamExt as _;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{GuestEnd, WorkerStatus, worker_status};

use crate::capacity::Grant;
use crate::daemon::Daemon;
use crate::status::ApiError;
use crate::vm::command::Command;
use crate::worker_link::{ConsoleHistory, WorkerLink};
use crate::worker_process::WorkerProcess;

pub use worth::{Worth, worth};

/// Machines whose workers are looked at together.
const AT_ONCE: usize = 32;

/// The worker of a machine that leaves is no whole machine.
const NOT_WHOLE: &str = "WORKER_NOT_WHOLE";

/// What became of a worker while no daemon looked.
pub enum Survivor {
    /// It lives and obeys this daemon.
    Live {
        /// The way to it.
        worker: WorkerLink,
        /// What it says of itself.
        status: Box<WorkerStatus>,
    },
    /// It does not answer: it may hold the only copy.
    Silent {
        /// The way to it.
        worker: WorkerLink,
    },
    /// It died.
    Dead {
        /// How its guest had ended before, if it had.
        end: Option<GuestEnd>,
        /// What it had printed.
        console: ConsoleHistory,
        /// Runtime directory that tells of both, until they are stored.
        left: Option<String>,
    },
    /// It lives and cannot be used, or had to be ended: why.
    Refused(ApiError),
}

impl Survivor {
    /// What a worker that was attached is now. Only its death makes it dead.
    pub async fn ask(worker: WorkerLink) -> Self {
        match worker.status().await {
            Ok(status) => Self::Live { worker, status: Box::new(status) },
            Err(_) if worker.is_dead().await => {
                let end = worker.death("it ended while it was asked").await.end;
                Self::Dead { end, console: worker.last_output().await, left: None }
            }
            Err(error) if worker.may_live(&error).await => {
                tracing::warn!(pid = worker.pid(), %error, "a worker does not say what it is");
                Self::Silent { worker }
            }
            Err(error) => {
                worker.keep();
                Self::Refused(error)
            }
        }
    }
}

/// Looks for workers and settles what recovery must not meet.
pub async fn before_recovery(daemon: &Arc<Daemon>) -> Result<(Vec<(String, Survivor)>, Copies), ApiError> {
    let processes = &daemon.workers.processes;
    let uids = processes.all().await.map_err(|e| {
        ApiError::internal("RUNTIME_DIR", format!("{}: {e}; make it readable", processes.run_dir.display()))
    })?;
    let mut machines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in uids {
        let uid = name.split('.').next().unwrap_or_default().to_owned();
        machines.entry(uid).or_default().push(name);
    }
    let (mut survivors, mut copies) = (Vec::new(), Copies::new());
    // Many at once: each that does not answer takes its deadline.
    let mut sorted = futures_util::stream::iter(machines)
        .map(|(uid, names)| async move {
            let mut held = Copies::new();
            let found = sorting::sort_out(daemon, &uid, names, &mut held).await;
            (uid, found, held)
        })
        .buffer_unordered(AT_ONCE);
    while let Some((uid, found, held)) = sorted.next().await {
        copies.extend(held);
        survivors.extend(found?.map(|survivor| (uid, survivor)));
    }
    drop(sorted);
    close_renewals(daemon, &survivors).await?;
    Ok((survivors, copies))
}

/// The machine was being given another worker of this host, at the stop.
fn is_renewal(daemon: &Daemon, held: &OwnershipRecord) -> bool {
    held.phase() == Phase::Quiesced && held.peer_host == daemon.host.host_id
}

/// The old worker died with the daemon, whose threads it was, and the new one may hold the copy: then it is the machine.
async fn inherit(daemon: &Arc<Daemon>, held: OwnershipRecord, process: WorkerProcess) -> Option<Survivor> {
    let uid = held.vm_uid.clone();
    let heir = OwnershipRecord { incarnation: held.incarnation + 1, ..held };
    let (worker, status) = match attach(daemon, &heir, process).await {
        Ok(attached) => attached,
        Err(error) => {
            tracing::error!(%uid, %error, "the new worker of a machine whose old one died cannot be attached");
            return None;
        }
    };
    // If it is silent nobody else has a copy, whatever its own is.
    if status.as_ref().is_some_and(|status| status.state() != worker_status::State::Ready) {
        worker.end().await;
        return None;
    }
    let record = OwnershipRecord { epoch: heir.epoch + 1, phase: Phase::Owned as i32, ..heir };
    match daemon.store.append_ownership(record).await {
        Ok(_) => Some(found(worker, status)),
        Err(error) => {
            tracing::error!(%uid, %error, "the new worker of a machine cannot be made its owner");
            worker.keep();
            Some(Survivor::Refused(error.into()))
        }
    }
}

/// A renewal whose workers are all gone has no other host to be asked: the machine is owned here, without a worker.
async fn close_renewals(daemon: &Arc<Daemon>, survivors: &[(String, Survivor)]) -> Result<(), ApiError> {
    for held in daemon.store.ownerships() {
        let undecided = survivors
            .iter()
            .all(|(uid, found)| *uid != held.vm_uid || matches!(found, Survivor::Dead { .. }));
        if is_renewal(daemon, &held) && undecided {
            let record = OwnershipRecord { epoch: held.epoch + 1, phase: Phase::Owned as i32, ..held };
            daemon.store.append_ownership(record).await?;
        }
    }
    Ok(())
}

/// A worker in a migration that another host may decide: it holds what may become the last copy.
pub struct Holder {
    /// The way to it.
    pub worker: WorkerLink,
    /// It has said what it is; else it does not answer.
    pub known: bool,
}

/// Such workers, by machine.
pub type Copies = BTreeMap<String, Holder>;

fn found(worker: WorkerLink, status: Option<WorkerStatus>) -> Survivor {
    match status {
        Some(status) => Survivor::Live { worker, status: Box::new(status) },
        None => Survivor::Silent { worker },
    }
}

/// The rows "HandedOver", "Incoming" and "Ready".
async fn keep_copy(daemon: &Arc<Daemon>, uid: &str, process: WorkerProcess) -> Option<Holder> {
    let held = daemon.store.ownership(uid).unwrap_or_default();
    let pid = process.pid();
    let (worker, status) = match attach(daemon, &held, process).await {
        Ok(attached) => attached,
        Err(error) => {
            tracing::error!(%uid, pid, %error, "a worker with a copy that moves cannot be attached; the copy is not used");
            return None;
        }
    };
    let Some(status) = status else {
        tracing::warn!(%uid, pid, "a worker with a copy that moves does not answer; it is asked until it does");
        return Some(Holder { worker, known: false });
    };
    match worth(held.phase(), &status) {
        Worth::Copy => return Some(Holder { worker, known: true }),
        Worth::Unrecorded => seal_uncertain(daemon, held, &worker, &status).await,
        Worth::Runaway => {
            tracing::error!(%uid, pid, "CRITICAL: a machine that was handed over runs here; it is ended");
            worker.end().await;
        }
        Worth::Ended | Worth::Nothing => {
            let state = status.state().as_str_name();
            tracing::warn!(%uid, pid, state, "a worker holds no copy any more; it is ended");
            worker.end().await;
        }
    }
    None
}

/// It was granted what the journal does not know: records were lost, and its copy may be the newest there is.
pub async fn seal_uncertain(
    daemon: &Arc<Daemon>,
    held: OwnershipRecord,
    worker: &WorkerLink,
    status: &WorkerStatus,
) {
    let (uid, epoch) = (held.vm_uid.clone(), status.granted_epoch.max(held.epoch));
    tracing::error!(%uid, pid = worker.pid(), epoch, "CRITICAL: a worker that only receives has been granted; it is sealed");
    if let Err(error) = worker.seal("", epoch).await {
        tracing::error!(%uid, %error, "and it does not answer");
    }
    worker.keep();
    let record = OwnershipRecord { phase: Phase::Uncertain as i32, epoch, ..held };
    if let Err(error) = daemon.store.append_ownership(record).await {
        tracing::error!(%uid, %error, "that a machine is uncertain cannot be journalled");
    }
}

/// None if it was ended and nobody needs to know, or if it is among the copies.
async fn settle(
    daemon: &Arc<Daemon>,
    uid: &str,
    process: WorkerProcess,
    copies: &mut Copies,
) -> Option<Survivor> {
    let held = daemon.store.ownership(uid).unwrap_or_default();
    let wanted = matches!(held.phase(), Phase::Owned | Phase::Entered | Phase::Open | Phase::Quiesced);
    if !wanted {
        process.end().await;
        return None;
    }
    if daemon.store.get_vm(uid).is_none() && daemon.store.damaged().is_empty() {
        // The last daemon died while it created this machine and had acknowledged nothing.
        process.end().await;
        return None;
    }
    let pid = process.pid();
    let (worker, status) = match attach(daemon, &held, process).await {
        Ok(attached) => attached,
        Err(error) => {
            tracing::error!(%uid, pid, %error, "a worker that outlived the last vpmud cannot be attached");
            return Some(Survivor::Refused(error));
        }
    };
    let holds = status.as_ref().is_none_or(|status| worth(Phase::Quiesced, status) == Worth::Copy);
    if held.phase() == Phase::Quiesced && !is_renewal(daemon, &held) && holds {
        // Nothing was committed; but a destination that was forced to own it meanwhile is obeyed.
        copies.insert(uid.to_owned(), Holder { worker, known: status.is_some() });
        return None;
    }
    let open = held.phase() == Phase::Open;
    if matches!(held.phase(), Phase::Open | Phase::Quiesced)
        && let Err(error) = abort(daemon, held, &worker, status.as_ref()).await
    {
        if error.reason() != NOT_WHOLE && status.is_some() && open {
            // The record's fault, not the worker's: who settles its migration writes it until it is durable.
            tracing::error!(%uid, pid, %error, "that a migration is aborted cannot be journalled; its machine runs on");
            copies.insert(uid.to_owned(), Holder { worker, known: true });
            return None;
        }
        if status.is_none() || error.reason() != NOT_WHOLE {
            tracing::error!(%uid, pid, %error, "an open migration cannot be aborted; its worker is left alone");
            worker.keep();
        } else {
            tracing::error!(%uid, pid, %error, "a worker in an open migration was ended");
            worker.end().await;
        }
        return Some(Survivor::Refused(error));
    }
    Some(found(worker, status))
}

/// Whether a worker that refuses this daemon is of no use. Recovery may give a machine in an open migration away, and a
/// worker of a former incarnation was on its way out; every other stays until its machine is started, stopped or deleted.
pub fn dispensable(phase: Phase, refusal: &ApiError) -> bool {
    let open = matches!(phase, Phase::Open | Phase::Quiesced | Phase::Incoming | Phase::Ready);
    open || refusal.reason() == "OTHER_INCARNATION"
}

/// Without a status it does not answer.
async fn attach(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    process: WorkerProcess,
) -> Result<(WorkerLink, Option<WorkerStatus>), ApiError> {
    let record = daemon.store.get_vm(&held.vm_uid).and_then(|r| r.vm).unwrap_or_default();
    let name = crate::names::VmName::parse("name", &record.name, "");
    let owner = name.map_or_else(|_| held.vm_uid.clone(), |name| name.vm().to_owned());
    let Some(spec) = record.spec else {
        process.keep();
        return Err(ApiError::internal("OWNERSHIP_UNCERTAIN", "the store knows nothing of this machine"));
    };
    let (capacity, cores) = (Arc::clone(&daemon.capacity), record.vcpu_cores);
    let grant = move |cores: Vec<u32>| -> Grant { capacity.adopt(&owner, &spec, cores) };
    let refused = |error: &ApiError| dispensable(held.phase(), error);
    let vm = (&*held.vm_uid, held.incarnation);
    WorkerLink::adopt(&daemon.workers, process, vm, cores, grant, refused).await
}

/// The source alone decides until it has committed: it keeps the machine, durably, before anything is asked.
async fn abort(
    daemon: &Arc<Daemon>,
    held: OwnershipRecord,
    worker: &WorkerLink,
    status: Option<&WorkerStatus>,
) -> Result<(), ApiError> {
    use worker_status::State as S;
    if let Some(status) = status
        && !matches!(status.state(), S::Running | S::Paused | S::Sealed | S::Ended)
    {
        return Err(ApiError::internal(
            NOT_WHOLE,
            format!("the worker is {}, which no machine that leaves is", status.state().as_str_name()),
        ));
    }
    let id = held.migration_id.clone();
    let next = OwnershipRecord {
        epoch: held.epoch.saturating_add(1),
        owner_host: daemon.host.host_id.clone(),
        phase: Phase::Owned as i32,
        digest: Vec::new(),
        ..held
    };
    let journalled = daemon.store.append_ownership(next).await;
    // One that does not answer is told when it does. The copy is given up whatever becomes of the record.
    if status.is_some()
        && let Err(error) = worker.cancel_migration(&id).await
    {
        tracing::info!(migration = %id, %error, "the copy had ended already");
    }
    Ok(journalled.map(drop)?)
}

/// Gives what was found to the machines' actors.
pub async fn after_recovery(daemon: &Arc<Daemon>, survivors: Vec<(String, Survivor)>) {
    futures_util::stream::iter(survivors)
        .for_each_concurrent(AT_ONCE, |(uid, survivor)| give(daemon, uid, survivor))
        .await;
}

async fn give(daemon: &Arc<Daemon>, uid: String, survivor: Survivor) {
    if let Some(handle) = daemon.registry.by_uid(&uid) {
        let survivor = Box::new(survivor);
        if let Err(error) = handle.ask(|reply| Command::Reattach { survivor, reply }).await {
            tracing::error!(%uid, %error, "a machine that outlived the last daemon");
        }
        return;
    }
    match survivor {
        Survivor::Live { worker, .. } => {
            tracing::warn!(%uid, "a worker without a machine is ended");
            worker.end().await;
        }
        Survivor::Silent { worker } => {
            tracing::warn!(%uid, "a worker without a machine does not answer; it is left alone");
            worker.keep();
        }
        // A machine that is not shown yet will be.
        Survivor::Dead { left: Some(left), .. } if daemon.store.get_vm(&uid).is_none() => {
            daemon.workers.processes.forget(vec![left]).await;
        }
        Survivor::Dead { .. } | Survivor::Refused(_) => {}
    }
}
