//! The table: each cell of ours beside QEMU's, with ratios.

use std::io::{self, Write as _};

use console::style;
use serde::Serialize;

use super::cell::{Cell, Run};
use super::completed;
use super::floors::Floors;
use crate::bench::figure::Samples;

/// A gap this short meets its target whatever QEMU's is.
const SHORT_MS: f64 = 2.0;
/// Below this a guest does not report a hole.
const UNSEEN_MS: f64 = 0.5;

/// Medians of one side.
#[derive(Debug, Clone, Serialize)]
struct Side {
    runs: usize,
    completed: usize,
    total_ms: f64,
    gap_ms: f64,
    reported_ms: f64,
    megabytes: f64,
    rounds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    parts_us: Option<[f64; 6]>,
    problems: Vec<String>,
}

impl Side {
    fn new(runs: &[Run]) -> Self {
        let of = |pick: &dyn Fn(&Run) -> f64| completed(runs).map(pick).collect::<Samples>().median();
        let parts = completed(runs).any(|r| r.parts_us.is_some()).then(|| {
            std::array::from_fn(|part| of(&|r| r.parts_us.map_or(f64::NAN, |parts| parts[part] as f64)))
        });
        Self {
            runs: runs.len(),
            completed: completed(runs).count(),
            total_ms: of(&|r| r.total_ms),
            gap_ms: of(&|r| r.gap_ms.unwrap_or(UNSEEN_MS)),
            reported_ms: of(&|r| r.reported_ms),
            megabytes: of(&|r| r.bytes as f64 / 1e6),
            rounds: of(&|r| r.rounds as f64),
            parts_us: parts,
            problems: runs.iter().filter_map(|r| r.problem.clone()).collect(),
        }
    }
}

/// One cell.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Row {
    cell: Cell,
    ours: Side,
    qemu: Option<Side>,
    gap_ratio: Option<f64>,
    total_ratio: Option<f64>,
    bytes_ratio: Option<f64>,
    /// Gap at most half of QEMU's or 2 ms, total at most QEMU's, bytes at most 1.05 of QEMU's.
    met: Option<[bool; 3]>,
    ours_raw: Vec<Run>,
    qemu_raw: Vec<Run>,
}

impl Row {
    pub(super) fn new(cell: Cell, ours: &[Run], theirs: &[Run]) -> Self {
        let side = Side::new(ours);
        let qemu = (!theirs.is_empty()).then(|| Side::new(theirs));
        // A cell in which QEMU never completes has no ratios.
        let beside = qemu.as_ref().filter(|q| q.completed > 0 && side.completed > 0);
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { f64::INFINITY };
        let (gap, total, bytes) = match beside {
            Some(q) => (
                Some(ratio(side.gap_ms, q.gap_ms)),
                Some(ratio(side.total_ms, q.total_ms)),
                Some(ratio(side.megabytes, q.megabytes)),
            ),
            None => (None, None, None),
        };
        let met = gap.zip(total).zip(bytes).map(|((gap, total), bytes)| {
            [gap <= 0.5 || side.gap_ms <= SHORT_MS, total <= 1.0, bytes <= 1.05]
        });
        Self {
            cell,
            ours: side,
            qemu,
            gap_ratio: gap,
            total_ratio: total,
            bytes_ratio: bytes,
            met,
            ours_raw: ours.to_vec(),
            qemu_raw: theirs.to_vec(),
        }
    }
}

/// All cells.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    load_average: f64,
    optimised: bool,
    floors: Floors,
    cells: Vec<Row>,
}

impl Table {
    pub(super) fn new(floors: Floors, cells: Vec<Row>) -> Self {
        Self {
            load_average: crate::bench::figure::load_average(),
            optimised: !cfg!(debug_assertions),
            floors,
            cells,
        }
    }

    /// One object.
    pub(crate) fn print_json(&self) -> io::Result<()> {
        let text = serde_json::to_string(self).map_err(io::Error::other)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    }

    /// For people.
    pub(crate) fn print_table(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let build = if self.optimised { "" } else { "; NOT an optimised build: times mean little" };
        writeln!(
            out,
            "floors: memcpy {:.0} MB/s, two fdatasyncs {:.2} ms; load average {:.2}{build}",
            self.floors.memcpy_mb_s, self.floors.two_fdatasyncs_ms, self.load_average
        )?;
        writeln!(
            out,
            "{:>5} {:<19} {:>5}  {:>25} {:>25}  {:>23}",
            "MiB", "guest", "limit", "ours: total / gap ms / MB", "QEMU: total / gap ms / MB", "ratios"
        )?;
        for row in &self.cells {
            let side = |s: &Side| {
                if s.completed == 0 {
                    return "none completed".to_owned();
                }
                format!("{:.1} / {:.2} / {:.1}", s.total_ms, s.gap_ms, s.megabytes)
            };
            let mark = |text: String, met: Option<bool>| match met {
                Some(true) => style(text).green().to_string(),
                Some(false) => style(text).red().to_string(),
                None => text,
            };
            let met = |n: usize| row.met.map(|met| met[n]);
            let ratio = |r: Option<f64>| r.map_or("-".to_owned(), |r| format!("{r:.2}"));
            writeln!(
                out,
                "{:>5} {:<19} {:>5}  {:>25} {:>25}  gap {} total {} bytes {}",
                row.cell.memory_mib,
                row.cell.load.name(),
                row.cell.limit_ms,
                side(&row.ours),
                row.qemu.as_ref().map_or(String::new(), side),
                mark(ratio(row.gap_ratio), met(0)),
                mark(ratio(row.total_ratio), met(1)),
                mark(ratio(row.bytes_ratio), met(2)),
            )?;
            if let Some([stop, save, transfer, persist, restore, resume]) = row.ours.parts_us {
                writeln!(
                    out,
                    "      our standstill of {:.2} ms in us: stop {stop:.0}, save {save:.0}, transfer {transfer:.0}, persist {persist:.0}, restore {restore:.0}, resume {resume:.0}; {:.0} rounds, {} of {} runs{}",
                    row.ours.reported_ms,
                    row.ours.rounds,
                    row.ours.completed,
                    row.ours.runs,
                    row.qemu.as_ref().map_or(String::new(), |q| format!(
                        "; QEMU {:.0} rounds, {} of {}",
                        q.rounds, q.completed, q.runs
                    )),
                )?;
            }
            for problem in row.ours.problems.iter().take(1) {
                writeln!(out, "      ours: {problem}")?;
            }
        }
        out.flush()
    }
}
