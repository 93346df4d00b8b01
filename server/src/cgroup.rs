//! A cgroup for each worker process, below the daemon's own: in the unified hierarchy (v2) and, where they are mounted
//! as v1, in those of the memory and pids controllers. [`controllers`] hands down those of the unified one.
//!
//! Invariants: a directory is written down in the worker's runtime directory before it is made, so that whoever clears
//! that removes it, also after a crash; a host on which no hierarchy can be written runs workers without, and says so
//! once. Names carry the store's id: daemons do not touch each other's.
//!
//! Moving a process costs the kernel a grace period (5 to 20 ms measured), so it is done beside the worker's start and
//! nothing waits for it. What a worker allocated before is charged to the daemon's cgroup.

pub mod controllers;

use std::collections::HashSet;
use std::io;
use std::path::{Path, PathBuf};

use controllers::Controllers;

/// Threads of one worker: 256 vCPUs, 64 blocking helpers, migration and runtime threads.
const MAX_THREADS: u32 = 1024;
/// File in a runtime directory that lists the cgroup directories.
const FILE: &str = "cgroup";
/// The unified hierarchy.
const V2: &str = "v2";
/// v1 controllers in which a worker gets a cgroup.
const V1: [&str; 2] = ["memory", "pids"];

/// One hierarchy that can be written.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Hierarchy {
    /// "v2" or the v1 controller.
    label: String,
    /// The cgroup that the workers' lie in: the daemon's own, or the one around the daemon's leaf.
    parent: PathBuf,
    /// v2: what the workers' have.
    controllers: Vec<String>,
}

impl Hierarchy {
    /// Whether a cgroup in it can limit that.
    fn limits(&self, controller: &str) -> bool {
        self.label == controller || self.controllers.iter().any(|have| have == controller)
    }
}

/// Where this host's workers get their cgroups.
#[derive(Debug, Default)]
pub struct Cgroups {
    prefix: String,
    hierarchies: Vec<Hierarchy>,
}

impl Cgroups {
    /// Looks for what can be written, and removes what an earlier daemon of the same store left and no runtime directory
    /// lists any more. Says once if there is nothing.
    pub fn discover(store_id: &str, run_dir: &Path, mode: Controllers) -> Self {
        let prefix = format!("vpmud-{}-", store_id.get(..8).unwrap_or(store_id));
        let mut refused = Vec::new();
        let mut hierarchies = own_hierarchies();
        hierarchies.retain(|h| {
            let probe = h.parent.join(format!("{prefix}probe-{}", std::process::id()));
            match std::fs::create_dir(&probe).and_then(|()| std::fs::remove_dir(&probe)) {
                Ok(()) => true,
                Err(error) => {
                    refused.push(format!("{}: {error}", h.parent.display()));
                    false
                }
            }
        });
        if hierarchies.is_empty() {
            tracing::warn!(
                ?refused,
                "workers get no cgroup of their own: none can be made here; under systemd set Delegate=yes"
            );
        }
        let v1: Vec<_> = hierarchies.iter().map(|h| h.label.clone()).filter(|label| label != V2).collect();
        let v1: Vec<_> = v1.iter().map(String::as_str).collect();
        if let Some(unified) = hierarchies.iter_mut().find(|h| h.label == V2) {
            unified.controllers = controllers::provide(&unified.parent, mode, &v1);
        }
        let found = Self { prefix, hierarchies };
        found.sweep(&listed(run_dir));
        found
    }

    /// For the machine's view: "v2+cpu+memory+pids", "v2,memory,pids" where the last two are v1's, or "none".
    pub fn describe(&self) -> String {
        if self.hierarchies.is_empty() {
            return "none".to_owned();
        }
        let show = |h: &Hierarchy| {
            let shown = h.controllers.iter().filter(|c| controllers::WANTED.contains(&c.as_str()));
            std::iter::once(&h.label).chain(shown).cloned().collect::<Vec<_>>().join("+")
        };
        self.hierarchies.iter().map(show).collect::<Vec<_>>().join(",")
    }

    /// Puts a process into cgroups of its own. Blocks.
    pub fn place(&self, uid: &str, pid: u32, runtime_dir: &Path) {
        if self.hierarchies.is_empty() {
            return;
        }
        let dirs: Vec<_> = self.hierarchies.iter().map(|h| (h, self.dir(h, uid))).collect();
        let list: Vec<_> = dirs.iter().map(|(_, dir)| dir.display().to_string()).collect();
        if let Err(error) = std::fs::write(runtime_dir.join(FILE), list.join("\n")) {
            // The worker has ended already and its directory with it.
            tracing::debug!(uid, %error, "no cgroup for a worker");
            return;
        }
        for (hierarchy, dir) in dirs {
            if let Err(error) = enter(hierarchy, &dir, pid) {
                tracing::warn!(uid, dir = %dir.display(), %error, "a worker stays in the daemon's cgroup");
            }
        }
    }

    fn dir(&self, hierarchy: &Hierarchy, uid: &str) -> PathBuf {
        hierarchy.parent.join(format!("{}{uid}", self.prefix))
    }

    fn sweep(&self, listed: &HashSet<PathBuf>) {
        for hierarchy in &self.hierarchies {
            for entry in std::fs::read_dir(&hierarchy.parent).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with(&self.prefix) && !listed.contains(&entry.path()) {
                    remove_dir(&entry.path());
                }
            }
        }
    }
}

fn enter(hierarchy: &Hierarchy, dir: &Path, pid: u32) -> io::Result<()> {
    match std::fs::create_dir(dir) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    if hierarchy.limits("pids") {
        // Without a bound it is still in its group.
        if let Err(error) = std::fs::write(dir.join("pids.max"), MAX_THREADS.to_string()) {
            tracing::warn!(dir = %dir.display(), %error, "a worker's threads are not bounded by its cgroup");
        }
    }
    match std::fs::write(dir.join("cgroup.procs"), pid.to_string()) {
        // It has ended.
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(()),
        other => other,
    }
}

/// What the runtime directories list. One that was a spare's is not named after the machine that it went to.
fn listed(run_dir: &Path) -> HashSet<PathBuf> {
    let dirs = std::fs::read_dir(run_dir).into_iter().flatten().flatten();
    let lists = dirs.filter_map(|dir| std::fs::read_to_string(dir.path().join(FILE)).ok());
    lists.flat_map(|list| list.lines().map(PathBuf::from).collect::<Vec<_>>()).collect()
}

/// Removes the cgroups that a runtime directory lists. The processes in them have ended.
pub fn remove(runtime_dir: &Path) {
    let list = std::fs::read_to_string(runtime_dir.join(FILE)).unwrap_or_default();
    list.lines().map(Path::new).filter(|dir| dir.is_absolute()).for_each(remove_dir);
}

fn remove_dir(dir: &Path) {
    // The kernel may need a moment after the process's end until the cgroup is empty.
    for _ in 0..20 {
        match std::fs::remove_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                std::thread::sleep(std::time::Duration::from_millis(2));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return tracing::warn!(dir = %dir.display(), %error, "a cgroup cannot be removed");
            }
            _ => return,
        }
    }
    tracing::warn!(dir = %dir.display(), "a cgroup stays: something is in it still; the next start removes it");
}

/// Those that this process is in.
fn own_hierarchies() -> Vec<Hierarchy> {
    let own = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    hierarchies(&own, &mounts)
}

/// The cgroup of a process beside the daemon's leaf, in the unified hierarchy.
fn own_unified() -> Option<PathBuf> {
    own_hierarchies().into_iter().find(|h| h.label == V2).map(|h| h.parent)
}

/// From /proc/self/cgroup and /proc/self/mountinfo (cgroups(7), proc(5)).
fn hierarchies(own: &str, mounts: &str) -> Vec<Hierarchy> {
    let mut found = Vec::new();
    for line in own.lines() {
        let mut fields = line.splitn(3, ':');
        let (Some(id), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let unified = id == "0" && controllers.is_empty();
        let labels: Vec<&str> = if unified {
            vec![V2]
        } else {
            V1.into_iter().filter(|c| controllers.split(',').any(|have| have == *c)).collect()
        };
        for label in labels {
            if let Some(parent) = mounts.lines().find_map(|mount| below(mount, unified, label, path)) {
                let parent = if unified { controllers::parent_of_workers(parent) } else { parent };
                found.push(Hierarchy { label: label.to_owned(), parent, controllers: Vec::new() });
            }
        }
    }
    found.sort_by_key(|h| h.label != V2);
    found
}

/// Where a cgroup is, if this mount shows its hierarchy.
fn below(mount: &str, unified: bool, label: &str, path: &str) -> Option<PathBuf> {
    let (mine, system) = mount.split_once(" - ")?;
    let mut mine = mine.split(' ').skip(3);
    let (root, point) = (mine.next()?, mine.next()?);
    let mut system = system.split(' ');
    let (kind, _source, options) = (system.next()?, system.next()?, system.next().unwrap_or(""));
    let shown = match (unified, kind) {
        (true, "cgroup2") => true,
        (false, "cgroup") => options.split(',').any(|o| o == label),
        _ => false,
    };
    if !shown {
        return None;
    }
    let inner = if root == "/" { path } else { path.strip_prefix(root)? };
    Some(Path::new(point).join(inner.trim_start_matches('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_versions_are_found() {
        let own = "8:pids:/\n4:memory:/a/b\n1:cpu,cpuacct:/\n0::/system.slice/vpmud.service\n";
        let mounts = "30 1 0:5 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
                      31 1 0:6 / /sys/fs/cgroup/pids rw,relatime shared:1 - cgroup cgroup rw,pids\n\
                      32 1 0:7 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
        let found = hierarchies(own, mounts);
        let shown: Vec<_> = found.iter().map(|h| (h.label.as_str(), h.parent.to_str().unwrap())).collect();
        assert_eq!(
            shown,
            [
                ("v2", "/sys/fs/cgroup/unified/system.slice/vpmud.service"),
                ("pids", "/sys/fs/cgroup/pids/"),
                ("memory", "/sys/fs/cgroup/memory/a/b"),
            ]
        );
        assert!(hierarchies("", mounts).is_empty() && hierarchies(own, "").is_empty());
    }

    #[test]
    fn a_mount_of_a_part_is_understood() {
        let mount = "30 1 0:5 /box /sys/fs/cgroup rw - cgroup2 none rw";
        assert_eq!(below(mount, true, "v2", "/box/x"), Some(PathBuf::from("/sys/fs/cgroup/x")));
        assert_eq!(below(mount, true, "v2", "/other"), None);
        assert_eq!(below(mount, false, "memory", "/box/x"), None);
    }
}
