//! The worker's events, and the ends: the guest's, the worker's, and the daemon's.
//!
//! Invariants
//! - The end of a guest is durable before its worker, which is all else that tells of it, is ended.
//! - An event of an earlier start changes nothing.
//! - A worker that does not answer may live: it is never taken for dead.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vpmu_proto::api::VirtualMachine;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::worker::{GuestEnd, WorkerEvent, guest_end, worker_status};

use super::{Actor, restarting};
use crate::status::ApiError;
use crate::vm::command::Command;
use crate::worker_link::WorkerLink;

/// Bytes of a machine's message that tell how its guest ended: registers and instruction bytes fit.
const END_BYTES: usize = 1024;

/// What a machine's message says of it.
pub(super) fn end_message(end: &GuestEnd) -> String {
    format!("vCPU {}: {}", end.vcpu, crate::status::clip(&end.detail, END_BYTES))
}

impl Actor {
    /// Forwards the worker's events to the mailbox. One that does not answer may live, with the only copy: it is asked
    /// until it answers, or says by its end that it does not.
    pub(super) async fn follow_worker(&self, worker: &WorkerLink) -> Result<(), ApiError> {
        let first = match worker.watch_events().await {
            Err(error) if worker.may_live(&error).await => None,
            answer => Some(answer?),
        };
        let worker = worker.downgrade();
        let to_self = self.to_self.clone();
        let incarnation = self.ownership.incarnation;
        let shutdown = self.daemon.shutdown.clone();
        self.daemon.tasks.spawn(async move {
            let mut stream = first;
            loop {
                let next = async {
                    let stream = match &mut stream {
                        Some(stream) => stream,
                        None => stream.insert(worker.watch_until_answered().await?),
                    };
                    stream.message().await.map_err(|status| ApiError::from_status("worker", &status))
                };
                let event = tokio::select! {
                    () = shutdown.cancelled() => return,
                    event = next => event,
                };
                let (event, last) = match event {
                    Ok(Some(event)) => (event, false),
                    Ok(None) => (worker.death("the worker closed its event stream").await, true),
                    Err(error) => (worker.death(error.message()).await, true),
                };
                let Some(sender) = to_self.upgrade() else { return };
                if sender.send(Box::new(Command::Worker { incarnation, event })).await.is_err() || last {
                    return;
                }
            }
        });
        Ok(())
    }

    pub(super) async fn worker_event(&mut self, incarnation: u64, event: WorkerEvent) {
        let ended = event.state() == worker_status::State::Ended;
        if !ended || incarnation != self.ownership.incarnation || self.worker.is_none() {
            return;
        }
        if self.migration.is_some() {
            // The driver sees the end by its own calls; what is left of it is looked at when it is over. One is enough,
            // and is kept however many calls wait.
            if !self.deferred.iter().any(|command| matches!(command, Command::Worker { .. })) {
                self.deferred.push_back(Command::Worker { incarnation, event });
            }
            return;
        }
        let end = event.end.unwrap_or_default();
        // Asking waits for the process's end, which does not come where it was only the guest that ended.
        let dead = match &self.worker {
            Some(worker) if of_the_worker(&end) => worker.is_dead().await,
            _ => false,
        };
        let (state, reason) = ended_state(&end, dead);
        let message = end_message(&end);
        tracing::info!(vm = %self.name, reason, %message, "the guest ended");
        if let Err(error) = self.ended(state, reason, &message, |_| {}).await {
            tracing::error!(vm = %self.name, %error, "the guest's end could not be stored");
        }
    }

    /// The machine ended by itself. That is durable before the worker's runtime directory goes, which is all else that
    /// tells of it, and shown once the worker's resources are free.
    pub(super) async fn ended(
        &mut self,
        state: State,
        reason: &str,
        message: &str,
        edit: impl FnOnce(&mut VirtualMachine),
    ) -> Result<(), ApiError> {
        let worker = self.worker.take();
        self.edit(state, reason, message, |vm| {
            edit(vm);
            restarting::note_end(vm, state, reason);
        });
        let stored = self.daemon.store.put_vm(self.record()).await;
        self.worker = worker;
        self.retire_worker("stop").await;
        self.announce(Kind::Updated);
        Ok(stored?)
    }

    /// Ends the worker, keeping console and PMU state.
    pub(super) async fn retire_worker(&mut self, cause: &str) {
        let Some(worker) = self.worker.take() else { return };
        self.console = Arc::new(worker.console_history().await);
        let stored = match worker.shutdown().await {
            Ok(images) => self.store_pmu(images, &worker.cores(), cause).await,
            Err(error) => Err(error),
        };
        if let Err(error) = stored {
            tracing::warn!(vm = %self.name, %error, "the last PMU state could not be stored");
        }
    }

    /// The daemon ends, and in thread isolation the machine with it; in process isolation it goes on unless told otherwise.
    pub(super) async fn end(&mut self) {
        self.store_behind().await;
        let upgrading = self.daemon.upgrading.load(Ordering::SeqCst);
        let stays = self.worker.clone().filter(|worker| worker.outlives_daemon(upgrading));
        if let Some(worker) = stays {
            self.checkpoint().await;
            worker.keep();
        } else if self.worker.is_some() && matches!(self.state(), State::Running | State::Paused) {
            self.retire_worker("stop").await;
            let message = "vpmud was ended and the machine with it; start it again";
            let stored = self.change(State::Stopped, "HOST_RESTARTED", message, Kind::Updated, |_| {}).await;
            if let Err(error) = stored {
                tracing::error!(vm = %self.name, %error, "the stop could not be stored");
            }
        } else if let Some(worker) = self.worker.take() {
            worker.end().await;
        }
        self.gone = true;
    }
}

/// The worker said, or left to be guessed, that it was not the guest that ended.
fn of_the_worker(end: &GuestEnd) -> bool {
    matches!(end.kind(), guest_end::Kind::WorkerError | guest_end::Kind::Unspecified)
}

/// What a guest's end makes of its machine. `dead`: the worker's process has ended too.
pub(crate) fn ended_state(end: &GuestEnd, dead: bool) -> (State, &'static str) {
    match end.kind() {
        guest_end::Kind::Shutdown => (State::Stopped, "GUEST_SHUTDOWN"),
        guest_end::Kind::Reset => (State::Stopped, "GUEST_RESET"),
        guest_end::Kind::TripleFault => (State::Failed, "GUEST_TRIPLE_FAULT"),
        guest_end::Kind::InternalError => (State::Failed, "HYPERVISOR_INTERNAL_ERROR"),
        guest_end::Kind::SeccompViolation => (State::Failed, "SECCOMP_VIOLATION"),
        guest_end::Kind::PostcopySourceLost => (State::Failed, "POSTCOPY_SOURCE_LOST"),
        guest_end::Kind::WorkerError | guest_end::Kind::Unspecified if dead => (State::Failed, "WORKER_DIED"),
        guest_end::Kind::WorkerError | guest_end::Kind::Unspecified => (State::Failed, "WORKER_FAILED"),
    }
}

pub(crate) fn worker_died(detail: &str) -> WorkerEvent {
    WorkerEvent {
        state: worker_status::State::Ended as i32,
        end: Some(GuestEnd {
            kind: guest_end::Kind::WorkerError as i32,
            vcpu: 0,
            detail: crate::status::clip(detail, 256),
        }),
    }
}
