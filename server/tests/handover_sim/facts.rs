//! What is the case in a world, as somebody sees it who sees everything. Nothing here changes anything.

use super::Side::{Dst, Src};
use super::actors::Vmm;
use super::{EPOCH, Side, Sim};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::force;
use vpmu_server::handover::source::{self as s, Source};

impl Sim {
    pub(crate) fn running_on(&self) -> Option<Side> {
        match (self.sw.running, self.dw.running) {
            (true, _) => Some(Src),
            (_, true) => Some(Dst),
            _ => None,
        }
    }

    /// A worker still has the newest state.
    pub(crate) fn copy_is_left(&self) -> bool {
        let newest = |w: &Vmm| w.alive && w.copy == Some(self.newest);
        let whole = !self.dw.lacks || self.serves();
        // In a post-copy the state alone is no copy.
        let sent = self.data == Some(self.newest) && !self.postcopy;
        let coming = newest(&self.dw) && whole || sent;
        (newest(&self.sw) && !self.entered()) || (coming && !self.aborted())
    }

    /// Post-copy: the source's worker is sealed and has what was not sent.
    pub(super) fn serves(&self) -> bool {
        self.sw.alive && self.sw.copy.is_some() && self.sw.sealed >= self.sw.granted
    }

    /// Post-copy: it runs, or may, on the destination, with pages to come.
    pub(super) fn waits_for_pages(&self) -> bool {
        self.dw.alive && self.dw.lacks && !self.dw.ended
    }

    /// Between Entered and the last page, without anybody who has the rest: there is nothing left but to say so.
    pub(crate) fn is_torn(&self) -> bool {
        self.entered() && self.waits_for_pages() && !self.sw.alive
    }

    /// From a durable abort on the destination's copy is stale by rule, whatever becomes of the source's.
    pub(super) fn aborted(&self) -> bool {
        let held = self.sd.durable.as_ref();
        held.is_some_and(|r| r.phase() == Phase::Owned && r.epoch > EPOCH)
    }

    pub(super) fn arrived_dead(&self) -> bool {
        self.dd.machine.as_ref().is_some_and(|m| m.state() == d::State::Entered { dead: true })
    }

    /// From Entered on the source's copy is stale by rule, whether or not the destination got to run.
    pub(super) fn entered(&self) -> bool {
        let owner = |phase: Phase, epoch| matches!(phase, Phase::Entered | Phase::Owned) && epoch > EPOCH;
        let Some(held) = self.dd.durable.as_ref() else { return false };
        // Its fenced directory still tells; until the source is forced to own it.
        let was = force::token(held).filter(|_| !self.aborted());
        owner(held.phase(), held.epoch) || was.is_some_and(|token| owner(token.phase(), token.held_epoch))
    }

    pub(crate) fn moved(&self) -> bool {
        self.sd.machine.as_ref().and_then(Source::outcome) == Some(s::Outcome::Moved)
    }

    pub(crate) fn returned(&self) -> bool {
        self.sd.machine.as_ref().and_then(Source::outcome) == Some(s::Outcome::Returned)
    }

    pub(super) fn up(&self, side: Side) -> bool {
        if side == Src { self.sd.up } else { self.dd.up }
    }

    pub(super) fn held(&self, side: Side) -> Option<&OwnershipRecord> {
        if side == Src { self.sd.durable.as_ref() } else { self.dd.durable.as_ref() }
    }

    pub(super) fn worker(&self, side: Side) -> &Vmm {
        if side == Src { &self.sw } else { &self.dw }
    }

    /// Nothing is under way there: no write, and no machine that is not over.
    pub(super) fn at_rest(&self, side: Side) -> bool {
        match side {
            Src => {
                self.sd.pending.is_none() && self.sd.machine.as_ref().is_none_or(|m| m.outcome().is_some())
            }
            Dst => {
                let entered = |m: &Destination| matches!(m.state(), d::State::Entered { .. });
                let over = |m: &Destination| m.outcome().is_some() || entered(m);
                self.dd.pending.is_none() && self.dd.machine.as_ref().is_none_or(over)
            }
        }
    }

    pub(super) fn owned(&self, side: Side) -> bool {
        self.held(side).is_some_and(|r| matches!(r.phase(), Phase::Owned | Phase::Entered))
    }

    pub(super) fn dead(&self, side: Side) -> bool {
        !self.up(side) && !self.worker(side).alive
    }
}
