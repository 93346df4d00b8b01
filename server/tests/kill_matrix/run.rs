//! One cell, played with real processes: two daemons, a probe guest, the fault at the point, recovery, and then every
//! question that matters about what is left. [`play`] has the order; a room each has how: `point`, `fault`, `settle`,
//! `check`, `clean_up`.
//!
//! Invariant: whatever a cell comes to, no process and no mount of it is left.

mod check;
mod clean_up;
mod disk;
mod fault;
mod memory;
mod point;
mod processes;
mod settle;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use vcpu_worker::process::Identity;
use vpmu_proto::api::*;

use super::cell::{Cell, Fault, Got, Isolation, Scene, Who};
use super::link::Link;
use super::support::*;
pub use disk::can_mount;
use disk::{mount, unmount};
use memory::Copy;
use processes::{alive, pid};

/// Guest memory, MiB, and what it fills once.
const MEMORY: u64 = 16;
const FILL: u64 = 4 << 20;
/// Where memory is to follow: what the guest writes all the time, and bytes a second of the link.
const WORKING_SET: u64 = 8 << 20;
const LINK: u64 = 3 << 20;
/// Time-outs where nothing is waited for but the fault itself, and where the fault is silence; the silence.
const PATIENT: u64 = 4000;
const HASTY: u64 = 1000;

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

    fn host(&mut self, daemon: Who) -> &mut Host {
        if daemon == Who::SD { &mut self.a } else { &mut self.b }
    }
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

/// A machine that has much else to do needs more than the usual second.
fn hasty() -> u64 {
    std::env::var("VPMU_KILL_MATRIX_TIMEOUT_MS").map_or(HASTY, |ms| ms.parse().expect("milliseconds"))
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

async fn one(host: &Host) -> Option<VirtualMachine> {
    let list = host.list().await;
    assert!(list.len() <= 1, "{list:?}");
    list.into_iter().next()
}

async fn list(host: &Host) -> Vec<Migration> {
    let request = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
    host.migrations().await.list_migrations(request).await.expect("lists").into_inner().migrations
}
