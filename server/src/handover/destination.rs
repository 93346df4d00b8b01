//! The destination: receives a copy, promises to keep it, runs it when the source has committed.
//!
//! ```text
//!   Idle ─Begin▶ Preparing ─Incoming(e) durable▶ Receiving ─WorkerReady▶ Ready ─Go, digest equal▶ Entering
//!                                                   │                     │                         │ Entered(e+1) durable
//!                        Abort, lease over,         │ Abort               │ worker dead             ▼
//!                        source or worker lost      │                     ▼                      Granting
//!                                                   ▼                 CopyLost ─Go▶ Returning       │ Granted
//!                                       Ending: worker ended              │             │           ▼
//!                                                   │                     │ Abort       │       Entered: answered
//!                                                   ▼                     ▼             ▼           │ Released received
//!                                            Dropping: Aborted durable ─▶ Over    Over(Returned)    ▼
//!                                                                                       Owning: Owned(e+1) durable ─▶ Over
//!   Ready, CopyLost ─Forced▶ Forcing: Owned durable ─▶ ForceGranting (the copy is the newest) ─▶ Over(Forced)
//! ```
//!
//! Invariants
//! - The grant is given only after a durable Entered(e+1), which is written only on the source's commit with the digest
//!   that Ready had.
//! - After Ready the copy is dropped only on the source's abort, on a later owner, or when its worker is dead.
//! - It is given back only if no grant was sent and the worker is sealed or dead: before Entered is written, or right
//!   after it, if the worker had died meanwhile.
//!
//! [`Destination::step`] says who is to judge an event: `local` (this host), `told` (the source), `overruled` (force,
//! later owners); `recovered` begins after a restart. `interface` is what its driver sees, `records` what it writes,
//! `answer` what it says to Resolve.

mod answer;
mod interface;
mod local;
mod overruled;
mod records;
mod recovered;
mod told;

use super::{Digest, Handover, PeerAnswer};

pub use interface::{Effect, Event, Outcome};

/// States; the diagram is at the head of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "the diagram names them")]
pub enum State {
    Idle,
    Preparing {
        abort: bool,
    },
    Receiving,
    Ready {
        digest: Digest,
    },
    Entering {
        digest: Digest,
        dead: bool,
    },
    Granting,
    Entered {
        dead: bool,
    },
    Owning {
        dead: bool,
    },
    /// The copy died after Ready, or its condition was lost: the source decides.
    CopyLost,
    /// The worker is sealed before Returned is written.
    Sealing,
    Returning,
    Ending {
        epoch: u64,
    },
    Dropping {
        epoch: u64,
    },
    Yielding {
        epoch: u64,
    },
    SavingSuperseded {
        epoch: u64,
    },
    /// The source is forced out.
    Forcing {
        epoch: u64,
        copy: bool,
    },
    ForceGranting {
        epoch: u64,
    },
    Over(Outcome),
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Destination {
    /// The migration, with the source's epoch.
    pub handover: Handover,
    state: State,
}

type Step = (State, Vec<Effect>);

impl Destination {
    /// A migration that has not begun. `handover.epoch` is the source's epoch.
    pub fn new(handover: Handover) -> Self {
        Self { handover, state: State::Idle }
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The outcome, once it is over.
    pub fn outcome(&self) -> Option<Outcome> {
        if let State::Over(outcome) = self.state { Some(outcome) } else { None }
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
        // Resolve's answers are the messages that were lost.
        let event = match event {
            E::SourceAnswered(PeerAnswer::Superseded(epoch)) => return self.superseded(epoch),
            E::SourceAnswered(PeerAnswer::Committed(digest)) => {
                let own = if let S::Ready { digest } = self.state { Some(digest) } else { None };
                let Some(digest) = digest.or(own) else { return self.went(None) };
                E::GoReceived { epoch: self.handover.decided(), digest }
            }
            E::SourceAnswered(PeerAnswer::Aborted | PeerAnswer::Owned) => {
                E::AbortReceived { epoch: self.handover.decided() }
            }
            E::GoReceived { epoch, .. } | E::AbortReceived { epoch } if epoch != self.handover.decided() => {
                // Of another decision: not for this copy.
                return (self.state, vec![]);
            }
            other => other,
        };
        match event {
            E::GoReceived { digest, .. } => self.went(Some(digest)),
            E::AbortReceived { epoch } => self.aborted(epoch),
            E::WorkerDied | E::WorkerFailed => self.worker_lost(event == E::WorkerDied),
            E::SourceLost | E::SourceAnswered(_) => self.source_lost(event == E::SourceLost),
            E::Forced(claim) => self.forced(claim),
            _ => self.local(event),
        }
    }
}

/// Ends the worker, then drops the record.
fn end(epoch: u64, say: bool) -> Step {
    let mut effects = vec![Effect::EndWorker];
    if say {
        effects.push(Effect::SendFailed);
    }
    (State::Ending { epoch }, effects)
}
