//! The stop: everything between the last instruction at the source and the destination's word that it has it all.
//!
//! kick and pause all vCPUs (PMU put) → seal → begin saving on the vCPU threads → last dirty pages → state → receipt →
//! applied. Each part is measured. An error after the seal leaves the machine paused and sealed: the owner decides.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use prost::Message as _;
use vpmu_proto::worker::FinishMigrationResponse;

use super::actions::Actions;
use super::failed;
use super::incoming::micros;
use super::outgoing::Source;
use crate::bitmap::PageBitmap;
use crate::dataplane::Outgoing;
use crate::error::WorkerError;
use crate::host::monotonic_ns;
use crate::machine::throttle::Throttling;

/// Bound on setting the state at the destination.
const APPLY: Duration = Duration::from_secs(10);

/// Does it. `pages` are those that were taken from the dirty log and not sent yet; none where the memory itself was
/// handed over.
pub(super) fn finish(
    id: &str,
    source: &Source,
    out: &mut Outgoing,
    pages: Option<PageBitmap>,
    epoch: u64,
    throttling: &Throttling,
    actions: &Actions,
) -> Result<FinishMigrationResponse, WorkerError> {
    let machine = &source.machine;
    let runtime = &source.runtime;
    let was_paused = !machine.is_running();
    let stop_monotonic_ns = monotonic_ns();
    let begin = Instant::now();
    let pmu = match runtime.block_on(machine.pause()) {
        Ok(pmu) => pmu,
        Err(error) => {
            // Not sealed yet: those that did stop go on.
            if !was_paused && let Err(error) = runtime.block_on(machine.run()) {
                tracing::error!(migration = id, %error, "going on after a stop that failed");
            }
            return Err(error);
        }
    };
    if let Some(end) = machine.end() {
        return Err(WorkerError::State {
            what: "finishing the migration",
            state: format!("ENDED ({})", end.kind().as_str_name()),
            remedy: "the guest ended before it could move: cancel the migration",
        });
    }
    (source.seal)(epoch);
    let stop_us = micros(begin.elapsed());

    let saving = machine.begin_save();
    let transfer = Instant::now();
    let pages = match pages {
        Some(mut pages) => {
            machine.vm().collect_dirty(&mut pages)?;
            pages
        }
        None => PageBitmap::new(machine.memory().pages()),
    };
    out.send_round(out.rounds() + 1, &pages, false).map_err(|e| failed(id, &e))?;
    let pages_us = micros(transfer.elapsed());

    let save = Instant::now();
    let state = runtime.block_on(machine.finish_save(saving, was_paused))?.encode_to_vec();
    let save_us = micros(save.elapsed());

    let rest = Instant::now();
    let stats = out.finish(&state).map_err(|e| failed(id, &e))?;
    out.await_applied(APPLY).map_err(|e| failed(id, &e))?;
    Ok(FinishMigrationResponse {
        state_digest: stats.digest.to_vec(),
        pmu,
        stop_monotonic_ns,
        stop_us,
        save_us,
        transfer_us: pages_us.saturating_add(micros(rest.elapsed())),
        bytes: out.bytes(),
        rounds: stats.rounds,
        pages_sent: stats.pages,
        zero_pages: stats.zero_pages,
        was_paused,
        transport: out.transport().to_owned(),
        compression: out.compression().name().to_owned(),
        page_bytes: out.progress().page_bytes.load(Ordering::Relaxed),
        page_wire_bytes: out.progress().page_wire_bytes.load(Ordering::Relaxed),
        throttle_percent_max: throttling.highest(),
        throttled_us: throttling.rested_us(),
        actions: actions.list(),
    })
}
