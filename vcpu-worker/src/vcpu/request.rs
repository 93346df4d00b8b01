//! What other threads ask of a vCPU thread, and how they get the answer.

use std::sync::Arc;

use tokio::sync::oneshot;
use vpmu_proto::worker::StatePiece;

use crate::cores::{CoreSlot, Prepared};
use crate::error::WorkerError;
use crate::hypervisor::InitialRegs;

/// The answer's way back; the receiver may be awaited on a runtime or blocked on elsewhere.
pub type Reply<T> = oneshot::Sender<Result<T, WorkerError>>;

/// The receiving end of a [`Reply`].
pub type Answer<T> = oneshot::Receiver<Result<T, WorkerError>>;

/// State pieces and the PMU's image, if the guest has a PMU.
pub type Saved = (Vec<StatePiece>, Option<pmu::Image>);

/// The kinds of requests, for the state table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestKind {
    /// Enter the guest.
    Run,
    /// Leave the guest and put the PMU.
    Pause,
    /// Look at the PMU.
    Look,
    /// Read the state.
    Save,
    /// Write the state.
    Load,
    /// Go to another core.
    Place,
    /// Compare the core's registers with what is known.
    Audit,
    /// End the thread.
    Stop,
}

/// What a vCPU is loaded with.
#[derive(Debug)]
pub enum LoadFrom {
    /// A start state; the vCPU becomes runnable.
    Initial(Box<InitialRegs>),
    /// Saved state and PMU image.
    Saved {
        /// Pieces in the order in which they must be set.
        pieces: Vec<StatePiece>,
        /// PMU.
        pmu: Option<Box<pmu::Image>>,
    },
}

/// Where a vCPU thread is to be.
pub struct Place {
    /// Core to be pinned to and to count on.
    pub slot: Arc<CoreSlot>,
    /// What it needs to count there; none where it is already.
    pub prepared: Option<Prepared>,
    /// SCHED_FIFO priority; none for the ordinary scheduler.
    pub fifo: Option<u8>,
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Place(core {}, fifo {:?})", self.slot.id(), self.fifo)
    }
}

/// A request. Dropping the receiver of its answer is allowed; the request is done all the same.
#[derive(Debug)]
pub enum Request {
    /// Enter the guest; answered at the loop head with CLOCK_MONOTONIC nanoseconds, right before the first entry.
    Run(Reply<u64>),
    /// Leave the guest and put the PMU; answered with the image.
    Pause(Option<Reply<Option<pmu::Image>>>),
    /// The PMU's image now.
    Look(Reply<Option<pmu::Image>>),
    /// State pieces and the PMU's image.
    Save(Reply<Saved>),
    /// Sets state; answered with the PMU's image as read back.
    Load(LoadFrom, Reply<Option<pmu::Image>>),
    /// Go to another core, PMU put; answered with the core that the kernel says.
    Place(Box<Place>, Reply<u32>),
    /// Look for registers of the core that somebody else wrote, PMU put.
    Audit(Reply<Vec<pmu::core::ForeignWrite>>),
    /// End the thread; answered with the last image.
    Stop(Option<Reply<Option<pmu::Image>>>),
}

impl Request {
    /// Its kind.
    pub fn kind(&self) -> RequestKind {
        match self {
            Self::Run(_) => RequestKind::Run,
            Self::Pause(_) => RequestKind::Pause,
            Self::Look(_) => RequestKind::Look,
            Self::Save(_) => RequestKind::Save,
            Self::Load(..) => RequestKind::Load,
            Self::Place(..) => RequestKind::Place,
            Self::Audit(_) => RequestKind::Audit,
            Self::Stop(_) => RequestKind::Stop,
        }
    }

    /// Answers with an error.
    pub fn refuse(self, error: WorkerError) {
        // A receiver that has gone away no longer wants to know.
        match self {
            Self::Run(reply) => drop(reply.send(Err(error))),
            Self::Pause(reply) | Self::Stop(reply) => {
                if let Some(reply) = reply {
                    drop(reply.send(Err(error)));
                }
            }
            Self::Look(reply) | Self::Load(_, reply) => drop(reply.send(Err(error))),
            Self::Save(reply) => drop(reply.send(Err(error))),
            Self::Place(_, reply) => drop(reply.send(Err(error))),
            Self::Audit(reply) => drop(reply.send(Err(error))),
        }
    }
}
