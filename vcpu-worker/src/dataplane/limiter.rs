//! A bandwidth limit shared by all connections of a migration.
//!
//! Token bucket in its "next free instant" form: each send books the time its bytes take at the limit, behind what
//! was booked before, and waits until its turn. Idle time is credited up to [`BURST`] only, so that after a pause the
//! rate over any second stays within the burst's share (1 %) of the limit.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::cancel::CancelFlag;

/// Idle time that may be caught up.
const BURST: Duration = Duration::from_millis(10);

/// See the module.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// 0: no limit.
    bytes_per_second: u64,
    next_free: Mutex<Instant>,
}

impl Limiter {
    pub(crate) fn new(bytes_per_second: u64) -> Self {
        Self { bytes_per_second, next_free: Mutex::new(Instant::now()) }
    }

    /// Most bytes that one send should have, so that it takes no longer than 20 ms at the limit; at least a page.
    pub(crate) fn chunk_bytes(&self, otherwise: u64) -> u64 {
        if self.bytes_per_second == 0 {
            otherwise
        } else {
            (self.bytes_per_second / 50).clamp(4096, otherwise)
        }
    }

    /// Books `bytes` and returns when they may be sent.
    fn book(&self, bytes: u64, now: Instant) -> Instant {
        let cost = u128::from(bytes) * 1_000_000_000 / u128::from(self.bytes_per_second.max(1));
        let cost = Duration::from_nanos(u64::try_from(cost).unwrap_or(u64::MAX / 4));
        let mut next_free = self.next_free.lock();
        let start = (*next_free).max(now.checked_sub(BURST).unwrap_or(now));
        *next_free = start + cost;
        start
    }

    /// Books `bytes` that have gone already; those that come wait the longer.
    pub(crate) fn charge(&self, bytes: u64) {
        if self.bytes_per_second != 0 {
            self.book(bytes, Instant::now());
        }
    }

    /// Waits for the turn of `bytes`; returns whether it was cancelled meanwhile.
    pub(crate) fn acquire(&self, bytes: u64, cancel: &CancelFlag) -> bool {
        if self.bytes_per_second == 0 {
            return cancel.is_cancelled();
        }
        let now = Instant::now();
        let turn = self.book(bytes, now);
        if turn > now { cancel.wait(turn - now) } else { cancel.is_cancelled() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn books_exactly_the_rate() {
        let limiter = Limiter::new(100 << 20);
        let start = Instant::now();
        let mut last = start;
        for _ in 0..1000 {
            last = limiter.book(1 << 20, start);
        }
        let seconds = last.saturating_duration_since(start).as_secs_f64();
        assert!((9.97..=10.0).contains(&seconds), "1000 MiB at 100 MiB/s booked in {seconds} s");
    }

    /// On a clock of our own: over any second, whatever the pieces and pauses, at most 5 % above the limit, and with
    /// always something to send at most 5 % below.
    #[test]
    fn any_second_is_within_five_percent() {
        let second = Duration::from_secs(1);
        for limit in [1u64 << 20, 32 << 20, 1 << 30] {
            let limiter = Limiter::new(limit);
            let begin = Instant::now();
            let (mut now, mut sent) = (begin, Vec::new());
            let mut random = 0x9e37_79b9_u64;
            while now < begin + 8 * second {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                let bytes = 1 + random % limiter.chunk_bytes(256 << 10);
                // In the last four seconds there are pauses; a send is as late as its turn.
                if now > begin + 4 * second && random.is_multiple_of(50) {
                    now += Duration::from_millis(random % 90);
                }
                now = now.max(limiter.book(bytes, now));
                sent.push((now - begin, bytes));
            }
            let within = |from: Duration| -> u64 {
                let window = sent.iter().filter(|(at, _)| *at >= from && *at < from + second);
                window.map(|(_, bytes)| bytes).sum()
            };
            for tenth in 0..70u32 {
                let from = second * tenth / 10;
                let bytes = within(from);
                assert!(bytes <= limit + limit / 20, "{limit}: {bytes} in the second from {from:?}");
                let busy = from + second <= 4 * second;
                assert!(!busy || bytes >= limit - limit / 20, "{limit}: {bytes} in the second from {from:?}");
            }
        }
    }

    #[test]
    fn idle_time_is_not_saved_up() {
        let limiter = Limiter::new(1 << 20);
        let later = Instant::now() + Duration::from_secs(60);
        let first = limiter.book(1 << 20, later);
        let second = limiter.book(1 << 20, later);
        assert!(first <= later && second >= later + Duration::from_millis(980));
    }

    #[test]
    fn zero_is_no_limit_and_cancel_ends_a_wait() {
        let cancel = CancelFlag::new();
        assert!(!Limiter::new(0).acquire(u64::MAX, &cancel));
        let slow = Limiter::new(1);
        assert!(!slow.acquire(1_000_000, &cancel));
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| slow.acquire(1, &cancel));
            cancel.cancel();
            assert!(waiting.join().expect("no panic"));
        });
    }
}
