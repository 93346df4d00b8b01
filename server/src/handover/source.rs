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
//! ```
//!
//! Invariants
//! - Go leaves only after `Sealed` (or the worker's proven death), equal digests and a durable HandedOver(e+1).
//! - A grant is given only after a durable Owned record of its epoch.
//! - From `Committing` on nothing aborts: cancel is refused, time-outs and lost peers change nothing.
//! - The worker is ended only after Entered and after its PMU state is durable.
//! - After a post-copy the worker is ended only when it has served every page (`Drained`): until then nobody has a whole
//!   copy. If it dies before, nothing is left to be kept here, and the destination's guest ends by itself.
//! - A dead worker in `Stopping` makes the destination's copy the last one: then nothing aborts but its word that it has
//!   none.

use super::force::Claim;
use super::recovery::Worker;
use super::{Digest, Handover, PeerAnswer};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// Why a migration was aborted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Cause {
    /// The user cancelled it.
    Cancelled,
    /// It took too long.
    TimedOut,
    /// The destination is gone.
    PeerLost,
    /// The destination refused or failed.
    PeerFailed,
    /// The copy failed at the source.
    CopyFailed,
    /// What the destination holds is not what was sealed.
    DigestMismatch,
    /// A record could not be written.
    StoreFailed,
    /// The source's worker died.
    WorkerDied,
    /// The source's daemon was restarted.
    Restarted,
    /// The other host was forced out, and no copy here is known to be the newest.
    Forced,
}

impl Cause {
    /// A stable code for machines.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Cancelled => "CANCELLED",
            Self::TimedOut => "TIMED_OUT",
            Self::PeerLost => "DESTINATION_LOST",
            Self::PeerFailed => "DESTINATION_FAILED",
            Self::CopyFailed => "COPY_FAILED",
            Self::DigestMismatch => "DIGEST_MISMATCH",
            Self::StoreFailed => "STORE_FAILED",
            Self::WorkerDied => "WORKER_DIED",
            Self::Restarted => "SOURCE_RESTARTED",
            Self::Forced => "FORCED",
        }
    }
}

/// How it ended at the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// It runs on the destination; the copy here is gone.
    Moved,
    /// Nothing was opened; the machine is as it was.
    NotOpened,
    /// It runs here at the next epoch.
    Aborted(Cause),
    /// The destination gave it back; it runs here two epochs later.
    Returned,
    /// The destination was forced out, and it had not entered: the copy here runs.
    Forced,
    /// It is owned here, but its worker is dead: Failed with this cause; the restart policy may act.
    Failed(Cause),
    /// A later owner exists; the copy here was ended.
    Superseded,
    /// The records do not tell; nothing runs here until an operator decides.
    Uncertain,
}

/// What happened. See the driver's table in [`super`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is described in the driver's table")]
pub enum Event {
    Begin,
    Persisted(Phase),
    PersistFailed,
    PersistRefused,
    PrepareAccepted,
    Converged,
    CopyFailed,
    Sealed(Digest),
    PmuPersisted,
    PmuFailed,
    ReadyReceived(Digest),
    EnteredReceived,
    ReturnedReceived,
    /// Post-copy: the worker has served every page, or the destination is lost for good.
    Drained,
    PeerFailed,
    PeerLost,
    PeerAnswered(PeerAnswer),
    Granted,
    GrantFailed,
    WorkerSealed,
    WorkerDied,
    CancelRequested,
    TimedOut,
    /// This host takes it, by evidence that [`super::force`] has judged.
    Forced(Claim),
}

/// What to do. See the driver's table in [`super`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
#[allow(missing_docs, reason = "each is described in the driver's table")]
pub enum Effect {
    Persist(OwnershipRecord),
    Prepare,
    StartCopy,
    FinishCopy { epoch: u64 },
    PersistPmu,
    SendGo { epoch: u64, digest: Digest },
    SendAbort { epoch: u64, cause: Cause },
    SendReleased { epoch: u64 },
    AskPeer,
    Grant { epoch: u64, run: bool },
    CancelCopy,
    SealWorker { epoch: u64 },
    EndWorker,
    RefuseCancel,
    Done(Outcome),
}

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
    /// After a restart: the worker is sealed again before Go.
    Resealing {
        digest: Digest,
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

    /// A migration in the middle of which the daemon was restarted, by the record that holds and the worker's
    /// condition, with the first effects. `None` where [`super::recovery::decide`] says something else than going on.
    pub fn recovered(
        handover: Handover,
        record: &OwnershipRecord,
        worker: Worker,
    ) -> Option<(Self, Vec<Effect>)> {
        let mut machine = Self::new(handover);
        let dead = match worker {
            Worker::Unreachable => return None,
            Worker::Dead => true,
            _ => false,
        };
        let (state, effects) = match record.phase() {
            Phase::Open if dead => machine.abort(Cause::WorkerDied, true),
            Phase::Open => machine.abort(Cause::Restarted, false),
            Phase::Quiesced | Phase::Committing => (State::Resolving { dead }, vec![Effect::AskPeer]),
            Phase::HandedOver => {
                // A commit whose digest cannot be read matches no copy, so the destination gives the machine back.
                let digest = super::digest(&record.digest).unwrap_or_default();
                if dead {
                    let (entered, drained) = (false, false);
                    let state = State::HandedOver { digest, pmu: true, dead, entered, drained };
                    (state, vec![Effect::AskPeer])
                } else {
                    let epoch = machine.handover.epoch;
                    (State::Resealing { digest }, vec![Effect::SealWorker { epoch }])
                }
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
            S::Resealing { digest } | S::HandedOver { digest, .. } => PeerAnswer::Committed(Some(digest)),
            S::Releasing | S::SavingReleased | S::TakingBack { .. } => PeerAnswer::Committed(None),
            S::Over(Outcome::Moved) => PeerAnswer::Committed(None),
            S::Granting { epoch, outcome: Outcome::Forced } | S::Discarding { epoch } => {
                PeerAnswer::Superseded(epoch)
            }
            S::Over(Outcome::Forced | Outcome::Failed(Cause::Forced)) => {
                PeerAnswer::Superseded(self.handover.returned())
            }
            S::Granting { .. } => PeerAnswer::Owned,
            S::Over(Outcome::Aborted(_) | Outcome::Returned | Outcome::Failed(_)) => PeerAnswer::Owned,
            S::Yielding { epoch } | S::SavingSuperseded { epoch } => PeerAnswer::Superseded(epoch),
            S::Over(Outcome::Superseded) => PeerAnswer::Superseded(self.handover.returned()),
            S::Over(Outcome::NotOpened | Outcome::Uncertain) | S::Doubting | S::SavingUncertain => {
                PeerAnswer::Unknown
            }
            S::Idle
            | S::Opening { .. }
            | S::Preparing
            | S::Precopy
            | S::Quiescing { .. }
            | S::Stopping { .. } => PeerAnswer::Undecided,
            S::Committing { .. } | S::Aborting { .. } | S::Resolving { .. } | S::Forcing { .. } => {
                PeerAnswer::Undecided
            }
        }
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

    /// From the decision on, and what ends a migration.
    fn decided(&self, event: Event) -> Step {
        use Event as E;
        use State as S;
        match (self.state, event) {
            (S::Committing { digest, pmu, dead }, _) => match event {
                E::Persisted(Phase::HandedOver) => {
                    self.go(S::HandedOver { digest, pmu, dead, entered: false, drained: false })
                }
                // The store has a later truth; it must not be overruled from here.
                E::PersistRefused => self.doubt(),
                E::PmuPersisted => (S::Committing { digest, pmu: true, dead }, vec![]),
                E::WorkerDied => (S::Committing { digest, pmu, dead: true }, vec![]),
                _ => self.repeat(event),
            },
            (S::Resolving { .. }, E::WorkerDied) => (S::Resolving { dead: true }, vec![Effect::AskPeer]),
            (S::Resealing { digest }, E::WorkerSealed | E::WorkerDied) => {
                let dead = event == E::WorkerDied;
                let (entered, drained) = (false, false);
                (S::HandedOver { digest, pmu: true, dead, entered, drained }, vec![Effect::AskPeer])
            }
            (S::HandedOver { .. }, _) => self.handed_over(event),
            (S::Releasing, E::WorkerDied) => (S::SavingReleased, self.persist(Phase::Released)),
            (S::SavingReleased, E::Persisted(Phase::Released)) => (
                S::Over(Outcome::Moved),
                vec![Effect::SendReleased { epoch: self.handover.decided() }, Effect::Done(Outcome::Moved)],
            ),
            (S::Aborting { cause, dead }, E::Persisted(Phase::Owned)) => {
                let epoch = self.handover.decided();
                let abort = Effect::SendAbort { epoch, cause };
                if dead {
                    let outcome = Outcome::Failed(cause);
                    return (S::Over(outcome), vec![abort, Effect::Done(outcome)]);
                }
                let grant = Effect::Grant { epoch, run: self.handover.run };
                let granting = S::Granting { epoch, outcome: Outcome::Aborted(cause) };
                (granting, vec![grant, Effect::CancelCopy, abort])
            }
            (S::Aborting { cause, .. }, E::WorkerDied) => (S::Aborting { cause, dead: true }, vec![]),
            (S::TakingBack { dead: true }, E::Persisted(Phase::Owned)) => {
                over(Outcome::Failed(Cause::WorkerDied))
            }
            (S::TakingBack { dead: false }, E::Persisted(Phase::Owned)) => {
                let epoch = self.handover.returned();
                let grant = Effect::Grant { epoch, run: self.handover.run };
                (S::Granting { epoch, outcome: Outcome::Returned }, vec![grant, Effect::CancelCopy])
            }
            (S::TakingBack { .. }, E::WorkerDied) => (S::TakingBack { dead: true }, vec![]),
            (S::Forcing { epoch, copy: true, dead: false }, E::Persisted(Phase::Owned)) => {
                let grant = Effect::Grant { epoch, run: self.handover.run };
                (S::Granting { epoch, outcome: Outcome::Forced }, vec![grant, Effect::CancelCopy])
            }
            (S::Forcing { epoch, dead: false, .. }, E::Persisted(Phase::Owned)) => {
                (S::Discarding { epoch }, vec![Effect::EndWorker])
            }
            (S::Forcing { .. }, E::Persisted(Phase::Owned)) | (S::Discarding { .. }, E::WorkerDied) => {
                over(Outcome::Failed(Cause::Forced))
            }
            (S::Forcing { epoch, .. }, E::WorkerDied) => {
                (S::Forcing { epoch, copy: false, dead: true }, vec![])
            }
            (S::Granting { outcome, .. }, E::Granted) => over(outcome),
            (S::Granting { .. }, E::WorkerDied) => over(Outcome::Failed(Cause::WorkerDied)),
            (S::Granting { epoch, .. }, E::GrantFailed) => {
                (self.state, vec![Effect::Grant { epoch, run: self.handover.run }])
            }
            (S::Yielding { epoch }, E::WorkerSealed | E::WorkerDied) => {
                let record = self.handover.record(Phase::Superseded, epoch, &self.handover.peer_host, None);
                (S::SavingSuperseded { epoch }, vec![Effect::Persist(record)])
            }
            (S::SavingSuperseded { .. }, E::Persisted(Phase::Superseded)) => {
                (S::Over(Outcome::Superseded), vec![Effect::EndWorker, Effect::Done(Outcome::Superseded)])
            }
            (S::Doubting, E::WorkerSealed | E::WorkerDied) => {
                (S::SavingUncertain, self.persist(Phase::Uncertain))
            }
            (S::SavingUncertain, E::Persisted(Phase::Uncertain) | E::PersistRefused) => {
                over(Outcome::Uncertain)
            }
            _ => self.repeat(event),
        }
    }

    fn stopping(&self, event: Event) -> Step {
        use Event as E;
        let State::Stopping { mut sealed, mut ready, mut pmu, mut dead } = self.state else {
            return (self.state, vec![]);
        };
        let mut effects = Vec::new();
        match event {
            E::Sealed(digest) if sealed.is_none() => {
                sealed = Some(digest);
                effects.push(Effect::PersistPmu);
            }
            E::ReadyReceived(digest) | E::PeerAnswered(PeerAnswer::Ready(digest)) => ready = Some(digest),
            E::PmuPersisted => pmu = true,
            E::WorkerDied if !dead => {
                dead = true;
                // What it had not reported cannot be stored any more.
                pmu |= sealed.is_none();
                effects.push(Effect::AskPeer);
            }
            E::PeerAnswered(PeerAnswer::Aborted) if dead => return self.abort(Cause::WorkerDied, true),
            E::PeerAnswered(PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Returned) => {
                return self.doubt();
            }
            E::PeerAnswered(_) if dead => effects.push(Effect::AskPeer),
            _ => {}
        }
        let (state, more) = match (sealed, ready) {
            // With a dead worker there is no good copy left; else it goes on here.
            (Some(ours), Some(theirs)) if ours != theirs => self.abort(Cause::DigestMismatch, dead),
            (Some(_), Some(digest)) => self.commit(digest, pmu, dead),
            // A dead worker was sealed before it sent its state, and the destination checked that state's own digest.
            (None, Some(digest)) if dead => self.commit(digest, pmu, dead),
            _ => (State::Stopping { sealed, ready, pmu, dead }, vec![]),
        };
        effects.extend(more);
        (state, effects)
    }

    fn handed_over(&self, event: Event) -> Step {
        use Event as E;
        let State::HandedOver { digest, mut pmu, mut dead, mut entered, mut drained } = self.state else {
            return (self.state, vec![]);
        };
        match event {
            // A peer that has gone on at `e+1` has entered.
            E::EnteredReceived
            | E::PeerAnswered(PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Superseded(_)) => {
                entered = true;
            }
            E::PmuPersisted => pmu = true,
            E::WorkerDied => dead = true,
            E::Drained => drained = true,
            E::ReturnedReceived | E::PeerAnswered(PeerAnswer::Returned) if !entered => {
                let record =
                    self.handover.record(Phase::Owned, self.handover.returned(), &self.handover.host, None);
                return (State::TakingBack { dead }, vec![Effect::Persist(record)]);
            }
            // Whatever it held when the link broke: the decision is sent again.
            E::PeerAnswered(PeerAnswer::Ready(_) | PeerAnswer::Undecided | PeerAnswer::Aborted)
                if !entered =>
            {
                return self.go(self.state);
            }
            E::PeerLost | E::PeerAnswered(_) if !entered => return (self.state, vec![Effect::AskPeer]),
            E::PmuFailed => return (self.state, vec![Effect::PersistPmu]),
            _ => {}
        }
        // Pages that a dead worker has not served are nowhere.
        let served = drained || dead || !self.postcopy;
        match (entered && pmu && served, dead) {
            (true, false) => (State::Releasing, vec![Effect::EndWorker]),
            (true, true) => (State::SavingReleased, self.persist(Phase::Released)),
            _ => (State::HandedOver { digest, pmu, dead, entered, drained }, vec![]),
        }
    }

    /// Cases (a) to (d) of handover.md section 3.
    fn resolve(&self, dead: bool, answer: PeerAnswer) -> Step {
        match (answer, dead) {
            // It claims a commit that this journal does not have: records were lost here.
            (PeerAnswer::Committed(_) | PeerAnswer::Owned | PeerAnswer::Returned, _) => self.doubt(),
            (_, false) => self.abort(Cause::Restarted, false),
            (PeerAnswer::Ready(digest), true) => self.commit(digest, true, true),
            (PeerAnswer::Aborted, true) => self.abort(Cause::WorkerDied, true),
            _ => (State::Resolving { dead }, vec![Effect::AskPeer]),
        }
    }

    /// An event that ends a migration if it comes in time.
    fn hear_abort(&self, event: Event, cause: Cause) -> Step {
        use State as S;
        match self.state {
            // Waits for the record that is being written; a death outweighs other causes.
            S::Opening { abort } if abort.is_none() || event == Event::WorkerDied => {
                (S::Opening { abort: Some(cause) }, vec![])
            }
            S::Quiescing { abort } if abort.is_none() || event == Event::WorkerDied => {
                (S::Quiescing { abort: Some(cause) }, vec![])
            }
            S::Idle => over(Outcome::NotOpened),
            S::Preparing | S::Precopy => self.abort(cause, event == Event::WorkerDied),
            S::Opening { .. } | S::Quiescing { .. } => (self.state, vec![]),
            // The copy at the destination may be the last one.
            S::Stopping { dead: true, .. } => match event {
                Event::PeerFailed => self.abort(Cause::WorkerDied, true),
                Event::CancelRequested => (self.state, vec![Effect::RefuseCancel]),
                Event::PeerLost => (self.state, vec![Effect::AskPeer]),
                _ => (self.state, vec![]),
            },
            S::Stopping { .. } if event == Event::WorkerDied => self.stopping(event),
            S::Stopping { .. } => self.abort(cause, false),
            _ if event == Event::CancelRequested => (self.state, vec![Effect::RefuseCancel]),
            _ => self.decided(event),
        }
    }

    fn superseded(&self, epoch: u64) -> Step {
        use State as S;
        match self.state {
            S::Over(_) | S::Yielding { .. } | S::SavingSuperseded { .. } => (self.state, vec![]),
            // Its own force is above every other decision that it can have met.
            S::Forcing { .. } | S::Discarding { .. } => (self.state, vec![]),
            S::Granting { epoch: own, .. } if epoch <= own => (self.state, vec![]),
            S::HandedOver { .. } if epoch == self.handover.decided() => {
                self.handed_over(Event::PeerAnswered(PeerAnswer::Superseded(epoch)))
            }
            // Force takes two epochs: a lower one is stale or made up, and no answer.
            _ if epoch < self.handover.returned() => self.step(Event::PeerAnswered(PeerAnswer::Unknown)),
            _ => (S::Yielding { epoch }, vec![Effect::SealWorker { epoch }]),
        }
    }

    /// Only where this host cannot decide by itself; it must not be late, either.
    fn forced(&self, claim: Claim) -> Step {
        use State as S;
        let dead = match self.state {
            _ if claim.epoch < self.handover.returned() => return (self.state, vec![]),
            S::Resolving { dead } | S::HandedOver { dead, entered: false, .. } => dead,
            S::Resealing { .. } => false,
            _ => return (self.state, vec![]),
        };
        let state = S::Forcing { epoch: claim.epoch, copy: claim.copy && !dead, dead };
        let record = self.handover.record(Phase::Owned, claim.epoch, &self.handover.host, None);
        (state, vec![Effect::Persist(record)])
    }

    fn late_abort(&self, cause: Cause) -> Step {
        self.abort(cause, cause == Cause::WorkerDied)
    }

    fn abort(&self, cause: Cause, dead: bool) -> Step {
        let record = self.handover.record(Phase::Owned, self.handover.decided(), &self.handover.host, None);
        (State::Aborting { cause, dead }, vec![Effect::Persist(record)])
    }

    fn commit(&self, digest: Digest, pmu: bool, dead: bool) -> Step {
        let next = self.handover.record(
            Phase::HandedOver,
            self.handover.decided(),
            &self.handover.peer_host,
            Some(digest),
        );
        (State::Committing { digest, pmu, dead }, vec![Effect::Persist(next)])
    }

    fn go(&self, state: State) -> Step {
        let State::HandedOver { digest, .. } = state else { return (state, vec![]) };
        (state, vec![Effect::SendGo { epoch: self.handover.decided(), digest }])
    }

    fn doubt(&self) -> Step {
        (State::Doubting, vec![Effect::SealWorker { epoch: self.handover.decided() }])
    }

    /// A write that is in doubt is repeated until it is durable; everything else changes nothing.
    fn repeat(&self, event: Event) -> Step {
        let effects = if event == Event::PersistFailed { self.outstanding() } else { vec![] };
        (self.state, effects)
    }

    /// The record that the present state waits for.
    fn outstanding(&self) -> Vec<Effect> {
        use State as S;
        let h = &self.handover;
        match self.state {
            S::Opening { .. } => self.persist(Phase::Open),
            S::Quiescing { .. } => self.persist(Phase::Quiesced),
            S::Committing { digest, .. } => {
                vec![Effect::Persist(h.record(Phase::HandedOver, h.decided(), &h.peer_host, Some(digest)))]
            }
            S::SavingReleased => self.persist(Phase::Released),
            S::Forcing { epoch, .. } => vec![Effect::Persist(h.record(Phase::Owned, epoch, &h.host, None))],
            S::Aborting { .. } => vec![Effect::Persist(h.record(Phase::Owned, h.decided(), &h.host, None))],
            S::TakingBack { .. } => {
                vec![Effect::Persist(h.record(Phase::Owned, h.returned(), &h.host, None))]
            }
            S::SavingSuperseded { epoch } => {
                vec![Effect::Persist(h.record(Phase::Superseded, epoch, &h.peer_host, None))]
            }
            S::SavingUncertain => self.persist(Phase::Uncertain),
            _ => vec![],
        }
    }

    fn persist(&self, phase: Phase) -> Vec<Effect> {
        let h = &self.handover;
        let record = match phase {
            Phase::Released => h.record(phase, h.decided(), &h.peer_host, None),
            Phase::Uncertain => h.record(phase, h.decided(), "", None),
            _ => h.record(phase, h.epoch, &h.host, None),
        };
        vec![Effect::Persist(record)]
    }
}

fn over(outcome: Outcome) -> Step {
    (State::Over(outcome), vec![Effect::Done(outcome)])
}

fn abort_cause(event: Event) -> Option<Cause> {
    Some(match event {
        Event::CancelRequested => Cause::Cancelled,
        Event::TimedOut => Cause::TimedOut,
        Event::PeerLost => Cause::PeerLost,
        Event::PeerFailed => Cause::PeerFailed,
        Event::CopyFailed => Cause::CopyFailed,
        Event::PmuFailed => Cause::StoreFailed,
        Event::WorkerDied => Cause::WorkerDied,
        _ => return None,
    })
}
