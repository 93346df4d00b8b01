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
//! | Deleted, Released and all else, none | any | ended | – |
//!
//! Invariant: when recovery begins, each machine has at most one live worker and it has this daemon's term.

use std::collections::BTreeMap;
use std::sync::Arc;

use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{GuestEnd, WorkerStatus, worker_status};

use crate::capacity::Grant;
use crate::daemon::Daemon;
use crate::status::ApiError;
use crate::vm::command::Command;
use crate::worker_link::{ConsoleHistory, WorkerLink};
use crate::worker_process::{Found, WorkerProcess};

/// What became of a worker while no daemon looked.
pub enum Survivor {
    /// It lives and obeys this daemon.
    Live {
        /// The way to it.
        worker: WorkerLink,
        /// What it says of itself.
        status: Box<WorkerStatus>,
    },
    /// It was attached and has not answered since: it may hold the only copy.
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
                Self::Dead { end, console: worker.last_output().await }
            }
            Err(error) => {
                tracing::warn!(pid = worker.pid(), %error, "a worker does not say what it is");
                Self::Silent { worker }
            }
        }
    }
}

/// Looks for workers and settles what recovery must not meet.
pub async fn before_recovery(daemon: &Arc<Daemon>) -> Result<(Vec<(String, Survivor)>, Copies), ApiError> {
    let processes = &daemon.workers.processes;
    let uids = processes.uids().map_err(|e| {
        ApiError::internal("RUNTIME_DIR", format!("{}: {e}; make it readable", processes.run_dir.display()))
    })?;
    let mut machines: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for name in uids {
        let uid = name.split('.').next().unwrap_or_default().to_owned();
        machines.entry(uid).or_default().push(name);
    }
    let (mut survivors, mut copies) = (Vec::new(), Copies::new());
    for (uid, names) in machines {
        let found = sort_out(daemon, &uid, names, &mut copies).await?;
        survivors.extend(found.map(|survivor| (uid, survivor)));
    }
    close_renewals(daemon, &survivors).await?;
    Ok((survivors, copies))
}

/// A machine has one worker, or two while one was to replace the other (`migration::renew`): the record's incarnation says
/// which it is, and the other is ended before anything else.
async fn sort_out(
    daemon: &Arc<Daemon>,
    uid: &str,
    names: Vec<String>,
    copies: &mut Copies,
) -> Result<Option<Survivor>, ApiError> {
    let processes = &daemon.workers.processes;
    let held = daemon.store.ownership(uid).unwrap_or_default();
    let own = format!("{uid}.{}", held.incarnation);
    let next = format!("{uid}.{}", held.incarnation + 1);
    let (mut live, mut dead) = (BTreeMap::new(), None);
    for name in names {
        match processes.find(&name) {
            Ok(Found::Live(process)) => drop(live.insert(name, *process)),
            Ok(Found::Dead(end)) => {
                let console = processes.last_output(&name).map(ConsoleHistory::from).unwrap_or_default();
                processes.clear(&name);
                if name == own || name == uid {
                    dead = Some(Survivor::Dead { end, console });
                }
            }
            Ok(Found::Nothing) => processes.clear(&name),
            // Unreachable is not dead: nothing is started beside it.
            Err(error) => {
                return Err(ApiError::internal(
                    "WORKER_UNKNOWN",
                    format!("whether the worker of machine {uid} lives cannot be told: {error}"),
                ));
            }
        }
    }
    let current = live.remove(&own).or_else(|| live.remove(uid));
    let heir = live.remove(&next).filter(|_| current.is_none() && is_renewal(daemon, &held));
    for (name, process) in live {
        tracing::info!(
            name,
            pid = process.pid(),
            "a worker that another has replaced, or was to replace, is ended"
        );
        process.end().await;
    }
    if let Some(process) = current {
        let pid = process.pid();
        let phase = held.phase();
        if matches!(phase, Phase::HandedOver | Phase::Committing | Phase::Incoming | Phase::Ready) {
            if let Some(copy) = keep_copy(daemon, uid, process).await {
                copies.insert(uid.to_owned(), copy);
            }
            return Ok(None);
        }
        let survivor = settle(daemon, uid, process, copies).await;
        if copies.contains_key(uid) {
            return Ok(None);
        }
        if survivor.is_none() {
            tracing::info!(%uid, pid, "the worker of a machine that is not here any more was ended");
        }
        return Ok(survivor);
    }
    if let Some(process) = heir
        && let Some(survivor) = inherit(daemon, held, process).await
    {
        return Ok(Some(survivor));
    }
    Ok(dead)
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
    if status.state() != worker_status::State::Ready {
        worker.end().await;
        return None;
    }
    let record = OwnershipRecord { epoch: heir.epoch + 1, phase: Phase::Owned as i32, ..heir };
    match daemon.store.append_ownership(record).await {
        Ok(_) => Some(Survivor::Live { worker, status: Box::new(status) }),
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

/// Workers in a migration that another host may decide: each holds what may become the last copy.
pub type Copies = BTreeMap<String, WorkerLink>;

/// The rows "HandedOver": one that runs is ended, every other keeps its copy. The rows "Incoming" and "Ready": a complete
/// copy was perhaps promised, an incomplete one is of no use.
async fn keep_copy(daemon: &Arc<Daemon>, uid: &str, process: WorkerProcess) -> Option<WorkerLink> {
    let held = daemon.store.ownership(uid).unwrap_or_default();
    let pid = process.pid();
    let (worker, status) = match attach(daemon, &held, process).await {
        Ok(attached) => attached,
        Err(error) => {
            tracing::error!(%uid, pid, %error, "a worker with a copy that moves cannot be attached; the copy is not used");
            return None;
        }
    };
    let arriving = matches!(held.phase(), Phase::Incoming | Phase::Ready);
    match status.state() {
        worker_status::State::Ready if arriving && status.granted_epoch == 0 => Some(worker),
        _ if arriving && status.granted_epoch > 0 => {
            seal_uncertain(daemon, held, &worker, &status).await;
            None
        }
        worker_status::State::Running => {
            tracing::error!(%uid, pid, "CRITICAL: a machine that was handed over runs here; it is ended");
            worker.end().await;
            None
        }
        worker_status::State::Paused | worker_status::State::Sealed if !arriving => Some(worker),
        state => {
            tracing::warn!(%uid, pid, state = state.as_str_name(), "a worker holds no copy any more; it is ended");
            worker.end().await;
            None
        }
    }
}

/// It was granted what the journal does not know: records were lost, and its copy may be the newest there is.
async fn seal_uncertain(
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
    let whole = [worker_status::State::Running, worker_status::State::Paused, worker_status::State::Sealed];
    if held.phase() == Phase::Quiesced && !is_renewal(daemon, &held) && whole.contains(&status.state()) {
        // Nothing was committed; but a destination that was forced to own it meanwhile is obeyed.
        copies.insert(uid.to_owned(), worker);
        return None;
    }
    if matches!(held.phase(), Phase::Open | Phase::Quiesced)
        && let Err(error) = abort(daemon, held, &worker, &status).await
    {
        tracing::error!(%uid, pid, %error, "a worker in an open migration was ended");
        worker.end().await;
        return Some(Survivor::Refused(error));
    }
    Some(Survivor::Live { worker, status: Box::new(status) })
}

async fn attach(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    process: WorkerProcess,
) -> Result<(WorkerLink, WorkerStatus), ApiError> {
    let record = daemon.store.get_vm(&held.vm_uid).and_then(|r| r.vm).unwrap_or_default();
    let name = crate::names::VmName::parse("name", &record.name, "");
    let owner = name.map_or_else(|_| held.vm_uid.clone(), |name| name.vm().to_owned());
    let Some(spec) = record.spec else {
        process.keep();
        return Err(ApiError::internal("OWNERSHIP_UNCERTAIN", "the store knows nothing of this machine"));
    };
    let grant = |cores: Vec<u32>| -> Grant { daemon.capacity.adopt(&owner, &spec, cores) };
    // Unreachable is not dead: such a worker stays until its machine is started, stopped or deleted. But recovery may
    // give a machine in an open migration away, and a worker of a former incarnation was on its way out.
    let open = matches!(held.phase(), Phase::Open | Phase::Quiesced | Phase::Incoming | Phase::Ready);
    // The source of one that was not stopped yet keeps the only copy, also if it says nothing.
    let only = |error: &ApiError| held.phase() == Phase::Open && crate::worker_link::is_mute(error);
    let dispensable = |error: &ApiError| open && !only(error) || error.reason() == "OTHER_INCARNATION";
    WorkerLink::adopt(&daemon.workers, process, &held.vm_uid, held.incarnation, grant, dispensable).await
}

/// The source alone decides until it has committed: it keeps the machine, durably, before anything is asked.
async fn abort(
    daemon: &Arc<Daemon>,
    held: OwnershipRecord,
    worker: &WorkerLink,
    status: &WorkerStatus,
) -> Result<(), ApiError> {
    use worker_status::State as S;
    if !matches!(status.state(), S::Running | S::Paused | S::Sealed | S::Ended) {
        return Err(ApiError::internal(
            "WORKER_NOT_WHOLE",
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
    daemon.store.append_ownership(next).await?;
    if let Err(error) = worker.cancel_migration(&id).await {
        tracing::info!(migration = %id, %error, "the copy had ended already");
    }
    Ok(())
}

/// Gives what was found to the machines' actors.
pub async fn after_recovery(daemon: &Arc<Daemon>, survivors: Vec<(String, Survivor)>) {
    for (uid, survivor) in survivors {
        let Some(handle) = daemon.registry.by_uid(&uid) else {
            if let Survivor::Live { worker, .. } | Survivor::Silent { worker } = survivor {
                tracing::warn!(%uid, "a worker without a machine is ended");
                worker.end().await;
            }
            continue;
        };
        let survivor = Box::new(survivor);
        if let Err(error) = handle.ask(|reply| Command::Reattach { survivor, reply }).await {
            tracing::error!(%uid, %error, "a machine that outlived the last daemon");
        }
    }
}
