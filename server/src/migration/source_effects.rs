//! What the source's machine orders, done.

use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use vpmu_proto::api::migration::State as Shown;
use vpmu_proto::api::migration_spec;
use vpmu_proto::peer::destination_message::Message as FromDestination;
use vpmu_proto::peer::source_message::{self, Go, Message as FromSource};
use vpmu_proto::peer::{PrepareRequest, SourceMessage};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::{FinishMigrationResponse, MigrateOutRequest, WaitDrainedResponse, worker_status};

use super::answer::ask;
use super::record::{Written, write};
use super::source::{Bound, Conversation, Job, Source, micros};
use super::{hold, source_end};
use crate::config::Address;
use crate::handover::source::{Effect, Event, State};
use crate::handover::step::HandoverStep;
use crate::handover::{self, Digest};
use crate::peer::{Peer, VERSION};
use crate::status::ApiError;

/// Goal if none is given.
const MAX_BLACKOUT: Duration = Duration::from_millis(300);
/// Bound on pre-copy if none is given.
const MAX_DURATION: Duration = Duration::from_secs(600);
/// The worker gives up by itself; this is for a worker that does not.
const GRACE: Duration = Duration::from_secs(10);
/// Messages on the way to the destination.
const OUTBOX: usize = 8;
/// A worker that refuses this many grants is ended.
const GRANTS: u32 = 3;
/// Bytes of a page.
const PAGE: u64 = 4096;

impl Source {
    pub(super) async fn execute(&mut self, effect: Effect) {
        // The PMU state is stored later: see below.
        let step = HandoverStep::of_source(&effect).filter(|s| *s != HandoverStep::SourcePersistPmu);
        hold::at(&self.daemon.hold_at, false, step);
        match effect {
            Effect::Persist(record) => self.persist(record).await,
            Effect::Prepare => self.prepare(),
            Effect::StartCopy => self.start_copy(),
            Effect::FinishCopy { epoch } => self.finish_copy(epoch),
            // It is stored once the machine runs there: in the blackout its flush would compete with the two
            // decisions for the disk. The release waits for it.
            Effect::PersistPmu => self.work.pmu_due = true,
            Effect::SendGo { epoch, digest } => self.send_go(epoch, digest).await,
            Effect::SendAbort { epoch, .. } => self.send_abort(epoch).await,
            Effect::SendReleased { epoch } => self.send_released(epoch).await,
            Effect::AskPeer => self.ask_peer(),
            Effect::Grant { epoch, run } => self.grant(epoch, run).await,
            Effect::CancelCopy => self.cancel_copy().await,
            Effect::SealWorker { epoch } => self.seal(epoch).await,
            Effect::EndWorker => {
                self.show(Shown::Committed, "runs on the destination; releasing");
                self.work.source_cores = self.lease.worker.cores().to_vec();
                self.end_worker().await;
            }
            // The API refuses by the `committed` flag.
            Effect::RefuseCancel | Effect::Done(_) => {}
        }
        hold::at(&self.daemon.hold_at, true, step);
    }

    async fn persist(&mut self, mut record: OwnershipRecord) {
        self.work.ear.note(&mut record);
        let (phase, epoch) = (record.phase(), record.epoch);
        let deciding = *self.work.deciding.get_or_insert_with(Instant::now);
        match write(&self.daemon.store, record).await {
            Written::Durable(record) => {
                if phase == Phase::HandedOver {
                    self.work.decide_us = micros(deciding.elapsed());
                }
                self.work.deciding = None;
                self.work.backoff.reset();
                self.ownership = record;
                self.work.events.push_back(Event::Persisted(phase));
            }
            Written::InDoubt(error) => {
                tracing::error!(vm = %self.handle.name, ?phase, epoch, %error, "a decision is not durable yet; trying again");
                self.show(Shown::InDoubt, "the decision could not be written to the journal; trying again");
                self.retry(Event::PersistFailed).await;
            }
            Written::Refused(error) => {
                self.work.deciding = None;
                tracing::error!(vm = %self.handle.name, ?phase, epoch, %error, "an ownership record was refused");
                self.fail(Event::PersistRefused, error);
            }
        }
    }

    fn prepare(&mut self) {
        let epoch = self.work.machine.handover.epoch;
        let request = PrepareRequest {
            version: VERSION,
            migration_id: self.id.to_string(),
            source_host: self.daemon.host.host_id.clone(),
            source_address: self.daemon.peering.way_back(&self.peer).unwrap_or_default(),
            epoch,
            requirements: Some(std::mem::take(&mut self.requirements)),
            attempt: 1,
            certificate_sha256: Vec::new(),
        };
        let open = self.message(epoch, FromSource::Open(source_message::Open {}));
        let (peer, store) = (self.peer.clone(), self.work.machine.handover.peer_store.clone());
        let (worker, encrypted, needs_tls) =
            (self.lease.worker.clone(), self.may_encrypt(), self.must_encrypt());
        self.work.jobs.push(Box::pin(async move {
            let prepared = async {
                let mut request = request;
                if encrypted {
                    request.certificate_sha256 = worker.prepare_outgoing(&request.migration_id).await?;
                }
                let prepared = Box::pin(peer.prepare(request)).await?;
                // The destination decides where it must be; it cannot talk us out of it.
                if needs_tls && prepared.certificate_sha256.is_empty() {
                    return Err(ApiError::precondition(
                        "TLS_UNAVAILABLE",
                        "destination",
                        "the destination offers no TLS for memory; upgrade it, or allow plaintext (vpmuctl: --plaintext) on a network you trust",
                    ));
                }
                if prepared.store_id != store {
                    return Err(ApiError::unavailable(
                        "DESTINATION_CHANGED",
                        "another host answers at the destination's address now; check it and try again",
                    ));
                }
                Ok((prepared, open_stream(&peer, open).await?))
            };
            Job::Prepared(Box::pin(prepared).await)
        }));
    }

    /// Whether data connections may be encrypted: not over a Unix socket, nor where it is not wanted.
    fn may_encrypt(&self) -> bool {
        matches!(self.peer.address, Address::Tcp(_)) && !self.spec.allow_plaintext && !self.local
    }

    /// Whether they must be.
    fn must_encrypt(&self) -> bool {
        let off_host = matches!(self.peer.address, Address::Tcp(addr) if !addr.ip().is_loopback());
        !self.local && (self.spec.require_tls || (off_host && !self.spec.allow_plaintext))
    }

    fn start_copy(&mut self) {
        self.show(
            Shown::Precopy,
            if self.local { "handing memory over" } else { "copying memory while the machine runs" },
        );
        let prepared = self.work.prepared.take().unwrap_or_default();
        let bound = duration(self.spec.max_duration, MAX_DURATION);
        let request = MigrateOutRequest {
            fence: None,
            migration_id: self.id.to_string(),
            attempt: 1,
            local: self.local,
            data_address: prepared.data_address,
            token: prepared.token,
            connections: self.spec.connections.max(1),
            max_blackout_us: micros(duration(self.spec.max_blackout, MAX_BLACKOUT)),
            max_bandwidth: self.spec.max_bandwidth,
            max_duration_ms: micros(bound) / 1000,
            peer_certificate_sha256: prepared.certificate_sha256,
            compression: self.spec.compression,
            allow_throttle: self.spec.allow_throttle,
            allow_postcopy: self.spec.allow_postcopy,
            postcopy: self.spec.mode() == migration_spec::Mode::Postcopy,
            recover_ms: super::limits::millis(self.daemon.limits.recover),
        };
        self.bound(
            bound + GRACE,
            ApiError::unavailable(
                "MAX_DURATION",
                "pre-copy took longer than max_duration; raise it, or max_blackout",
            ),
        );
        self.work.copies = true;
        let worker = self.lease.worker.clone();
        self.work.jobs.push(Box::pin(async move { Job::Copying(worker.migrate_out(request).await) }));
    }

    fn finish_copy(&mut self, epoch: u64) {
        self.show(Shown::Stopped, "vCPUs are stopped, the rest is on its way");
        let (worker, id, finish) =
            (self.lease.worker.clone(), self.id.to_string(), self.daemon.limits.finish);
        self.work
            .jobs
            .push(Box::pin(async move { Job::Finished(worker.finish_migration(&id, epoch, finish).await) }));
    }

    /// The worker has stopped, is sealed and has sent everything.
    pub(super) fn sealed(&mut self, finish: FinishMigrationResponse) {
        let Some(digest) = handover::digest(&finish.state_digest) else {
            return self.fail(Event::CopyFailed, source_end::mismatch());
        };
        self.progress.send_modify(|m| {
            m.actions = self.said.iter().chain(&finish.actions).cloned().collect();
            if let Some(progress) = &mut m.progress {
                progress.missing_pages = finish.missing_pages;
            }
        });
        self.work.machine.postcopy = finish.missing_pages > 0;
        self.work.finish = Some(finish);
        let ready = self.daemon.limits.ready;
        let text = format!("the destination was not ready within {ready:?}");
        self.bound(ready, ApiError::unavailable("DESTINATION_TIMEOUT", text));
        self.work.events.push_back(Event::Sealed(digest));
    }

    fn bound(&mut self, after: Duration, why: ApiError) {
        // One too far away to be told is none.
        self.work.bound = tokio::time::Instant::now().checked_add(after).map(|at| Bound { at, why });
    }

    async fn send_go(&mut self, epoch: u64, digest: Digest) {
        if self.work.talk.is_none() {
            let open = self.message(epoch.saturating_sub(1), FromSource::Open(source_message::Open {}));
            let talk = match Peer::connect(&self.peer.address, &self.daemon.peering).await {
                Ok(peer) => open_stream(&peer, open).await,
                Err(error) => Err(error),
            };
            match talk {
                Ok(talk) => self.work.talk = Some(talk),
                Err(error) => return self.peer_lost(error.message()),
            }
        }
        let go = Go {
            state_digest: digest.to_vec(),
            vm: Some(self.lease.record.vm.clone().unwrap_or_default()),
            keep_paused: self.lease.paused,
        };
        let go = self.message(epoch, FromSource::Go(go));
        let sent = match &self.work.talk {
            Some(talk) => talk.to.send(go).await.is_ok(),
            None => false,
        };
        if !sent {
            self.peer_lost("it closed the stream");
        }
    }

    /// Tells the destination and gives it a moment to clean up; one that does not hear it asks for itself.
    async fn send_abort(&mut self, epoch: u64) {
        let reason = self.work.why.as_ref().map_or_else(String::new, |why| why.reason().to_owned());
        let abort = self.message(epoch, FromSource::Abort(source_message::Abort { reason }));
        let Some(talk) = &mut self.work.talk else { return };
        if talk.to.try_send(abort).is_err() {
            return;
        }
        let answered = async {
            while let Ok(Some(message)) = talk.from.message().await {
                if matches!(message.message, Some(FromDestination::Aborted(_) | FromDestination::Failed(_))) {
                    return;
                }
            }
        };
        let _ = tokio::time::timeout(self.daemon.limits.aborted, answered).await;
    }

    fn ask_peer(&mut self) {
        if self.work.asking {
            return;
        }
        self.work.asking = true;
        self.show(Shown::Committed, "the destination does not answer; asking again until it does");
        let (handover, peering) = (self.work.machine.handover.clone(), self.daemon.peering.clone());
        self.work.jobs.push(Box::pin(async move {
            tokio::time::sleep(peering.limits.ask_peer).await;
            Job::Answered(ask(&handover, &peering).await)
        }));
    }

    /// Post-copy: asks the worker how far it is with serving pages. It ends by itself when the destination is lost.
    pub(super) fn follow(&mut self) {
        let (worker, id) = (self.lease.worker.clone(), self.id.to_string());
        self.work.jobs.push(Box::pin(async move { Job::Followed(worker.wait_drained(&id).await) }));
    }

    pub(super) async fn followed(&mut self, answer: Result<WaitDrainedResponse, ApiError>) {
        let answer = match answer {
            Ok(answer) => answer,
            // A worker that is slow to answer still serves; one whose process is gone does not, which is heard apart.
            Err(error) => {
                tracing::warn!(vm = %self.handle.name, %error, "the worker does not say how far it is with serving pages");
                if !self.work.death_heard && self.work.backoff.pause(&self.daemon.shutdown).await {
                    self.follow();
                }
                return;
            }
        };
        self.work.backoff.reset();
        if let Some(finish) = &mut self.work.finish {
            finish.bytes = finish.bytes.max(answer.bytes);
        }
        self.progress.send_modify(|m| {
            if let Some(progress) = &mut m.progress {
                progress.missing_pages = answer.missing_pages;
                progress.bytes_sent = progress.bytes_sent.max(answer.bytes);
                progress.bytes_remaining = answer.missing_pages * PAGE;
            }
        });
        self.report();
        if !answer.over {
            return self.follow();
        }
        if !answer.problem.is_empty() {
            tracing::error!(vm = %self.handle.name, problem = answer.problem, "not all memory has followed a machine that moved");
            self.work.unserved = Some(source_end::unserved(&answer.problem));
        }
        self.work.events.push_back(Event::Drained);
    }

    async fn grant(&mut self, epoch: u64, run: bool) {
        // A finish that waits for the destination would keep the worker from hearing the grant.
        self.cancel_copy().await;
        let Err(error) = self.lease.worker.grant(epoch, run).await else {
            self.work.events.push_back(Event::Granted);
            return;
        };
        tracing::error!(vm = %self.handle.name, epoch, %error, "the worker does not run on");
        if self.lease.worker.may_live(&error).await {
            // With the only copy: it is asked until it answers or its death is seen.
            return self.retry(Event::GrantFailed).await;
        }
        self.work.failed_grants += 1;
        let status = self.lease.worker.status().await;
        if status.is_ok_and(|s| s.state() == worker_status::State::Ended) {
            // The guest has ended by itself: nothing of it can run any more.
            self.work.lost.get_or_insert(error);
            self.work.events.push_back(Event::WorkerDied);
        } else if self.work.failed_grants < GRANTS {
            self.retry(Event::GrantFailed).await;
        } else {
            self.work.lost.get_or_insert(error);
            self.end_worker().await;
        }
    }

    /// Ends the worker, at once if its machine runs elsewhere. That is its death only once it is seen, which [`Source::next`] waits for if ending it took too
    /// long: nothing else proves that it does not run, but what [`WorkerLink::depart`](crate::worker_link::WorkerLink::depart) looks at.
    async fn end_worker(&mut self) {
        let worker = &self.lease.worker;
        let released = matches!(self.work.machine.state(), State::Releasing);
        self.work.death_heard = match (released, self.local) {
            (true, true) => worker.depart(&self.daemon.workers.processes).await,
            (true, false) => worker.release().await,
            (false, _) => worker.end().await,
        };
        if self.work.death_heard {
            self.work.events.push_back(Event::WorkerDied);
        } else {
            tracing::error!(vm = %self.handle.name, pid = self.lease.worker.pid(), "a worker was ended and may still live; waiting");
        }
    }

    /// Ends dirty tracking and the data sockets.
    async fn cancel_copy(&mut self) {
        if std::mem::take(&mut self.work.copies) {
            let _ = self.lease.worker.cancel_migration(&self.id.to_string()).await;
        }
    }

    async fn seal(&mut self, epoch: u64) {
        self.cancel_copy().await;
        while let Err(error) = self.lease.worker.seal(&self.id.to_string(), epoch).await {
            if self.lease.worker.may_live(&error).await {
                if self.work.backoff.pause(&self.daemon.shutdown).await {
                    continue;
                }
                self.work.left = Some(ApiError::shutting_down());
                return;
            }
            tracing::error!(vm = %self.handle.name, epoch, %error, "the worker cannot be sealed and is ended");
            return self.end_worker().await;
        }
        self.work.events.push_back(Event::WorkerSealed);
    }

    /// PMU state at the stop: durable before the release.
    pub(super) async fn store_pmu(&mut self) {
        self.work.pmu_due = false;
        let step = Some(HandoverStep::SourcePersistPmu);
        let images = self.work.finish.as_ref().map(|f| f.pmu.clone()).unwrap_or_default();
        let records = crate::pmu_view::records(
            &self.handle.uid,
            images,
            &self.lease.worker.cores(),
            self.work.machine.handover.epoch,
            "migrate-out",
            self.daemon.host.pmu_mode,
        );
        hold::at(&self.daemon.hold_at, false, step);
        if let Err(error) = self.daemon.store.put_pmu(&records).await {
            tracing::error!(vm = %self.handle.name, %error, "PMU state at the stop could not be stored; trying again");
            self.retry(Event::PmuFailed).await;
        } else {
            self.work.backoff.reset();
            self.work.events.push_back(Event::PmuPersisted);
            hold::at(&self.daemon.hold_at, true, step);
        }
    }
}

/// Opens the stream of a migration.
pub(super) async fn open_stream(peer: &Peer, open: SourceMessage) -> Result<Conversation, ApiError> {
    let (to, outbox) = mpsc::channel(OUTBOX);
    to.try_send(open).map_err(|_| ApiError::internal("OUTBOX", "a new stream takes no message"))?;
    let from = peer.handover(outbox).await?;
    Ok(Conversation { to, from })
}

fn duration(given: Option<prost_types::Duration>, default: Duration) -> Duration {
    given.and_then(|d| Duration::try_from(d).ok()).unwrap_or(default)
}
