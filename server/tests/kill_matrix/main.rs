//! The kill matrix of handover.md, section 5: at each step of a handover, before it and after it, one of the four
//! processes is killed or stopped, a connection is cut, or a disk is full; and then the machine must be where the cell
//! says, whole, once, with nothing left behind.
//!
//! ```text
//! cargo test -p vpmu-server --test kill_matrix                                             a fixed subset
//! VPMU_KILL_MATRIX=all           cargo test -p vpmu-server --test kill_matrix -- --nocapture    every cell
//! VPMU_KILL_MATRIX=random:1000   ...                                  cells by chance, some with a second kill, on KVM too
//! VPMU_KILL_MATRIX=random:50:7   ...                                  the same with this seed
//! VPMU_KILL_MATRIX=thread/move   ...                                  every cell whose name contains one of these, by commas
//! VPMU_KILL_MATRIX_JOBS=4        cells at once; default 2
//! VPMU_KILL_MATRIX_TIMEOUT_MS=3000   time-outs in cells of silence; default 1000, too little on a machine that is busy
//! ```
#![allow(missing_docs, unreachable_pub)]

mod cell;
mod link;
mod run;
#[path = "../support/mod.rs"]
mod support;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cell::{Cell, Fault, Got};
use run::{Extra, Played};

/// What the default run plays: each fault, each process, both isolations, and the cells that found something.
const SUBSET: [&str; 20] = [
    "process/move/before:source-persist-handed-over/kill-SD",
    "process/move/after:source-persist-handed-over/kill-SD",
    "process/move/before:destination-send-ready/kill-SW",
    "process/move/before:source-persist-handed-over/kill-SW",
    "process/move/after:source-start-copy/kill-SW",
    "process/move/after:destination-persist-entered/kill-DD",
    "process/move/before:source-persist-handed-over/kill-DW",
    "process/move/before:source-persist-handed-over/stop-DD",
    "process/move/before:destination-grant/stop-DW",
    "process/return/after:destination-persist-returned/kill-DD",
    "process/cancel/before:source-grant/stop-SW",
    "thread/move/after:destination-persist-entered/kill-SD",
    "thread/move/before:destination-send-ready/kill-SD",
    "thread/move/after:source-persist-handed-over/cut",
    "thread/move/before:destination-persist-entered/one-way",
    "thread/move/before:source-persist-handed-over/disk-DD",
    "process/follow/kill-SD",
    "process/follow/kill-SW",
    "process/follow/kill-DD",
    "process/follow/part",
];

/// A cell takes seconds; one that takes this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// A small generator: cells by chance, the same again from the same seed.
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

fn chosen() -> Vec<(Cell, Extra)> {
    let asked = std::env::var("VPMU_KILL_MATRIX").unwrap_or_default();
    let all = Cell::all();
    if asked.is_empty() {
        let named = |name: &&str| Cell::named(name).unwrap_or_else(|| panic!("no cell {name}"));
        return SUBSET.iter().map(|name| (named(name), Extra::default())).collect();
    }
    if asked == "all" {
        return all.into_iter().map(|cell| (cell, Extra::default())).collect();
    }
    let Some(random) = asked.strip_prefix("random:") else {
        let wanted: Vec<_> = asked.split(',').collect();
        let found: Vec<_> = all
            .into_iter()
            .filter(|cell| wanted.iter().any(|w| cell.to_string().contains(w)))
            .map(|cell| (cell, Extra::default()))
            .collect();
        assert!(!found.is_empty(), "VPMU_KILL_MATRIX={asked}: no such cell");
        return found;
    };
    let mut numbers = random.split(':').map(|n| n.parse::<u64>().expect("random:N or random:N:SEED"));
    let n = numbers.next().expect("a number");
    let seed = numbers.next().unwrap_or_else(|| u64::from(std::process::id()) << 20 | 1);
    println!("seed {seed}");
    let (mut chance, kvm) = (Chance(seed.max(1)), support::have_kvm());
    (0..n)
        .map(|_| {
            let cell = all[usize::try_from(chance.below(all.len() as u64)).expect("small")];
            let again = (chance.below(3) == 0).then(|| Duration::from_millis(chance.below(120)));
            let kvm = kvm && chance.below(4) == 0;
            (cell, Extra { again, kvm })
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_cell_comes_to_what_it_must() {
    let mut cells = chosen();
    if cells.iter().any(|(cell, _)| matches!(cell.fault, Fault::Disk(_))) && !run::can_mount() {
        println!("skipped: cells with a full disk, which need a mount (root)");
        cells.retain(|(cell, _)| !matches!(cell.fault, Fault::Disk(_)));
    }
    let jobs = std::env::var("VPMU_KILL_MATRIX_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(2);
    let (begin, total) = (Instant::now(), cells.len());
    let room = Arc::new(tokio::sync::Semaphore::new(jobs));
    let mut running = tokio::task::JoinSet::new();
    for (number, (cell, extra)) in cells.into_iter().enumerate() {
        let room = Arc::clone(&room);
        running.spawn(async move {
            let _turn = room.acquire_owned().await.expect("open");
            let dir = tempfile::tempdir().expect("tempdir").keep();
            let place = dir.clone();
            let play = async move {
                let bounded = tokio::time::timeout(PATIENCE, run::play(cell, extra, &place));
                bounded.await.unwrap_or_else(|_| panic!("{cell}: not over after {PATIENCE:?}"))
            };
            let played = tokio::spawn(play).await;
            let played = played.map_err(|panic| match panic.try_into_panic() {
                Ok(why) => said(why.as_ref()),
                Err(error) => error.to_string(),
            });
            match &played {
                Ok(Played { got, reason, ms }) => {
                    println!("{number:4}/{total} {cell} {extra:?}: {got:?} {reason} {ms} ms");
                    let _ = std::fs::remove_dir_all(&dir);
                }
                Err(why) => {
                    println!(
                        "{number:4}/{total} {cell} {extra:?}: FAILED: {why}\n     logs in {}",
                        dir.display()
                    );
                }
            }
            (cell, played)
        });
    }
    let mut results = Vec::new();
    while let Some(done) = running.join_next().await {
        results.push(done.expect("a cell's panic is caught"));
    }
    println!("{}", table(&results));
    let unreached: Vec<_> = cell::UNREACHED.iter().map(|s| s.name()).collect();
    println!("not reachable from outside, covered by the model: {}", unreached.join(", "));
    let failed: Vec<_> =
        results.iter().filter_map(|(c, p)| p.as_ref().err().map(|e| format!("{c}: {e}"))).collect();
    println!("{total} cells, {} failed, {} s", failed.len(), begin.elapsed().as_secs());
    assert!(failed.is_empty(), "{} of {total} cells failed:\n{}", failed.len(), failed.join("\n"));
}

fn said(why: &(dyn std::any::Any + Send)) -> String {
    why.downcast_ref::<String>()
        .cloned()
        .or_else(|| why.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "a panic without words".to_owned())
}

/// Points down, faults across.
fn table(results: &[(Cell, Result<Played, String>)]) -> String {
    let mut rows: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    for (cell, played) in results {
        let text = match played {
            Ok(Played { got: Got::Lost, reason, .. }) => format!("LOST({reason})"),
            Ok(Played { got, .. }) => format!("{got:?}").to_uppercase(),
            Err(_) => "FAILED".to_owned(),
        };
        let name = cell.to_string();
        let (row, fault) = name.rsplit_once('/').expect("a name");
        rows.entry(row.to_owned()).or_default().push((fault.to_owned(), text));
    }
    let mut out = String::new();
    for (row, mut cells) in rows {
        cells.sort();
        let cells: Vec<_> = cells.into_iter().map(|(fault, text)| format!("{fault} {text}")).collect();
        let _ = writeln!(out, "{row}: {}", cells.join(", "));
    }
    out
}

#[test]
fn every_step_is_in_the_matrix_or_named_as_unreachable() {
    use vpmu_server::handover::step::HandoverStep;
    let all = Cell::all();
    for step in HandoverStep::ALL {
        let there = all.iter().any(|c| c.point.step == *step);
        assert_ne!(there, cell::UNREACHED.contains(step), "{}", step.name());
    }
    assert!(all.iter().all(|c| !c.expected().is_empty()));
    println!("{} cells", all.len());
}
