//! Live migration between two daemons, by the rules of the handover.
//!
//! ```text
//! source                                   destination
//!   check, Prepare ------------------------> journal Incoming, worker built, data listener open
//!   journal Open, MigrateOut  ===data=====>  receives
//!   journal Quiesced, FinishMigration =====> state set; Ready(digest)
//!   journal HandedOver(e+1), Go -----------> journal Entered(e+1), grant, running, Entered
//!   worker ended, journal Released <-------- guest's own gap, measured
//! ```
//! What is done and in which order is decided by the machines of [`crate::handover`]: `source` and `destination_run`
//! each own one, feed it events and execute its effects; `settle` does so for what a restart interrupted.
//!
//! In local mode, and between two workers of one host, the source's worker is killed and has ended for all that when none of
//! its threads can run any more: the kernel takes its mapping of the memory, which is the destination's now, apart aside.
//!
//! Invariants: nothing is sent that depends on a record that is not durable; until HandedOver the machine goes on at
//! the source whatever fails, under a new epoch; from HandedOver on only the destination (or its return) decides.

mod answer;
pub mod check;
pub mod destination;
mod destination_effects;
mod destination_run;
pub mod force;
pub mod hold;
mod kept;
pub mod later;
pub mod limits;
pub mod outcome;
mod record;
pub mod recover;
mod released;
pub mod renew;
pub mod resolve;
mod resume;
mod settle;
mod source;
pub mod source_begin;
mod source_effects;
mod source_end;

use std::collections::{HashMap, HashSet};
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vpmu_proto::api::Migration;

use crate::daemon::Daemon;
use crate::names::MigrationName;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// Migrations that are under way.
#[derive(Default)]
pub struct Migrations {
    outgoing: Mutex<HashMap<Uuid, watch::Receiver<Migration>>>,
    incoming: Mutex<HashMap<Uuid, destination::Door>>,
    /// Workers of machines that have not arrived yet: no machine of this host shows them.
    arriving: Mutex<HashMap<Uuid, WorkerLink>>,
    /// What living machines answer to Resolve.
    answers: answer::Answers,
    /// Arrivals of an earlier run of this daemon that the source has not decided yet, by uid: until they are over.
    settling: Mutex<HashMap<String, CancellationToken>>,
    /// Drivers that heed ForceOwner, by uid.
    forcible: Mutex<HashMap<String, mpsc::Sender<force::Order>>>,
    /// Machines about which another host is being asked whether it owns them by force.
    looking: Mutex<HashSet<String>>,
}

impl Migrations {
    pub(crate) fn outgoing(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, watch::Receiver<Migration>>> {
        self.outgoing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn incoming(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, destination::Door>> {
        self.incoming.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Workers of machines that have not arrived yet.
    pub(crate) fn arriving(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, WorkerLink>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn forcible(&self) -> std::sync::MutexGuard<'_, HashMap<String, mpsc::Sender<force::Order>>> {
        self.forcible.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn looking(&self) -> std::sync::MutexGuard<'_, HashSet<String>> {
        self.looking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn settling(&self) -> std::sync::MutexGuard<'_, HashMap<String, CancellationToken>> {
        self.settling.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A migration as it is now: live, or as stored.
pub fn get(daemon: &Daemon, name: &MigrationName) -> Result<Migration, ApiError> {
    if let Some(live) = daemon.migrations.outgoing().get(&name.id) {
        let migration = live.borrow().clone();
        if migration.name == name.to_string() {
            return Ok(migration);
        }
    }
    let missing = || {
        ApiError::not_found(
            "Migration",
            &name.to_string(),
            "list the machine's migrations; the source host keeps them",
        )
    };
    let handle = daemon.registry.get(&name.vm).map_err(|_| missing())?;
    daemon
        .store
        .get_migration(&handle.uid, &name.id.to_string())
        .and_then(|r| r.migration)
        .filter(|m| m.name == name.to_string())
        .ok_or_else(missing)
}

/// Asks an open migration to stop; refused once it is committed.
pub fn cancel(daemon: &Daemon, name: &str) -> Result<(), ApiError> {
    let parsed = MigrationName::parse("name", name)?;
    let over = |migration: &Migration| {
        ApiError::precondition(
            "MIGRATION_OVER",
            name,
            format!("{name} is {} and cannot be cancelled", migration.state().as_str_name()),
        )
    };
    let migration = get(daemon, &parsed)?;
    let handle = daemon.registry.get(&parsed.vm)?;
    let view = handle.view();
    let Some(open) = view.migration.as_ref().filter(|open| open.name == name) else {
        return Err(over(&migration));
    };
    if open.committed.load(Ordering::SeqCst) {
        return Err(ApiError::precondition(
            "MIGRATION_COMMITTED",
            name,
            format!("{name} is committed: the destination owns the machine; migrate it back instead"),
        ));
    }
    open.cancel.cancel();
    Ok(())
}
