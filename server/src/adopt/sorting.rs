//! Which of a machine's workers, dead or alive, is the machine's: by the names of their runtime directories and the record.
//!
//! `UID` is the directory of a worker that was started for a machine without one, `UID.INCARNATION` of one that was made beside
//! another. Invariants: at most one is the machine's, and the others are ended before anything is started; what a dead one
//! left goes only when it tells nothing.

use std::collections::BTreeMap;
use std::sync::Arc;

use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use super::{Copies, Survivor, inherit, is_renewal, keep_copy, settle};
use crate::daemon::Daemon;
use crate::status::ApiError;
use crate::worker_link::ConsoleHistory;
use crate::worker_process::{Found, Seen, WorkerProcess};

/// What directories of a machine's workers are called, beside its uid.
struct Names<'a> {
    uid: &'a str,
    /// The record's own, if it was made beside another.
    own: String,
    /// That of the one that was to replace it.
    next: String,
}

impl<'a> Names<'a> {
    fn of(uid: &'a str, held: &OwnershipRecord) -> Self {
        let name = |incarnation: u64| format!("{uid}.{incarnation}");
        Self { uid, own: name(held.incarnation), next: name(held.incarnation.saturating_add(1)) }
    }
}

/// A machine has one worker, or two while one was to replace the other (`migration::renew`): the record's incarnation says
/// which it is, and the other is ended before anything else. What a dead one left stays until its end is stored.
pub(super) async fn sort_out(
    daemon: &Arc<Daemon>,
    uid: &str,
    directories: Vec<String>,
    copies: &mut Copies,
) -> Result<Option<Survivor>, ApiError> {
    let processes = &daemon.workers.processes;
    let held = daemon.store.ownership(uid).unwrap_or_default();
    let names = Names::of(uid, &held);
    let own = &*names.own;
    let (mut live, mut dead, mut gone) = (BTreeMap::new(), Vec::new(), Vec::new());
    // Unreachable is not dead: nothing is started beside it.
    let seen = processes.look(directories).await.map_err(|error| {
        ApiError::internal(
            "WORKER_UNKNOWN",
            format!("whether the worker of machine {uid} lives cannot be told: {error}"),
        )
    })?;
    for Seen { name, found, output } in seen {
        match found {
            Found::Live(process) => drop(live.insert(name, *process)),
            Found::Dead(end) if name == own || name == uid => dead.push((name, end, output)),
            Found::Dead(_) => gone.push(name),
            Found::Nothing => {}
        }
    }
    // The record's own comes last; what it replaced tells nothing any more, dead or alive.
    dead.sort_by_key(|(name, ..)| name == own);
    let last = dead.pop();
    gone.extend(dead.into_iter().map(|(name, ..)| name));
    let replaced = last.as_ref().is_some_and(|(name, ..)| name == own);
    let found = sort_living(daemon, &names, held, live, replaced, copies).await;
    let survivor = match (found, last) {
        (Living::None, Some((left, end, output))) => {
            let console = output.map(ConsoleHistory::from).unwrap_or_default();
            Some(Survivor::Dead { end, console, left: Some(left) })
        }
        (Living::None, None) => None,
        (Living::Found(survivor), last) => {
            // It knows better.
            gone.extend(last.map(|(name, ..)| name));
            survivor
        }
    };
    processes.forget(gone).await;
    Ok(survivor)
}

/// What [`sort_living`] found.
enum Living {
    /// No living worker is the machine's, or holds what may become it.
    None,
    /// One is: as it goes to the machine's actor, if it does.
    Found(Option<Survivor>),
}

/// Those that live of a machine whose record is `held`, by their directories. `replaced`: one in the directory of the uid is
/// not the record's.
async fn sort_living(
    daemon: &Arc<Daemon>,
    names: &Names<'_>,
    held: OwnershipRecord,
    mut live: BTreeMap<String, WorkerProcess>,
    replaced: bool,
    copies: &mut Copies,
) -> Living {
    let Names { uid, own, next } = names;
    // Which copy counts is not known: nothing of such a machine is ended, or started, by itself.
    let uncertain = held.phase() == Phase::Uncertain
        || held.phase() == Phase::Unspecified && !daemon.store.damaged().is_empty();
    if uncertain && !live.is_empty() {
        for (name, process) in live {
            tracing::error!(
                name,
                pid = process.pid(),
                "a worker of a machine that is uncertain is left alone"
            );
            process.keep();
        }
        return Living::Found(None);
    }
    let current = live.remove(own).or_else(|| if replaced { None } else { live.remove(*uid) });
    let inherits = current.is_none() && is_renewal(daemon, &held);
    let heir = if inherits { live.remove(next) } else { None };
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
                copies.insert((*uid).to_owned(), copy);
            }
            return Living::Found(None);
        }
        let survivor = settle(daemon, uid, process, copies).await;
        if copies.contains_key(*uid) {
            return Living::Found(None);
        }
        if survivor.is_none() {
            tracing::info!(%uid, pid, "the worker of a machine that is not here any more was ended");
        }
        return Living::Found(survivor);
    }
    if let Some(process) = heir
        && let Some(survivor) = inherit(daemon, held, process).await
    {
        return Living::Found(Some(survivor));
    }
    Living::None
}
