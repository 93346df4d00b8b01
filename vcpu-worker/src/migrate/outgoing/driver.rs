//! The source's end: rounds of pre-copy until told to finish or to stop.
//!
//! ```text
//! connect ─▶ dirty log on ─▶ round 1 (every allocated page) ─▶ round n (what was dirtied meanwhile) ─┐
//!                                  ▲                                                              │ policy: next,
//!                                  └──────────────────────────────────────────────────────────────┘ converged, give up
//! converged: the same, but waits between rounds for Finish or Cancel      Finish ─▶ see `finish`
//! ```
//!
//! Local mode has no rounds: the memory's descriptor is handed over, and it waits for Finish or Cancel at once.
//!
//! Invariants: the dirty log is on from before the first page is read, and off when the thread fails; a page that was
//! taken from the log is sent, or the migration fails, and the next one begins with a full copy again. Failure and
//! cancel leave the machine as it is: running, if it was not sealed. After a finish the log stays on.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::watch;
use vpmu_proto::worker::{FinishMigrationResponse, MigrateOutProgress};

use super::super::actions::Actions;
use super::super::finish::{self, Last};
use super::super::switch::Switch;
use super::super::{failed, incoming};
use super::{FinishOrder, OutgoingState, Source};
use crate::bitmap::PageBitmap;
use crate::dataplane::postcopy::{self, Left, Until};
use crate::dataplane::precopy::throttle::Stepper;
use crate::dataplane::precopy::{Decision, Policy, Prediction, Round};
use crate::dataplane::{CancelFlag, ConnectOptions, Outgoing, SendProgress, Timeouts, hand_over};
use crate::error::WorkerError;
use crate::hypervisor::Vm;
use crate::machine::throttle::Throttling;
use crate::memory::PAGE_SIZE;

/// Bound on opening the data connections.
const CONNECT: Duration = Duration::from_secs(10);

/// How long a converged migration waits before it copies again.
const PAUSE_BETWEEN_ROUNDS: Duration = Duration::from_millis(20);

/// What a local stop is expected to cost: saving, setting, two durable records. No page is part of it.
const LOCAL_BLACKOUT: Duration = Duration::from_millis(2);

/// Ends dirty tracking when the thread is done, unless the machine has gone.
struct Tracking<'a>(&'a dyn Vm);

impl Tracking<'_> {
    /// Leaves it on.
    fn leave(self) {
        std::mem::forget(self);
    }
}

impl Drop for Tracking<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.stop_dirty_tracking() {
            tracing::warn!(%error, "dirty tracking could not be ended");
        }
    }
}

/// How long so many pages take at a rate.
fn transfer(pages: u64, bytes_per_second: u64) -> Duration {
    Duration::from_nanos((pages * PAGE_SIZE).saturating_mul(1_000_000_000) / bytes_per_second.max(1))
}

pub(super) struct Driver {
    pub(super) id: String,
    pub(super) source: Source,
    pub(super) cancel: CancelFlag,
    pub(super) orders: Receiver<FinishOrder>,
    pub(super) state: watch::Sender<OutgoingState>,
    pub(super) sending: Arc<OnceLock<Arc<SendProgress>>>,
}

impl Driver {
    pub(super) fn run(self) -> Result<(), WorkerError> {
        if self.source.local {
            return self.run_local();
        }
        let Source { machine, session, address, connections, bandwidth, goals, tls, .. } = &self.source;
        let mut actions = Actions::new();
        let memory = machine.memory().clone();
        let options = ConnectOptions {
            connections: *connections,
            bandwidth: *bandwidth,
            deadline: CONNECT,
            tls: tls.clone(),
            compression: self.source.compression,
            timeouts: Timeouts { recover: self.source.recover, ..Timeouts::default() },
            ..ConnectOptions::default()
        };
        let mut out = Outgoing::open(address, session, memory.clone(), self.cancel.clone(), options.clone())
            .map_err(|e| failed(&self.id, &e))?;
        // Set once, here.
        drop(self.sending.set(out.progress()));
        let vm = machine.vm().as_ref();
        vm.start_dirty_tracking()?;
        let tracking = Tracking(vm);
        if out.compression() != self.source.compression {
            let detail = format!("none: the destination speaks data protocol {}", out.version());
            actions.note("COMPRESSION", detail);
        }
        let begin = Instant::now();
        let mut policy = Policy::new(*goals);
        let mut stepper = Stepper::new(self.source.allow_throttle);
        // Ends, at the latest, with this function.
        let mut throttling = Throttling::new(Arc::clone(machine));
        let mut pages = PageBitmap::new(memory.pages());
        pages.set_range(0, memory.pages());
        let mut switch = Switch::new(&self.source, &out, &mut actions);
        let order = loop {
            let round = out.rounds() + 1;
            let stats = out.send_round(round, &pages, true).map_err(|e| failed(&self.id, &e))?;
            pages.clear_all();
            vm.collect_dirty(&mut pages)?;
            let done = Round { bytes_sent: stats.bytes, elapsed: stats.elapsed, dirty_pages: pages.count() };
            let verdict = policy.step(done, begin.elapsed());
            let turned = switch.step(&verdict, stepper.is_exhausted(), &mut actions);
            let converged = switch.is_on() || verdict.decision == Decision::Converged;
            tracing::debug!(migration = self.id, round, why = verdict.why, "pre-copy round");
            if turned {
                // What it dirties now is sent once either way.
                throttling.end();
            } else if !switch.is_on()
                && let Some(percent) = stepper.step(&verdict)
            {
                throttling.set(percent)?;
                let detail = format!("vCPUs rest {percent} % of the time; {}", verdict.why);
                actions.note("THROTTLE", detail);
            }
            let mut prediction = verdict.prediction;
            if switch.is_on() {
                let now = finish::now_pages(goals, prediction.bytes_per_second).min(pages.count());
                prediction.blackout = Some(goals.fixed + transfer(now, prediction.bytes_per_second));
            }
            self.report(&out, &prediction, round, converged, &throttling, &actions);
            if switch.is_on() {
                // What is dirtied meanwhile goes later in any case.
                match self.await_order(&mut out) {
                    Ok(order) => break order,
                    Err(error) => {
                        out.abort();
                        return Err(error);
                    }
                }
            }
            let wait = match verdict.decision {
                Decision::NextRound { .. } => Duration::ZERO,
                Decision::Converged => PAUSE_BETWEEN_ROUNDS,
                Decision::GiveUp(reason) => {
                    out.abort();
                    let reason = reason.reason();
                    return Err(WorkerError::Migration { id: self.id.clone(), reason, message: verdict.why });
                }
            };
            match self.orders.recv_timeout(wait) {
                Ok(order) => break order,
                Err(RecvTimeoutError::Timeout) if !self.cancel.is_cancelled() => {}
                Err(_) => {
                    out.abort();
                    return Err(WorkerError::Cancelled { what: "the migration" });
                }
            }
            if converged {
                // What was dirtied while waiting belongs to the coming round, not to the rate measured during it.
                vm.collect_dirty(&mut pages)?;
            }
        };
        vm.collect_dirty(&mut pages)?;
        if !switch.is_on() && policy.is_worth_a_round(pages.count()) && !self.cancel.is_cancelled() {
            // What was dirtied while the order was on its way goes over while the guest still runs.
            out.send_round(out.rounds() + 1, &pages, true).map_err(|e| failed(&self.id, &e))?;
            pages.clear_all();
        }
        let rate = policy.predict().bytes_per_second;
        let last = Last { pages: Some(pages), later: switch.is_on(), now: finish::now_pages(goals, rate) };
        let result =
            finish::finish(&self.id, &self.source, &mut out, last, order.epoch, &throttling, &actions);
        throttling.end();
        // The answer is what the handover waits for; ending the log can wait for it.
        let (result, left) = match result {
            Ok((response, left)) => (Ok(response), left),
            Err(error) => (Err(error), Left::new(PageBitmap::new(0))),
        };
        self.answer(order, result)?;
        // The machine is sealed and as good as ended; ending the log would hold that up. If it is given back, its grant
        // ends the log.
        tracking.leave();
        self.follow(&mut out, left, &options)
    }

    /// Post-copy: serves what is left until the destination has it; the guest here is sealed.
    fn follow(
        &self,
        out: &mut Outgoing,
        mut left: Left,
        options: &ConnectOptions,
    ) -> Result<(), WorkerError> {
        if left.count() == 0 {
            return Ok(());
        }
        let Source { session, address, .. } = &self.source;
        let mut resumed = false;
        loop {
            let Err(error) = out.serve(&mut left, Until::Drained { resumed }) else { return Ok(()) };
            if !postcopy::is_lost(&error) {
                return Err(failed(&self.id, &error));
            }
            tracing::warn!(migration = self.id, %error, "the destination is lost while its memory follows");
            out.reopen(address, session, &self.cancel, options).map_err(|e| failed(&self.id, &e))?;
            tracing::info!(migration = self.id, "the destination is reached again");
            resumed = true;
        }
    }

    /// Local mode: the destination maps the memory while the machine runs; then there is nothing left to copy.
    fn run_local(self) -> Result<(), WorkerError> {
        let Source { machine, session, address, .. } = &self.source;
        let memory = machine.memory();
        hand_over(address, session, memory, &self.cancel, CONNECT).map_err(|e| failed(&self.id, &e))?;
        let cancel = self.cancel.clone();
        let mut out = Outgoing::connect(address, session, 1, memory.clone(), 0, cancel, CONNECT)
            .map_err(|e| failed(&self.id, &e))?;
        self.state.send_replace(OutgoingState::Copying(MigrateOutProgress {
            predicted_blackout_us: incoming::micros(LOCAL_BLACKOUT),
            converged: true,
            memory_bytes: memory.bytes(),
            ..MigrateOutProgress::default()
        }));
        let order = match self.await_order(&mut out) {
            Ok(order) => order,
            Err(error) => {
                out.abort();
                return Err(error);
            }
        };
        let mut actions = Actions::new();
        actions.note("LOCAL", "the memory's descriptor was handed over; no page is copied".to_owned());
        let full_speed = Throttling::new(Arc::clone(machine));
        let result = finish::finish(
            &self.id,
            &self.source,
            &mut out,
            Last::default(),
            order.epoch,
            &full_speed,
            &actions,
        );
        self.answer(order, result.map(|(response, _)| response))
    }

    /// Waits until it is told to finish, with nothing left to copy until then.
    fn await_order(&self, out: &mut Outgoing) -> Result<FinishOrder, WorkerError> {
        loop {
            match self.orders.recv_timeout(PAUSE_BETWEEN_ROUNDS) {
                Ok(order) => return Ok(order),
                Err(RecvTimeoutError::Timeout) if !self.cancel.is_cancelled() => {
                    out.check_peer().map_err(|e| failed(&self.id, &e))?;
                }
                Err(_) => return Err(WorkerError::Cancelled { what: "the migration" }),
            }
        }
    }

    fn answer(
        &self,
        order: FinishOrder,
        result: Result<FinishMigrationResponse, WorkerError>,
    ) -> Result<(), WorkerError> {
        let end = result.as_ref().map(drop).map_err(|error| WorkerError::Migration {
            id: self.id.clone(),
            reason: error.reason(),
            message: error.to_string(),
        });
        drop(order.reply.send(result));
        // The guest stands still: who waits for this goes on before anything here is put in order.
        std::thread::yield_now();
        end
    }

    fn report(
        &self,
        out: &Outgoing,
        prediction: &Prediction,
        round: u32,
        converged: bool,
        throttling: &Throttling,
        actions: &Actions,
    ) {
        self.state.send_replace(OutgoingState::Copying(MigrateOutProgress {
            round,
            bytes_sent: out.bytes(),
            bytes_remaining: prediction.remaining_bytes,
            bytes_per_second: prediction.bytes_per_second,
            dirty_bytes_per_second: prediction.dirty_bytes_per_second,
            predicted_blackout_us: prediction.blackout.map_or(0, incoming::micros),
            converged,
            memory_bytes: self.source.machine.memory().bytes(),
            actions: actions.list(),
            throttle_percent: throttling.percent(),
        }));
    }
}
