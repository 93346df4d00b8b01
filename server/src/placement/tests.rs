//! Properties of the allocator on machines of all shapes, and what it says on some that were recorded.

use std::collections::BTreeSet;

use proptest::prelude::*;
use vcpu_worker::host::Topology;
use vcpu_worker::host::topology::Cpu;

use super::*;

fn wanted(vcpus: usize) -> Wanted {
    Wanted { vcpus, dedicated: true, spread: false, numa_local: false, cores: Vec::new() }
}

fn shared(vcpus: usize) -> Wanted {
    Wanted { dedicated: false, ..wanted(vcpus) }
}

/// Nodes of caches of cores of threads, numbered as Linux does: first threads of all cores, then second ones.
fn machine(nodes: u32, caches: u32, cores: u32, threads: u32) -> Topology {
    let per_node = caches * cores;
    let total = nodes * per_node;
    let cpu = |id: u32| {
        let core = id % total;
        Cpu {
            id,
            package: core / per_node,
            node: core / per_node,
            core,
            cache: core / cores * cores,
            isolated: false,
            nohz: false,
        }
    };
    Topology::of((0..total * threads).map(cpu), [])
}

/// All CPUs usable by vCPUs and by the daemon.
fn allocator(topology: Topology) -> Allocator {
    let all: Vec<u32> = topology.cpus().map(|c| c.id).collect();
    Allocator::new(topology, &all, &all)
}

fn recorded(name: &str) -> Topology {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join(format!("../vcpu-worker/tests/data/topology/{name}.txt"));
    let root = tempfile::tempdir().expect("tempdir");
    for line in std::fs::read_to_string(&file).expect("a record").lines().filter(|l| !l.starts_with('#')) {
        let (path, value) = line.split_once(' ').unwrap_or((line, ""));
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
        std::fs::write(path, value).expect("file");
    }
    Topology::read(root.path())
}

#[test]
fn packed_takes_the_cache_that_fits_best_and_spread_the_emptiest() {
    let mut ccx = allocator(recorded("amd-ccx"));
    // One core is left to the host, so the first cache has three to give.
    let (_, three) = ccx.grant("a", &wanted(3)).expect("fits");
    assert_eq!(three.cpus, [1, 2, 3]);
    let (_, two) = ccx.grant("b", &wanted(2)).expect("fits");
    assert_eq!(two.cpus, [4, 5], "the next cache");
    let (_, two) = ccx.grant("c", &wanted(2)).expect("fits");
    assert_eq!(two.cpus, [6, 7], "the rest of that one rather than a fresh one");
    let (_, five) = ccx.grant("d", &wanted(5)).expect("fits");
    assert_eq!(five.cpus, [8, 9, 10, 11, 12], "no cache has five: the largest, then the next");

    let mut spread = allocator(recorded("amd-ccx"));
    let (_, four) = spread.grant("a", &Wanted { spread: true, ..wanted(4) }).expect("fits");
    assert_eq!(four.cpus.iter().map(|cpu| cpu / 4).collect::<BTreeSet<_>>().len(), 4, "{four:?}");
    let mut sockets = allocator(recorded("intel-2-sockets"));
    let (_, two) = sockets.grant("a", &Wanted { spread: true, ..wanted(2) }).expect("fits");
    assert_eq!(two.cpus, [8, 1], "one a socket, the fuller one first");
}

#[test]
fn a_dedicated_core_takes_its_siblings_and_the_host_keeps_off() {
    let mut host = allocator(recorded("smt-2-sockets-isolated"));
    let (id, granted) = host.grant("a", &wanted(2)).expect("fits");
    assert_eq!(granted.cpus, [2, 3], "isolated cores first");
    assert_eq!(host.dedicated().into_iter().collect::<Vec<_>>(), [2, 3, 10, 11]);
    assert!(host.housekeeping().iter().all(|cpu| ![2, 3, 10, 11].contains(cpu)));
    assert_eq!(host.use_of(10), (Some("a"), 0));
    assert_eq!(host.use_of(2), (Some("a"), 1));
    let sibling = Wanted { cores: vec![11], ..shared(1) };
    let refusal = host.grant("b", &sibling).expect_err("a sibling");
    assert_eq!(
        refusal.to_string(),
        "core 11 is a thread of a core that is dedicated to machine a; choose another, or stop or move that machine"
    );
    host.free(id);
    assert_eq!(host.grant("b", &sibling).expect("free again").1.cpus, [11]);
}

#[test]
fn numa_local_is_one_node_and_binds_memory() {
    let mut host = allocator(recorded("amd-4-sockets-8-nodes"));
    let local = Wanted { numa_local: true, ..wanted(4) };
    let (_, granted) = host.grant("a", &local).expect("fits");
    // Compute units have two threads each: eight CPUs, four cores a node; node 0 has three to give.
    assert_eq!((granted.cpus, granted.memory_nodes), (vec![8, 10, 12, 14], vec![1]));
    let five = Wanted { numa_local: true, ..wanted(5) };
    assert_eq!(
        host.check(&five).expect_err("no node has five"),
        Refusal::Node { vcpus: 5, node: 2, free: 4, total: 27 }
    );
    let span = Wanted { numa_local: true, cores: vec![16, 24], ..wanted(2) };
    assert_eq!(host.check(&span).expect_err("two nodes"), Refusal::SpansNodes { cpu: 24, node: 3, first: 2 });
    let one = allocator(machine(1, 1, 4, 1)).check(&Wanted { numa_local: true, ..wanted(2) }).expect("fits");
    assert_eq!(one.memory_nodes, Vec::<u32>::new(), "one node: local by itself");
}

#[test]
fn refusals_name_what_is_short() {
    let mut two = allocator(Topology::plain(2));
    two.grant("web", &shared(1)).expect("fits");
    assert_eq!(
        two.check(&wanted(2)).expect_err("short"),
        Refusal::Cores { vcpus: 2, free: 1, usable: 2, dedicated: 0, shared: 1 }
    );
    two.grant("db", &wanted(1)).expect("the other");
    assert_eq!(
        two.check(&wanted(1)).expect_err("none"),
        Refusal::Cores { vcpus: 1, free: 0, usable: 2, dedicated: 1, shared: 1 }
    );
    assert_eq!(
        two.check(&Wanted { cores: vec![0], ..wanted(1) }).expect_err("in use"),
        Refusal::Taken { cpu: 0, owner: "web".to_owned(), dedicated: false, thread: false }
    );
    assert_eq!(two.check(&shared(3)).expect("the shared one").cpus, [0, 0, 0]);
    let all = Wanted { cores: vec![0, 1], ..wanted(2) };
    let refusal = allocator(Topology::plain(2)).check(&all).expect_err("nothing for the host");
    assert_eq!(refusal, Refusal::Host { vcpus: 2, most: 1, own: "0-1".to_owned() });
    let mut adopted = allocator(Topology::plain(2));
    adopted.adopt("a", &[0, 1], true);
    assert_eq!(adopted.check(&shared(1)).expect_err("none"), Refusal::NoneShared { usable: 2 });
}

#[test]
fn lists_are_examined_before_anything() {
    let topology = recorded("offline-first-node");
    let usable: Vec<u32> = (4..=18).collect();
    let host = Allocator::new(topology, &usable, &[4, 5, 20]);
    let reason = |cores: &[u32], dedicated: bool, vcpus| {
        let list = Wanted { cores: cores.to_vec(), dedicated, ..wanted(vcpus) };
        host.check(&list).map_or_else(|r| r.reason(), |_| "granted")
    };
    assert_eq!(reason(&[0], true, 1), "CORE_OFFLINE");
    assert_eq!(reason(&[999], true, 1), "CORE_UNKNOWN");
    assert_eq!(reason(&[20], true, 1), "CORE_NOT_USABLE");
    assert_eq!(reason(&[4, 5, 4], false, 3), "CORES_OVERLAP");
    assert_eq!(reason(&[4, 5], true, 3), "CORES_COUNT");
    assert_eq!(reason(&[4, 5], false, 1), "CORES_COUNT");
    assert_eq!(reason(&[4, 5], false, 3), "granted");
    assert_eq!(reason(&[6, 7], true, 2), "granted");
    let smt = allocator(machine(1, 1, 4, 2));
    let pair = Wanted { cores: vec![1, 5], ..wanted(2) };
    assert_eq!(smt.check(&pair).expect_err("one core"), Refusal::Siblings { cpu: 5, sibling: 1 });
    assert_eq!(smt.check(&Wanted { dedicated: false, ..pair }).expect("shared").cpus, [1, 5]);
}

#[test]
fn a_move_holds_both_places_until_it_is_settled() {
    let mut host = allocator(Topology::plain(4));
    let (a, first) = host.grant("a", &wanted(1)).expect("fits");
    assert_eq!(first.cpus, [1]);
    let to = |cpu| Wanted { cores: vec![cpu], ..wanted(1) };
    assert_eq!(host.begin_move(a, &to(2)).expect("free").cpus, [2]);
    for cpu in [1, 2] {
        assert_eq!(host.check(&to(cpu)).expect_err("held").reason(), "CORE_TAKEN");
    }
    host.settle(a, false);
    assert!(host.check(&to(1)).is_err() && host.check(&to(2)).is_ok(), "back");
    host.begin_move(a, &to(2)).expect("free");
    host.settle(a, true);
    assert!(host.check(&to(1)).is_ok() && host.check(&to(2)).is_err(), "moved");
    // Onto its own core, and from dedicated to shared on it.
    host.begin_move(a, &Wanted { cores: vec![2], ..shared(1) }).expect("its own");
    host.settle(a, true);
    assert_eq!(host.dedicated(), BTreeSet::new());
}

/// One step of a random history.
#[derive(Debug, Clone)]
enum Step {
    Grant(Wanted),
    Free(usize),
    Move(usize, Wanted, bool),
}

fn wants() -> impl Strategy<Value = Wanted> {
    (1usize..6, any::<bool>(), any::<bool>(), any::<bool>(), proptest::collection::vec(0u32..40, 0..4))
        .prop_map(|(vcpus, dedicated, spread, numa_local, cores)| Wanted {
            vcpus,
            dedicated,
            spread,
            numa_local,
            cores,
        })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => wants().prop_map(Step::Grant),
        1 => (0usize..8).prop_map(Step::Free),
        2 => ((0usize..8), wants(), any::<bool>()).prop_map(|(at, wanted, ends)| Step::Move(at, wanted, ends)),
    ];
    proptest::collection::vec(step, 1..30)
}

fn machines() -> impl Strategy<Value = Topology> {
    (1u32..4, 1u32..3, 1u32..5, 1u32..3)
        .prop_map(|(nodes, caches, cores, threads)| machine(nodes, caches, cores, threads))
}

/// What the allocator promises of everything that is held, whatever it remembers itself.
fn check(topology: &Topology, held: &[(GrantId, Wanted, Granted)], host: &Allocator) {
    let core = |cpu: u32| topology.cpu(cpu).expect("online").core;
    for (at, (id, wanted, granted)) in held.iter().enumerate() {
        assert_eq!(granted.cpus.len(), wanted.vcpus);
        if wanted.dedicated {
            let cores: BTreeSet<u32> = granted.cpus.iter().map(|cpu| core(*cpu)).collect();
            assert_eq!(cores.len(), wanted.vcpus, "a whole core each");
            for (_, (_, _, other)) in held.iter().enumerate().filter(|(other, _)| *other != at) {
                assert!(
                    other.cpus.iter().all(|cpu| !cores.contains(&core(*cpu))),
                    "{id:?} has {cores:?} for itself"
                );
            }
        }
        let nodes: BTreeSet<u32> =
            granted.cpus.iter().map(|cpu| topology.cpu(*cpu).expect("online").node).collect();
        assert!(!wanted.numa_local || nodes.len() == 1, "{granted:?}");
        let binds = wanted.numa_local && topology.nodes().len() > 1;
        assert_eq!(granted.memory_nodes, if binds { nodes.into_iter().collect() } else { Vec::new() });
    }
    assert!(!host.housekeeping().is_empty(), "the host keeps a core");
}

proptest! {
    /// Whatever is asked in whatever order: no core twice, everything freed, refusals true, answers repeatable.
    #[test]
    fn no_core_is_granted_twice_and_everything_comes_back(topology in machines(), steps in steps()) {
        let mut host = allocator(topology.clone());
        let fresh: Vec<_> = topology.cpus().map(|c| host.use_of(c.id).1).collect();
        let mut twin = host.clone();
        let mut held: Vec<(GrantId, Wanted, Granted)> = Vec::new();
        for step in steps {
            match step {
                Step::Grant(wanted) => {
                    let answer = host.grant("m", &wanted);
                    prop_assert_eq!(&answer, &twin.grant("m", &wanted));
                    match answer {
                        Ok((id, granted)) => held.push((id, wanted, granted)),
                        Err(refusal) => is_true(&refusal, &topology, &held, &wanted),
                    }
                }
                Step::Free(at) if at < held.len() => {
                    let (id, ..) = held.remove(at);
                    host.free(id);
                    twin.free(id);
                }
                Step::Move(at, wanted, ends) if at < held.len() => {
                    let id = held[at].0;
                    let answer = host.begin_move(id, &wanted);
                    prop_assert_eq!(&answer, &twin.begin_move(id, &wanted));
                    if let Ok(granted) = answer {
                        // Both places are held: nobody else gets either.
                        let both: BTreeSet<u32> = held[at].2.cpus.iter().chain(&granted.cpus).copied().collect();
                        if let Ok(other) = host.check(&Wanted { vcpus: 1, dedicated: true, cores: vec![], ..wanted.clone() }) {
                            prop_assert!(other.cpus.iter().all(|cpu| !both.contains(cpu)));
                        }
                        if ends {
                            (held[at].1, held[at].2) = (wanted, granted);
                        }
                    }
                    host.settle(id, ends);
                    twin.settle(id, ends);
                }
                Step::Free(_) | Step::Move(..) => {}
            }
            check(&topology, &held, &host);
        }
        for (id, ..) in held {
            host.free(id);
        }
        prop_assert_eq!(topology.cpus().map(|c| host.use_of(c.id).1).collect::<Vec<_>>(), fresh);
        prop_assert_eq!(host.dedicated(), BTreeSet::new());
        let cores: BTreeSet<u32> = topology.cpus().map(|c| c.core).collect();
        prop_assert_eq!(host.check(&wanted(cores.len() - 1)).map_or(0, |g| g.cpus.len()), cores.len() - 1);
    }
}

/// A refusal says what another count of the same facts says.
fn is_true(refusal: &Refusal, topology: &Topology, held: &[(GrantId, Wanted, Granted)], wanted: &Wanted) {
    let core = |cpu: u32| topology.cpu(cpu).map(|c| c.core);
    let used: BTreeSet<u32> =
        held.iter().flat_map(|(_, _, g)| &g.cpus).filter_map(|cpu| core(*cpu)).collect();
    let dedicated: BTreeSet<u32> = held
        .iter()
        .filter(|(_, w, _)| w.dedicated)
        .flat_map(|(_, _, g)| &g.cpus)
        .filter_map(|cpu| core(*cpu))
        .collect();
    let cores: BTreeSet<u32> = topology.cpus().map(|c| c.core).collect();
    let unused = cores.difference(&used).count();
    // The host keeps a core; one that carries shared vCPUs serves as well.
    let kept = usize::from(used.difference(&dedicated).next().is_none());
    match refusal {
        Refusal::Cores { vcpus, free, usable, dedicated: d, shared } => {
            assert!(*free < *vcpus && *vcpus == wanted.vcpus);
            assert_eq!((*free, *usable), (unused.saturating_sub(kept), cores.len()));
            assert_eq!((*d, *shared), (dedicated.len(), used.difference(&dedicated).count()));
        }
        Refusal::Node { vcpus, free, total, .. } => {
            assert!(*free < *vcpus && *vcpus <= *total && wanted.numa_local);
        }
        Refusal::Host { vcpus, most, .. } => assert!(*vcpus > *most && !wanted.cores.is_empty()),
        Refusal::NoneShared { .. } => assert_eq!(dedicated.len(), cores.len()),
        Refusal::Taken { cpu, .. } => assert!(core(*cpu).is_some_and(|c| used.contains(&c))),
        Refusal::Unknown { cpu, .. } => assert!(topology.cpu(*cpu).is_none()),
        Refusal::Twice { cpu } => assert!(wanted.cores.iter().filter(|c| *c == cpu).count() > 1),
        Refusal::Siblings { cpu, sibling } => assert_eq!(core(*cpu), core(*sibling)),
        Refusal::Count { given, vcpus, .. } => assert_ne!(given, vcpus),
        Refusal::SpansNodes { node, first, .. } => assert_ne!(node, first),
        other => panic!("all CPUs are online and usable: {other:?}"),
    }
}
