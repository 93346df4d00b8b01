//! The four actors: two daemons, of which their journal and their term survive a death, and two workers, of which
//! nothing does. What each of them does by itself is here; what one does to another is not.

use super::digest_of;
use std::collections::{BTreeSet, VecDeque};
use vpmu_proto::store::OwnershipRecord;
use vpmu_server::handover::recovery::Worker;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Task {
    Converge,
    StorePmu,
    Ask,
    /// After a restart: whether another host owns it by force.
    Look,
}

/// A daemon: what survives its death is `durable` and `term`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Daemon<M> {
    pub(super) up: bool,
    pub(super) term: u64,
    pub(super) machine: Option<M>,
    pub(super) durable: Option<OwnershipRecord>,
    pub(super) pending: Option<OwnershipRecord>,
    pub(super) tasks: BTreeSet<Task>,
    /// Owned here with a dead worker.
    pub(super) failed: bool,
}

impl<M> Daemon<M> {
    pub(super) fn new(durable: Option<OwnershipRecord>) -> Self {
        Self {
            up: true,
            term: 1,
            machine: None,
            durable,
            pending: None,
            tasks: BTreeSet::new(),
            failed: false,
        }
    }

    pub(super) fn crash(&mut self, keep: bool) {
        self.up = false;
        self.machine = None;
        self.tasks.clear();
        self.failed = false;
        let pending = self.pending.take();
        if keep && pending.is_some() {
            self.durable = pending;
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Cmd {
    Finish(u64),
    Grant(u64, bool),
    Seal(u64),
    Shutdown,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Vmm {
    pub(super) exists: bool,
    pub(super) alive: bool,
    pub(super) running: bool,
    pub(super) granted: u64,
    pub(super) sealed: u64,
    pub(super) term: u64,
    /// Version of the copy; `None` while incomplete.
    pub(super) copy: Option<u8>,
    /// Post-copy: pages of it are still at the source.
    pub(super) lacks: bool,
    /// Post-copy: its guest has ended, because they cannot come any more.
    pub(super) ended: bool,
    pub(super) inbox: VecDeque<(u64, Cmd)>,
}

impl Vmm {
    /// As a starting daemon finds it.
    pub(super) fn condition(&self, destination: bool) -> Worker {
        match self {
            _ if !self.alive => Worker::Dead,
            _ if self.ended => Worker::Ended,
            _ if self.running => Worker::Running { epoch: self.granted },
            _ if self.sealed > self.granted || (self.sealed > 0 && self.sealed == self.granted) => {
                Worker::Sealed { epoch: self.sealed }
            }
            _ if destination && self.granted == 0 => match self.copy {
                Some(version) => Worker::Complete { digest: digest_of(version) },
                None => Worker::Receiving,
            },
            _ => Worker::Paused { epoch: self.granted },
        }
    }

    pub(super) fn die(&mut self) {
        *self = Self { exists: self.exists, term: self.term, ..Self::default() };
    }
}
