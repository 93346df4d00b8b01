//! Snapshots: a machine written to a file, and a machine made from one.
//!
//! A machine that runs is paused for as long as the writing takes and goes on afterwards whatever came of it; commands
//! wait in the mailbox meanwhile. A restored machine is a new one: uid, ownership record and epoch 1 of its own.

use std::time::{Duration, Instant};

use uuid::Uuid;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::api::{OperationMetadata, Snapshot};
use vpmu_proto::worker::{RestoreFrom, SnapshotManifest, SnapshotProgress};

use super::Actor;
use crate::ops::{Running, Seed, now, pack};
use crate::status::ApiError;
use crate::vm::command::Reply;
use crate::vm::transitions::Action;
use crate::worker_link::WorkerLink;

/// A writer that says nothing for this long is given up; it speaks every 50 ms, also while the disk is slow.
const SILENCE: Duration = Duration::from_secs(60);

impl Actor {
    pub(super) async fn snapshot(&mut self, file: &str, seed: Seed, reply: Reply<Uuid>) {
        let admitted = self.admit(Action::Snapshot);
        let worker = match (admitted, self.worker.clone()) {
            (Ok(_), Some(worker)) => worker,
            (Ok(_), None) => {
                let _ = reply.send(Err(self.refuse(Action::Snapshot)));
                return;
            }
            (Err(error), _) => {
                let _ = reply.send(Err(error));
                return;
            }
        };
        let Some(running) = self.begin(seed, reply).await else { return };
        let taken = self.do_snapshot(file, &worker, &running).await;
        running.finish(taken.map(|snapshot| pack("Snapshot", &snapshot))).await;
    }

    async fn do_snapshot(
        &mut self,
        file: &str,
        worker: &WorkerLink,
        running: &Running,
    ) -> Result<Snapshot, ApiError> {
        let ran = self.state() == State::Running;
        let (begin, create_time) = (Instant::now(), now());
        let paused = if ran { worker.pause().await.map(drop) } else { Ok(()) };
        let written = match paused {
            Ok(()) => self.write(file, worker, running).await,
            Err(error) => Err(error),
        };
        if ran && let Err(error) = worker.run().await {
            // It has ended, of which an event is on its way, or is paused and shown so.
            tracing::error!(vm = %self.name, %error, "it does not go on after a snapshot");
            let (reason, message) = (error.reason().to_owned(), error.message().to_owned());
            let edit = |vm: &mut vpmu_proto::api::VirtualMachine| vm.set_desired_state(DesiredState::Paused);
            self.change(State::Paused, &reason, &message, Kind::Updated, edit).await?;
        }
        let written = written?;
        let pause_us = if ran { u64::try_from(begin.elapsed().as_micros()).unwrap_or(u64::MAX) } else { 0 };
        Ok(Snapshot {
            file: file.to_owned(),
            virtual_machine: self.name.to_string(),
            vm_uid: self.vm.uid.clone(),
            memory_bytes: self.vm.spec.as_ref().map_or(0, |s| s.memory_bytes),
            file_bytes: written.file_bytes,
            pages: written.pages,
            pause_us,
            create_time: Some(create_time),
        })
    }

    async fn write(
        &self,
        file: &str,
        worker: &WorkerLink,
        running: &Running,
    ) -> Result<SnapshotProgress, ApiError> {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        let manifest = SnapshotManifest {
            vm_name: self.name.to_string(),
            vm_uid: self.vm.uid.clone(),
            create_time_ns: i64::try_from(since.as_nanos()).unwrap_or(i64::MAX),
            spec: self.vm.spec.clone(),
            pmu_shape: self.shape.clone(),
            ..SnapshotManifest::default()
        };
        let path = self.daemon.snapshot_dir.join(file);
        let cancelled = running.cancellable();
        let mut stream = worker.save_snapshot(path.to_string_lossy().into_owned(), manifest).await?;
        let create_time = Some(now());
        loop {
            let message = tokio::select! {
                () = cancelled.cancelled() => {
                    return Err(ApiError::cancelled("CANCELLED", "the snapshot was cancelled; no file is left"));
                }
                () = self.daemon.shutdown.cancelled() => return Err(ApiError::shutting_down()),
                message = tokio::time::timeout(SILENCE, stream.message()) => message,
            };
            let progress = match message {
                Ok(Ok(Some(progress))) => progress,
                Ok(Ok(None)) => {
                    return Err(ApiError::internal(
                        "WORKER_PROTOCOL",
                        "the worker ended a snapshot without a word",
                    ));
                }
                Ok(Err(status)) => return Err(ApiError::from_status("worker", &status)),
                Err(_) => {
                    let message = "the worker says nothing of the snapshot any more; ask again";
                    return Err(ApiError::unavailable("WORKER_TIMEOUT", message));
                }
            };
            if progress.done {
                return Ok(progress);
            }
            let metadata = OperationMetadata {
                target: self.name.to_string(),
                verb: "snapshot".to_owned(),
                create_time,
                end_time: None,
                bytes_done: progress.bytes_done,
                bytes_total: progress.bytes_total,
            };
            running.progress(pack("OperationMetadata", &metadata));
        }
    }

    pub(super) async fn restore(&mut self, from: RestoreFrom, paused: bool, seed: Seed, reply: Reply<Uuid>) {
        let Some(running) = self.begin(seed, reply).await else {
            self.forget();
            return;
        };
        if let Err(error) = self.do_create().await {
            self.forget();
            running.finish(Err(error)).await;
            return;
        }
        match self.do_restore(from, paused).await {
            Ok(()) => running.finish(Ok(self.answer())).await,
            Err(error) => {
                if let Some(worker) = self.worker.take() {
                    worker.end().await;
                }
                if let Err(error) = self.do_delete().await {
                    tracing::error!(vm = %self.name, %error, "the record of a machine that could not be restored stays");
                }
                self.forget();
                running.finish(Err(error)).await;
            }
        }
    }

    async fn do_restore(&mut self, from: RestoreFrom, paused: bool) -> Result<(), ApiError> {
        self.show(State::Starting);
        let spec = self.vm.spec.clone().unwrap_or_default();
        let grant = self.daemon.capacity.grant(self.name.vm(), &spec)?;
        self.launch_and_run(grant, &spec, Some(from), !paused).await?;
        let (state, desired) = if paused {
            (State::Paused, DesiredState::Paused)
        } else {
            (State::Running, DesiredState::Running)
        };
        self.change(state, "", "", Kind::Updated, |vm| vm.set_desired_state(desired)).await
    }
}
