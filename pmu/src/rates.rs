//! Events and the configured rates they come at when no real PMU counts them.
//!
//! The model advances only by the [`Events`] it is fed. In `model` mode a vCPU thread turns the CPU time it spent inside the guest into
//! events with a [`RateClock`]: integers only, the remainder kept, so that any way of cutting the same time into slices yields the same
//! total (no drift, no rounding that depends on how often the guest exits).

/// How many of each event happened. Counts, not rates; the unit of every field is one event.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Events {
    /// Core cycles (Intel 3C/00 and fixed 1, AMD 76/00).
    pub cycles: u64,
    /// Retired instructions (C0/00 of both vendors, Intel fixed 0).
    pub instructions: u64,
    /// Reference cycles (Intel 3C/01 and fixed 2).
    pub ref_cycles: u64,
    /// Top-down slots (Intel fixed 3, and A4/01 in a model with extended events).
    pub slots: u64,
    /// Retired branches (Intel C4/00, AMD C2/00; only in a model with extended events).
    pub branches: u64,
}

impl Events {
    /// No event at all.
    pub const ZERO: Self = Self { cycles: 0, instructions: 0, ref_cycles: 0, slots: 0, branches: 0 };

    /// Whether nothing happened.
    #[must_use]
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// The sum, field by field, saturating at `u64::MAX`.
    #[must_use]
    pub fn saturating_add(&self, other: &Self) -> Self {
        Self {
            cycles: self.cycles.saturating_add(other.cycles),
            instructions: self.instructions.saturating_add(other.instructions),
            ref_cycles: self.ref_cycles.saturating_add(other.ref_cycles),
            slots: self.slots.saturating_add(other.slots),
            branches: self.branches.saturating_add(other.branches),
        }
    }
}

/// Events per second of guest CPU time. Any `u64` is valid; 0 means that the event never happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rates {
    /// Core cycles a second, hertz.
    pub cycles: u64,
    /// Retired instructions a second.
    pub instructions: u64,
    /// Reference cycles a second, hertz.
    pub ref_cycles: u64,
    /// Top-down slots a second.
    pub slots: u64,
    /// Retired branches a second.
    pub branches: u64,
}

impl Default for Rates {
    /// A 2.4 GHz core that retires 4 of 3 instructions a cycle, 4 slots wide, with one branch in eight instructions.
    fn default() -> Self {
        Self {
            cycles: 2_400_000_000,
            instructions: 3_200_000_000,
            ref_cycles: 2_400_000_000,
            slots: 9_600_000_000,
            branches: 400_000_000,
        }
    }
}

const NANOSECONDS: u128 = 1_000_000_000;

/// Turns CPU time into events without losing the fraction of an event between two calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateClock {
    rates: Rates,
    /// Nano-events still owed, each below 10^9, in the order of [`Events`]' fields.
    owed: [u128; 5],
}

impl RateClock {
    /// A clock at these rates that owes nothing yet.
    #[must_use]
    pub fn new(rates: Rates) -> Self {
        Self { rates, owed: [0; 5] }
    }

    /// The rates this clock runs at.
    #[must_use]
    pub fn rates(&self) -> &Rates {
        &self.rates
    }

    /// The events of the next `cpu_ns` nanoseconds. The sum over any split of a time equals the events of the whole time, as long as no
    /// single count exceeds `u64::MAX` (it saturates there: more than 58 years at 10 GHz).
    pub fn advance(&mut self, cpu_ns: u64) -> Events {
        let [cycles, instructions, ref_cycles, slots, branches] = &mut self.owed;
        Events {
            cycles: step(self.rates.cycles, cpu_ns, cycles),
            instructions: step(self.rates.instructions, cpu_ns, instructions),
            ref_cycles: step(self.rates.ref_cycles, cpu_ns, ref_cycles),
            slots: step(self.rates.slots, cpu_ns, slots),
            branches: step(self.rates.branches, cpu_ns, branches),
        }
    }
}

/// One event's share. Cannot overflow: (2^64 - 1)^2 + 10^9 < 2^128.
fn step(rate: u64, cpu_ns: u64, owed: &mut u128) -> u64 {
    let total = u128::from(rate) * u128::from(cpu_ns) + *owed;
    *owed = total % NANOSECONDS;
    u64::try_from(total / NANOSECONDS).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sum(clock: &mut RateClock, slices: &[u64]) -> Events {
        slices.iter().fold(Events::ZERO, |all, ns| all.saturating_add(&clock.advance(*ns)))
    }

    #[test]
    fn one_second_is_the_rate() {
        let rates = Rates::default();
        let events = RateClock::new(rates).advance(1_000_000_000);
        assert_eq!(events.cycles, rates.cycles);
        assert_eq!(events.instructions, rates.instructions);
        assert_eq!(events.ref_cycles, rates.ref_cycles);
        assert_eq!(events.slots, rates.slots);
        assert_eq!(events.branches, rates.branches);
    }

    #[test]
    fn a_slow_event_appears_once_its_fractions_add_up() {
        let mut clock = RateClock::new(Rates { cycles: 3, ..Rates::default() });
        let counts: Vec<u64> = (0..10).map(|_| clock.advance(100_000_000).cycles).collect();
        assert_eq!(counts, [0, 0, 0, 1, 0, 0, 1, 0, 0, 1]);
    }

    #[test]
    fn extremes_saturate_and_do_not_panic() {
        let all = Rates {
            cycles: u64::MAX,
            instructions: u64::MAX,
            ref_cycles: u64::MAX,
            slots: u64::MAX,
            branches: u64::MAX,
        };
        let mut clock = RateClock::new(all);
        assert_eq!(clock.advance(u64::MAX).cycles, u64::MAX);
        assert_eq!(clock.advance(0), Events::ZERO);
        assert_eq!(RateClock::new(Rates { cycles: 0, ..all }).advance(u64::MAX).cycles, 0);
    }

    proptest! {
        #[test]
        fn any_split_of_a_time_gives_the_same_total(
            cycles in any::<u32>(), instructions in any::<u32>(), slots in 0u64..20_000_000_000,
            slices in proptest::collection::vec(0u64..5_000_000_000, 1..40),
        ) {
            let rates = Rates { cycles: cycles.into(), instructions: instructions.into(), slots, ..Rates::default() };
            let whole = RateClock::new(rates).advance(slices.iter().sum());
            prop_assert_eq!(sum(&mut RateClock::new(rates), &slices), whole);
            let expected = u128::from(cycles) * u128::from(slices.iter().sum::<u64>()) / NANOSECONDS;
            prop_assert_eq!(u128::from(whole.cycles), expected);
        }
    }
}
