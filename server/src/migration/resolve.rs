//! Answers "what became of this migration?" at either end: by the living machine, else from the journal
//! (`handover::answer`).

use std::sync::Arc;

use vpmu_proto::api::migration::State;
use vpmu_proto::peer::{ResolveRequest, ResolveResponse};

use crate::daemon::Daemon;
use crate::handover::PeerAnswer;
use crate::handover::answer::{Asked, Ended, Seat};
use crate::status::ApiError;

/// Answers by what is durable or, as Ready, promised; another store gives no answer.
pub fn resolve(daemon: &Arc<Daemon>, request: &ResolveRequest) -> Result<ResolveResponse, ApiError> {
    if request.store_id != daemon.host.host_id {
        return Err(ApiError::precondition(
            "OTHER_STORE",
            &daemon.host.host_id,
            format!(
                "this is store {}, not {:?}, and knows nothing of that one's decisions; ask the right host",
                daemon.host.host_id,
                crate::status::clip(&request.store_id, 64)
            ),
        ));
    }
    let held = daemon.store.ownership(&request.vm_uid);
    super::later::told(daemon, request, held.as_ref());
    super::released::told(daemon, request, held.as_ref());
    let released = held.as_ref().is_some_and(|h| super::released::is_so(h, &request.migration_id));
    let answer = daemon.migrations.answers.get(&request.migration_id).unwrap_or_else(|| {
        let seat = match daemon.store.get_migration(&request.vm_uid, &request.migration_id) {
            None => Seat::Destination,
            Some(record) => Seat::Source(match record.migration.map(|m| m.state()) {
                Some(State::Succeeded) => Ended::Moved,
                Some(State::Failed | State::Cancelled) => Ended::Stayed,
                _ => Ended::Open,
            }),
        };
        let (migration_id, asker) = (&request.migration_id, &request.host_id);
        let asked = Asked { migration_id, epoch: request.epoch, seat, asker };
        PeerAnswer::from_record(held.as_ref(), &asked)
    });
    let (decision, epoch, state_digest) = super::answer::encode(answer, held.map_or(0, |h| h.epoch));
    let host_id = daemon.host.host_id.clone();
    Ok(ResolveResponse { decision: decision as i32, epoch, state_digest, host_id, released })
}
