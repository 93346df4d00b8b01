//! The source's end of a migration as the service holds it: begun, watched, told to finish or to stop.
//!
//! A thread of its own does the work ([`driver`]); here are its orders and what it lets be seen. Dropping this does not
//! stop it.

mod driver;

use std::sync::atomic::Ordering;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};
use vpmu_proto::worker::{FinishMigrationResponse, MigrateOutProgress, WaitDrainedResponse};

use self::driver::Driver;
use super::Thread;
use crate::dataplane::precopy::Goals;
use crate::dataplane::{CancelFlag, Compression, DataAddress, SendProgress, SessionId, Tls};
use crate::error::WorkerError;
use crate::machine::Machine;
use crate::memory::PAGE_SIZE;

/// What is to be moved where.
pub struct Source {
    /// The machine.
    pub machine: Arc<Machine>,
    /// Migration, attempt, secret.
    pub session: SessionId,
    /// The destination's listener.
    pub address: DataAddress,
    /// Data connections.
    pub connections: u16,
    /// The memory itself is handed over; no page is copied.
    pub local: bool,
    /// When to stop.
    pub goals: Goals,
    /// Bytes a second; 0 for no bound.
    pub bandwidth: u64,
    /// TLS on the data connections.
    pub tls: Option<Tls>,
    /// Compression of pages.
    pub compression: Compression,
    /// vCPUs may be slowed down while it does not converge.
    pub allow_throttle: bool,
    /// It may end as post-copy where pre-copy cannot meet the goals.
    pub allow_postcopy: bool,
    /// It ends as post-copy after the first round.
    pub postcopy: bool,
    /// Post-copy: how long the destination waits for a source that lost its connection.
    pub recover: Duration,
    /// Seals the worker at an epoch.
    pub seal: Box<dyn Fn(u64) + Send>,
    /// For talking to vCPU threads.
    pub runtime: Handle,
}

/// What watchers see.
#[derive(Debug, Clone)]
pub enum OutgoingState {
    /// Copying; the last report.
    Copying(MigrateOutProgress),
    /// The destination has everything.
    Finished,
    /// Failed or cancelled.
    Failed(Arc<WorkerError>),
}

/// The order to finish.
pub(super) struct FinishOrder {
    /// Epoch to seal.
    pub(super) epoch: u64,
    /// Where the answer goes.
    pub(super) reply: oneshot::Sender<Result<FinishMigrationResponse, WorkerError>>,
}

/// One migration at its source.
pub struct OutgoingMigration {
    id: String,
    cancel: CancelFlag,
    orders: Mutex<Sender<FinishOrder>>,
    state: watch::Sender<OutgoingState>,
    sending: Arc<OnceLock<Arc<SendProgress>>>,
    thread: Thread,
}

impl OutgoingMigration {
    /// Starts it.
    pub fn start(id: &str, source: Source) -> Result<Arc<Self>, WorkerError> {
        let cancel = CancelFlag::new();
        let (orders, taken) = channel();
        let memory_bytes = source.machine.memory().bytes();
        let state = watch::Sender::new(OutgoingState::Copying(MigrateOutProgress {
            memory_bytes,
            bytes_remaining: memory_bytes,
            ..Default::default()
        }));
        let sending = Arc::new(OnceLock::new());
        let thread = Thread::spawn("vpmud-out", {
            let driver = Driver {
                id: id.to_owned(),
                source,
                cancel: cancel.clone(),
                orders: taken,
                state: state.clone(),
                sending: Arc::clone(&sending),
            };
            let (id, state) = (id.to_owned(), state.clone());
            move || {
                let end = match driver.run() {
                    Ok(()) => OutgoingState::Finished,
                    Err(error) => {
                        tracing::info!(migration = id, %error, "outgoing migration ended");
                        OutgoingState::Failed(Arc::new(error))
                    }
                };
                state.send_replace(end);
            }
        })?;
        Ok(Arc::new(Self { id: id.to_owned(), cancel, orders: Mutex::new(orders), state, sending, thread }))
    }

    /// Migration id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Follows it.
    pub fn watch(&self) -> watch::Receiver<OutgoingState> {
        self.state.subscribe()
    }

    /// The last report, with the numbers of the round that is under way.
    pub fn progress(&self, last: &MigrateOutProgress) -> MigrateOutProgress {
        let mut progress = last.clone();
        if let Some(sending) = self.sending.get() {
            let left = sending
                .round_pages
                .load(Ordering::Relaxed)
                .saturating_sub(sending.round_done.load(Ordering::Relaxed));
            progress.round = progress.round.max(sending.round.load(Ordering::Relaxed));
            progress.bytes_sent = progress.bytes_sent.max(sending.bytes.load(Ordering::Relaxed));
            if left > 0 {
                progress.bytes_remaining = left.saturating_mul(PAGE_SIZE);
            }
        }
        progress
    }

    /// Whether it has failed or was cancelled: the machine takes part in it no longer.
    pub fn is_over(&self) -> bool {
        matches!(&*self.state.borrow(), OutgoingState::Failed(_))
    }

    /// Whether the destination has everything.
    pub fn is_finished(&self) -> bool {
        matches!(&*self.state.borrow(), OutgoingState::Finished)
    }

    /// Waits until it is over, at most `within`; none if it is not. An error that came after the answer says that not
    /// all memory has followed.
    pub async fn over(&self, within: Duration) -> Option<Result<(), Arc<WorkerError>>> {
        let mut state = self.state.subscribe();
        let over = state.wait_for(|state| !matches!(state, OutgoingState::Copying(_)));
        match tokio::time::timeout(within, over).await.ok()?.ok()?.clone() {
            OutgoingState::Failed(error) => Some(Err(error)),
            _ => Some(Ok(())),
        }
    }

    /// Post-copy: how far serving is.
    pub fn following(&self) -> WaitDrainedResponse {
        let Some(sending) = self.sending.get() else { return WaitDrainedResponse::default() };
        WaitDrainedResponse {
            missing_pages: sending.left.load(Ordering::Relaxed),
            bytes: sending.bytes.load(Ordering::Relaxed),
            ..WaitDrainedResponse::default()
        }
    }

    /// Whether its thread has ended.
    pub fn is_ended(&self) -> bool {
        self.thread.is_ended()
    }

    /// Stops the machine, seals it at `epoch`, sends the rest and waits until the destination has set it.
    pub async fn finish(&self, epoch: u64) -> Result<FinishMigrationResponse, WorkerError> {
        let (reply, answer) = oneshot::channel();
        let sent = {
            let orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
            orders.send(FinishOrder { epoch, reply }).is_ok()
        };
        let gone = || WorkerError::Migration {
            id: self.id.clone(),
            reason: "MIGRATION_ENDED",
            message: match &*self.state.borrow() {
                OutgoingState::Failed(error) => format!("it has ended: {error}"),
                _ => "it has ended".to_owned(),
            },
        };
        if !sent {
            return Err(gone());
        }
        answer.await.unwrap_or_else(|_| Err(gone()))
    }

    /// Gives up; the machine goes on if it was not sealed.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// Waits for its thread.
    pub async fn joined(&self) {
        self.thread.joined().await;
    }
}
