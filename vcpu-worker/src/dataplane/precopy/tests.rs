use proptest::prelude::*;

use super::*;

const MS: Duration = Duration::from_millis(1);

/// A guest that writes `dirty_rate` bytes a second evenly over a working set, and a network.
#[derive(Debug, Clone)]
struct World {
    memory_pages: u64,
    working_set_pages: u64,
    dirty_rate: u64,
    send_rate: u64,
    overhead: Duration,
}

#[derive(Debug)]
struct End {
    decision: Decision,
    prediction: Prediction,
    rounds: u32,
    /// With the final round.
    bytes: u64,
    elapsed: Duration,
    voluntary_bytes: u64,
}

impl World {
    fn dirtied(&self, time: Duration) -> u64 {
        let bytes = u128::from(self.dirty_rate) * time.as_nanos() / 1_000_000_000;
        u64::try_from(bytes / u128::from(PAGE_BYTES)).unwrap_or(u64::MAX).min(self.working_set_pages)
    }

    fn run(&self, goals: Goals) -> End {
        let mut policy = Policy::new(goals);
        let mut to_send = self.memory_pages;
        let (mut bytes, mut elapsed, mut rounds) = (0, Duration::ZERO, 0);
        loop {
            let sent = to_send * (PAGE_BYTES + 8);
            let took = time_for(sent, self.send_rate).expect("a rate") + self.overhead;
            to_send = self.dirtied(took);
            bytes += sent;
            elapsed += took;
            rounds += 1;
            let round = Round { bytes_sent: sent, elapsed: took, dirty_pages: to_send };
            let verdict = policy.step(round, elapsed);
            assert!(!verdict.why.is_empty());
            assert!(rounds <= MAX_ROUNDS, "it ends");
            if !matches!(verdict.decision, Decision::NextRound { .. }) {
                return End {
                    decision: verdict.decision,
                    prediction: verdict.prediction,
                    rounds,
                    bytes: bytes + to_send * (PAGE_BYTES + 8),
                    elapsed,
                    voluntary_bytes: policy.voluntary_bytes(),
                };
            }
        }
    }
}

fn goals(blackout_ms: u64) -> Goals {
    Goals::new(MS * blackout_ms as u32, Some(Duration::from_secs(10)), MS * 2)
}

/// 64 MiB of working set in 256 MiB, of which only that is not zero; 1.5 GB/s.
fn baseline(dirty_rate: u64) -> World {
    World {
        memory_pages: 16384,
        working_set_pages: 16384,
        dirty_rate,
        send_rate: 1_500_000_000,
        overhead: MS / 10,
    }
}

#[test]
fn idle_guest_stops_after_one_round() {
    let end = baseline(0).run(goals(300));
    assert_eq!((end.decision, end.rounds), (Decision::Converged, 1));
}

#[test]
fn slow_writer_is_stopped_within_a_few_milliseconds_although_300_are_allowed() {
    let end = baseline(100_000_000).run(goals(300));
    assert_eq!(end.decision, Decision::Converged);
    assert!(end.prediction.blackout.expect("known") <= MS * 4, "{end:?}");
    assert!(end.rounds <= 4 && end.bytes < 67_300_000 * 109 / 100, "{end:?}");
}

#[test]
fn fast_writer_is_worth_a_few_rounds_and_not_more_bytes() {
    let end = baseline(500_000_000).run(goals(300));
    assert_eq!(end.decision, Decision::Converged);
    assert!(end.prediction.blackout.expect("known") <= MS * 5, "{end:?}");
    assert!(end.rounds <= 6 && end.bytes <= 101_000_000, "QEMU moves 101 MB here: {end:?}");
}

#[test]
fn hopeless_writer_is_stopped_at_once_if_the_goal_allows() {
    let end = baseline(4_000_000_000).run(goals(300));
    assert_eq!((end.decision, end.rounds), (Decision::Converged, 1), "{end:?}");
}

#[test]
fn hopeless_writer_and_a_tight_goal_end_at_max_duration() {
    let end = baseline(4_000_000_000).run(goals(20));
    assert_eq!(end.decision, Decision::GiveUp(GiveUp::Duration));
    assert!(end.elapsed >= Duration::from_secs(10) && end.elapsed < Duration::from_secs(11));
    let without = Goals { max_duration: None, ..goals(20) };
    assert_eq!(baseline(4_000_000_000).run(without).decision, Decision::GiveUp(GiveUp::Rounds));
}

#[test]
fn stall_is_named() {
    let mut policy = Policy::new(goals(5));
    let round = Round { bytes_sent: 64 << 20, elapsed: MS * 50, dirty_pages: 16384 };
    let verdicts: Vec<_> = (1..=6).map(|n| policy.step(round, MS * 50 * n)).collect();
    assert!(!verdicts[0].stalled && verdicts[5].stalled);
    assert!(verdicts[5].why.contains("as fast as we send"), "{}", verdicts[5].why);
    assert_eq!(verdicts[5].decision, Decision::NextRound { voluntary: false });
}

#[test]
fn fixed_costs_above_the_goal_are_refused_with_the_remedy() {
    let mut policy = Policy::new(Goals::new(MS, None, MS * 2));
    let verdict = policy.step(Round { bytes_sent: 1, elapsed: MS, dirty_pages: 1 }, MS);
    assert_eq!(verdict.decision, Decision::GiveUp(GiveUp::FixedCost));
    assert!(verdict.why.contains("raise max_blackout"));
}

proptest! {
    #[test]
    fn ends_and_never_stops_above_the_goal(
        memory_pages in 1u64..1 << 22,
        share in 0u64..=100,
        dirty_rate in 0u64..20_000_000_000,
        send_rate in 1_000_000u64..20_000_000_000,
        overhead_us in 1u64..50_000,
        blackout_us in 0u64..500_000,
        fixed_us in 0u64..20_000,
        duration_ms in proptest::option::of(1u64..100_000),
        extra in 0u32..50,
    ) {
        let world = World {
            memory_pages,
            working_set_pages: memory_pages * share / 100,
            dirty_rate,
            send_rate,
            overhead: Duration::from_micros(overhead_us),
        };
        let goals = Goals {
            max_blackout: Duration::from_micros(blackout_us),
            max_duration: duration_ms.map(Duration::from_millis),
            fixed: Duration::from_micros(fixed_us),
            extra_bytes_percent: extra,
        };
        let end = world.run(goals);
        match end.decision {
            Decision::Converged => prop_assert!(end.prediction.blackout.expect("known") <= goals.max_blackout),
            Decision::GiveUp(GiveUp::FixedCost) => prop_assert!(goals.fixed > goals.max_blackout),
            Decision::GiveUp(GiveUp::Duration) => {
                prop_assert!(end.elapsed >= goals.max_duration.expect("one was set"));
                prop_assert!(end.prediction.blackout.is_none_or(|blackout| blackout > goals.max_blackout));
            }
            Decision::GiveUp(GiveUp::Rounds) => prop_assert_eq!(end.rounds, MAX_ROUNDS),
            Decision::NextRound { .. } => prop_assert!(false, "not an end"),
        }
        prop_assert!(u128::from(end.voluntary_bytes) * 100 <= u128::from(end.bytes) * u128::from(extra));
    }

    /// Whatever the clocks and counters claim, there is an answer and no overflow.
    #[test]
    fn any_numbers_are_digested(
        rounds in proptest::collection::vec((any::<u64>(), any::<u64>(), any::<u64>()), 1..20),
        elapsed in any::<u64>(),
    ) {
        let mut policy = Policy::new(goals(300));
        for (bytes_sent, nanos, dirty_pages) in rounds {
            let round = Round { bytes_sent, elapsed: Duration::from_nanos(nanos), dirty_pages };
            policy.step(round, Duration::from_nanos(elapsed));
        }
    }
}
