//! Slowing a guest down: each vCPU rests for the same share of every period.
//!
//! Somebody ticks ([`crate::machine::throttle`]): a tick and a kick begin a period, and a vCPU that sees a new tick after
//! an exit rests once for it, so that kicks for other reasons cost the guest nothing. Requests are served while it rests.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

/// Time from tick to tick.
pub const PERIOD: Duration = Duration::from_millis(10);
/// No guest is slowed down more than this, in hundredths: it must still see time pass.
pub const MAX_PERCENT: u32 = 95;

/// Shared by a machine's vCPUs.
#[derive(Debug, Default)]
pub struct Throttle {
    percent: AtomicU32,
    tick: AtomicU64,
    rests: AtomicU64,
    rested_us: AtomicU64,
}

impl Throttle {
    /// Share of each period to rest, in hundredths; 0: not at all.
    pub fn percent(&self) -> u32 {
        self.percent.load(Ordering::Acquire)
    }

    /// Sets the share, at most [`MAX_PERCENT`]. 0 ends rests that are under way at their next request, or in time.
    pub fn set_percent(&self, percent: u32) {
        self.percent.store(percent.min(MAX_PERCENT), Ordering::Release);
    }

    /// Begins a period.
    pub fn tick(&self) {
        self.tick.fetch_add(1, Ordering::AcqRel);
    }

    /// How long to rest now; `seen` is the caller's last tick.
    pub fn due(&self, seen: &mut u64) -> Option<Duration> {
        let tick = self.tick.load(Ordering::Acquire);
        let percent = self.percent();
        let fresh = std::mem::replace(seen, tick) != tick;
        (fresh && percent > 0).then(|| PERIOD * percent / 100)
    }

    /// Notes a rest.
    pub fn rested(&self, time: Duration) {
        self.rests.fetch_add(1, Ordering::Relaxed);
        self.rested_us.fetch_add(u64::try_from(time.as_micros()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// Rests of all vCPUs so far.
    pub fn rests(&self) -> u64 {
        self.rests.load(Ordering::Relaxed)
    }

    /// Microseconds that vCPUs have rested, of all vCPUs together.
    pub fn rested_us(&self) -> u64 {
        self.rested_us.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rest_a_tick_and_none_without() {
        let throttle = Throttle::default();
        let mut seen = 0;
        assert_eq!(throttle.due(&mut seen), None);
        throttle.set_percent(50);
        assert_eq!(throttle.due(&mut seen), None, "no tick yet");
        throttle.tick();
        throttle.tick();
        assert_eq!(throttle.due(&mut seen), Some(PERIOD / 2));
        assert_eq!(throttle.due(&mut seen), None, "once for a tick");
        throttle.set_percent(1000);
        throttle.tick();
        assert_eq!(throttle.due(&mut seen), Some(PERIOD * 95 / 100));
        throttle.set_percent(0);
        throttle.tick();
        assert_eq!(throttle.due(&mut seen), None);
        throttle.set_percent(50);
        assert_eq!(throttle.due(&mut seen), None, "a tick of the time before is over");
    }
}
