//! What goes on behind a start: the machines in a migration whose other host, or whose worker, must be asked first, and what
//! is shown of each once it is decided.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tokio_util::sync::CancellationToken;
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::migration::State as MigrationState;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{OwnershipRecord, VmRecord};

use super::super::resume::{Resumed, Shown, Waited};
use super::super::{force, released, settle};
use super::{NOT_COMMITTED, RESTARTED, fail, own};
use crate::adopt::{Holder, Survivor};
use crate::daemon::Daemon;
use crate::handover::source::{Cause, Outcome as Decided};
use crate::status::ApiError;
use crate::vm::command::{Command, Outcome};
use crate::worker_link::WorkerLink;

/// `unseen` is the machine's record if it is not shown yet. `holder`: its worker, if that outlived the last daemon.
pub(super) async fn settle_source(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    unseen: Option<VmRecord>,
    holder: Option<Holder>,
) {
    let (uid, committed) = (held.vm_uid.clone(), held.phase() == Phase::HandedOver);
    let Some(settled_as) = settle::source(Arc::clone(&daemon), held, holder).await else { return };
    let settle::Settled { outcome: decided, held, worker: copy, died, unserved } = settled_as;
    if decided == Decided::Moved && (died || unserved.is_some()) {
        released::tell(&daemon, &held);
    }
    if decided == Decided::Uncertain
        && let Some(copy) = &copy
    {
        // Sealed, and perhaps the newest there is.
        copy.keep();
    }
    let shown = match unseen {
        None if copy.is_some()
            && matches!(decided, Decided::Returned | Decided::Forced | Decided::Aborted(_)) =>
        {
            taken_back(&daemon, &held, copy, decided).await
        }
        Some(record) => {
            let stored = record.vm.as_ref().map_or(State::Unspecified, VirtualMachine::observed_state);
            own(&daemon, record, held, stored)
        }
        None => match why(decided, committed) {
            None => has_moved(&daemon, &held, unserved).await,
            why => settled(&daemon, &held, why).await,
        },
    };
    if let Err(error) = shown {
        tracing::error!(%uid, %error, "what a migration came to could not be shown");
    }
}

/// Why it is not what the user wanted; none if it runs on the destination.
fn why(decided: Decided, committed: bool) -> Option<ApiError> {
    Some(match decided {
        Decided::Moved | Decided::Superseded => return None,
        Decided::Uncertain => ApiError::internal(
            "OWNERSHIP_UNCERTAIN",
            "the two hosts' records do not agree; nothing runs here until an operator decides",
        ),
        Decided::Failed(Cause::Forced) => force::fresh(),
        Decided::Failed(_) if !committed => ApiError::internal(
            "LOST",
            "vpmud died while the machine was stopped for a migration and the destination holds no complete copy; start it afresh",
        ),
        Decided::Failed(_) => ApiError::internal(
            "LOST",
            "the destination lost the copy that it was given and gave the machine back, and the copy here had died with its worker; start it afresh",
        ),
        _ => ApiError::internal("HOST_RESTARTED", RESTARTED),
    })
}

/// It was not committed, or the destination gave it back, and the copy here was kept: it goes on.
async fn taken_back(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    copy: Option<WorkerLink>,
    decided: Decided,
) -> Result<(), ApiError> {
    let Some(worker) = copy else { return Ok(()) };
    if let Some(mut record) = daemon.store.get_migration(&held.vm_uid, &held.migration_id) {
        if let Some(migration) = record.migration.as_mut() {
            let (reason, message) = match decided {
                Decided::Returned => (
                    "RETURNED",
                    "the destination could not start the machine and gave it back; it goes on here",
                ),
                Decided::Forced => (
                    "FORCED",
                    "the destination was forced out before it had entered; the machine goes on here",
                ),
                _ => ("HOST_RESTARTED", NOT_COMMITTED),
            };
            fail(migration, reason, message);
        }
        if let Err(error) = daemon.store.put_migration(&record).await {
            tracing::error!(uid = %held.vm_uid, %error, "what became of a migration could not be stored");
        }
    }
    // Its copy is the only one: whatever it answers, and whether or not its machine's task hears of it, it is not let go.
    let survivor = tokio::select! {
        survivor = Survivor::ask(worker.clone()) => survivor,
        () = daemon.shutdown.cancelled() => Survivor::Silent { worker: worker.clone() },
    };
    let told = match daemon.registry.by_uid(&held.vm_uid) {
        Some(handle) => {
            let survivor = Box::new(survivor);
            handle.tell(|reply| Command::Reattach { survivor, reply }).await
        }
        None => Err(ApiError::internal("VM_GONE", "the machine is not here any more")),
    };
    if told.is_err() && worker.outlives_daemon(daemon.upgrading.load(Ordering::SeqCst)) {
        worker.keep();
    }
    told
}

/// It stays here, for a reason.
async fn settled(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    stayed: Option<ApiError>,
) -> Result<(), ApiError> {
    end_migration(daemon, held, stayed.as_ref()).await?;
    let Some(handle) = daemon.registry.by_uid(&held.vm_uid) else { return Ok(()) };
    let outcome = Outcome::Stayed { ownership: held.clone(), lost: stayed };
    handle.ask(|reply| Command::EndMigration { outcome, reply }).await
}

/// It runs on the destination, or was lost there with the rest of its memory.
async fn has_moved(
    daemon: &Arc<Daemon>,
    held: &OwnershipRecord,
    unserved: Option<ApiError>,
) -> Result<(), ApiError> {
    end_migration(daemon, held, unserved.as_ref()).await?;
    let Some(handle) = daemon.registry.by_uid(&held.vm_uid) else { return Ok(()) };
    let outcome = Outcome::Moved { ownership: held.clone(), moved_to: held.peer_host.clone() };
    handle.ask(|reply| Command::EndMigration { outcome, reply }).await
}

async fn end_migration(
    daemon: &Daemon,
    held: &OwnershipRecord,
    problem: Option<&ApiError>,
) -> Result<(), ApiError> {
    let Some(mut record) = daemon.store.get_migration(&held.vm_uid, &held.migration_id) else {
        return Ok(());
    };
    if let Some(migration) = record.migration.as_mut() {
        match problem {
            None => {
                migration.set_state(MigrationState::Succeeded);
                "it runs on the destination".clone_into(&mut migration.phase);
                // What the end of the last daemon had written.
                migration.reason.clear();
                migration.message.clear();
                migration.end_time = Some(crate::ops::now());
            }
            Some(why) => fail(migration, why.reason(), why.message()),
        }
    }
    Ok(daemon.store.put_migration(&record).await?)
}

/// A destination whose copy outlived its daemon.
pub(super) async fn go_on(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    arrival: Box<Resumed>,
    over: CancellationToken,
) {
    Box::pin(arrival.run()).await;
    daemon.migrations.settling().remove(&held.vm_uid);
    over.cancel();
}

/// The same whose worker does not answer: what it is decides how it goes on.
pub(super) async fn wait(
    daemon: Arc<Daemon>,
    held: OwnershipRecord,
    shown: Box<Shown>,
    worker: WorkerLink,
    over: CancellationToken,
) {
    let told = match Box::pin(shown.wait(worker)).await {
        Waited::Whole(arrival) => return go_on(daemon, held, arrival, over).await,
        Waited::Left => return,
        Waited::Lost(handle) => match settle::destination(Arc::clone(&daemon), held.clone()).await {
            Some((outcome, ownership)) => {
                tracing::info!(vm = %handle.name, ?outcome, "an arrival whose worker was lost is settled");
                handle.tell(|reply| Command::DropIncoming { ownership, reply }).await
            }
            None => return,
        },
        Waited::Uncertain(handle) => {
            let ownership = daemon.store.ownership(&held.vm_uid).unwrap_or_else(|| held.clone());
            let outcome = Outcome::Stayed { ownership, lost: why(Decided::Uncertain, false) };
            handle.tell(|reply| Command::EndMigration { outcome, reply }).await
        }
    };
    if let Err(error) = told {
        tracing::error!(uid = %held.vm_uid, %error, "what an arrival came to could not be shown");
    }
    daemon.migrations.settling().remove(&held.vm_uid);
    over.cancel();
}

/// A destination that lost a copy with its daemon: it may have promised Ready, so that only the source knows.
pub(super) async fn settle_destination(daemon: Arc<Daemon>, held: OwnershipRecord, over: CancellationToken) {
    let uid = held.vm_uid.clone();
    if let Some((outcome, _)) = settle::destination(Arc::clone(&daemon), held).await {
        tracing::info!(%uid, ?outcome, "an arrival that a restart cut off is settled");
    }
    daemon.migrations.settling().remove(&uid);
    over.cancel();
}
