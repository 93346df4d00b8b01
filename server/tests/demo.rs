//! `vpmud demo` as a user runs it: its result, and that nothing is left behind however it ends.

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::Mutex;

/// Each demo wants the cores for itself.
static ONE_AT_A_TIME: Mutex<()> = Mutex::const_new(());

/// Far above the minute that is promised: a debug build on a crowded machine.
const DEADLINE: Duration = Duration::from_secs(180);

fn demo(base: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vpmud"));
    command.arg("demo").args(args).env("TMPDIR", base).stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// A base directory whose path leaves room for sockets.
fn base() -> tempfile::TempDir {
    tempfile::Builder::new().prefix("vd").tempdir_in("/tmp").expect("a directory")
}

fn left_behind(base: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(base).expect("reads");
    entries.map(|entry| entry.expect("reads").file_name().to_string_lossy().into_owned()).collect()
}

async fn passes(hypervisor: &str) {
    let _turn = ONE_AT_A_TIME.lock().await;
    let base = base();
    let run = demo(base.path(), &["--output", "json", "--hypervisor", hypervisor]).output();
    let output = tokio::time::timeout(DEADLINE, run).await.expect("ends in time").expect("runs");
    let story = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{story}");
    let result: Value = serde_json::from_slice(&output.stdout).expect("one JSON object");

    assert_eq!(result["hypervisor"], hypervisor);
    assert_eq!(result["pmu_mode"], "model");
    assert_eq!((&result["vcpus"], &result["memory_mib"]), (&2.into(), &256.into()));
    assert_eq!(result["guest_faults"], 0);
    assert!(result["pmis"].as_u64().expect("a number") > 0);
    for key in ["total_ms", "blackout_ms", "guest_gap_ms"] {
        assert!(result["migration"][key].as_f64().expect(key) > 0.0, "{key}");
    }
    for key in ["bytes", "rounds"] {
        assert!(result["migration"][key].as_u64().expect(key) > 0, "{key}");
    }
    let counters = result["counters"].as_array().expect("a list");
    for vcpu in 0..2 {
        assert!(counters.iter().any(|line| line["vcpu"] == vcpu && line["pmi"] == true), "vCPU {vcpu}");
    }
    for line in counters {
        let at = |moment: &str| line[moment].as_u64().expect("an integer");
        assert_eq!(at("at_stop"), at("at_resume"), "{line}");
        if line["pmi"] != true {
            assert!(at("before") <= at("at_stop") && at("at_resume") < at("after"), "{line}");
        }
    }
    let checks = result["checks"].as_array().expect("a list");
    assert!(checks.len() >= 10 && checks.iter().all(|check| check["ok"] == true), "{checks:?}");
    assert_eq!(left_behind(base.path()), Vec::<String>::new());
}

#[tokio::test]
async fn passes_simulated() {
    passes("simulated").await;
}

#[tokio::test]
async fn passes_on_kvm() {
    if !Path::new("/dev/kvm").exists() {
        assert_ne!(std::env::var("VPMU_REQUIRE_KVM").as_deref(), Ok("1"), "no /dev/kvm, and it is required");
        println!("skipped: no /dev/kvm");
        return;
    }
    passes("kvm").await;
}

/// Starts a demo and returns it with its hosts' process ids as soon as both serve.
async fn started(base: &Path) -> (Child, Vec<i32>) {
    let mut child = demo(base, &["--hypervisor", "simulated"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("starts");
    let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
    let find = async {
        while let Some(line) = lines.next_line().await.expect("reads") {
            if let Some(rest) = line.trim().strip_prefix("processes ") {
                let numbers = rest.split(|c: char| !c.is_ascii_digit());
                return numbers.filter_map(|number| number.parse().ok()).collect::<Vec<i32>>();
            }
        }
        panic!("the demo ended early");
    };
    let pids = tokio::time::timeout(DEADLINE, find).await.expect("serves in time");
    assert_eq!(pids.len(), 2);
    for pid in &pids {
        let command = std::fs::read(format!("/proc/{pid}/cmdline")).expect("it runs");
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        assert!(command.contains(" --isolation thread "), "nothing of a demo is to outlive it: {command}");
    }
    // Keeps the pipe open: a closed one would only end the story.
    tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
    (child, pids)
}

async fn gone(pids: &[i32]) {
    let begin = Instant::now();
    // A zombie that nobody has reaped has no program file any more.
    while pids.iter().any(|pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok()) {
        assert!(begin.elapsed() < DEADLINE, "a host outlives its demo");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_signal_ends_it_clean() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let base = base();
    let (mut child, pids) = started(base.path()).await;
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("runs");
    kill_process(pid, Signal::TERM).expect("signals");
    let status = tokio::time::timeout(DEADLINE, child.wait()).await.expect("ends").expect("waits");
    assert_eq!(status.code(), Some(1));
    gone(&pids).await;
    assert_eq!(left_behind(base.path()), Vec::<String>::new());
}

#[tokio::test]
async fn after_sigkill_the_hosts_end_and_the_next_demo_cleans_up() {
    let _turn = ONE_AT_A_TIME.lock().await;
    let base = base();
    let (mut child, pids) = started(base.path()).await;
    child.kill().await.expect("killed");
    gone(&pids).await;
    assert_eq!(left_behind(base.path()).len(), 1);

    let (mut child, pids) = started(base.path()).await;
    let left = left_behind(base.path());
    assert_eq!(left.len(), 1, "the first one's directory is swept: {left:?}");
    let pid = child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())).expect("runs");
    kill_process(pid, Signal::INT).expect("signals");
    tokio::time::timeout(DEADLINE, child.wait()).await.expect("ends").expect("waits");
    gone(&pids).await;
    assert_eq!(left_behind(base.path()), Vec::<String>::new());
}
