//! Which of the free cores are taken.
//!
//! Packed: the last-level cache that has just enough, else the NUMA node that has just enough, else the nodes that have
//! most. Spread: a core at a time, each from the node, and there from the cache, that has most left. Isolated cores
//! first, if they are enough. Ties go to the lower number.

use std::collections::BTreeMap;

/// A free core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Free {
    /// The CPU that the vCPU would get.
    pub cpu: u32,
    /// NUMA node.
    pub node: u32,
    /// Last-level cache.
    pub cache: u32,
    /// Isolated from the scheduler.
    pub isolated: bool,
}

/// The free cores in groups, each ascending.
type Groups = BTreeMap<u32, Vec<Free>>;

fn group(free: &[Free], of: fn(&Free) -> u32) -> Groups {
    let mut groups = Groups::new();
    for core in free {
        groups.entry(of(core)).or_default().push(*core);
    }
    groups
}

/// The smallest group with at least `n`.
fn just_enough(groups: &Groups, n: usize) -> Option<&Vec<Free>> {
    groups.values().filter(|g| g.len() >= n).min_by_key(|g| g.len())
}

/// The node whose cores are taken where all must be on one.
pub(super) fn node(free: &[Free], n: usize, spread: bool) -> Option<Vec<Free>> {
    let groups = group(free, |core| core.node);
    if spread {
        // The first of the largest: `max_by_key` would take the last.
        let most = groups.values().map(Vec::len).max().filter(|most| *most >= n)?;
        return groups.values().find(|g| g.len() == most).cloned();
    }
    just_enough(&groups, n).cloned()
}

/// `n` CPUs out of `free`, which has at least that many.
pub(super) fn cores(free: &[Free], n: usize, spread: bool) -> Vec<u32> {
    let isolated: Vec<Free> = free.iter().copied().filter(|core| core.isolated).collect();
    let free = if isolated.len() >= n { &isolated } else { free };
    let chosen = if spread { spread_out(free, n) } else { packed(free, n) };
    chosen.iter().map(|core| core.cpu).collect()
}

fn packed(free: &[Free], n: usize) -> Vec<Free> {
    let caches = group(free, |core| core.cache);
    if let Some(cache) = just_enough(&caches, n) {
        return cache[..n].to_vec();
    }
    let nodes = group(free, |core| core.node);
    if let Some(node) = just_enough(&nodes, n) {
        return fill(node, n, |core| core.cache);
    }
    let mut chosen = Vec::with_capacity(n);
    for node in largest_first(&nodes) {
        chosen.extend(fill(node, n - chosen.len(), |core| core.cache));
    }
    chosen
}

/// The first `n` of `from`, largest groups first.
fn fill(from: &[Free], n: usize, of: fn(&Free) -> u32) -> Vec<Free> {
    let groups = group(from, of);
    largest_first(&groups).into_iter().flatten().copied().take(n).collect()
}

fn largest_first(groups: &Groups) -> Vec<&Vec<Free>> {
    let mut sorted: Vec<_> = groups.values().collect();
    sorted.sort_by_key(|g| std::cmp::Reverse(g.len()));
    sorted
}

fn spread_out(free: &[Free], n: usize) -> Vec<Free> {
    let mut left = free.to_vec();
    let mut taken: BTreeMap<(u32, u32), usize> = BTreeMap::new();
    let mut chosen = Vec::with_capacity(n);
    for _ in 0..n {
        let on = |node: u32, cache: Option<u32>| -> usize {
            let here = taken.iter().filter(|((n, c), _)| *n == node && cache.is_none_or(|cache| cache == *c));
            here.map(|(_, count)| count).sum()
        };
        let room = |of: fn(&Free) -> u32, value: u32| left.iter().filter(|core| of(core) == value).count();
        // Fewest of ours first, then most room.
        let best = left.iter().enumerate().min_by_key(|(_, core)| {
            (
                on(core.node, None),
                std::cmp::Reverse(room(|c| c.node, core.node)),
                on(core.node, Some(core.cache)),
                std::cmp::Reverse(room(|c| c.cache, core.cache)),
                core.node,
                core.cpu,
            )
        });
        let Some((at, _)) = best else { break };
        let core = left.remove(at);
        *taken.entry((core.node, core.cache)).or_default() += 1;
        chosen.push(core);
    }
    chosen
}
