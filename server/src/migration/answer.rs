//! Questions and answers about a decision, between the machines and the wire.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::{ResolveRequest, ResolveResponse};

use crate::config::Address;
use crate::handover::{self, Handover, PeerAnswer};
use crate::peer::{Peer, Peering};

/// What the machines that live here would answer, by migration. Ready is known only here: it is not journalled.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers(Arc<Mutex<HashMap<String, PeerAnswer>>>);

impl Answers {
    /// The living machine's answer.
    pub(super) fn get(&self, migration: &str) -> Option<PeerAnswer> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(migration).copied()
    }

    /// Speaks for one migration until the voice is dropped.
    pub(super) fn voice(&self, migration: &str, first: PeerAnswer) -> Voice {
        let voice = Voice { answers: self.clone(), migration: migration.to_owned() };
        voice.say(first);
        voice
    }
}

/// One machine's place among the [`Answers`].
#[derive(Debug)]
pub(super) struct Voice {
    answers: Answers,
    migration: String,
}

impl Voice {
    /// What it answers from now on.
    pub(super) fn say(&self, answer: PeerAnswer) {
        let mut all = self.answers.0.lock().unwrap_or_else(PoisonError::into_inner);
        all.insert(self.migration.clone(), answer);
    }
}

impl Drop for Voice {
    fn drop(&mut self) {
        self.answers.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.migration);
    }
}

/// Asks the other host once. Whatever is no answer is `Unreachable` or `Unknown`.
pub(super) async fn ask(handover: &Handover, peering: &Peering) -> PeerAnswer {
    ask_whole(handover, peering, false).await.map_or(PeerAnswer::Unreachable, |answer| decode(&answer))
}

/// The same, with all of the answer. `released`: this host was the source and has let its copy go.
pub(super) async fn ask_whole(
    handover: &Handover,
    peering: &Peering,
    released: bool,
) -> Option<ResolveResponse> {
    let address = handover.peer_address.parse::<Address>().ok()?;
    let peer = Peer::connect(&address, peering).await.ok()?;
    let request = ResolveRequest {
        migration_id: handover.migration_id.clone(),
        vm_uid: handover.vm_uid.clone(),
        host_id: handover.host.clone(),
        store_id: handover.peer_store.clone(),
        epoch: handover.epoch,
        forced_epoch: 0,
        released,
    };
    peer.resolve(request).await.ok()
}

fn decode(answer: &ResolveResponse) -> PeerAnswer {
    let digest = handover::digest(&answer.state_digest);
    match answer.decision() {
        Decision::Undecided => PeerAnswer::Undecided,
        Decision::Ready => digest.map_or(PeerAnswer::Unknown, PeerAnswer::Ready),
        Decision::Committed => PeerAnswer::Committed(digest),
        Decision::Aborted => PeerAnswer::Aborted,
        Decision::Returned => PeerAnswer::Returned,
        Decision::Superseded => PeerAnswer::Superseded(answer.epoch),
        Decision::Unspecified | Decision::Unknown => PeerAnswer::Unknown,
    }
}

/// A living machine's answer on the wire; `epoch` is that of the record that holds.
pub(super) fn encode(answer: PeerAnswer, epoch: u64) -> (Decision, u64, Vec<u8>) {
    match answer {
        PeerAnswer::Undecided => (Decision::Undecided, epoch, Vec::new()),
        PeerAnswer::Ready(digest) => (Decision::Ready, epoch, digest.to_vec()),
        PeerAnswer::Committed(digest) => {
            (Decision::Committed, epoch, digest.map(|d| d.to_vec()).unwrap_or_default())
        }
        PeerAnswer::Aborted | PeerAnswer::Owned => (Decision::Aborted, epoch, Vec::new()),
        PeerAnswer::Returned => (Decision::Returned, epoch, Vec::new()),
        PeerAnswer::Superseded(later) => (Decision::Superseded, later, Vec::new()),
        PeerAnswer::Unknown | PeerAnswer::Unreachable => (Decision::Unknown, epoch, Vec::new()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_survives_the_wire_and_a_ready_without_digest_is_none() {
        let there = |answer| {
            let (decision, epoch, state_digest) = encode(answer, 7);
            decode(&ResolveResponse {
                decision: decision as i32,
                epoch,
                state_digest,
                host_id: String::new(),
                released: false,
            })
        };
        for answer in [
            PeerAnswer::Undecided,
            PeerAnswer::Ready([3; 32]),
            PeerAnswer::Committed(Some([4; 32])),
            PeerAnswer::Committed(None),
            PeerAnswer::Aborted,
            PeerAnswer::Returned,
            PeerAnswer::Superseded(9),
            PeerAnswer::Unknown,
        ] {
            assert_eq!(there(answer), answer);
        }
        let bad = ResolveResponse { decision: Decision::Ready as i32, ..ResolveResponse::default() };
        assert_eq!(decode(&bad), PeerAnswer::Unknown);
    }

    #[test]
    fn a_voice_ends_with_its_machine() {
        let answers = Answers::default();
        let voice = answers.voice("m", PeerAnswer::Undecided);
        voice.say(PeerAnswer::Ready([1; 32]));
        assert_eq!(answers.get("m"), Some(PeerAnswer::Ready([1; 32])));
        drop(voice);
        assert_eq!(answers.get("m"), None);
    }
}
