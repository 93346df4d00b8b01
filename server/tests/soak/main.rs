//! Soak: random life-cycle operations on many machines of two hosts, for long, and nothing is left behind: no memory, no
//! descriptor, no thread, no process, no directory, no cgroup, and no disk beyond what the histories are bounded to.
//!
//! ```text
//! cargo test -p vpmu-server --test soak                                                        short, 6 machines
//! VPMU_SOAK_SECONDS=1800 VPMU_SOAK_VMS=50 cargo test -p vpmu-server --test soak -- --nocapture the long one
//! VPMU_SOAK_SEED=7           the same choices again
//! VPMU_SOAK_PARALLEL=4       operations at once
//! VPMU_SOAK_ISOLATION=thread machines in the daemon's own threads
//! ```
//!
//! With machines in threads, both daemons share the processors by session (they have one each): on kernels where
//! `vpmud host check` warns of `session_shares` they starve each other for ten seconds and more, and operations fail; first
//! `sysctl -w kernel.sched_autogroup_enabled=0`, as on any such host.
//!
//! It goes in laps. At the end of one, with nothing under way, processes, directories and cgroups must be exactly those of
//! the machines that live; then everything is deleted, and what remains is compared with what remained after the first
//! lap, by the bounds of [`Bounds`].
#![allow(missing_docs, unreachable_pub)]

mod machine;
#[path = "../support/mod.rs"]
mod support;
mod usage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use machine::{Counts, Is, Machine};
use support::load::{Api, Random, Reaper, number};
use support::{DEADLINE, Host};
use tokio::sync::Semaphore;
use usage::Usage;

/// What may be there, beyond what there was after the first lap, once every machine is deleted.
///
/// The daemon keeps histories, each bounded: 4096 operations, in memory and on disk, and an ownership record of each
/// machine that was. All else must be as it was.
struct Bounds {
    /// Growth of anonymous and shared memory by what is kept of one operation, until 4096 of them are kept.
    bytes_an_operation: u64,
    /// Growth of the same by the allocator, which does not give all back, however long it goes on.
    slack_bytes: u64,
    /// Connections, and blocking helpers that have not ended yet: they do after 10 s of rest.
    descriptors: u64,
    threads: u64,
    /// sled cleans segments of 512 KiB when others are full.
    sled_bytes: u64,
    /// Four segments of 1 MiB, and the next.
    journal_bytes: u64,
}

const BOUNDS: Bounds = Bounds {
    bytes_an_operation: 4096,
    slack_bytes: 24 << 20,
    descriptors: 8,
    threads: 8,
    sled_bytes: 64 << 20,
    journal_bytes: 6 << 20,
};

/// Operations that a daemon remembers.
const REMEMBERED: u64 = 4096;
/// One that takes this long has failed.
const PATIENCE: Duration = Duration::from_secs(120);

/// Works on one machine until the lap is over.
async fn work(
    mut machine: Machine,
    apis: [Api; 2],
    cores: Arc<[u32]>,
    turns: Arc<Semaphore>,
    end: Instant,
    seed: u64,
) -> (Machine, Counts) {
    let (mut random, mut counts) = (Random::new(seed), Counts::new());
    loop {
        let turn = turns.acquire().await.expect("open");
        if Instant::now() >= end {
            return (machine, counts);
        }
        let before = format!("{} ({:?} on host {})", machine.id, machine.is, machine.host);
        let step = tokio::time::timeout(PATIENCE, machine.step(&apis, &cores, &mut random)).await;
        match step {
            Ok((op, Ok(()))) => *counts.entry(op).or_default() += 1,
            Ok((op, Err(error))) => panic!("{op:?} of {before}: {error:?}"),
            Err(late) => panic!("an operation on {before} takes more than {PATIENCE:?}: {late}"),
        }
        drop(turn);
    }
}

/// Prints what a host complained about last, which goes with its directory.
fn say_trouble(dir: &std::path::Path) {
    let log = std::fs::read_to_string(dir.join("log")).unwrap_or_default();
    let trouble: Vec<_> = log.lines().filter(|l| l.contains(" WARN ") || l.contains("ERROR ")).collect();
    let last = &trouble[trouble.len().saturating_sub(40)..];
    println!("{}: {} complaints, the last:\n{}", dir.display(), trouble.len(), last.join("\n"));
}

/// Looks at a host until it is as wanted, which it becomes in its own time, or the deadline; returns the last look.
async fn look(host: &Host, patience: Duration, wanted: impl Fn(&Usage) -> bool) -> Usage {
    let begin = Instant::now();
    loop {
        let usage = Usage::of(host);
        if wanted(&usage) || begin.elapsed() > patience {
            return usage;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Processes, directories and cgroups are those of the machines that live.
async fn is_exact(host: &Host, live: u64, isolated: bool) -> Usage {
    let processes = if isolated { live } else { 0 };
    let exact = |u: &Usage| {
        (u.workers, u.children, u.runtime_dirs) == (processes, processes, processes)
            // In each hierarchy where one can be made.
            && (processes == 0) <= (u.cgroups == 0)
            && u.cgroups.is_multiple_of(processes.max(1))
            && u.cgroups / processes.max(1) <= 3
    };
    let usage = look(host, DEADLINE, exact).await;
    assert!(exact(&usage), "{live} machines live, and there are: {usage}");
    usage
}

/// Nothing is left beyond the bounds; `operations` were done on both hosts since the first lap.
async fn is_bounded(host: &Host, first: &Usage, operations: u64) -> Usage {
    let memory = |u: &Usage| (u.anonymous_kib + u.shmem_kib) << 10;
    let kept = BOUNDS.bytes_an_operation * operations.min(REMEMBERED);
    let rests = |u: &Usage| {
        u.descriptors <= first.descriptors + BOUNDS.descriptors && u.threads <= first.threads + BOUNDS.threads
    };
    let usage = look(host, DEADLINE, rests).await;
    assert!(rests(&usage), "descriptors or threads are left: {usage}; after the first lap: {first}");
    assert!(
        memory(&usage) <= memory(first) + kept + BOUNDS.slack_bytes,
        "memory is left: {usage}; after the first lap: {first}"
    );
    assert_eq!(usage.other_files, first.other_files, "files are left: {usage}; after the first lap: {first}");
    assert!(
        usage.sled_bytes <= first.sled_bytes + BOUNDS.sled_bytes,
        "{usage}; after the first lap: {first}"
    );
    assert!(usage.journal_bytes <= BOUNDS.journal_bytes, "{usage}");
    usage
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_many_machines() {
    let seconds = number("VPMU_SOAK_SECONDS").unwrap_or(9);
    let vms = number("VPMU_SOAK_VMS").unwrap_or(6);
    let parallel = usize::try_from(number("VPMU_SOAK_PARALLEL").unwrap_or(4)).expect("a small number");
    let isolation = std::env::var("VPMU_SOAK_ISOLATION").unwrap_or_else(|_| "process".to_owned());
    let isolated = isolation == "process";
    let seed = number("VPMU_SOAK_SEED").unwrap_or_else(Random::seed);
    println!(
        "VPMU_SOAK_SEED={seed}: {seconds} s, {vms} machines, {parallel} operations at once, isolation {isolation}"
    );

    if vpmu_server::sharing::by_session() && vpmu_server::sharing::kernel_is_suspect() {
        println!("NOTE: this kernel may let one host starve the other: {}", vpmu_server::sharing::REMEDY);
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let dirs = [dir.path().join("a"), dir.path().join("b")];
    let _reaper = Reaper(dirs.to_vec());
    let snapshots = dir.path().join("snapshots").display().to_string();
    let options = ["--isolation", &isolation, "--snapshot-dir", &snapshots];
    // Sessions of their own, as a service manager gives them: beside many guests they need a share of their own.
    let under = ["setsid".to_owned()];
    let mut hosts = [
        Host::start_under(&dirs[0], &under, &options).await,
        Host::start_under(&dirs[1], &under, &options).await,
    ];
    let apis = [Api::of(&hosts[0]), Api::of(&hosts[1])];
    let kvm = hosts[0].ready["hypervisor"] == "kvm";
    let cores: Arc<[u32]> = vcpu_worker::host::probe().allowed_cores.into();

    let (begin, whole) = (Instant::now(), Duration::from_secs(seconds));
    let lap = (whole / 3).min(Duration::from_secs(60));
    let mut random = Random::new(seed);
    let mut machines: Vec<_> =
        (0..vms).map(|i| Machine::new(format!("soak-{i}"), machine::spec(i, kvm))).collect();
    let (mut counts, mut laps, mut after_first) = (Counts::new(), 0, 0);
    let mut first: Option<[Usage; 2]> = None;
    let mut last = [Usage::default(); 2];
    let (mut fullest, mut most) = (Usage::default(), 0);
    while laps < 3 || begin.elapsed() + lap / 2 < whole {
        let (end, turns) = (Instant::now() + lap, Arc::new(Semaphore::new(parallel)));
        let works: Vec<_> = machines
            .drain(..)
            .map(|machine| {
                let (apis, cores, turns) = (apis.clone(), Arc::clone(&cores), Arc::clone(&turns));
                tokio::spawn(work(machine, apis, cores, turns, end, random.next()))
            })
            .collect();
        for work in works {
            let (machine, done) = work.await.unwrap_or_else(|error| {
                for dir in &dirs {
                    say_trouble(dir);
                }
                panic!("an operation failed: {error}")
            });
            machines.push(machine);
            for (op, count) in done {
                *counts.entry(op).or_default() += count;
            }
        }
        laps += 1;
        let operations: u64 = counts.values().sum();
        let mut live = [0; 2];
        for machine in machines.iter().filter(|m| matches!(m.is, Is::Running | Is::Paused)) {
            live[machine.host] += 1;
        }
        for at in 0..2 {
            let usage = is_exact(&hosts[at], live[at], isolated).await;
            if live[at] > most {
                (fullest, most) = (usage, live[at]);
            }
        }
        for machine in &mut machines {
            machine.delete(&apis).await.unwrap_or_else(|e| panic!("{machine:?} is not deleted: {e:?}"));
        }
        for at in 0..2 {
            is_exact(&hosts[at], 0, isolated).await;
            assert!(hosts[at].list().await.is_empty(), "records are left");
            last[at] = match &first {
                Some(first) => is_bounded(&hosts[at], &first[at], operations - after_first).await,
                None => Usage::of(&hosts[at]),
            };
        }
        if first.is_none() {
            (first, after_first) = (Some(last), operations);
        }
        let parts = std::fs::read_dir(&snapshots).expect("there").flatten();
        let parts = parts.filter(|e| e.file_name().to_string_lossy().starts_with('.')).count();
        assert_eq!(parts, 0, "unfinished snapshots are left");
        println!(
            "{:>5} s: {operations} operations; {}+{} machines lived; empty now, a: {}; b: {}",
            begin.elapsed().as_secs(),
            live[0],
            live[1],
            last[0],
            last[1]
        );
    }
    let first = first.expect("a lap");
    println!("{laps} laps, {} operations: {counts:?}", counts.values().sum::<u64>());
    for (at, host) in ["a", "b"].iter().enumerate() {
        println!("{host}, empty after the first lap: {}", first[at]);
        println!("{host}, empty at the end:          {}", last[at]);
    }
    println!("fullest, {most} machines on one host: {fullest}");
    for host in &mut hosts {
        assert_eq!(host.terminate().await, 0);
    }
}
