//! A host that was forced out finds itself superseded when it comes back: it asks the other host of the last migration
//! of each machine that it owns, at its start and when it is told to.
//!
//! ```text
//!   forced owner ── Resolve{forced_epoch}, until it is heard ──▶ old owner
//!                ◀── Resolve: "am I superseded?" ───────────────    │ Superseded at a higher epoch
//!                                                                    ▼ worker ended, Superseded journalled
//! ```
//! Invariants: being told proves nothing, only the answer of the host that the own journal names does; nothing is given
//! up for an epoch that is not above the own one; restart policies wait until every answer is there or overdue.

use std::sync::Arc;

use futures_util::StreamExt as _;
use vpmu_proto::peer::ResolveRequest;
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use super::record::Backoff;
use crate::daemon::Daemon;
use crate::handover::{Handover, PeerAnswer, force};
use crate::peer::Peer;
use crate::vm::command::Command;

/// Questions at once.
const AT_ONCE: usize = 16;

/// Owned here, and another host may know better.
fn may_be_late(daemon: &Daemon, held: &OwnershipRecord) -> bool {
    matches!(held.phase(), Phase::Owned | Phase::Entered)
        && !held.migration_id.is_empty()
        && !held.peer_address.is_empty()
        && held.peer_host != daemon.host.host_id
}

/// At the start: asks about every machine that may have been forced away meanwhile, then lets restart policies act; and
/// tells whom this host has forced out.
pub fn at_start(daemon: &Arc<Daemon>) {
    let all = daemon.store.ownerships();
    for held in all.iter().filter(|held| held.forced.is_some()) {
        tell(daemon, &held.vm_uid);
    }
    let asked: Vec<_> = all.into_iter().filter(|held| may_be_late(daemon, held)).collect();
    if asked.is_empty() {
        return daemon.recovered.cancel();
    }
    let daemon = Arc::clone(daemon);
    daemon.tasks.clone().spawn(async move {
        let within = daemon.limits.connect + daemon.limits.ask;
        let asking = futures_util::stream::iter(asked).for_each_concurrent(AT_ONCE, |held| {
            let daemon = Arc::clone(&daemon);
            async move {
                let _ = tokio::time::timeout(within, look(&daemon, &held)).await;
            }
        });
        tokio::select! {
            () = asking => daemon.recovered.cancel(),
            () = daemon.shutdown.cancelled() => {}
        }
    });
}

/// Asks whether a later owner exists, and yields to it.
async fn look(daemon: &Arc<Daemon>, held: &OwnershipRecord) {
    let handover =
        Handover { epoch: held.epoch.saturating_sub(1), ..Handover::of(held, &daemon.host.host_id, false) };
    let PeerAnswer::Superseded(epoch) = super::answer::ask(&handover, &daemon.peering).await else { return };
    if epoch <= held.epoch {
        return;
    }
    let Some(handle) = daemon.registry.by_uid(&held.vm_uid) else { return };
    let owner = held.peer_host.clone();
    tracing::warn!(vm = %handle.name, epoch, owner, "CRITICAL: another host owns it by force; it ends here");
    if let Err(error) = handle.ask(|reply| Command::Yield { epoch, owner, reply }).await {
        tracing::error!(vm = %handle.name, %error, "a machine that another host owns by force is not given up yet");
    }
}

/// Somebody says that it owns a machine of this host by force.
pub(super) fn told(daemon: &Arc<Daemon>, request: &ResolveRequest, held: Option<&OwnershipRecord>) {
    let Some(held) = held.filter(|h| may_be_late(daemon, h) && request.forced_epoch > h.epoch) else {
        return;
    };
    // One question a machine at a time, however often it is said.
    if !daemon.migrations.looking().insert(held.vm_uid.clone()) {
        return;
    }
    let (daemon, held) = (Arc::clone(daemon), held.clone());
    daemon.tasks.clone().spawn(async move {
        tokio::select! {
            () = look(&daemon, &held) => {}
            () = daemon.shutdown.cancelled() => {}
        }
        daemon.migrations.looking().remove(&held.vm_uid);
    });
}

/// Tells the host that was forced out, until it has heard or the machine goes on from here.
pub(super) fn tell(daemon: &Arc<Daemon>, uid: &str) {
    let Some(first) = daemon.store.ownership(uid).filter(|h| {
        let own = h.forced.as_ref().is_some_and(|f| f.evidence != force::FENCED && f.host == h.peer_host);
        own && !h.peer_address.is_empty()
    }) else {
        return;
    };
    let daemon = Arc::clone(daemon);
    daemon.tasks.clone().spawn(async move {
        let mut backoff = Backoff::new();
        while let Some(held) = daemon.store.ownership(&first.vm_uid).filter(|h| h.forced == first.forced) {
            if heard(&daemon, &held).await {
                tracing::info!(uid = %held.vm_uid, host = %held.peer_host, "the host that was forced out knows");
                return;
            }
            if !backoff.pause(&daemon.shutdown).await {
                return;
            }
        }
    });
}

/// Whether the other host does not take itself for the owner (any more).
async fn heard(daemon: &Daemon, held: &OwnershipRecord) -> bool {
    let request = ResolveRequest {
        migration_id: held.migration_id.clone(),
        vm_uid: held.vm_uid.clone(),
        host_id: daemon.host.host_id.clone(),
        store_id: held.peer_store.clone(),
        epoch: 0,
        forced_epoch: held.epoch,
        released: false,
    };
    let Ok(address) = held.peer_address.parse() else { return true };
    let Ok(peer) = Peer::connect(&address, &daemon.peering).await else { return false };
    match peer.resolve(request).await {
        Ok(answer) => matches!(
            answer.decision(),
            Decision::Superseded | Decision::Unknown | Decision::Aborted | Decision::Returned
        ),
        Err(_) => false,
    }
}
