//! The handover of a machine from one host to another: pure state machines, and the table that a restart obeys.
//!
//! | module | what |
//! |---|---|
//! | [`source`] | the host that has the machine, also after a restart in the middle |
//! | [`destination`] | the host that gets it, also after a restart in the middle |
//! | [`answer`] | what a host without a living machine answers to Resolve, from the record that holds |
//! | [`force`] | who may take a machine that another host may own, and how a directory gives it up |
//! | [`recovery`] | what to do at start, from the journal's record and the worker's condition: a total function |
//! | [`phase`] | which ownership record may follow which: the guard before the journal |
//! | [`step`] | names of the points at which a process can be held or killed, for tests |
//!
//! # How to drive a machine
//!
//! One task owns the machine and a queue of events. It calls `apply(event)` and executes the returned effects *in their
//! order*. An effect that takes time (asking the peer, copying, ending a worker, appending to the journal) is started
//! and its result comes back later as an event; the machine is never waited for and never blocks.
//!
//! ```text
//!     loop { for effect in machine.apply(events.recv().await) { start(effect) } }      until Effect::Done(outcome)
//!
//!     effect                              what to do                                   event that answers it
//!     Persist(record)                     store.append_ownership(record)               Persisted(phase)
//!                                           DECISION_IN_DOUBT                          PersistFailed  (machine asks again)
//!                                           any other refusal                          PersistRefused
//!     source: Prepare                     Negotiate, Check, Prepare at the peer,       PrepareAccepted
//!                                           then open the Handover stream              or PeerFailed, PeerLost
//!             StartCopy                   worker.MigrateOut                            Converged or CopyFailed
//!             FinishCopy{epoch}           worker.FinishMigration (pauses, puts, seals) Sealed{digest} or CopyFailed
//!             PersistPmu                  store.put_pmu of the images at the stop,     PmuPersisted or PmuFailed
//!                                           once Entered is known: a failure before
//!                                           the decision has no place in the machine
//!             (Source::is_followed)       post-copy: worker.WaitDrained until over     Drained
//!             SendGo{..}, SendAbort{..},  on the Handover stream; if it is not open,   PeerLost if it cannot be sent
//!               SendReleased                reopen it first
//!             AskPeer                     reconnect, Resolve; repeat with back-off     PeerAnswered(..)
//!             Grant{epoch, run}           worker.Grant                                 Granted or GrantFailed
//!             CancelCopy                  worker.CancelMigration                       none
//!             SealWorker{epoch}           worker.Seal; other events are told           WorkerSealed or WorkerDied
//!                                           meanwhile, a later order waits for it
//!             EndWorker                   worker.Shutdown, then proven gone; memory    WorkerDied
//!                                           that was handed over: killed, cannot run
//!             RefuseCancel                answer FAILED_PRECONDITION                   none
//!             Done(outcome)               the machine is over                          none
//!     destination: the same, and
//!             StartWorker                 spawn, CreateVm(incoming), PrepareIncoming,  WorkerReady{digest}
//!                                           answer Prepare, WatchIncoming              or WorkerDied / WorkerFailed
//!             SendReady{..} ...           on the Handover stream                       SourceLost if it cannot be sent
//!             AskSource                   reconnect, Resolve; repeat with back-off     SourceAnswered(..)
//! ```
//!
//! From the outside come: `CancelRequested` and `TimedOut`, messages of the other side, `PeerLost` or `SourceLost` when
//! the stream breaks, `WorkerDied`. **`WorkerDied` means proven dead** (exit seen through its pidfd, an empty cgroup, a
//! new boot id; in thread isolation the end of its threads). A worker that does not answer is not dead: send nothing.
//! An event that does not fit the state is ignored, so duplicates and late answers need no care.
//!
//! At start: `recovery::decide` for each record and worker; where it says so, [`source::Source::recovered`] or
//! [`destination::Destination::recovered`] give a machine in the middle with its first effects.

// A table reads best with one row a case, also where rows agree.
#[allow(clippy::match_same_arms)]
pub mod answer;
#[allow(clippy::match_same_arms)]
pub mod destination;
#[allow(clippy::match_same_arms)]
pub mod force;
#[allow(clippy::match_same_arms)]
pub mod phase;
#[allow(clippy::match_same_arms)]
pub mod recovery;
#[allow(clippy::match_same_arms)]
pub mod source;
pub mod step;

use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// SHA-256 over the state stream.
pub type Digest = [u8; 32];

/// A digest from the wire; `None` if it has not 32 bytes.
pub fn digest(bytes: &[u8]) -> Option<Digest> {
    bytes.try_into().ok()
}

/// One migration as one of its two hosts sees it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Handover {
    /// The machine.
    pub vm_uid: String,
    /// UUID of the migration.
    pub migration_id: String,
    /// Epoch at which the source owns it, `e`. The commit is `e+1`, the return `e+2`.
    pub epoch: u64,
    /// This host.
    pub host: String,
    /// The other host.
    pub peer_host: String,
    /// Where the other host answers.
    pub peer_address: String,
    /// The other host's store id; empty until it is known.
    pub peer_store: String,
    /// Incarnation of this host's worker.
    pub incarnation: u64,
    /// The machine runs (or should) once it is granted; false for one that the user paused.
    pub run: bool,
}

impl Handover {
    /// The migration that a record of this host's journal speaks of. The epoch is the source's `e`, whatever phase the
    /// record is in.
    pub fn of(record: &OwnershipRecord, host: &str, run: bool) -> Self {
        let ahead = match record.phase() {
            Phase::HandedOver | Phase::Released | Phase::Entered => 1,
            Phase::Returned => 2,
            _ => 0,
        };
        Self {
            vm_uid: record.vm_uid.clone(),
            migration_id: record.migration_id.clone(),
            epoch: record.epoch.saturating_sub(ahead),
            host: host.to_owned(),
            peer_host: record.peer_host.clone(),
            peer_address: record.peer_address.clone(),
            peer_store: record.peer_store.clone(),
            incarnation: record.incarnation,
            run,
        }
    }

    fn record(&self, phase: Phase, epoch: u64, owner: &str, digest: Option<Digest>) -> OwnershipRecord {
        OwnershipRecord {
            vm_uid: self.vm_uid.clone(),
            epoch,
            owner_host: owner.to_owned(),
            incarnation: self.incarnation,
            phase: phase.into(),
            migration_id: self.migration_id.clone(),
            peer_host: self.peer_host.clone(),
            peer_address: self.peer_address.clone(),
            digest: digest.map(|d| d.to_vec()).unwrap_or_default(),
            lsn: 0,
            peer_store: self.peer_store.clone(),
            forced: None,
        }
    }

    /// Epoch of the commit or of an abort.
    fn decided(&self) -> u64 {
        self.epoch.saturating_add(1)
    }

    /// Epoch of the return.
    fn returned(&self) -> u64 {
        self.epoch.saturating_add(2)
    }
}

/// What the other side's journal says, asked through Resolve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PeerAnswer {
    /// Not decided there, or the copy is not complete.
    Undecided,
    /// A complete copy waits there (destination only).
    Ready(Digest),
    /// The source has committed, or the destination has entered it. The digest if the answer had one.
    Committed(Option<Digest>),
    /// The source keeps it; or the destination has no copy: it was dropped, or its worker is dead.
    Aborted,
    /// The host that answers owns it after this migration: a source has aborted (or got it back), a destination has
    /// entered it.
    Owned,
    /// The destination has given it back.
    Returned,
    /// A later owner exists, at this epoch.
    Superseded(u64),
    /// Nothing is known of it there, or another store answered: no answer.
    Unknown,
    /// It did not answer before the deadline.
    Unreachable,
}
