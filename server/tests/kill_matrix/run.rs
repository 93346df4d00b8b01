//! One cell, played with real processes: two daemons, a probe guest, the fault at the point, recovery, and then every
//! question that matters about what is left.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use vcpu_worker::memory::GuestMemory;
use vcpu_worker::probe::{ProbeConfig, verify_memory};
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

use super::cell::{Cell, Fault, Got, Isolation, Scene, Who};
use super::link::Link;
use super::support::wire::{cut, tcp};
use super::support::*;

/// Guest memory, MiB, and what it fills once.
const MEMORY: u64 = 16;
const FILL: u64 = 4 << 20;
/// Where memory is to follow: what the guest writes all the time, and bytes a second of the link.
const WORKING_SET: u64 = 8 << 20;
const LINK: u64 = 3 << 20;
/// Time-outs where nothing is waited for but the fault itself, and where the fault is silence; the silence.
const PATIENT: u64 = 4000;
const HASTY: u64 = 1000;
/// File system of a host in the cells with a full disk.
const DISK: &str = "size=24m";

/// How a cell is played beside what it is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Extra {
    /// A daemon that was killed is killed again so long after its second start began to serve.
    pub again: Option<Duration>,
    /// On KVM instead of the scripted guest.
    pub kvm: bool,
}

/// What became of it.
#[derive(Debug, Clone)]
pub struct Played {
    pub got: Got,
    /// Why, where it is lost.
    pub reason: String,
    pub ms: u128,
}

/// Two hosts.
struct World {
    dir: PathBuf,
    disks: Vec<PathBuf>,
    links: Option<[Link; 2]>,
    a: Host,
    b: Host,
}

impl Drop for World {
    fn drop(&mut self) {
        self.links = None;
        for side in ["a", "b"] {
            for left in alive(&self.dir.join(side)) {
                let _ = kill_process(pid(left.pid), Signal::KILL);
            }
        }
        if std::thread::panicking() && !self.disks.is_empty() {
            for side in ["a", "b"] {
                let _ = std::fs::copy(self.dir.join(side).join("log"), self.dir.join(format!("{side}.log")));
            }
        }
        // The daemons are killed on drop, too late for an ordinary unmount.
        for disk in &self.disks {
            unmount(disk);
        }
    }
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("a pid")
}

fn lives(identity: &Identity) -> bool {
    Identity::of(identity.pid).is_ok_and(|now| now == *identity)
}

/// Worker processes of a host.
fn alive(host: &Path) -> Vec<Identity> {
    let entries = std::fs::read_dir(host.join("state/run")).into_iter().flatten().flatten();
    entries.filter_map(|e| Identity::read(&e.path())).filter(lives).collect()
}

/// Plays one cell in a directory of its own; panics where something is not as it must be.
pub async fn play(cell: Cell, extra: Extra, dir: &Path) -> Played {
    let begin = Instant::now();
    let mut world = World::build(cell, extra, dir).await;
    let vm = world.a.start_vm("vm").await;
    let sw = (vm.worker_pid != 0).then(|| Identity::of(vm.worker_pid).expect("the worker lives"));
    let before = world.a.until_counting("vm").await;
    let left = Copy::of(&world, &world.a, sw.as_ref());
    world.migrate(cell).await;
    world.reach(cell).await;
    world.fault(cell, extra, sw.as_ref()).await;
    let (got, reason) = world.settle(cell, extra).await;
    world.check((cell, extra), (got, &reason), &before, left).await;
    world.clean_up(cell, extra, got).await;
    Played { got, reason, ms: begin.elapsed().as_millis() }
}

/// A guest's memory that stays open whatever becomes of its worker.
struct Copy(GuestMemory);

impl Copy {
    fn of(world: &World, host: &Host, worker: Option<&Identity>) -> Self {
        let pid = worker.map_or_else(|| host.child.id().expect("running"), |w| w.pid);
        let found = Self::all(pid);
        assert_eq!(found.len(), 1, "process {pid} holds one guest's memory ({})", world.dir.display());
        found.into_iter().next().expect("one")
    }

    /// Every guest memory that a process holds.
    fn all(pid: u32) -> Vec<Self> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of ours").flatten();
        let memory = |path: PathBuf| -> Option<Self> {
            let name = std::fs::read_link(&path).ok()?;
            if !name.to_string_lossy().starts_with("/memfd:") {
                return None;
            }
            let file = std::fs::File::options().read(true).write(true).open(&path).ok()?;
            GuestMemory::from_fd(file.into(), MEMORY << 20).ok().map(Self)
        };
        entries.filter_map(|e| memory(e.path())).collect()
    }

    fn loops(&self) -> u64 {
        vcpu_worker::probe::report(&self.0, 0).expect("a report").loops
    }
}

impl World {
    async fn build(cell: Cell, extra: Extra, dir: &Path) -> Self {
        let mut disks = Vec::new();
        for side in ["a", "b"] {
            let path = dir.join(side);
            std::fs::create_dir_all(&path).expect("made");
            if matches!(cell.fault, Fault::Disk(_)) {
                mount(&path);
                disks.push(path);
            }
        }
        let hold = cell.point.to_string();
        let first = "before:source-send-go".to_owned();
        let mut holds = [Vec::new(), Vec::new()];
        holds[usize::from(!cell.source_holds())].push(&hold);
        if cell.scene == Scene::Return {
            holds[0].push(&first);
        }
        if cell.scene == Scene::Follow {
            holds = [Vec::new(), Vec::new()];
        }
        let mut hosts = Vec::new();
        for (side, holds) in ["a", "b"].into_iter().zip(holds) {
            let mut options = options(cell, extra);
            options.extend(holds.into_iter().flat_map(|point| ["--hold-at".to_owned(), point.clone()]));
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            hosts.push(Host::start(&dir.join(side), &options).await);
        }
        let b = hosts.pop().expect("two");
        let a = hosts.pop().expect("two");
        let links = matches!(cell.fault, Fault::Cut | Fault::OneWay).then(|| {
            [&a, &b].map(|host| Link::before(&host.dir.join("peer.sock")).expect("the peer socket moves"))
        });
        a.create("vm", spec(cell)).await;
        Self { dir: dir.to_owned(), disks, links, a, b }
    }

    /// Asks for the migration; the source may be stopped before it answers.
    async fn migrate(&self, cell: Cell) {
        // Out of reach; more than the fixed cost where memory is to follow.
        let nanos = if cell.scene == Scene::Follow { 100_000_000 } else { 1000 };
        let goal = prost_types::Duration { seconds: 0, nanos };
        let follow = cell.scene == Scene::Follow;
        let over_tcp = matches!(cell.fault, Fault::CutData | Fault::Part);
        let spec = MigrationSpec {
            destination: if over_tcp { tcp(&self.b) } else { self.b.peer() },
            max_bandwidth: if follow { LINK } else { 0 },
            mode: if follow { migration_spec::Mode::Postcopy.into() } else { 0 },
            // One that is to be cancelled must not be over before.
            max_blackout: (follow || cell.scene == Scene::Cancel).then_some(goal),
            max_duration: Some(prost_types::Duration { seconds: 30, nanos: 0 }),
            ..MigrationSpec::default()
        };
        let request = CreateMigrationRequest {
            parent: name("vm"),
            spec: Some(spec),
            ..CreateMigrationRequest::default()
        };
        let mut client = self.a.migrations().await;
        let asked = tokio::spawn(async move { client.create_migration(request).await.map(drop) });
        if cell.scene != Scene::Cancel {
            return;
        }
        asked.await.expect("no panic").expect("accepted");
        let begin = Instant::now();
        loop {
            // It gives up by itself, too, once it sees that pre-copy cannot meet the goal.
            if self.a.is_held() || self.b.is_held() {
                return;
            }
            let Ok(list) = tokio::time::timeout(Duration::from_millis(200), list(&self.a)).await else {
                continue;
            };
            if list[0].progress.as_ref().is_some_and(|p| p.round > 0) {
                let request = CancelMigrationRequest { name: list[0].name.clone() };
                let mut client = self.a.migrations().await;
                // The source may be stopped before it answers this, too.
                tokio::spawn(async move { client.cancel_migration(request).await.map(drop) });
                return;
            }
            assert!(begin.elapsed() < DEADLINE, "pre-copy does not begin: {list:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until the point is reached.
    async fn reach(&mut self, cell: Cell) {
        if cell.scene == Scene::Return {
            self.a.until_held().await;
            for dw in alive(&self.b.dir) {
                kill_process(pid(dw.pid), Signal::KILL).expect("killed");
                until_gone(&dw).await;
            }
            self.a.signal(Signal::CONT);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        if cell.scene == Scene::Follow {
            return self.until_following().await;
        }
        if cell.source_holds() { self.a.until_held().await } else { self.b.until_held().await }
    }

    /// Waits until it runs on the destination, and pages of it are still at the source.
    async fn until_following(&self) {
        let begin = Instant::now();
        loop {
            let now = list(&self.a).await.into_iter().next().unwrap_or_default();
            let missing = now.progress.as_ref().map_or(0, |p| p.missing_pages);
            let there = one(&self.b).await.is_some_and(|vm| vm.observed_state() == State::Running);
            if now.state() == migration::State::Postcopy && missing > 0 && there {
                return;
            }
            assert!(now.end_time.is_none(), "it is over before anything happened to it: {now:?}");
            assert!(begin.elapsed() < DEADLINE, "its memory does not follow: {now:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether all of its memory has followed.
    async fn is_whole(&self, host: &Host) -> bool {
        let request = GetVirtualMachineStatsRequest { name: name("vm") };
        let stats = host.vms().await.get_virtual_machine_stats(request).await;
        stats.is_ok_and(|s| s.into_inner().arriving_memory.is_some_and(|m| m.missing_pages == 0))
    }

    async fn fault(&mut self, cell: Cell, extra: Extra, sw: Option<&Identity>) {
        let holder = if cell.source_holds() { Who::SD } else { Who::DD };
        match cell.fault {
            Fault::Kill(who) => {
                for who in who {
                    self.kill(*who, sw).await;
                }
                if !who.contains(&holder) {
                    self.host(holder).signal(Signal::CONT);
                }
                // What must come of it without the daemon comes of it first.
                let dead: Vec<_> =
                    [Who::SD, Who::DD].into_iter().filter(|daemon| who.contains(daemon)).collect();
                if let [one] = dead[..] {
                    self.until_quiet(one).await;
                }
                for one in dead {
                    let options = options(cell, extra);
                    let options: Vec<_> = options.iter().map(String::as_str).collect();
                    self.host(one).restart_with(&options).await;
                    if let Some(after) = extra.again {
                        tokio::time::sleep(after).await;
                        self.host(one).kill().await;
                        self.host(one).restart_with(&options).await;
                    }
                }
            }
            Fault::Stop(who) => {
                let stopped: Vec<Pid> = match who {
                    Who::SD | Who::DD => vec![pid(self.host(who).child.id().expect("running"))],
                    Who::SW => vec![pid(sw.expect("a worker").pid)],
                    Who::DW => alive(&self.b.dir).iter().map(|w| pid(w.pid)).collect(),
                };
                for victim in &stopped {
                    kill_process(*victim, Signal::STOP).expect("stopped");
                }
                if who != holder {
                    self.host(holder).signal(Signal::CONT);
                }
                tokio::time::sleep(silence()).await;
                for victim in stopped {
                    // It may have been ended meanwhile.
                    let _ = kill_process(victim, Signal::CONT);
                }
            }
            Fault::Cut | Fault::OneWay => {
                let links = self.links.take().expect("there");
                if cell.fault == Fault::Cut {
                    links.iter().for_each(Link::cut);
                } else {
                    links[0].mute();
                    links[1].deafen();
                }
                self.host(holder).signal(Signal::CONT);
                tokio::time::sleep(silence()).await;
                links.iter().for_each(Link::heal);
                self.links = Some(links);
            }
            Fault::CutData | Fault::Part => {
                let sw = pid(sw.expect("a worker").pid);
                let away = cell.fault == Fault::Part;
                // Before the cut, so that it cannot come back at once.
                if away {
                    kill_process(sw, Signal::STOP).expect("stopped");
                }
                assert_eq!(cut(sw.as_raw_nonzero().get().cast_unsigned()), 1, "the one data connection");
                if away {
                    tokio::time::sleep(silence()).await;
                    kill_process(sw, Signal::CONT).expect("goes on");
                }
            }
            Fault::Disk(who) => {
                let full = self.host(who).dir.join("full");
                fill(&full);
                self.host(holder).signal(Signal::CONT);
                tokio::time::sleep(Duration::from_secs(2)).await;
                std::fs::remove_file(&full).expect("room again");
            }
        }
    }

    fn host(&mut self, daemon: Who) -> &mut Host {
        if daemon == Who::SD { &mut self.a } else { &mut self.b }
    }

    async fn kill(&mut self, who: Who, sw: Option<&Identity>) {
        let workers = match who {
            Who::SD | Who::DD => return self.host(who).kill().await,
            Who::SW => sw.cloned().into_iter().collect(),
            Who::DW => alive(&self.b.dir),
        };
        assert!(!workers.is_empty(), "{who:?} is not there");
        for worker in workers {
            kill_process(pid(worker.pid), Signal::KILL).expect("killed");
            until_gone(&worker).await;
        }
    }

    /// Waits until the other daemon has nothing to do any more, or waits for the dead one.
    async fn until_quiet(&self, dead: Who) {
        let other = if dead == Who::SD { &self.b } else { &self.a };
        let (begin, patience) = (Instant::now(), Duration::from_millis(1500));
        loop {
            let states: Vec<_> = other.list().await.iter().map(VirtualMachine::observed_state).collect();
            let busy = states.iter().any(|s| matches!(s, State::MigratingOut | State::Incoming));
            if !busy || begin.elapsed() > patience {
                return;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Waits until both say where it is, and they agree.
    async fn settle(&mut self, cell: Cell, extra: Extra) -> (Got, String) {
        let begin = Instant::now();
        let (mut last, mut restarted) = (None, false);
        let at_rest = |s: State| matches!(s, State::Stopped | State::Failed | State::Running | State::Paused);
        loop {
            let (a, b) = (one(&self.a).await, one(&self.b).await);
            let state = |vm: &Option<VirtualMachine>| vm.as_ref().map(VirtualMachine::observed_state);
            let (sa, sb) = (state(&a), state(&b));
            assert!(
                sa != Some(State::Running) || sb != Some(State::Running),
                "{cell}: it runs on both hosts: {a:?} {b:?}"
            );
            let owner = match (sa, sb) {
                (Some(State::Moved), Some(s)) if at_rest(s) && seen(b.as_ref()) => Some((Got::Dst, s, &b)),
                (Some(s), None | Some(State::Moved)) if at_rest(s) && seen(a.as_ref()) => {
                    Some((Got::Src, s, &a))
                }
                _ => None,
            };
            // With pages to come it is not known yet whether they do.
            let owner = match owner {
                Some((Got::Dst, State::Running, _))
                    if cell.scene == Scene::Follow && !self.is_whole(&self.b).await =>
                {
                    None
                }
                owner => owner,
            };
            // Twice the same, a little apart: states in passing are no answer.
            let shown = (owner.as_ref().map(|(got, s, _)| (*got, *s)), sa, sb);
            let steady = last.replace(shown) == Some(shown);
            if let Some((got, s, vm)) = owner.filter(|_| steady) {
                let got = if s == State::Running { got } else { Got::Lost };
                let reason = vm.as_ref().map(|vm| vm.reason.clone()).unwrap_or_default();
                assert!(
                    cell.expected().contains(&got),
                    "{cell}: expected {:?}, and it is {got:?}: source {sa:?}, destination {sb:?} {reason}",
                    cell.expected()
                );
                return (got, reason);
            }
            assert!(
                begin.elapsed() < DEADLINE,
                "{cell}: it does not settle: source {a:?}, destination {b:?}"
            );
            if let Fault::Disk(who) = cell.fault
                && !restarted
                && begin.elapsed() > Duration::from_secs(3)
            {
                // A store whose writes failed only reads until its daemon is started again.
                restarted = true;
                let options = options(cell, extra);
                let options: Vec<_> = options.iter().map(String::as_str).collect();
                self.host(who).kill().await;
                self.host(who).restart_with(&options).await;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    /// Exactly one copy runs, it is whole, and its counters tell of every event once.
    async fn check(
        &mut self,
        (cell, extra): (Cell, Extra),
        (got, reason): (Got, &str),
        before: &Pmu,
        left: Copy,
    ) {
        if got == Got::Lost {
            if let Some(wanted) = cell.reason() {
                assert_eq!(reason, wanted, "{cell}: why it is lost");
            }
            // Nothing runs by itself; the user may start it afresh where it is.
            let here = if one(&self.a).await.is_some_and(|vm| vm.observed_state() != State::Moved) {
                &self.a
            } else {
                &self.b
            };
            here.start_vm("vm").await;
            here.until_counting("vm").await;
            return;
        }
        let winner = if got == Got::Src { &self.a } else { &self.b };
        if got == Got::Dst && extra.again.is_none() {
            self.compare_stored().await;
        }
        let now = until_beyond(winner, before, &format!("{cell}")).await;
        assert!(now.probe.iter().flat_map(|p| &p.vcpus).all(|v| v.faults == 0), "{cell}: {:?}", now.probe);
        if got == Got::Dst {
            let then = left.loops();
            until_beyond(winner, &now, &format!("{cell}")).await;
            assert_eq!(left.loops(), then, "{cell}: the copy at the source runs too");
        }
        until_it_stores(winner).await;
        let pause = PauseVirtualMachineRequest { name: name("vm") };
        changed(cell, winner.vms().await.pause_virtual_machine(pause).await, "pauses");
        let vm = winner.get("vm").await;
        let worker = (vm.worker_pid != 0).then(|| Identity::of(vm.worker_pid).expect("lives"));
        let memory = Copy::of(self, winner, worker.as_ref());
        let boot = match spec(cell).boot {
            Some(virtual_machine_spec::Boot::Probe(boot)) => boot,
            other => panic!("no probe: {other:?}"),
        };
        let config = ProbeConfig::from_boot(&boot, 1, MEMORY << 20, 2_000_000, None);
        let pages = verify_memory(&memory.0, &config)
            .unwrap_or_else(|error| panic!("{cell}: the guest's memory is not what it wrote: {error}"));
        assert!(pages >= FILL >> 12, "{cell}: {pages} pages checked");
        counted_once(cell, &winner.live_pmu("vm").await);
        let resume = ResumeVirtualMachineRequest { name: name("vm") };
        let at_rest = winner.live_pmu("vm").await;
        changed(cell, winner.vms().await.resume_virtual_machine(resume).await, "resumes");
        until_beyond(winner, &at_rest, &format!("{cell}")).await;
    }

    /// What the source stored at the stop is what the destination stored at its beginning.
    async fn compare_stored(&self) {
        let digests =
            |state: &PmuState| -> Vec<String> { state.vcpus.iter().map(|v| v.digest.clone()).collect() };
        let (Ok(out), Ok(here)) = (self.a.stored_pmu("vm").await, self.b.stored_pmu("vm").await) else {
            return;
        };
        // A checkpoint may have followed; a source that died has stored nothing.
        if out.cause == "migrate-out" && here.cause == "migrate-in" {
            assert_eq!(digests(&out), digests(&here), "PMU state at the stop and at the resume");
        }
    }

    /// Everything can be removed, and then nothing is left.
    async fn clean_up(&mut self, cell: Cell, extra: Extra, got: Got) {
        if let Fault::Disk(who) = cell.fault {
            // A store whose writes failed only reads until its daemon is started again.
            let options = options(cell, extra);
            let options: Vec<_> = options.iter().map(String::as_str).collect();
            self.host(who).kill().await;
            self.host(who).restart_with(&options).await;
        }
        for host in [&self.a, &self.b] {
            let begin = Instant::now();
            for vm in host.list().await {
                // A source that was restarted may still be waiting for the destination's word.
                let deleted = loop {
                    let request = DeleteVirtualMachineRequest { name: vm.name.clone(), ..Default::default() };
                    match host.vms().await.delete_virtual_machine(request).await {
                        Ok(deleted) => break deleted,
                        Err(refused) => {
                            assert!(begin.elapsed() < DEADLINE, "it cannot be deleted: {refused:?}");
                        }
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                };
                host.finish(deleted.into_inner()).await.expect("deleted");
            }
        }
        for host in [&mut self.a, &mut self.b] {
            assert!(host.list().await.is_empty(), "{got:?}");
            let memory = Copy::all(host.child.id().expect("running")).len();
            assert_eq!(memory, 0, "guest memory is left in a daemon");
            let (begin, dir) = (Instant::now(), host.dir.clone());
            while !alive(&dir).is_empty() {
                assert!(begin.elapsed() < DEADLINE, "workers are left: {:?}", alive(&dir));
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            assert_eq!(host.terminate().await, 0);
            let run = std::fs::read_dir(dir.join("state/run")).into_iter().flatten().flatten();
            let left: Vec<_> = run.map(|e| e.path()).collect();
            assert!(left.is_empty(), "runtime directories are left: {left:?}");
            let files = std::fs::read_dir(dir.join("state")).expect("there").flatten().map(|e| e.path());
            let sockets: Vec<_> = files.filter(|p| p.extension().is_some_and(|e| e == "sock")).collect();
            assert!(sockets.is_empty(), "sockets are left: {sockets:?}");
        }
    }
}

/// A store whose disk was full only reads until its daemon is started again: then a change is done and shown, and not
/// acknowledged.
fn changed<T>(cell: Cell, answer: Result<T, tonic::Status>, what: &str) {
    match answer {
        Err(status) if matches!(cell.fault, Fault::Disk(_)) => {
            assert!(status.message().contains("read-only"), "{cell}: {what}: {status:?}");
        }
        answer => drop(answer.unwrap_or_else(|status| panic!("{cell}: {what}: {status:?}"))),
    }
}

/// Two counters of the same event are equal to the event, and the guest took exactly the interrupts that were raised.
fn counted_once(cell: Cell, pmu: &Pmu) {
    for (vcpu, report) in pmu.vcpus.iter().zip(pmu.probe.iter().flat_map(|p| &p.vcpus)) {
        let value = |name: &str| vcpu.counters.iter().find(|c| c.name == name).map(|c| c.value);
        assert_eq!(value("gp0"), value("fixed0"), "{cell}: instructions, counted twice: {vcpu:?}");
        assert_eq!(value("gp1"), value("fixed1"), "{cell}: cycles, counted twice: {vcpu:?}");
        // One may have been injected that the guest has not taken yet.
        assert!(
            (report.pmis..=report.pmis + 1).contains(&vcpu.pmis),
            "{cell}: {} interrupts raised, {} taken",
            vcpu.pmis,
            report.pmis
        );
    }
}

/// A machine that has much else to do needs more than the usual second.
fn hasty() -> u64 {
    std::env::var("VPMU_KILL_MATRIX_TIMEOUT_MS").map_or(HASTY, |ms| ms.parse().expect("milliseconds"))
}

fn silence() -> Duration {
    Duration::from_millis(hasty() * 33 / 10)
}

fn options(cell: Cell, extra: Extra) -> Vec<String> {
    let silent = matches!(cell.fault, Fault::Stop(_) | Fault::Cut | Fault::OneWay | Fault::Part);
    let isolation = if cell.isolation == Isolation::Process { "process" } else { "thread" };
    let hypervisor = if extra.kvm { "kvm" } else { "simulated" };
    let timeout = if silent { hasty() } else { PATIENT }.to_string();
    let mut options =
        vec!["--isolation", isolation, "--hypervisor", hypervisor, "--handover-timeout", &timeout];
    if matches!(cell.fault, Fault::CutData | Fault::Part) {
        options.extend(["--peer-listen", "tcp:127.0.0.1:0"]);
    }
    options.into_iter().map(str::to_owned).collect()
}

fn spec(cell: Cell) -> VirtualMachineSpec {
    // As fast as it can where pre-copy must not converge.
    let (dirty_pages_per_second, working_set_bytes) = match cell.scene {
        Scene::Cancel => (0, 4 << 20),
        Scene::Follow => (0, WORKING_SET),
        Scene::Move | Scene::Return => (200, 1 << 20),
    };
    let probe =
        ProbeBoot { dirty_pages_per_second, working_set_bytes, fill_bytes: FILL, ..ProbeBoot::default() };
    VirtualMachineSpec { boot: Some(virtual_machine_spec::Boot::Probe(probe)), ..probe_spec(1, MEMORY) }
}

/// What is shown is not older than the worker's death.
fn seen(vm: Option<&VirtualMachine>) -> bool {
    vm.is_none_or(|vm| vm.worker_pid == 0 || Identity::of(vm.worker_pid).is_ok())
}

async fn one(host: &Host) -> Option<VirtualMachine> {
    let list = host.list().await;
    assert!(list.len() <= 1, "{list:?}");
    list.into_iter().next()
}

async fn list(host: &Host) -> Vec<Migration> {
    let request = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
    host.migrations().await.list_migrations(request).await.expect("lists").into_inner().migrations
}

async fn until_gone(identity: &Identity) {
    let begin = Instant::now();
    while lives(identity) {
        assert!(begin.elapsed() < DEADLINE, "{identity:?} does not end");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// The guest's turns and the counters that take no overflow.
fn figures(pmu: &Pmu) -> Vec<u64> {
    let turns =
        pmu.probe.iter().flat_map(|p| &p.vcpus).flat_map(|v| [v.heartbeats, v.loops, v.pages_dirtied]);
    let counters = pmu.vcpus.iter().flat_map(|v| &v.counters).filter(|c| c.live && !c.pmi_enabled);
    turns.chain(counters.map(|c| c.value)).collect()
}

/// Waits until everything has grown beyond `before`; nothing may go back.
async fn until_beyond(host: &Host, before: &Pmu, what: &str) -> Pmu {
    let (begin, old) = (Instant::now(), figures(before));
    loop {
        let now = host.live_pmu("vm").await;
        let new = figures(&now);
        assert_eq!(new.len(), old.len(), "{what}: {now:?}");
        assert!(
            new.iter().zip(&old).all(|(n, o)| n >= o),
            "{what}: something was lost: {old:?}, then {new:?}"
        );
        if new.iter().zip(&old).all(|(n, o)| n > o) {
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "{what}: it does not go on: {old:?}, then {new:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Whether file systems can be mounted here.
pub fn can_mount() -> bool {
    let dir = tempfile::tempdir().expect("tempdir");
    let mounted = try_mount(dir.path());
    if mounted {
        unmount(dir.path());
    }
    mounted
}

fn try_mount(path: &Path) -> bool {
    let mut mount = std::process::Command::new("mount");
    mount.args(["-t", "tmpfs", "-o", DISK, "tmpfs"]).arg(path).stderr(std::process::Stdio::null());
    mount.status().is_ok_and(|status| status.success())
}

fn unmount(path: &Path) {
    let _ = std::process::Command::new("umount").arg("--lazy").arg(path).status();
}

fn mount(path: &Path) {
    assert!(try_mount(path), "a small tmpfs");
}

/// A store whose disk was full takes writes again by itself, in its own time.
async fn until_it_stores(host: &Host) {
    let begin = Instant::now();
    loop {
        let request = GetHostPmuCapabilitiesRequest::default();
        let known = host.pmu().await.get_host_pmu_capabilities(request).await.expect("answers").into_inner();
        if !known.notes.iter().any(|note| note.starts_with("the store is read-only")) {
            return;
        }
        assert!(begin.elapsed() < DEADLINE, "the store stays read-only: {:?}", known.notes);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Takes all room that is left.
fn fill(path: &Path) {
    use std::io::Write as _;
    let mut file = std::fs::File::create(path).expect("one more file");
    for size in [1 << 20, 4096, 1] {
        let piece = vec![0x5a; size];
        while file.write_all(&piece).is_ok() {}
    }
}
