//! One migration of ours: two hosts, a machine, the measured guest.

use std::time::Duration;

use vpmu_client::{Client, ConsoleOptions, Endpoint};
use vpmu_proto::api::migration_spec::Mode;
use vpmu_proto::api::{Migration, MigrationSpec};

use super::Way;
use super::cell::{Cell, Run, first_gap};
use crate::bench::error::{BenchError, Step as _};
use crate::bench::site::{self, Site};

/// Until the guest has filled its memory.
const SET_UP: Duration = Duration::from_secs(60);
/// It runs like this for a while, so that its working set is there.
pub(super) const SETTLE: Duration = Duration::from_millis(700);
/// After the end, for what the guest has to tell.
pub(super) const AFTER: Duration = Duration::from_millis(300);
const MIGRATION: Duration = Duration::from_secs(60);

pub(super) async fn run(site: &Site, isolation: &str, cell: &Cell) -> Result<Run, BenchError> {
    let a = site.tcp_host("src", isolation).await?;
    let b = site.tcp_host("dst", isolation).await?;
    // The hosts keep what earlier runs have left.
    let name = format!("vm-{}", uuid::Uuid::new_v4().simple());
    let result = migrate(site, &name, &a.client, &b.client, b.peer.clone(), cell).await;
    // Whatever happened, both end.
    let ended = (a.end().await, b.end().await);
    let run = result?;
    ended.0?;
    ended.1?;
    Ok(run)
}

async fn migrate(
    site: &Site,
    name: &str,
    from: &Client,
    to: &Client,
    peer: Endpoint,
    cell: &Cell,
) -> Result<Run, BenchError> {
    let spec = site.spec(cell.memory_mib, &cell.load.cmdline(cell.memory_mib));
    site::launch(from, name, site::without_pmu(spec)).await?;
    let mut console =
        from.attach_console(name, ConsoleOptions::default()).await.step("attach to the console")?;
    let set_up = async {
        loop {
            let piece = console.next().await.step("read the console")?;
            let piece = piece.ok_or_else(|| BenchError::Missing("the console ended early".to_owned()))?;
            if piece.data.contains(&b'R') {
                return Ok::<_, BenchError>(piece.offset + piece.data.len() as u64);
            }
        }
    };
    let mut seen = tokio::time::timeout(SET_UP, set_up)
        .await
        .map_err(|_| BenchError::Missing("the guest was not set up in time".to_owned()))??;
    tokio::time::sleep(SETTLE).await;
    let spec = MigrationSpec {
        destination: peer.to_string(),
        max_blackout: duration(Duration::from_millis(cell.limit_ms.into())),
        max_duration: duration(MIGRATION / 2),
        connections: cell.connections,
        allow_plaintext: cell.way != Way::Tls,
        require_tls: cell.way == Way::Tls,
        mode: match cell.way {
            Way::Local => Mode::Local.into(),
            Way::Plain | Way::Tls => Mode::PrecopyOnly.into(),
        },
        ..MigrationSpec::default()
    };
    // Reads along, so that what the guest said here is told from what it says there.
    let reader = tokio::spawn(async move {
        while let Ok(Some(piece)) = console.next().await {
            seen = piece.offset + piece.data.len() as u64;
        }
        seen
    });
    let operation = from.create_migration(name, spec).await.step("migrate")?;
    let ended = from.wait_for::<Migration>(operation, MIGRATION).await;
    let migration = match ended {
        Ok(migration) => migration,
        Err(error) => {
            reader.abort();
            return Ok(Run { problem: Some(error.to_string()), ..Run::default() });
        }
    };
    let Ok(Ok(seen)) = tokio::time::timeout(Duration::from_secs(5), reader).await else {
        return Err(BenchError::Missing("the source's console did not end".to_owned()));
    };
    let result = migration.result.unwrap_or_default();
    tokio::time::sleep(AFTER).await;
    let there = output_from(to, name, seen).await?;
    if there.is_empty() {
        return Ok(Run {
            problem: Some("the guest is silent at the destination".to_owned()),
            ..Run::default()
        });
    }
    let parts = result.breakdown.unwrap_or_default();
    Ok(Run {
        total_ms: result.total_us as f64 / 1000.0,
        gap_ms: first_gap(&there),
        reported_ms: result.blackout_us as f64 / 1000.0,
        bytes: result.bytes,
        rounds: u64::from(result.rounds),
        migrated_ms: None,
        parts_us: Some([
            parts.stop_us,
            parts.save_us,
            parts.transfer_us,
            parts.persist_us,
            parts.restore_us,
            parts.resume_us,
        ]),
        problem: None,
    })
}

fn duration(time: Duration) -> Option<prost_types::Duration> {
    // Seconds and minutes: always fits.
    time.try_into().ok()
}

/// What the guest has said from an offset on.
async fn output_from(client: &Client, name: &str, offset: u64) -> Result<Vec<u8>, BenchError> {
    let options = ConsoleOptions { offset, history_only: true, ..ConsoleOptions::default() };
    let mut console = client.attach_console(name, options).await.step("attach to the console")?;
    let mut all = Vec::new();
    while let Some(piece) = console.next().await.step("read the console")? {
        all.extend(piece.data);
    }
    Ok(all)
}
