//! A daemon that is started again: by the daemon's own table it goes on, rests, fails or ends what is left; and it asks
//! whether another host owns by force what it owns.

use super::Side::{Dst, Src};
use super::actors::{Cmd, Task};
use super::{MIGRATION, Side, Sim, handover};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::PeerAnswer;
use vpmu_server::handover::answer::{Asked, Ended, Seat};
use vpmu_server::handover::destination::Destination;
use vpmu_server::handover::recovery::{self, Records};
use vpmu_server::handover::source::Source;

impl Sim {
    pub(super) fn restart_source(&mut self) {
        if self.owned(Src) && self.held(Src).is_some_and(|r| !r.migration_id.is_empty()) {
            self.sd.tasks.insert(Task::Look);
        }
        self.sd.up = true;
        self.sd.term += 1;
        // Attach: fences what a dead daemon had sent.
        self.sw.term = self.sd.term;
        let worker = self.sw.condition(false);
        let record = self.sd.durable.clone();
        match recovery::decide(record.as_ref(), worker, Records::Whole) {
            recovery::Action::ResumeSource => {
                let recovered = record.and_then(|r| Source::recovered(handover(Src), &r, worker));
                let Some((mut machine, effects)) = recovered else {
                    self.wrong = Some("no machine where the table says to go on");
                    return;
                };
                machine.postcopy = self.postcopy && self.sw.alive;
                self.sd.machine = Some(machine);
                for event in self.do_source(effects) {
                    self.src(event);
                }
            }
            action => self.recover(Src, action),
        }
    }

    pub(super) fn restart_destination(&mut self) {
        if self.owned(Dst) {
            self.dd.tasks.insert(Task::Look);
        }
        self.dd.up = true;
        self.dd.term += 1;
        self.dw.term = self.dd.term;
        let worker = self.dw.condition(true);
        let record = self.dd.durable.clone();
        match recovery::decide(record.as_ref(), worker, Records::Whole) {
            recovery::Action::ResumeDestination => {
                let recovered = record.and_then(|r| Destination::recovered(handover(Dst), &r, worker));
                let Some((machine, effects)) = recovered else {
                    self.wrong = Some("no machine where the table says to go on");
                    return;
                };
                self.dd.machine = Some(machine);
                for event in self.do_destination(effects) {
                    self.dst(event);
                }
            }
            action => self.recover(Dst, action),
        }
    }

    fn recover(&mut self, side: Side, action: recovery::Action) {
        use recovery::Action as R;
        match action {
            R::Rest | R::Adopt => {}
            R::Grant { epoch } => drop(self.command_worker(side, Cmd::Grant(epoch, true))),
            R::Fail => {
                let failed = if side == Src { &mut self.sd.failed } else { &mut self.dd.failed };
                *failed = true;
            }
            R::EndWorker => drop(self.command_worker(side, Cmd::Shutdown)),
            _ => self.wrong = Some("an alarm without lost records"),
        }
    }

    /// What a daemon asks at its start about a machine that it owns: `migration::later`.
    pub(super) fn look_for_later(&mut self, side: Side) {
        let Some(held) = self.held(side).cloned().filter(|_| self.owned(side)) else { return };
        let (epoch, asker) = (held.epoch.saturating_sub(1), side.host());
        let asked = |seat| Asked { migration_id: MIGRATION, epoch, seat, asker };
        let answer = match side {
            Dst => match &self.sd.machine {
                Some(machine) => machine.answer(),
                None => PeerAnswer::from_record(self.sd.durable.as_ref(), &asked(Seat::Source(Ended::Open))),
            },
            Src => match &self.dd.machine {
                Some(machine) => machine.answer(),
                None => PeerAnswer::from_record(self.dd.durable.as_ref(), &asked(Seat::Destination)),
            },
        };
        let PeerAnswer::Superseded(epoch) = answer else { return };
        if epoch <= held.epoch {
            return;
        }
        if !self.at_rest(side) {
            // Asked again by whoever owns it.
            match side {
                Src => self.sd.tasks.insert(Task::Look),
                Dst => self.dd.tasks.insert(Task::Look),
            };
            return;
        }
        self.settle(side, OwnershipRecord { epoch, phase: Phase::Superseded.into(), ..held });
        self.worker_dies(side);
        self.gave_way = true;
    }
}
