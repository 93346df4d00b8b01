//! The drivers of the two machines: what they are told becomes effects, and effects become writes, commands, messages and
//! work to be done. One event at a time, to its end, as the daemon's own drivers do it.

use super::Side::{Dst, Src};
use super::actors::{Cmd, Task, Vmm};
use super::network::Msg;
use super::{EPOCH, MIGRATION, Side, Sim};
use std::collections::VecDeque;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::PeerAnswer;
use vpmu_server::handover::answer::{Asked, Ended, Seat};
use vpmu_server::handover::destination as d;
use vpmu_server::handover::phase::may_follow;
use vpmu_server::handover::source as s;

impl Sim {
    pub(super) fn src(&mut self, event: s::Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(machine) = self.sd.machine.as_mut().filter(|_| self.sd.up) else { return };
            let effects = machine.apply(event);
            events.extend(self.do_source(effects));
        }
    }

    pub(super) fn do_source(&mut self, effects: Vec<s::Effect>) -> Vec<s::Event> {
        use s::Effect as E;
        let mut events = Vec::new();
        for effect in effects {
            let message = match effect {
                E::Persist(record) => {
                    if self.sd.pending.as_ref().is_some_and(|p| *p != record) {
                        self.wrong = Some("two records at once");
                    }
                    let whole = self.dw.alive && self.dw.copy == Some(self.newest) && !self.dw.lacks;
                    let promised = self.promised && whole;
                    let abort = record.phase() == Phase::Owned && record.epoch == EPOCH + 1;
                    // A decision that is already in doubt must be repeated, whatever has died since.
                    if abort && self.sd.pending.is_none() && !self.sw.alive && promised {
                        self.wrong = Some("an abort gives up the last current copy");
                    }
                    self.sd.pending = Some(record);
                    None
                }
                E::StartCopy => self.source_task(Task::Converge),
                E::PersistPmu => self.source_task(Task::StorePmu),
                E::AskPeer => self.source_task(Task::Ask),
                E::FinishCopy { epoch } => self.command_worker(Src, Cmd::Finish(epoch)),
                E::Grant { epoch, run } => self.command_worker(Src, Cmd::Grant(epoch, run)),
                E::SealWorker { epoch } => self.command_worker(Src, Cmd::Seal(epoch)),
                E::EndWorker => self.command_worker(Src, Cmd::Shutdown),
                E::CancelCopy => {
                    self.data = None;
                    None
                }
                E::RefuseCancel => None,
                E::Done(outcome) => {
                    self.sd.failed |= matches!(outcome, s::Outcome::Failed(_));
                    None
                }
                E::Prepare => Some(Msg::Prepare),
                E::SendGo { epoch, digest } => Some(Msg::Go(epoch, digest)),
                E::SendAbort { epoch, .. } => Some(Msg::Abort(epoch)),
                E::SendReleased { .. } => Some(Msg::Released),
            };
            if let Some(message) = message {
                if let Msg::Go(epoch, _) = message {
                    let held = self.sd.durable.as_ref();
                    if !held.is_some_and(|r| r.phase() == Phase::HandedOver && r.epoch == epoch) {
                        self.wrong = Some("Go before HandedOver was durable");
                    }
                }
                if self.dd.up {
                    self.to_dd.push_back(message);
                } else {
                    events.push(s::Event::PeerLost);
                }
            }
        }
        events
    }

    fn source_task(&mut self, task: Task) -> Option<Msg> {
        self.sd.tasks.insert(task);
        None
    }

    pub(super) fn dst(&mut self, event: d::Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(machine) = self.dd.machine.as_mut().filter(|_| self.dd.up) else { return };
            let ready = matches!(machine.state(), d::State::Ready { .. });
            let entering = ready && matches!(machine.step(event).0, d::State::Entering { .. });
            let effects = if entering && self.dw.ended {
                // The driver looks before it enters.
                events.push_front(event);
                self.dw.die();
                machine.apply(d::Event::WorkerDied)
            } else {
                machine.apply(event)
            };
            events.extend(self.do_destination(effects));
        }
    }

    pub(super) fn do_destination(&mut self, effects: Vec<d::Effect>) -> Vec<d::Event> {
        use d::Effect as E;
        let mut events = Vec::new();
        for effect in effects {
            let message = match effect {
                E::Persist(record) => {
                    if self.dd.pending.as_ref().is_some_and(|p| *p != record) {
                        self.wrong = Some("two records at once");
                    }
                    self.dd.pending = Some(record);
                    None
                }
                E::StartWorker => {
                    self.dw = Vmm { exists: true, alive: true, term: self.dd.term, ..Vmm::default() };
                    Some(Msg::Accepted)
                }
                E::AskSource => {
                    self.dd.tasks.insert(Task::Ask);
                    None
                }
                E::Grant { epoch, run } => self.command_worker(Dst, Cmd::Grant(epoch, run)),
                E::SealWorker { epoch } => self.command_worker(Dst, Cmd::Seal(epoch)),
                E::EndWorker => self.command_worker(Dst, Cmd::Shutdown),
                E::Done(outcome) => {
                    self.dd.failed |= matches!(outcome, d::Outcome::ArrivedDead | d::Outcome::ForcedDead);
                    if matches!(outcome, d::Outcome::Forced | d::Outcome::ForcedDead) && self.sd.up {
                        // Its task ends, and the stream with it.
                        self.src(s::Event::PeerLost);
                    }
                    None
                }
                E::SendReady { digest, .. } => {
                    self.promised = true;
                    Some(Msg::Ready(digest))
                }
                E::SendEntered { .. } => Some(Msg::Entered),
                E::SendReturned { .. } => Some(Msg::Returned),
                E::SendFailed => Some(Msg::Failed),
                E::SendAborted { .. } => Some(Msg::Aborted),
            };
            if let Some(message) = message {
                if self.sd.up {
                    self.to_sd.push_back(message);
                } else {
                    events.push(d::Event::SourceLost);
                }
            }
        }
        events
    }

    pub(super) fn sync(&mut self, side: Side) {
        let (durable, pending) = match side {
            Src => (&mut self.sd.durable, self.sd.pending.take()),
            Dst => (&mut self.dd.durable, self.dd.pending.take()),
        };
        let Some(record) = pending else { return };
        if may_follow(durable.as_ref(), &record).is_err() {
            self.wrong = Some("a record that may not follow");
            return;
        }
        let phase = record.phase();
        if phase == Phase::Uncertain {
            self.wrong = Some("uncertain without lost records");
        }
        *durable = Some(record);
        match side {
            Src => self.src(s::Event::Persisted(phase)),
            Dst => self.dst(d::Event::Persisted(phase)),
        }
    }

    pub(super) fn task(&mut self, side: Side, task: Task) {
        match side {
            Src => self.sd.tasks.remove(&task),
            Dst => self.dd.tasks.remove(&task),
        };
        match (side, task) {
            (side, Task::Look) => self.look_for_later(side),
            (Src, Task::Converge) => self.src(s::Event::Converged),
            (Src, Task::StorePmu) => self.src(s::Event::PmuPersisted),
            (Src, Task::Ask) => {
                let answer = match (&self.dd.up, &self.dd.machine) {
                    (false, _) => PeerAnswer::Unreachable,
                    (true, Some(machine)) => machine.answer(),
                    (true, None) => from_record(self.dd.durable.as_ref(), Seat::Destination),
                };
                self.src(s::Event::PeerAnswered(answer));
            }
            (Dst, Task::Ask) => {
                let answer = match (&self.sd.up, &self.sd.machine) {
                    (false, _) => PeerAnswer::Unreachable,
                    (true, Some(machine)) => machine.answer(),
                    (true, None) => from_record(self.sd.durable.as_ref(), Seat::Source(Ended::Open)),
                };
                self.dst(d::Event::SourceAnswered(answer));
            }
            (Dst, _) => {}
        }
    }
}

/// What a host without a living machine answers.
fn from_record(held: Option<&OwnershipRecord>, seat: Seat) -> PeerAnswer {
    let asker = if seat == Seat::Destination { "A" } else { "B" };
    PeerAnswer::from_record(held, &Asked { migration_id: MIGRATION, epoch: EPOCH, seat, asker })
}
