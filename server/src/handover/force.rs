//! ForceOwner: when a host may take a machine that another host may own, and `vpmud store fence`, by which a host's
//! directory gives it up. Pure; what follows is done by the machines and by `migration::force`.
//!
//! ```text
//!   old host's directory                         the host that takes it
//!   f: Owned, Open, Incoming, ... ─fence▶ Superseded(f+2, to) ─token▶ Owned(max(e+2, f+2))
//!                                            nothing but its operator's word ─▶ Owned(e+2)
//! ```
//!
//! Invariants
//! - A decision is never overruled at its own epoch: force takes two more than anything known.
//! - A copy goes on only if the other host's fenced record proves that nothing ran after it: the source's, if the
//!   destination had not entered; the destination's, if the source had stopped for it. On a word alone no copy does.
//! - A token is for one host: no two hosts can take a machine by the same one.

use super::Digest;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{FenceToken, Forced, OwnershipRecord};

/// `Forced::evidence` of a record that a directory's operator wrote: it gave the machine up.
pub const FENCED: &str = "FENCED";
/// By a token of `vpmud store fence`.
pub const BY_TOKEN: &str = "FENCE_TOKEN";
/// By an operator's word.
pub const BY_WORD: &str = "ATTESTATION";

/// What shows that the other host will not run it.
#[derive(Debug, Clone, PartialEq)]
pub enum Evidence {
    /// Its directory is fenced.
    Token(FenceToken),
    /// An operator says that it is dead.
    Word {
        /// Its host id.
        host: String,
        /// Boot id of the life that has ended.
        boot_id: String,
        /// The highest epoch that it was seen to own, 0 if not known.
        epoch: u64,
    },
}

/// What may be taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Claim {
    /// The new owner's epoch.
    pub epoch: u64,
    /// A copy here, if there is one, is the newest.
    pub copy: bool,
    /// And it must have this digest, if the other host had committed it.
    pub sealed: Option<Digest>,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum ForceError {
    #[error("it is owned here already, at epoch {epoch}; there is nothing to force")]
    Owned { epoch: u64 },
    #[error("it was deleted here; create another machine")]
    Deleted,
    #[error("the token is about machine {found}, not {wanted}; fence that machine's uid on its old host")]
    OtherMachine { found: String, wanted: String },
    #[error("the token is for host {found}, and this is {here}; fence again with --to {here}")]
    OtherRecipient { found: String, here: String },
    #[error(
        "the evidence is about host {found}, and the other owner can only be {wanted}; give evidence about that"
    )]
    OtherHost { found: String, wanted: String },
    #[error("the evidence is about this very host; give evidence about the other one")]
    ThisHost,
    #[error(
        "the token fenced epoch {found} and this host knows of epoch {held} since; fence the present owner"
    )]
    Stale { found: u64, held: u64 },
    #[error("its records here do not say who else may own it; only a fence token does")]
    Unknown,
}

impl ForceError {
    /// A stable code for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Owned { .. } => "NOTHING_TO_FORCE",
            Self::Deleted => "DELETED",
            Self::OtherMachine { .. } => "EVIDENCE_OF_ANOTHER_MACHINE",
            Self::OtherRecipient { .. } => "EVIDENCE_FOR_ANOTHER_HOST",
            Self::OtherHost { .. } => "EVIDENCE_OF_ANOTHER_HOST",
            Self::ThisHost => "EVIDENCE_OF_THIS_HOST",
            Self::Stale { .. } => "STALE_EVIDENCE",
            Self::Unknown => "EVIDENCE_REQUIRED",
        }
    }
}

/// Whether the host `here`, whose journal holds `held`, may take the machine.
///
/// # Errors
/// [`ForceError`] naming what is missing or contradicts.
pub fn judge(held: &OwnershipRecord, here: &str, evidence: &Evidence) -> Result<Claim, ForceError> {
    match held.phase() {
        Phase::Owned | Phase::Entered | Phase::Open => {
            return Err(ForceError::Owned { epoch: held.epoch });
        }
        Phase::Deleted => return Err(ForceError::Deleted),
        _ => {}
    }
    // In an open migration only its other host can be the owner.
    let open = super::phase::is_open(held.phase());
    let about = match evidence {
        Evidence::Token(token) => &token.store_id,
        Evidence::Word { host, .. } => host,
    };
    if about == here {
        return Err(ForceError::ThisHost);
    }
    if open && *about != held.peer_host {
        return Err(ForceError::OtherHost { found: about.clone(), wanted: held.peer_host.clone() });
    }
    let next = held.epoch.saturating_add(2);
    let token = match evidence {
        Evidence::Word { .. } if !open && held.peer_host.is_empty() && held.owner_host.is_empty() => {
            return Err(ForceError::Unknown);
        }
        Evidence::Word { epoch, .. } => {
            let epoch = next.max(epoch.saturating_add(2));
            return Ok(Claim { epoch, copy: false, sealed: None });
        }
        Evidence::Token(token) => token,
    };
    if token.vm_uid != held.vm_uid {
        return Err(ForceError::OtherMachine { found: token.vm_uid.clone(), wanted: held.vm_uid.clone() });
    }
    if token.to_host != here {
        return Err(ForceError::OtherRecipient { found: token.to_host.clone(), here: here.to_owned() });
    }
    if token.epoch <= held.epoch {
        return Err(ForceError::Stale { found: token.epoch, held: held.epoch });
    }
    let same = token.migration_id == held.migration_id && !held.migration_id.is_empty();
    let copy = same
        && match held.phase() {
            Phase::HandedOver | Phase::Quiesced | Phase::Committing => {
                matches!(token.phase(), Phase::Incoming | Phase::Ready)
            }
            Phase::Incoming | Phase::Ready => {
                matches!(token.phase(), Phase::Quiesced | Phase::Committing | Phase::HandedOver)
            }
            _ => false,
        };
    let sealed =
        (token.phase() == Phase::HandedOver).then(|| super::digest(&token.digest).unwrap_or_default());
    Ok(Claim { epoch: next.max(token.epoch), copy, sealed })
}

/// Why a directory cannot give a machine up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the messages say what the fields are")]
pub enum FenceError {
    #[error("this directory is that of host {to}; name the host that is to own the machine")]
    ToItself { to: String },
    #[error("its migration is with host {peer}, which alone can take it; give --to {peer}")]
    PeerDecides { peer: String },
    #[error("it is fenced for host {to} at epoch {epoch} already; that host's token stands")]
    ForAnother { to: String, epoch: u64 },
    #[error("it is not owned by this directory (epoch {epoch}); {owner} knows more")]
    NotOwned { epoch: u64, owner: String },
}

impl FenceError {
    /// A stable code for machines.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::ToItself { .. } => "FENCE_TO_ITSELF",
            Self::PeerDecides { .. } => "PEER_DECIDES",
            Self::ForAnother { .. } => "FENCED_FOR_ANOTHER",
            Self::NotOwned { .. } => "NOT_OWNED",
        }
    }
}

/// The record by which the store `here` gives a machine up to the host `to`; `Err` of nothing if it has done so already.
///
/// # Errors
/// [`FenceError`].
pub fn fence(held: &OwnershipRecord, here: &str, to: &str) -> Result<OwnershipRecord, FenceError> {
    if to == here {
        return Err(FenceError::ToItself { to: to.to_owned() });
    }
    match held.phase() {
        Phase::Superseded if is_fence(held) && held.owner_host == to => return Ok(held.clone()),
        Phase::Superseded if is_fence(held) => {
            return Err(FenceError::ForAnother { to: held.owner_host.clone(), epoch: held.epoch });
        }
        Phase::Owned | Phase::Entered | Phase::Open | Phase::Uncertain => {}
        phase if super::phase::is_open(phase) && held.peer_host == to => {}
        phase if super::phase::is_open(phase) => {
            return Err(FenceError::PeerDecides { peer: held.peer_host.clone() });
        }
        _ => {
            let owner = if held.owner_host.is_empty() { "nobody here" } else { held.owner_host.as_str() };
            return Err(FenceError::NotOwned { epoch: held.epoch, owner: owner.to_owned() });
        }
    }
    Ok(OwnershipRecord {
        epoch: held.epoch.saturating_add(2),
        owner_host: to.to_owned(),
        phase: Phase::Superseded as i32,
        forced: Some(Box::new(Forced {
            evidence: FENCED.to_owned(),
            host: here.to_owned(),
            over_epoch: held.epoch,
            over_phase: held.phase,
            ..Forced::default()
        })),
        lsn: 0,
        ..held.clone()
    })
}

fn is_fence(held: &OwnershipRecord) -> bool {
    held.forced.as_ref().is_some_and(|forced| forced.evidence == FENCED)
}

/// The token of a record that [`fence`] made; none of another.
pub fn token(fenced: &OwnershipRecord) -> Option<FenceToken> {
    let forced = fenced.forced.as_ref().filter(|_| is_fence(fenced))?;
    Some(FenceToken {
        vm_uid: fenced.vm_uid.clone(),
        store_id: forced.host.clone(),
        to_host: fenced.owner_host.clone(),
        epoch: fenced.epoch,
        phase: forced.over_phase,
        migration_id: fenced.migration_id.clone(),
        digest: fenced.digest.clone(),
        held_epoch: forced.over_epoch,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(phase: Phase, epoch: u64) -> OwnershipRecord {
        OwnershipRecord {
            vm_uid: "v".into(),
            epoch,
            phase: phase.into(),
            migration_id: "m".into(),
            peer_host: "B".into(),
            digest: vec![7; 32],
            ..OwnershipRecord::default()
        }
    }

    fn fenced(phase: Phase, epoch: u64) -> FenceToken {
        let other = OwnershipRecord { peer_host: "A".into(), ..held(phase, epoch) };
        token(&fence(&other, "B", "A").expect("fenced")).expect("a token")
    }

    fn word(host: &str, epoch: u64) -> Evidence {
        Evidence::Word { host: host.into(), boot_id: String::new(), epoch }
    }

    #[test]
    fn a_copy_goes_on_only_where_the_fenced_record_proves_it() {
        let judged = |mine, theirs, epoch| judge(&mine, "A", &Evidence::Token(fenced(theirs, epoch)));
        let copy = |mine, theirs, epoch| judged(mine, theirs, epoch).expect("may").copy;
        assert!(copy(held(Phase::HandedOver, 5), Phase::Incoming, 4));
        assert!(!copy(held(Phase::HandedOver, 5), Phase::Entered, 5));
        assert!(!copy(held(Phase::Released, 5), Phase::Owned, 5));
        assert!(copy(held(Phase::Incoming, 4), Phase::Quiesced, 4));
        assert!(copy(held(Phase::Incoming, 4), Phase::HandedOver, 5));
        assert!(!copy(held(Phase::Incoming, 4), Phase::Open, 4));
        assert!(!copy(held(Phase::Incoming, 4), Phase::Owned, 5));
        assert!(!judge(&held(Phase::HandedOver, 5), "A", &word("B", 0)).expect("may").copy);
        let claim = judged(held(Phase::Incoming, 4), Phase::HandedOver, 5).expect("may");
        assert_eq!((claim.epoch, claim.sealed), (7, Some([7; 32])));
        // Another migration's: nothing follows for this copy.
        let other = OwnershipRecord { migration_id: "n".into(), ..held(Phase::Incoming, 4) };
        assert!(!copy(other, Phase::Quiesced, 4));
    }

    #[test]
    fn force_is_above_everything_that_is_known() {
        for phase in
            [Phase::Quiesced, Phase::HandedOver, Phase::Released, Phase::Uncertain, Phase::Superseded]
        {
            let mine = held(phase, 5);
            let claim = judge(&mine, "A", &word("B", 0)).expect("may");
            assert_eq!(claim.epoch, 7, "{phase:?}");
            assert_eq!(judge(&mine, "A", &word("B", 9)).expect("may").epoch, 11);
            let next = OwnershipRecord { epoch: claim.epoch, phase: Phase::Owned.into(), ..mine.clone() };
            crate::handover::phase::may_follow(Some(&mine), &next).expect("the journal takes it");
        }
    }

    #[test]
    fn what_contradicts_is_refused_by_name() {
        let refused =
            |mine: OwnershipRecord, evidence| judge(&mine, "A", &evidence).expect_err("refused").reason();
        let token = fenced(Phase::Entered, 5);
        let moved = || held(Phase::Released, 5);
        assert_eq!(refused(held(Phase::Owned, 5), word("B", 0)), "NOTHING_TO_FORCE");
        assert_eq!(refused(held(Phase::Deleted, 5), word("B", 0)), "DELETED");
        assert_eq!(refused(held(Phase::HandedOver, 5), word("C", 0)), "EVIDENCE_OF_ANOTHER_HOST");
        assert_eq!(refused(moved(), word("A", 0)), "EVIDENCE_OF_THIS_HOST");
        let other = FenceToken { vm_uid: "w".into(), ..token.clone() };
        assert_eq!(refused(moved(), Evidence::Token(other)), "EVIDENCE_OF_ANOTHER_MACHINE");
        let other = FenceToken { to_host: "C".into(), ..token.clone() };
        assert_eq!(refused(moved(), Evidence::Token(other)), "EVIDENCE_FOR_ANOTHER_HOST");
        assert_eq!(refused(held(Phase::Released, 9), Evidence::Token(token)), "STALE_EVIDENCE");
    }

    #[test]
    fn a_fence_is_for_one_host_and_says_the_same_again() {
        let mine = held(Phase::Entered, 5);
        let first = fence(&mine, "A", "C").expect("fenced");
        crate::handover::phase::may_follow(Some(&mine), &first).expect("the journal takes it");
        assert_eq!(fence(&first, "A", "C"), Ok(first.clone()));
        let refused = |held: &OwnershipRecord, to| fence(held, "A", to).expect_err("refused").reason();
        assert_eq!(refused(&first, "B"), "FENCED_FOR_ANOTHER");
        assert_eq!(refused(&mine, "A"), "FENCE_TO_ITSELF");
        assert_eq!(refused(&held(Phase::HandedOver, 5), "C"), "PEER_DECIDES");
        assert_eq!(refused(&held(Phase::Released, 5), "B"), "NOT_OWNED");
        assert!(token(&mine).is_none());
    }
}
