//! What a daemon does at its start about machines it knows: `handover::recovery::decide` for each record, with every
//! worker dead (thread isolation: they died with their daemon), and the machines of `handover` where it says to go on.
//!
//! | journal | then |
//! |---|---|
//! | Owned, Entered | stopped, HOST_RESTARTED, if it ran |
//! | Open | aborted: Owned(e+1), stopped; with its worker alive that was done before, or is tried again behind the start |
//! | Quiesced | asks the destination: a ready copy is committed late; one that is surely not there is LOST; else in doubt. With its worker alive it stays here: Owned(e+1) |
//! | HandedOver | tombstone; asks the destination until it has entered or returned |
//! | Incoming, Ready | asks the source: Returned if it had committed, Aborted if it keeps it. With a complete worker alive it stays ready, and enters if the source has committed |
//! | Deleted | the rest of it is removed |
//! | Uncertain, none | failed, OWNERSHIP_UNCERTAIN: neither started nor removed by itself |

mod later;

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::migration::State as MigrationState;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use self::later::{go_on, settle_destination, settle_source, wait};
use super::resume::{Resumed, Shown};
use super::settle;
use crate::adopt::{Copies, Holder};
use crate::daemon::Daemon;
use crate::handover::recovery::{Action, Records, Worker, decide};
use crate::names::VmName;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// How long the start waits for an abort to be durable; it goes on behind the start then.
const ABORT: Duration = Duration::from_secs(10);

const NOT_COMMITTED: &str = "vpmud was restarted before the migration was committed; the machine stayed here";
const RESTARTED: &str = "vpmud was restarted and the machine did not outlive it; start it again";

/// Brings every known machine back as what it is.
/// `copies`: workers that outlived the last daemon with a copy that moves.
pub async fn recover(daemon: &Arc<Daemon>, mut copies: Copies) -> Result<(), ApiError> {
    super::destination::remove_data_sockets(daemon);
    let mut records: std::collections::BTreeMap<String, VmRecord> = daemon
        .store
        .list_vms()
        .into_iter()
        .map(|r| (r.vm.as_ref().map(|vm| vm.uid.clone()).unwrap_or_default(), r))
        .collect();
    let mut open = Vec::new();
    for held in daemon.store.ownerships() {
        let record = records.remove(&held.vm_uid);
        let uid = held.vm_uid.clone();
        match recover_one(daemon, held, record, &mut copies).await {
            Ok(later) => open.extend(later),
            Err(error) => tracing::error!(%uid, %error, "a machine could not be brought back"),
        }
    }
    for record in records.into_values() {
        show(
            daemon,
            record,
            OwnershipRecord::default(),
            State::Failed,
            "OWNERSHIP_UNCERTAIN",
            "the journal knows nothing of this machine; it is neither started nor removed by itself",
        )?;
    }
    if let Err(error) = end_migrations(daemon).await {
        // History; the machines are what counts.
        tracing::error!(%error, "migrations that were cut off are not shown as ended");
    }
    for later in open {
        match later {
            Later::Source(held) => {
                let holder = copies.remove(&held.vm_uid);
                daemon.tasks.spawn(settle_source(Arc::clone(daemon), held, None, holder))
            }
            Later::Destination(held, over) => {
                daemon.tasks.spawn(settle_destination(Arc::clone(daemon), held, over))
            }
            Later::Arrival(held, arrival, over) => {
                daemon.tasks.spawn(go_on(Arc::clone(daemon), held, arrival, over))
            }
            Later::Silent(held, shown, worker, over) => {
                daemon.tasks.spawn(wait(Arc::clone(daemon), held, shown, worker, over))
            }
        };
    }
    for (uid, Holder { worker, .. }) in copies {
        // Its machine could not be brought back: who knows what the copy is worth keeps it.
        tracing::error!(%uid, pid = worker.pid(), "a worker with a copy is left alone: its machine could not be brought back");
        worker.keep();
    }
    Ok(())
}

/// What the other host is asked about once everything is known here.
enum Later {
    Source(OwnershipRecord),
    Destination(OwnershipRecord, CancellationToken),
    Arrival(OwnershipRecord, Box<Resumed>, CancellationToken),
    Silent(OwnershipRecord, Box<Shown>, WorkerLink, CancellationToken),
}

async fn recover_one(
    daemon: &Arc<Daemon>,
    held: OwnershipRecord,
    record: Option<VmRecord>,
    copies: &mut Copies,
) -> Result<Option<Later>, ApiError> {
    if matches!(held.phase(), Phase::Incoming | Phase::Ready)
        && let Some(holder) = copies.remove(&held.vm_uid)
        && let Some(later) = resume_destination(daemon, record.clone(), &held, holder).await?
    {
        return Ok(Some(later));
    }
    let stored = record
        .as_ref()
        .and_then(|r| r.vm.as_ref())
        .map_or(State::Unspecified, VirtualMachine::observed_state);
    match (decide(Some(&held), Worker::Dead, Records::Whole), record) {
        (Action::Fail, Some(record)) => own(daemon, record, held, stored)?,
        (Action::ResumeSource, Some(record)) => {
            let holds = copies.contains_key(&held.vm_uid);
            return resume_source(daemon, record, held, holds).await;
        }
        (Action::ResumeDestination, Some(record)) if held.phase() == Phase::Entered => {
            // It is owned here: nothing is asked.
            let arrived = settle::destination(Arc::clone(daemon), held.clone()).await;
            own(daemon, record, arrived.map_or(held, |(_, held)| held), stored)?;
        }
        (Action::ResumeDestination, record) if held.phase() != Phase::Entered => {
            let over = CancellationToken::new();
            daemon.migrations.settling().insert(held.vm_uid.clone(), over.clone());
            if let Err(error) = discard(daemon, record).await {
                tracing::error!(uid = %held.vm_uid, %error, "the record of a lost copy could not be removed");
            }
            return Ok(Some(Later::Destination(held, over)));
        }
        (Action::Rest, Some(record)) if held.phase() == Phase::Released => moved(daemon, record, held)?,
        (Action::Rest, Some(record)) if held.phase() == Phase::Superseded && stored != State::Incoming => {
            superseded(daemon, record, held)?;
        }
        (Action::Rest, Some(record)) if stored == State::Moved && held.phase() != Phase::Deleted => {
            moved(daemon, record, held)?;
        }
        (Action::Rest, record) => discard(daemon, record).await?,
        // Uncertain; of a dead worker the table says nothing else.
        (_, Some(record)) => show(
            daemon,
            record,
            held,
            State::Failed,
            "OWNERSHIP_UNCERTAIN",
            "the ownership journal lost records of this machine; it is neither started nor removed by itself",
        )?,
        (_, None) => {
            tracing::warn!(uid = %held.vm_uid, phase = ?held.phase(), "the journal knows a machine that the store does not");
        }
    }
    Ok(None)
}

/// None if the copy is of no use: then it is as if its worker were dead.
async fn resume_destination(
    daemon: &Arc<Daemon>,
    record: Option<VmRecord>,
    held: &OwnershipRecord,
    holder: Holder,
) -> Result<Option<Later>, ApiError> {
    let Holder { worker, known } = holder;
    let over = CancellationToken::new();
    let settling = || drop(daemon.migrations.settling().insert(held.vm_uid.clone(), over.clone()));
    let ready = if known { Some(Resumed::ready(daemon, &worker, &held.migration_id).await) } else { None };
    let ready = match ready {
        Some(Err(error)) if !worker.may_live(&error).await => Err(error),
        Some(Ok(ready)) => Ok(Some(ready)),
        // What it is worth is known once it answers.
        Some(Err(_)) | None => Ok(None),
    };
    let error = match ready {
        Ok(ready) => {
            let shown = Shown::new(daemon, record, held.clone()).and_then(|shown| match ready {
                Some(ready) => Resumed::of(shown, ready, &worker)
                    .map(|arrival| Later::Arrival(held.clone(), Box::new(arrival), over.clone())),
                None => Ok(Later::Silent(held.clone(), Box::new(shown), worker.clone(), over.clone())),
            });
            match shown {
                Ok(later) => {
                    settling();
                    return Ok(Some(later));
                }
                Err(error) => {
                    // Nothing that the copy is to blame for.
                    tracing::error!(uid = %held.vm_uid, %error, "a worker with a copy is left alone: its machine cannot be shown");
                    worker.keep();
                    return Err(error);
                }
            }
        }
        Err(error) => error,
    };
    tracing::error!(uid = %held.vm_uid, %error, "a copy that outlived the last vpmud cannot be used");
    if worker.end().await {
        return Ok(None);
    }
    worker.keep();
    Err(error)
}

async fn resume_source(
    daemon: &Arc<Daemon>,
    record: VmRecord,
    held: OwnershipRecord,
    holds: bool,
) -> Result<Option<Later>, ApiError> {
    match held.phase() {
        // Nobody needs to be asked: the abort is durable before anything is served. (It was for one whose worker lives;
        // where that failed it is tried again beside everything else.)
        Phase::Open if !holds => {
            let aborting = daemon.tasks.spawn(settle_source(Arc::clone(daemon), held, Some(record), None));
            if tokio::time::timeout(ABORT, aborting).await.is_err() {
                tracing::error!(
                    "the abort of an open migration is not durable yet; its machine is shown once it is"
                );
            }
            return Ok(None);
        }
        Phase::HandedOver => moved(daemon, record, held.clone())?,
        _ => show(
            daemon,
            record,
            held.clone(),
            State::MigratingOut,
            "IN_DOUBT",
            "vpmud was restarted in the middle of a migration; asking its worker, if one lives, and the destination",
        )?,
    }
    Ok(Some(Later::Source(held)))
}

/// It belongs here.
fn own(daemon: &Arc<Daemon>, record: VmRecord, held: OwnershipRecord, stored: State) -> Result<(), ApiError> {
    let vm = record.vm.clone().unwrap_or_default();
    match stored {
        State::Stopped | State::Failed => show(daemon, record, held, stored, &vm.reason, &vm.message),
        _ => show(daemon, record, held, State::Stopped, "HOST_RESTARTED", RESTARTED),
    }
}

/// Another host took it by force.
fn superseded(daemon: &Arc<Daemon>, mut record: VmRecord, held: OwnershipRecord) -> Result<(), ApiError> {
    let owner = held.owner_host.clone();
    if let Some(vm) = &mut record.vm {
        vm.moved_to.clone_from(&owner);
        vm.next_restart_time = None;
    }
    let message =
        format!("host {owner} owns it by force, at epoch {} or later; it never runs here again", held.epoch);
    show(daemon, record, held, State::Moved, "SUPERSEDED", &message)
}

fn moved(daemon: &Arc<Daemon>, mut record: VmRecord, held: OwnershipRecord) -> Result<(), ApiError> {
    let to = if held.peer_host.is_empty() { held.owner_host.clone() } else { held.peer_host.clone() };
    if let Some(vm) = &mut record.vm
        && vm.moved_to.is_empty()
    {
        vm.moved_to.clone_from(&to);
    }
    show(daemon, record, held, State::Moved, "MOVED", &format!("it runs on host {to}"))
}

fn show(
    daemon: &Arc<Daemon>,
    mut record: VmRecord,
    held: OwnershipRecord,
    state: State,
    reason: &str,
    message: &str,
) -> Result<(), ApiError> {
    let mut vm = record.vm.take().unwrap_or_default();
    let name = VmName::parse("vm.name", &vm.name, "")?;
    vm.set_observed_state(state);
    reason.clone_into(&mut vm.reason);
    message.clone_into(&mut vm.message);
    (vm.epoch, vm.incarnation) = (held.epoch, held.incarnation);
    vm.vcpu_cores.clear();
    vm.worker_pid = 0;
    vm.sandbox.clear();
    vm.migration.clear();
    record.vm = Some(vm);
    daemon.registry.insert(daemon, &name, record, held, true).map(drop)
}

async fn discard(daemon: &Arc<Daemon>, record: Option<VmRecord>) -> Result<(), ApiError> {
    let Some(vm) = record.and_then(|r| r.vm) else { return Ok(()) };
    Ok(daemon.store.delete_vm(&vm.uid).await?)
}

/// Migrations that the last daemon left open and that are decided now.
async fn end_migrations(daemon: &Arc<Daemon>) -> Result<(), ApiError> {
    for mut record in daemon.store.list_all_migrations() {
        let Some(migration) = record.migration.as_mut() else { continue };
        let over = matches!(
            migration.state(),
            MigrationState::Succeeded | MigrationState::Failed | MigrationState::Cancelled
        );
        let held = daemon.store.ownership(&record.vm_uid).unwrap_or_default();
        let id = migration.name.rsplit('/').next().unwrap_or("");
        let open = held.migration_id == id
            && matches!(held.phase(), Phase::Quiesced | Phase::Committing | Phase::HandedOver);
        if over {
            continue;
        }
        if open {
            migration.set_state(MigrationState::InDoubt);
            "asking the destination".clone_into(&mut migration.phase);
        } else if held.migration_id == id && held.phase() == Phase::Released {
            migration.set_state(MigrationState::Succeeded);
            migration.end_time = Some(crate::ops::now());
        } else {
            fail(migration, "HOST_RESTARTED", NOT_COMMITTED);
        }
        daemon.store.put_migration(&record).await?;
    }
    Ok(())
}

fn fail(migration: &mut vpmu_proto::api::Migration, reason: &str, message: &str) {
    migration.set_state(MigrationState::Failed);
    reason.clone_into(&mut migration.reason);
    message.clone_into(&mut migration.message);
    migration.end_time = Some(crate::ops::now());
}
