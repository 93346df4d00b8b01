//! What one running vpmud is made of; shared by its services, actors and migrations.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use vpmu_proto::api::HostPmuCapabilities;
use vpmu_proto::peer::CpuidLeaf;

use crate::capacity::Capacity;
use crate::migration::Migrations;
use crate::ops::Ops;
use crate::store::Store;
use crate::vm::events::Events;
use crate::vm::registry::Registry;
use crate::worker_link::WorkerFactory;

/// What this host is.
#[derive(Debug, Clone)]
pub struct HostInfo {
    /// Identity of its store: what other hosts know it by.
    pub host_id: String,
    /// "kvm" or "simulated".
    pub hypervisor: &'static str,
    /// "model", "msr" or "kvm".
    pub pmu_mode: &'static str,
    /// The host's PMU, or its model.
    pub shape: pmu::Shape,
    /// Short form of it.
    pub host_pmu: String,
    /// Why a mode is not offered.
    pub notes: Vec<String>,
    /// Boot id of the machine: clocks compare only within one.
    pub boot_id: String,
    /// Frequency of the time stamp counter, kHz.
    pub tsc_khz: u32,
    /// CPU identity as guests see it.
    pub cpuid: Vec<CpuidLeaf>,
}

/// The daemon.
pub struct Daemon {
    /// Durable state.
    pub store: Store,
    /// This host.
    pub host: HostInfo,
    /// What it has to give.
    pub capacity: Arc<Capacity>,
    /// The host's processors.
    pub awake: crate::awake::Awake,
    /// Machine events.
    pub events: Events,
    /// Operations.
    pub ops: Arc<Ops>,
    /// Makes workers.
    pub workers: WorkerFactory,
    /// Machines.
    pub registry: Registry,
    /// Migrations.
    pub migrations: Migrations,
    /// Where snapshots are.
    pub snapshot_dir: std::path::PathBuf,
    /// How this host talks to others.
    pub peering: crate::peer::Peering,
    /// Cancelled when the daemon begins to end.
    pub shutdown: CancellationToken,
    /// Cancelled once what the last daemon left is settled: from then on restart policies act.
    pub recovered: CancellationToken,
    /// Every task that must end before the store closes.
    pub tasks: TaskTracker,
    /// A machine that moves to another vpmud on this machine hands its memory over unless its request says otherwise.
    pub auto_local: bool,
    /// It ends to become another binary: machines in processes of their own go on.
    pub upgrading: std::sync::atomic::AtomicBool,
    /// For tests: where to stop this process, once at each.
    pub hold_at: Vec<crate::migration::hold::Hold>,
    /// What migrations wait for, and how long.
    pub limits: crate::migration::limits::Limits,
}

impl Daemon {
    /// What an operator must know of a store that takes no writes.
    fn store_note(&self) -> Option<String> {
        let crate::store::Health::ReadOnly { cause } = self.store.health() else { return None };
        Some(format!(
            "the store is read-only, nothing can be changed: {}; free or repair the disk, vpmud tries again by itself",
            crate::status::clip(&cause, 256)
        ))
    }

    /// What this host offers, for the API and for peers.
    pub fn capabilities(&self) -> HostPmuCapabilities {
        HostPmuCapabilities {
            mode: self.host.pmu_mode.to_owned(),
            shape: Some(vcpu_worker::pmu_glue::shape_to_proto(&self.host.shape)),
            host_pmu: self.host.host_pmu.clone(),
            hypervisor: self.host.hypervisor.to_owned(),
            host_id: self.host.host_id.clone(),
            cores: self.capacity.cores(),
            daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
            notes: self.store_note().into_iter().chain(self.host.notes.iter().cloned()).collect(),
            topology: self.capacity.topology(),
        }
    }
}
