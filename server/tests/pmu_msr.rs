//! `--pmu msr` in process isolation: refused by name of each thing that is missing, as `vpmud host check` names it, before
//! anything is opened; where nothing is missing, served by a worker that may reach the counters.

mod support;

use serde_json::Value;
use support::*;
use vpmu_proto::api::virtual_machine::State;

const OPTIONS: [&str; 4] = ["--isolation", "process", "--pmu", "msr"];
/// CAP_SYS_RAWIO's bit (capabilities(7)).
const SYS_RAWIO: u64 = 1 << 17;

/// The lines of the host check that are errors in mode msr.
fn missing() -> Vec<Value> {
    let check = std::process::Command::new(env!("CARGO_BIN_EXE_vpmud"))
        .args(["host", "check", "--pmu", "msr", "--output", "json"])
        .output()
        .expect("runs");
    let said: Value = serde_json::from_slice(&check.stdout).expect("JSON");
    let lines = said["lines"].as_array().expect("lines");
    let errors: Vec<Value> = lines.iter().filter(|line| line["level"] == "error").cloned().collect();
    assert_eq!(check.status.code(), Some(i32::from(!errors.is_empty())), "{errors:?}");
    errors
}

#[tokio::test]
async fn in_processes_it_is_served_or_refused_by_what_is_missing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let missing = missing();
    if missing.is_empty() {
        return is_served(dir.path()).await;
    }
    println!("the served half needs a host without these errors: {missing:?}");
    let options: Vec<String> = OPTIONS.iter().map(ToString::to_string).collect();
    let (code, log) = spawn(dir.path(), &options).await.map(drop).expect_err("refused");
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("[PMU_MODE_UNAVAILABLE] --pmu msr cannot be used: "), "{log}");
    // Who holds perf events may be another one by now.
    let stays = missing.iter().filter(|line| line["id"] != "perf_users");
    for line in stays {
        let (message, remedy) = (line["message"].as_str().expect("text"), line["remedy"].as_str());
        let named = format!("{message} ({})", remedy.expect("text"));
        assert!(log.contains(&named), "{}: {named:?} is not in {log}", line["id"]);
    }
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).expect("reads").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left, ["log"], "nothing was opened");

    // Asked for by nobody, it is left out with the same words, and machines run without it.
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    assert_ne!(host.ready["pmu_mode"], "msr");
    host.create("a", probe_spec(1, 16)).await;
    assert_eq!(host.start_vm("a").await.pmu_mode, host.ready["pmu_mode"].as_str().expect("text"));
    assert_eq!(host.terminate().await, 0);
}

async fn is_served(dir: &std::path::Path) {
    let mut host = Host::start(dir, &[&OPTIONS[..], &["--stop-vms"]].concat()).await;
    assert_eq!(host.ready["pmu_mode"], "msr");
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    assert_eq!((vm.observed_state(), vm.pmu_mode.as_str()), (State::Running, "msr"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", vm.worker_pid)).expect("its worker");
    let held = status.lines().find_map(|line| line.strip_prefix("CapEff:")).expect("capabilities");
    assert_ne!(u64::from_str_radix(held.trim(), 16).expect("hex") & SYS_RAWIO, 0, "{status}");
    host.until_counting("a").await;
    assert_eq!(host.terminate().await, 0);
}
