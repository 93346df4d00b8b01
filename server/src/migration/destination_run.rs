//! The destination from its reservation on: receives, promises Ready, waits for the decision, enters or gives back. The
//! diagram and the invariants are in `destination`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::peer::destination_message::{
    Aborted, Entered, Failed, Message as FromDestination, Ready, Returned,
};
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::source_message::{Go, Message as FromSource};
use vpmu_proto::peer::{DestinationMessage, ResolveRequest, SourceMessage};
use vpmu_proto::store::ownership_record::Phase;

use super::destination::{Conversation, Incoming, LEASE, arriving};
use crate::peer::Peer;
use crate::status::ApiError;
use crate::vm::command::{Arrival, Command};
use crate::worker_link::WorkerLink;

/// Between two questions to a source that went away.
const ASK: Duration = Duration::from_secs(1);
/// How long the guest is given to measure its own hole.
const GAP: Duration = Duration::from_secs(2);

/// What ends the wait for a decision.
enum Decided {
    Go(Box<Go>, u64, Option<Conversation>),
    Abort(u64, Option<Conversation>),
    Ending,
}

impl Incoming {
    pub(super) async fn run(mut self, mut streams: mpsc::Receiver<Conversation>) {
        let id = self.id;
        let daemon = Arc::clone(&self.daemon);
        self.drive(&mut streams).await;
        daemon.migrations.incoming().remove(&id);
    }

    async fn drive(&mut self, streams: &mut mpsc::Receiver<Conversation>) {
        let first = tokio::select! {
            () = self.daemon.shutdown.cancelled() => None,
            first = tokio::time::timeout(LEASE, streams.recv()) => first.ok().flatten(),
        };
        let Some(mut talk) = first else {
            tracing::info!(vm = %self.handle.name, "a reservation ended without a migration");
            return self.drop_copy(0).await;
        };
        match self.receive(&mut talk).await {
            Ok(ready) => {
                self.say(&talk, FromDestination::Ready(ready)).await;
                self.decide(talk, streams).await;
            }
            Err(error) => {
                let failed =
                    Failed { reason: error.reason().to_owned(), message: error.message().to_owned() };
                self.drop_copy(0).await;
                self.say(&talk, FromDestination::Failed(failed)).await;
            }
        }
    }

    async fn say(&self, talk: &Conversation, message: FromDestination) {
        self.say_at(talk, self.ownership.epoch, message).await;
    }

    async fn say_at(&self, talk: &Conversation, epoch: u64, message: FromDestination) {
        let message = DestinationMessage { migration_id: self.id.to_string(), epoch, message: Some(message) };
        // A source that does not read is treated like one that went away.
        let _ = tokio::time::timeout(Duration::from_secs(5), talk.to.send(Ok(message))).await;
    }

    /// Until the copy is complete and Ready is durable.
    async fn receive(&mut self, talk: &mut Conversation) -> Result<Ready, ApiError> {
        let worker =
            self.worker.clone().ok_or_else(|| ApiError::internal("NO_WORKER", "there is no worker"))?;
        let mut progress = worker.watch_incoming(&self.id.to_string()).await?;
        let ready = loop {
            tokio::select! {
                () = self.daemon.shutdown.cancelled() => return Err(ApiError::shutting_down()),
                message = progress.message() => match message {
                    Ok(Some(p)) if p.ready => break p,
                    Ok(Some(p)) => {
                        let received = FromDestination::Received(p.bytes_received);
                        let message = DestinationMessage { migration_id: self.id.to_string(), epoch: self.ownership.epoch, message: Some(received) };
                        // Progress may be dropped.
                        let _ = talk.to.try_send(Ok(message));
                    }
                    Ok(None) => return Err(ApiError::internal("WORKER_STREAM_ENDED", "the worker ended the copy without a reason")),
                    Err(status) => return Err(ApiError::from_status("worker", &status)),
                },
                message = talk.from.message() => match message {
                    Ok(Some(SourceMessage { message: Some(FromSource::Abort(abort)), .. })) => {
                        return Err(ApiError::cancelled("ABORTED_BY_SOURCE", format!("the source gave up: {}", crate::status::clip(&abort.reason, 64))));
                    }
                    Ok(Some(_)) => {}
                    Ok(None) => return Err(ApiError::unavailable("SOURCE_LOST", "the source closed the stream before the copy was complete")),
                    Err(status) => return Err(ApiError::unavailable("SOURCE_LOST", format!("the source went away: {}", status.message()))),
                },
            }
        };
        self.images.clone_from(&ready.pmu);
        self.journal(Phase::Ready, self.ownership.epoch, &ready.state_digest).await?;
        Ok(Ready { state_digest: ready.state_digest, pmu: ready.pmu, restore_us: ready.restore_us })
    }

    /// Ready: waits for the source's decision however long it takes.
    async fn decide(&mut self, talk: Conversation, streams: &mut mpsc::Receiver<Conversation>) {
        match self.await_decision(talk, streams).await {
            Decided::Go(go, epoch, talk) => self.enter(*go, epoch, talk).await,
            Decided::Abort(epoch, talk) => {
                self.drop_copy(epoch).await;
                if let Some(talk) = talk {
                    self.say(&talk, FromDestination::Aborted(Aborted {})).await;
                }
            }
            // The journal says Ready; the next daemon asks the source.
            Decided::Ending => {
                if let Some(worker) = self.worker.take() {
                    worker.end().await;
                }
            }
        }
    }

    async fn await_decision(
        &self,
        talk: Conversation,
        streams: &mut mpsc::Receiver<Conversation>,
    ) -> Decided {
        let mut talk = Some(talk);
        loop {
            if let Some(open) = &mut talk {
                let message = tokio::select! {
                    () = self.daemon.shutdown.cancelled() => return Decided::Ending,
                    message = open.from.message() => message,
                };
                match message {
                    Ok(Some(SourceMessage { epoch, message: Some(FromSource::Go(go)), .. })) => {
                        return Decided::Go(Box::new(go), epoch, talk);
                    }
                    Ok(Some(SourceMessage { epoch, message: Some(FromSource::Abort(_)), .. })) => {
                        return Decided::Abort(epoch, talk);
                    }
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => talk = None,
                }
                continue;
            }
            tokio::select! {
                () = self.daemon.shutdown.cancelled() => return Decided::Ending,
                again = streams.recv() => talk = again,
                () = tokio::time::sleep(ASK) => {
                    if let Some(decided) = self.ask_source().await {
                        return decided;
                    }
                }
            }
        }
    }

    /// The source went away after Ready: what does its journal say?
    async fn ask_source(&self) -> Option<Decided> {
        let address = self.source_address.parse().ok()?;
        let peer = Peer::connect(&address).await.ok()?;
        let request = ResolveRequest {
            migration_id: self.id.to_string(),
            vm_uid: self.handle.uid.clone(),
            host_id: self.daemon.host.host_id.clone(),
            store_id: self.ownership.peer_store.clone(),
        };
        let answer = peer.resolve(request).await.ok()?;
        match answer.decision() {
            Decision::Committed => {
                let go =
                    Go { state_digest: answer.state_digest, vm: None, keep_paused: self.desired_paused() };
                Some(Decided::Go(Box::new(go), answer.epoch, None))
            }
            Decision::Aborted | Decision::Superseded => Some(Decided::Abort(answer.epoch, None)),
            _ => None,
        }
    }

    fn desired_paused(&self) -> bool {
        use vpmu_proto::api::virtual_machine::DesiredState;
        self.record.vm.as_ref().is_some_and(|vm| vm.desired_state() == DesiredState::Paused)
    }

    /// Go: Entered durable, grant, running. Nothing else happens before the guest runs.
    async fn enter(&mut self, go: Go, epoch: u64, talk: Option<Conversation>) {
        let begin = Instant::now();
        let Some(worker) = self.worker.clone() else { return };
        let expected = self.ownership.epoch + 1;
        let wrong = if epoch != expected {
            Some(format!("Go is for epoch {epoch}, this copy waits for {expected}"))
        } else if go.state_digest != self.ownership.digest {
            Some("Go names another state than this copy has".to_owned())
        } else {
            worker.status().await.err().map(|error| format!("the worker does not answer: {error}"))
        };
        if let Some(why) = wrong {
            return self.give_back(why, talk).await;
        }
        if let Err(error) = self.journal(Phase::Entered, epoch, &go.state_digest.clone()).await {
            // Not durable, so it never runs; the journal is read again at the next start.
            tracing::error!(vm = %self.handle.name, %error, "the entry could not be journalled");
            return self.give_back(error.to_string(), talk).await;
        }
        let persist_us = micros(begin.elapsed());
        let granting = Instant::now();
        let granted = worker.grant(epoch, !go.keep_paused).await;
        let resume_us = micros(granting.elapsed());
        let entered = Entered {
            running_monotonic_ns: granted.as_ref().copied().unwrap_or(0),
            boot_id: self.daemon.host.boot_id.clone(),
            persist_us,
            resume_us,
            probe: None,
        };
        if let Some(talk) = &talk {
            self.say(talk, FromDestination::Entered(entered.clone())).await;
        }
        if let Err(error) = &granted {
            tracing::error!(vm = %self.handle.name, %error, "the machine entered but its worker does not run it");
        }
        let mut record = self.record.clone();
        if let Some(vm) =
            go.vm.filter(|vm| vm.uid == self.handle.uid && vm.name == self.handle.name.to_string())
        {
            record.vm = Some(arriving(vm));
        }
        let arrival = Arrival {
            record,
            worker: worker.clone(),
            ownership: self.ownership.clone(),
            images: std::mem::take(&mut self.images),
            paused: go.keep_paused,
        };
        let adopted = self.handle.ask(|reply| Command::Adopt { arrival: Box::new(arrival), reply }).await;
        if let Err(error) = adopted {
            tracing::error!(vm = %self.handle.name, %error, "the arrived machine's records are incomplete");
        }
        self.worker = None;
        if let Some(talk) = talk {
            self.tell_gap(&worker, talk, entered, go.keep_paused).await;
        }
    }

    /// Tells the source the hole as the guest saw it, once the guest has.
    async fn tell_gap(&self, worker: &WorkerLink, talk: Conversation, mut entered: Entered, paused: bool) {
        let probed = self.record.vm.as_ref().and_then(|vm| vm.spec.as_ref()).and_then(|s| s.boot.as_ref());
        if paused || !matches!(probed, Some(Boot::Probe(_))) {
            self.say(&talk, FromDestination::Entered(entered)).await;
            return;
        }
        let deadline = Instant::now() + GAP;
        loop {
            let report = worker.probe_report().await.ok();
            let seen = report
                .as_ref()
                .is_some_and(|r| !r.vcpus.is_empty() && r.vcpus.iter().all(|v| v.last_gap_ns > 0));
            if seen || Instant::now() > deadline || self.daemon.shutdown.is_cancelled() {
                entered.probe = report;
                break;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        self.say(&talk, FromDestination::Entered(entered)).await;
    }

    /// The copy cannot be started although the source committed: it goes back.
    async fn give_back(&mut self, why: String, talk: Option<Conversation>) {
        tracing::error!(vm = %self.handle.name, %why, "giving the machine back");
        // Ended before the return is journalled: a right is taken from the worker first.
        if let Some(worker) = self.worker.take() {
            worker.end().await;
        }
        let epoch = self.ownership.epoch + 2;
        if let Err(error) = self.journal(Phase::Returned, epoch, &[]).await {
            tracing::error!(vm = %self.handle.name, %error, "the return could not be journalled; it is settled at the next start");
            return;
        }
        let ownership = self.ownership.clone();
        let _ = self.handle.ask(|reply| Command::DropIncoming { ownership, reply }).await;
        if let Some(talk) = talk {
            self.say_at(&talk, epoch, FromDestination::Returned(Returned { reason: why })).await;
        }
    }
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}
