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
use super::following::to_bytes;
use super::incoming::micros;
use super::outgoing::Source;
use crate::bitmap::PageBitmap;
use crate::dataplane::Outgoing;
use crate::dataplane::postcopy::{Left, Until};
use crate::dataplane::precopy::Goals;
use crate::error::WorkerError;
use crate::host::monotonic_ns;
use crate::machine::throttle::Throttling;
use crate::memory::PAGE_SIZE;

/// Bound on setting the state at the destination.
const APPLY: Duration = Duration::from_secs(10);

/// Most pages that a post-copy does not leave for later.
const NOW_PAGES: u64 = 256;

/// What is to be sent at the stop.
#[derive(Default)]
pub(super) struct Last {
    /// Taken from the dirty log and not sent yet; none where the memory itself was handed over.
    pub(super) pages: Option<PageBitmap>,
    /// They follow when the machine has moved.
    pub(super) later: bool,
    /// All but so many, from the lowest on.
    pub(super) now: u64,
}

/// Pages that cost an eighth of the blackout at a rate: what every guest needs at once (tables, stacks) is low in memory,
/// and each costs a round trip later.
pub(super) fn now_pages(goals: &Goals, bytes_per_second: u64) -> u64 {
    let bytes = u128::from(bytes_per_second) * goals.max_blackout.as_nanos() / 8_000_000_000;
    u64::try_from(bytes / u128::from(PAGE_SIZE)).unwrap_or(u64::MAX).min(NOW_PAGES)
}

/// Does it; returns what is left for later too.
pub(super) fn finish(
    id: &str,
    source: &Source,
    out: &mut Outgoing,
    last: Last,
    epoch: u64,
    throttling: &Throttling,
    actions: &Actions,
) -> Result<(FinishMigrationResponse, Left), WorkerError> {
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
    let mut pages = match last.pages {
        Some(mut pages) => {
            machine.vm().collect_dirty(&mut pages)?;
            pages
        }
        None => PageBitmap::new(machine.memory().pages()),
    };
    let mut later = PageBitmap::new(pages.pages());
    if last.later {
        later.union(&pages);
        let now = pages.runs().flat_map(|(first, len)| first..first + len).take(last.now as usize);
        for page in now {
            later.clear(page);
        }
        pages.subtract(&later);
    }
    let mut later = Left::new(later);
    out.send_round(out.rounds() + 1, &pages, false).map_err(|e| failed(id, &e))?;
    let pages_us = micros(transfer.elapsed());

    let save = Instant::now();
    let mut state = runtime.block_on(machine.finish_save(saving, was_paused))?;
    if later.count() > 0 {
        // Part of the state, so the digest that the handover commits to covers it.
        state.missing_pages = to_bytes(later.pages());
    }
    let state = state.encode_to_vec();
    let save_us = micros(save.elapsed());

    let rest = Instant::now();
    let stats = out.finish(&state).map_err(|e| failed(id, &e))?;
    let missing_pages = later.count();
    if missing_pages > 0 {
        out.serve(&mut later, Until::Applied(Instant::now() + APPLY)).map_err(|e| failed(id, &e))?;
    } else {
        out.await_applied(APPLY).map_err(|e| failed(id, &e))?;
    }
    let response = FinishMigrationResponse {
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
        missing_pages,
    };
    Ok((response, later))
}
