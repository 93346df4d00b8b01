//! Controllers (cpu, memory, pids, hugetlb) for the workers' cgroups in the unified hierarchy.
//!
//! A cgroup has the controllers that its parent hands down, and the kernel lets only a parent hand any down that has no
//! process of its own. So the daemon moves into a leaf, [`LEAF`], and the workers' cgroups lie beside it.
//!
//! From then on nobody can be put into the parent as long as a worker lives: whoever starts the daemon again has to put
//! it into the leaf, or to take the controllers back first ([`release`]). systemd does neither by itself: from 256 on it
//! begins a service in the unit's own cgroup also where `DelegateSubgroup=` is set, which the kernel then refuses, and the
//! machines that outlived the daemon would be without one. Hence [`Controllers::Auto`] leaves units alone, and the
//! unit that asks for `on` has `ExecStopPost=vpmud host release-cgroup`.
//!
//! With the cpu controller each cgroup has a share of its own, the daemon as much as one worker: beside fifty guests that
//! compute it would answer nobody in time. So its leaf weighs more ([`WEIGHT`]). Where the kernel shares so wrongly that one
//! group can starve another ([`crate::sharing`]), nobody gets this controller: within one group it shares rightly.
//!
//! Invariant: what is not enabled is told with the reason, once, at the start; workers then run without it.

use std::io;
use std::path::{Path, PathBuf};

/// Where the daemon goes. Nobody else's cgroup is called so.
pub(super) const LEAF: &str = "vpmud-daemon";
/// Share of the daemon where a worker has [`USUAL_WEIGHT`]: about what nice -10 is to nice 0, as its threads have it.
const WEIGHT: &str = "1000";
/// The kernel's own choice (cgroup-v2.rst, cpu.weight).
const USUAL_WEIGHT: &str = "100";
/// Where earlier versions went; others may have one of that name.
const OLD_LEAF: &str = "daemon";
/// How the names of workers' cgroups begin.
const WORKERS: &str = "vpmud-";
/// systemd's name for commands of a unit that run beside its service.
const CONTROL: &str = ".control";
/// What workers are to have, if it can be had.
pub(super) const WANTED: [&str; 4] = ["cpu", "memory", "pids", "hugetlb"];
/// Kinds of systemd's units that have a cgroup.
const UNITS: [&str; 3] = [".service", ".scope", ".slice"];

/// When controllers are handed down to the workers' cgroups (v2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Controllers {
    /// Where that is not the cgroup of a systemd unit.
    #[default]
    Auto,
    /// Also there: the unit has `ExecStopPost=vpmud host release-cgroup`, without which it cannot start again beside running machines.
    On,
    /// Never.
    Off,
}

/// What is to be seen of the cgroup that the workers' lie in.
#[derive(Debug, Default)]
struct Seen {
    /// It is the host's root.
    root: bool,
    /// It is a systemd unit's.
    unit: bool,
    /// What it could hand down.
    available: Vec<String>,
    /// What it does hand down.
    enabled: Vec<String>,
    /// This process is in it.
    inside: bool,
    /// So are these.
    others: Vec<String>,
    /// The kernel lets one group of the controller cpu starve another ([`crate::sharing`]).
    unfair: bool,
}

/// What to do.
#[derive(Debug, Default, PartialEq, Eq)]
struct Plan {
    move_to_leaf: bool,
    enable: Vec<&'static str>,
    /// What workers go without, and why.
    missing: Vec<(Vec<&'static str>, String)>,
}

/// `elsewhere`: what workers get in hierarchies of v1.
fn plan(seen: &Seen, mode: Controllers, elsewhere: &[&str]) -> Plan {
    let mut plan = Plan::default();
    if mode == Controllers::Off {
        return plan;
    }
    let wanted =
        WANTED.into_iter().filter(|c| !elsewhere.contains(c) && !seen.enabled.iter().any(|e| e == c));
    let (wanted, unfair): (Vec<_>, Vec<_>) = wanted.partition(|c| !(seen.unfair && *c == "cpu"));
    if !unfair.is_empty() {
        let why = "this kernel (6.13 to 6.19) lets a worker whose vCPUs take turns on a core starve the others there";
        plan.missing.push((unfair, why.to_owned()));
    }
    let (there, absent): (Vec<_>, Vec<_>) =
        wanted.into_iter().partition(|c| seen.available.iter().any(|a| a == c));
    if !absent.is_empty() {
        let why = "cgroup.controllers does not list it; under systemd set Delegate=yes".to_owned();
        plan.missing.push((absent, why));
    }
    if there.is_empty() {
        return plan;
    }
    let refusal = if seen.root {
        Some("the daemon is in the host's root cgroup; start it in one of its own".to_owned())
    } else if seen.unit && mode == Controllers::Auto {
        Some("it is a systemd unit's cgroup; give --cgroup-controllers on, with the ExecStopPost= of vpmud.service".to_owned())
    } else if !seen.others.is_empty() {
        Some(format!(
            "other processes are in it ({}); start the daemon in a cgroup of its own",
            seen.others.join(", ")
        ))
    } else {
        None
    };
    if let Some(why) = refusal {
        plan.missing.push((there, why));
    } else {
        plan.move_to_leaf = seen.inside;
        plan.enable = there;
    }
    plan
}

/// Where the workers' cgroups lie, for a daemon in this one.
pub(super) fn parent_of_workers(own: PathBuf) -> PathBuf {
    match own.parent() {
        Some(parent) if own.ends_with(LEAF) || is_old_leaf(&own) => parent.to_owned(),
        _ => own,
    }
}

/// Whether an earlier version made it, for itself: nobody but a unit makes cgroups below the unit's, and elsewhere workers
/// lie beside it. A daemon that was upgraded in place is in it still.
fn is_old_leaf(leaf: &Path) -> bool {
    let Some(parent) = leaf.parent().filter(|_| leaf.ends_with(OLD_LEAF)) else { return false };
    let mut beside = std::fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.file_name());
    is_unit(parent) || beside.any(|name| name != LEAF && name.to_string_lossy().starts_with(WORKERS))
}

fn is_unit(dir: &Path) -> bool {
    let name = dir.file_name().unwrap_or_default().to_string_lossy();
    UNITS.iter().any(|kind| name.ends_with(kind))
}

/// Hands down to the workers' cgroups below `parent` what can be; returns what they then have.
pub(super) fn provide(parent: &Path, mode: Controllers, elsewhere: &[&str]) -> Vec<String> {
    let plan = plan(&look(parent), mode, elsewhere);
    for (missing, why) in &plan.missing {
        tracing::info!(cgroup = %parent.display(), ?missing, why, "workers go without these controllers");
    }
    if let Err(error) = if plan.move_to_leaf { enter_leaf(parent) } else { Ok(()) } {
        tracing::warn!(cgroup = %parent.display(), missing = ?plan.enable, %error,
            "workers go without these controllers: this process cannot move into a cgroup below its own");
    } else {
        for controller in &plan.enable {
            // One by one: a kernel that refuses one refuses the whole write.
            if let Err(error) =
                std::fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}"))
            {
                tracing::warn!(cgroup = %parent.display(), controller, %error, "workers go without a controller");
            }
        }
    }
    if mode == Controllers::Off {
        return Vec::new();
    }
    if let Err(error) = weigh(&parent.join(LEAF)) {
        tracing::warn!(cgroup = %parent.display(), %error, "the daemon has no greater share of the processors than a worker");
    }
    words(parent, "cgroup.subtree_control")
}

/// Gives the daemon's leaf its share, if shares are by cgroup there and nobody has chosen another.
fn weigh(leaf: &Path) -> io::Result<()> {
    let file = leaf.join("cpu.weight");
    match std::fs::read_to_string(&file) {
        Ok(now) if now.trim() == USUAL_WEIGHT => std::fs::write(file, WEIGHT),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

fn look(parent: &Path) -> Seen {
    let own = std::process::id().to_string();
    let (ours, others): (Vec<_>, Vec<_>) =
        words(parent, "cgroup.procs").into_iter().partition(|pid| *pid == own);
    Seen {
        // Only the root has no type (cgroup-v2.rst).
        root: !parent.join("cgroup.type").exists(),
        unit: is_unit(parent),
        available: words(parent, "cgroup.controllers"),
        enabled: words(parent, "cgroup.subtree_control"),
        inside: !ours.is_empty(),
        others,
        unfair: crate::sharing::kernel_is_suspect(),
    }
}

fn words(dir: &Path, file: &str) -> Vec<String> {
    let text = std::fs::read_to_string(dir.join(file)).unwrap_or_default();
    text.split_whitespace().map(str::to_owned).collect()
}

fn enter_leaf(parent: &Path) -> io::Result<()> {
    let leaf = parent.join(LEAF);
    match std::fs::create_dir(&leaf) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    std::fs::write(leaf.join("cgroup.procs"), std::process::id().to_string())
}

/// Takes every controller back, so that a process can be put into `dir` again; the workers below stay. The daemon's leaf,
/// also an earlier version's, goes if nothing is in it. Returns what it handed down.
///
/// # Errors
/// If the kernel refuses it.
pub fn release(dir: &Path) -> io::Result<Vec<String>> {
    let enabled = words(dir, "cgroup.subtree_control");
    let off: Vec<_> = enabled.iter().map(|controller| format!("-{controller}")).collect();
    if !off.is_empty() {
        std::fs::write(dir.join("cgroup.subtree_control"), off.join(" "))?;
    }
    let old = dir.join(OLD_LEAF);
    for leaf in [Some(dir.join(LEAF)), is_old_leaf(&old).then_some(old)].into_iter().flatten() {
        // The kernel removes none that has a process or a cgroup in it, and the next daemon makes its own again.
        if let Err(error) = std::fs::remove_dir(&leaf)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::debug!(leaf = %leaf.display(), %error, "a leaf stays");
        }
    }
    Ok(enabled)
}

/// Options of `vpmud host release-cgroup`.
#[derive(Debug, clap::Args)]
pub struct ReleaseArgs {
    /// Directory of the cgroup; default: that of the systemd unit that runs this as its ExecStopPost=.
    #[arg(long, value_name = "DIR")]
    cgroup: Option<PathBuf>,
}

/// Runs it. Exit codes: 0 done, 1 it cannot be done.
pub fn main(args: &ReleaseArgs) -> std::process::ExitCode {
    let unit = || super::own_unified().filter(|own| own.ends_with(CONTROL))?.parent().map(Path::to_owned);
    let Some(dir) = args.cgroup.clone().or_else(unit) else {
        eprintln!("vpmud: this is not an ExecStopPost= of a unit with Delegate=yes; give --cgroup DIR");
        return std::process::ExitCode::FAILURE;
    };
    match release(&dir) {
        Ok(released) => {
            println!("{}: released {}", dir.display(), released.join(" "));
            std::process::ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vpmud: {}: {error}; is it a cgroup (v2) that this user may change?", dir.display());
            std::process::ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split_whitespace().map(str::to_owned).collect()
    }

    /// A delegated cgroup with the daemon alone in it.
    fn delegated() -> Seen {
        Seen { available: words("cpuset cpu io memory pids"), inside: true, ..Seen::default() }
    }

    fn missing(plan: &Plan) -> Vec<&'static str> {
        plan.missing.iter().flat_map(|(which, _)| which.clone()).collect()
    }

    #[test]
    fn the_daemon_weighs_more_than_a_worker_unless_somebody_chose_otherwise() {
        let leaf = tempfile::tempdir().expect("tempdir");
        weigh(leaf.path()).expect("no cpu controller");
        assert!(!leaf.path().join("cpu.weight").exists());
        for (before, after) in [("100\n", "1000"), ("1000\n", "1000\n"), ("50\n", "50\n")] {
            std::fs::write(leaf.path().join("cpu.weight"), before).expect("written");
            weigh(leaf.path()).expect("weighs");
            assert_eq!(std::fs::read_to_string(leaf.path().join("cpu.weight")).expect("read"), after);
        }
    }

    #[test]
    fn the_daemon_moves_into_a_leaf_and_enables_what_there_is() {
        let all = plan(&delegated(), Controllers::Auto, &[]);
        assert!(all.move_to_leaf);
        assert_eq!((all.enable.clone(), missing(&all)), (vec!["cpu", "memory", "pids"], vec!["hugetlb"]));
        // Again, after a restart in the leaf: the rest only, and no move.
        let again = Seen { enabled: words("memory pids"), inside: false, ..delegated() };
        let again = plan(&again, Controllers::Auto, &[]);
        assert_eq!((again.move_to_leaf, again.enable), (false, vec!["cpu"]));
        let whole = Seen { enabled: words("cpu memory pids"), inside: false, ..delegated() };
        assert_eq!(plan(&whole, Controllers::Auto, &["hugetlb"]), Plan::default());
    }

    #[test]
    fn nobody_gets_cpu_where_groups_starve_each_other() {
        let unfair = plan(&Seen { unfair: true, ..delegated() }, Controllers::On, &["hugetlb"]);
        assert_eq!((unfair.enable.clone(), missing(&unfair)), (vec!["memory", "pids"], vec!["cpu"]));
        assert!(unfair.missing[0].1.contains("starve"), "{unfair:?}");
        // What somebody has enabled stays.
        let enabled = Seen { unfair: true, enabled: words("cpu memory pids"), ..delegated() };
        assert_eq!(plan(&enabled, Controllers::On, &["hugetlb"]), Plan::default());
    }

    #[test]
    fn a_units_cgroup_is_changed_only_if_the_unit_asks() {
        let unit = || Seen { unit: true, ..delegated() };
        let auto = plan(&unit(), Controllers::Auto, &[]);
        assert_eq!((auto.move_to_leaf, auto.enable.len()), (false, 0));
        assert_eq!(missing(&auto), ["hugetlb", "cpu", "memory", "pids"]);
        assert!(auto.missing[1].1.contains("--cgroup-controllers on"), "{auto:?}");
        let on = plan(&unit(), Controllers::On, &[]);
        assert_eq!((on.move_to_leaf, on.enable), (true, vec!["cpu", "memory", "pids"]));
    }

    #[test]
    fn what_is_not_the_daemons_is_left_alone() {
        let others = Seen { others: words("17 42"), ..delegated() };
        let root = Seen { root: true, ..delegated() };
        for (seen, word) in [(others, "17, 42"), (root, "root cgroup")] {
            for mode in [Controllers::Auto, Controllers::On] {
                let plan = plan(&seen, mode, &[]);
                assert!(!plan.move_to_leaf && plan.enable.is_empty(), "{plan:?}");
                assert!(plan.missing.iter().any(|(_, why)| why.contains(word)), "{plan:?}");
            }
        }
        assert_eq!(plan(&delegated(), Controllers::Off, &[]), Plan::default());
    }

    #[test]
    fn v1_is_used_where_it_has_the_controller() {
        let hybrid = Seen { inside: true, available: words("hugetlb"), ..Seen::default() };
        let plan = plan(&hybrid, Controllers::Auto, &["memory", "pids"]);
        assert_eq!((plan.enable.clone(), missing(&plan)), (vec!["hugetlb"], vec!["cpu"]));
        // Nothing to enable: no move either.
        let none = Seen { inside: true, ..Seen::default() };
        assert!(!super::plan(&none, Controllers::Auto, &[]).move_to_leaf);
    }

    #[test]
    fn workers_lie_beside_the_daemons_leaf() {
        let at = |path: &str| parent_of_workers(PathBuf::from(path));
        assert_eq!(at("/sys/fs/cgroup/a/vpmud.service"), Path::new("/sys/fs/cgroup/a/vpmud.service"));
        assert_eq!(
            at("/sys/fs/cgroup/a/vpmud.service/vpmud-daemon"),
            Path::new("/sys/fs/cgroup/a/vpmud.service")
        );
        assert_eq!(at("/no/where/vpmud-daemon"), Path::new("/no/where"));
    }

    /// Of an earlier version: taken for the daemon's only where it surely is.
    #[test]
    fn an_old_leaf_is_known_by_its_unit_or_by_the_workers_beside_it() {
        let at = |path: PathBuf| parent_of_workers(path);
        let unit = PathBuf::from("/sys/fs/cgroup/a/vpmud.service");
        assert_eq!(at(unit.join("daemon")), unit);
        let dir = tempfile::tempdir().expect("tempdir");
        let leaf = dir.path().join("daemon");
        std::fs::create_dir(&leaf).expect("made");
        assert_eq!(at(leaf.clone()), leaf, "somebody else's may be called so");
        release(dir.path()).expect("nothing to release");
        assert!(leaf.exists());
        std::fs::create_dir(dir.path().join("vpmud-0123abcd-uid")).expect("made");
        assert_eq!(at(leaf.clone()), dir.path());
        // In use: it stays. Empty: it goes, with this version's.
        std::fs::create_dir(leaf.join("x")).expect("made");
        std::fs::create_dir(dir.path().join(LEAF)).expect("made");
        release(dir.path()).expect("nothing to release");
        assert!(leaf.exists() && !dir.path().join(LEAF).exists());
        std::fs::remove_dir(leaf.join("x")).expect("removed");
        release(dir.path()).expect("nothing to release");
        assert!(!leaf.exists() && dir.path().join("vpmud-0123abcd-uid").exists());
    }
}
