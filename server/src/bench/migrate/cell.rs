//! What is measured in one cell of the table, and how the guest's own report is read.

use serde::Serialize;

use super::{Load, Way};

/// One combination.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Cell {
    pub(super) memory_mib: u64,
    pub(super) load: Load,
    pub(super) limit_ms: u32,
    pub(super) connections: u32,
    pub(super) way: Way,
}

impl Cell {
    /// For people.
    pub(super) fn name(&self) -> String {
        let way = match self.way {
            Way::Plain => "",
            Way::Tls => ", TLS",
            Way::Local => ", local",
        };
        let connections =
            if self.connections > 1 { format!(", {} connections", self.connections) } else { String::new() };
        format!("{} MiB, {}, limit {} ms{connections}{way}", self.memory_mib, self.load.name(), self.limit_ms)
    }
}

/// One migration.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Run {
    /// Accepted to released: the source's process has ended.
    pub(super) total_ms: f64,
    /// What QEMU calls its total time: the source's process is still there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) migrated_ms: Option<f64>,
    /// The hole that the guest saw; none if it was too short for it to report (half a millisecond).
    pub(super) gap_ms: Option<f64>,
    /// What the tool says of its standstill.
    pub(super) reported_ms: f64,
    /// On the wire.
    pub(super) bytes: u64,
    /// Rounds, the last one included.
    pub(super) rounds: u64,
    /// Where our standstill went: stop, save, transfer, persist, restore, resume, in microseconds.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) parts_us: Option<[u64; 6]>,
    /// Why there is no result.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) problem: Option<String>,
}

/// The first hole that the guest tells of: `<G n>`, in milliseconds.
pub(super) fn first_gap(output: &[u8]) -> Option<f64> {
    let text = String::from_utf8_lossy(output);
    let begin = text.find("<G ")? + 3;
    let digits: String = text.get(begin..)?.chars().take_while(char::is_ascii_digit).collect();
    // One that is cut off has no end yet.
    if text.get(begin + digits.len()..)?.starts_with('>') {
        digits.parse::<f64>().ok().map(|us| us / 1000.0)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gaps_are_read() {
        assert_eq!(first_gap(b"..<G 1500>\n.<G 700>\n"), Some(1.5));
        assert_eq!(first_gap(b"...."), None);
        assert_eq!(first_gap(b"..<G 15"), None);
    }
}
