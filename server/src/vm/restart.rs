//! When a machine that ended by itself is started again: pure.
//!
//! ```text
//!            end that the policy answers             due, no migration, owned here
//!   idle ───────────────────────────────▶ waiting ──────────────────────────────────▶ idle, count + 1
//!    ▲                                       │                                            │ the start fails
//!    └────── a user starts, stops, moves ────┘◀───────────────────────────────────────────┘
//! ```
//! The waits double from [`FIRST`] to [`MOST`], each a fifth longer or shorter by chance, so that machines that fell
//! together do not rise together. A machine that has run for [`HEALTHY`] begins anew. What is remembered is in the
//! machine's record, so that it outlives the daemon.

use vpmu_proto::api::virtual_machine_spec::RestartPolicy;

/// The first wait, ms.
pub const FIRST: u64 = 500;
/// The longest wait before chance, ms.
pub const MOST: u64 = 300_000;
/// A run this long makes the next wait the first again, ms.
pub const HEALTHY: u64 = 60_000;
/// Chance, in thousandths: up to this much longer or shorter.
const JITTER: u64 = 200;

/// What is remembered between ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Memory {
    /// Starts by the policy since a user's.
    pub count: u32,
    /// Waits that were doubled: those of the present row of failures.
    pub row: u32,
    /// When it is started, ms of wall clock; none if it is not.
    pub next: Option<u64>,
    /// When its last run began, ms of wall clock; none if that failed or is not known.
    pub began: Option<u64>,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It ended, or a start by the policy failed. `failed`: by a fault of guest, worker or host. `wanted`: the user wants
    /// it to run. `chance`: anything, for the jitter.
    Ended {
        /// By a fault.
        failed: bool,
        /// The user wants it to run.
        wanted: bool,
        /// Wall clock, ms.
        now: u64,
        /// A random number.
        chance: u64,
    },
    /// A start by the policy begins.
    Begun,
    /// It runs.
    Running {
        /// Wall clock, ms.
        now: u64,
    },
    /// A user has started, stopped or moved it, or it came from another host.
    ByUser,
}

/// The step.
pub fn step(policy: RestartPolicy, memory: Memory, event: Event) -> Memory {
    match event {
        Event::ByUser => Memory::default(),
        Event::Begun => Memory { count: memory.count.saturating_add(1), next: None, began: None, ..memory },
        Event::Running { now } => Memory { next: None, began: Some(now), ..memory },
        Event::Ended { failed, wanted, now, chance } => {
            let answers = match policy {
                RestartPolicy::Always => true,
                RestartPolicy::OnFailure => failed,
                RestartPolicy::Never | RestartPolicy::Unspecified => false,
            };
            if !answers || !wanted {
                return Memory { next: None, began: None, ..memory };
            }
            let healthy = memory.began.is_some_and(|began| now.saturating_sub(began) >= HEALTHY);
            let row = if healthy { 0 } else { memory.row };
            let next = Some(now.saturating_add(wait(row, chance)));
            Memory { row: row.saturating_add(1), next, began: None, ..memory }
        }
    }
}

/// The wait after `row` earlier failures in a row, ms.
fn wait(row: u32, chance: u64) -> u64 {
    let plain = FIRST.saturating_mul(1 << row.min(20)).min(MOST);
    let thousandths = 1000 - JITTER + chance % (2 * JITTER + 1);
    plain * thousandths / 1000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POLICIES: [RestartPolicy; 4] =
        [RestartPolicy::Unspecified, RestartPolicy::Never, RestartPolicy::OnFailure, RestartPolicy::Always];

    fn ended(failed: bool, now: u64) -> Event {
        Event::Ended { failed, wanted: true, now, chance: JITTER }
    }

    #[test]
    fn waits_double_up_to_a_bound_and_begin_anew_after_a_healthy_run() {
        let mut memory = Memory::default();
        let mut waits = Vec::new();
        for _ in 0..12 {
            memory = step(RestartPolicy::OnFailure, memory, ended(true, 1000));
            waits.push(memory.next.unwrap() - 1000);
            memory = step(RestartPolicy::OnFailure, memory, Event::Begun);
            memory = step(RestartPolicy::OnFailure, memory, Event::Running { now: 1000 });
        }
        assert_eq!(waits[..4], [500, 1000, 2000, 4000]);
        assert_eq!(waits[11], MOST);
        assert_eq!(memory.count, 12);
        let memory = step(RestartPolicy::OnFailure, memory, ended(true, 1000 + HEALTHY));
        assert_eq!(memory.next, Some(1000 + HEALTHY + FIRST));
    }

    #[test]
    fn each_policy_answers_its_ends() {
        for (policy, shutdown, failure) in [
            (RestartPolicy::Unspecified, false, false),
            (RestartPolicy::Never, false, false),
            (RestartPolicy::OnFailure, false, true),
            (RestartPolicy::Always, true, true),
        ] {
            let next = |failed| step(policy, Memory::default(), ended(failed, 0)).next.is_some();
            assert_eq!((next(false), next(true)), (shutdown, failure), "{policy:?}");
        }
    }

    fn events() -> impl Strategy<Value = Event> {
        prop_oneof![
            (any::<bool>(), any::<bool>(), any::<u64>(), any::<u64>())
                .prop_map(|(failed, wanted, now, chance)| Event::Ended { failed, wanted, now, chance }),
            Just(Event::Begun),
            any::<u64>().prop_map(|now| Event::Running { now }),
            Just(Event::ByUser),
        ]
    }

    proptest! {
        /// Whatever happens: nothing is due that the policy or the user does not want, every wait is bounded, and a
        /// user's word wipes the slate.
        #[test]
        fn nothing_is_due_unasked(policy in 0usize..4, history in prop::collection::vec(events(), 0..64)) {
            let policy = POLICIES[policy];
            let mut memory = Memory::default();
            for event in history {
                let before = memory;
                memory = step(policy, memory, event);
                match event {
                    Event::Ended { failed, wanted, now, .. } => {
                        let due = wanted && (policy == RestartPolicy::Always || policy == RestartPolicy::OnFailure && failed);
                        prop_assert_eq!(memory.next.is_some(), due);
                        if let Some(next) = memory.next.filter(|next| *next < u64::MAX) {
                            let wait = next - now;
                            prop_assert!((FIRST * 4 / 5..=MOST * 6 / 5).contains(&wait), "{}", wait);
                        }
                        prop_assert_eq!(memory.count, before.count);
                    }
                    Event::Begun => prop_assert_eq!(memory.count, before.count.saturating_add(1)),
                    Event::Running { .. } => prop_assert_eq!(memory.next, None),
                    Event::ByUser => prop_assert_eq!(memory, Memory::default()),
                }
                if matches!(policy, RestartPolicy::Never | RestartPolicy::Unspecified) {
                    prop_assert_eq!(memory.next, None);
                }
            }
        }

        /// In a row of failures no wait is shorter than half of the one before it.
        #[test]
        fn waits_grow(chances in prop::collection::vec(any::<u64>(), 1..30)) {
            let mut memory = Memory::default();
            let mut last = 0;
            for chance in chances {
                let event = Event::Ended { failed: true, wanted: true, now: 0, chance };
                memory = step(RestartPolicy::Always, memory, event);
                let wait = memory.next.unwrap();
                prop_assert!(wait * 3 / 2 >= last, "{} after {}", wait, last);
                last = wait;
            }
        }
    }
}
