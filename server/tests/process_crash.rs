//! SIGKILL of daemons and of workers at random moments under a load of create, start, stop, pause, resume, migrate and
//! delete, between two hosts: every machine is as its last acknowledged operation left it (one that was not acknowledged
//! may have either outcome), on one host only, and no record disagrees with its process.
//!
//! Of three rounds one kills a daemon, one two workers, and one a worker and then a daemon.
//!
//! ```text
//! cargo test -p vpmu-server --test process_crash                                              9 rounds
//! VPMU_CRASH_ROUNDS=300 cargo test -p vpmu-server --test process_crash -- --nocapture         200 daemons, 300 workers
//! VPMU_CRASH_SEED=7          the same choices again
//! ```

mod support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::load::{Api, Random, Reaper, number, workers};
use support::*;
use tonic::Status;
use vpmu_proto::api::migration_spec::Mode;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

/// Machines that are worked on at once.
const SLOTS: usize = 4;

#[derive(Clone, Copy, PartialEq, Eq, Debug, PartialOrd, Ord)]
enum Is {
    Absent,
    Stopped,
    Running,
    Paused,
    Failed,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Op {
    Create,
    Start,
    Stop,
    Pause,
    Resume,
    Delete,
    Migrate,
}

/// What is known of one machine: what was acknowledged, and what was asked and not answered.
#[derive(Clone, Debug)]
struct Known {
    id: String,
    host: usize,
    is: Is,
    asked: Option<Op>,
    /// Its worker was killed by the test.
    killed: bool,
}

impl Known {
    /// Where and what it may be.
    fn allowed(&self) -> BTreeSet<(usize, Is)> {
        let mut allowed = BTreeSet::from([(self.host, self.is)]);
        if let Some(op) = self.asked {
            allowed.insert(self.after(op));
        }
        if self.killed {
            // An end by the user, or a move, may have come before the kill. The worker may also have been on its way
            // out, so that the kill hit nothing.
            allowed.insert((self.host, Is::Failed));
            if self.asked == Some(Op::Migrate) {
                allowed.insert((1 - self.host, Is::Failed));
            }
        }
        allowed
    }

    fn after(&self, op: Op) -> (usize, Is) {
        match op {
            Op::Create | Op::Stop => (self.host, Is::Stopped),
            Op::Start | Op::Resume => (self.host, Is::Running),
            Op::Pause => (self.host, Is::Paused),
            Op::Delete => (self.host, Is::Absent),
            Op::Migrate => (1 - self.host, self.is),
        }
    }

    fn choose(&self, random: &mut Random) -> Op {
        let legal: &[Op] = match self.is {
            Is::Absent => &[Op::Create],
            Is::Stopped => &[Op::Start, Op::Start, Op::Start, Op::Delete],
            Is::Failed => &[Op::Start, Op::Stop, Op::Delete],
            Is::Running => &[Op::Stop, Op::Pause, Op::Pause, Op::Migrate, Op::Migrate, Op::Delete],
            Is::Paused => &[Op::Resume, Op::Resume, Op::Migrate, Op::Stop],
        };
        random.pick(legal)
    }
}

/// Does it, acknowledged.
async fn perform(api: &Api, op: Op, id: &str, to: &Api) -> Result<(), Status> {
    match op {
        Op::Create => api.create(id, probe_spec(1, 16)).await,
        Op::Start => api.start(id).await,
        Op::Stop => api.stop(id).await,
        Op::Delete => api.delete(id).await,
        Op::Pause => api.pause(id).await,
        Op::Resume => api.resume(id).await,
        Op::Migrate => api.migrate(id, to, Mode::Unspecified).await,
    }
}

#[derive(Default, Debug)]
struct Figures {
    acknowledged: u64,
    unanswered: u64,
    daemons: u64,
    killed: u64,
    kept: u64,
    changed: u64,
    slowest: Duration,
}

/// Works on one machine until it is told to stop or an operation is not acknowledged.
async fn work(mut known: Known, apis: [Api; 2], stop: Arc<AtomicBool>, seed: u64) -> (Known, u64) {
    let (mut random, mut acknowledged) = (Random::new(seed), 0);
    while !stop.load(Ordering::SeqCst) {
        if known.is == Is::Absent {
            // A name that has moved away stays as a tombstone.
            known.id = format!("m{:x}", random.next() >> 16);
            known.host = random.below(2) as usize;
        }
        let op = known.choose(&mut random);
        known.asked = Some(op);
        let done = perform(&apis[known.host], op, &known.id, &apis[1 - known.host]);
        match tokio::time::timeout(Duration::from_secs(90), done).await {
            Ok(Ok(())) => {
                (known.host, known.is) = known.after(op);
                known.asked = None;
                acknowledged += 1;
            }
            Ok(Err(_)) => break,
            Err(late) => panic!("{op:?} of {known:?} is not answered within 90 s: {late}"),
        }
    }
    (known, acknowledged)
}

/// What a round kills: a daemon, workers one after the other, or a worker and then a daemon, which finds it dead or dying.
struct Kills {
    workers: u32,
    daemon: bool,
}

impl Kills {
    fn of(round: u64) -> Self {
        let (workers, daemon) =
            [(0, true), (2, false), (1, true)][usize::try_from(round % 3).expect("small")];
        Self { workers, daemon }
    }
}

/// Kills any worker of these hosts, if there is one; returns its machine's id.
fn kill_a_worker(dirs: &[std::path::PathBuf; 2], random: &mut Random) -> Option<String> {
    let pids: Vec<u32> = dirs.iter().flat_map(|dir| workers(dir)).collect();
    if pids.is_empty() {
        return None;
    }
    let pid = random.pick(&pids);
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
    let line = String::from_utf8_lossy(&line);
    let id = line.split('\0').find_map(|word| word.strip_prefix("--name="))?.to_owned();
    kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), Signal::KILL).ok()?;
    Some(id)
}

fn observed(vm: &VirtualMachine) -> Option<Is> {
    Some(match vm.observed_state() {
        State::Stopped => Is::Stopped,
        State::Running => Is::Running,
        State::Paused => Is::Paused,
        State::Failed => Is::Failed,
        _ => return None,
    })
}

/// Every machine of both hosts, once nothing is in passing any more. Tombstones are left out.
async fn settled(hosts: &[Host; 2]) -> Vec<(usize, VirtualMachine)> {
    let begin = Instant::now();
    loop {
        let mut all = Vec::new();
        for (index, host) in hosts.iter().enumerate() {
            all.extend(host.list().await.into_iter().map(|vm| (index, vm)));
        }
        all.retain(|(_, vm)| vm.observed_state() != State::Moved);
        if all.iter().all(|(_, vm)| observed(vm).is_some()) {
            return all;
        }
        assert!(begin.elapsed() < Duration::from_secs(90), "it does not settle: {all:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn heartbeats(pmu: &Pmu) -> u64 {
    pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.heartbeats + v.loops).sum()
}

/// Waits until records and processes agree, which a worker's end may need a moment for, and returns the records; then who
/// runs counts, who is paused does not, and nobody else is there.
async fn agree(hosts: &[Host; 2]) -> Vec<(usize, VirtualMachine)> {
    let begin = Instant::now();
    let all = loop {
        let all = settled(hosts).await;
        let pids = |at: usize| -> BTreeSet<u32> {
            let here = all.iter().filter(|(host, vm)| *host == at && vm.worker_pid != 0);
            here.map(|(_, vm)| vm.worker_pid).collect()
        };
        let both = [0, 1].map(|at| (pids(at), workers(&hosts[at].dir)));
        if both.iter().all(|(records, processes)| records == processes) {
            break all;
        }
        assert!(begin.elapsed() < DEADLINE, "records and processes of each host: {both:?}; {all:#?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    };
    futures_util::future::join_all(all.iter().map(|(index, vm)| lives_as_recorded(&hosts[*index], vm))).await;
    all
}

async fn lives_as_recorded(host: &Host, vm: &VirtualMachine) {
    let id = vm.name.rsplit('/').next().expect("a name");
    let live = matches!(vm.observed_state(), State::Running | State::Paused);
    assert_eq!(live, vm.worker_pid != 0, "{vm:?}");
    if !live {
        return;
    }
    let before = heartbeats(&host.live_pmu(id).await);
    if vm.observed_state() == State::Paused {
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert_eq!(heartbeats(&host.live_pmu(id).await), before, "{id} is paused and runs: {vm:?}");
        return;
    }
    let begin = Instant::now();
    while heartbeats(&host.live_pmu(id).await) == before {
        assert!(begin.elapsed() < DEADLINE, "{id} is RUNNING and does not run: {vm:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_every_machine_is_as_it_was_acknowledged() {
    let rounds = number("VPMU_CRASH_ROUNDS").unwrap_or(9);
    let seed = number("VPMU_CRASH_SEED").unwrap_or_else(Random::seed);
    println!("VPMU_CRASH_SEED={seed}");
    let mut random = Random::new(seed);
    let dir = tempfile::tempdir().expect("tempdir");
    let dirs = [dir.path().join("a"), dir.path().join("b")];
    let _reaper = Reaper(dirs.to_vec());
    // Waits for a peer or a worker that is dead would be most of a round.
    let options = ["--isolation", "process", "--handover-timeout", "12000"];
    // Sessions of their own, as a service manager gives them: beside many guests they need a share of their own.
    let under = ["setsid".to_owned()];
    let mut hosts = [
        Host::start_under(&dirs[0], &under, &options).await,
        Host::start_under(&dirs[1], &under, &options).await,
    ];
    let apis = [Api::of(&hosts[0]), Api::of(&hosts[1])];
    let absent = Known { id: String::new(), host: 0, is: Is::Absent, asked: None, killed: false };
    let mut machines = vec![absent; SLOTS];
    let mut figures = Figures::default();
    let start = Instant::now();

    for round in 0..rounds {
        let stop = Arc::new(AtomicBool::new(false));
        let works: Vec<_> = machines
            .drain(..)
            .map(|known| tokio::spawn(work(known, apis.clone(), Arc::clone(&stop), random.next())))
            .collect();
        let kills = Kills::of(round);
        let mut victims = BTreeSet::new();
        for _ in 0..kills.workers {
            tokio::time::sleep(Duration::from_millis(30 + random.below(300))).await;
            victims.extend(kill_a_worker(&dirs, &mut random));
        }
        let mut restarted = Duration::ZERO;
        if kills.daemon {
            tokio::time::sleep(Duration::from_millis(30 + random.below(300))).await;
            let host = &mut hosts[usize::from(random.below(2) == 1)];
            host.kill().await;
            tokio::time::sleep(Duration::from_millis(random.below(100))).await;
            let begin = Instant::now();
            host.restart().await;
            restarted = begin.elapsed();
            figures.daemons += 1;
        }
        figures.killed += victims.len() as u64;
        stop.store(true, Ordering::SeqCst);
        let begin = Instant::now();
        for work in works {
            let (mut known, acknowledged) = work.await.expect("works");
            figures.acknowledged += acknowledged;
            figures.unanswered += u64::from(known.asked.is_some());
            known.killed = victims.contains(&known.id);
            machines.push(known);
        }
        let answered = begin.elapsed();
        let fits = |all: &[(usize, VirtualMachine)], known: &Known| {
            let found: Vec<_> = all.iter().filter(|(_, vm)| vm.name == name(&known.id)).collect();
            match found.as_slice() {
                [] => known.allowed().iter().any(|(_, is)| *is == Is::Absent),
                [(at, vm)] => known.allowed().contains(&(*at, observed(vm).expect("settled"))),
                _ => false,
            }
        };
        let mut all = agree(&hosts).await;
        while !machines.iter().all(|known| fits(&all, known)) {
            let wrong: Vec<_> = machines.iter().filter(|known| !fits(&all, known)).collect();
            assert!(begin.elapsed() < DEADLINE, "round {round} (seed {seed}): {wrong:#?} against {all:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
            all = agree(&hosts).await;
        }
        figures.slowest = figures.slowest.max(begin.elapsed());
        for known in &mut machines {
            let before = (known.host, known.is);
            let found = all.iter().find(|(_, vm)| vm.name == name(&known.id));
            (known.host, known.is) =
                found.map_or((known.host, Is::Absent), |(at, vm)| (*at, observed(vm).expect("settled")));
            if known.asked.take().is_some() {
                if (known.host, known.is) == before { figures.kept += 1 } else { figures.changed += 1 }
            }
            known.killed = false;
        }
        let mine: BTreeSet<String> = machines.iter().map(|known| name(&known.id)).collect();
        assert!(
            all.iter().all(|(_, vm)| mine.contains(&vm.name)),
            "round {round}: a machine that nobody made"
        );
        println!(
            "{:>5} s, round {:>3}/{rounds}: {} and {} killed so far, {} acknowledged; ms: daemon back {}, all answered {}, \
             as acknowledged {}",
            start.elapsed().as_secs(),
            round + 1,
            figures.daemons,
            figures.killed,
            figures.acknowledged,
            restarted.as_millis(),
            answered.as_millis(),
            begin.elapsed().as_millis(),
        );
    }
    println!(
        "{rounds} rounds: {} daemons and {} workers killed; {} operations acknowledged, all as acknowledged; {} not \
         answered, of which {} had not happened and {} had; slowest to settle {} ms",
        figures.daemons,
        figures.killed,
        figures.acknowledged,
        figures.unanswered,
        figures.kept,
        figures.changed,
        figures.slowest.as_millis()
    );
    for known in machines.iter().filter(|known| known.is != Is::Absent) {
        apis[known.host].delete(&known.id).await.expect("deleted");
    }
    for host in &mut hosts {
        assert!(workers(&host.dir).is_empty(), "workers are left");
        assert_eq!(host.terminate().await, 0);
    }
}
