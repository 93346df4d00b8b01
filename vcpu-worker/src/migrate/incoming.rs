//! The destination's end.
//!
//! ```text
//! Receiving ──all arrived, state set──▶ Ready ──grant──▶ Entered          (post-copy: the rest of memory: `following`)
//!     └──error, cancel──▶ Failed
//! ```
//!
//! Ready is a promise: from there on only the owner ends it. A failure leaves memory and vCPUs in an unknown state, so
//! nothing runs and the worker is shut down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pmu::RestorePolicy;
use prost::Message as _;
use tokio::runtime::Handle;
use tokio::sync::watch;
use vpmu_proto::worker::{IncomingProgress, VmState};

use super::following::Following;
use super::{Thread, failed};
use crate::dataplane::frame::Kind;
use crate::dataplane::{
    CancelFlag, DataAddress, Incoming, PROTOCOL_VERSIONS, Received, SessionId, Timeouts, Tls,
};
use crate::error::WorkerError;
use crate::lazy::Faults;
use crate::machine::Machine;
use crate::machine::snapshot::PmuArrival;

/// Where a destination is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Memory arrives.
    Receiving,
    /// Complete; only the grant is missing.
    Ready,
    /// Granted: the copy is the VM.
    Entered,
    /// It failed.
    Failed,
}

/// What watchers see.
#[derive(Debug, Clone)]
pub enum IncomingState {
    /// Memory arrives.
    Receiving,
    /// Complete, and whether it was granted since.
    Ready(IncomingProgress, bool),
    /// Failed.
    Failed(Arc<WorkerError>),
}

/// How memory comes in.
pub struct Door {
    /// Data connections.
    pub connections: u16,
    /// They are encrypted.
    pub tls: Option<Tls>,
    /// The memory itself is handed over first; then state alone comes.
    pub local: bool,
    /// How long a lost source may take to come back.
    pub recover: Duration,
    /// What happens to PMU state that does not fit.
    pub pmu: RestorePolicy,
}

/// One migration at its destination.
pub struct IncomingMigration {
    id: String,
    cancel: CancelFlag,
    bytes: Arc<AtomicU64>,
    state: watch::Sender<IncomingState>,
    /// The source's worker has ended.
    gone: Arc<AtomicBool>,
    thread: Thread,
}

impl IncomingMigration {
    /// Opens the listener and starts receiving; returns the listener's address. Blocks for a moment: not for a runtime's
    /// worker thread.
    pub fn start(
        id: &str,
        session: SessionId,
        listen: &DataAddress,
        door: Door,
        machine: Arc<Machine>,
        runtime: Handle,
    ) -> Result<(Arc<Self>, String), WorkerError> {
        let Door { connections, tls, local, recover, pmu } = door;
        // Opened here: the receiving thread opens no files.
        let faults = if local || machine.memory().is_hugetlb() { None } else { Faults::open().ok() };
        let newest = if faults.is_some() { *PROTOCOL_VERSIONS.end() } else { Kind::Want.since() - 1 };
        let mut incoming = Incoming::bind(listen, session, connections, machine.memory().clone())
            .map_err(|e| failed(id, &e))?
            .with_timeouts(Timeouts { recover, ..Timeouts::default() })
            .with_versions(*PROTOCOL_VERSIONS.start()..=newest);
        if let Some(tls) = tls {
            incoming = incoming.with_tls(tls);
        }
        let address = incoming.local_address().map_err(|e| failed(id, &e))?.to_string();
        let cancel = CancelFlag::new();
        let bytes = Arc::new(AtomicU64::new(0));
        let state = watch::Sender::new(IncomingState::Receiving);
        let gone = Arc::new(AtomicBool::new(false));
        let thread = Thread::spawn("vpmud-in", {
            let (id, cancel, bytes, state, gone) =
                (id.to_owned(), cancel.clone(), Arc::clone(&bytes), state.clone(), Arc::clone(&gone));
            move || {
                let mapped = if local { incoming.receive_memory(&cancel) } else { Ok(()) };
                let received = mapped.map_err(|e| failed(&id, &e)).and_then(|()| {
                    receive(&id, (incoming, faults), cancel, (&bytes, &gone), (&machine, pmu), &runtime)
                });
                let (ready, mut received, arriving) = match received {
                    Ok(received) => received,
                    Err(error) => {
                        tracing::warn!(migration = id, %error, "incoming migration failed");
                        state.send_replace(IncomingState::Failed(Arc::new(error)));
                        return;
                    }
                };
                match &arriving {
                    Some(pages) => pages.applied(),
                    // The state stays set if this is lost: the control planes decide over their own connection.
                    None => {
                        if let Err(error) = received.acknowledge() {
                            tracing::warn!(migration = id, %error, "the source was not told that the state is set");
                        }
                    }
                }
                state.send_replace(IncomingState::Ready(ready, false));
                // The guest stands still: who waits for this goes on before anything here is put in order.
                std::thread::yield_now();
                drop(received);
                if let Some(pages) = arriving {
                    pages.wait(&runtime);
                }
            }
        })?;
        Ok((Arc::new(Self { id: id.to_owned(), cancel, bytes, state, gone, thread }), address))
    }

    /// Migration id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it is.
    pub fn phase(&self) -> Phase {
        match &*self.state.borrow() {
            IncomingState::Receiving => Phase::Receiving,
            IncomingState::Ready(_, false) => Phase::Ready,
            IncomingState::Ready(_, true) => Phase::Entered,
            IncomingState::Failed(_) => Phase::Failed,
        }
    }

    /// Bytes received so far.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Follows it.
    pub fn watch(&self) -> watch::Receiver<IncomingState> {
        self.state.subscribe()
    }

    /// A grant has come; returns whether it was the first.
    pub fn enter(&self) -> bool {
        self.state.send_if_modified(|state| match state {
            IncomingState::Ready(_, entered) if !*entered => {
                *entered = true;
                true
            }
            _ => false,
        })
    }

    /// Gives up receiving; does nothing to a complete copy. One whose pages are still coming ends its guest.
    pub fn cancel(&self) {
        self.cancel.cancel();
    }

    /// The source's worker has ended: pages that it has not sent are lost, and are not waited for.
    pub fn forget_source(&self) {
        self.gone.store(true, Ordering::Release);
    }

    /// Waits for its thread.
    pub async fn joined(&self) {
        self.thread.joined().await;
    }
}

fn receive(
    id: &str,
    (incoming, faults): (Incoming, Option<Faults>),
    cancel: CancelFlag,
    (bytes, gone): (&AtomicU64, &Arc<AtomicBool>),
    (machine, policy): (&Arc<Machine>, RestorePolicy),
    runtime: &Handle,
) -> Result<(IncomingProgress, Received, Option<Following>), WorkerError> {
    let mut received = incoming.run(cancel, bytes).map_err(|e| failed(id, &e))?;
    let begin = Instant::now();
    let (pmu, pages) = match set(id, &mut received, (faults, gone), (machine, policy), runtime) {
        Ok(set) => set,
        Err(error) => {
            received.reject(&error.to_string());
            return Err(error);
        }
    };
    let restore_us = micros(begin.elapsed());
    let progress = IncomingProgress {
        bytes_received: received.bytes,
        ready: true,
        state_digest: received.digest.to_vec(),
        pmu: pmu.images,
        restore_us,
        pmu_losses: pmu.losses,
        pmu_losses_total: pmu.total,
    };
    Ok((progress, received, pages))
}

type Set = (PmuArrival, Option<Following>);

fn set(
    id: &str,
    received: &mut Received,
    (faults, gone): (Option<Faults>, &Arc<AtomicBool>),
    (machine, policy): (&Arc<Machine>, RestorePolicy),
    runtime: &Handle,
) -> Result<Set, WorkerError> {
    let mut state = VmState::decode(received.state.as_slice())
        .map_err(|e| WorkerError::BadState { field: "VmState", problem: e.to_string() })?;
    let missing = std::mem::take(&mut state.missing_pages);
    if missing.is_empty() {
        return Ok((runtime.block_on(machine.restore_under(state, policy))?, None));
    }
    // Before the state: setting it may touch memory, which then has to come.
    let pages = Following::begin(id, received, &missing, faults, gone, machine, runtime)?;
    match runtime.block_on(machine.restore_under(state, policy)) {
        Ok(pmu) => Ok((pmu, Some(pages))),
        Err(error) => {
            pages.reject(&error.to_string(), runtime);
            Err(error)
        }
    }
}

/// Microseconds, as figures are reported.
pub(super) fn micros(d: Duration) -> u64 {
    u64::try_from(d.as_micros()).unwrap_or(u64::MAX)
}
