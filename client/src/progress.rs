//! A migration as a progress bar: phase, round, rate and predicted blackout. Draws on standard error, and nothing where
//! that is not a terminal.

use crate::units;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::fmt::Write as _;
use std::time::{Duration, Instant};
use vpmu_proto::api::{Migration, migration};

/// The bar of one migration.
#[derive(Debug)]
pub struct MigrationBar {
    bar: ProgressBar,
    begin: Instant,
}

impl MigrationBar {
    /// A bar for machine `name`; hidden if `visible` is false.
    pub fn new(name: &str, visible: bool) -> Self {
        let target = if visible { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        let template = "{spinner} {prefix} {bar:24} {binary_bytes}/{binary_total_bytes} {wide_msg}";
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_prefix(name.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self { bar, begin: Instant::now() }
    }

    /// Shows where the migration is.
    pub fn update(&self, migration: &Migration) {
        let mut shown = migration.clone();
        if let Some(progress) = shown.progress.as_mut().filter(|progress| progress.memory_bytes > 0) {
            self.bar.set_length(progress.memory_bytes);
            self.bar.set_position(progress.memory_bytes.saturating_sub(progress.bytes_remaining));
            // The host measures a round when it ends; until the first one has, the mean so far stands in.
            if progress.bytes_per_second == 0 {
                let elapsed = self.begin.elapsed().as_secs_f64().max(1e-3);
                progress.bytes_per_second = (progress.bytes_sent as f64 / elapsed) as u64;
            }
        }
        self.bar.set_message(describe(&shown));
    }

    /// Removes the bar from the screen.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

impl Drop for MigrationBar {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// One short line that says where a migration is.
pub fn describe(migration: &Migration) -> String {
    let mut text = words(migration.state()).to_owned();
    let Some(progress) = migration.progress else { return text };
    if progress.round > 0 {
        let _ = write!(text, " round {}", progress.round);
    }
    if progress.bytes_sent > 0 {
        let _ = write!(text, ", {} sent", units::bytes(progress.bytes_sent));
    }
    if progress.bytes_per_second > 0 {
        let _ = write!(text, ", {}/s", units::bytes(progress.bytes_per_second));
    }
    if progress.dirty_bytes_per_second > 0 {
        let _ = write!(text, ", dirtying {}/s", units::bytes(progress.dirty_bytes_per_second));
    }
    if progress.predicted_blackout_us > 0 && migration.state() == migration::State::Precopy {
        let _ = write!(
            text,
            ", blackout if stopped now {:.1} ms",
            progress.predicted_blackout_us as f64 / 1000.0
        );
    }
    if migration.state() == migration::State::Postcopy {
        let _ = write!(text, ", {} to follow", units::bytes(progress.missing_pages.saturating_mul(4096)));
    }
    text
}

fn words(state: migration::State) -> &'static str {
    use migration::State;
    match state {
        State::Unspecified => "unknown",
        State::Preparing => "preparing",
        State::Precopy => "copying",
        State::Stopped => "stopped, last pages",
        State::Committed => "handing over",
        State::Succeeded => "done",
        State::Failed => "failed",
        State::Cancelled => "cancelled",
        State::InDoubt => "in doubt",
        State::Postcopy => "runs there, memory follows;",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_proto::api::MigrationProgress;

    #[test]
    fn the_line_names_round_rate_and_prediction() {
        let migration = Migration {
            state: migration::State::Precopy.into(),
            progress: Some(MigrationProgress {
                round: 2,
                bytes_sent: 300 << 20,
                memory_bytes: 256 << 20,
                bytes_remaining: 4 << 20,
                bytes_per_second: 1 << 30,
                dirty_bytes_per_second: 8 << 20,
                predicted_blackout_us: 12_300,
                throttle_percent: 0,
                missing_pages: 0,
            }),
            ..Migration::default()
        };
        assert_eq!(
            describe(&migration),
            "copying round 2, 300 MiB sent, 1 GiB/s, dirtying 8 MiB/s, blackout if stopped now 12.3 ms"
        );
        let follows = Migration {
            state: migration::State::Postcopy.into(),
            progress: Some(MigrationProgress {
                round: 5,
                missing_pages: 512,
                ..MigrationProgress::default()
            }),
            ..Migration::default()
        };
        assert_eq!(describe(&follows), "runs there, memory follows; round 5, 2 MiB to follow");
    }
}
