//! Where the demo speaks: standard output for people; standard error where standard output belongs to the JSON object.

use super::report::Report;
use console::style;
use std::io::{self, Write as _};

/// The demo's voice.
#[derive(Clone, Copy, Debug)]
pub(super) struct Say {
    json: bool,
}

impl Say {
    /// A voice; `json` moves the story to standard error.
    pub(super) fn new(json: bool) -> Self {
        Self { json }
    }

    /// A chapter's title.
    pub(super) fn chapter(self, number: u32, text: &str) {
        let title = format!("[{number}/7] {text}");
        let styled = style(title).bold();
        self.line(&if self.json { styled.for_stderr().to_string() } else { styled.to_string() });
    }

    /// One line of the story.
    pub(super) fn line(self, text: &str) {
        // A reader that went away is noticed when the result is printed.
        let _ = if self.json { writeln!(io::stderr(), "{text}") } else { writeln!(io::stdout(), "{text}") };
    }
}

/// The result as one object on standard output.
pub(super) fn print_json(report: &Report) -> io::Result<()> {
    let text = serde_json::to_string(report).map_err(io::Error::other)?;
    let mut out = io::stdout().lock();
    writeln!(out, "{text}")?;
    out.flush()
}

/// The result for people.
pub(super) fn print_summary(report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out)?;
    if let Some(migration) = &report.migration {
        let gap = migration.guest_gap_ms.map(|ms| format!(", the guest saw a gap of {ms:.1} ms"));
        writeln!(
            out,
            "migration   {:.1} ms in all, standing still for {:.1} ms{}; {} in {} rounds",
            migration.total_ms,
            migration.blackout_ms,
            gap.unwrap_or_default(),
            vpmu_client::units::bytes(migration.bytes),
            migration.rounds,
        )?;
    }
    for check in &report.checks {
        let mark = if check.ok { style("ok  ").green() } else { style("FAIL").red().bold() };
        writeln!(out, "{mark}  {:34} {}", check.name, check.detail)?;
    }
    let failed = report.checks.iter().filter(|check| !check.ok).count();
    if failed == 0 {
        writeln!(out, "\nall {} checks hold in {:.1} s", report.checks.len(), report.seconds)?;
    } else {
        writeln!(out, "\n{failed} of {} checks failed", report.checks.len())?;
    }
    out.flush()
}
