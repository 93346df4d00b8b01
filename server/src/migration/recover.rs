//! What a daemon does at its start about machines it knows: the table of the handover rules, as far as thread
//! isolation needs it, where every worker died with its daemon.
//!
//! | journal | then |
//! |---|---|
//! | Owned, Entered | stopped, HOST_RESTARTED, if it ran |
//! | Open | aborted: Owned(e+1), stopped |
//! | Quiesced | asks the destination: a ready copy is committed late, else LOST |
//! | HandedOver | tombstone; asks the destination until it has entered or returned |
//! | Incoming | Aborted |
//! | Ready | asks the source: Returned if it had committed, else Aborted |
//! | Deleted | the rest of it is removed |
//! | Uncertain, none | failed, OWNERSHIP_UNCERTAIN: neither started nor removed by itself |

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::migration::State as MigrationState;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::peer::destination_message::Message as FromDestination;
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::source_message::{Go, Message as FromSource, Open};
use vpmu_proto::peer::{ResolveRequest, ResolveResponse, SourceMessage};
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use crate::daemon::Daemon;
use crate::names::VmName;
use crate::peer::Peer;
use crate::status::ApiError;
use crate::vm::command::{Command, Outcome};

/// Between two questions to the other host.
const ASK: Duration = Duration::from_secs(1);
/// Bound on the answer to a late Go.
const GO: Duration = Duration::from_secs(20);

const RESTARTED: &str =
    "vpmud was restarted and the machine ended with it (thread isolation); start it again";

/// Brings every known machine back as what it is.
pub async fn recover(daemon: &Arc<Daemon>) -> Result<(), ApiError> {
    let mut records: std::collections::BTreeMap<String, VmRecord> = daemon
        .store
        .list_vms()
        .into_iter()
        .map(|r| (r.vm.as_ref().map(|vm| vm.uid.clone()).unwrap_or_default(), r))
        .collect();
    for held in daemon.store.ownerships() {
        let record = records.remove(&held.vm_uid);
        let uid = held.vm_uid.clone();
        if let Err(error) = recover_one(daemon, held, record).await {
            tracing::error!(%uid, %error, "a machine could not be brought back");
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
    end_migrations(daemon).await
}

async fn recover_one(
    daemon: &Arc<Daemon>,
    held: OwnershipRecord,
    record: Option<VmRecord>,
) -> Result<(), ApiError> {
    let stored = record
        .as_ref()
        .and_then(|r| r.vm.as_ref())
        .map_or(State::Unspecified, VirtualMachine::observed_state);
    match (held.phase(), record) {
        (Phase::Owned | Phase::Entered, Some(record)) => own(daemon, record, held, stored),
        (Phase::Open, Some(record)) => {
            let abort = OwnershipRecord {
                epoch: held.epoch + 1,
                owner_host: daemon.host.host_id.clone(),
                phase: Phase::Owned as i32,
                ..held
            };
            let held = daemon.store.append_ownership(abort).await?;
            own(daemon, record, held, stored)
        }
        (Phase::Quiesced | Phase::Committing, Some(record)) => {
            show(
                daemon,
                record,
                held.clone(),
                State::MigratingOut,
                "IN_DOUBT",
                "vpmud was restarted in the middle of a migration; asking the destination",
            )?;
            daemon.tasks.spawn(settle_source(Arc::clone(daemon), held));
            Ok(())
        }
        (Phase::HandedOver, Some(record)) => {
            moved(daemon, record, held.clone())?;
            daemon.tasks.spawn(settle_source(Arc::clone(daemon), held));
            Ok(())
        }
        (Phase::Released, Some(record)) => moved(daemon, record, held),
        (Phase::Incoming, record) => {
            let aborted = OwnershipRecord { phase: Phase::Aborted as i32, ..held };
            daemon.store.append_ownership(aborted).await?;
            discard(daemon, record).await
        }
        (Phase::Ready, record) => {
            daemon.tasks.spawn(settle_ready(Arc::clone(daemon), held));
            discard(daemon, record).await
        }
        (Phase::Aborted | Phase::Returned | Phase::Superseded, Some(record)) if stored == State::Moved => {
            moved(daemon, record, held)
        }
        (Phase::Aborted | Phase::Returned | Phase::Superseded | Phase::Deleted, record) => {
            discard(daemon, record).await
        }
        (Phase::Uncertain | Phase::Unspecified, Some(record)) => show(
            daemon,
            record,
            held,
            State::Failed,
            "OWNERSHIP_UNCERTAIN",
            "the ownership journal lost records of this machine; it is neither started nor removed by itself",
        ),
        (phase, None) => {
            tracing::warn!(uid = %held.vm_uid, ?phase, "the journal knows a machine that the store does not");
            Ok(())
        }
    }
}

/// It belongs here.
fn own(daemon: &Arc<Daemon>, record: VmRecord, held: OwnershipRecord, stored: State) -> Result<(), ApiError> {
    let vm = record.vm.clone().unwrap_or_default();
    match stored {
        State::Stopped | State::Failed => show(daemon, record, held, stored, &vm.reason, &vm.message),
        _ => show(daemon, record, held, State::Stopped, "HOST_RESTARTED", RESTARTED),
    }
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
            fail(
                migration,
                "HOST_RESTARTED",
                "vpmud was restarted before the migration was committed; the machine stayed here",
            );
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

async fn ask(daemon: &Daemon, held: &OwnershipRecord) -> Option<(Peer, ResolveResponse)> {
    let address = held.peer_address.parse().ok()?;
    let peer = Peer::connect(&address).await.ok()?;
    let request = ResolveRequest {
        migration_id: held.migration_id.clone(),
        vm_uid: held.vm_uid.clone(),
        host_id: daemon.host.host_id.clone(),
        store_id: held.peer_store.clone(),
    };
    let answer = peer.resolve(request).await.ok()?;
    Some((peer, answer))
}

/// A source without its worker: what the destination says, decides.
async fn settle_source(daemon: Arc<Daemon>, mut held: OwnershipRecord) {
    loop {
        match step_source(&daemon, &mut held).await {
            Ok(true) => return,
            Ok(false) => {}
            Err(error) => tracing::warn!(uid = %held.vm_uid, %error, "settling a migration; trying again"),
        }
        tokio::select! {
            () = tokio::time::sleep(ASK) => {}
            () = daemon.shutdown.cancelled() => return,
        }
    }
}

async fn step_source(daemon: &Arc<Daemon>, held: &mut OwnershipRecord) -> Result<bool, ApiError> {
    let Some((peer, answer)) = ask(daemon, held).await else { return Ok(false) };
    let committed = held.phase() == Phase::HandedOver;
    match (committed, answer.decision()) {
        (true, Decision::Committed | Decision::Superseded) => {
            let released = OwnershipRecord { phase: Phase::Released as i32, ..held.clone() };
            *held = daemon.store.append_ownership(released).await?;
            settled(daemon, held, None).await?;
            Ok(true)
        }
        (true, Decision::Returned) => {
            back(daemon, held, held.epoch + 1, ApiError::aborted("HOST_RESTARTED", &held.vm_uid, RESTARTED))
                .await?;
            Ok(true)
        }
        (false, Decision::Ready) => {
            // The copy is saved by a late commit: Quiesced means that the machine has not run here since.
            let decided = OwnershipRecord {
                epoch: held.epoch + 1,
                owner_host: held.peer_host.clone(),
                phase: Phase::HandedOver as i32,
                digest: answer.state_digest.clone(),
                ..held.clone()
            };
            *held = daemon.store.append_ownership(decided).await?;
            go(daemon, held, &peer).await;
            Ok(false)
        }
        (true, Decision::Ready) => {
            go(daemon, held, &peer).await;
            Ok(false)
        }
        (false, Decision::Aborted | Decision::Unknown | Decision::Returned) => {
            let lost = ApiError::internal(
                "LOST",
                "vpmud died while the machine was stopped for a migration and the destination holds no complete copy; start it afresh",
            );
            back(daemon, held, held.epoch + 1, lost).await?;
            Ok(true)
        }
        _ => Ok(false),
    }
}

/// Sends Go once and waits for the answer; what it was is asked again by Resolve.
async fn go(daemon: &Arc<Daemon>, held: &OwnershipRecord, peer: &Peer) {
    let vm = daemon.registry.by_uid(&held.vm_uid).map(|h| h.view().vm.clone());
    let keep_paused = vm
        .as_ref()
        .is_some_and(|vm| vm.desired_state() == vpmu_proto::api::virtual_machine::DesiredState::Paused);
    let message = |epoch, message| SourceMessage {
        migration_id: held.migration_id.clone(),
        vm_uid: held.vm_uid.clone(),
        epoch,
        message: Some(message),
    };
    let (to, outbox) = mpsc::channel(2);
    let _ = to.try_send(message(held.epoch - 1, FromSource::Open(Open {})));
    let order = Go { state_digest: held.digest.clone(), vm, keep_paused };
    let _ = to.try_send(message(held.epoch, FromSource::Go(order)));
    let Ok(mut from) = peer.handover(outbox).await else { return };
    let wait = async {
        while let Ok(Some(m)) = from.message().await {
            if matches!(m.message, Some(FromDestination::Entered(_) | FromDestination::Returned(_))) {
                return;
            }
        }
    };
    let _ = tokio::time::timeout(GO, wait).await;
}

/// It is owned here again, without a worker.
async fn back(
    daemon: &Arc<Daemon>,
    held: &mut OwnershipRecord,
    epoch: u64,
    why: ApiError,
) -> Result<(), ApiError> {
    let owned = OwnershipRecord {
        epoch,
        owner_host: daemon.host.host_id.clone(),
        phase: Phase::Owned as i32,
        ..held.clone()
    };
    *held = daemon.store.append_ownership(owned).await?;
    settled(daemon, held, Some(why)).await
}

async fn settled(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    stayed: Option<ApiError>,
) -> Result<(), ApiError> {
    if let Some(mut record) = daemon.store.get_migration(&held.vm_uid, &held.migration_id) {
        if let Some(migration) = record.migration.as_mut() {
            match &stayed {
                None => {
                    migration.set_state(MigrationState::Succeeded);
                    migration.end_time = Some(crate::ops::now());
                }
                Some(why) => fail(migration, why.reason(), why.message()),
            }
        }
        daemon.store.put_migration(&record).await?;
    }
    let Some(handle) = daemon.registry.by_uid(&held.vm_uid) else { return Ok(()) };
    let outcome = match stayed {
        None => Outcome::Moved { ownership: held.clone(), moved_to: held.peer_host.clone() },
        Some(why) => Outcome::Stayed { ownership: held.clone(), lost: Some(why) },
    };
    handle.ask(|reply| Command::EndMigration { outcome, reply }).await
}

/// A destination that had promised Ready and lost the copy with its daemon: the source is told once it has decided.
async fn settle_ready(daemon: Arc<Daemon>, held: OwnershipRecord) {
    loop {
        let decision = ask(&daemon, &held).await.map(|(_, answer)| answer.decision());
        let next = match decision {
            Some(Decision::Committed) => Some((Phase::Returned, held.epoch + 2)),
            Some(Decision::Aborted | Decision::Superseded) => Some((Phase::Aborted, held.epoch + 1)),
            _ => None,
        };
        if let Some((phase, epoch)) = next {
            let record = OwnershipRecord { phase: phase as i32, epoch, ..held.clone() };
            match daemon.store.append_ownership(record).await {
                Ok(_) => return,
                Err(error) => tracing::warn!(uid = %held.vm_uid, %error, "settling an arrival; trying again"),
            }
        }
        tokio::select! {
            () = tokio::time::sleep(ASK) => {}
            () = daemon.shutdown.cancelled() => return,
        }
    }
}
