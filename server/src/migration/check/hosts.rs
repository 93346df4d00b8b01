//! What two hosts must have alike, or one must have enough of: disk for the state, clocks, versions.

use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use vpmu_proto::api::MigrationMismatch;

/// The journal's reserved records, the machine's own and its PMU's, with room for the store to write anew what it holds.
const STATE_DISK: u64 = 4 << 20;
/// Guests keep time by the counter's frequency; KVM's own tolerance is the same.
const TSC_PARTS_PER_MILLION: u64 = 250;
/// Wall clocks of hosts that are kept by NTP differ by far less.
const WALL_CLOCK: Duration = Duration::from_secs(1);

fn mismatch(rule: &str, message: String, remedy: &str, warning: bool) -> MigrationMismatch {
    MigrationMismatch { rule: rule.to_owned(), message, remedy: remedy.to_owned(), warning }
}

/// Bytes that the file system of a directory can still take from this process.
pub(super) fn free_disk(dir: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}

pub(super) fn state_disk(free: u64) -> Option<MigrationMismatch> {
    (free < STATE_DISK).then(|| {
        let message = format!(
            "the destination's state directory has {free} bytes free; a decision needs {STATE_DISK} to be sure of its place"
        );
        mismatch("STATE_DISK", message, "free disk space under the destination's --state-dir", false)
    })
}

/// Frequencies of the time stamp counter; 0 where one is not known.
pub(super) fn tsc(guest: u32, host: u32) -> Option<MigrationMismatch> {
    if guest == 0 || host == 0 {
        return None;
    }
    let apart = u64::from(guest.abs_diff(host)) * 1_000_000 / u64::from(guest);
    (apart > TSC_PARTS_PER_MILLION).then(|| {
        let message = format!(
            "the guest's time stamp counter runs at {guest} kHz, the destination's at {host} kHz: its clocks would run wrong"
        );
        mismatch("CLOCK", message, "use a host whose processors run the counter at the same frequency", false)
    })
}

/// Microseconds since 1970.
pub fn wall_clock_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The other's wall clock, read between two readings of ours; 0 from one that does not say.
pub fn wall_clocks((before, theirs, after): (u64, u64, u64)) -> Option<MigrationMismatch> {
    if theirs == 0 {
        return None;
    }
    // It was read at some moment in between, so only what lies outside is known to be apart.
    let apart = before.saturating_sub(theirs).max(theirs.saturating_sub(after));
    (Duration::from_micros(apart) > WALL_CLOCK).then(|| {
        let way = if theirs > after { "ahead of" } else { "behind" };
        let message =
            format!("the destination's wall clock is {:?} {way} this host's", Duration::from_micros(apart));
        mismatch(
            "WALL_CLOCK",
            message,
            "keep both hosts' clocks by NTP; the guest's own clock follows the destination's",
            true,
        )
    })
}

/// Different releases of vpmud may work together; whoever looks for a reason should know.
pub(in crate::migration) fn versions(ours: &str, theirs: &str) -> Option<MigrationMismatch> {
    (ours != theirs).then(|| {
        let theirs = crate::status::clip(theirs, 64);
        let message = format!("this host runs vpmud {ours}, the destination {theirs:?}");
        mismatch(
            "VERSION",
            message,
            "none is needed, both speak the same protocol; upgrade the older one when you can",
            true,
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_disk_is_named() {
        assert!(state_disk(STATE_DISK).is_none());
        let found = state_disk(STATE_DISK - 1).expect("too little");
        assert_eq!((found.rule.as_str(), found.warning), ("STATE_DISK", false));
        assert!(found.message.contains(&(STATE_DISK - 1).to_string()) && !found.remedy.is_empty());
        assert!(free_disk(Path::new("/")).expect("a file system") > 0);
    }

    #[test]
    fn counters_of_another_frequency_refuse_and_unknown_ones_do_not() {
        for (guest, host, refused) in [
            (3_000_000, 3_000_000, false),
            (3_000_000, 3_000_700, false),
            (3_000_000, 3_001_000, true),
            (2_100_000, 3_000_000, true),
            (0, 3_000_000, false),
            (3_000_000, 0, false),
        ] {
            let found = tsc(guest, host);
            assert_eq!(found.is_some(), refused, "{guest} {host}");
            assert!(found.is_none_or(|m| m.rule == "CLOCK" && !m.warning && m.message.contains("kHz")));
        }
    }

    #[test]
    fn only_what_is_surely_apart_is_said_of_wall_clocks() {
        const S: u64 = 1_000_000;
        for (clocks, said) in [
            ((10 * S, 10 * S, 10 * S), None),
            ((10 * S, 13 * S, 16 * S), None),
            ((10 * S, 0, 10 * S), None),
            ((10 * S, 15 * S, 11 * S), Some("4s ahead of")),
            ((10 * S, 7 * S, 11 * S), Some("3s behind")),
        ] {
            let found = wall_clocks(clocks);
            assert_eq!(found.is_some(), said.is_some(), "{clocks:?}");
            assert!(
                found.is_none_or(|m| m.warning && m.message.contains(said.unwrap_or_default())),
                "{clocks:?}"
            );
        }
    }

    #[test]
    fn another_release_is_a_warning() {
        assert!(versions("0.1.0", "0.1.0").is_none());
        assert!(versions("0.1.0", "0.2.0").is_some_and(|m| m.warning && m.message.contains("0.2.0")));
    }
}
