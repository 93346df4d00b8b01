//! `vpmud upgrade` with real processes: machines move to workers of another binary, the daemon becomes it, and nothing is
//! lost; also when something is killed on the way. The new binary is a copy of this one at another path.

mod support;

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::guest::*;
use support::*;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const THREAD: [&str; 2] = ["--isolation", "thread"];
const PROCESS: [&str; 2] = ["--isolation", "process"];

struct Site {
    host: Host,
    new: PathBuf,
    workers: Workers,
    _dir: tempfile::TempDir,
}

fn copy(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::copy(env!("CARGO_BIN_EXE_vpmud"), &path).expect("copied");
    std::fs::canonicalize(path).expect("there")
}

async fn site(options: &[&str]) -> Site {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers(vec![dir.path().join("state/run")]);
    let new = copy(dir.path(), "vpmud.new");
    let host = Host::start(dir.path(), options).await;
    Site { host, new, workers, _dir: dir }
}

fn begin(host: &Host, binary: &Path) -> Child {
    Command::new(env!("CARGO_BIN_EXE_vpmud"))
        .args(["upgrade", "--output", "json", "--binary"])
        .arg(binary)
        .arg("--state-dir")
        .arg(host.dir.join("state"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("spawns")
}

/// Runs it to its end: whether it succeeded, what it said.
async fn upgrade(host: &Host, binary: &Path) -> (bool, Vec<serde_json::Value>) {
    let output = tokio::time::timeout(DEADLINE * 2, begin(host, binary).wait_with_output());
    let output = output.await.expect("in time").expect("ran");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    println!("{text}{}", String::from_utf8_lossy(&output.stderr));
    let lines = text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    (output.status.success(), lines)
}

fn exe(pid: u32) -> PathBuf {
    std::fs::read_link(format!("/proc/{pid}/exe")).expect("it lives")
}

async fn until_reaped(pid: u32) {
    let begin = Instant::now();
    while Path::new(&format!("/proc/{pid}")).exists() {
        let status = || std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        assert!(begin.elapsed() < DEADLINE, "process {pid} does not go away: {}", status());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

async fn pause(host: &Host, id: &str) {
    let request = PauseVirtualMachineRequest { name: name(id) };
    host.vms().await.pause_virtual_machine(request).await.expect("paused");
}

/// Counters that take no overflow never go back, and the guest has seen no fault.
fn not_back(before: &Pmu, now: &Pmu) {
    assert_eq!(before.vcpus.len(), now.vcpus.len());
    for (before, now) in before.vcpus.iter().zip(&now.vcpus) {
        for (before, now) in before.counters.iter().zip(&now.counters).filter(|(b, _)| !b.pmi_enabled) {
            assert!(
                now.value >= before.value,
                "{} went back: {} to {}",
                before.name,
                before.value,
                now.value
            );
        }
    }
    let report = |pmu: &Pmu| pmu.probe.clone().expect("a report").vcpus;
    for (before, now) in report(before).iter().zip(&report(now)) {
        assert!(now.heartbeats >= before.heartbeats && now.pages_dirtied >= before.pages_dirtied);
        assert_eq!(now.faults, 0);
    }
}

async fn until_on(host: &Host, id: &str, before: &Pmu) -> Pmu {
    let beats = |pmu: &Pmu| -> u64 { pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.heartbeats).sum() };
    let begin = Instant::now();
    loop {
        let now = host.live_pmu(id).await;
        if beats(&now) > beats(before) {
            not_back(before, &now);
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "{id} does not go on");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Asks the API all the time, as a client that tries again does; returns the longest time without an answer.
fn client(host: &Host) -> (tokio::sync::oneshot::Sender<()>, tokio::task::JoinHandle<Duration>) {
    let (stop, mut stopped) = tokio::sync::oneshot::channel();
    let socket = host.socket();
    let task = tokio::spawn(async move {
        let (mut last, mut longest) = (Instant::now(), Duration::ZERO);
        while stopped.try_recv().is_err() {
            let ask = async {
                let stream = tokio::net::UnixStream::connect(&socket).await.ok()?;
                let mut stream = Some(hyper_util::rt::TokioIo::new(stream));
                let connect = tower::service_fn(move |_: tonic::transport::Uri| {
                    let stream = stream.take();
                    async move { stream.ok_or_else(|| std::io::Error::other("used")) }
                });
                let endpoint = tonic::transport::Endpoint::from_static("http://vpmud.invalid");
                let channel = endpoint.connect_with_connector(connect).await.ok()?;
                let mut client = virtual_machines_service_client::VirtualMachinesServiceClient::new(channel);
                client.list_virtual_machines(ListVirtualMachinesRequest::default()).await.ok()
            };
            if let Ok(Some(_)) = tokio::time::timeout(Duration::from_secs(5), ask).await {
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        longest.max(last.elapsed())
    });
    (stop, task)
}

/// Four machines, two of them under load, go to another binary and back.
async fn four_machines(options: &[&str]) {
    let Site { _dir, workers, new, mut host } = site(options).await;
    let old = exe(host.child.id().expect("running"));
    for (id, spec) in [
        ("a", filled(2, 64, 16)),
        ("b", filled(1, 96, 24)),
        ("paused", filled(1, 32, 8)),
        ("stopped", probe_spec(1, 16)),
    ] {
        host.create(id, spec).await;
    }
    for id in ["a", "b", "paused"] {
        host.start_vm(id).await;
        until_filled(&host, id).await;
    }
    pause(&host, "paused").await;
    let still = host.live_pmu("paused").await;
    let daemon = host.child.id().expect("running");
    for image in [&new, &old] {
        let mut before = Vec::new();
        for id in ["a", "b", "paused"] {
            before.push((id, host.get(id).await, host.live_pmu(id).await));
        }
        let (stop, asking) = client(&host);
        let (ok, said) = upgrade(&host, image).await;
        stop.send(()).expect("asking");
        println!("{options:?}: a client waited {:?} at most", asking.await.expect("asked"));
        assert!(ok, "{said:?}");
        let outcomes: Vec<_> = said.iter().filter_map(|l| l["outcome"].as_str()).collect();
        assert_eq!(outcomes.iter().filter(|o| **o == "moved").count(), 3, "{said:?}");
        assert_eq!(outcomes.iter().filter(|o| **o == "idle").count(), 1, "{said:?}");
        assert_eq!((exe(daemon), host.child.id()), (image.clone(), Some(daemon)), "it became the binary");
        for (id, vm, pmu) in &before {
            let now = host.get(id).await;
            assert_eq!((&now.uid, now.observed_state()), (&vm.uid, vm.observed_state()));
            assert_eq!((now.epoch, now.incarnation), (vm.epoch + 1, vm.incarnation + 1), "{id}");
            assert_eq!(exe(now.worker_pid), *image, "{id}");
            if vm.worker_pid != 0 {
                until_reaped(vm.worker_pid).await;
            }
            if *id == "paused" {
                let now = host.live_pmu(id).await;
                assert_eq!(now.vcpus[0].counters, still.vcpus[0].counters, "it stood still");
            } else {
                until_on(&host, id, pmu).await;
            }
            verify(&host, id).await;
        }
        assert_eq!(host.get("stopped").await.observed_state(), State::Stopped);
        assert_eq!(workers.alive().len(), 3);
        assert!(!host.dir.join("state/vpmud.previous").exists(), "it is not needed any more");
    }
    // What came by upgrades survives the death of its daemon like any other.
    let before = host.live_pmu("a").await;
    host.kill().await;
    host.restart().await;
    until_on(&host, "a", &before).await;
    let resume = ResumeVirtualMachineRequest { name: name("paused") };
    host.vms().await.resume_virtual_machine(resume).await.expect("resumed");
    until_on(&host, "paused", &still).await;
    for id in ["a", "b", "paused"] {
        host.stop_vm(id).await;
    }
    assert!(workers.alive().is_empty());
    assert_eq!(std::fs::read_dir(&workers.0[0]).expect("there").count(), 0, "no runtime directory is left");
    host.start_vm("stopped").await;
    host.until_counting("stopped").await;
    host.stop_vm("stopped").await;
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn machines_in_processes_go_to_another_binary_and_back() {
    four_machines(&PROCESS).await;
}

#[tokio::test]
async fn machines_on_threads_go_to_processes_of_another_binary() {
    four_machines(&THREAD).await;
}

#[tokio::test]
async fn a_binary_that_is_none_changes_nothing() {
    let Site { _dir, workers: _workers, new, host } = site(&PROCESS).await;
    host.create("a", probe_spec(1, 16)).await;
    host.start_vm("a").await;
    let before = host.get("a").await;
    let script = host.dir.join("script");
    std::fs::write(&script, "#!/bin/sh\necho '{\"version\":\"9\",\"worker_protocol\":9,\"peer_protocol\":1,\"store\":1,\"state\":1}'\n")
        .expect("written");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    for (binary, reason) in [
        (Path::new("/bin/true"), "BAD_BINARY"),
        (&host.dir.join("log"), "BAD_BINARY"),
        (&script, "UPGRADE_INCOMPATIBLE"),
    ] {
        let (ok, said) = upgrade(&host, binary).await;
        assert!(!ok);
        assert_eq!(said[0]["reason"], reason, "{said:?}");
    }
    assert_eq!(host.get("a").await, before);
    let (ok, _) = upgrade(&host, &new).await;
    assert!(ok);
}

/// The new binary does not come to serve: something answers at its API's address. The one before goes on.
#[tokio::test]
async fn a_binary_that_does_not_come_to_serve_is_replaced_by_the_one_before() {
    let Site { _dir, workers, new, host } = site(&PROCESS).await;
    host.create("a", filled(1, 32, 8)).await;
    host.start_vm("a").await;
    until_filled(&host, "a").await;
    let before = host.live_pmu("a").await;
    let script = host.dir.join("late");
    let text = format!(
        "#!/bin/sh\nif [ \"$1\" = serve ]; then\npython3 -c '\nimport os, socket\ns = socket.socket(socket.AF_UNIX)\ns.bind(\"{socket}\")\ns.listen()\nopen(\"{dir}/listens\", \"w\").close()\ns.accept()\nos.unlink(\"{socket}\")\n' &\nwhile [ ! -e '{dir}/listens' ]; do sleep 0.01; done\nfi\nexec '{new}' \"$@\"\n",
        socket = host.socket().display(),
        dir = host.dir.display(),
        new = new.display(),
    );
    std::fs::write(&script, text).expect("written");
    std::fs::set_permissions(&script, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("mode");
    let (ok, said) = upgrade(&host, &script).await;
    assert!(!ok, "{said:?}");
    let last = said.last().expect("lines")["message"].as_str().expect("a message").to_owned();
    assert!(last.contains("did not come to serve"), "{said:?}");
    assert!(host.dir.join("listens").exists());
    assert!(exe(host.child.id().expect("running")).to_string_lossy().contains("vpmud.previous"));
    until_on(&host, "a", &before).await;
    verify(&host, "a").await;
    assert_eq!(workers.alive().len(), 1);
    let (ok, _) = upgrade(&host, &new).await;
    assert!(ok, "and it can be upgraded yet");
    until_on(&host, "a", &before).await;
}

/// The daemon dies at `point` of a renewal. `moved`: the new worker has the machine; none: its copy is gone.
async fn dies(options: &[&str], point: &str, moved: Option<bool>) {
    let mut held = options.to_vec();
    held.extend(["--hold-at", point]);
    let Site { _dir, workers, new, mut host } = site(&held).await;
    host.create("a", filled(1, 32, 8)).await;
    let vm = host.start_vm("a").await;
    until_filled(&host, "a").await;
    let before = host.live_pmu("a").await;
    let asking = begin(&host, &new);
    host.kill_at_hold().await;
    drop(asking);
    host.restart_with(options).await;
    let Some(moved) = moved else {
        let vm = host.until("a", "ended", |vm| vm.observed_state() != State::MigratingOut).await;
        assert!(matches!(vm.observed_state(), State::Stopped | State::Failed), "{point}: {vm:?}");
        assert!(workers.alive().is_empty(), "{point}");
        host.start_vm("a").await;
        return;
    };
    let now = host.until("a", "running", is(State::Running)).await;
    assert_eq!((now.epoch, now.incarnation), (vm.epoch + 1, vm.incarnation + u64::from(moved)), "{point}");
    assert_eq!(now.worker_pid == vm.worker_pid, !moved, "{point}");
    let begin = Instant::now();
    while workers.alive().len() != 1 {
        assert!(begin.elapsed() < DEADLINE, "{point}: {:?}", workers.alive());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    until_on(&host, "a", &before).await;
    verify(&host, "a").await;
    let (ok, said) = upgrade(&host, &new).await;
    assert!(ok, "{point}: {said:?}");
    until_on(&host, "a", &before).await;
    verify(&host, "a").await;
    host.stop_vm("a").await;
    assert!(workers.alive().is_empty(), "{point}");
}

#[tokio::test]
async fn a_daemon_that_dies_before_the_decision_keeps_the_old_worker() {
    for point in
        ["after:source-persist-open", "after:source-persist-quiesced", "before:source-persist-handed-over"]
    {
        dies(&PROCESS, point, Some(false)).await;
    }
}

#[tokio::test]
async fn a_daemon_that_dies_after_the_decision_has_the_new_worker() {
    for point in ["after:source-persist-handed-over", "after:destination-grant", "before:source-release"] {
        dies(&PROCESS, point, Some(true)).await;
    }
}

/// The decision is made, and the new worker says nothing: it is the machine, so it is waited for.
async fn silent_when_granted(options: &[&str]) {
    let options = [options, &["--handover-timeout", "2000"]].concat();
    let held = [&options[..], &["--hold-at", "after:source-persist-handed-over"]].concat();
    let Site { _dir, workers, new, host } = site(&held).await;
    host.create("a", filled(1, 32, 8)).await;
    let vm = host.start_vm("a").await;
    until_filled(&host, "a").await;
    let before = host.live_pmu("a").await;
    let asking = begin(&host, &new);
    host.until_held().await;
    let fresh: Vec<_> = workers.alive().into_iter().filter(|w| w.pid != vm.worker_pid).collect();
    let [fresh] = fresh.as_slice() else { panic!("{fresh:?}") };
    let number = rustix::process::Pid::from_raw(fresh.pid.cast_signed()).expect("a pid");
    rustix::process::kill_process(number, rustix::process::Signal::STOP).expect("stopped");
    host.signal(rustix::process::Signal::CONT);
    // Its end first: from threads the daemon is replaced, and nobody can connect for a moment.
    let said =
        tokio::time::timeout(DEADLINE, asking.wait_with_output()).await.expect("in time").expect("ran");
    let said = String::from_utf8_lossy(&said.stdout).into_owned();
    let waits = host.until("a", "waited for", |vm| vm.reason == "WORKER_TIMEOUT").await;
    assert_eq!(waits.observed_state(), State::Failed, "{waits:?}");
    if vm.worker_pid != 0 {
        until_reaped(vm.worker_pid).await;
    }
    let told = format!("its new worker, process {}, has it", fresh.pid);
    assert!(said.contains("WORKER_TIMEOUT") && said.contains(&told), "{said}");
    assert_eq!(workers.alive(), std::slice::from_ref(fresh), "nothing of it was ended");
    rustix::process::kill_process(number, rustix::process::Signal::CONT).expect("goes on");
    let now = host.until("a", "running", is(State::Running)).await;
    assert_eq!((now.epoch, now.incarnation), (vm.epoch + 1, vm.incarnation + 1));
    assert_eq!(now.worker_pid, fresh.pid);
    until_on(&host, "a", &before).await;
    verify(&host, "a").await;
    host.stop_vm("a").await;
    assert!(workers.alive().is_empty());
}

#[tokio::test]
async fn a_new_worker_that_is_silent_is_its_machine_once_it_answers() {
    silent_when_granted(&PROCESS).await;
    silent_when_granted(&THREAD).await;
}

#[tokio::test]
async fn a_machine_on_threads_survives_its_daemon_once_its_new_worker_is_ready() {
    dies(&THREAD, "after:source-persist-quiesced", None).await;
    dies(&THREAD, "before:source-persist-handed-over", Some(true)).await;
    dies(&THREAD, "after:source-persist-handed-over", Some(true)).await;
}

/// The new daemon is killed while it starts: whoever starts next finds every machine.
#[tokio::test]
async fn a_new_daemon_that_is_killed_at_once_leaves_its_machines_to_the_next() {
    let Site { _dir, workers, new, mut host } = site(&PROCESS).await;
    for id in ["a", "b"] {
        host.create(id, filled(1, 32, 8)).await;
        host.start_vm(id).await;
        until_filled(&host, id).await;
    }
    let before = [host.live_pmu("a").await, host.live_pmu("b").await];
    let mut asking = begin(&host, &new);
    let mut lines = BufReader::new(asking.stdout.take().expect("piped")).lines();
    while let Some(line) = lines.next_line().await.expect("read") {
        if line.contains("\"switching\"") {
            break;
        }
    }
    let daemon = host.child.id().expect("running");
    let begin = Instant::now();
    while exe(daemon) != new {
        assert!(begin.elapsed() < DEADLINE, "it does not become the new binary");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    host.kill().await;
    host.restart().await;
    for (id, before) in ["a", "b"].iter().zip(&before) {
        let vm = host.get(id).await;
        assert_eq!((vm.observed_state(), exe(vm.worker_pid)), (State::Running, new.clone()), "{vm:?}");
        until_on(&host, id, before).await;
        verify(&host, id).await;
    }
    assert_eq!(workers.alive().len(), 2);
}
