//! A guest's memory, held open from outside: it can be read whatever becomes of the worker that made it.

use std::path::PathBuf;

use vcpu_worker::memory::GuestMemory;
use vcpu_worker::process::Identity;

use super::{Host, MEMORY, World};

/// A guest's memory that stays open whatever becomes of its worker.
pub(super) struct Copy(pub(super) GuestMemory);

impl Copy {
    pub(super) fn of(world: &World, host: &Host, worker: Option<&Identity>) -> Self {
        let pid = worker.map_or_else(|| host.child.id().expect("running"), |w| w.pid);
        let found = Self::all(pid);
        assert_eq!(found.len(), 1, "process {pid} holds one guest's memory ({})", world.dir.display());
        found.into_iter().next().expect("one")
    }

    /// Every guest memory that a process holds.
    pub(super) fn all(pid: u32) -> Vec<Self> {
        let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a process of ours").flatten();
        let memory = |path: PathBuf| -> Option<Self> {
            let name = std::fs::read_link(&path).ok()?;
            if !name.to_string_lossy().starts_with("/memfd:") {
                return None;
            }
            let file = std::fs::File::options().read(true).write(true).open(&path).ok()?;
            GuestMemory::from_fd(file.into(), MEMORY << 20).ok().map(Self)
        };
        entries.filter_map(|e| memory(e.path())).collect()
    }

    pub(super) fn loops(&self) -> u64 {
        vcpu_worker::probe::report(&self.0, 0).expect("a report").loops
    }
}
