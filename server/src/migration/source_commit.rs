//! The source from its decision on: HandedOver is durable, then Go, and then only the destination's word counts.

use std::time::{Duration, Instant};

use vpmu_proto::api::migration::State;
use vpmu_proto::peer::destination_message::{Entered, Message as FromDestination};
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::source_message::{Go, Message as FromSource, Released};
use vpmu_proto::peer::{DestinationMessage, ResolveRequest};
use vpmu_proto::store::ownership_record::Phase;

use super::outcome::{Cost, Ended, guest_gap_us};
use super::source::{Conversation, Sealed, Source};
use crate::peer::Peer;
use crate::status::ApiError;
use crate::vm::command::Outcome;

/// How long the guest's own measurement is waited for once the machine runs there.
const GAP: Duration = Duration::from_secs(3);
/// Between two attempts to reach a destination that went away after the commit.
const RETRY: Duration = Duration::from_millis(500);

/// What the destination said after Go.
enum Answer {
    Entered(Box<(Entered, Option<Conversation>)>),
    Returned(u64),
    /// This daemon ends; the next one goes on.
    Ending,
}

impl Source {
    /// Commits and sees it through.
    pub(super) async fn commit(&mut self, sealed: Sealed, conversation: Conversation) -> Ended {
        let Sealed { finish, ready } = sealed;
        let epoch = self.ownership.epoch + 1;
        let deciding = Instant::now();
        if let Err(error) = self.decide(Phase::HandedOver, epoch, &finish.state_digest).await {
            // Only when this daemon ends. Whether it is durable is read at the next start.
            return Ended::stayed(self.ownership.clone(), Some(error.clone()), error);
        }
        let decide_us = u64::try_from(deciding.elapsed().as_micros()).unwrap_or(u64::MAX);
        let go = Go {
            state_digest: finish.state_digest.clone(),
            vm: Some(self.travelling_record()),
            keep_paused: self.lease.paused,
        };
        let answer = self.await_entered(conversation, epoch, &go).await;
        let entered_ns = vcpu_worker::host::monotonic_ns();
        let (entered, conversation) = match answer {
            Answer::Entered(answer) => *answer,
            Answer::Returned(epoch) => return self.returned(epoch).await,
            Answer::Ending => {
                let outcome = Outcome::Moved {
                    ownership: self.ownership.clone(),
                    moved_to: self.destination_host.clone(),
                };
                return Ended { outcome, migration: Err(ApiError::shutting_down()) };
            }
        };
        self.show(State::Committed, "runs on the destination; releasing");
        self.store_pmu(&finish).await;
        let source_cores = self.lease.worker.cores().to_vec();
        self.lease.worker.end().await;
        if let Err(error) = self.journal(Phase::Released, epoch, &finish.state_digest).await {
            tracing::error!(vm = %self.handle.name, %error, "the release could not be journalled; it is repeated at the next start");
        }
        let total_us = u64::try_from(self.accepted.elapsed().as_micros()).unwrap_or(u64::MAX);
        let cost = Cost {
            finish: &finish,
            ready: &ready,
            entered: &entered,
            decide_us,
            entered_ns,
            boot_id: &self.daemon.host.boot_id,
            source_cores: &source_cores,
            total_us,
        };
        let mut result = cost.result();
        if let Some(conversation) = conversation {
            result.guest_gap_us = self.guest_gap(conversation, entered, epoch).await;
        }
        let outcome =
            Outcome::Moved { ownership: self.ownership.clone(), moved_to: self.destination_host.clone() };
        Ended { outcome, migration: Ok(Box::new(result)) }
    }

    /// PMU state at the stop: durable before the release, and outside the blackout, where its flush would compete with
    /// the two decision records for the disk.
    async fn store_pmu(&self, finish: &vpmu_proto::worker::FinishMigrationResponse) {
        let records = crate::pmu_view::records(
            &self.handle.uid,
            finish.pmu.clone(),
            self.lease.worker.cores(),
            self.ownership.epoch.saturating_sub(1),
            "migrate-out",
            self.daemon.host.pmu_mode,
        );
        if let Err(error) = self.daemon.store.put_pmu(&records).await {
            tracing::error!(vm = %self.handle.name, %error, "PMU state at the stop could not be stored");
        }
    }

    /// The machine's record as it goes on at the destination.
    fn travelling_record(&self) -> vpmu_proto::api::VirtualMachine {
        self.lease.record.vm.clone().unwrap_or_default()
    }

    /// Sends Go, again and again if need be, until the destination has entered or given back.
    async fn await_entered(&self, conversation: Conversation, epoch: u64, go: &Go) -> Answer {
        let mut conversation = Some(conversation);
        loop {
            if let Some(mut talk) = conversation.take() {
                let sent = talk.to.send(self.message(epoch, FromSource::Go(go.clone()))).await.is_ok();
                if sent && let Some(answer) = self.listen(&mut talk).await {
                    return match answer {
                        Answer::Entered(answer) => Answer::Entered(Box::new((answer.0, Some(talk)))),
                        other => other,
                    };
                }
            }
            if self.daemon.shutdown.is_cancelled() {
                return Answer::Ending;
            }
            self.show(State::Committed, "the destination does not answer; asking again until it does");
            tokio::select! {
                () = tokio::time::sleep(RETRY) => {}
                () = self.daemon.shutdown.cancelled() => return Answer::Ending,
            }
            match self.ask(epoch).await {
                Some(Ok(answer)) => return answer,
                // It still holds a ready copy: talk to it again.
                Some(Err(talk)) => conversation = Some(talk),
                None => {}
            }
        }
    }

    /// Waits for the answer to Go; none if the stream ended without one.
    async fn listen(&self, talk: &mut Conversation) -> Option<Answer> {
        loop {
            let message: Option<DestinationMessage> = tokio::select! {
                () = self.daemon.shutdown.cancelled() => return Some(Answer::Ending),
                message = talk.from.message() => message.ok()?,
            };
            let message = message?;
            match message.message {
                Some(FromDestination::Entered(entered)) => {
                    return Some(Answer::Entered(Box::new((entered, None))));
                }
                Some(FromDestination::Returned(_)) => return Some(Answer::Returned(message.epoch)),
                _ => {}
            }
        }
    }

    /// Asks a destination that went away what it knows.
    async fn ask(&self, epoch: u64) -> Option<Result<Answer, Conversation>> {
        let peer = Peer::connect(&self.peer.address).await.ok()?;
        let request = ResolveRequest {
            migration_id: self.id.to_string(),
            vm_uid: self.handle.uid.clone(),
            host_id: self.daemon.host.host_id.clone(),
            store_id: self.destination_host.clone(),
        };
        let answer = peer.resolve(request).await.ok()?;
        match answer.decision() {
            Decision::Committed => Some(Ok(Answer::Entered(Box::new((Entered::default(), None))))),
            Decision::Returned => Some(Ok(Answer::Returned(answer.epoch))),
            Decision::Ready => Some(Err(self.open(epoch.saturating_sub(1)).await.ok()?)),
            _ => None,
        }
    }

    /// The destination could not start it and gave it back.
    async fn returned(&mut self, epoch: u64) -> Ended {
        let why = ApiError::internal(
            "RETURNED",
            "the destination could not start the machine and gave it back; it goes on here",
        );
        let expected = self.ownership.epoch + 1;
        if epoch != expected {
            tracing::error!(epoch, expected, "a return at another epoch than the next");
        }
        if let Err(error) = self.decide(Phase::Owned, expected, &[]).await {
            return Ended::stayed(self.ownership.clone(), Some(error.clone()), error);
        }
        let _ = self.lease.worker.cancel_migration(&self.id.to_string()).await;
        let granted = self.lease.worker.grant(expected, !self.lease.paused).await;
        Ended::stayed(self.ownership.clone(), granted.err(), why)
    }

    /// The hole as the guest saw it: known only once it has run a little.
    async fn guest_gap(&self, mut talk: Conversation, entered: Entered, epoch: u64) -> Option<u64> {
        let mut gap = entered.probe.as_ref().and_then(guest_gap_us);
        let wait = async {
            while gap.is_none() {
                let Ok(Some(message)) = talk.from.message().await else { return };
                if let Some(FromDestination::Entered(again)) = message.message {
                    gap = again.probe.as_ref().and_then(guest_gap_us);
                    if again.probe.is_none() {
                        return;
                    }
                }
            }
        };
        let _ = tokio::time::timeout(GAP, wait).await;
        let released = Released { migration: Some(self.progress.borrow().clone()) };
        let _ = talk.to.try_send(self.message(epoch, FromSource::Released(released)));
        gap
    }
}
