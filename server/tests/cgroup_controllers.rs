//! Controllers of workers' cgroups, on a real unified hierarchy: the daemon in a cgroup of its own, as systemd's
//! Delegate=yes gives it one.
//!
//! Needs a cgroup2 mount whose root this user may change and that offers cpu, memory, pids or hugetlb: where v1 holds
//! those (a hybrid host), hugetlb alone is usually left, and the rules are the same for all. `VPMU_REQUIRE_CGROUP=1`
//! makes their absence a failure. What only a host with all four shows is that `pids.max` is written here; `cgroup_limits` has
//! it for v1 too.

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use support::*;
use vpmu_proto::api::virtual_machine::State;

const WANTED: [&str; 4] = ["cpu", "memory", "pids", "hugetlb"];
const OPTIONS: [&str; 2] = ["--isolation", "process"];

fn words(dir: &Path, file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(file)).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    text.split_whitespace().map(str::to_owned).collect()
}

/// A cgroup below the root that can hand down `offered`; what lived in it is ended with it.
struct Delegated {
    dir: PathBuf,
    root: PathBuf,
    offered: Vec<String>,
    added: Vec<String>,
    _alone: tokio::sync::MutexGuard<'static, ()>,
}

/// The root's settings are everybody's.
static ROOT: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

impl Delegated {
    async fn new(name: &str) -> Option<Self> {
        let found = Self::make(name, ROOT.lock().await);
        if let Err(why) = &found {
            let required = std::env::var_os("VPMU_REQUIRE_CGROUP").is_some_and(|v| v == "1");
            assert!(!required, "cgroup controllers are required and not there: {why}");
            println!("skipped: no controllers of cgroup v2: {why}");
        }
        found.ok()
    }

    fn make(name: &str, alone: tokio::sync::MutexGuard<'static, ()>) -> Result<Self, String> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(|e| e.to_string())?;
        let root = mounts.lines().find(|l| l.contains(" - cgroup2 ")).and_then(|l| l.split(' ').nth(4));
        let root = PathBuf::from(root.ok_or("no cgroup2 mount")?);
        let mut offered = words(&root, "cgroup.controllers");
        // Some kernels share so wrongly between groups that nobody gets cpu there.
        let unfair = vpmu_server::sharing::kernel_is_suspect();
        offered.retain(|c| WANTED.contains(&c.as_str()) && !(unfair && c == "cpu"));
        if offered.is_empty() {
            return Err(format!("{} offers none of {WANTED:?}", root.display()));
        }
        let enabled = words(&root, "cgroup.subtree_control");
        let added: Vec<_> = offered.iter().filter(|c| !enabled.contains(c)).cloned().collect();
        for controller in &added {
            std::fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
                .map_err(|e| format!("{}: {e}", root.display()))?;
        }
        let dir = root.join(format!("{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).map_err(|e| format!("{}: {e}", dir.display()))?;
        Ok(Self { dir, root, offered, added, _alone: alone })
    }

    /// What starts a vpmud in it.
    fn starter(&self) -> Vec<String> {
        let procs = self.dir.join("cgroup.procs");
        let script = format!("echo $$ >{} && exec \"$@\"", procs.display());
        ["sh", "-c", &script, "sh"].map(str::to_owned).to_vec()
    }
}

impl Drop for Delegated {
    fn drop(&mut self) {
        drop(std::fs::write(self.dir.join("cgroup.kill"), "1"));
        let begin = Instant::now();
        while std::fs::read_to_string(self.dir.join("cgroup.events")).is_ok_and(|e| e.contains("populated 1"))
            && begin.elapsed() < DEADLINE
        {
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        for child in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            drop(std::fs::remove_dir(child.path()));
        }
        drop(std::fs::remove_dir(&self.dir));
        for controller in &self.added {
            // Another cgroup may use it by now.
            drop(std::fs::write(self.root.join("cgroup.subtree_control"), format!("-{controller}")));
        }
    }
}

/// The unified cgroup of a process.
fn cgroup_of(pid: u32) -> String {
    let lines = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("it lives");
    lines.lines().find_map(|l| l.strip_prefix("0::")).expect("a unified hierarchy").to_owned()
}

/// Waits until the worker is in its own, and returns that.
async fn worker_cgroup(delegated: &Delegated, pid: u32, uid: &str) -> PathBuf {
    let begin = Instant::now();
    while !cgroup_of(pid).ends_with(uid) {
        assert!(begin.elapsed() < DEADLINE, "it stays in {}", cgroup_of(pid));
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    delegated.dir.join(cgroup_of(pid).rsplit('/').next().expect("a name"))
}

#[tokio::test]
async fn workers_get_the_controllers_that_the_daemons_cgroup_can_hand_down() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(delegated) = Delegated::new("controllers").await else { return };
    let mut host = Host::start_under(dir.path(), &delegated.starter(), &OPTIONS).await;
    let daemon = host.child.id().expect("running");
    assert!(cgroup_of(daemon).ends_with("-controllers/vpmud-daemon"), "{}", cgroup_of(daemon));
    assert_eq!(words(&delegated.dir, "cgroup.subtree_control"), delegated.offered);
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    let own = worker_cgroup(&delegated, vm.worker_pid, &vm.uid).await;
    assert_eq!(words(&own, "cgroup.controllers"), delegated.offered);
    assert_eq!(words(&own, "cgroup.procs"), [vm.worker_pid.to_string()]);
    let label = format!("cgroup=v2+{}", delegated.offered.join("+"));
    assert!(vm.sandbox.contains(&label), "{} is not in {}", label, vm.sandbox);
    if delegated.offered.iter().any(|c| c == "pids") {
        assert_eq!(words(&own, "pids.max"), ["1024"]);
    }

    // The daemon dies. Beside a worker the kernel lets nobody into the cgroup again until its controllers are taken back.
    host.kill().await;
    let options: Vec<String> = OPTIONS.iter().map(ToString::to_string).collect();
    let (code, _) = spawn_under(dir.path(), &delegated.starter(), &options).await.expect_err("EBUSY");
    assert_ne!(code, Some(0));
    let released = std::process::Command::new(env!("CARGO_BIN_EXE_vpmud"))
        .args(["host", "release-cgroup", "--cgroup"])
        .arg(&delegated.dir)
        .output()
        .expect("runs");
    assert!(released.status.success(), "{released:?}");
    assert!(String::from_utf8_lossy(&released.stdout).contains(&delegated.offered.join(" ")), "{released:?}");
    assert!(words(&delegated.dir, "cgroup.subtree_control").is_empty());
    host.restart().await;
    let again = host.until("a", "RUNNING", is(State::Running)).await;
    assert_eq!(again.worker_pid, vm.worker_pid, "the same worker");
    assert_eq!(words(&own, "cgroup.controllers"), delegated.offered, "and its controllers are back");

    // The whole cgroup of a worker is ended, as an operator may: its machine fails, and the cgroup goes.
    std::fs::write(own.join("cgroup.kill"), "1").expect("killed");
    let failed = host.until("a", "FAILED", is(State::Failed)).await;
    assert_eq!((failed.reason.as_str(), failed.worker_pid), ("WORKER_DIED", 0), "{failed:?}");
    assert!(!own.exists(), "{} is left", own.display());
    assert_eq!(host.terminate().await, 0);
}

/// A second process in the cgroup, as a shell's: nothing is moved, and the machine runs with a cgroup without controllers.
#[tokio::test]
async fn a_cgroup_that_the_daemon_shares_is_left_as_it_is() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(delegated) = Delegated::new("shared").await else { return };
    let mut other = std::process::Command::new("sleep").arg("600").spawn().expect("sleeps");
    std::fs::write(delegated.dir.join("cgroup.procs"), other.id().to_string()).expect("moved");
    let mut host = Host::start_under(dir.path(), &delegated.starter(), &OPTIONS).await;
    assert!(cgroup_of(host.child.id().expect("running")).ends_with("-shared"));
    assert!(words(&delegated.dir, "cgroup.subtree_control").is_empty());
    let why = format!("other processes are in it ({})", other.id());
    host.until_logged(&why, 1).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    let log = std::fs::read_to_string(dir.path().join("log")).expect("log");
    assert_eq!(log.matches(&why).count(), 1, "said once: {log}");
    let own = worker_cgroup(&delegated, vm.worker_pid, &vm.uid).await;
    assert!(words(&own, "cgroup.controllers").is_empty());
    host.delete("a").await;
    assert!(!own.exists(), "{} is left", own.display());
    assert_eq!(host.terminate().await, 0);
    other.kill().expect("killed");
    other.wait().expect("reaped");
}

/// systemd could not start its unit again beside a worker: only the unit itself can ask for it.
#[tokio::test]
async fn a_units_cgroup_gets_controllers_only_if_the_unit_asks() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(delegated) = Delegated::new("vpmud.service").await else { return };
    let mut host = Host::start_under(dir.path(), &delegated.starter(), &OPTIONS).await;
    assert!(words(&delegated.dir, "cgroup.subtree_control").is_empty());
    let log = host.until_logged("give --cgroup-controllers on", 1).await;
    assert_eq!(log.matches("give --cgroup-controllers on").count(), 1, "{log}");
    assert_eq!(host.terminate().await, 0);
    let on = [&OPTIONS[..], &["--cgroup-controllers", "on"]].concat();
    host.restart_with(&on).await;
    assert!(cgroup_of(host.child.id().expect("running")).ends_with("vpmud.service/vpmud-daemon"));
    assert_eq!(words(&delegated.dir, "cgroup.subtree_control"), delegated.offered);
    // As systemd runs an ExecStopPost= of a unit that is delegated.
    assert_eq!(host.terminate().await, 0);
    let old = delegated.dir.join("daemon");
    std::fs::create_dir(&old).expect("an earlier version's");
    let control = delegated.dir.join(".control");
    std::fs::create_dir(&control).expect("made");
    let script = format!("echo $$ >{}/cgroup.procs && exec \"$@\"", control.display());
    let released = std::process::Command::new("sh")
        .args(["-c", &script, "sh", env!("CARGO_BIN_EXE_vpmud"), "host", "release-cgroup"])
        .output()
        .expect("runs");
    assert!(released.status.success(), "{released:?}");
    assert!(words(&delegated.dir, "cgroup.subtree_control").is_empty());
    assert!(!old.exists() && !delegated.dir.join("vpmud-daemon").exists(), "a leaf is left");
}
