//! Four actors around the handover's state machines: two daemons (SD, DD) with their journals and two workers (SW, DW),
//! with everything that may fail. The machines are the daemon's own; only the world around them is made up.
//!
//! What may happen in any order: a journal's write becomes durable or fails; messages arrive or the link is cut; a daemon
//! is killed (its unsynced record survives or not) and started again; a worker dies; commands of a dead daemon still
//! reach a worker. `newest` counts what the guest has executed: a run from anything older is the fault to look for.
//!
//! People are there too: one forces a host to be the owner (only while the other host is dead, daemon and worker: a
//! false attestation is the one exception that the rules name), by a word or by the token of the other's directory; one
//! deletes the machine; and the restart policy, or a user, starts afresh what is Failed. A host that comes back asks, as
//! the daemon does, whether it was forced out before anything is started there; that the host which forced it out
//! answers then is assumed where the evidence was a word (with a token the own journal says it).
//!
//! In a world of post-copy the copy at the destination lacks pages until the source's sealed worker has served them:
//! whatever ends that worker before, or keeps the two apart for too long, ends the destination's guest.
//!
//! | module | what |
//! |---|---|
//! | `actors` | daemons and workers, each by itself |
//! | `actions` | what may happen next |
//! | `drivers` | the machines' effects, carried out |
//! | `network` | messages between the daemons |
//! | `workers` | commands to workers, and their ends |
//! | `restart` | a daemon that comes back |
//! | `people` | force, fence, delete, start afresh |
//! | `facts` | what is the case |
//! | `checks` | what must hold, and healing |
#![allow(dead_code, reason = "each test binary uses some of it")]

mod actions;
mod actors;
mod checks;
mod drivers;
mod facts;
mod network;
mod people;
mod restart;
mod workers;

use std::collections::VecDeque;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::source::{self as s, Source};
use vpmu_server::handover::{Digest, Handover};

pub(crate) use actions::Action;
use actors::{Daemon, Vmm};
use network::Msg;

const EPOCH: u64 = 1;
const MIGRATION: &str = "m";
/// The guest makes this many steps that matter.
const MAX_VERSION: u8 = 2;

/// Which side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Side {
    Src,
    Dst,
}
use Side::{Dst, Src};

impl Side {
    fn other(self) -> Self {
        if self == Src { Dst } else { Src }
    }

    fn host(self) -> &'static str {
        if self == Src { "A" } else { "B" }
    }
}

/// The world.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Sim {
    sd: Daemon<Source>,
    dd: Daemon<Destination>,
    sw: Vmm,
    dw: Vmm,
    to_dd: VecDeque<Msg>,
    to_sd: VecDeque<Msg>,
    /// The final state on its way between the workers.
    data: Option<u8>,
    newest: u8,
    /// The destination has said Ready: its copy counts.
    promised: bool,
    faults_left: u8,
    /// Somebody deleted it, or forced an owner without its copy: that copy may be destroyed.
    given_up: bool,
    /// Migrations are post-copies.
    postcopy: bool,
    /// What has been, for what must be possible.
    pub(crate) starved: bool,
    pub(crate) forced: bool,
    pub(crate) gave_way: bool,
    pub(crate) afresh: bool,
    /// What must never happen, when it has.
    pub(crate) wrong: Option<&'static str>,
}

fn digest_of(version: u8) -> Digest {
    [version; 32]
}

fn handover(side: Side) -> Handover {
    let (host, peer) = if side == Src { ("A", "B") } else { ("B", "A") };
    Handover {
        vm_uid: "v".to_owned(),
        migration_id: MIGRATION.to_owned(),
        epoch: EPOCH,
        host: host.to_owned(),
        peer_host: peer.to_owned(),
        peer_address: String::new(),
        peer_store: String::new(),
        incarnation: 1,
        run: true,
    }
}

impl Sim {
    /// A machine that runs on the source; so many faults may happen.
    pub(crate) fn new(faults: u8) -> Self {
        Self::with(faults, false)
    }

    /// The same, and it moves by post-copy.
    pub(crate) fn following(faults: u8) -> Self {
        Self::with(faults, true)
    }

    fn with(faults: u8, postcopy: bool) -> Self {
        let owned = OwnershipRecord {
            vm_uid: "v".to_owned(),
            epoch: EPOCH,
            owner_host: "A".to_owned(),
            incarnation: 1,
            phase: Phase::Owned.into(),
            ..OwnershipRecord::default()
        };
        let sw = Vmm {
            exists: true,
            alive: true,
            running: true,
            granted: EPOCH,
            term: 1,
            copy: Some(0),
            ..Vmm::default()
        };
        Self {
            sd: Daemon::new(Some(owned)),
            dd: Daemon::new(None),
            sw,
            dw: Vmm::default(),
            to_dd: VecDeque::new(),
            to_sd: VecDeque::new(),
            data: None,
            newest: 0,
            promised: false,
            faults_left: faults,
            given_up: false,
            postcopy,
            starved: false,
            forced: false,
            gave_way: false,
            afresh: false,
            wrong: None,
        }
    }

    /// The world after an action.
    pub(crate) fn next(&self, action: Action) -> Self {
        let mut next = self.clone();
        if action.is_fault() {
            next.faults_left = next.faults_left.saturating_sub(1);
        }
        next.perform(action);
        next.look();
        next
    }

    fn perform(&mut self, action: Action) {
        use Action as A;
        match action {
            A::Begin => {
                self.sd.machine = Some(Source::new(handover(Src)));
                self.src(s::Event::Begin);
            }
            A::Sync(side) => self.sync(side),
            A::SyncFails(Src) => self.src(s::Event::PersistFailed),
            A::SyncFails(Dst) => self.dst(d::Event::PersistFailed),
            A::Task(side, task) => self.task(side, task),
            A::Deliver(Src) => self.deliver_to_source(),
            A::Deliver(Dst) => self.deliver_to_destination(),
            A::Command(side) => self.command(side),
            A::Data => {
                let version = self.data.take();
                if self.dw.alive && self.dw.copy.is_none() && !self.dw.ended {
                    self.dw.copy = version;
                    self.dw.lacks = self.postcopy;
                    if let Some(version) = version {
                        self.dst(d::Event::WorkerReady(digest_of(version)));
                    }
                }
            }
            A::DataEnds => self.dst(d::Event::WorkerFailed),
            A::Pages => self.dw.lacks = false,
            A::Drained => self.src(s::Event::Drained),
            A::Starve | A::Part => self.starve(),
            A::Execute(side) => {
                let worker = if side == Src { &mut self.sw } else { &mut self.dw };
                if worker.copy != Some(self.newest) {
                    self.wrong = Some("runs from an older state");
                }
                self.newest += 1;
                worker.copy = Some(self.newest);
            }
            A::Restart(Src) => self.restart_source(),
            A::Restart(Dst) => self.restart_destination(),
            A::Crash(Src, keep) => {
                self.sd.crash(keep);
                self.cut();
            }
            A::Crash(Dst, keep) => {
                self.dd.crash(keep);
                self.cut();
            }
            A::Kill(side) => self.worker_dies(side),
            A::Cut => self.cut(),
            A::Cancel => self.src(s::Event::CancelRequested),
            A::TimeOut => self.src(s::Event::TimedOut),
            A::LeaseExpires => self.dst(d::Event::LeaseExpired),
            A::ForceByToken(side) => self.force(side, true),
            A::Force(side) => self.force(side, false),
            A::Fence(side) => {
                if let Some(fenced) = self.fence(side) {
                    self.settle(side, fenced);
                }
            }
            A::Delete(side) => self.delete(side),
            A::StartAfresh(side) => self.start_afresh(side),
        }
    }
}
