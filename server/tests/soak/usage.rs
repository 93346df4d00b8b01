//! What a host holds: of the system, as /proc and the file system show it, and of its disk.

use std::fmt;
use std::path::Path;

use crate::support::{Host, load};

/// One look at one host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Anonymous memory of the daemon, KiB.
    pub anonymous_kib: u64,
    /// Shared memory (memfd, tmpfs) that the daemon maps, KiB.
    pub shmem_kib: u64,
    /// Open descriptors of the daemon.
    pub descriptors: u64,
    /// Its threads.
    pub threads: u64,
    /// Its mappings.
    pub mappings: u64,
    /// Its children, zombies too.
    pub children: u64,
    /// Worker processes, wherever they come from.
    pub workers: u64,
    /// Runtime directories.
    pub runtime_dirs: u64,
    /// Sockets that workers' runtime directories name elsewhere, and all else in the state directory.
    pub other_files: u64,
    /// cgroups of this store's workers in all hierarchies.
    pub cgroups: u64,
    /// Disk that the database takes, bytes.
    pub sled_bytes: u64,
    /// Disk that the ownership journal takes, bytes.
    pub journal_bytes: u64,
}

impl Usage {
    pub fn of(host: &Host) -> Self {
        let pid = host.child.id().expect("running");
        let proc = format!("/proc/{pid}");
        let status = std::fs::read_to_string(format!("{proc}/status")).expect("a process of ours");
        let field = |name: &str| -> u64 {
            let line = status.lines().find_map(|line| line.strip_prefix(name)).expect("a known field");
            line.split_whitespace().next().and_then(|n| n.parse().ok()).expect("a number")
        };
        let state = host.dir.join("state");
        let run_dir = state.join("run");
        let prefix = format!("vpmud-{}-", &host.ready["host_id"].as_str().expect("an id")[..8]);
        Self {
            anonymous_kib: field("RssAnon:"),
            shmem_kib: field("RssShmem:"),
            descriptors: entries(Path::new(&format!("{proc}/fd"))),
            threads: field("Threads:"),
            mappings: std::fs::read_to_string(format!("{proc}/maps")).expect("maps").lines().count() as u64,
            children: children(pid),
            workers: load::workers(&host.dir).len() as u64,
            runtime_dirs: entries(&run_dir),
            other_files: files(&state, &["sled", "journal", "run", "snapshots"]),
            cgroups: cgroups(Path::new("/sys/fs/cgroup"), &prefix, 6),
            sled_bytes: bytes(&state.join("sled")),
            journal_bytes: bytes(&state.join("journal")),
        }
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:.1} MiB anon, {:.1} MiB shmem, {} fds, {} threads, {} mappings, {} children, {} workers, {} runtime dirs, \
             {} cgroups, {} other files, sled {:.2} MiB, journal {:.2} MiB",
            mib(self.anonymous_kib << 10),
            mib(self.shmem_kib << 10),
            self.descriptors,
            self.threads,
            self.mappings,
            self.children,
            self.workers,
            self.runtime_dirs,
            self.cgroups,
            self.other_files,
            mib(self.sled_bytes),
            mib(self.journal_bytes),
        )
    }
}

#[expect(clippy::cast_precision_loss, reason = "shown with two digits")]
fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

fn entries(dir: &Path) -> u64 {
    std::fs::read_dir(dir).map_or(0, |entries| entries.count() as u64)
}

/// Everything below a directory but what these entries of it hold.
fn files(dir: &Path, without: &[&str]) -> u64 {
    let mut count = 0;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if !without.iter().any(|name| entry.file_name() == *name) {
            count += 1 + files(&entry.path(), &[]);
        }
    }
    count
}

/// What the files below a directory take on disk: what was written down, not their lengths.
fn bytes(dir: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    let mut sum = 0;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        // It may have been replaced meanwhile.
        let Ok(metadata) = entry.metadata() else { continue };
        sum += if metadata.is_dir() { bytes(&entry.path()) } else { metadata.blocks() * 512 };
    }
    sum
}

fn children(parent: u32) -> u64 {
    let mut count = 0;
    for entry in std::fs::read_dir("/proc").expect("proc").flatten() {
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // The name is in parentheses and may hold anything; state and parent follow the last one (proc(5)).
        let after = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        count += u64::from(after.split_whitespace().nth(1).and_then(|p| p.parse().ok()) == Some(parent));
    }
    count
}

fn cgroups(dir: &Path, prefix: &str, depth: u32) -> u64 {
    let mut count = 0;
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        // Links between controllers would count twice.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            count += u64::from(entry.file_name().to_string_lossy().starts_with(prefix));
            if depth > 0 {
                count += cgroups(&entry.path(), prefix, depth - 1);
            }
        }
    }
    count
}
