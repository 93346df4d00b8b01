//! The host's processors as the kernel tells them under /sys/devices/system: packages, NUMA nodes, caches, threads of a
//! core, and which are set apart.
//!
//! Three names: a *CPU* is what Linux numbers (a hardware thread), a *core* is a physical one (its threads are siblings),
//! a *cache* is the set of CPUs behind one last-level cache (a CCX on AMD). Cores and caches are named by their lowest
//! online CPU.
//!
//! Invariants: only online CPUs are listed, in ascending order; each belongs to one core, cache, node and package; all
//! threads of a core list each other. A file that is not there means the plainest machine: one package, one node, one
//! thread a core.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::Path;

use super::parse_list;

/// Where the running kernel tells it.
pub const SYSFS: &str = "/sys/devices/system";

/// One online CPU.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cpu {
    /// Linux's number.
    pub id: u32,
    /// Physical package.
    pub package: u32,
    /// NUMA node.
    pub node: u32,
    /// Lowest online CPU of its core.
    pub core: u32,
    /// Lowest online CPU behind its last-level cache.
    pub cache: u32,
    /// Left out of the scheduler's balancing (isolcpus).
    pub isolated: bool,
    /// Without a tick while one thread runs (nohz_full).
    pub nohz: bool,
}

/// A host's processors.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Topology {
    cpus: BTreeMap<u32, Cpu>,
    offline: BTreeSet<u32>,
}

impl Topology {
    /// Of the running kernel.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self::read(Path::new(SYSFS))
    }

    /// From a tree in the form of /sys/devices/system. Never fails: what is missing is taken for the plainest machine,
    /// and where not even the online CPUs are told, they are those that this process may run on.
    #[must_use]
    pub fn read(root: &Path) -> Self {
        let text = |path: &str| std::fs::read_to_string(root.join(path)).ok();
        let list = |path: &str| text(path).map(|t| parse_list(&t)).unwrap_or_default();
        let number = |path: &str| text(path).and_then(|t| t.trim().parse::<u32>().ok());

        let mut online = list("cpu/online");
        if online.is_empty() {
            online = super::allowed_cores();
        }
        let online: BTreeSet<u32> = online.into_iter().collect();
        let (isolated, nohz) = (list("cpu/isolated"), list("cpu/nohz_full"));
        let nodes: Vec<(u32, Vec<u32>)> = list("node/online")
            .into_iter()
            .map(|node| (node, list(&format!("node/node{node}/cpulist"))))
            .collect();
        // Lists may name CPUs that are offline, and some kernels leave the CPU itself out.
        let lowest = |listed: Vec<u32>, own: u32| {
            listed.into_iter().filter(|cpu| online.contains(cpu)).min().map_or(own, |first| first.min(own))
        };
        let cpu = |id: u32| {
            let dir = format!("cpu/cpu{id}");
            let mut threads = list(&format!("{dir}/topology/core_cpus_list"));
            if threads.is_empty() {
                threads = list(&format!("{dir}/topology/thread_siblings_list"));
            }
            let caches = (0..8).filter_map(|index| {
                let cache = format!("{dir}/cache/index{index}");
                Some((number(&format!("{cache}/level"))?, list(&format!("{cache}/shared_cpu_list"))))
            });
            let last = caches.max_by_key(|(level, _)| *level).map(|(_, shared)| shared).unwrap_or_default();
            Cpu {
                id,
                package: number(&format!("{dir}/topology/physical_package_id")).unwrap_or(0),
                node: nodes.iter().find(|(_, cpus)| cpus.contains(&id)).map_or(0, |(node, _)| *node),
                core: lowest(threads, id),
                cache: lowest(last, id),
                isolated: isolated.contains(&id),
                nohz: nohz.contains(&id),
            }
        };
        Self {
            cpus: online.iter().map(|id| (*id, cpu(*id))).collect(),
            offline: list("cpu/offline").into_iter().filter(|id| !online.contains(id)).collect(),
        }
    }

    /// From CPUs that are known otherwise; for tests and simulations.
    #[must_use]
    pub fn of(cpus: impl IntoIterator<Item = Cpu>, offline: impl IntoIterator<Item = u32>) -> Self {
        let cpus: BTreeMap<u32, Cpu> = cpus.into_iter().map(|cpu| (cpu.id, cpu)).collect();
        let offline = offline.into_iter().filter(|id| !cpus.contains_key(id)).collect();
        Self { cpus, offline }
    }

    /// `cores` CPUs from 0 on, one thread a core, all behind one cache on one node.
    #[must_use]
    pub fn plain(cores: u32) -> Self {
        let cpu = |id| Cpu { id, package: 0, node: 0, core: id, cache: 0, isolated: false, nohz: false };
        Self::of((0..cores).map(cpu), [])
    }

    /// Online CPUs, ascending.
    pub fn cpus(&self) -> impl Iterator<Item = &Cpu> {
        self.cpus.values()
    }

    /// One online CPU.
    #[must_use]
    pub fn cpu(&self, id: u32) -> Option<&Cpu> {
        self.cpus.get(&id)
    }

    /// Whether the CPU is there but offline.
    #[must_use]
    pub fn is_offline(&self, id: u32) -> bool {
        self.offline.contains(&id)
    }

    /// CPUs that are there but offline, ascending.
    pub fn offline(&self) -> impl Iterator<Item = u32> + '_ {
        self.offline.iter().copied()
    }

    /// All online threads of a core, named by any of them; ascending.
    pub fn threads_of(&self, id: u32) -> impl Iterator<Item = u32> + '_ {
        let core = self.cpu(id).map(|cpu| cpu.core);
        self.cpus().filter(move |cpu| Some(cpu.core) == core).map(|cpu| cpu.id)
    }

    /// NUMA nodes that have a CPU, ascending.
    #[must_use]
    pub fn nodes(&self) -> BTreeSet<u32> {
        self.cpus().map(|cpu| cpu.node).collect()
    }

    /// Isolated CPUs, ascending.
    pub fn isolated(&self) -> impl Iterator<Item = u32> + '_ {
        self.cpus().filter(|cpu| cpu.isolated).map(|cpu| cpu.id)
    }

    /// For people: `1 package, 1 NUMA node, 1 last-level cache, 2 cores, 2 threads`, and what is set apart.
    #[must_use]
    pub fn summary(&self) -> String {
        let count = |of: fn(&Cpu) -> (u32, u32)| self.cpus().map(of).collect::<BTreeSet<_>>().len();
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        let mut text = [
            plural(count(|c| (c.package, 0)), "package"),
            plural(count(|c| (c.node, 0)), "NUMA node"),
            plural(count(|c| (c.cache, 0)), "last-level cache"),
            plural(count(|c| (c.core, 0)), "core"),
            plural(self.cpus.len(), "thread"),
        ]
        .join(", ");
        let isolated: Vec<u32> = self.isolated().collect();
        let nohz: Vec<u32> = self.cpus().filter(|c| c.nohz).map(|c| c.id).collect();
        let offline: Vec<u32> = self.offline().collect();
        for (what, list) in [("isolated", isolated), ("nohz_full", nohz), ("offline", offline)] {
            if !list.is_empty() {
                // Writing to a string cannot fail.
                let _ = write!(text, "; {what}: {}", show_list(&list));
            }
        }
        text
    }
}

/// Ascending CPU numbers in the kernel's list format, `0-3,8`.
#[must_use]
pub fn show_list(cpus: &[u32]) -> String {
    let mut out = String::new();
    let mut rest = cpus;
    while let Some(first) = rest.first() {
        let run = rest.iter().zip(*first..).take_while(|(have, want)| **have == *want).count();
        let last = rest[run - 1];
        if !out.is_empty() {
            out.push(',');
        }
        let _ = if run == 1 { write!(out, "{first}") } else { write!(out, "{first}-{last}") };
        rest = &rest[run..];
    }
    out
}

#[cfg(test)]
mod tests;
