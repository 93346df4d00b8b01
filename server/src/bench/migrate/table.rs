//! The table: each cell of ours beside QEMU's, with ratios.

use std::io::{self, Write as _};

use console::style;
use serde::Serialize;

use super::cell::{Cell, Run};
use super::floors::Floors;
use super::{Way, completed};
use crate::bench::figure::Samples;

/// A gap this short meets its target whatever QEMU's is.
const SHORT_MS: f64 = 2.0;
/// Below this a guest does not report a hole.
const UNSEEN_MS: f64 = 0.5;
/// What a hand-over within the host may take, at any memory size.
const LOCAL_GAP_MS: f64 = 3.0;
const LOCAL_TOTAL_MS: f64 = 8.0;

/// Medians of one side.
#[derive(Debug, Clone, Serialize)]
struct Side {
    runs: usize,
    completed: usize,
    total_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    migrated_ms: Option<f64>,
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
            migrated_ms: completed(runs)
                .any(|r| r.migrated_ms.is_some())
                .then(|| of(&|r| r.migrated_ms.unwrap_or(f64::NAN))),
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
    /// QEMU, or for TLS our own plaintext.
    beside: Option<Side>,
    gap_ratio: Option<f64>,
    total_ratio: Option<f64>,
    bytes_ratio: Option<f64>,
    /// Gap, total, bytes: whether each meets its target, if it has one.
    met: [Option<bool>; 3],
    ours_raw: Vec<Run>,
    beside_raw: Vec<Run>,
}

impl Row {
    pub(super) fn new(cell: Cell, ours: &[Run], others: &[Run]) -> Self {
        let side = Side::new(ours);
        let beside = (!others.is_empty()).then(|| Side::new(others));
        // A cell in which one side never completes has no ratios.
        let whole = beside.as_ref().filter(|q| q.completed > 0 && side.completed > 0);
        let ratio = |a: f64, b: f64| if b > 0.0 { a / b } else { f64::INFINITY };
        let gap = whole.map(|q| ratio(side.gap_ms, q.gap_ms));
        let total = whole.map(|q| ratio(side.total_ms, q.total_ms));
        let bytes = whole.map(|q| ratio(side.megabytes, q.megabytes));
        let met = match cell.way {
            // Half of QEMU's gap, or short in any case; no longer than QEMU; hardly more bytes.
            Way::Plain => [
                gap.map(|gap| gap <= 0.5 || side.gap_ms <= SHORT_MS),
                total.map(|total| total <= 1.0),
                bytes.map(|bytes| bytes <= 1.05),
            ],
            Way::Tls => [None, total.map(|total| total <= 1.3), None],
            Way::Local if side.completed > 0 => {
                [Some(side.gap_ms <= LOCAL_GAP_MS), Some(side.total_ms <= LOCAL_TOTAL_MS), None]
            }
            Way::Local => [None; 3],
        };
        Self {
            cell,
            ours: side,
            beside,
            gap_ratio: gap,
            total_ratio: total,
            bytes_ratio: bytes,
            met,
            ours_raw: ours.to_vec(),
            beside_raw: others.to_vec(),
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
            "floors: memcpy {:.0} MB/s, two fdatasyncs {:.2} ms, state saved in {:.0} us and restored in {:.0}; load average {:.2}{build}",
            self.floors.memcpy_mb_s,
            self.floors.two_fdatasyncs_ms,
            self.floors.save_us,
            self.floors.restore_us,
            self.load_average
        )?;
        writeln!(
            out,
            "{:<42} {:>25} {:>25}  ratios",
            "guest", "ours: total / gap ms / MB", "QEMU: total / gap ms / MB"
        )?;
        for row in &self.cells {
            let side = |s: &Side| {
                if s.completed == 0 {
                    return "none completed".to_owned();
                }
                format!("{:.1} / {:.2} / {:.1}", s.total_ms, s.gap_ms, s.megabytes)
            };
            let mark = |name: &str, ratio: Option<f64>, met: Option<bool>| {
                let text = format!("{name} {}", ratio.map_or("-".to_owned(), |r| format!("{r:.2}")));
                match met {
                    Some(true) => style(text).green().to_string(),
                    Some(false) => style(format!("{text} MISSED")).red().to_string(),
                    None => text,
                }
            };
            writeln!(
                out,
                "{:<42} {:>25} {:>25}  {} {} {}",
                row.cell.name(),
                side(&row.ours),
                row.beside.as_ref().map_or(String::new(), side),
                mark("gap", row.gap_ratio, row.met[0]),
                mark("total", row.total_ratio, row.met[1]),
                mark("bytes", row.bytes_ratio, row.met[2]),
            )?;
            if let Some([stop, save, transfer, persist, restore, resume]) = row.ours.parts_us {
                writeln!(
                    out,
                    "      our standstill of {:.2} ms in us: stop {stop:.0}, save {save:.0}, transfer {transfer:.0}, persist {persist:.0}, restore {restore:.0}, resume {resume:.0}; {:.0} rounds, {} of {} runs{}",
                    row.ours.reported_ms,
                    row.ours.rounds,
                    row.ours.completed,
                    row.ours.runs,
                    row.beside.as_ref().map_or(String::new(), |q| format!(
                        "; {}: {:.0} rounds, {} of {}{}",
                        if row.cell.way == Way::Tls { "plaintext" } else { "QEMU" },
                        q.rounds,
                        q.completed,
                        q.runs,
                        q.migrated_ms
                            .map_or(String::new(), |own| format!(", {own:.0} ms without its source's end"))
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
