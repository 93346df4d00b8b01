//! How a migration ended, and what it cost.

use prost::Message as _;
use vpmu_proto::api::{
    BlackoutBreakdown, Migration, MigrationAction, MigrationResult, PmuRestored, PmuShape, ProbeReport,
};
use vpmu_proto::peer::destination_message::{Entered, Ready};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::worker::FinishMigrationResponse;

use crate::status::ApiError;
use crate::vm::command::Outcome;

/// Largest stored migration in bytes; beyond it the raw registers are left out (the counters stay).
const MAX_STORED: usize = 900 << 10;

/// The end of a migration at its source.
pub(super) struct Ended {
    pub(super) outcome: Outcome,
    pub(super) migration: Result<Box<MigrationResult>, ApiError>,
}

impl Ended {
    /// It stays here; `lost` says that the worker did not survive.
    pub(super) fn stayed(ownership: OwnershipRecord, lost: Option<ApiError>, why: ApiError) -> Self {
        let migration = Err(lost.clone().unwrap_or(why));
        Self { outcome: Outcome::Stayed { ownership, lost }, migration }
    }
}

/// What the pieces of a finished migration add up to.
pub(super) struct Cost<'a> {
    pub(super) finish: &'a FinishMigrationResponse,
    pub(super) ready: &'a Ready,
    pub(super) entered: &'a Entered,
    /// HandedOver's durable write, microseconds.
    pub(super) decide_us: u64,
    /// Monotonic time at which Entered arrived, ns.
    pub(super) entered_ns: u64,
    pub(super) boot_id: &'a str,
    pub(super) source_cores: &'a [u32],
    pub(super) local: bool,
    pub(super) total_us: u64,
}

impl Cost<'_> {
    /// The result as the API shows it.
    pub(super) fn result(&self) -> MigrationResult {
        let (finish, ready, entered) = (self.finish, self.ready, self.entered);
        // Clocks compare on one machine only; elsewhere the answer's arrival bounds the blackout from above.
        let same_clock = !entered.boot_id.is_empty() && entered.boot_id == self.boot_id;
        let running = if same_clock && entered.running_monotonic_ns != 0 {
            entered.running_monotonic_ns
        } else {
            self.entered_ns
        };
        MigrationResult {
            total_us: self.total_us,
            blackout_us: running.saturating_sub(finish.stop_monotonic_ns) / 1000,
            guest_gap_us: None,
            bytes: finish.bytes,
            rounds: finish.rounds,
            mode: match (self.local, finish.missing_pages) {
                (true, _) => "local",
                (false, 0) => "precopy",
                (false, _) => "postcopy",
            }
            .to_owned(),
            transport: finish.transport.clone(),
            breakdown: Some(BlackoutBreakdown {
                stop_us: finish.stop_us,
                save_us: finish.save_us,
                transfer_us: finish.transfer_us.saturating_sub(ready.restore_us),
                persist_us: self.decide_us.saturating_add(entered.persist_us),
                restore_us: ready.restore_us,
                resume_us: entered.resume_us,
            }),
            pmu_digest: crate::pmu_view::hex(&images_digest(&finish.pmu)),
            pmu_at_stop: crate::pmu_view::decode_all(&finish.pmu, self.source_cores).unwrap_or_default(),
            pmu_at_resume: crate::pmu_view::decode_all(&ready.pmu, &ready.vcpu_cores).unwrap_or_default(),
            pages_sent: finish.pages_sent,
            zero_pages: finish.zero_pages,
            compression: finish.compression.clone(),
            page_bytes: finish.page_bytes,
            page_wire_bytes: finish.page_wire_bytes,
            throttle_percent_max: finish.throttle_percent_max,
            throttled_us: finish.throttled_us,
            postcopy_pages: finish.missing_pages,
            pmu_restored: ready.pmu_restored.clone(),
        }
    }
}

/// What was done to the PMU, among what else the migration did.
pub(super) fn pmu_action(restored: &PmuRestored, at_us: u64) -> MigrationAction {
    let named: Vec<String> = restored
        .losses
        .iter()
        .take(8)
        .map(|l| format!("vCPU {} {} {:#x} is now {:#x}", l.vcpu, l.name, l.had, l.has))
        .collect();
    let more = (restored.losses_total as usize).saturating_sub(named.len());
    let more = if more == 0 { String::new() } else { format!(" and {more} more") };
    let shown = |shape: &Option<PmuShape>| {
        let shape = shape.as_ref().map(vcpu_worker::pmu_glue::shape_from_proto);
        shape.and_then(Result::ok).map_or_else(|| "none".to_owned(), |s| s.to_string())
    };
    let code = if restored.policy == "reset" { "PMU_RESET" } else { "PMU_REDUCED" };
    let shapes = if restored.had == restored.has {
        String::new()
    } else {
        format!("the PMU was {} and is {}; ", shown(&restored.had), shown(&restored.has))
    };
    MigrationAction {
        at_us,
        code: code.to_owned(),
        detail: format!(
            "{shapes}{} registers did not come along whole: {}{more}",
            restored.losses_total,
            named.join(", ")
        ),
    }
}

/// SHA-256 over the digests of all vCPUs' images in order.
fn images_digest(images: &[vpmu_proto::worker::PmuImage]) -> Vec<u8> {
    use sha2::{Digest as _, Sha256};
    let mut hasher = Sha256::new();
    for image in images {
        hasher.update(&image.digest);
    }
    hasher.finalize().to_vec()
}

/// The longest hole that a vCPU of the probe guest saw since it was resumed, microseconds.
pub(super) fn guest_gap_us(report: &ProbeReport) -> Option<u64> {
    report.vcpus.iter().map(|v| v.last_gap_ns / 1000).max().filter(|us| *us > 0)
}

/// A migration that fits the store.
pub(super) fn storable(migration: &Migration) -> Migration {
    let mut out = migration.clone();
    if out.encoded_len() > MAX_STORED
        && let Some(result) = &mut out.result
    {
        for vcpu in result.pmu_at_stop.iter_mut().chain(&mut result.pmu_at_resume) {
            vcpu.registers.clear();
        }
    }
    out
}
