//! After a post-copy whose source worker has died: its daemon sees that at once, and a destination that only sees a broken
//! connection would wait for it to come back.
//!
//! ```text
//!   source ── Resolve{released}, until it is heard ──▶ destination, whose memory still follows
//!          ◀── Resolve: "have you released it?" ─────     │ released
//!                                                         ▼ ForgetSource to its worker: Failed, POSTCOPY_SOURCE_LOST
//! ```
//! Invariants: being told proves nothing, only the answer of the host that the own journal names does; it says so only
//! from a durable Released, which is written only once nothing of its worker can run or answer; a destination that has every
//! page, or whose connection has some yet to give, loses nothing by it.

use std::sync::Arc;

use vpmu_proto::peer::ResolveRequest;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use super::record::Backoff;
use crate::daemon::Daemon;
use crate::handover::Handover;

/// Whether the record says that this host was the source of that migration and its worker is gone.
pub(super) fn is_so(held: &OwnershipRecord, migration_id: &str) -> bool {
    held.phase() == Phase::Released && held.migration_id == migration_id
}

/// Tells the destination, until it has heard, or has given up waiting by itself.
pub(super) fn tell(daemon: &Arc<Daemon>, held: &OwnershipRecord) {
    if held.phase() != Phase::Released {
        return;
    }
    let handover = Handover::of(held, &daemon.host.host_id, false);
    let daemon = Arc::clone(daemon);
    daemon.tasks.clone().spawn(async move {
        let telling = async {
            let mut backoff = Backoff::new();
            while super::answer::ask_whole(&handover, &daemon.peering, true).await.is_none() {
                if !backoff.pause(&daemon.shutdown).await {
                    return;
                }
            }
        };
        tokio::select! {
            told = tokio::time::timeout(daemon.limits.recover * 2, telling) => {
                if told.is_err() {
                    tracing::warn!(uid = %handover.vm_uid, "a destination could not be told that pages will not come");
                }
            }
            () = daemon.shutdown.cancelled() => {}
        }
    });
}

/// Somebody says that it has released its copy of a machine that is here.
pub(super) fn told(daemon: &Arc<Daemon>, request: &ResolveRequest, held: Option<&OwnershipRecord>) {
    let here = |h: &&OwnershipRecord| {
        let arrived = matches!(h.phase(), Phase::Entered | Phase::Owned) && !h.peer_address.is_empty();
        request.released && arrived && h.migration_id == request.migration_id
    };
    let Some(held) = held.filter(here) else { return };
    // One question a machine at a time, however often it is said.
    let key = format!("{}/released", held.vm_uid);
    if !daemon.migrations.looking().insert(key.clone()) {
        return;
    }
    let (daemon, held) = (Arc::clone(daemon), held.clone());
    daemon.tasks.clone().spawn(async move {
        tokio::select! {
            looked = tokio::time::timeout(daemon.limits.recover, look(&daemon, &held)) => {
                if looked.is_err() {
                    tracing::warn!(uid = %held.vm_uid, "whether pages will come is not known");
                }
            }
            () = daemon.shutdown.cancelled() => {}
        }
        daemon.migrations.looking().remove(&key);
    });
}

/// Asks the source, and lets the worker here wait no longer.
async fn look(daemon: &Arc<Daemon>, held: &OwnershipRecord) {
    // As the destination's record has it: the source's epoch is the one below.
    let handover =
        Handover { epoch: held.epoch.saturating_sub(1), ..Handover::of(held, &daemon.host.host_id, false) };
    let mut backoff = Backoff::new();
    loop {
        let answer = super::answer::ask_whole(&handover, &daemon.peering, false).await;
        match answer {
            Some(answer) if !answer.released => return,
            Some(_) => break,
            None if backoff.pause(&daemon.shutdown).await => {}
            None => return,
        }
    }
    // Its actor may be about to take the worker over.
    loop {
        let Some(handle) = daemon.registry.by_uid(&held.vm_uid) else { return };
        let same =
            |h: OwnershipRecord| h.migration_id == held.migration_id && h.incarnation == held.incarnation;
        if !daemon.store.ownership(&held.vm_uid).is_some_and(same) {
            return;
        }
        if let Some(worker) = handle.view().worker.clone() {
            let told = worker.forget_source(&held.migration_id).await;
            tracing::info!(vm = %handle.name, ?told, "the source's worker has ended; no page is waited for");
            return;
        }
        if !backoff.pause(&daemon.shutdown).await {
            return;
        }
    }
}
