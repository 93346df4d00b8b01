//! The cells of the matrix: where a handover is stopped, what happens to whom then, and what it must come to.

use std::fmt;

use vpmu_server::handover::step::{HandoverStep as Step, HoldPoint};

/// Where workers live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isolation {
    Process,
    Thread,
}

/// What goes on when the fault comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scene {
    /// A migration that would succeed.
    Move,
    /// One that does not end pre-copy and is cancelled.
    Cancel,
    /// One whose destination's worker has died after the commit: the machine comes back.
    Return,
    /// A post-copy whose machine runs on the destination while its memory still follows: no process is held, the fault
    /// comes then.
    Follow,
}

/// The four processes; in thread isolation a worker is its daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Who {
    SD,
    SW,
    DD,
    DW,
}

/// What happens at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Fault {
    /// SIGKILL to each.
    Kill(&'static [Who]),
    /// SIGSTOP for longer than every time-out.
    Stop(Who),
    /// No connection between the daemons, either way, for longer than every time-out.
    Cut,
    /// Connections stay, and what the source's side sends is lost.
    OneWay,
    /// The daemon's file system is full for a while.
    Disk(Who),
    /// The data connection between the workers breaks, and may be opened anew.
    CutData,
    /// It breaks, and its source is away for longer than the destination waits.
    Part,
}

/// Where the machine is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Got {
    Src,
    Dst,
    Lost,
}

/// One cell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cell {
    pub isolation: Isolation,
    pub scene: Scene,
    pub point: HoldPoint,
    pub fault: Fault,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kill(who) => {
                let names: Vec<_> = who.iter().map(|w| format!("{w:?}")).collect();
                write!(f, "kill-{}", names.join("+"))
            }
            Self::Stop(who) => write!(f, "stop-{who:?}"),
            Self::Cut => f.write_str("cut"),
            Self::OneWay => f.write_str("one-way"),
            Self::Disk(who) => write!(f, "disk-{who:?}"),
            Self::CutData => f.write_str("cut-data"),
            Self::Part => f.write_str("part"),
        }
    }
}

impl fmt::Display for Cell {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let isolation = if self.isolation == Isolation::Process { "process" } else { "thread" };
        let scene = match self.scene {
            Scene::Move => "move",
            Scene::Cancel => "cancel",
            Scene::Return => "return",
            Scene::Follow => return write!(f, "{isolation}/follow/{}", self.fault),
        };
        write!(f, "{isolation}/{scene}/{}/{}", self.point, self.fault)
    }
}

/// Main path of the source and of the destination, in order.
const SOURCE: [Step; 11] = [
    Step::SourcePersistOpen,
    Step::SourceSendPrepare,
    Step::SourceStartCopy,
    Step::SourcePersistQuiesced,
    Step::SourceSeal,
    Step::SourcePersistHandedOver,
    Step::SourceSendGo,
    Step::SourcePersistPmu,
    Step::SourceRelease,
    Step::SourcePersistReleased,
    Step::SourceSendReleased,
];
const DESTINATION: [Step; 6] = [
    Step::DestinationPersistIncoming,
    Step::DestinationStartWorker,
    Step::DestinationSendReady,
    Step::DestinationPersistEntered,
    Step::DestinationGrant,
    Step::DestinationSendEntered,
];
const CANCEL: [Step; 4] =
    [Step::SourcePersistOwned, Step::SourceGrant, Step::SourceSendAbort, Step::DestinationPersistAborted];
const RETURN: [Step; 4] = [
    Step::DestinationPersistReturned,
    Step::DestinationSendReturned,
    Step::SourcePersistOwned,
    Step::SourceGrant,
];
/// Faults while memory follows, in process isolation, besides all others but a full disk; the rest of the time a post-copy
/// is like any other migration.
const FOLLOW: [Fault; 2] = [Fault::CutData, Fault::Part];
/// Where those are filed: after it has entered.
const ENTERED: HoldPoint = HoldPoint { after: true, step: Step::DestinationSendEntered };
/// Steps that no real process can be brought to from outside: they need a copy that differs from what was sealed, or
/// follow from them; the model covers them. The destination's record stays Entered until it is changed here.
pub const UNREACHED: [Step; 2] = [Step::DestinationSeal, Step::DestinationPersistOwned];

use Who::{DD, DW, SD, SW};

const PROCESS: [Fault; 15] = [
    Fault::Kill(&[SD]),
    Fault::Kill(&[SW]),
    Fault::Kill(&[DD]),
    Fault::Kill(&[DW]),
    Fault::Kill(&[SD, SW]),
    Fault::Kill(&[DD, DW]),
    Fault::Kill(&[SD, DD]),
    Fault::Stop(SD),
    Fault::Stop(SW),
    Fault::Stop(DD),
    Fault::Stop(DW),
    Fault::Cut,
    Fault::OneWay,
    Fault::Disk(SD),
    Fault::Disk(DD),
];
const THREAD: [Fault; 9] = [
    Fault::Kill(&[SD]),
    Fault::Kill(&[DD]),
    Fault::Kill(&[SD, DD]),
    Fault::Stop(SD),
    Fault::Stop(DD),
    Fault::Cut,
    Fault::OneWay,
    Fault::Disk(SD),
    Fault::Disk(DD),
];

impl Cell {
    /// Every cell there is.
    pub fn all() -> Vec<Self> {
        let mut cells = Vec::new();
        for isolation in [Isolation::Process, Isolation::Thread] {
            let faults: &[Fault] = if isolation == Isolation::Process { &PROCESS } else { &THREAD };
            let more: &[Fault] = if isolation == Isolation::Process { &FOLLOW } else { &[] };
            let follow = faults.iter().filter(|fault| !matches!(fault, Fault::Disk(_))).chain(more);
            let scene = Scene::Follow;
            cells.extend(follow.map(|&fault| Self { isolation, scene, point: ENTERED, fault }));
            for scene in [Scene::Move, Scene::Cancel, Scene::Return] {
                let steps: Vec<Step> = match scene {
                    Scene::Move => SOURCE.into_iter().chain(DESTINATION).collect(),
                    Scene::Cancel => CANCEL.to_vec(),
                    Scene::Return => RETURN.to_vec(),
                    Scene::Follow => continue,
                };
                for step in steps {
                    for after in [false, true] {
                        for &fault in faults {
                            let cell = Self { isolation, scene, point: HoldPoint { after, step }, fault };
                            if cell.exists() {
                                cells.push(cell);
                            }
                        }
                    }
                }
            }
        }
        cells
    }

    /// The cell of a name.
    pub fn named(name: &str) -> Option<Self> {
        Self::all().into_iter().find(|c| c.to_string() == name)
    }

    /// The source's daemon is the one that stops itself.
    pub fn source_holds(&self) -> bool {
        self.point.step.name().starts_with("source")
    }

    /// How far it is: the place of the step on the side that holds, from 1, and whether the step is done.
    fn at(&self) -> (usize, bool) {
        let path: &[Step] = if self.source_holds() { &SOURCE } else { &DESTINATION };
        let place = path.iter().position(|s| *s == self.point.step).map_or(0, |p| p + 1);
        (place, self.point.after)
    }

    /// What is to be told of a machine that is lost; none where more than one is right.
    pub fn reason(&self) -> Option<&'static str> {
        let lost = match self.fault {
            Fault::Kill(who) => who.contains(&SW) || self.isolation == Isolation::Thread && who == [SD],
            Fault::Part => true,
            _ => false,
        };
        (self.scene == Scene::Follow && lost).then_some("POSTCOPY_SOURCE_LOST")
    }

    /// Whether that process is there at the point.
    fn exists(&self) -> bool {
        let dw = matches!(self.fault, Fault::Kill(who) if who.contains(&DW)) || self.fault == Fault::Stop(DW);
        let sw = matches!(self.fault, Fault::Kill(who) if who.contains(&SW)) || self.fault == Fault::Stop(SW);
        let no_dw = match (self.scene, self.source_holds()) {
            (Scene::Move, true) => self.at() < (3, false),
            (Scene::Move, false) => self.at() < (2, true),
            // It ends as soon as the copy is given up.
            (Scene::Cancel | Scene::Return, _) => true,
            (Scene::Follow, _) => false,
        };
        let released = if self.source_holds() { self.at() > (9, false) } else { self.at() == (6, true) };
        let no_sw = self.scene == Scene::Move && released;
        !(self.isolation == Isolation::Thread && self.scene == Scene::Return || dw && no_dw || sw && no_sw)
    }

    /// What it may come to. More than one only where a message may or may not have left the process when it was
    /// stopped, or where both answers keep the machine and which one it is depends on who is heard first.
    #[expect(clippy::match_same_arms, reason = "one row a case")]
    pub fn expected(&self) -> &'static [Got] {
        const SRC: &[Got] = &[Got::Src];
        const DST: &[Got] = &[Got::Dst];
        const LOST: &[Got] = &[Got::Lost];
        const EITHER: &[Got] = &[Got::Src, Got::Dst];
        const BACK: &[Got] = &[Got::Src, Got::Lost];
        let killed = match self.fault {
            Fault::Kill(who) => who,
            _ => &[],
        };
        let dead = |who: Who| {
            killed.contains(&who)
                || self.isolation == Isolation::Thread
                    && killed.contains(match who {
                        SW => &SD,
                        DW => &DD,
                        daemon => {
                            if daemon == SD {
                                &SD
                            } else {
                                &DD
                            }
                        }
                    })
        };
        if self.scene == Scene::Follow {
            // Nobody has a whole copy: either worker's death is the machine's, a daemon's is not, nor is silence.
            let torn = dead(SW) || dead(DW) || self.fault == Fault::Part;
            return if torn { LOST } else { DST };
        }
        if self.scene != Scene::Move {
            return if dead(SW) { LOST } else { SRC };
        }
        // Before the copy is whole at the destination; whole there; committed, surely or perhaps; Go there, perhaps;
        // entered.
        let (whole, committed, perhaps, going, entered) = if self.source_holds() {
            let at = self.at();
            (at >= (6, false), at >= (6, true), false, at == (7, true), at >= (8, false))
        } else {
            let at = self.at();
            (at >= (3, false), at >= (4, false), at == (3, true), false, at >= (4, true))
        };
        // A source that stopped itself with the decision in its hands goes on to write it.
        let decides = self.source_holds() && self.at() == (6, false) && !dead(SD);
        let dw_entering = !self.source_holds() && self.at() == (4, false) && killed == [DW];
        match (dead(SD), dead(SW), dead(DD), dead(DW)) {
            (false, false, false, false) => match self.fault {
                _ if entered => DST,
                // A worker that does not answer before Entered is ended, and the machine goes back.
                Fault::Stop(DW) if whole => EITHER,
                _ if committed || decides => DST,
                Fault::Cut if !perhaps => SRC,
                // The source speaks only to prepare and to commit: the rest goes well.
                Fault::OneWay if self.at() < (3, false) => SRC,
                _ => EITHER,
            },
            // From Entered on the source's copy is stale, whatever became of the destination's.
            (_, _, _, true) if entered => LOST,
            // It died before it was granted: the machine goes back.
            (_, false, _, true) if dw_entering => SRC,
            (_, _, _, true) if going => {
                if dead(SW) {
                    LOST
                } else {
                    BACK
                }
            }
            (_, false, _, true) => SRC,
            (_, true, _, true) => LOST,
            (_, true, _, false) => {
                if whole {
                    DST
                } else {
                    LOST
                }
            }
            (true, false, false, false) if perhaps => EITHER,
            (true, false, false, false) => {
                if committed {
                    DST
                } else {
                    SRC
                }
            }
            (_, false, true, false) if entered => DST,
            // A complete copy outlives its daemon, and goes on being one.
            (_, false, true, false) if committed => DST,
            (_, false, true, false) if perhaps || decides => EITHER,
            (_, false, _, false) => SRC,
        }
    }
}
