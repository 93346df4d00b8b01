//! What the destination is told, what it tells its driver to do, and how it may end.

use super::super::force::Claim;
use super::super::{Digest, PeerAnswer};
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

/// What happened. See the driver's table in [`crate::handover`].
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
    /// This host takes it, by evidence that [`crate::handover::force`] has judged.
    Forced(Claim),
}

/// What to do. See the driver's table in [`crate::handover`].
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
