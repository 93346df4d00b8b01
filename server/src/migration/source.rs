//! The source: from the request to the sealed copy, or back to where it was. What follows is in `source_commit`.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tonic::Streaming;
use uuid::Uuid;
use vpmu_proto::api::migration::State;
use vpmu_proto::api::{Migration, MigrationProgress, MigrationSpec};
use vpmu_proto::peer::source_message::{self, Message as FromSource};
use vpmu_proto::peer::{
    DestinationMessage, PrepareRequest, Requirements, SourceMessage, destination_message,
};
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{MigrationRecord, OwnershipRecord};
use vpmu_proto::worker::{FinishMigrationResponse, MigrateOutRequest};

use super::outcome;
use crate::daemon::Daemon;
use crate::ops::{Running, pack};
use crate::peer::{Peer, VERSION};
use crate::status::ApiError;
use crate::vm::command::{Command, Lease};
use crate::vm::registry::VmHandle;

/// Goal if none is given.
const MAX_BLACKOUT: Duration = Duration::from_millis(300);
/// Bound on pre-copy if none is given.
const MAX_DURATION: Duration = Duration::from_secs(600);
/// Bound on the stop: final pages, state, receipt.
const FINISH: Duration = Duration::from_secs(60);
/// Bound on the destination's Ready once the source has sent everything.
const READY: Duration = Duration::from_secs(30);
/// How long the destination's clean-up after an abort is waited for.
const ABORTED: Duration = Duration::from_secs(3);
/// Messages on the way to the destination.
const OUTBOX: usize = 8;

/// One migration away from here.
pub(super) struct Source {
    pub(super) daemon: Arc<Daemon>,
    pub(super) handle: VmHandle,
    pub(super) lease: Lease,
    pub(super) ownership: OwnershipRecord,
    pub(super) peer: Peer,
    pub(super) requirements: Requirements,
    pub(super) destination_host: String,
    pub(super) id: Uuid,
    pub(super) spec: MigrationSpec,
    pub(super) accepted: Instant,
    pub(super) cancel: CancellationToken,
    pub(super) committed: Arc<AtomicBool>,
    pub(super) progress: watch::Sender<Migration>,
    pub(super) running: Running,
}

/// The stream to the destination.
pub(super) struct Conversation {
    pub(super) to: mpsc::Sender<SourceMessage>,
    pub(super) from: Streaming<DestinationMessage>,
}

/// The copy is complete at both ends and sealed here.
pub(super) struct Sealed {
    pub(super) finish: FinishMigrationResponse,
    pub(super) ready: destination_message::Ready,
}

impl Source {
    pub(super) async fn run(mut self) {
        let mut talk = None;
        let copied = self.copy(&mut talk).await;
        let decided = match copied {
            Ok(sealed) => self.may_commit().map(|()| sealed),
            Err(error) => Err(error),
        };
        let ended = match (decided, talk) {
            (Ok(sealed), Some(conversation)) => self.commit(sealed, conversation).await,
            (Ok(_), None) => self.stay(lost("there is no stream"), None).await,
            (Err(error), talk) => self.stay(error, talk).await,
        };
        self.end(ended).await;
    }

    /// From here on nothing can cancel it, unless somebody has already.
    fn may_commit(&self) -> Result<(), ApiError> {
        self.committed.store(true, Ordering::SeqCst);
        if self.cancel.is_cancelled() || self.daemon.shutdown.is_cancelled() {
            self.committed.store(false, Ordering::SeqCst);
            return Err(self.cancelled());
        }
        Ok(())
    }

    /// Everything up to the destination's Ready.
    async fn copy(&mut self, talk: &mut Option<Conversation>) -> Result<Sealed, ApiError> {
        let id = self.id.to_string();
        let epoch = self.ownership.epoch;
        self.journal(Phase::Open, epoch, &[]).await?;
        let prepare = PrepareRequest {
            version: VERSION,
            migration_id: id.clone(),
            source_host: self.daemon.host.host_id.clone(),
            source_address: self.daemon.peer_address.clone(),
            epoch,
            requirements: Some(std::mem::take(&mut self.requirements)),
            attempt: 1,
        };
        let prepared = tokio::select! {
            () = self.stopped() => return Err(self.cancelled()),
            prepared = self.peer.prepare(prepare) => prepared?,
        };
        let conversation = talk.insert(self.open(epoch).await?);

        self.show(State::Precopy, "copying memory while the machine runs");
        self.precopy(&id, prepared.data_address, prepared.token, conversation).await?;

        self.journal(Phase::Quiesced, epoch, &[]).await?;
        self.show(State::Stopped, "vCPUs are stopped, the rest is on its way");
        let worker = self.lease.worker.clone();
        let finish = {
            let finishing = worker.finish_migration(&id, epoch, FINISH);
            tokio::pin!(finishing);
            let mut early_ready = None;
            let finish = loop {
                tokio::select! {
                    () = self.stopped() => return Err(self.cancelled()),
                    finish = &mut finishing => break finish?,
                    message = conversation.from.message() => {
                        if let Some(ready) = self.ready_or_failed(message)? {
                            early_ready = Some(ready);
                        }
                    }
                }
            };
            (finish, early_ready)
        };
        let (finish, ready) = finish;
        let ready = match ready {
            Some(ready) => ready,
            None => self.await_ready(conversation).await?,
        };
        if ready.state_digest != finish.state_digest || ready.state_digest.is_empty() {
            return Err(ApiError::internal(
                "STATE_DIGEST_MISMATCH",
                "what the destination restored is not what was sent; the machine stays here, try again",
            ));
        }
        Ok(Sealed { finish, ready })
    }

    /// Opens the stream of this migration.
    pub(super) async fn open(&self, epoch: u64) -> Result<Conversation, ApiError> {
        let (to, outbox) = mpsc::channel(OUTBOX);
        let open = self.message(epoch, FromSource::Open(source_message::Open {}));
        to.try_send(open).map_err(|_| ApiError::internal("OUTBOX", "a new stream takes no message"))?;
        let from = self.peer.handover(outbox).await?;
        Ok(Conversation { to, from })
    }

    pub(super) fn message(&self, epoch: u64, message: FromSource) -> SourceMessage {
        SourceMessage {
            migration_id: self.id.to_string(),
            vm_uid: self.handle.uid.clone(),
            epoch,
            message: Some(message),
        }
    }

    async fn precopy(
        &self,
        id: &str,
        data_address: String,
        token: Vec<u8>,
        conversation: &mut Conversation,
    ) -> Result<(), ApiError> {
        let goal = duration(self.spec.max_blackout, MAX_BLACKOUT);
        let bound = duration(self.spec.max_duration, MAX_DURATION);
        let request = MigrateOutRequest {
            fence: None,
            migration_id: id.to_owned(),
            attempt: 1,
            data_address,
            token,
            connections: self.spec.connections.max(1),
            max_blackout_us: micros(goal),
            max_bandwidth: self.spec.max_bandwidth,
            max_duration_ms: micros(bound) / 1000,
        };
        let mut stream = self.lease.worker.migrate_out(request).await?;
        // The worker gives up by itself; this is for a worker that does not.
        let late = tokio::time::sleep(bound + Duration::from_secs(10));
        tokio::pin!(late);
        loop {
            tokio::select! {
                () = self.stopped() => return Err(self.cancelled()),
                () = &mut late => return Err(ApiError::unavailable("MAX_DURATION", "pre-copy took longer than max_duration; raise it, or max_blackout")),
                message = conversation.from.message() => { self.ready_or_failed(message)?; }
                progress = stream.message() => match progress {
                    Ok(Some(p)) => {
                        self.progress.send_modify(|m| m.progress = Some(MigrationProgress {
                            round: p.round,
                            bytes_sent: p.bytes_sent,
                            memory_bytes: p.memory_bytes,
                            bytes_remaining: p.bytes_remaining,
                            bytes_per_second: p.bytes_per_second,
                            dirty_bytes_per_second: p.dirty_bytes_per_second,
                            predicted_blackout_us: p.predicted_blackout_us,
                        }));
                        self.report();
                        if p.converged {
                            return Ok(());
                        }
                    }
                    Ok(None) => return Err(ApiError::internal("WORKER_STREAM_ENDED", "the worker ended the copy without a reason")),
                    Err(status) => return Err(ApiError::from_status("worker", &status)),
                }
            }
        }
    }

    async fn await_ready(
        &self,
        conversation: &mut Conversation,
    ) -> Result<destination_message::Ready, ApiError> {
        let deadline = tokio::time::sleep(READY);
        tokio::pin!(deadline);
        loop {
            tokio::select! {
                () = self.stopped() => return Err(self.cancelled()),
                () = &mut deadline => return Err(ApiError::unavailable("DESTINATION_TIMEOUT", format!("the destination was not ready within {} s", READY.as_secs()))),
                message = conversation.from.message() => if let Some(ready) = self.ready_or_failed(message)? {
                    return Ok(ready);
                }
            }
        }
    }

    /// Judges a message of the destination before the commit.
    fn ready_or_failed(
        &self,
        message: Result<Option<DestinationMessage>, tonic::Status>,
    ) -> Result<Option<destination_message::Ready>, ApiError> {
        use destination_message::Message as M;
        let message = match message {
            Ok(Some(message)) => message,
            Ok(None) => return Err(lost("it closed the stream")),
            Err(status) => return Err(lost(status.message())),
        };
        if message.migration_id != self.id.to_string() {
            return Ok(None);
        }
        match message.message {
            Some(M::Ready(ready)) => Ok(Some(ready)),
            Some(M::Failed(failed)) => {
                let reason = if failed.reason.is_empty() { "DESTINATION_FAILED" } else { &failed.reason };
                let message = crate::status::clip(&failed.message, 400);
                Err(ApiError::internal(
                    &crate::status::clip(reason, 64),
                    format!("the destination failed: {message}"),
                ))
            }
            _ => Ok(None),
        }
    }

    /// Somebody wants it stopped.
    async fn stopped(&self) {
        tokio::select! {
            () = self.cancel.cancelled() => {}
            () = self.daemon.shutdown.cancelled() => {}
        }
    }

    fn cancelled(&self) -> ApiError {
        if self.daemon.shutdown.is_cancelled() {
            return ApiError::shutting_down();
        }
        ApiError::cancelled("CANCELLED", "the migration was cancelled by request; the machine stays here")
    }

    /// Writes the next ownership record.
    pub(super) async fn journal(&mut self, phase: Phase, epoch: u64, digest: &[u8]) -> Result<(), ApiError> {
        let here = self.daemon.host.host_id.clone();
        let gone = matches!(phase, Phase::HandedOver | Phase::Released);
        let record = OwnershipRecord {
            vm_uid: self.handle.uid.clone(),
            epoch,
            owner_host: if gone { self.destination_host.clone() } else { here },
            incarnation: self.ownership.incarnation,
            phase: phase as i32,
            migration_id: self.id.to_string(),
            peer_host: self.destination_host.clone(),
            peer_address: self.peer.address.to_string(),
            peer_store: self.destination_host.clone(),
            digest: digest.to_vec(),
            lsn: 0,
        };
        self.ownership = self.daemon.store.append_ownership(record).await?;
        Ok(())
    }

    /// A decision may fail to be written, but it is then made again and nothing else: until it is durable, the
    /// machine neither runs nor goes.
    pub(super) async fn decide(&mut self, phase: Phase, epoch: u64, digest: &[u8]) -> Result<(), ApiError> {
        let mut pause = Duration::from_millis(50);
        loop {
            match self.journal(phase, epoch, digest).await {
                Ok(()) => return Ok(()),
                Err(error) if self.daemon.shutdown.is_cancelled() => return Err(error),
                Err(error) => {
                    tracing::error!(vm = %self.handle.name, ?phase, epoch, %error, "a decision is not durable yet; trying again");
                    self.show(
                        State::InDoubt,
                        "the decision could not be written to the journal; trying again",
                    );
                }
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.daemon.shutdown.cancelled() => {}
            }
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    /// Gives up before the commit: the machine goes on here, at the next epoch.
    async fn stay(&mut self, why: ApiError, talk: Option<Conversation>) -> outcome::Ended {
        tracing::info!(vm = %self.handle.name, migration = %self.id, reason = why.reason(), "migration does not go on: {why}");
        if self.ownership.phase() == Phase::Owned || self.ownership.phase() == Phase::Entered {
            // Not even opened.
            return outcome::Ended::stayed(self.ownership.clone(), None, why);
        }
        let epoch = self.ownership.epoch + 1;
        if let Err(error) = self.decide(Phase::Owned, epoch, &[]).await {
            return outcome::Ended::stayed(self.ownership.clone(), Some(error.clone()), error);
        }
        // Ends dirty tracking and the data sockets; there may be nothing to cancel.
        let _ = self.lease.worker.cancel_migration(&self.id.to_string()).await;
        let granted = self.lease.worker.grant(epoch, !self.lease.paused).await;
        if let Some(talk) = talk {
            self.abort(talk, epoch, &why).await;
        }
        outcome::Ended::stayed(self.ownership.clone(), granted.err(), why)
    }

    /// Tells the destination and gives it a moment to clean up; one that does not hear it asks for itself.
    async fn abort(&self, mut talk: Conversation, epoch: u64, why: &ApiError) {
        let abort = source_message::Abort { reason: why.reason().to_owned() };
        if talk.to.try_send(self.message(epoch, FromSource::Abort(abort))).is_err() {
            return;
        }
        let answered = async {
            while let Ok(Some(message)) = talk.from.message().await {
                use destination_message::Message as M;
                if matches!(message.message, Some(M::Aborted(_) | M::Failed(_))) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(ABORTED, answered).await;
    }

    pub(super) fn show(&self, state: State, phase: &str) {
        self.progress.send_modify(|m| {
            m.set_state(state);
            phase.clone_into(&mut m.phase);
        });
        self.report();
    }

    fn report(&self) {
        let migration = self.progress.borrow().clone();
        self.running.progress(pack("Migration", &migration));
    }

    /// Makes the end durable: the migration, the machine, the operation; in this order.
    async fn end(self, ended: outcome::Ended) {
        let outcome::Ended { outcome, migration } = ended;
        let mut last = self.progress.borrow().clone();
        last.end_time = Some(crate::ops::now());
        let result = match migration {
            Ok(result) => {
                last.set_state(State::Succeeded);
                "it runs on the destination".clone_into(&mut last.phase);
                last.result = Some(*result);
                Ok(())
            }
            Err(error) => {
                let state =
                    if error.code() == tonic::Code::Cancelled { State::Cancelled } else { State::Failed };
                last.set_state(state);
                "it runs on the source".clone_into(&mut last.phase);
                error.reason().clone_into(&mut last.reason);
                error.message().clone_into(&mut last.message);
                Err(error)
            }
        };
        let record =
            MigrationRecord { migration: Some(outcome::storable(&last)), vm_uid: self.handle.uid.clone() };
        if let Err(error) = self.daemon.store.put_migration(&record).await {
            tracing::error!(migration = %last.name, %error, "the end of a migration could not be stored");
        }
        let told = self.handle.ask(|reply| Command::EndMigration { outcome, reply }).await;
        if let Err(error) = told {
            tracing::error!(migration = %last.name, %error, "the machine's record does not show the migration's end");
        }
        self.running.progress(pack("Migration", &last));
        self.running.finish(result.map(|()| pack("Migration", &last))).await;
        self.progress.send_replace(last);
        self.daemon.migrations.outgoing().remove(&self.id);
    }
}

pub(super) fn lost(why: &str) -> ApiError {
    let why = crate::status::clip(why, 200);
    ApiError::unavailable(
        "DESTINATION_LOST",
        format!("the destination went away: {why}; look at its log and try again"),
    )
}

fn duration(given: Option<prost_types::Duration>, default: Duration) -> Duration {
    given.and_then(|d| Duration::try_from(d).ok()).unwrap_or(default)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
