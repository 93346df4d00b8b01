//! The end of a migration at its source: what it came to, and how that is made durable and shown.

use std::time::Duration;

use vpmu_proto::api::MigrationResult;
use vpmu_proto::api::migration::State as Shown;
use vpmu_proto::peer::destination_message::{Entered, Message as FromDestination};
use vpmu_proto::peer::source_message::{Message as FromSource, Released};
use vpmu_proto::store::MigrationRecord;

use super::outcome::{self, Cost, Ended, guest_gap_us};
use super::source::{Conversation, Source, lost, micros};
use crate::handover::source::{Cause, Outcome as Decided, State};
use crate::ops::pack;
use crate::status::ApiError;
use crate::vm::command::{Command, Outcome};

/// How long the guest's own measurement is waited for once the machine runs there.
const GAP: Duration = Duration::from_secs(3);

impl Source {
    /// What the machine's outcome means for the user.
    pub(super) fn over(&mut self, decided: Decided) -> Ended {
        let ownership = self.ownership.clone();
        match decided {
            Decided::Moved => match self.work.unserved.take() {
                Some(why) => Ended { outcome: self.moved(), migration: Err(why) },
                None => Ended { outcome: self.moved(), migration: Ok(Box::new(self.result())) },
            },
            Decided::NotOpened => Ended::stayed(ownership, None, self.why(Cause::StoreFailed)),
            Decided::Aborted(cause) => {
                let why = self.why(cause);
                tracing::info!(vm = %self.handle.name, migration = %self.id, reason = why.reason(), "migration does not go on: {why}");
                Ended::stayed(ownership, None, why)
            }
            Decided::Returned => Ended::stayed(
                ownership,
                None,
                ApiError::internal(
                    "RETURNED",
                    "the destination could not start the machine and gave it back; it goes on here",
                ),
            ),
            Decided::Forced => Ended::stayed(
                ownership,
                None,
                ApiError::internal(
                    "FORCED",
                    "the destination was forced out before it had entered; the machine goes on here",
                ),
            ),
            Decided::Failed(cause) => {
                let why = self.why(cause);
                Ended::stayed(ownership, Some(self.work.lost.take().unwrap_or_else(|| why.clone())), why)
            }
            Decided::Superseded => {
                let name = self.handle.name.to_string();
                let why =
                    ApiError::aborted("SUPERSEDED", &name, "a later owner exists; the copy here was ended");
                Ended { outcome: self.moved(), migration: Err(why) }
            }
            Decided::Uncertain => {
                let why = ApiError::internal(
                    "OWNERSHIP_UNCERTAIN",
                    "the two hosts' records do not agree; nothing runs here until an operator decides",
                );
                Ended::stayed(ownership, Some(why.clone()), why)
            }
        }
    }

    /// The daemon ends in the middle; the next one goes on from the journal.
    pub(super) fn leave(&mut self) -> Ended {
        let why = self.work.left.take().unwrap_or_else(ApiError::shutting_down);
        if self.lease.worker.outlives_daemon(self.daemon.upgrading.load(std::sync::atomic::Ordering::SeqCst))
        {
            return Ended { outcome: Outcome::Left, migration: Err(why) };
        }
        if matches!(
            self.work.machine.state(),
            State::HandedOver { .. } | State::Releasing | State::SavingReleased
        ) {
            return Ended { outcome: self.moved(), migration: Err(why) };
        }
        Ended::stayed(self.ownership.clone(), Some(why.clone()), why)
    }

    fn moved(&self) -> Outcome {
        Outcome::Moved {
            ownership: self.ownership.clone(),
            moved_to: self.work.machine.handover.peer_host.clone(),
        }
    }

    fn why(&mut self, cause: Cause) -> ApiError {
        self.work.why.take().unwrap_or_else(|| match cause {
            Cause::Cancelled => self.cancelled(),
            Cause::PeerLost => lost("its stream ended"),
            Cause::DigestMismatch => mismatch(),
            cause => ApiError::internal(cause.reason(), "the migration was given up; the machine stays here"),
        })
    }

    fn result(&mut self) -> MigrationResult {
        let (finish, ready) =
            (self.work.finish.take().unwrap_or_default(), self.work.ready.take().unwrap_or_default());
        if let Some(restored) = &ready.pmu_restored {
            let action = outcome::pmu_action(restored, micros(self.accepted.elapsed()));
            self.progress.send_modify(|m| m.actions.push(action));
        }
        let (entered, entered_ns) = self.work.entered.take().unwrap_or_default();
        let cost = Cost {
            finish: &finish,
            ready: &ready,
            entered: &entered,
            decide_us: self.work.decide_us,
            entered_ns,
            boot_id: &self.daemon.host.boot_id,
            source_cores: &self.work.source_cores,
            local: self.local,
            total_us: self.work.total_us,
        };
        MigrationResult { guest_gap_us: self.work.guest_gap_us, ..cost.result() }
    }

    /// Waits for the hole as the guest saw it, which is known only once it has run a little, and says good-bye.
    pub(super) async fn send_released(&mut self, epoch: u64) {
        self.work.total_us = micros(self.accepted.elapsed());
        let Some(mut talk) = self.work.talk.take() else { return };
        let entered = self.work.entered.as_ref().map(|(entered, _)| entered.clone()).unwrap_or_default();
        if self.work.guest_gap_us.is_none() {
            self.work.guest_gap_us = guest_gap(&mut talk, &entered).await;
        }
        let released = Released { migration: Some(self.progress.borrow().clone()) };
        let _ = talk.to.try_send(self.message(epoch, FromSource::Released(released)));
    }

    /// Makes the end durable: the migration, the machine, the operation; in this order.
    pub(super) async fn end(self, ended: Ended) {
        let Ended { outcome, migration } = ended;
        if let (Outcome::Moved { ownership, .. }, Err(_)) = (&outcome, &migration) {
            super::released::tell(&self.daemon, ownership);
        }
        let mut last = self.progress.borrow().clone();
        last.end_time = Some(crate::ops::now());
        let result = match migration {
            Ok(result) => {
                last.set_state(Shown::Succeeded);
                "it runs on the destination".clone_into(&mut last.phase);
                last.result = Some(*result);
                Ok(())
            }
            Err(error) => {
                let cancelled = error.code() == tonic::Code::Cancelled;
                last.set_state(if cancelled { Shown::Cancelled } else { Shown::Failed });
                let moved = matches!(outcome, Outcome::Moved { .. });
                if moved { "it has moved" } else { "it runs on the source" }.clone_into(&mut last.phase);
                error.reason().clone_into(&mut last.reason);
                error.message().clone_into(&mut last.message);
                Err(error)
            }
        };
        let left = matches!(outcome, Outcome::Left);
        if left {
            // Not over: the next daemon asks the destination and ends it.
            last = self.progress.borrow().clone();
            last.set_state(Shown::InDoubt);
            "vpmud was ended in the middle; the next one goes on".clone_into(&mut last.phase);
        }
        let record =
            MigrationRecord { migration: Some(outcome::storable(&last)), vm_uid: self.handle.uid.clone() };
        if let Err(error) = self.daemon.store.put_migration(&record).await {
            tracing::error!(migration = %last.name, %error, "the end of a migration could not be stored");
            if crate::ops::is_failing(&error)
                && let Ok(batch) = crate::store::Batch::new().put_migration(&record)
            {
                self.daemon.ops.keep(None, batch);
            }
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

async fn guest_gap(talk: &mut Conversation, entered: &Entered) -> Option<u64> {
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
    gap
}

/// Post-copy: this side's worker ended before it had served every page.
pub(super) fn source_lost(why: &str) -> ApiError {
    ApiError::internal(
        "POSTCOPY_SOURCE_LOST",
        format!(
            "the machine had moved, and the worker that served the rest of its memory ended before all of it was there ({}); it is lost: start it afresh on the destination",
            crate::status::clip(why, 200)
        ),
    )
}

/// Post-copy: the destination did not take every page.
pub(super) fn unserved(why: &str) -> ApiError {
    ApiError::unavailable(
        "POSTCOPY_DESTINATION_LOST",
        format!(
            "the machine had moved, and its destination was lost before all of its memory was there ({}); see its state there",
            crate::status::clip(why, 200)
        ),
    )
}

/// The two ends do not hold the same.
pub(super) fn mismatch() -> ApiError {
    ApiError::internal(
        "STATE_DIGEST_MISMATCH",
        "what the destination restored is not what was sent; the machine stays here, try again",
    )
}
