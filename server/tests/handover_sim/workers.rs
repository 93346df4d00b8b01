//! Workers at work: commands that reach them in order, also those of a dead daemon, and their ends.
//!
//! The rules that a worker itself keeps (fence, seal, grant) are modelled here; see the daemon's design for them.

use super::Side::{Dst, Src};
use super::actors::Cmd;
use super::network::Msg;
use super::{Side, Sim, digest_of};
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::source as s;

impl Sim {
    pub(super) fn command(&mut self, side: Side) {
        let stale = if side == Src { self.entered() } else { !self.promised || self.aborted() };
        let given_up = self.given_up;
        let other_has = {
            let other = if side == Src { &self.dw } else { &self.sw };
            other.alive && other.copy == Some(self.newest) && !other.lacks
        };
        let owed = side == Src && self.waits_for_pages() && self.entered();
        let (worker, up, term) = match side {
            Src => (&mut self.sw, self.sd.up, self.sd.term),
            Dst => (&mut self.dw, self.dd.up, self.dd.term),
        };
        let Some((from, command)) = worker.inbox.pop_front() else { return };
        if !worker.alive || from < worker.term {
            return;
        }
        let heard = up && from == term;
        match command {
            Cmd::Finish(epoch) => {
                worker.running = false;
                worker.sealed = worker.sealed.max(epoch);
                let Some(version) = worker.copy else { return };
                self.data = Some(version);
                if heard {
                    let postcopy = self.postcopy;
                    if let Some(machine) = &mut self.sd.machine {
                        machine.postcopy = postcopy;
                    }
                    self.src(s::Event::Sealed(digest_of(version)));
                }
            }
            Cmd::Grant(epoch, run) => {
                let good = epoch > worker.sealed && epoch >= worker.granted && worker.copy.is_some();
                if good {
                    worker.granted = epoch;
                    worker.running = run;
                }
                let over = worker.ended;
                match (heard, side) {
                    // The driver asks why, and hears that its guest has ended.
                    (true, _) if !good && over => self.worker_dies(side),
                    (true, Src) => self.src(if good { s::Event::Granted } else { s::Event::GrantFailed }),
                    (true, Dst) => self.dst(if good { d::Event::Granted } else { d::Event::GrantFailed }),
                    _ => {}
                }
            }
            Cmd::Seal(epoch) => {
                worker.sealed = worker.sealed.max(epoch);
                worker.running &= worker.granted > worker.sealed;
                match (heard, side) {
                    (true, Src) => self.src(s::Event::WorkerSealed),
                    (true, Dst) => self.dst(d::Event::WorkerSealed),
                    _ => {}
                }
            }
            Cmd::Shutdown => {
                if worker.copy == Some(self.newest) && !other_has && !stale && !given_up {
                    self.wrong = Some("the last current copy is destroyed");
                }
                if owed && !given_up {
                    self.wrong = Some("who has the missing pages is ended");
                }
                self.worker_dies(side);
            }
        }
    }

    pub(super) fn command_worker(&mut self, side: Side, command: Cmd) -> Option<Msg> {
        let (worker, term) =
            if side == Src { (&mut self.sw, self.sd.term) } else { (&mut self.dw, self.dd.term) };
        if let Cmd::Grant(epoch, _) = command {
            let held = if side == Src { self.sd.durable.as_ref() } else { self.dd.durable.as_ref() };
            let right = [Phase::Owned, Phase::Entered];
            if !held.is_some_and(|r| right.contains(&r.phase()) && r.epoch == epoch) {
                self.wrong = Some("a grant before its record was durable");
            }
        }
        if worker.alive {
            worker.inbox.push_back((term, command));
        } else if side == Src {
            // The driver finds it dead.
            self.worker_dies(Src);
        } else {
            self.worker_dies(Dst);
        }
        None
    }

    pub(super) fn worker_dies(&mut self, side: Side) {
        if side == Src {
            self.sw.die();
            self.src(s::Event::WorkerDied);
            self.sd.failed |= self.sd.up && self.sd.machine.as_ref().is_none_or(|m| m.outcome().is_some());
        } else {
            self.dw.die();
            self.dst(d::Event::WorkerDied);
            self.dd.failed |= self.dd.up && self.dd.machine.as_ref().is_none_or(|m| m.outcome().is_some());
        }
    }

    /// The destination's guest ends. Whoever owns it hears of it; before that it is found out where it would be run.
    pub(super) fn starve(&mut self) {
        use d::State as S;
        self.starved |= self.entered();
        (self.dw.running, self.dw.ended, self.dw.copy) = (false, true, None);
        let adopted = match self.dd.machine.as_ref().map(Destination::state) {
            None => self.owned(Dst),
            Some(S::Entered { .. } | S::Owning { .. } | S::Over(_)) => true,
            Some(_) => false,
        };
        if self.dd.up && adopted {
            self.worker_dies(Dst);
        }
    }
}
