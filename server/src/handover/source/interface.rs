//! What the source is told, what it tells its driver to do, and how it may end.

use super::super::force::Claim;
use super::super::{Digest, PeerAnswer};
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

/// What happened. See the driver's table in [`crate::handover`].
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
    /// This host takes it, by evidence that [`crate::handover::force`] has judged.
    Forced(Claim),
}

/// What to do. See the driver's table in [`crate::handover`].
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
