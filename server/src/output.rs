//! How a command of vpmud prints what it found.

/// For whom it is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs: one JSON object; a command that shows progress prints one a line.
    Json,
}
