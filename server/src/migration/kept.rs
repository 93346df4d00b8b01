//! A worker that outlived its daemon with a copy, as who settles its migration holds it, until it is ended.
//!
//! Invariants: one that does not answer is asked until it does, or its process is seen to end; while that is about what it
//! is, or its seal, its holder goes on with everything else; nothing is asked of it before what was asked first is
//! answered; only its end, or a word of its own, makes it dead.

use std::sync::Arc;

use tokio_util::task::AbortOnDropHandle;
use tonic::Code;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::worker::worker_status;

use crate::adopt::{Holder, Worth, worth};
use crate::daemon::Daemon;
use crate::handover::source::Event;
use crate::status::ApiError;
use crate::worker_link::WorkerLink;

/// The worker, and what is asked of it.
pub(super) struct Kept {
    daemon: Arc<Daemon>,
    worker: Option<WorkerLink>,
    /// UUID of the migration.
    id: String,
    asked: Option<AbortOnDropHandle<Option<Answer>>>,
    /// It had died before its machine was released.
    pub(super) died: bool,
    /// Post-copy: why not all of the memory has followed.
    pub(super) unserved: Option<ApiError>,
}

/// What it said.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It has its copy.
    Holds,
    /// It is sealed.
    Sealed,
    /// It is dead, or there is nothing to be had from it: it is to be ended.
    Gone,
    /// It refuses this daemon, and is left alone.
    Refused,
}

impl Kept {
    /// `phase`: as journalled, by which it is judged if it has not said yet what it is.
    pub(super) fn new(daemon: &Arc<Daemon>, holder: Option<Holder>, id: &str, phase: Phase) -> Self {
        let (worker, known) = holder.map_or((None, true), |h| (Some(h.worker), h.known));
        let asked = worker
            .clone()
            .filter(|_| !known)
            .map(|worker| AbortOnDropHandle::new(tokio::spawn(look(Arc::clone(daemon), worker, phase))));
        let (daemon, id, died) = (Arc::clone(daemon), id.to_owned(), worker.is_none());
        Self { daemon, worker, id, asked, died, unserved: None }
    }

    /// There is one.
    pub(super) fn is_there(&self) -> bool {
        self.worker.is_some()
    }

    /// It has yet to answer.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Given back to the machine, if it is there.
    pub(super) fn into_worker(self) -> Option<WorkerLink> {
        self.worker
    }

    /// The daemon ends: it goes on without it, if it can.
    pub(super) fn leave(&self) {
        let upgrading = self.daemon.upgrading.load(std::sync::atomic::Ordering::SeqCst);
        if let Some(worker) = self.worker.as_ref().filter(|worker| worker.outlives_daemon(upgrading)) {
            worker.keep();
        }
    }

    /// What it was asked last; none if the daemon ends first. Never, if it was asked nothing. May be dropped: then it
    /// is asked still.
    pub(super) async fn answer(&mut self) -> Option<Answer> {
        let Some(asked) = &mut self.asked else { return std::future::pending().await };
        let answer = asked.await.unwrap_or_default();
        self.asked = None;
        self.died |= matches!(answer, Some(Answer::Gone | Answer::Refused));
        answer
    }

    /// Ends it, and waits until that is seen: nothing else proves that it does not run. What was asked is asked no more.
    /// None if the daemon ends first.
    pub(super) async fn end(&mut self) -> Option<Event> {
        self.asked = None;
        if let Some(worker) = &self.worker
            && !worker.end().await
        {
            tracing::error!(migration = %self.id, pid = worker.pid(), "a worker was ended and may still live; waiting");
            tokio::select! {
                () = worker.died() => drop(worker.end().await),
                () = self.daemon.shutdown.cancelled() => return None,
            }
        }
        self.worker = None;
        Some(Event::WorkerDied)
    }

    /// What its answer means; none if the daemon ends first, and nothing if it only has its copy.
    pub(super) async fn heard(&mut self, answer: Answer) -> Option<Option<Event>> {
        match answer {
            Answer::Holds => Some(None),
            Answer::Sealed => Some(Some(Event::WorkerSealed)),
            Answer::Gone => self.end().await.map(Some),
            Answer::Refused => {
                // Another's, or of another life of this store: nothing of this machine is to be had from it.
                self.worker = None;
                Some(Some(Event::WorkerDied))
            }
        }
    }

    /// Asks it to seal; [`Self::answer`] tells.
    pub(super) fn seal(&mut self, epoch: u64) {
        let before = self.asked.take();
        let (daemon, worker, id) = (Arc::clone(&self.daemon), self.worker.clone(), self.id.clone());
        self.asked = Some(AbortOnDropHandle::new(tokio::spawn(async move {
            let Some(worker) = worker else { return Some(Answer::Gone) };
            if let Some(before) = before {
                let known = before.await.unwrap_or_default()?;
                if matches!(known, Answer::Gone | Answer::Refused) {
                    return Some(known);
                }
            }
            match until_answered(&daemon, &worker, || worker.seal(&id, epoch)).await? {
                Ok(()) => Some(Answer::Sealed),
                Err(error) => {
                    tracing::error!(migration = %id, %error, "a worker cannot be sealed and is ended");
                    Some(Answer::Gone)
                }
            }
        })));
    }

    /// Lets it go on, once it has answered what it was asked before; none if the daemon ends first.
    pub(super) async fn grant(&mut self, epoch: u64, run: bool) -> Option<Event> {
        if self.is_asked() {
            let answer = self.answer().await?;
            if let Some(died @ Event::WorkerDied) = self.heard(answer).await? {
                return Some(died);
            }
        }
        let Some(worker) = &self.worker else { return Some(Event::WorkerDied) };
        if let Err(error) = worker.cancel_migration(&self.id).await {
            tracing::info!(migration = %self.id, %error, "the copy had ended already");
        }
        let Err(error) = until_answered(&self.daemon, worker, || worker.grant(epoch, run)).await? else {
            return Some(Event::Granted);
        };
        let ended = |s: vpmu_proto::worker::WorkerStatus| s.state() == worker_status::State::Ended;
        if worker.status().await.is_ok_and(ended) {
            // Its machine's task shows how its guest ended.
            return Some(Event::Granted);
        }
        tracing::error!(migration = %self.id, %error, "a worker does not run on and is ended");
        self.end().await
    }

    /// Until it has served every page; none if the daemon ends first.
    pub(super) async fn follow(&mut self) -> Option<Event> {
        loop {
            let Some(worker) = &self.worker else { return Some(Event::WorkerDied) };
            let answer = tokio::select! {
                answer = worker.wait_drained(&self.id) => answer,
                () = worker.died() => {
                    let why = worker.obituary().await;
                    self.unserved = Some(super::source_end::source_lost(why.message()));
                    return self.end().await;
                }
                () = self.daemon.shutdown.cancelled() => return None,
            };
            match answer {
                Ok(answer) if answer.over => {
                    self.unserved =
                        (!answer.problem.is_empty()).then(|| super::source_end::unserved(&answer.problem));
                    return Some(Event::Drained);
                }
                Ok(_) => {}
                // It had ended before this daemon began, or is of a build that has no post-copy.
                Err(error) if matches!(error.code(), Code::FailedPrecondition | Code::Unimplemented) => {
                    return Some(Event::Drained);
                }
                Err(error) => {
                    tracing::warn!(migration = %self.id, %error, "a worker does not say how far it is with serving pages");
                    tokio::time::sleep(self.daemon.limits.ask).await;
                }
            }
        }
    }
}

/// What a worker is that was silent when it was found.
async fn look(daemon: Arc<Daemon>, worker: WorkerLink, phase: Phase) -> Option<Answer> {
    let pid = worker.pid();
    let status = match until_answered(&daemon, &worker, || worker.status()).await? {
        Ok(status) => status,
        Err(error) => {
            tracing::error!(pid, %error, "a worker with a copy that moves cannot be attached; the copy is not used");
            if crate::adopt::dispensable(phase, &error) || worker.is_dead().await {
                return Some(Answer::Gone);
            }
            worker.keep();
            return Some(Answer::Refused);
        }
    };
    Some(match worth(phase, &status) {
        Worth::Copy | Worth::Ended => Answer::Holds,
        Worth::Runaway => {
            tracing::error!(pid, "CRITICAL: a machine that was handed over runs here; it is ended");
            Answer::Gone
        }
        Worth::Unrecorded | Worth::Nothing => {
            tracing::warn!(
                pid,
                state = status.state().as_str_name(),
                "a worker holds no copy any more; it is ended"
            );
            Answer::Gone
        }
    })
}

/// The answer of a worker that may hold the only copy: one that is silent is asked again, each time for a command's
/// deadline, until it answers or is seen to have ended. None if the daemon ends first.
async fn until_answered<T, F>(
    daemon: &Daemon,
    worker: &WorkerLink,
    call: impl Fn() -> F,
) -> Option<Result<T, ApiError>>
where
    F: Future<Output = Result<T, ApiError>>,
{
    loop {
        let answer = tokio::select! {
            answer = call() => answer,
            () = daemon.shutdown.cancelled() => return None,
        };
        match answer {
            Err(error) if worker.may_live(&error).await => {
                tracing::warn!(%error, "a worker with a copy is asked again");
            }
            answer => return Some(answer),
        }
    }
}
