//! Which host cores a machine's vCPUs get: the one room where that is decided. Pure: no I/O, no clock, no randomness.
//!
//! - [`Wanted`] is what a spec asks for; [`examine`] says what is wrong with it on this host whoever else runs here;
//! - [`Allocator`] knows who has what, grants, moves and frees; [`choose`] picks among the cores that are free;
//! - [`validate`] judges a request's field; [`Refusal`] says exactly what is short or wrong.
//!
//! Invariants (tests.rs has them as properties): a core that is dedicated has one vCPU of one machine, and its other
//! threads have none; what a machine moves from and to is both held until the move is settled; at least one core that
//! the daemon may use is dedicated to nobody; the same requests in the same order give the same answers.

mod allocator;
mod choose;
mod refusal;
mod request;
#[cfg(test)]
mod tests;

pub use allocator::{Allocator, GrantId};
pub use refusal::Refusal;
pub use request::validate;

use vcpu_worker::host::Topology;
use vpmu_proto::api::cpu_placement::{Arrangement, Policy};
use vpmu_proto::api::{CpuPlacement, VirtualMachineSpec};

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// vCPUs, at least one.
    pub vcpus: usize,
    /// Whole cores, shared with nobody.
    pub dedicated: bool,
    /// Far apart instead of close together.
    pub spread: bool,
    /// All on one NUMA node.
    pub numa_local: bool,
    /// CPUs by number; empty: the allocator chooses.
    pub cores: Vec<u32>,
}

impl Wanted {
    /// What a spec asks for; enumerations that are not known count as unset.
    pub fn of(spec: &VirtualMachineSpec) -> Self {
        let default = CpuPlacement::default();
        Self::new(spec.vcpus, spec.placement.as_ref().unwrap_or(&default))
    }

    /// What a placement asks for `vcpus` vCPUs.
    pub fn new(vcpus: u32, placement: &CpuPlacement) -> Self {
        Self {
            vcpus: vcpus as usize,
            dedicated: placement.policy() == Policy::Dedicated,
            spread: placement.arrangement() == Arrangement::Spread,
            numa_local: placement.numa_local,
            cores: placement.cores.clone(),
        }
    }
}

/// What is granted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Granted {
    /// CPU of each vCPU.
    pub cpus: Vec<u32>,
    /// NUMA nodes that memory is to be bound to; empty for no binding.
    pub memory_nodes: Vec<u32>,
}

/// What is wrong with a request on a host of this shape, whoever else runs on it.
pub fn examine(topology: &Topology, usable: &[u32], wanted: &Wanted) -> Result<(), Refusal> {
    let given = wanted.cores.len();
    let fits = if wanted.dedicated { given == wanted.vcpus } else { given <= wanted.vcpus };
    if given != 0 && !fits {
        return Err(Refusal::Count { given, vcpus: wanted.vcpus, dedicated: wanted.dedicated });
    }
    for (at, cpu) in wanted.cores.iter().enumerate() {
        let Some(found) = topology.cpu(*cpu) else {
            return Err(if topology.is_offline(*cpu) {
                Refusal::Offline { cpu: *cpu }
            } else {
                Refusal::Unknown { cpu: *cpu, online: topology.cpus().map(|c| c.id).collect() }
            });
        };
        if !usable.contains(cpu) {
            return Err(Refusal::NotUsable { cpu: *cpu, usable: usable.to_vec() });
        }
        let earlier = &wanted.cores[..at];
        if earlier.contains(cpu) {
            return Err(Refusal::Twice { cpu: *cpu });
        }
        let same_core = |other: &&u32| topology.cpu(**other).is_some_and(|o| o.core == found.core);
        if wanted.dedicated
            && let Some(sibling) = earlier.iter().find(same_core)
        {
            return Err(Refusal::Siblings { cpu: *cpu, sibling: *sibling });
        }
        let first = wanted.cores.first().and_then(|first| topology.cpu(*first)).map_or(0, |first| first.node);
        if wanted.numa_local && found.node != first {
            return Err(Refusal::SpansNodes { cpu: *cpu, node: found.node, first });
        }
    }
    Ok(())
}
