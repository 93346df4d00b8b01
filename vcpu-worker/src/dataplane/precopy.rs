//! When to stop copying a running guest: pure arithmetic over what the rounds did.
//!
//! ```text
//! after each live round:
//!   fixed costs alone above the goal ------------------------------> GiveUp(FixedCost)
//!   nothing dirty, or prediction within the goal and no cheap gain --> Converged
//!   prediction within the goal, another round gains cheaply --------> NextRound { voluntary }
//!   prediction above the goal, time and rounds left -----------------> NextRound
//!   prediction above the goal, else --------------------------------> GiveUp(Duration | Rounds)
//! ```
//!
//! Prediction: `blackout = fixed + remaining / rate`, with the rate of the last rounds, in which the guest competed
//! for the machine; the stopped guest does not, so the prediction leans to the safe side.
//!
//! A peer that stops as soon as the prediction fits spends whatever blackout it is allowed (baseline: QEMU). One more
//! round costs the bytes that the guest dirties during it, and shortens the blackout by the same factor; so it is
//! taken while the dirty set shrinks materially and the extra bytes stay within a small share of all bytes. A guest
//! that dirties as fast as we send gains nothing by it, and is stopped at once if the goal allows, else copied on until
//! `max_duration`.

use std::time::Duration;

#[cfg(test)]
mod tests;
pub mod throttle;

use super::frame::PAGE_BYTES;

/// A transfer this short is not worth another round.
const COMFORT: Duration = Duration::from_millis(1);
/// A voluntary round must be expected to shrink the dirty set to this many hundredths.
const MATERIAL_PERCENT: u64 = 70;
/// Most voluntary rounds in a row: geometric shrinking is done by then.
const MAX_VOLUNTARY: u32 = 8;
/// Rounds over which the send rate is measured.
const RATE_ROUNDS: usize = 3;
/// Below this many bytes a rate says more about fixed costs than about the network.
const RATE_MIN_BYTES: u64 = 64 << 10;
/// Rounds in a row without shrinking after which a guest counts as not converging.
const STALL_ROUNDS: u32 = 3;
/// No migration copies for more rounds than this, whatever it is allowed.
pub const MAX_ROUNDS: u32 = 10_000;

/// What the operator wants, and what stopping costs besides the pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Goals {
    /// Longest predicted blackout at which the guest may be stopped.
    pub max_blackout: Duration,
    /// Give up copying after this.
    pub max_duration: Option<Duration>,
    /// Estimate of what stopping, saving, persisting, restoring and resuming take together.
    pub fixed: Duration,
    /// Most bytes, in percent of all, spent on shortening a blackout that is within the goal already.
    pub extra_bytes_percent: u32,
}

impl Goals {
    /// With 12 % extra bytes.
    pub fn new(max_blackout: Duration, max_duration: Option<Duration>, fixed: Duration) -> Self {
        Self { max_blackout, max_duration, fixed, extra_bytes_percent: 12 }
    }
}

/// One live round.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Round {
    /// Bytes on the wire.
    pub bytes_sent: u64,
    /// Start to acknowledgement.
    pub elapsed: Duration,
    /// Pages that the dirty log held at the end: what the next round would send.
    pub dirty_pages: u64,
}

/// What the numbers say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Prediction {
    /// Blackout if the guest stopped now; None while no rate is known.
    pub blackout: Option<Duration>,
    /// Measured send rate, bytes a second; 0 while unknown.
    pub bytes_per_second: u64,
    /// Measured dirtying in the last round, bytes a second.
    pub dirty_bytes_per_second: u64,
    /// Bytes dirty now.
    pub remaining_bytes: u64,
}

/// Why copying cannot succeed within the goals.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GiveUp {
    /// What stopping costs besides pages is above the goal already.
    FixedCost,
    /// `max_duration` is over and the prediction is above the goal.
    Duration,
    /// [`MAX_ROUNDS`] are over and the prediction is above the goal.
    Rounds,
}

impl GiveUp {
    /// Stable code.
    pub fn reason(self) -> &'static str {
        match self {
            Self::FixedCost => "PRECOPY_FIXED_COST",
            Self::Duration => "PRECOPY_MAX_DURATION",
            Self::Rounds => "PRECOPY_MAX_ROUNDS",
        }
    }
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Copy what is dirty once more.
    NextRound {
        /// The goal is met already; this round only shortens the blackout.
        voluntary: bool,
    },
    /// Stop the guest now.
    Converged,
    /// The goals cannot be met.
    GiveUp(GiveUp),
}

/// A decision with its grounds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verdict {
    /// What to do.
    pub decision: Decision,
    /// What it rests on.
    pub prediction: Prediction,
    /// The guest dirties as fast as we send, for several rounds now.
    pub stalled: bool,
    /// For people.
    pub why: String,
}

/// The policy of one migration and what it remembers.
#[derive(Debug, Clone)]
pub struct Policy {
    goals: Goals,
    /// The last rounds, oldest first.
    recent: Vec<Round>,
    rounds: u32,
    all_bytes: u64,
    all_elapsed: Duration,
    voluntary_rounds: u32,
    voluntary_bytes: u64,
    not_shrinking: u32,
}

fn bytes_per_second(bytes: u64, elapsed: Duration) -> u64 {
    let nanos = elapsed.as_nanos().max(1);
    u64::try_from(u128::from(bytes) * 1_000_000_000 / nanos).unwrap_or(u64::MAX)
}

fn time_for(bytes: u64, rate: u64) -> Option<Duration> {
    if bytes == 0 {
        return Some(Duration::ZERO);
    }
    let nanos = (u128::from(bytes) * 1_000_000_000).checked_div(rate.into())?;
    Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
}

impl Policy {
    /// Before the first round.
    pub fn new(goals: Goals) -> Self {
        Self {
            goals,
            recent: Vec::with_capacity(RATE_ROUNDS + 1),
            rounds: 0,
            all_bytes: 0,
            all_elapsed: Duration::ZERO,
            voluntary_rounds: 0,
            voluntary_bytes: 0,
            not_shrinking: 0,
        }
    }

    /// Bytes spent so far on shortening a blackout that was within the goal.
    pub fn voluntary_bytes(&self) -> u64 {
        self.voluntary_bytes
    }

    /// Takes in a round and decides. `elapsed_total` is since the migration began.
    pub fn step(&mut self, round: Round, elapsed_total: Duration) -> Verdict {
        let before = self.recent.last().map(|last| last.dirty_pages);
        self.rounds = self.rounds.saturating_add(1);
        self.all_bytes = self.all_bytes.saturating_add(round.bytes_sent);
        self.all_elapsed = self.all_elapsed.saturating_add(round.elapsed);
        let shrank =
            before.is_none_or(|before| u128::from(round.dirty_pages) * 100 < u128::from(before) * 95);
        self.not_shrinking = if shrank { 0 } else { self.not_shrinking.saturating_add(1) };
        if self.recent.len() == RATE_ROUNDS {
            self.recent.remove(0);
        }
        self.recent.push(round);

        let prediction = self.predict();
        let (decision, why) = self.decide(&prediction, &round, elapsed_total);
        match decision {
            Decision::NextRound { voluntary: true } => {
                self.voluntary_rounds = self.voluntary_rounds.saturating_add(1);
                self.voluntary_bytes =
                    self.voluntary_bytes.saturating_add(expected_dirty(&prediction).unwrap_or(0));
            }
            _ => self.voluntary_rounds = 0,
        }
        Verdict { decision, prediction, stalled: self.not_shrinking >= STALL_ROUNDS, why }
    }

    /// The prediction after the last round.
    pub fn predict(&self) -> Prediction {
        let (bytes, elapsed) = self.recent.iter().fold((0u64, Duration::ZERO), |(bytes, elapsed), round| {
            (bytes.saturating_add(round.bytes_sent), elapsed.saturating_add(round.elapsed))
        });
        // Rounds with hardly a byte say nothing about the rate; then all rounds together are the better guess.
        let rate = if bytes >= RATE_MIN_BYTES {
            bytes_per_second(bytes, elapsed)
        } else {
            bytes_per_second(self.all_bytes, self.all_elapsed)
        };
        let last = self.recent.last().copied().unwrap_or_default();
        let remaining_bytes = last.dirty_pages.saturating_mul(PAGE_BYTES + 8);
        Prediction {
            blackout: time_for(remaining_bytes, rate)
                .map(|transfer| transfer.saturating_add(self.goals.fixed)),
            bytes_per_second: rate,
            dirty_bytes_per_second: bytes_per_second(
                last.dirty_pages.saturating_mul(PAGE_BYTES),
                last.elapsed,
            ),
            remaining_bytes,
        }
    }

    fn decide(&self, prediction: &Prediction, last: &Round, elapsed: Duration) -> (Decision, String) {
        let goal = self.goals.max_blackout;
        let fixed = self.goals.fixed;
        if fixed > goal {
            let why = format!(
                "stopping and restoring alone take {fixed:?}, above max_blackout {goal:?}; raise max_blackout"
            );
            return (Decision::GiveUp(GiveUp::FixedCost), why);
        }
        if last.dirty_pages == 0 {
            return (Decision::Converged, format!("nothing is dirty; predicted blackout {fixed:?}"));
        }
        let out_of_time = self.goals.max_duration.is_some_and(|most| elapsed >= most);
        let out_of_rounds = self.rounds >= MAX_ROUNDS;
        let pages = last.dirty_pages;
        match prediction.blackout {
            Some(blackout) if blackout <= goal => {
                let over = out_of_time || out_of_rounds;
                if !over && let Some(expected) = self.worth_another(prediction) {
                    let after = expected / (PAGE_BYTES + 8);
                    let why = format!(
                        "predicted blackout {blackout:?} is within {goal:?}; {pages} pages are dirty, another round leaves about {after}"
                    );
                    return (Decision::NextRound { voluntary: true }, why);
                }
                let why =
                    format!("predicted blackout {blackout:?} is within {goal:?} with {pages} dirty pages");
                (Decision::Converged, why)
            }
            blackout => {
                let shown = blackout.map_or_else(|| "unknown".into(), |blackout| format!("{blackout:?}"));
                let rates = format!(
                    "sending {} MB/s, dirtying {} MB/s",
                    prediction.bytes_per_second / 1_000_000,
                    prediction.dirty_bytes_per_second / 1_000_000
                );
                let why = |tail: &str| {
                    format!(
                        "predicted blackout {shown} is above max_blackout {goal:?} ({pages} dirty pages, {rates}); {tail}"
                    )
                };
                if out_of_time {
                    let tail = "max_duration is over: raise one of them, or allow more bandwidth";
                    (Decision::GiveUp(GiveUp::Duration), why(tail))
                } else if out_of_rounds {
                    (Decision::GiveUp(GiveUp::Rounds), why("the bound on rounds is reached"))
                } else if self.not_shrinking >= STALL_ROUNDS {
                    (Decision::NextRound { voluntary: false }, why("the guest dirties as fast as we send"))
                } else {
                    (Decision::NextRound { voluntary: false }, why("copying on"))
                }
            }
        }
    }

    /// Whether what is dirty takes so long to send that one more live round pays even now.
    pub fn is_worth_a_round(&self, dirty_pages: u64) -> bool {
        let rate = self.predict().bytes_per_second;
        time_for(dirty_pages.saturating_mul(PAGE_BYTES), rate).is_none_or(|time| time > COMFORT)
    }

    /// Bytes that would be left after a voluntary round, if it is worth its bytes.
    fn worth_another(&self, prediction: &Prediction) -> Option<u64> {
        let transfer = time_for(prediction.remaining_bytes, prediction.bytes_per_second)?;
        let expected = expected_dirty(prediction)?;
        let budget = u128::from(self.all_bytes.saturating_add(prediction.remaining_bytes))
            * u128::from(self.goals.extra_bytes_percent)
            / 100;
        let worth = transfer > COMFORT
            && u128::from(expected) * 100
                <= u128::from(prediction.remaining_bytes) * u128::from(MATERIAL_PERCENT)
            && u128::from(self.voluntary_bytes) + u128::from(expected) <= budget
            && self.voluntary_rounds < MAX_VOLUNTARY;
        worth.then_some(expected)
    }
}

/// Bytes that the guest dirties while what is dirty now is sent. Never more than is dirty now: the pages of a working
/// set are dirtied again and again, and count once.
fn expected_dirty(prediction: &Prediction) -> Option<u64> {
    let transfer = time_for(prediction.remaining_bytes, prediction.bytes_per_second)?;
    let bytes = u128::from(prediction.dirty_bytes_per_second) * transfer.as_nanos() / 1_000_000_000;
    Some(u64::try_from(bytes).unwrap_or(u64::MAX).min(prediction.remaining_bytes))
}
