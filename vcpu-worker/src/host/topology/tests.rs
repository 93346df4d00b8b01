//! Trees of other machines, laid out as files again and read as the running kernel's are.

use super::*;

/// `tests/data/topology/<name>.txt` holds `path value` lines.
fn tree(name: &str) -> Topology {
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/topology/{name}.txt"));
    let text = std::fs::read_to_string(&file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
    let root = tempfile::tempdir().expect("tempdir");
    for line in text.lines().filter(|l| !l.starts_with('#')) {
        let (path, value) = line.split_once(' ').unwrap_or((line, ""));
        let path = root.path().join(path);
        std::fs::create_dir_all(path.parent().expect("a parent")).expect("directories");
        std::fs::write(path, format!("{value}\n")).expect("file");
    }
    Topology::read(root.path())
}

fn check_invariants(topology: &Topology) {
    for cpu in topology.cpus() {
        let threads: Vec<u32> = topology.threads_of(cpu.id).collect();
        assert!(threads.contains(&cpu.id) && threads.first() == Some(&cpu.core), "{cpu:?}");
        for thread in threads {
            let thread = topology.cpu(thread).expect("online");
            assert_eq!(
                (thread.package, thread.node, thread.cache),
                (cpu.package, cpu.node, cpu.cache),
                "{cpu:?}"
            );
        }
        assert!(topology.cpu(cpu.cache).is_some() && !topology.is_offline(cpu.id));
    }
}

#[test]
fn recorded_machines_are_read_as_what_they_are() {
    for (name, summary) in [
        ("vm-2-cores", "1 package, 1 NUMA node, 1 last-level cache, 2 cores, 2 threads"),
        (
            "intel-2-sockets",
            "2 packages, 2 NUMA nodes, 2 last-level caches, 16 cores, 16 threads; offline: 16-127",
        ),
        ("intel-hybrid-1-socket", "1 package, 1 NUMA node, 1 last-level cache, 14 cores, 20 threads"),
        ("amd-4-sockets-8-nodes", "4 packages, 8 NUMA nodes, 8 last-level caches, 32 cores, 64 threads"),
        (
            "smt-2-sockets-isolated",
            "2 packages, 2 NUMA nodes, 2 last-level caches, 8 cores, 16 threads; isolated: 2-3,6-7,10-11,14-15; nohz_full: 2-3,10-11",
        ),
        ("amd-ccx", "1 package, 1 NUMA node, 4 last-level caches, 16 cores, 32 threads"),
    ] {
        let topology = tree(name);
        check_invariants(&topology);
        assert_eq!(topology.summary(), summary, "{name}");
    }
}

#[test]
fn offline_cpus_are_known_and_belong_to_nothing() {
    let topology = tree("offline-first-node");
    assert_eq!(topology.cpus().map(|c| c.id).collect::<Vec<_>>(), (4..=20).collect::<Vec<_>>());
    assert!(topology.is_offline(0) && topology.is_offline(191) && !topology.is_offline(192));
    assert!(topology.cpu(0).is_none() && topology.threads_of(0).next().is_none());
    // The record's cache lists name CPUs that went offline: a cache is named by one that is online.
    assert!(topology.cpus().all(|c| topology.cpu(c.cache).is_some()));
}

#[test]
fn siblings_are_found_whatever_their_numbers_are() {
    let far = tree("smt-2-sockets-isolated");
    assert_eq!(far.threads_of(13).collect::<Vec<_>>(), [5, 13]);
    let cpu = far.cpu(10).expect("online");
    assert_eq!((cpu.core, cpu.node, cpu.package, cpu.isolated, cpu.nohz), (2, 0, 0, true, true));
    assert_eq!(tree("amd-4-sockets-8-nodes").threads_of(9).collect::<Vec<_>>(), [8, 9]);
    let hybrid = tree("intel-hybrid-1-socket");
    let of: Vec<usize> = hybrid.cpus().map(|c| hybrid.threads_of(c.id).count()).collect();
    assert_eq!(of, [[2; 12].as_slice(), &[1; 8]].concat(), "six cores with two threads, eight with one");
    assert_eq!(tree("amd-ccx").cpu(23).expect("online").cache, 4);
}

#[test]
fn a_tree_that_says_nothing_is_the_plainest_machine() {
    let empty = tempfile::tempdir().expect("tempdir");
    let topology = Topology::read(empty.path());
    check_invariants(&topology);
    assert_eq!(topology.cpus().map(|c| c.id).collect::<Vec<_>>(), crate::host::allowed_cores());
    assert!(topology.cpus().all(|c| (c.package, c.node, c.core, c.cache) == (0, 0, c.id, c.id)));
}

#[test]
fn this_host_is_read() {
    let topology = Topology::of_this_host();
    check_invariants(&topology);
    assert!(crate::host::allowed_cores().iter().all(|cpu| topology.cpu(*cpu).is_some()));
}

#[test]
fn lists_are_shown_as_the_kernel_writes_them() {
    for list in ["0-3,8", "5", "0,2,4", "1-2"] {
        assert_eq!(show_list(&parse_list(list)), list);
    }
    assert_eq!(show_list(&[]), "");
}
