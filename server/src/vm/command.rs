//! What a VM actor is asked.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use vpmu_proto::api::{CpuPlacement, VirtualMachine};
use vpmu_proto::store::{Forced, OwnershipRecord, VmRecord};
use vpmu_proto::worker::{PmuImage, RestoreFrom, WorkerEvent};

use crate::handover::force::Claim;
use crate::ops::Seed;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// A plain answer.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// A command on its way: small, because a channel has room for 32 from the start, and every machine has a channel.
pub type Mail = Box<Command>;

/// One command in an actor's mailbox.
pub enum Command {
    /// First command of a new machine.
    Create {
        /// Its operation.
        seed: Seed,
        /// Start it at once.
        start: bool,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// First command of a machine that comes from a snapshot.
    Restore {
        /// Where from.
        from: RestoreFrom,
        /// Leave it paused.
        paused: bool,
        /// Its operation.
        seed: Seed,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// Write it to a file.
    Snapshot {
        /// The file's name.
        file: String,
        /// Its operation.
        seed: Seed,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// Start.
    Start {
        /// Its operation.
        seed: Seed,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// Stop.
    Stop {
        /// Its operation.
        seed: Seed,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// Delete.
    Delete {
        /// If not empty, must be the current one.
        etag: String,
        /// Its operation.
        seed: Seed,
        /// The operation's id.
        reply: Reply<Uuid>,
    },
    /// Pause.
    Pause {
        /// The machine after it.
        reply: Reply<VirtualMachine>,
    },
    /// Resume.
    Resume {
        /// The machine after it.
        reply: Reply<VirtualMachine>,
    },
    /// Give its vCPUs other cores.
    Place {
        /// What is asked for, judged already.
        placement: CpuPlacement,
        /// If not empty, must be the current one.
        etag: String,
        /// The machine after it.
        reply: Reply<VirtualMachine>,
    },
    /// The guest or KVM did something.
    Worker {
        /// Which worker says so.
        incarnation: u64,
        /// What.
        event: WorkerEvent,
    },
    /// A migration away wants to begin.
    BeginMigration {
        /// Full name.
        name: String,
        /// Asks it to stop.
        cancel: CancellationToken,
        /// Set at the commit.
        committed: Arc<AtomicBool>,
        /// What the driver needs.
        reply: Reply<Lease>,
    },
    /// A migration away is over.
    EndMigration {
        /// How.
        outcome: Outcome,
        /// Done.
        reply: Reply<()>,
    },
    /// A machine begins to arrive.
    Receive {
        /// What was announced.
        record: Box<VmRecord>,
        /// Journalled right after it is admitted.
        ownership: OwnershipRecord,
        /// Admitted and journalled.
        reply: Reply<()>,
    },
    /// It has arrived and runs, or is paused.
    Adopt {
        /// What it is made of.
        arrival: Box<Arrival>,
        /// Durable.
        reply: Reply<()>,
    },
    /// It has another worker on this host, which runs it, or holds it paused, or has not said so yet.
    Renewed {
        /// The worker.
        worker: WorkerLink,
        /// The record that names it.
        ownership: OwnershipRecord,
        /// PMU images as restored.
        images: Vec<PmuImage>,
        /// It has answered its grant; one that has not is asked on.
        heard: bool,
        /// Durable.
        reply: Reply<()>,
    },
    /// It did not arrive.
    DropIncoming {
        /// What the journal says now.
        ownership: OwnershipRecord,
        /// Gone.
        reply: Reply<()>,
    },
    /// This host takes it by force, without a copy.
    Force {
        /// At this epoch.
        claim: Claim,
        /// Why, for the journal.
        note: Forced,
        /// Durable.
        reply: Reply<()>,
    },
    /// Another host owns it by force.
    Yield {
        /// At this epoch.
        epoch: u64,
        /// That host's id.
        owner: String,
        /// It has ended here, durably.
        reply: Reply<()>,
    },
    /// Its worker outlived the last daemon, or did not.
    Reattach {
        /// What was found.
        survivor: Box<crate::adopt::Survivor>,
        /// Shown as what it is.
        reply: Reply<()>,
    },
    /// The store takes writes again after it did not: what is shown is stored.
    StoreAgain {
        /// Durable.
        reply: Reply<()>,
    },
    /// The daemon ends.
    End {
        /// The machine has stopped and its state is durable.
        reply: oneshot::Sender<()>,
    },
}

/// What a source driver works with.
pub struct Lease {
    /// The record, PMU shape included.
    pub record: VmRecord,
    /// The worker.
    pub worker: WorkerLink,
    /// Ownership at the beginning.
    pub ownership: OwnershipRecord,
    /// It was paused by the user.
    pub paused: bool,
}

/// How a migration away ended.
pub enum Outcome {
    /// It stays: owned here at this record, running or paused as before, or without a worker if that has died.
    Stayed {
        /// Ownership now.
        ownership: OwnershipRecord,
        /// The worker is gone: why.
        lost: Option<ApiError>,
    },
    /// The daemon ends in the middle: the worker and the records stay as they are for the next one.
    Left,
    /// It went.
    Moved {
        /// Ownership now.
        ownership: OwnershipRecord,
        /// The destination's host id.
        moved_to: String,
    },
}

/// A machine that has arrived.
pub struct Arrival {
    /// The record as it goes on here.
    pub record: VmRecord,
    /// The worker that runs it.
    pub worker: WorkerLink,
    /// Entered.
    pub ownership: OwnershipRecord,
    /// PMU images as restored.
    pub images: Vec<PmuImage>,
    /// It stays paused.
    pub paused: bool,
    /// It is owned here, but its worker cannot run it: why.
    pub lost: Option<ApiError>,
}
