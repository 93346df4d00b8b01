//! A figure, what it is held against, and how both are printed.

use std::io::{self, Write as _};

use console::style;
use serde::Serialize;

/// Samples in one unit.
#[derive(Debug, Clone, Default)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// One more.
    pub(super) fn push(&mut self, sample: f64) {
        self.0.push(sample);
    }

    /// How many.
    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// The middle one; NaN of none.
    pub(super) fn median(&self) -> f64 {
        vcpu_worker::floor::loops::median(self.0.clone())
    }

    /// The least one; infinite of none.
    pub(super) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    /// The greatest one.
    pub(super) fn max(&self) -> f64 {
        self.0.iter().copied().fold(f64::NEG_INFINITY, f64::max)
    }
}

impl FromIterator<f64> for Samples {
    fn from_iter<I: IntoIterator<Item = f64>>(samples: I) -> Self {
        Self(samples.into_iter().collect())
    }
}

/// What a figure must reach.
#[derive(Debug, Clone, Copy)]
pub(super) enum Target {
    /// At most this, in the figure's unit.
    AtMost(f64),
    /// At most so many times the floor.
    Times(f64),
    /// At most the floor and this much more.
    Over(f64),
    /// Shown for its own sake.
    None,
}

/// One line of the result.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Figure {
    /// What was measured.
    pub(super) name: String,
    /// "ms", "us", "MiB".
    pub(super) unit: &'static str,
    /// Ours.
    pub(super) ours: f64,
    /// Least and greatest sample of ours.
    pub(super) range: (f64, f64),
    /// What the bare machinery takes.
    pub(super) floor: Option<f64>,
    /// What the floor is.
    pub(super) floor_is: &'static str,
    /// Ours through the floor.
    pub(super) ratio: Option<f64>,
    /// What it must reach, in words.
    pub(super) target: String,
    /// Whether it does.
    pub(super) met: Option<bool>,
    /// Samples of ours.
    pub(super) samples: usize,
}

impl Figure {
    /// From samples of both sides, by their medians.
    pub(super) fn of(
        name: impl Into<String>,
        unit: &'static str,
        ours: &Samples,
        floor: Option<(&'static str, &Samples)>,
        target: Target,
    ) -> Self {
        let (value, range) = (ours.median(), (ours.min(), ours.max()));
        let floor = floor.map(|(is, samples)| (is, samples.median()));
        Self::new(name, unit, value, range, ours.len(), floor, target)
    }

    /// From the least of either side's samples.
    pub(super) fn least(
        name: impl Into<String>,
        unit: &'static str,
        ours: &Samples,
        floor: (&'static str, &Samples),
        target: Target,
    ) -> Self {
        let range = (ours.min(), ours.max());
        Self::new(name, unit, ours.min(), range, ours.len(), Some((floor.0, floor.1.min())), target)
    }

    fn new(
        name: impl Into<String>,
        unit: &'static str,
        ours: f64,
        range: (f64, f64),
        samples: usize,
        floor: Option<(&'static str, f64)>,
        target: Target,
    ) -> Self {
        let bound = |plus: f64| floor.map(|(_, floor)| floor + plus);
        let (met, target) = match target {
            Target::AtMost(most) => (Some(ours <= most), format!("at most {} {unit}", short(most))),
            Target::Times(times) => (
                floor.map(|(_, floor)| ours <= floor * times),
                format!("at most {} x the floor", short(times)),
            ),
            Target::Over(plus) => {
                (bound(plus).map(|most| ours <= most), format!("at most the floor + {} {unit}", short(plus)))
            }
            Target::None => (None, String::new()),
        };
        Self {
            name: name.into(),
            unit,
            ours,
            range,
            floor: floor.map(|(_, floor)| floor),
            floor_is: floor.map_or("", |(is, _)| is),
            ratio: floor.map(|(_, floor)| ours / floor),
            target,
            met,
            samples,
        }
    }
}

fn short(value: f64) -> String {
    let text = format!("{value:.2}");
    text.trim_end_matches('0').trim_end_matches('.').to_owned()
}

/// Of the last minute.
pub(super) fn load_average() -> f64 {
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    load.split(' ').next().and_then(|l| l.parse().ok()).unwrap_or(0.0)
}

/// All that one run printed.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    cores: usize,
    load_average: f64,
    optimised: bool,
    figures: Vec<Figure>,
}

impl Report {
    pub(super) fn new(figures: Vec<Figure>) -> Self {
        Self {
            cores: std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
            load_average: load_average(),
            optimised: !cfg!(debug_assertions),
            figures,
        }
    }

    /// One object.
    pub(super) fn print_json(&self) -> io::Result<()> {
        let text = serde_json::to_string(self).map_err(io::Error::other)?;
        let mut out = io::stdout().lock();
        writeln!(out, "{text}")?;
        out.flush()
    }

    /// For people.
    pub(super) fn print_table(&self) -> io::Result<()> {
        let mut out = io::stdout().lock();
        let build = if self.optimised { "" } else { ", NOT an optimised build: times mean little" };
        writeln!(out, "{} cores, load average {:.2}{build}", self.cores, self.load_average)?;
        writeln!(
            out,
            "{:<46} {:>10} {:>21} {:>10} {:>7}  target",
            "figure", "ours", "least .. most", "floor", "ratio"
        )?;
        for f in &self.figures {
            let mark = match f.met {
                Some(true) => style("met").green().to_string(),
                Some(false) => style("MISSED").red().to_string(),
                None => String::new(),
            };
            let floor = f.floor.map_or(String::new(), |v| format!("{v:.3}"));
            let ratio = f.ratio.map_or(String::new(), |v| format!("{v:.3}"));
            writeln!(
                out,
                "{:<46} {:>10} {:>21} {:>10} {:>7}  {} {}",
                f.name,
                format!("{:.3} {}", f.ours, f.unit),
                format!("{:.3} .. {:.3}", f.range.0, f.range.1),
                floor,
                ratio,
                f.target,
                mark,
            )?;
            if !f.floor_is.is_empty() {
                writeln!(out, "    floor: {}; {} samples", f.floor_is, f.samples)?;
            }
        }
        out.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_judged() {
        let ours: Samples = [3.0, 1.0, 2.0].into_iter().collect();
        let floor: Samples = [1.0].into_iter().collect();
        let met = |target| Figure::of("x", "ms", &ours, Some(("floor", &floor)), target).met;
        assert_eq!(met(Target::AtMost(2.0)), Some(true));
        assert_eq!(met(Target::AtMost(1.9)), Some(false));
        assert_eq!(met(Target::Times(2.0)), Some(true));
        assert_eq!(met(Target::Over(0.9)), Some(false));
        assert_eq!(met(Target::None), None);
        let least = Figure::least("x", "ms", &ours, ("floor", &floor), Target::Times(1.0));
        assert_eq!((least.met, least.samples), (Some(true), 3));
    }
}
