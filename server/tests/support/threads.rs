//! Where the kernel lets the threads of a process run, and how it schedules them.
#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::BTreeSet;
use std::path::PathBuf;

/// Name and allowed cores of each thread of a process.
pub fn threads(pid: u32) -> Vec<(String, BTreeSet<u32>)> {
    let field = |text: &str, key: &str| {
        text.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim().to_owned()
    };
    // None of one that has ended.
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten();
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("status")).ok())
        .map(|status| {
            let list = field(&status, "Cpus_allowed_list:");
            let cores = list.split(',').flat_map(|part| {
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                first.parse::<u32>().expect("a number")..=last.parse().expect("a number")
            });
            (field(&status, "Name:"), cores.collect())
        })
        .collect()
}

/// Whether a thread of this name runs a vCPU.
pub fn is_vcpu(name: &str) -> bool {
    name.starts_with("vm-") && name.contains('/')
}

/// Allowed cores of each vCPU thread of machine `id`, in vCPU order.
pub fn pinned(pid: u32, id: &str) -> Vec<BTreeSet<u32>> {
    let mut found = threads(pid);
    found.retain(|(name, _)| name.starts_with(&format!("vm-{id}/")));
    found.sort();
    found.into_iter().map(|(_, cores)| cores).collect()
}

/// Scheduling policy and priority of the vCPU threads of a process.
pub fn vcpu_scheduling(pid: u32) -> Vec<(u32, u32)> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).expect("threads");
    tasks
        .filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("stat")).ok())
        .filter_map(|stat| {
            let (head, rest) = stat.rsplit_once(')')?;
            if !is_vcpu(head.split_once('(')?.1) {
                return None;
            }
            // Fields 40 and 41 of proc(5); the first behind the name is field 3.
            let fields: Vec<&str> = rest.split_whitespace().collect();
            Some((fields.get(38)?.parse().ok()?, fields.get(37)?.parse().ok()?))
        })
        .collect()
}

/// A cpuset below this process's own, into which processes are put whose cores it is to take away.
pub struct Cpuset(PathBuf);

impl Cpuset {
    /// None, and it says so, where none can be made; `VPMU_REQUIRE_CGROUP=1` makes that a failure.
    pub fn new(name: &str, cores: &str) -> Option<Self> {
        let made = Self::make(name, cores);
        if let Err(why) = &made {
            let required = std::env::var_os("VPMU_REQUIRE_CGROUP").is_some_and(|v| v == "1");
            assert!(!required, "a cpuset is required and not there: {why}");
            println!("skipped: no cpuset can be made: {why}");
        }
        made.ok()
    }

    fn make(name: &str, cores: &str) -> Result<Self, String> {
        let read = |path: &str| std::fs::read_to_string(path).map_err(|e| format!("{path}: {e}"));
        let (own, mounts) = (read("/proc/self/cgroup")?, read("/proc/self/mountinfo")?);
        // Of v1, or of v2, where a cgroup has the controller if the one above hands it down.
        let v1 = mounts.lines().find(|l| {
            let (_, system) = l.split_once(" - ").unwrap_or_default();
            system.starts_with("cgroup ")
                && system.rsplit(' ').next().is_some_and(|o| o.split(',').any(|o| o == "cpuset"))
        });
        let mount = v1.or_else(|| mounts.lines().find(|l| l.contains(" - cgroup2 ")));
        let mount = mount.and_then(|l| l.split(' ').nth(4)).ok_or("no cgroup is mounted")?;
        let mut lines =
            own.lines().filter_map(|l| l.splitn(3, ':').skip(1).collect::<Vec<_>>().try_into().ok());
        let path = lines.find_map(|[controllers, path]: [&str; 2]| {
            let mine = controllers.split(',').any(|c| c == "cpuset");
            (mine || v1.is_none() && controllers.is_empty()).then_some(path)
        });
        let parent = PathBuf::from(format!("{mount}{}", path.ok_or("this process is in none")?));
        let dir = parent.join(format!("{}-{name}", std::process::id()));
        let failed = |what: &str, e: &std::io::Error| format!("{what} of {}: {e}", dir.display());
        std::fs::create_dir(&dir).map_err(|e| failed("making", &e))?;
        let made = Self(dir.clone());
        let mems = parent.join(if v1.is_some() { "cpuset.mems" } else { "cpuset.mems.effective" });
        let mems = std::fs::read_to_string(mems).map_err(|e| failed("nodes", &e))?;
        std::fs::write(dir.join("cpuset.mems"), mems).map_err(|e| failed("nodes", &e))?;
        std::fs::write(dir.join("cpuset.cpus"), cores).map_err(|e| failed("cores", &e))?;
        Ok(made)
    }

    /// Puts a process into it: its threads keep to its cores from now on.
    pub fn hold(&self, pid: u32) {
        std::fs::write(self.0.join("cgroup.procs"), pid.to_string()).expect("moved");
    }

    /// Gives it other cores.
    pub fn allow(&self, cores: &str) {
        std::fs::write(self.0.join("cpuset.cpus"), cores).expect("set");
    }

    /// Puts whoever is in it back where the test is.
    pub fn release(&self) {
        let above = self.0.parent().expect("a parent").join("cgroup.procs");
        let inside = std::fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default();
        for pid in inside.lines() {
            // One that has ended meanwhile cannot be moved.
            drop(std::fs::write(&above, pid));
        }
    }
}

impl Drop for Cpuset {
    fn drop(&mut self) {
        self.release();
        drop(std::fs::remove_dir(&self.0));
    }
}

/// Cores that tests may use; none, and it says so, where there is only one.
pub fn two_cores() -> Option<Vec<u32>> {
    let cores = vcpu_worker::host::affinity::pinnable(&vcpu_worker::host::allowed_cores());
    if cores.len() < 2 {
        println!("skipped: a host with one core has no other one");
        return None;
    }
    Some(cores)
}
