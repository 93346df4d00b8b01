//! What people do, and the restart policy: force an owner, fence a directory, delete, start afresh; each with when it may
//! be done at all. The rules of force themselves are the daemon's own.

use super::Side::{Dst, Src};
use super::actors::{Task, Vmm};
use super::{Side, Sim};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::force::{self, Claim, Evidence};
use vpmu_server::handover::phase::may_follow;
use vpmu_server::handover::source::{self as s, Source};

impl Sim {
    /// Whatever is left of the last life of that side's machine is over; its record is this now.
    pub(super) fn settle(&mut self, side: Side, record: OwnershipRecord) {
        if may_follow(self.held(side), &record).is_err() {
            self.wrong = Some("a record that may not follow");
        }
        match side {
            Src => (self.sd.machine, self.sd.durable, self.sd.failed) = (None, Some(record), false),
            Dst => (self.dd.machine, self.dd.durable, self.dd.failed) = (None, Some(record), false),
        }
    }

    /// The record by which that side gives it up to the other.
    pub(super) fn fence(&self, side: Side) -> Option<OwnershipRecord> {
        let held = self.held(side).filter(|_| self.dead(side))?;
        force::fence(held, side.host(), side.other().host()).ok()
    }

    pub(super) fn may_force(&self, side: Side, token: bool) -> Option<Claim> {
        let other = side.other();
        let held = self.held(side).filter(|r| !r.migration_id.is_empty())?;
        // What a destination dropped or gave back is not there to be named.
        let gone = side == Dst && matches!(held.phase(), Phase::Aborted | Phase::Returned);
        if gone || !self.up(side) {
            return None;
        }
        let (here, there) = (side.host(), other.host());
        let evidence = if token {
            Evidence::Token(force::token(self.held(other)?)?)
        } else if self.dead(other) {
            Evidence::Word { host: there.to_owned(), boot_id: String::new(), epoch: 0 }
        } else {
            return None;
        };
        let claim = force::judge(held, here, &evidence).ok()?;
        let heeds = match side {
            Src => self.sd.machine.as_ref().is_some_and(|m| m.step(s::Event::Forced(claim)).0 != m.state()),
            Dst => self.dd.machine.as_ref().is_some_and(|m| m.step(d::Event::Forced(claim)).0 != m.state()),
        };
        (heeds || self.at_rest(side)).then_some(claim)
    }

    pub(super) fn force(&mut self, side: Side, token: bool) {
        let Some(claim) = self.may_force(side, token) else { return };
        self.forced = true;
        if self.at_rest(side) {
            // The actor's: a tombstone is owned again, without a copy.
            self.given_up = true;
            let held = self.held(side).cloned().unwrap_or_default();
            let owner_host = side.host().to_owned();
            self.settle(
                side,
                OwnershipRecord { epoch: claim.epoch, phase: Phase::Owned.into(), owner_host, ..held },
            );
            self.worker_dies(side);
            match side {
                Src => self.sd.failed = true,
                Dst => self.dd.failed = true,
            }
            return;
        }
        match side {
            Src => {
                self.src(s::Event::Forced(claim));
                let state = self.sd.machine.as_ref().map(Source::state);
                self.given_up |= matches!(state, Some(s::State::Forcing { copy: false, .. }));
            }
            Dst => {
                self.dst(d::Event::Forced(claim));
                let state = self.dd.machine.as_ref().map(Destination::state);
                self.given_up |= matches!(state, Some(d::State::Forcing { copy: false, .. }));
            }
        }
    }

    pub(super) fn may_delete(&self, side: Side) -> bool {
        let phase = self.held(side).map(OwnershipRecord::phase);
        let here = matches!(phase, Some(Phase::Owned | Phase::Entered | Phase::Released | Phase::Superseded));
        let touched = self.held(side).is_some_and(|r| !r.migration_id.is_empty());
        here && touched && self.up(side) && self.at_rest(side)
    }

    pub(super) fn delete(&mut self, side: Side) {
        self.given_up |= self.owned(side);
        let held = self.held(side).cloned().unwrap_or_default();
        self.settle(side, OwnershipRecord { phase: Phase::Deleted.into(), ..held });
        self.worker_dies(side);
    }

    pub(super) fn may_start(&self, side: Side) -> bool {
        let (tasks, failed) = match side {
            Src => (&self.sd.tasks, self.sd.failed),
            Dst => (&self.dd.tasks, self.dd.failed || self.arrived_dead()),
        };
        let free = failed && !tasks.contains(&Task::Look) && !self.worker(side).alive;
        free && self.up(side) && self.owned(side) && self.at_rest(side)
    }

    pub(super) fn start_afresh(&mut self, side: Side) {
        if self.copy_is_left() && !self.given_up {
            self.wrong = Some("started afresh beside a current copy");
        }
        let held = self.held(side).cloned().unwrap_or_default();
        let (epoch, incarnation) = (held.epoch, held.incarnation + 1);
        self.settle(side, OwnershipRecord { phase: Phase::Owned.into(), incarnation, ..held });
        self.newest += 1;
        let copy = Some(self.newest);
        let term = if side == Src { self.sd.term } else { self.dd.term };
        let worker =
            Vmm { exists: true, alive: true, running: true, granted: epoch, term, copy, ..Vmm::default() };
        match side {
            Src => self.sw = worker,
            Dst => self.dw = worker,
        }
        self.afresh = true;
    }
}
