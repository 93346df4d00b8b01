//! A migration, flat.

use super::{VcpuView, bare, ms, time};
use crate::names;
use serde::Serialize;
use vpmu_proto::api::{CheckMigrationResponse, Migration, MigrationMismatch};

/// What `migrate --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct MigrationView {
    /// Full name.
    pub name: String,
    /// Short name of the machine.
    pub vm: String,
    /// `PREPARING`, `PRECOPY`, `STOPPED`, `COMMITTED`, `POSTCOPY`, `SUCCEEDED`, `FAILED`,
    /// `CANCELLED`, `IN_DOUBT`.
    pub state: String,
    /// What it is doing, in words.
    pub phase: String,
    /// Stable code, when it failed or was cancelled.
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// Host id it came from.
    pub source_host: String,
    /// Host id it goes to.
    pub destination_host: String,
    /// Accepted to released, in milliseconds.
    pub total_ms: Option<f64>,
    /// vCPUs stopped on the source to running on the destination, in milliseconds.
    pub blackout_ms: Option<f64>,
    /// The hole as the guest saw it, in milliseconds, where it measures one.
    pub guest_gap_ms: Option<f64>,
    /// Bytes over the data connections so far.
    pub bytes: u64,
    /// Pre-copy rounds so far.
    pub rounds: u32,
    /// `precopy`, `postcopy` or `local`.
    pub mode: Option<String>,
    /// `unix`, `tcp` or `tcp+tls`.
    pub transport: Option<String>,
    /// `none`, `lz4`, `zstd` or `auto`.
    pub compression: Option<String>,
    /// Bytes of pages before compression.
    pub page_bytes: Option<u64>,
    /// Bytes of pages on the wire.
    pub page_wire_bytes: Option<u64>,
    /// Highest share of the time that vCPUs were made to rest, in hundredths.
    pub throttle_percent_max: u32,
    /// What was done and why, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub actions: Vec<ActionView>,
    /// The blackout's parts.
    pub breakdown: Option<BreakdownView>,
    /// Digest of the PMU state at the stop, hex.
    pub pmu_digest: Option<String>,
    /// Pages sent.
    pub pages_sent: Option<u64>,
    /// Zero pages that were not sent.
    pub zero_pages: Option<u64>,
    /// Post-copy: pages that the destination has yet to get.
    pub missing_pages: u64,
    /// Post-copy: pages that followed after the machine had moved.
    pub postcopy_pages: u64,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Bytes left in this round.
    pub bytes_remaining: u64,
    /// Measured rate, bytes a second.
    pub bytes_per_second: u64,
    /// Measured dirtying, bytes a second.
    pub dirty_bytes_per_second: u64,
    /// Predicted blackout if it stopped now, in milliseconds.
    pub predicted_blackout_ms: f64,
    /// PMU state at the stop, on the source.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmu_at_stop: Vec<VcpuView>,
    /// PMU state as restored on the destination before it ran.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pmu_at_resume: Vec<VcpuView>,
    /// When it was accepted.
    pub create_time: Option<String>,
    /// When it ended.
    pub end_time: Option<String>,
}

/// Something that a migration did.
#[derive(Clone, Debug, Serialize)]
pub struct ActionView {
    /// Since copying began, in milliseconds.
    pub at_ms: f64,
    /// Stable code.
    pub code: String,
    /// Why.
    pub detail: String,
}

/// Where the blackout went, in milliseconds.
#[derive(Clone, Debug, Serialize)]
pub struct BreakdownView {
    /// Kick to all vCPUs out, PMU put.
    pub stop_ms: f64,
    /// vCPU and device state read.
    pub save_ms: f64,
    /// Last pages and state to the destination.
    pub transfer_ms: f64,
    /// Durable decision records.
    pub persist_ms: f64,
    /// State set into the destination's machine.
    pub restore_ms: f64,
    /// Grant to running.
    pub resume_ms: f64,
}

impl From<&Migration> for MigrationView {
    fn from(migration: &Migration) -> Self {
        let progress = migration.progress.unwrap_or_default();
        let result = migration.result.as_ref();
        Self {
            name: migration.name.clone(),
            vm: names::vm_of(&migration.name).to_owned(),
            state: bare(migration.state().as_str_name(), ""),
            phase: migration.phase.clone(),
            reason: migration.reason.clone(),
            message: migration.message.clone(),
            source_host: migration.source_host.clone(),
            destination_host: migration.destination_host.clone(),
            total_ms: result.map(|r| ms(r.total_us)),
            blackout_ms: result.map(|r| ms(r.blackout_us)),
            guest_gap_ms: result.and_then(|r| r.guest_gap_us).map(ms),
            bytes: result.map_or(progress.bytes_sent, |r| r.bytes),
            rounds: result.map_or(progress.round, |r| r.rounds),
            mode: result.map(|r| r.mode.clone()),
            transport: result.map(|r| r.transport.clone()),
            compression: result.map(|r| r.compression.clone()),
            page_bytes: result.map(|r| r.page_bytes),
            page_wire_bytes: result.map(|r| r.page_wire_bytes),
            throttle_percent_max: result.map_or(progress.throttle_percent, |r| r.throttle_percent_max),
            actions: migration
                .actions
                .iter()
                .map(|a| ActionView { at_ms: ms(a.at_us), code: a.code.clone(), detail: a.detail.clone() })
                .collect(),
            breakdown: result.and_then(|r| r.breakdown).map(|b| BreakdownView {
                stop_ms: ms(b.stop_us),
                save_ms: ms(b.save_us),
                transfer_ms: ms(b.transfer_us),
                persist_ms: ms(b.persist_us),
                restore_ms: ms(b.restore_us),
                resume_ms: ms(b.resume_us),
            }),
            pmu_digest: result.map(|r| r.pmu_digest.clone()),
            pages_sent: result.map(|r| r.pages_sent),
            zero_pages: result.map(|r| r.zero_pages),
            missing_pages: progress.missing_pages,
            postcopy_pages: result.map_or(0, |r| r.postcopy_pages),
            memory_bytes: progress.memory_bytes,
            bytes_remaining: progress.bytes_remaining,
            bytes_per_second: progress.bytes_per_second,
            dirty_bytes_per_second: progress.dirty_bytes_per_second,
            predicted_blackout_ms: ms(progress.predicted_blackout_us),
            pmu_at_stop: result
                .map(|r| r.pmu_at_stop.iter().map(VcpuView::from).collect())
                .unwrap_or_default(),
            pmu_at_resume: result
                .map(|r| r.pmu_at_resume.iter().map(VcpuView::from).collect())
                .unwrap_or_default(),
            create_time: time(migration.create_time.as_ref()),
            end_time: time(migration.end_time.as_ref()),
        }
    }
}

/// What `migrate --check --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct CheckView {
    /// Nothing prevents it.
    pub compatible: bool,
    /// The destination's host id.
    pub destination_host: String,
    /// Everything that does not fit.
    pub mismatches: Vec<MismatchView>,
}

/// Something in the way of a migration.
#[derive(Clone, Debug, Serialize)]
pub struct MismatchView {
    /// Stable code.
    pub rule: String,
    /// What does not fit.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// It does not prevent the migration.
    pub warning: bool,
}

impl From<&CheckMigrationResponse> for CheckView {
    fn from(check: &CheckMigrationResponse) -> Self {
        Self {
            compatible: check.compatible,
            destination_host: check.destination_host.clone(),
            mismatches: check.mismatches.iter().map(MismatchView::from).collect(),
        }
    }
}

impl From<&MigrationMismatch> for MismatchView {
    fn from(mismatch: &MigrationMismatch) -> Self {
        Self {
            rule: mismatch.rule.clone(),
            message: mismatch.message.clone(),
            remedy: mismatch.remedy.clone(),
            warning: mismatch.warning,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_proto::api::{MigrationResult, migration};

    #[test]
    fn the_result_is_in_milliseconds() {
        let migration = Migration {
            name: "projects/default/virtualMachines/a/migrations/m".to_owned(),
            state: migration::State::Succeeded.into(),
            result: Some(MigrationResult {
                total_us: 1_234_567,
                blackout_us: 18_250,
                guest_gap_us: None,
                bytes: 42,
                rounds: 3,
                mode: "precopy".to_owned(),
                transport: "unix".to_owned(),
                ..MigrationResult::default()
            }),
            ..Migration::default()
        };
        let json = serde_json::to_value(MigrationView::from(&migration)).expect("serialises");
        assert_eq!(json["total_ms"], 1234.567);
        assert_eq!(json["blackout_ms"], 18.25);
        assert_eq!(json["guest_gap_ms"], serde_json::Value::Null);
        assert_eq!((json["rounds"].as_u64(), json["bytes"].as_u64()), (Some(3), Some(42)));
        assert_eq!((json["vm"].as_str(), json["state"].as_str()), (Some("a"), Some("SUCCEEDED")));
    }
}
