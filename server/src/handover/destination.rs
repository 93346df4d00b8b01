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

use super::force::Claim;
use super::recovery::Worker;
use super::{Digest, Handover, PeerAnswer};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// How it ended at the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It runs here.
    Arrived,
    /// It is owned here, but its worker is dead: Failed; the restart policy may act.
    ArrivedDead,
    /// Nothing was written.
    NotPrepared,
    /// The copy was dropped.
    Dropped,
    /// It was given back.
    Returned,
    /// A later owner exists; the copy here was ended.
    Superseded,
    /// The source was forced out, and had stopped for this copy: it runs here.
    Forced,
    /// The source was forced out: it is owned here, without a copy.
    ForcedDead,
}

/// What happened. See the driver's table in [`super`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is described in the driver's table")]
pub enum Event {
    Begin,
    Persisted(Phase),
    PersistFailed,
    PersistRefused,
    WorkerReady(Digest),
    /// The copy failed; the worker is alive but what it has is of no use.
    WorkerFailed,
    WorkerDied,
    WorkerSealed,
    Granted,
    GrantFailed,
    GoReceived {
        epoch: u64,
        digest: Digest,
    },
    AbortReceived {
        epoch: u64,
    },
    ReleasedReceived,
    SourceLost,
    SourceAnswered(PeerAnswer),
    LeaseExpired,
    /// This host takes it, by evidence that [`super::force`] has judged.
    Forced(Claim),
}

/// What to do. See the driver's table in [`super`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is described in the driver's table")]
pub enum Effect {
    Persist(OwnershipRecord),
    StartWorker,
    SendReady { epoch: u64, digest: Digest },
    SendEntered { epoch: u64 },
    SendReturned { epoch: u64 },
    SendFailed,
    SendAborted { epoch: u64 },
    AskSource,
    Grant { epoch: u64, run: bool },
    SealWorker { epoch: u64 },
    EndWorker,
    Done(Outcome),
}

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

    /// A migration in the middle of which the daemon was restarted, by the record that holds and the worker's
    /// condition, with the first effects. `None` where [`super::recovery::decide`] says something else than going on.
    pub fn recovered(
        handover: Handover,
        record: &OwnershipRecord,
        worker: Worker,
    ) -> Option<(Self, Vec<Effect>)> {
        let mut machine = Self::new(handover);
        let epoch = machine.handover.decided();
        let (state, effects) = match (record.phase(), worker) {
            (_, Worker::Unreachable) => return None,
            (Phase::Incoming | Phase::Ready, Worker::Complete { digest }) => {
                (State::Ready { digest }, vec![Effect::AskSource])
            }
            // Ready may have been promised before the worker died: only the source knows whether it has committed.
            (Phase::Incoming | Phase::Ready, Worker::Dead | Worker::Sealed { .. }) => {
                (State::CopyLost, vec![Effect::AskSource])
            }
            // Nor is there anything else to do if its guest ended before it ran, for want of memory that was to follow.
            (Phase::Incoming | Phase::Ready, Worker::Ended) => {
                (State::CopyLost, vec![Effect::EndWorker, Effect::AskSource])
            }
            (Phase::Incoming | Phase::Ready, Worker::Receiving | Worker::Paused { epoch: 0 }) => {
                end(machine.handover.epoch, false)
            }
            (Phase::Entered, Worker::Dead | Worker::Ended) => {
                (State::Entered { dead: true }, vec![Effect::SendEntered { epoch }])
            }
            (Phase::Entered, Worker::Running { epoch: at }) if at <= epoch => {
                (State::Entered { dead: false }, vec![Effect::SendEntered { epoch }])
            }
            (Phase::Entered, Worker::Complete { .. } | Worker::Paused { .. }) => {
                (State::Granting, vec![Effect::Grant { epoch, run: machine.handover.run }])
            }
            _ => return None,
        };
        machine.state = state;
        Some((machine, effects))
    }

    /// Where it is.
    pub fn state(&self) -> State {
        self.state
    }

    /// The outcome, once it is over.
    pub fn outcome(&self) -> Option<Outcome> {
        if let State::Over(outcome) = self.state { Some(outcome) } else { None }
    }

    /// What it answers to Resolve.
    pub fn answer(&self) -> PeerAnswer {
        use State as S;
        match self.state {
            S::Ready { digest } => PeerAnswer::Ready(digest),
            // Before Entered is durable there is nothing to say, and the source has committed already.
            S::Idle | S::Preparing { .. } | S::Receiving | S::Entering { .. } => PeerAnswer::Undecided,
            S::Sealing | S::Returning | S::Ending { .. } | S::Dropping { .. } => PeerAnswer::Undecided,
            S::Forcing { .. } => PeerAnswer::Undecided,
            S::ForceGranting { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Forced | Outcome::ForcedDead) => {
                PeerAnswer::Superseded(self.handover.returned())
            }
            S::Granting | S::Entered { .. } | S::Owning { .. } => PeerAnswer::Committed(None),
            S::Over(Outcome::Arrived | Outcome::ArrivedDead) => PeerAnswer::Committed(None),
            S::CopyLost | S::Over(Outcome::Dropped) => PeerAnswer::Aborted,
            S::Over(Outcome::Returned) => PeerAnswer::Returned,
            S::Over(Outcome::NotPrepared) => PeerAnswer::Unknown,
            S::Yielding { epoch } | S::SavingSuperseded { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Superseded) => PeerAnswer::Superseded(self.handover.returned()),
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

    /// Events of this host.
    fn local(&self, event: Event) -> Step {
        use Event as E;
        use State as S;
        let decided = self.handover.decided();
        match (self.state, event) {
            (S::Idle, E::Begin) => {
                (S::Preparing { abort: false }, self.outstanding(S::Preparing { abort: false }))
            }
            (S::Preparing { .. }, E::PersistRefused) => {
                (S::Over(Outcome::NotPrepared), vec![Effect::SendFailed, Effect::Done(Outcome::NotPrepared)])
            }
            (S::Preparing { abort: false }, E::Persisted(Phase::Incoming)) => {
                (S::Receiving, vec![Effect::StartWorker])
            }
            (S::Preparing { abort: true }, E::Persisted(Phase::Incoming)) => {
                self.saving(S::Dropping { epoch: self.handover.epoch })
            }
            (S::Receiving, E::WorkerReady(digest)) => {
                (S::Ready { digest }, vec![Effect::SendReady { epoch: self.handover.epoch, digest }])
            }
            (S::Receiving, E::LeaseExpired) => end(self.handover.epoch, true),
            (S::Entering { dead: false, .. }, E::Persisted(Phase::Entered)) => {
                (S::Granting, vec![Effect::Grant { epoch: decided, run: self.handover.run }])
            }
            // It died before it could be granted: nothing has run, and the source's copy is as new.
            (S::Entering { dead: true, .. }, E::Persisted(Phase::Entered)) => self.saving(S::Returning),
            // A later truth is in the journal; nothing was granted.
            (S::Entering { .. }, E::PersistRefused) => self.superseded(self.handover.returned()),
            (S::Granting, E::Granted) => {
                (S::Entered { dead: false }, vec![Effect::SendEntered { epoch: decided }])
            }
            (S::Granting, E::GrantFailed) => {
                (S::Granting, vec![Effect::Grant { epoch: decided, run: self.handover.run }])
            }
            (S::Entered { dead }, E::ReleasedReceived) => self.saving(S::Owning { dead }),
            (S::Owning { dead }, E::Persisted(Phase::Owned)) => {
                let outcome = if dead { Outcome::ArrivedDead } else { Outcome::Arrived };
                (S::Over(outcome), vec![Effect::Done(outcome)])
            }
            (S::Sealing, E::WorkerSealed) => self.saving(S::Returning),
            (S::Returning, E::Persisted(Phase::Returned)) => (
                S::Over(Outcome::Returned),
                vec![
                    Effect::SendReturned { epoch: self.handover.returned() },
                    Effect::EndWorker,
                    Effect::Done(Outcome::Returned),
                ],
            ),
            (S::Dropping { epoch }, E::Persisted(Phase::Aborted)) => (
                S::Over(Outcome::Dropped),
                vec![Effect::SendAborted { epoch }, Effect::Done(Outcome::Dropped)],
            ),
            (S::Yielding { epoch }, E::WorkerSealed) => self.saving(S::SavingSuperseded { epoch }),
            (S::SavingSuperseded { .. }, E::Persisted(Phase::Superseded)) => {
                (S::Over(Outcome::Superseded), vec![Effect::EndWorker, Effect::Done(Outcome::Superseded)])
            }
            (S::Forcing { epoch, copy: true }, E::Persisted(Phase::Owned)) => {
                (S::ForceGranting { epoch }, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            (S::Forcing { .. }, E::Persisted(Phase::Owned)) => {
                (S::Over(Outcome::ForcedDead), vec![Effect::EndWorker, Effect::Done(Outcome::ForcedDead)])
            }
            (S::ForceGranting { .. }, E::Granted) => {
                (S::Over(Outcome::Forced), vec![Effect::Done(Outcome::Forced)])
            }
            (S::ForceGranting { epoch }, E::GrantFailed) => {
                (self.state, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            // A write that is in doubt is repeated until it is durable.
            (state, E::PersistFailed) => (state, self.outstanding(state)),
            (state, _) => (state, vec![]),
        }
    }

    /// The source has committed; the digest that it has sealed, if it was told.
    fn went(&self, sealed: Option<Digest>) -> Step {
        use State as S;
        match self.state {
            S::Ready { digest } if sealed == Some(digest) => self.saving(S::Entering { digest, dead: false }),
            // Committed to something else than what is here: give it back instead of running it.
            S::Ready { .. } => (S::Sealing, vec![Effect::SealWorker { epoch: self.handover.returned() }]),
            S::CopyLost => self.saving(S::Returning),
            // A repeated Go is answered again.
            S::Entered { .. } | S::Owning { .. } | S::Over(Outcome::Arrived | Outcome::ArrivedDead) => {
                (self.state, vec![Effect::SendEntered { epoch: self.handover.decided() }])
            }
            S::Over(Outcome::Returned) => {
                (self.state, vec![Effect::SendReturned { epoch: self.handover.returned() }])
            }
            _ => (self.state, vec![]),
        }
    }

    fn aborted(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Preparing { .. } => (S::Preparing { abort: true }, vec![]),
            S::Receiving | S::Ready { .. } => end(epoch, false),
            S::CopyLost => self.saving(S::Dropping { epoch }),
            S::Over(Outcome::Dropped) => (self.state, vec![Effect::SendAborted { epoch }]),
            _ => (self.state, vec![]),
        }
    }

    fn worker_lost(&self, dead: bool) -> Step {
        use State as S;
        match self.state {
            S::Receiving if dead => {
                self.saving_with(S::Dropping { epoch: self.handover.epoch }, Effect::SendFailed)
            }
            S::Receiving => end(self.handover.epoch, true),
            S::Ready { .. } if dead => (S::CopyLost, vec![Effect::SendFailed, Effect::AskSource]),
            S::Entering { digest, .. } if dead => (S::Entering { digest, dead: true }, vec![]),
            S::Granting if dead => {
                (S::Entered { dead: true }, vec![Effect::SendEntered { epoch: self.handover.decided() }])
            }
            S::Entered { .. } if dead => (S::Entered { dead: true }, vec![]),
            S::Owning { .. } if dead => (S::Owning { dead: true }, vec![]),
            S::Sealing if dead => self.saving(S::Returning),
            S::Ending { epoch } if dead => self.saving(S::Dropping { epoch }),
            S::Yielding { epoch } if dead => self.saving(S::SavingSuperseded { epoch }),
            S::Forcing { epoch, .. } if dead => (S::Forcing { epoch, copy: false }, vec![]),
            S::ForceGranting { .. } if dead => {
                (S::Over(Outcome::ForcedDead), vec![Effect::Done(Outcome::ForcedDead)])
            }
            _ => (self.state, vec![]),
        }
    }

    fn source_lost(&self, first: bool) -> Step {
        use State as S;
        match self.state {
            // Nothing was promised.
            S::Preparing { .. } if first => (S::Preparing { abort: true }, vec![]),
            S::Receiving if first => end(self.handover.epoch, false),
            S::Ready { .. } | S::CopyLost => (self.state, vec![Effect::AskSource]),
            // The source asks again when it needs the answer; Entered is enough to own it.
            S::Entered { dead } if first => {
                let outcome = if dead { Outcome::ArrivedDead } else { Outcome::Arrived };
                (S::Over(outcome), vec![Effect::Done(outcome)])
            }
            _ => (self.state, vec![]),
        }
    }

    fn superseded(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Over(_) | S::Yielding { .. } | S::SavingSuperseded { .. } => (self.state, vec![]),
            // Its own force is above every other decision that it can have met.
            S::Forcing { .. } | S::ForceGranting { .. } => (self.state, vec![]),
            // The source has gone on at `e+1` without having committed this migration.
            S::Receiving | S::Ready { .. } | S::CopyLost if epoch == self.handover.decided() => {
                self.aborted(epoch)
            }
            _ if epoch < self.handover.returned() => self.source_lost(false),
            _ => (S::Yielding { epoch }, vec![Effect::SealWorker { epoch }]),
        }
    }

    /// Only where the source must be asked: a copy that is not complete is worth nothing.
    fn forced(&self, claim: Claim) -> Step {
        use State as S;
        let copy = match self.state {
            _ if claim.epoch < self.handover.returned() => return (self.state, vec![]),
            S::Ready { digest } => claim.copy && claim.sealed.is_none_or(|sealed| sealed == digest),
            S::CopyLost => false,
            _ => return (self.state, vec![]),
        };
        self.saving(S::Forcing { epoch: claim.epoch, copy })
    }

    fn saving(&self, state: State) -> Step {
        (state, self.outstanding(state))
    }

    fn saving_with(&self, state: State, effect: Effect) -> Step {
        let mut effects = self.outstanding(state);
        effects.push(effect);
        (state, effects)
    }

    /// The record that a state waits for.
    fn outstanding(&self, state: State) -> Vec<Effect> {
        use State as S;
        let h = &self.handover;
        let record = match state {
            S::Preparing { .. } => h.record(Phase::Incoming, h.epoch, &h.peer_host, None),
            S::Entering { digest, .. } => h.record(Phase::Entered, h.decided(), &h.host, Some(digest)),
            S::Owning { .. } => h.record(Phase::Owned, h.decided(), &h.host, None),
            S::Returning => h.record(Phase::Returned, h.returned(), &h.peer_host, None),
            S::Forcing { epoch, .. } => h.record(Phase::Owned, epoch, &h.host, None),
            S::Dropping { epoch } => h.record(Phase::Aborted, epoch, &h.peer_host, None),
            S::SavingSuperseded { epoch } => h.record(Phase::Superseded, epoch, &h.peer_host, None),
            _ => return vec![],
        };
        vec![Effect::Persist(record)]
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
