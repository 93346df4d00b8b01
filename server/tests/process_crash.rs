//! SIGKILL of daemons and of workers at random moments under a load of create, start, stop, pause, resume, migrate and
//! delete, between two hosts: every machine is as its last acknowledged operation left it (one that was not acknowledged
//! may have either outcome), on one host only, and no record disagrees with its process.
//!
//! 8 rounds by default, `VPMU_CRASH_ROUNDS` for more, `VPMU_CRASH_SEED` to choose the random moments again.

mod support;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use support::*;
use tonic::Status;
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::virtual_machines_service_client::VirtualMachinesServiceClient;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::operations_client::OperationsClient;
use vpmu_proto::longrunning::{Operation, WaitOperationRequest, operation};

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
        legal[random.below(legal.len() as u64) as usize]
    }
}

/// xorshift64*: the same seed, the same moments.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, bound: u64) -> u64 {
        (self.next() >> 33) % bound
    }
}

/// One host as a client that may lose it sees it.
#[derive(Clone)]
struct Api {
    socket: std::path::PathBuf,
    peer: String,
}

impl Api {
    async fn channel(&self) -> Result<tonic::transport::Channel, Status> {
        let socket = self.socket.clone();
        tonic::transport::Endpoint::from_static("http://vpmud.invalid")
            .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await
            .map_err(|e| Status::unavailable(e.to_string()))
    }

    /// Done, and acknowledged.
    async fn done(&self, mut now: Operation) -> Result<(), Status> {
        let mut client = OperationsClient::new(self.channel().await?);
        while !now.done {
            let timeout = Some(prost_types::Duration { seconds: 5, nanos: 0 });
            now = client.wait_operation(WaitOperationRequest { name: now.name, timeout }).await?.into_inner();
        }
        match now.result {
            Some(operation::Result::Response(_)) => Ok(()),
            Some(operation::Result::Error(error)) => Err(Status::unknown(error.message)),
            None => Err(Status::internal("a done operation without a result")),
        }
    }

    async fn perform(&self, op: Op, id: &str, to: &Self) -> Result<(), Status> {
        let mut vms = VirtualMachinesServiceClient::new(self.channel().await?);
        let (name, request_id) = (name(id), String::new());
        let operation = match op {
            Op::Create => vms.create_virtual_machine(create(id, probe_spec(1, 16))).await?,
            Op::Start => vms.start_virtual_machine(StartVirtualMachineRequest { name, request_id }).await?,
            Op::Stop => vms.stop_virtual_machine(StopVirtualMachineRequest { name, request_id }).await?,
            Op::Delete => {
                let request = DeleteVirtualMachineRequest { name, ..DeleteVirtualMachineRequest::default() };
                vms.delete_virtual_machine(request).await?
            }
            Op::Pause => {
                return vms.pause_virtual_machine(PauseVirtualMachineRequest { name }).await.map(drop);
            }
            Op::Resume => {
                return vms.resume_virtual_machine(ResumeVirtualMachineRequest { name }).await.map(drop);
            }
            Op::Migrate => {
                let spec = MigrationSpec { destination: to.peer.clone(), ..MigrationSpec::default() };
                let request = CreateMigrationRequest {
                    parent: name,
                    spec: Some(spec),
                    ..CreateMigrationRequest::default()
                };
                let client = migrations_service_client::MigrationsServiceClient::new(self.channel().await?);
                let mut client = client;
                client.create_migration(request).await?
            }
        };
        self.done(operation.into_inner()).await
    }
}

#[derive(Default, Debug)]
struct Figures {
    acknowledged: u64,
    unanswered: u64,
    daemons: u64,
    workers: u64,
    kept: u64,
    changed: u64,
    slowest: Duration,
}

/// Works on one machine until it is told to stop or an operation is not acknowledged.
async fn work(mut known: Known, apis: [Api; 2], stop: Arc<AtomicBool>, seed: u64) -> (Known, u64) {
    let (mut random, mut acknowledged) = (Random(seed | 1), 0);
    while !stop.load(Ordering::SeqCst) {
        if known.is == Is::Absent {
            // A name that has moved away stays as a tombstone.
            known.id = format!("m{:x}", random.next() >> 16);
            known.host = random.below(2) as usize;
        }
        let op = known.choose(&mut random);
        known.asked = Some(op);
        let done = apis[known.host].perform(op, &known.id, &apis[1 - known.host]);
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

/// Worker processes of a host, by their command lines: also those without a runtime directory.
fn processes(dir: &Path) -> BTreeSet<u32> {
    let run = dir.join("state/run").display().to_string();
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<u32>() else { continue };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        if line.starts_with("vpmud\0worker\0") && line.contains(&run) && Identity::of(pid).is_ok() {
            found.insert(pid);
        }
    }
    found
}

fn heartbeats(pmu: &Pmu) -> u64 {
    pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.heartbeats + v.loops).sum()
}

/// Records and processes agree: who runs counts, who is paused does not, and nobody else is there.
async fn agree(hosts: &[Host; 2], all: &[(usize, VirtualMachine)]) {
    for (index, host) in hosts.iter().enumerate() {
        let begin = Instant::now();
        let wanted: BTreeSet<u32> = all
            .iter()
            .filter(|(at, vm)| *at == index && vm.worker_pid != 0)
            .map(|(_, vm)| vm.worker_pid)
            .collect();
        while processes(&host.dir) != wanted {
            let now = processes(&host.dir);
            assert!(
                begin.elapsed() < DEADLINE,
                "host {index}: records say {wanted:?}, processes are {now:?}"
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    for (index, vm) in all {
        let (host, id) = (&hosts[*index], vm.name.rsplit('/').next().expect("a name"));
        let live = matches!(vm.observed_state(), State::Running | State::Paused);
        assert_eq!(live, vm.worker_pid != 0, "{vm:?}");
        if !live {
            continue;
        }
        let before = heartbeats(&host.live_pmu(id).await);
        if vm.observed_state() == State::Paused {
            tokio::time::sleep(Duration::from_millis(30)).await;
            assert_eq!(heartbeats(&host.live_pmu(id).await), before, "{id} is paused and runs: {vm:?}");
            continue;
        }
        let begin = Instant::now();
        while heartbeats(&host.live_pmu(id).await) == before {
            assert!(begin.elapsed() < DEADLINE, "{id} is RUNNING and does not run: {vm:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

struct Reaper([std::path::PathBuf; 2]);

impl Drop for Reaper {
    fn drop(&mut self) {
        for pid in self.0.iter().flat_map(|dir| processes(dir)) {
            let _ = kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), Signal::KILL);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_dies_every_machine_is_as_it_was_acknowledged() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let rounds = number("VPMU_CRASH_ROUNDS").unwrap_or(8);
    let seed = number("VPMU_CRASH_SEED").unwrap_or_else(|| {
        std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).expect("a clock").as_nanos() as u64
            >> 8
    });
    println!("VPMU_CRASH_SEED={seed}");
    let mut random = Random(seed | 1);
    let dir = tempfile::tempdir().expect("tempdir");
    let dirs = [dir.path().join("a"), dir.path().join("b")];
    let _reaper = Reaper(dirs.clone());
    let options = ["--isolation", "process"];
    let mut hosts = [Host::start(&dirs[0], &options).await, Host::start(&dirs[1], &options).await];
    let apis = [0, 1].map(|i: usize| Api { socket: hosts[i].socket(), peer: hosts[i].peer() });
    let absent = Known { id: String::new(), host: 0, is: Is::Absent, asked: None, killed: false };
    let mut machines = vec![absent; SLOTS];
    let mut figures = Figures::default();

    for round in 0..rounds {
        let stop = Arc::new(AtomicBool::new(false));
        let works: Vec<_> = machines
            .drain(..)
            .map(|known| tokio::spawn(work(known, apis.clone(), Arc::clone(&stop), random.next())))
            .collect();
        tokio::time::sleep(Duration::from_millis(50 + random.below(700))).await;
        // One round in three kills a worker, the others a daemon.
        let mut victim = None;
        if round % 3 == 2 {
            let pids: Vec<u32> = dirs.iter().flat_map(|dir| processes(dir)).collect();
            if !pids.is_empty() {
                let pid = pids[random.below(pids.len() as u64) as usize];
                let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let name = String::from_utf8_lossy(&line)
                    .split('\0')
                    .find_map(|word| word.strip_prefix("--name=").map(str::to_owned));
                let _ = kill_process(Pid::from_raw(pid.cast_signed()).expect("a pid"), Signal::KILL);
                victim = name;
                figures.workers += 1;
            }
        } else {
            let host = &mut hosts[random.below(2) as usize];
            host.kill().await;
            tokio::time::sleep(Duration::from_millis(random.below(100))).await;
            host.restart().await;
            figures.daemons += 1;
        }
        stop.store(true, Ordering::SeqCst);
        let begin = Instant::now();
        for work in works {
            let (mut known, acknowledged) = work.await.expect("works");
            figures.acknowledged += acknowledged;
            figures.unanswered += u64::from(known.asked.is_some());
            known.killed = victim.as_ref() == Some(&known.id);
            machines.push(known);
        }
        // A worker's end is seen by its daemon in its own time.
        let mut all = settled(&hosts).await;
        let fits = |all: &[(usize, VirtualMachine)], known: &Known| {
            let found: Vec<_> = all.iter().filter(|(_, vm)| vm.name == name(&known.id)).collect();
            match found.as_slice() {
                [] => known.allowed().iter().any(|(_, is)| *is == Is::Absent),
                [(at, vm)] => known.allowed().contains(&(*at, observed(vm).expect("settled"))),
                _ => false,
            }
        };
        while !machines.iter().all(|known| fits(&all, known)) {
            let wrong: Vec<_> = machines.iter().filter(|known| !fits(&all, known)).collect();
            assert!(begin.elapsed() < DEADLINE, "round {round} (seed {seed}): {wrong:#?} against {all:#?}");
            tokio::time::sleep(Duration::from_millis(50)).await;
            all = settled(&hosts).await;
        }
        agree(&hosts, &all).await;
        all = settled(&hosts).await;
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
    }
    println!(
        "{rounds} rounds: {} daemons and {} workers killed; {} operations acknowledged, all as acknowledged; {} not \
         answered, of which {} had not happened and {} had; slowest to settle {} ms",
        figures.daemons,
        figures.workers,
        figures.acknowledged,
        figures.unanswered,
        figures.kept,
        figures.changed,
        figures.slowest.as_millis()
    );
    for known in machines.iter().filter(|known| known.is != Is::Absent) {
        let api = &apis[known.host];
        api.perform(Op::Delete, &known.id, api).await.expect("deleted");
    }
    for host in &mut hosts {
        assert!(processes(&host.dir).is_empty(), "workers are left");
        assert_eq!(host.terminate().await, 0);
    }
}
