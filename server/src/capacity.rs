//! What this host has to give: memory and cores.
//!
//! Invariants: the sum of granted memory never exceeds the host's; which cores are whose is [`crate::placement`]'s to
//! say; a grant is given back when its guard is dropped. Several vCPUs may be on a shared core; who runs there is the
//! core token's job.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;
use vcpu_worker::host::Topology;
use vpmu_proto::api::{HostCpu, VirtualMachineSpec};

use crate::placement::{Allocator, GrantId, Granted, Refusal, Wanted, examine};
use crate::status::ApiError;

/// The host's resources.
#[derive(Debug)]
pub struct Capacity {
    memory_bytes: u64,
    state: Mutex<State>,
    /// Grows when the housekeeping cores may have changed.
    changes: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    granted: u64,
    cores: Allocator,
}

/// Memory and cores of one machine; given back on drop.
#[derive(Debug)]
pub struct Grant {
    capacity: Arc<Capacity>,
    memory_bytes: u64,
    id: GrantId,
    /// Host core of each vCPU.
    pub cores: Vec<u32>,
    /// NUMA nodes that memory is to be bound to; empty for no binding.
    pub memory_nodes: Vec<u32>,
}

/// A move that is under way; dropping it gives the new cores back.
#[derive(Debug)]
pub struct Move {
    capacity: Arc<Capacity>,
    id: GrantId,
    /// The new core of each vCPU.
    pub cores: Vec<u32>,
    /// What becomes of it when it is dropped; none: both places stay the machine's until its grant ends.
    end: Option<bool>,
}

impl Move {
    /// The machine is on the new cores: the old ones are free.
    pub fn keep(mut self) {
        self.end = Some(true);
    }

    /// Nobody knows where the machine is: nobody else gets either place as long as it has a worker.
    pub fn leave_both(mut self) {
        self.end = None;
    }
}

impl Drop for Move {
    fn drop(&mut self) {
        if let Some(moved) = self.end {
            self.capacity.state().cores.settle(self.id, moved);
            self.capacity.changed();
        }
    }
}

impl Capacity {
    /// A host of `memory_bytes`, on which vCPUs may use `usable` cores and the daemon's own threads `own`.
    pub fn new(memory_bytes: u64, topology: Topology, usable: &[u32], own: &[u32]) -> Arc<Self> {
        let state = Mutex::new(State { granted: 0, cores: Allocator::new(topology, usable, own) });
        Arc::new(Self { memory_bytes, state, changes: watch::Sender::new(0) })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes that are not granted.
    pub fn free_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(self.state().granted)
    }

    /// Cores that vCPUs may use.
    pub fn cores(&self) -> Vec<u32> {
        self.state().cores.usable().to_vec()
    }

    /// Where the daemon's threads, and those of workers that run no vCPU, may be.
    pub fn housekeeping(&self) -> Vec<u32> {
        self.state().cores.housekeeping()
    }

    /// Tells when that may have changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The host's processors and who has them.
    pub fn topology(&self) -> Vec<HostCpu> {
        let state = self.state();
        let cpu = |c: &vcpu_worker::host::topology::Cpu| {
            let (owner, vcpus) = state.cores.use_of(c.id);
            HostCpu {
                cpu: c.id,
                package: c.package,
                node: c.node,
                core: c.core,
                cache: c.cache,
                isolated: c.isolated,
                nohz_full: c.nohz,
                usable: state.cores.usable().contains(&c.id),
                dedicated_to: owner.unwrap_or_default().to_owned(),
                vcpus: u32::try_from(vcpus).unwrap_or(u32::MAX),
            }
        };
        state.cores.topology().cpus().map(cpu).collect()
    }

    /// What is wrong with a placement on this host, whoever else runs here.
    pub fn examine(&self, wanted: &Wanted) -> Result<(), Refusal> {
        let state = self.state();
        examine(state.cores.topology(), state.cores.usable(), wanted)
    }

    /// Whether cores could be granted now; changes nothing.
    pub fn check_cores(&self, wanted: &Wanted) -> Result<Granted, Refusal> {
        self.state().cores.check(wanted)
    }

    /// Grants a machine its memory and cores; `owner` is its short name.
    pub fn grant(self: &Arc<Self>, owner: &str, spec: &VirtualMachineSpec) -> Result<Grant, ApiError> {
        let mut state = self.state();
        let memory_bytes = spec.memory_bytes;
        let free = self.memory_bytes.saturating_sub(state.granted);
        if memory_bytes > free {
            return Err(ApiError::exhausted(
                "HOST_MEMORY_EXHAUSTED",
                format!(
                    "the machine needs {memory_bytes} bytes of memory and this host has {free} left of {}; stop or move another machine",
                    self.memory_bytes
                ),
            )
            .with("needed_bytes", memory_bytes)
            .with("free_bytes", free));
        }
        let (id, granted) = state.cores.grant(owner, &Wanted::of(spec)).map_err(|r| r.exhausted())?;
        state.granted += memory_bytes;
        drop(state);
        self.changed();
        let Granted { cpus, memory_nodes } = granted;
        Ok(Grant { capacity: Arc::clone(self), memory_bytes, id, cores: cpus, memory_nodes })
    }

    /// Counts in what a machine that runs already holds; nothing is refused.
    pub fn adopt(self: &Arc<Self>, owner: &str, spec: &VirtualMachineSpec, cores: Vec<u32>) -> Grant {
        let mut state = self.state();
        state.granted = state.granted.saturating_add(spec.memory_bytes);
        let id = state.cores.adopt(owner, &cores, Wanted::of(spec).dedicated);
        drop(state);
        self.changed();
        let memory_bytes = spec.memory_bytes;
        Grant { capacity: Arc::clone(self), memory_bytes, id, cores, memory_nodes: Vec::new() }
    }

    fn changed(&self) {
        self.changes.send_modify(|n| *n += 1);
    }
}

impl Grant {
    /// Other cores for the machine that has this grant; it holds both until the move is kept, or dropped.
    pub fn begin_move(&self, wanted: &Wanted) -> Result<Move, ApiError> {
        let granted = self.capacity.state().cores.begin_move(self.id, wanted).map_err(|r| r.exhausted())?;
        self.capacity.changed();
        Ok(Move { capacity: Arc::clone(&self.capacity), id: self.id, cores: granted.cpus, end: Some(false) })
    }

    /// Where the threads of its worker that run no vCPU may be.
    pub fn housekeeping(&self) -> Vec<u32> {
        self.capacity.housekeeping()
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut state = self.capacity.state();
        state.granted = state.granted.saturating_sub(self.memory_bytes);
        state.cores.free(self.id);
        drop(state);
        self.capacity.changed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(memory_bytes: u64, vcpus: u32) -> VirtualMachineSpec {
        VirtualMachineSpec { vcpus, memory_bytes, ..VirtualMachineSpec::default() }
    }

    #[test]
    fn memory_and_cores_are_bounded_and_given_back() {
        let host = Capacity::new(1000, Topology::plain(2), &[0, 1], &[0, 1]);
        let first = host.grant("a", &spec(600, 3)).expect("fits");
        assert_eq!(first.cores, [0, 1, 0]);
        let much = host.grant("b", &spec(600, 1)).expect_err("does not fit");
        assert_eq!(much.reason(), "HOST_MEMORY_EXHAUSTED");
        drop(first);
        let second = host.grant("b", &spec(1000, 2)).expect("fits again");
        assert_eq!(second.cores, [0, 1]);
        assert_eq!(host.free_bytes(), 0);
        drop(second);
        assert_eq!(host.topology().iter().map(|cpu| cpu.vcpus).sum::<u32>(), 0);
    }
}
