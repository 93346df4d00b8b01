//! Everything that may happen next, and which of it is a fault.

use super::Side::{Dst, Src};
use super::actors::Task;
use super::{MAX_VERSION, Side, Sim};
use vpmu_server::handover::destination as d;
use vpmu_server::handover::source::Source;

/// What may happen next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    Begin,
    Sync(Side),
    Task(Side, Task),
    Deliver(Side),
    Command(Side),
    Data,
    /// The destination's worker sees the source's worker gone.
    DataEnds,
    /// Post-copy: the last page is there.
    Pages,
    /// Post-copy: the source's worker says that it is not needed any more.
    Drained,
    /// Post-copy: pages cannot come, because nobody has them.
    Starve,
    Execute(Side),
    Restart(Side),
    // Faults and people from here on.
    SyncFails(Side),
    Crash(Side, /* the unsynced record survives */ bool),
    Kill(Side),
    Cut,
    /// Post-copy: the workers are apart for longer than the destination waits.
    Part,
    Cancel,
    TimeOut,
    LeaseExpires,
    /// By the token of the other's directory, which an operator has in hand; no fault by itself.
    ForceByToken(Side),
    /// By a word.
    Force(Side),
    /// That side's directory gives it up to the other, while its host is dead.
    Fence(Side),
    Delete(Side),
    /// The restart policy, or a user.
    StartAfresh(Side),
}

impl Action {
    pub(super) fn is_fault(self) -> bool {
        use Action as A;
        matches!(
            self,
            A::SyncFails(_)
                | A::Crash(..)
                | A::Kill(_)
                | A::Cut
                | A::Part
                | A::Cancel
                | A::TimeOut
                | A::LeaseExpires
                | A::Force(_)
                | A::Fence(_)
                | A::Delete(_)
                | A::StartAfresh(_)
        )
    }
}

impl Sim {
    /// Everything that may happen next.
    pub(crate) fn actions(&self) -> Vec<Action> {
        use Action as A;
        let mut all = Vec::new();
        let mut add = |possible: bool, action| {
            if possible {
                all.push(action);
            }
        };
        let fresh =
            self.sd.machine.is_none() && self.sd.durable.as_ref().is_some_and(|r| r.migration_id.is_empty());
        add(self.sd.up && fresh && self.sw.running, A::Begin);
        add(!self.sw.inbox.is_empty(), A::Command(Src));
        add(!self.dw.inbox.is_empty(), A::Command(Dst));
        add(self.data.is_some(), A::Data);
        let receiving = self.dd.machine.as_ref().is_some_and(|m| m.state() == d::State::Receiving);
        add(self.data.is_none() && !self.sw.alive && receiving, A::DataEnds);
        add(self.waits_for_pages() && self.serves(), A::Pages);
        add(self.waits_for_pages() && !self.serves(), A::Starve);
        let followed = self.sd.machine.as_ref().is_some_and(Source::is_followed);
        add(followed && self.sd.up && self.sw.alive && !self.waits_for_pages(), A::Drained);
        add(!self.to_sd.is_empty(), A::Deliver(Src));
        add(!self.to_dd.is_empty(), A::Deliver(Dst));
        add(self.sd.pending.is_some(), A::Sync(Src));
        add(self.dd.pending.is_some(), A::Sync(Dst));
        for &task in &self.sd.tasks {
            add(task != Task::Look || self.dd.up, A::Task(Src, task));
        }
        for &task in &self.dd.tasks {
            add(task != Task::Look || self.sd.up, A::Task(Dst, task));
        }
        for side in [Src, Dst] {
            add(self.may_force(side, true).is_some(), A::ForceByToken(side));
        }
        add(!self.sd.up, A::Restart(Src));
        add(!self.dd.up, A::Restart(Dst));
        add(self.sw.running && self.newest < MAX_VERSION, A::Execute(Src));
        add(self.dw.running && self.newest < MAX_VERSION, A::Execute(Dst));
        if self.faults_left > 0 {
            let begun = self.sd.machine.is_some() || self.dd.machine.is_some();
            add(self.sd.pending.is_some(), A::SyncFails(Src));
            add(self.dd.pending.is_some(), A::SyncFails(Dst));
            for keep in [false, true] {
                add(self.sd.up && begun && (self.sd.pending.is_some() || !keep), A::Crash(Src, keep));
                add(self.dd.up && begun && (self.dd.pending.is_some() || !keep), A::Crash(Dst, keep));
            }
            add(begun && self.sw.alive, A::Kill(Src));
            add(begun && self.dw.alive, A::Kill(Dst));
            add(begun && (!self.to_dd.is_empty() || !self.to_sd.is_empty()), A::Cut);
            add(self.waits_for_pages() && self.serves(), A::Part);
            add(self.sd.machine.as_ref().is_some_and(|m| m.outcome().is_none()), A::Cancel);
            add(self.sd.machine.as_ref().is_some_and(Source::can_cancel), A::TimeOut);
            add(self.dd.machine.as_ref().is_some_and(|m| m.outcome().is_none()), A::LeaseExpires);
            for side in [Src, Dst] {
                add(self.may_force(side, false).is_some(), A::Force(side));
                add(self.fence(side).is_some_and(|r| Some(&r) != self.held(side)), A::Fence(side));
                add(self.may_delete(side), A::Delete(side));
                add(self.may_start(side), A::StartAfresh(side));
            }
        }
        all
    }
}
