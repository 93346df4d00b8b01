//! Who has which cores.
//!
//! A grant is a list of CPUs, one a vCPU, shared or dedicated. What is free is computed from the grants each time, so
//! that there is no second account that could disagree with them.

use std::collections::{BTreeMap, BTreeSet};

use vcpu_worker::host::Topology;
use vcpu_worker::host::topology::show_list;

use super::choose::{self, Free};
use super::{Granted, Refusal, Wanted, examine};

/// Names one grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GrantId(u64);

/// CPUs that somebody holds.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Claim {
    cpus: Vec<u32>,
    dedicated: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Held {
    owner: String,
    now: Claim,
    /// Where it is being moved to.
    next: Option<Claim>,
}

impl Held {
    fn claims(&self) -> impl Iterator<Item = &Claim> {
        std::iter::once(&self.now).chain(&self.next)
    }
}

/// What others hold.
#[derive(Debug)]
struct Others {
    /// Cores that are dedicated.
    dedicated: BTreeSet<u32>,
    /// Shared vCPUs on each CPU that has any.
    shared: BTreeMap<u32, usize>,
}

/// The host's cores and who has them.
#[derive(Debug, Clone)]
pub struct Allocator {
    topology: Topology,
    /// CPUs that vCPUs may use, ascending.
    usable: Vec<u32>,
    /// CPUs that the daemon's own threads may use, ascending.
    own: Vec<u32>,
    held: BTreeMap<GrantId, Held>,
    next: u64,
}

impl Allocator {
    /// Of a host on which vCPUs may use `usable` and the daemon `own`; CPUs that are not online are left out.
    pub fn new(topology: Topology, usable: &[u32], own: &[u32]) -> Self {
        let online = |list: &[u32]| -> Vec<u32> {
            let set: BTreeSet<u32> = list.iter().copied().filter(|id| topology.cpu(*id).is_some()).collect();
            set.into_iter().collect()
        };
        let (usable, own) = (online(usable), online(own));
        Self { topology, usable, own, held: BTreeMap::new(), next: 0 }
    }

    /// The host.
    pub fn topology(&self) -> &Topology {
        &self.topology
    }

    /// CPUs that vCPUs may use, ascending.
    pub fn usable(&self) -> &[u32] {
        &self.usable
    }

    /// Grants cores to a machine.
    pub fn grant(&mut self, owner: &str, wanted: &Wanted) -> Result<(GrantId, Granted), Refusal> {
        let granted = self.judge(wanted, None)?;
        Ok((self.hold(owner, &granted.cpus, wanted.dedicated), granted))
    }

    /// What [`Allocator::grant`] would answer; changes nothing.
    pub fn check(&self, wanted: &Wanted) -> Result<Granted, Refusal> {
        self.judge(wanted, None)
    }

    /// Notes what a machine that runs already has; nothing is refused.
    pub fn adopt(&mut self, owner: &str, cpus: &[u32], dedicated: bool) -> GrantId {
        self.hold(owner, cpus, dedicated)
    }

    fn hold(&mut self, owner: &str, cpus: &[u32], dedicated: bool) -> GrantId {
        let id = GrantId(self.next);
        self.next += 1;
        let now = Claim { cpus: cpus.to_vec(), dedicated };
        self.held.insert(id, Held { owner: owner.to_owned(), now, next: None });
        id
    }

    /// Grants other cores to a machine that has some, its own counted as free. Both are held until [`Allocator::settle`].
    pub fn begin_move(&mut self, id: GrantId, wanted: &Wanted) -> Result<Granted, Refusal> {
        let granted = self.judge(wanted, Some(id))?;
        if let Some(held) = self.held.get_mut(&id) {
            held.next = Some(Claim { cpus: granted.cpus.clone(), dedicated: wanted.dedicated });
        }
        Ok(granted)
    }

    /// Ends a move: the new cores are the machine's, or the old ones are again.
    pub fn settle(&mut self, id: GrantId, moved: bool) {
        if let Some(held) = self.held.get_mut(&id)
            && let Some(next) = held.next.take()
            && moved
        {
            held.now = next;
        }
    }

    /// Gives everything of a grant back.
    pub fn free(&mut self, id: GrantId) {
        self.held.remove(&id);
    }

    /// All threads of the cores that are dedicated, ascending.
    pub fn dedicated(&self) -> BTreeSet<u32> {
        let claims = self.held.values().flat_map(Held::claims).filter(|claim| claim.dedicated);
        claims.flat_map(|claim| &claim.cpus).flat_map(|cpu| self.topology.threads_of(*cpu)).collect()
    }

    /// Where the daemon's threads may be, ascending: never empty but on a host that adopted too much.
    pub fn housekeeping(&self) -> Vec<u32> {
        let dedicated = self.dedicated();
        self.own.iter().copied().filter(|cpu| !dedicated.contains(cpu)).collect()
    }

    /// Whom a CPU's core is dedicated to, and how many vCPUs are pinned to the CPU.
    pub fn use_of(&self, cpu: u32) -> (Option<&str>, usize) {
        let mut owner = None;
        let mut vcpus = 0;
        for held in self.held.values() {
            for claim in held.claims() {
                vcpus += claim.cpus.iter().filter(|c| **c == cpu).count();
                if claim.dedicated && claim.cpus.iter().any(|c| self.same_core(*c, cpu)) {
                    owner = Some(held.owner.as_str());
                }
            }
        }
        (owner, vcpus)
    }

    fn core_of(&self, cpu: u32) -> u32 {
        self.topology.cpu(cpu).map_or(cpu, |c| c.core)
    }

    fn same_core(&self, a: u32, b: u32) -> bool {
        self.core_of(a) == self.core_of(b)
    }

    /// What others than `except` hold.
    fn others(&self, except: Option<GrantId>) -> Others {
        let mut dedicated = BTreeSet::new();
        // Hundreds of machines share a few CPUs: sorting is quicker than to look each of them up.
        let mut shared = Vec::with_capacity(self.held.len());
        for (_, held) in self.held.iter().filter(|(id, _)| Some(**id) != except) {
            for claim in held.claims() {
                if claim.dedicated {
                    dedicated.extend(claim.cpus.iter().map(|cpu| self.core_of(*cpu)));
                } else {
                    shared.extend(claim.cpus.iter().copied());
                }
            }
        }
        shared.sort_unstable();
        let shared = shared.chunk_by(u32::eq).filter_map(|cpus| Some((*cpus.first()?, cpus.len()))).collect();
        Others { dedicated, shared }
    }

    fn judge(&self, wanted: &Wanted, except: Option<GrantId>) -> Result<Granted, Refusal> {
        examine(&self.topology, &self.usable, wanted)?;
        let others = self.others(except);
        let cpus = match (wanted.cores.is_empty(), wanted.dedicated) {
            (true, true) => self.choose_dedicated(wanted, &others)?,
            (true, false) => self.choose_shared(wanted, &others)?,
            (false, _) => self.named(wanted, except)?,
        };
        if wanted.dedicated {
            self.leaves_some(&cpus, &others, wanted.vcpus)?;
        }
        let nodes: BTreeSet<u32> =
            cpus.iter().filter_map(|cpu| self.topology.cpu(*cpu)).map(|c| c.node).collect();
        let bind = wanted.numa_local && self.topology.nodes().len() > 1;
        Ok(Granted { cpus, memory_nodes: if bind { nodes.into_iter().collect() } else { Vec::new() } })
    }

    /// The daemon keeps a core: of a list that was named.
    fn leaves_some(&self, cpus: &[u32], others: &Others, vcpus: usize) -> Result<(), Refusal> {
        let taken: BTreeSet<u32> = cpus.iter().map(|cpu| self.core_of(*cpu)).collect();
        let left = self.own_left(&others.dedicated);
        if self.own.is_empty() || left.iter().any(|core| !taken.contains(core)) {
            return Ok(());
        }
        let most = self.free_cores(others).len();
        Err(Refusal::Host { vcpus, most, own: show_list(&self.own) })
    }

    /// The daemon's cores that are dedicated to nobody.
    fn own_left(&self, dedicated: &BTreeSet<u32>) -> BTreeSet<u32> {
        self.own.iter().map(|cpu| self.core_of(*cpu)).filter(|core| !dedicated.contains(core)).collect()
    }

    /// Whole cores that can be dedicated, each by the lowest CPU that vCPUs may use. If that were all that the daemon
    /// has left, its lowest one is not among them.
    fn free_cores(&self, others: &Others) -> Vec<Free> {
        let busy: BTreeSet<u32> = others.shared.keys().map(|cpu| self.core_of(*cpu)).collect();
        let mut seen = BTreeSet::new();
        let cpus = self.usable.iter().filter_map(|id| self.topology.cpu(*id));
        let mut free: Vec<(u32, Free)> = cpus
            .filter(|c| seen.insert(c.core) && !others.dedicated.contains(&c.core) && !busy.contains(&c.core))
            .map(|c| (c.core, Free { cpu: c.id, node: c.node, cache: c.cache, isolated: c.isolated }))
            .collect();
        let own = self.own_left(&others.dedicated);
        if own.iter().all(|core| free.iter().any(|(free, _)| free == core)) {
            let kept = own.first().copied();
            free.retain(|(core, _)| Some(*core) != kept);
        }
        free.into_iter().map(|(_, free)| free).collect()
    }

    fn choose_dedicated(&self, wanted: &Wanted, others: &Others) -> Result<Vec<u32>, Refusal> {
        let n = wanted.vcpus;
        let free = self.free_cores(others);
        if free.len() < n {
            let usable: BTreeSet<u32> = self.usable.iter().map(|cpu| self.core_of(*cpu)).collect();
            let shared: BTreeSet<u32> = others.shared.keys().map(|cpu| self.core_of(*cpu)).collect();
            return Err(Refusal::Cores {
                vcpus: n,
                free: free.len(),
                usable: usable.len(),
                dedicated: others.dedicated.intersection(&usable).count(),
                shared: shared.intersection(&usable).count(),
            });
        }
        if !wanted.numa_local {
            return Ok(choose::cores(&free, n, wanted.spread));
        }
        let Some(on_node) = choose::node(&free, n, wanted.spread) else {
            let count = |node: u32| free.iter().filter(|core| core.node == node).count();
            let node = self.topology.nodes().into_iter().rev().max_by_key(|node| count(*node)).unwrap_or(0);
            return Err(Refusal::Node { vcpus: n, node, free: count(node), total: free.len() });
        };
        Ok(choose::cores(&on_node, n, wanted.spread))
    }

    /// The least used CPUs that are dedicated to nobody, isolated ones only where there are no others.
    fn choose_shared(&self, wanted: &Wanted, others: &Others) -> Result<Vec<u32>, Refusal> {
        let mut cpus: Vec<_> = self.usable.iter().filter_map(|id| self.topology.cpu(*id)).collect();
        cpus.retain(|cpu| !others.dedicated.contains(&cpu.core));
        if cpus.iter().any(|cpu| !cpu.isolated) {
            cpus.retain(|cpu| !cpu.isolated);
        }
        let mut load = others.shared.clone();
        let on = |load: &BTreeMap<u32, usize>, cpu: u32| load.get(&cpu).copied().unwrap_or(0);
        if wanted.numa_local {
            // The node with least on each of its CPUs, compared as fractions.
            let nodes = cpus.iter().map(|cpu| cpu.node).collect::<BTreeSet<_>>();
            let fraction = |node: &u32| {
                let of = || cpus.iter().filter(|cpu| cpu.node == *node);
                of().map(|cpu| on(&load, cpu.id)).sum::<usize>() * 4096 / of().count().max(1)
            };
            let best = nodes.into_iter().min_by_key(fraction);
            cpus.retain(|cpu| Some(cpu.node) == best);
        }
        let mut chosen = Vec::with_capacity(wanted.vcpus);
        for _ in 0..wanted.vcpus {
            let best = cpus.iter().min_by_key(|cpu| {
                let core: usize = self.topology.threads_of(cpu.id).map(|thread| on(&load, thread)).sum();
                (on(&load, cpu.id), core, cpu.id)
            });
            let Some(best) = best else { return Err(Refusal::NoneShared { usable: self.usable.len() }) };
            *load.entry(best.id).or_default() += 1;
            chosen.push(best.id);
        }
        Ok(chosen)
    }

    /// The list that was given, if nobody is in the way.
    fn named(&self, wanted: &Wanted, except: Option<GrantId>) -> Result<Vec<u32>, Refusal> {
        for cpu in &wanted.cores {
            for (_, held) in self.held.iter().filter(|(id, _)| Some(**id) != except) {
                for claim in held.claims().filter(|claim| claim.dedicated || wanted.dedicated) {
                    let Some(at) = claim.cpus.iter().find(|c| self.same_core(**c, *cpu)) else { continue };
                    return Err(Refusal::Taken {
                        cpu: *cpu,
                        owner: held.owner.clone(),
                        dedicated: claim.dedicated,
                        thread: at != cpu,
                    });
                }
            }
        }
        Ok(wanted.cores.iter().copied().cycle().take(wanted.vcpus).collect())
    }
}
