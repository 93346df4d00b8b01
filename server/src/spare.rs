//! Worker processes that wait for a machine: started, confined, connected to and with the VM made but for its memory and
//! vCPUs before anybody asks for one, because that is most of what a process costs a start.
//!
//! ```text
//!   refill ──▶ made (run/spare…) ──claim──▶ a machine's worker: its directory is renamed to run/UID while it builds the
//!                      │                    machine ──both done──▶ lifeline dropped
//!                      │
//!                      └── daemon ends or dies: the lifeline breaks, it ends
//! ```
//! Invariants: a spare belongs to no machine and is never adopted; nothing of it that has no machine outlives its daemon; one that has died
//! while it waited is never handed out for a live one without the caller finding out (the first call fails as it would
//! with a worker of its own); making one never delays a start.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::worker_link::ACQUAINTED;
use crate::worker_process::{Processes, READY, WorkerProcess};

/// First characters of a spare's runtime directory; it is as long as a uid, and so is the path of its socket.
pub const PREFIX: &str = "spare";
/// Spares of one daemon at most.
pub const MAX: usize = 16;
/// A start gets the cores to itself for this long before the next spare is made.
const AFTER: Duration = Duration::from_millis(100);

/// A worker without a machine.
pub struct Spare {
    /// Its process.
    pub process: WorkerProcess,
    /// Breaks when the daemon ends; dropped once the worker has its machine.
    pub lifeline: OwnedFd,
    /// The connection to it, over which a call has gone already.
    pub channel: tonic::transport::Channel,
}

impl Spare {
    /// It takes no orders yet, and runs no vCPU.
    fn keep_to(&self, cores: &[u32]) {
        let pid = self.process.pid();
        if let Err(error) = vcpu_worker::host::affinity::set_process(pid, cores) {
            tracing::debug!(pid, %error, "affinity of a spare worker");
        }
    }
}

/// Those of one daemon.
#[derive(Default)]
pub struct Spares {
    wanted: usize,
    ready: Mutex<VecDeque<Spare>>,
    making: watch::Sender<bool>,
    closed: AtomicBool,
}

impl std::fmt::Debug for Spares {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Spares").field("wanted", &self.wanted).finish_non_exhaustive()
    }
}

impl Spares {
    /// So many are kept ready.
    pub fn new(wanted: usize) -> Self {
        Self { wanted: wanted.min(MAX), ..Self::default() }
    }

    fn ready(&self) -> std::sync::MutexGuard<'_, VecDeque<Spare>> {
        self.ready.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Moves those that wait to cores, as the daemon's own threads were. Blocks for a few system calls each.
    pub fn keep_to(&self, cores: &[u32]) {
        self.ready().iter().for_each(|spare| spare.keep_to(cores));
    }

    /// One of them, if there is one that lives. Must be called on a runtime.
    pub(crate) fn take(&self) -> Option<Spare> {
        loop {
            let spare = self.ready().pop_front()?;
            if spare.process.is_running() {
                return Some(spare);
            }
            // Reads and removes its directory.
            tokio::task::spawn_blocking(move || {
                let (pid, words) = (spare.process.pid(), spare.process.last_words());
                tracing::warn!(pid, "a spare worker has died: {words}");
                spare.process.bury();
            });
        }
    }
}

impl Processes {
    /// Makes what is missing, in a while. Must be called on a runtime.
    pub fn refill(self: &Arc<Self>) {
        let spares = &self.spares;
        let begin = |making: &mut bool| !std::mem::replace(making, true);
        if spares.wanted == 0 || !spares.making.send_if_modified(begin) {
            return;
        }
        let this = Arc::clone(self);
        tokio::spawn(async move {
            tokio::time::sleep(AFTER).await;
            let made = tokio::task::spawn_blocking({
                let this = Arc::clone(&this);
                move || {
                    while this.spares.ready().len() < this.spares.wanted {
                        if this.spares.closed.load(Ordering::Acquire) || !this.enabled {
                            break;
                        }
                        let spare = this.make_spare()?;
                        let pid = spare.process.pid();
                        let mut ready = this.spares.ready();
                        // The daemon's threads may have moved since it was forked; if they do from here on, it is there.
                        spare.keep_to(&vcpu_worker::host::allowed_cores());
                        ready.push_back(spare);
                        drop(ready);
                        tracing::info!("spare worker {pid} waits for a machine");
                    }
                    Ok::<_, std::io::Error>(())
                }
            });
            if let Err(error) = made.await.map_err(std::io::Error::other).and_then(std::convert::identity) {
                tracing::warn!(%error, "no spare worker: starts take longer");
            }
            this.spares.making.send_replace(false);
        });
    }

    /// Ends them all, and makes no more. Waits for one that is being made, whose directory nobody else would remove.
    pub async fn close_spares(&self) {
        self.spares.closed.store(true, Ordering::Release);
        let mut making = self.spares.making.subscribe();
        let _ = tokio::time::timeout(READY + ACQUAINTED + AFTER, making.wait_for(|making| !making)).await;
        let spares: Vec<_> = self.spares.ready().drain(..).collect();
        futures_util::future::join_all(spares.iter().map(|spare| spare.process.end())).await;
    }
}
