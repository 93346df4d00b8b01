//! Answers "what became of this migration?" at either end: by the living machine, else from the journal.

use vpmu_proto::api::migration::State;
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::{ResolveRequest, ResolveResponse};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

use crate::daemon::Daemon;
use crate::status::ApiError;

/// Answers by what is durable or, as Ready, promised; another store gives no answer.
pub fn resolve(daemon: &Daemon, request: &ResolveRequest) -> Result<ResolveResponse, ApiError> {
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
    if let Some(living) = daemon.migrations.answers.get(&request.migration_id) {
        let (decision, epoch, state_digest) =
            super::answer::encode(living, held.as_ref().map_or(0, |h| h.epoch));
        let host_id = daemon.host.host_id.clone();
        return Ok(ResolveResponse { decision: decision as i32, epoch, state_digest, host_id });
    }
    let ended = daemon
        .store
        .get_migration(&request.vm_uid, &request.migration_id)
        .and_then(|r| r.migration)
        .map(|m| m.state());
    let source = daemon.store.get_migration(&request.vm_uid, &request.migration_id).is_some();
    let decision = decide(held.as_ref(), &request.migration_id, source, ended);
    let held = held.unwrap_or_default();
    Ok(ResolveResponse {
        decision: decision as i32,
        epoch: held.epoch,
        state_digest: held.digest,
        host_id: daemon.host.host_id.clone(),
    })
}

/// The table; pure. `source` says that this host was the migration's source.
fn decide(held: Option<&OwnershipRecord>, migration: &str, source: bool, ended: Option<State>) -> Decision {
    let Some(held) = held else { return Decision::Unknown };
    if held.migration_id != migration {
        return match ended {
            Some(State::Succeeded) => Decision::Superseded,
            Some(State::Failed | State::Cancelled) => Decision::Aborted,
            _ if source => Decision::Superseded,
            _ => Decision::Unknown,
        };
    }
    match held.phase() {
        // Without a living machine there is no copy that could be ready.
        Phase::Open | Phase::Quiesced | Phase::Committing | Phase::Incoming | Phase::Ready => {
            Decision::Undecided
        }
        Phase::Owned if source => Decision::Aborted,
        Phase::HandedOver | Phase::Released | Phase::Entered | Phase::Owned => Decision::Committed,
        Phase::Returned => Decision::Returned,
        Phase::Aborted => Decision::Aborted,
        Phase::Superseded | Phase::Deleted => Decision::Superseded,
        Phase::Uncertain | Phase::Unspecified => Decision::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_phase_means_different_things_at_the_two_ends() {
        let held = |phase: Phase| OwnershipRecord {
            migration_id: "m".into(),
            phase: phase as i32,
            ..Default::default()
        };
        assert_eq!(decide(Some(&held(Phase::Owned)), "m", true, None), Decision::Aborted);
        assert_eq!(decide(Some(&held(Phase::Owned)), "m", false, None), Decision::Committed);
        assert_eq!(decide(Some(&held(Phase::Ready)), "m", false, None), Decision::Undecided);
        assert_eq!(decide(None, "m", false, None), Decision::Unknown);
        assert_eq!(
            decide(Some(&held(Phase::Open)), "other", true, Some(State::Cancelled)),
            Decision::Aborted
        );
        assert_eq!(decide(Some(&held(Phase::Owned)), "other", false, None), Decision::Unknown);
    }
}
