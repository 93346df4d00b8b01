//! The source: has the machine, copies it, decides.
//!
//! ```text
//!   Idle ─Begin▶ Opening ─▶ Preparing ─▶ Precopy ─Converged▶ Quiescing ─▶ Stopping ─Sealed and Ready, digests equal─▶ Committing
//!                   │           │           │                    │           │                                         │
//!                   └───────────┴───────────┴──── abort ─────────┴───────────┘                          HandedOver(e+1) durable
//!                                             │                                                                        ▼
//!                                    Aborting: Owned(e+1) durable           Entered and PMU durable ◀────────── HandedOver: Go
//!                                             │                                        │                               │ Returned
//!                                             ▼                                        ▼                               ▼
//!             Over(Aborted) ◀─Granted─ Granting ◀── Owned(e+2) durable ── TakingBack ◀─┼───────────────────────────────┘
//!                                                                              Releasing: worker ended
//!                                                                                      ▼
//!                                                               Over(Moved) ◀─ SavingReleased: Released durable
//!
//!   after Quiesced with a dead worker, or HandedOver without an answer:
//!   ─Forced▶ Forcing: Owned durable ─▶ Granting (the copy is the newest) or Discarding ─▶ Over(Forced, Failed)
//!   a later owner, at e+2 or above: ─▶ Yielding: worker sealed ─▶ SavingSuperseded: Superseded durable ─▶ Over(Superseded)
//!   a commit there of which this journal knows nothing, or a refused HandedOver:
//!   ─▶ Doubting: worker sealed ─▶ SavingUncertain: Uncertain durable ─▶ Over(Uncertain)
//!   after a restart: in Quiesced ─▶ Resolving: the peer is asked ─▶ Aborting, Committing or Doubting;
//!   in HandedOver ─▶ HandedOver: the worker is sealed again, the peer is asked, and neither waits for the other
//! ```
//!
//! Invariants
//! - Go leaves only after `Sealed` (or the worker's proven death), equal digests and a durable HandedOver(e+1).
//! - A grant is given only after a durable Owned record of its epoch.
//! - From `Committing` on nothing aborts: cancel is refused, time-outs and lost peers change nothing.
//! - The worker is ended only after Entered and after its PMU state is durable; after a restart what the destination
//!   has of that state is enough, and the worker's is not stored again.
//! - After a post-copy the worker is ended only when it has served every page (`Drained`): until then nobody has a whole
//!   copy. If it dies before, nothing is left to be kept here, and the destination's guest ends by itself.
//! - A dead worker in `Stopping` makes the destination's copy the last one: then nothing aborts but its word that it has
//!   none.
//!
//! [`Source::step`] has the way to the decision; what else it may come to is in `undecided` (aborts, the stop),
//! `decided` (Go to the end), `overruled` (force, later owners) and `recovered` (a restart). `interface` is what its
//! driver sees, `records` what it writes, `answer` what it says to Resolve.

mod answer;
mod decided;
mod interface;
mod overruled;
mod records;
mod recovered;
mod undecided;

use super::{Digest, Handover, PeerAnswer};
use undecided::abort_cause;
use vpmu_proto::store::ownership_record::Phase;

pub use interface::{Cause, Effect, Event, Outcome};

/// States; the diagram is at the head of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the diagram names them")]
pub enum State {
    Idle,
    Opening {
        abort: Option<Cause>,
    },
    Preparing,
    Precopy,
    Quiescing {
        abort: Option<Cause>,
    },
    Stopping {
        sealed: Option<Digest>,
        ready: Option<Digest>,
        pmu: bool,
        dead: bool,
    },
    Committing {
        digest: Digest,
        pmu: bool,
        dead: bool,
    },
    HandedOver {
        digest: Digest,
        pmu: bool,
        dead: bool,
        entered: bool,
        drained: bool,
    },
    Releasing,
    SavingReleased,
    Aborting {
        cause: Cause,
        dead: bool,
    },
    TakingBack {
        dead: bool,
    },
    Granting {
        epoch: u64,
        outcome: Outcome,
    },
    /// After a restart in Quiesced: the destination is asked first.
    Resolving {
        dead: bool,
    },
    /// The destination is forced out.
    Forcing {
        epoch: u64,
        copy: bool,
        dead: bool,
    },
    /// It is owned here by force, and the copy is stale.
    Discarding {
        epoch: u64,
    },
    /// The worker is sealed before Superseded is written.
    Yielding {
        epoch: u64,
    },
    SavingSuperseded {
        epoch: u64,
    },
    /// The worker is sealed before Uncertain is written.
    Doubting,
    SavingUncertain,
    Over(Outcome),
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Source {
    /// The migration. `peer_store` must be set before [`Event::PrepareAccepted`] is applied.
    pub handover: Handover,
    /// Pages follow after the machine has moved; must be set before [`Event::Sealed`] is applied.
    pub postcopy: bool,
    state: State,
}

type Step = (State, Vec<Effect>);

impl Source {
    /// A migration that has not begun; `handover.epoch` is the machine's epoch.
    pub fn new(handover: Handover) -> Self {
        Self { handover, postcopy: false, state: State::Idle }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The outcome, once it is over.
    pub fn outcome(&self) -> Option<Outcome> {
        if let State::Over(outcome) = self.state { Some(outcome) } else { None }
    }

    /// The worker here has pages that nobody else has, and the destination was given the machine.
    pub fn owes_pages(&self) -> bool {
        self.postcopy
            && matches!(self.state, State::Committing { .. } | State::HandedOver { drained: false, .. })
    }

    /// It runs on the destination, which has yet to get pages from the worker here.
    pub fn is_followed(&self) -> bool {
        self.postcopy
            && matches!(self.state, State::HandedOver { entered: true, dead: false, drained: false, .. })
    }

    /// A cancel would still be heard.
    pub fn can_cancel(&self) -> bool {
        use State as S;
        match self.state {
            S::Idle | S::Opening { .. } | S::Preparing | S::Precopy | S::Quiescing { .. } => true,
            S::Stopping { dead, .. } => !dead,
            _ => false,
        }
    }

    /// Applies an event in place and returns what to do.
    pub fn apply(&mut self, event: Event) -> Vec<Effect> {
        let (state, effects) = self.step(event);
        self.state = state;
        effects
    }

    /// The pure step.
    pub fn step(&self, event: Event) -> (State, Vec<Effect>) {
        use Event as E;
        use State as S;
        if let E::PeerAnswered(PeerAnswer::Superseded(epoch)) = event {
            return self.superseded(epoch);
        }
        if let E::Forced(claim) = event {
            return self.forced(claim);
        }
        if let Some(cause) = abort_cause(event) {
            return self.hear_abort(event, cause);
        }
        match (self.state, event) {
            (S::Idle, E::Begin) => (S::Opening { abort: None }, self.persist(Phase::Open)),
            (S::Opening { .. }, E::PersistRefused) => over(Outcome::NotOpened),
            (S::Opening { abort: None }, E::Persisted(Phase::Open)) => (S::Preparing, vec![Effect::Prepare]),
            (S::Opening { abort: Some(cause) }, E::Persisted(Phase::Open)) => self.late_abort(cause),
            (S::Preparing, E::PrepareAccepted) => (S::Precopy, vec![Effect::StartCopy]),
            (S::Precopy, E::Converged) => (S::Quiescing { abort: None }, self.persist(Phase::Quiesced)),
            (S::Quiescing { abort }, E::PersistRefused) => {
                self.late_abort(abort.unwrap_or(Cause::StoreFailed))
            }
            (S::Quiescing { abort: None }, E::Persisted(Phase::Quiesced)) => (
                S::Stopping { sealed: None, ready: None, pmu: false, dead: false },
                vec![Effect::FinishCopy { epoch: self.handover.epoch }],
            ),
            (S::Quiescing { abort: Some(cause) }, E::Persisted(Phase::Quiesced)) => self.late_abort(cause),
            (S::Stopping { .. }, _) => self.stopping(event),
            (S::Resolving { dead }, E::PeerAnswered(answer)) => self.resolve(dead, answer),
            _ => self.decided(event),
        }
    }
}

fn over(outcome: Outcome) -> Step {
    (State::Over(outcome), vec![Effect::Done(outcome)])
}
