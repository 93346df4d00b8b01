//! ForceOwner: this host takes a machine that another host may own (handover.md, "ForceOwner").
//!
//! ```text
//!   request ─▶ same evidence as the record that holds? ─yes▶ answered again
//!      │ no
//!      ▼
//!   handover::force::judge ─▶ does the other host answer? ─▶ the migration's driver, if one lives: its machine decides
//!                                                         └▶ else the machine's actor: Owned, Failed, startable afresh
//! ```
//! Invariants: nothing is changed before the evidence is judged; an operator's word is refused while the host that it
//! declares dead answers; what a living machine has in its hands is decided by that machine alone.

use std::sync::Arc;

use sha2::{Digest as _, Sha256};
use tokio::sync::{mpsc, oneshot};
use vpmu_proto::api::force_owner_request::Evidence as Given;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::{ForceOwnerRequest, VirtualMachine};
use vpmu_proto::store::{FenceToken, Forced};

use crate::daemon::Daemon;
use crate::handover::force::{self, BY_TOKEN, BY_WORD, Claim, Evidence};
use crate::handover::{Handover, PeerAnswer, phase};
use crate::names::VmName;
use crate::status::ApiError;
use crate::vm::command::Command;

/// Longest reason in bytes.
const MAX_REASON: usize = 128;
/// Longest fence token in characters.
const MAX_TOKEN: usize = 2048;
/// How tokens begin.
const TOKEN: &str = "vpmu-fence-1-";

/// What a driver is told.
pub(super) struct Order {
    pub(super) claim: Claim,
    /// For the record.
    pub(super) note: Forced,
    /// Whether its machine heeds it.
    pub(super) reply: oneshot::Sender<Result<(), ApiError>>,
}

/// What a driver that heeds orders has in its hands.
pub(super) struct Ear {
    orders: mpsc::Receiver<Order>,
    /// The order that its machine heeds.
    heeded: Option<(Claim, Forced)>,
}

impl Ear {
    /// Orders about that machine go to this driver until it ends.
    pub(super) fn of(daemon: &Daemon, uid: &str) -> Self {
        let (sender, orders) = mpsc::channel(1);
        let mut all = daemon.migrations.forcible();
        all.retain(|_, sender| !sender.is_closed());
        all.insert(uid.to_owned(), sender);
        Self { orders, heeded: None }
    }

    pub(super) async fn hear(&mut self) -> Order {
        match self.orders.recv().await {
            Some(order) => order,
            None => std::future::pending().await,
        }
    }

    /// Answers an order; its claim, if the machine heeds it.
    pub(super) fn answer(&mut self, order: Order, heeds: bool) -> Option<Claim> {
        let answer = if heeds { Ok(()) } else { Err(not_now()) };
        let _ = order.reply.send(answer);
        if heeds {
            self.heeded = Some((order.claim, order.note));
        }
        heeds.then_some(order.claim)
    }

    /// What the journal says about a record that an order brought about.
    pub(super) fn note(&self, record: &mut vpmu_proto::store::OwnershipRecord) {
        if let Some((claim, note)) = &self.heeded
            && phase::may_run(record.phase())
            && record.epoch == claim.epoch
        {
            record.forced = Some(Box::new(note.clone()));
        }
    }
}

fn not_now() -> ApiError {
    ApiError::aborted(
        "FORCE_NOT_NOW",
        "migration",
        "its migration can still be decided by itself, or is being decided; look at the machine, cancel the migration, or ask again",
    )
}

/// Why a machine that was forced has no state.
pub(crate) fn fresh() -> ApiError {
    ApiError::internal(
        "FORCED",
        "this host owns it by force, and no copy here is known to be the newest; start it afresh",
    )
}

/// Takes it, and returns it once it is owned here.
pub async fn force(daemon: &Arc<Daemon>, request: ForceOwnerRequest) -> Result<VirtualMachine, ApiError> {
    let name = VmName::parse("name", &request.name, "")?;
    let reason = request.reason.trim();
    if reason.is_empty() || reason.len() > MAX_REASON {
        let remedy = format!("say in 1 to {MAX_REASON} bytes why it is forced");
        return Err(ApiError::invalid("reason", reason, "REASON", "is not of that length", &remedy));
    }
    let handle = daemon.registry.get(&name)?;
    let evidence = read(&request)?;
    let digest = digest(&evidence);
    let held = daemon.store.ownership(&handle.uid).unwrap_or_default();
    let again = held.forced.as_ref().is_some_and(|f| f.evidence != force::FENCED && f.digest == digest);
    if again && phase::may_run(held.phase()) {
        return Ok(handle.view().vm.clone());
    }
    let claim = force::judge(&held, &daemon.host.host_id, &evidence)
        .map_err(|why| ApiError::precondition(why.reason(), &name.to_string(), why.to_string()))?;
    let mut note = Forced {
        digest,
        reason: reason.to_owned(),
        time_ms: crate::vm::actor::wall_ms(),
        over_epoch: held.epoch,
        over_phase: held.phase,
        ..Forced::default()
    };
    match &evidence {
        Evidence::Token(token) => {
            BY_TOKEN.clone_into(&mut note.evidence);
            note.host.clone_from(&token.store_id);
        }
        Evidence::Word { host, boot_id, .. } => {
            BY_WORD.clone_into(&mut note.evidence);
            note.host.clone_from(host);
            note.boot_id.clone_from(boot_id);
            silent(daemon, &held, host).await?;
        }
    }
    tracing::warn!(vm = %name, evidence = note.evidence, host = note.host, epoch = claim.epoch, copy = claim.copy, reason, "CRITICAL: ownership is forced");
    let driver = daemon.migrations.forcible().get(&handle.uid).filter(|s| !s.is_closed()).cloned();
    if let Some(driver) = driver {
        let (reply, answer) = oneshot::channel();
        driver.try_send(Order { claim, note, reply }).map_err(|_| not_now())?;
        let wait = daemon.limits.call + daemon.limits.go;
        let told = tokio::time::timeout(wait, answer).await.map_err(|_| under_way())?;
        told.map_err(|_| not_now())??;
    } else {
        handle.ask(|reply| Command::Force { claim, note, reply }).await?;
    }
    let mut views = handle.watch();
    let owned = views.wait_for(|view| {
        let passing = matches!(view.state(), State::MigratingOut | State::Incoming | State::Moved);
        view.vm.epoch >= claim.epoch && !passing
    });
    let owned = tokio::time::timeout(daemon.limits.call, owned).await.map_err(|_| under_way())?;
    let vm = owned.map(|view| view.vm.clone()).map_err(|_| under_way())?;
    super::later::tell(daemon, &handle.uid);
    Ok(vm)
}

fn under_way() -> ApiError {
    ApiError::unavailable(
        "FORCE_UNDER_WAY",
        "it is on its way; ask again with the same evidence, which changes nothing",
    )
}

/// A host that answers is not dead.
async fn silent(
    daemon: &Daemon,
    held: &vpmu_proto::store::OwnershipRecord,
    host: &str,
) -> Result<(), ApiError> {
    if held.peer_host != host {
        return Ok(());
    }
    let handover = Handover::of(held, &daemon.host.host_id, false);
    match super::answer::ask(&handover, &daemon.peering).await {
        PeerAnswer::Unreachable => Ok(()),
        _ => Err(ApiError::precondition(
            "HOST_ANSWERS",
            host,
            format!(
                "host {host} answers at {}, so it is not dead; let it decide, or stop its vpmud and fence its directory",
                held.peer_address
            ),
        )),
    }
}

fn read(request: &ForceOwnerRequest) -> Result<Evidence, ApiError> {
    let uuid = |field: &str, text: &str| {
        uuid::Uuid::try_parse(text).map(|id| id.to_string()).map_err(|_| {
            ApiError::invalid(
                field,
                text,
                "BAD_ID",
                "is not a UUID",
                "give the id as `vpmuctl host info` and /proc/sys/kernel/random/boot_id show it",
            )
        })
    };
    match &request.evidence {
        None => Err(ApiError::invalid(
            "evidence",
            "",
            "EVIDENCE_REQUIRED",
            "is missing",
            "give the token of `vpmud store fence` on the old host's state directory, or attest that the host is dead",
        )),
        Some(Given::FenceToken(text)) => Ok(Evidence::Token(decode(text).ok_or_else(|| {
            ApiError::invalid(
                "fence_token",
                crate::status::clip(text, 48),
                "BAD_TOKEN",
                "is not what `vpmud store fence` printed",
                "copy the whole line",
            )
        })?)),
        Some(Given::Attestation(word)) => Ok(Evidence::Word {
            host: uuid("attestation.host_id", &word.host_id)?,
            boot_id: uuid("attestation.boot_id", &word.boot_id)?,
            epoch: (word.epoch < u64::MAX / 2).then_some(word.epoch).ok_or_else(|| {
                ApiError::invalid(
                    "attestation.epoch",
                    word.epoch,
                    "RANGE",
                    "is no epoch",
                    "leave it out if it is not known",
                )
            })?,
        }),
    }
}

fn digest(evidence: &Evidence) -> Vec<u8> {
    let text = match evidence {
        Evidence::Token(token) => encode(token),
        Evidence::Word { host, boot_id, epoch } => format!("{host} {boot_id} {epoch}"),
    };
    Sha256::digest(text).to_vec()
}

/// The token as it is printed.
pub(crate) fn encode(token: &FenceToken) -> String {
    use prost::Message as _;
    let bytes = token.encode_to_vec();
    let check = Sha256::digest(&bytes);
    format!(
        "{TOKEN}{}-{}",
        crate::pmu_view::hex(&bytes),
        crate::pmu_view::hex(check.get(..4).unwrap_or_default())
    )
}

fn decode(text: &str) -> Option<FenceToken> {
    use prost::Message as _;
    let text = text.trim();
    let (body, check) = text.strip_prefix(TOKEN).filter(|_| text.len() <= MAX_TOKEN)?.split_once('-')?;
    let digits = body.as_bytes().chunks(2);
    let bytes: Option<Vec<u8>> = digits
        .map(|two| u8::from_str_radix(std::str::from_utf8(two).ok().filter(|t| t.len() == 2)?, 16).ok())
        .collect();
    let bytes = bytes?;
    let whole = crate::pmu_view::hex(Sha256::digest(&bytes).get(..4)?) == check;
    FenceToken::decode(bytes.as_slice()).ok().filter(|_| whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_being_printed_and_a_damaged_one_is_none() {
        let token = FenceToken { vm_uid: "v".into(), epoch: 7, digest: vec![9; 32], ..FenceToken::default() };
        let text = encode(&token);
        assert_eq!(decode(&format!(" {text}\n")), Some(token));
        for at in [TOKEN.len(), text.len() - 1] {
            let mut bad = text.clone().into_bytes();
            bad[at] = if bad[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(decode(&String::from_utf8(bad).expect("text")), None, "{at}");
        }
        for bad in
            ["", TOKEN, "vpmu-fence-1-0-", "vpmu-fence-1-é-", &format!("{TOKEN}{}", "0".repeat(MAX_TOKEN))]
        {
            assert_eq!(decode(bad), None);
        }
    }
}
