//! How long a migration waits for what: all of it follows from one figure, `--handover-timeout`.
//!
//! Invariant: none of these ends anything that is committed; they only decide when to abort, or when to ask again.

use std::time::Duration;

/// The waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// A reservation without a stream.
    pub lease: Duration,
    /// A new arrival waits for an interrupted earlier one.
    pub settle: Duration,
    /// The stop at the source: final pages, state, receipt.
    pub finish: Duration,
    /// The destination's Ready once the source has sent everything.
    pub ready: Duration,
    /// A peer that does not read.
    pub send: Duration,
    /// The destination's clean-up after an abort.
    pub aborted: Duration,
    /// Before each question to a destination that went away.
    pub ask_peer: Duration,
    /// Before each question to a source that went away, and between two of a restarted daemon.
    pub ask: Duration,
    /// The answer to a late Go.
    pub go: Duration,
    /// Post-copy: how long a destination waits for a source that lost its connection.
    pub recover: Duration,
    /// A worker's answer to a command.
    pub command: Duration,
    /// A connection's silence before it is probed, and the answer to the probe.
    pub keep_alive: Duration,
    /// The same at a listener.
    pub listener: Duration,
    /// A call to another host.
    pub call: Duration,
    /// A connection to another host.
    pub connect: Duration,
}

impl Limits {
    /// From the longest silence that is borne.
    pub fn of(silence: Duration) -> Self {
        let most = |seconds: u64| silence.min(Duration::from_secs(seconds));
        let pause = |ms: u64| (silence / 4).min(Duration::from_millis(ms));
        Self {
            lease: most(8),
            settle: most(10),
            finish: silence * 2,
            ready: silence,
            send: most(5),
            aborted: most(3),
            ask_peer: pause(500),
            ask: pause(1000),
            go: most(20),
            recover: most(20),
            command: most(15),
            keep_alive: most(5),
            listener: most(30),
            call: silence,
            connect: most(3),
        }
    }
}

/// As it travels.
pub(super) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_waits_shrink_and_long_ones_do_not_grow_beyond_what_they_are_for() {
        let short = Limits::of(Duration::from_millis(400));
        assert_eq!((short.ready, short.lease), (Duration::from_millis(400), Duration::from_millis(400)));
        assert_eq!((short.ask, short.ask_peer), (Duration::from_millis(100), Duration::from_millis(100)));
        let usual = Limits::of(Duration::from_secs(30));
        assert_eq!((usual.ready, usual.finish), (Duration::from_secs(30), Duration::from_secs(60)));
        assert_eq!((usual.lease, usual.keep_alive), (Duration::from_secs(8), Duration::from_secs(5)));
    }
}
