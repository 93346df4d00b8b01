//! `vpmuctl` as it is typed against a vpmud that runs: snapshots, what is made of them, and placements; what is printed for
//! programs, and how a refusal is told.

mod support;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::sync::OnceLock;
use std::time::SystemTime;

use serde_json::{Value, json};
use support::*;

/// The program, of the same build as vpmud: made first if it is not there or older than its sources.
fn vpmuctl() -> &'static Path {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let vpmud = Path::new(env!("CARGO_BIN_EXE_vpmud"));
        let program = vpmud.with_file_name("vpmuctl");
        if is_fresh(&program) {
            return program;
        }
        let profile = vpmud.parent().expect("a directory");
        let name = profile.file_name().and_then(|name| name.to_str()).expect("a profile");
        let built = std::process::Command::new(env!("CARGO"))
            .args(["build", "--locked", "--package", "vpmu-client", "--bin", "vpmuctl", "--profile"])
            .arg(if name == "debug" { "dev" } else { name })
            .arg("--target-dir")
            .arg(profile.parent().expect("the target directory"))
            .status()
            .expect("cargo runs");
        assert!(built.success() && is_fresh(&program), "{} cannot be built", program.display());
        program
    })
}

/// Whether it is there, and nothing that cargo lists beside it as what it was made of is newer.
fn is_fresh(program: &Path) -> bool {
    let list = std::fs::read_to_string(program.with_extension("d")).unwrap_or_default();
    let Some((_, sources)) = list.trim().split_once(": ") else { return false };
    // What was generated is as new as what it was made of, which is listed too.
    let target = program.ancestors().nth(2).expect("the target directory");
    let mut sources = listed(sources).into_iter().filter(|source| !source.starts_with(target));
    program.exists() && sources.all(|source| changed(&source) <= changed(program))
}

/// The paths of a list as make reads it: spaces are between them, and one of a path itself follows a backslash.
fn listed(list: &str) -> Vec<PathBuf> {
    // No path has a NUL.
    let spaced = list.replace("\\ ", "\0");
    spaced.split_whitespace().map(|path| path.replace('\0', " ").into()).collect()
}

#[test]
fn a_path_with_a_space_is_one_path() {
    assert_eq!(listed(r"/a/b\ c.rs  /d"), [Path::new("/a/b c.rs"), Path::new("/d")]);
}

/// When it was last changed, or the last of what is in it.
fn changed(path: &Path) -> SystemTime {
    let below = std::fs::read_dir(path).into_iter().flatten().flatten().map(|entry| changed(&entry.path()));
    let own = path.metadata().and_then(|known| known.modified()).unwrap_or_else(|_| SystemTime::now());
    below.fold(own, SystemTime::max)
}

async fn run(host: &Host, line: &str) -> Output {
    tokio::process::Command::new(vpmuctl())
        .env_remove("VPMU_HOST")
        .args(["--host", &format!("unix:{}", host.socket().display())])
        .args(line.split(' '))
        .stdin(std::process::Stdio::null())
        .output()
        .await
        .expect("runs")
}

/// What is printed for programs: one object, nothing else, and nothing on standard error.
async fn done(host: &Host, line: &str) -> Value {
    let output = run(host, &format!("--output json {line}")).await;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*said), (Some(0), ""), "{line}");
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{line}: {error}: {output:?}"))
}

/// A refusal: exit code 1, nothing on standard output, and the same error for programs and for people. Gives its message.
async fn refused(host: &Host, line: &str, code: &str, reason: &str) -> String {
    let output = run(host, &format!("--output json {line}")).await;
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{line}: {output:?}");
    let said: Value = serde_json::from_slice(&output.stderr).expect("one JSON object");
    let error = &said["error"];
    assert_eq!((&error["code"], &error["reason"]), (&json!(code), &json!(reason)), "{line}: {said}");
    let message = error["message"].as_str().expect("text").to_owned();
    let output = run(host, line).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*output.stdout), (Some(1), &b""[..]), "{line}: {output:?}");
    assert!(told.starts_with(&format!("error: {message} [{reason}]")), "{line}: {told}");
    message
}

async fn wrong_usage(host: &Host, line: &str, said: &str) {
    let output = run(host, line).await;
    let told = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), &*output.stdout), (Some(2), &b""[..]), "{line}: {output:?}");
    assert!(told.contains(said), "{line}: {told}");
}

#[tokio::test]
async fn snapshot_and_restore() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    let file = |name: &str| dir.path().join("state/snapshots").join(name);
    let a = done(&host, "vm create a --vcpus 1 --memory 16MiB --probe --start").await;
    assert_eq!((&a["name"], &a["observed_state"]), (&json!("a"), &json!("RUNNING")));
    host.until_counting("a").await;

    // Running, to a file of its own name.
    let taken = done(&host, "vm snapshot a").await;
    let bytes = file("a.vpmusnap").metadata().expect("written").len();
    assert_eq!(
        (&taken["file"], &taken["vm_uid"], &taken["memory_bytes"], &taken["file_bytes"]),
        (&json!("a.vpmusnap"), &a["uid"], &json!(16 << 20), &json!(bytes))
    );
    let (pages, pause) =
        (taken["pages"].as_u64().expect("pages"), taken["pause_us"].as_u64().expect("pause"));
    assert!((1..=16 << 8).contains(&pages) && pause > 0, "{taken}");
    // Paused, to a named one, as people see it.
    done(&host, "vm pause a").await;
    let output = run(&host, "vm snapshot a --file other").await;
    let told = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(
        told.starts_with("a: written to other, ") && told.ends_with(", guest out for 0.0 ms\n"),
        "{told}"
    );
    assert!(file("other").exists());

    let b = done(&host, "vm restore b --file a.vpmusnap --paused").await;
    assert_eq!(
        (&b["name"], &b["observed_state"], &b["incarnation"]),
        (&json!("b"), &json!("PAUSED"), &json!(1))
    );
    assert_ne!(b["uid"], a["uid"], "a machine of its own");
    assert_eq!((&b["vcpus"], &b["memory_bytes"]), (&a["vcpus"], &a["memory_bytes"]));
    let c = done(&host, "vm restore c --file other --lazy").await;
    assert_eq!((&c["observed_state"], &c["desired_state"]), (&json!("RUNNING"), &json!("RUNNING")));
    host.until_counting("c").await;
    assert_eq!(done(&host, "vm get b").await["uid"], b["uid"]);

    let taken = "VIRTUAL_MACHINE_ALREADY_EXISTS";
    let said = refused(&host, "vm restore b --file other", "ALREADY_EXISTS", taken).await;
    assert!(said.contains("virtualMachines/b"), "{said}");
    let missing = refused(&host, "vm restore d --file nothing", "NOT_FOUND", "SNAPSHOT_UNREADABLE").await;
    assert!(missing.contains("nothing"), "{missing}");
    std::fs::write(file("rubbish"), [7; 8192]).expect("written");
    refused(&host, "vm restore d --file rubbish", "FAILED_PRECONDITION", "SNAPSHOT_NOT_ONE").await;
    refused(&host, "vm snapshot a --file ../out", "INVALID_ARGUMENT", "BAD_SNAPSHOT_FILE").await;
    let nobody = refused(&host, "vm snapshot nobody", "NOT_FOUND", "VIRTUAL_MACHINE_NOT_FOUND").await;
    assert!(nobody.contains("nobody"), "{nobody}");
    wrong_usage(&host, "vm restore d", "--file <FILE>").await;
    let names: Vec<_> = host.list().await.into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["a", "b", "c"].map(name), "what was refused is not there");
    assert!(!dir.path().join("state/out").exists());
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn placement() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    done(&host, "vm create a --vcpus 1 --memory 16MiB --probe --start").await;
    let before = host.until_counting("a").await;
    let cores: Vec<u32> = {
        let request = vpmu_proto::api::GetHostPmuCapabilitiesRequest::default();
        let host = host.pmu().await.get_host_pmu_capabilities(request).await.expect("answers").into_inner();
        host.topology.iter().filter(|cpu| cpu.usable).map(|cpu| cpu.cpu).collect()
    };
    let worker = done(&host, "vm get a").await["worker_pid"].clone();
    for core in [cores[0], cores[cores.len() - 1], cores[0]] {
        let vm = done(&host, &format!("vm placement a --cores {core}")).await;
        assert_eq!((&vm["vcpu_cores"], &vm["placement"]["cores"]), (&json!([core]), &json!([core])), "{vm}");
        assert_eq!(
            (&vm["observed_state"], &vm["worker_pid"]),
            (&json!("RUNNING"), &worker),
            "it is not started anew"
        );
        let got = done(&host, "vm get a").await;
        assert_eq!((&got["vcpu_cores"], &got["placement"]), (&vm["vcpu_cores"], &vm["placement"]));
    }
    workers::until_beyond(&host, "a", &before).await;

    let placed = done(&host, "vm get a").await;
    let no_core = refused(&host, "vm placement a --cores 4095", "INVALID_ARGUMENT", "CORE_UNKNOWN").await;
    assert!(no_core.contains("4095"), "{no_core}");
    refused(&host, "vm placement a --fifo 10", "INVALID_ARGUMENT", "FIFO_NEEDS_DEDICATED").await;
    refused(&host, "vm placement nobody", "NOT_FOUND", "VIRTUAL_MACHINE_NOT_FOUND").await;
    wrong_usage(&host, "vm placement a --cores 4-2", "4-2 runs backwards; write 2-4").await;
    wrong_usage(&host, "vm placement a --cores 0 --arrangement spread", "cannot be used with").await;
    assert_eq!(done(&host, "vm get a").await, placed, "what was refused changes nothing");

    // Without an option, wherever the host wants; for people in one line.
    let output = run(&host, "vm placement a").await;
    let told = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(told.starts_with("a: running (") && told.contains("cores "), "{told}");
    assert_eq!(done(&host, "vm get a").await["placement"]["cores"], json!([]));
    assert_eq!(host.terminate().await, 0);
}
