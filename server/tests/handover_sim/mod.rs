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
#![allow(dead_code, reason = "each test binary uses some of it")]

use std::collections::{BTreeSet, VecDeque};
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::answer::{Asked, Ended, Seat};
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::force::{self, Claim, Evidence};
use vpmu_server::handover::phase::may_follow;
use vpmu_server::handover::recovery::{self, Records, Worker};
use vpmu_server::handover::source::{self as s, Source};
use vpmu_server::handover::{Digest, Handover, PeerAnswer};

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

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Msg {
    Prepare,
    Accepted,
    Go(u64, Digest),
    Abort(u64),
    Released,
    Ready(Digest),
    Entered,
    Returned,
    Failed,
    Aborted,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Task {
    Converge,
    StorePmu,
    Ask,
    /// After a restart: whether another host owns it by force.
    Look,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Cmd {
    Finish(u64),
    Grant(u64, bool),
    Seal(u64),
    Shutdown,
}

/// A daemon: what survives its death is `durable` and `term`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Daemon<M> {
    up: bool,
    term: u64,
    machine: Option<M>,
    durable: Option<OwnershipRecord>,
    pending: Option<OwnershipRecord>,
    tasks: BTreeSet<Task>,
    /// Owned here with a dead worker.
    failed: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Vmm {
    exists: bool,
    alive: bool,
    running: bool,
    granted: u64,
    sealed: u64,
    term: u64,
    /// Version of the copy; `None` while incomplete.
    copy: Option<u8>,
    /// Post-copy: pages of it are still at the source.
    lacks: bool,
    /// Post-copy: its guest has ended, because they cannot come any more.
    ended: bool,
    inbox: VecDeque<(u64, Cmd)>,
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
    fn is_fault(self) -> bool {
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

/// What a host without a living machine answers.
fn from_record(held: Option<&OwnershipRecord>, seat: Seat) -> PeerAnswer {
    let asker = if seat == Seat::Destination { "A" } else { "B" };
    PeerAnswer::from_record(held, &Asked { migration_id: MIGRATION, epoch: EPOCH, seat, asker })
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

impl<M> Daemon<M> {
    fn new(durable: Option<OwnershipRecord>) -> Self {
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

    fn crash(&mut self, keep: bool) {
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

impl Vmm {
    /// As a starting daemon finds it.
    fn condition(&self, destination: bool) -> Worker {
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

    fn die(&mut self) {
        *self = Self { exists: self.exists, term: self.term, ..Self::default() };
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
    fn serves(&self) -> bool {
        self.sw.alive && self.sw.copy.is_some() && self.sw.sealed >= self.sw.granted
    }

    /// Post-copy: it runs, or may, on the destination, with pages to come.
    fn waits_for_pages(&self) -> bool {
        self.dw.alive && self.dw.lacks && !self.dw.ended
    }

    /// Between Entered and the last page, without anybody who has the rest: there is nothing left but to say so.
    pub(crate) fn is_torn(&self) -> bool {
        self.entered() && self.waits_for_pages() && !self.sw.alive
    }

    /// From a durable abort on the destination's copy is stale by rule, whatever becomes of the source's.
    fn aborted(&self) -> bool {
        let held = self.sd.durable.as_ref();
        held.is_some_and(|r| r.phase() == Phase::Owned && r.epoch > EPOCH)
    }

    fn arrived_dead(&self) -> bool {
        self.dd.machine.as_ref().is_some_and(|m| m.state() == d::State::Entered { dead: true })
    }

    /// From Entered on the source's copy is stale by rule, whether or not the destination got to run.
    fn entered(&self) -> bool {
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

    fn up(&self, side: Side) -> bool {
        if side == Src { self.sd.up } else { self.dd.up }
    }

    fn held(&self, side: Side) -> Option<&OwnershipRecord> {
        if side == Src { self.sd.durable.as_ref() } else { self.dd.durable.as_ref() }
    }

    fn worker(&self, side: Side) -> &Vmm {
        if side == Src { &self.sw } else { &self.dw }
    }

    /// Nothing is under way there: no write, and no machine that is not over.
    fn at_rest(&self, side: Side) -> bool {
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

    fn owned(&self, side: Side) -> bool {
        self.held(side).is_some_and(|r| matches!(r.phase(), Phase::Owned | Phase::Entered))
    }

    /// Whatever is left of the last life of that side's machine is over; its record is this now.
    fn settle(&mut self, side: Side, record: OwnershipRecord) {
        if may_follow(self.held(side), &record).is_err() {
            self.wrong = Some("a record that may not follow");
        }
        match side {
            Src => (self.sd.machine, self.sd.durable, self.sd.failed) = (None, Some(record), false),
            Dst => (self.dd.machine, self.dd.durable, self.dd.failed) = (None, Some(record), false),
        }
    }

    fn dead(&self, side: Side) -> bool {
        !self.up(side) && !self.worker(side).alive
    }

    /// The record by which that side gives it up to the other.
    fn fence(&self, side: Side) -> Option<OwnershipRecord> {
        let held = self.held(side).filter(|_| self.dead(side))?;
        force::fence(held, side.host(), side.other().host()).ok()
    }

    fn may_force(&self, side: Side, token: bool) -> Option<Claim> {
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

    fn force(&mut self, side: Side, token: bool) {
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

    fn may_delete(&self, side: Side) -> bool {
        let phase = self.held(side).map(OwnershipRecord::phase);
        let here = matches!(phase, Some(Phase::Owned | Phase::Entered | Phase::Released | Phase::Superseded));
        let touched = self.held(side).is_some_and(|r| !r.migration_id.is_empty());
        here && touched && self.up(side) && self.at_rest(side)
    }

    fn delete(&mut self, side: Side) {
        self.given_up |= self.owned(side);
        let held = self.held(side).cloned().unwrap_or_default();
        self.settle(side, OwnershipRecord { phase: Phase::Deleted.into(), ..held });
        self.worker_dies(side);
    }

    fn may_start(&self, side: Side) -> bool {
        let (tasks, failed) = match side {
            Src => (&self.sd.tasks, self.sd.failed),
            Dst => (&self.dd.tasks, self.dd.failed || self.arrived_dead()),
        };
        let free = failed && !tasks.contains(&Task::Look) && !self.worker(side).alive;
        free && self.up(side) && self.owned(side) && self.at_rest(side)
    }

    fn start_afresh(&mut self, side: Side) {
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

    /// What a daemon asks at its start about a machine that it owns: `migration::later`.
    fn look_for_later(&mut self, side: Side) {
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

    /// What must hold in every state.
    fn look(&mut self) {
        if self.sw.running && self.dw.running {
            self.wrong = Some("two live grants");
        }
        for worker in [&self.sw, &self.dw] {
            if worker.running && worker.copy != Some(self.newest) {
                self.wrong = Some("runs from an older state");
            }
        }
    }

    fn cut(&mut self) {
        self.to_dd.clear();
        self.to_sd.clear();
        self.src(s::Event::PeerLost);
        self.dst(d::Event::SourceLost);
    }

    fn worker_dies(&mut self, side: Side) {
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
    fn starve(&mut self) {
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

    fn sync(&mut self, side: Side) {
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

    fn task(&mut self, side: Side, task: Task) {
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

    fn deliver_to_source(&mut self) {
        let Some(message) = self.to_sd.pop_front() else { return };
        match message {
            Msg::Accepted => self.src(s::Event::PrepareAccepted),
            Msg::Ready(digest) => self.src(s::Event::ReadyReceived(digest)),
            Msg::Entered => self.src(s::Event::EnteredReceived),
            Msg::Returned => self.src(s::Event::ReturnedReceived),
            Msg::Failed => self.src(s::Event::PeerFailed),
            _ => {}
        }
    }

    fn deliver_to_destination(&mut self) {
        let Some(message) = self.to_dd.pop_front() else { return };
        let forced = |m: &Destination| {
            matches!(m.outcome(), Some(d::Outcome::Forced | d::Outcome::ForcedDead | d::Outcome::Superseded))
        };
        if matches!(message, Msg::Go(..)) && self.dd.machine.as_ref().is_none_or(forced) {
            // Nobody is there to whom a stream could be opened: the source asks.
            return self.src(s::Event::PeerLost);
        }
        match message {
            Msg::Prepare if self.dd.machine.is_none() && self.dd.durable.is_none() => {
                self.dd.machine = Some(Destination::new(handover(Dst)));
                self.dst(d::Event::Begin);
            }
            Msg::Prepare => self.to_sd.push_back(Msg::Failed),
            Msg::Go(epoch, digest) => self.dst(d::Event::GoReceived { epoch, digest }),
            Msg::Abort(epoch) => self.dst(d::Event::AbortReceived { epoch }),
            Msg::Released => self.dst(d::Event::ReleasedReceived),
            _ => {}
        }
    }

    fn command(&mut self, side: Side) {
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

    fn src(&mut self, event: s::Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let Some(machine) = self.sd.machine.as_mut().filter(|_| self.sd.up) else { return };
            let effects = machine.apply(event);
            events.extend(self.do_source(effects));
        }
    }

    fn do_source(&mut self, effects: Vec<s::Effect>) -> Vec<s::Event> {
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

    fn command_worker(&mut self, side: Side, command: Cmd) -> Option<Msg> {
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

    fn dst(&mut self, event: d::Event) {
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

    fn do_destination(&mut self, effects: Vec<d::Effect>) -> Vec<d::Event> {
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

    fn restart_source(&mut self) {
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

    fn restart_destination(&mut self) {
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

    /// From here without faults: `None` if all is well within so many steps, else what is not.
    pub(crate) fn heal(&self, steps: usize) -> Option<&'static str> {
        use Action as A;
        let (mut sim, torn) = (self.clone(), self.is_torn() && !self.given_up);
        for n in 0..steps {
            if sim.wrong.is_some() {
                return sim.wrong;
            }
            let mut next: Vec<_> = sim
                .actions()
                .into_iter()
                .filter(|a| !a.is_fault() && !matches!(a, A::Begin | A::Execute(_)))
                .collect();
            // Questions are repeated for ever: everything else first, then both sides in turn.
            next.sort_by_key(|a| match a {
                A::Restart(_) => 0,
                A::Task(_, Task::Ask) => 2,
                _ => 1,
            });
            let asks = next.iter().all(|a| matches!(a, A::Task(_, Task::Ask)));
            let Some(&action) = next.get(if asks { n % next.len().max(1) } else { 0 }) else { break };
            sim = sim.next(action);
        }
        if sim.wrong.is_some() {
            return sim.wrong;
        }
        if sim.held(Src).is_some_and(|r| r.phase() == Phase::HandedOver) {
            return Some("a tombstone waits for ever");
        }
        if torn && (sim.running_on().is_some() || sim.dw.alive) {
            return Some("it goes on without a part of its memory");
        }
        if sim.running_on().is_some() && sim.waits_for_pages() {
            return Some("its memory never follows");
        }
        match (sim.running_on(), sim.copy_is_left()) {
            (Some(Src), _) if sim.dw.alive => Some("a copy is left over at the destination"),
            (Some(Dst), _) if sim.sw.alive => Some("a copy is left over at the source"),
            (None, _) if sim.given_up => None,
            // Its last owner's directory gave it up, and says so.
            (None, false) if [Src, Dst].iter().any(|s| sim.held(*s).and_then(force::token).is_some()) => None,
            (None, true) => Some("a current copy exists and nobody runs it"),
            (None, false) if !sim.sd.failed && !sim.dd.failed && !sim.arrived_dead() => {
                Some("lost, and nobody says so")
            }
            _ => None,
        }
    }
}
