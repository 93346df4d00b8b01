//! Workers as processes: they outlive their daemon and are found again, and one that dies takes only its own machine
//! along. On KVM where it is, else simulated.

mod support;

use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use support::workers::*;
use support::*;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::*;

const OPTIONS: [&str; 2] = ["--isolation", "process"];

async fn console(host: &Host, id: &str) -> Vec<u8> {
    let request =
        AttachConsoleRequest { name: name(id), history_only: true, ..AttachConsoleRequest::default() };
    let mut stream =
        host.vms().await.attach_console(tokio_stream::once(request)).await.expect("attaches").into_inner();
    let mut out = Vec::new();
    while let Some(piece) = stream.message().await.expect("reads") {
        out.extend(piece.data);
    }
    out
}

async fn until_console(host: &Host, id: &str) -> Vec<u8> {
    let begin = Instant::now();
    loop {
        let out = console(host, id).await;
        if !out.is_empty() {
            return out;
        }
        assert!(begin.elapsed() < DEADLINE, "{id} prints nothing");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn a_machine_outlives_its_daemon() {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    host.create("a", probe_spec(2, 32)).await;
    let vm = host.start_vm("a").await;
    let worker = identity(&vm);
    let comm = std::fs::read_to_string(format!("/proc/{}/comm", worker.pid)).expect("its name");
    assert_eq!(comm.trim(), "vm-a");
    let command = std::fs::read(format!("/proc/{}/cmdline", worker.pid)).expect("its command line");
    assert!(command.starts_with(b"vpmud\0worker\0"), "{:?}", String::from_utf8_lossy(&command));
    assert_ne!(worker.pid, host.child.id().expect("running"));
    let status = std::fs::read_to_string(format!("/proc/{}/status", worker.pid)).expect("its status");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");

    host.until_counting("a").await;
    let printed = until_console(&host, "a").await;
    let before = host.live_pmu("a").await;
    host.kill().await;
    assert!(lives(&worker), "it outlives the daemon");
    host.restart().await;
    let after = host.get("a").await;
    assert_eq!((after.observed_state(), after.worker_pid), (State::Running, worker.pid), "{after:?}");
    assert_eq!((&after.uid, after.epoch, after.incarnation), (&vm.uid, vm.epoch, vm.incarnation));
    assert_eq!(after.vcpu_cores, vm.vcpu_cores);
    let now = until_beyond(&host, "a", &before).await;
    assert!(now.probe.expect("a report").vcpus.iter().all(|v| v.faults == 0), "the guest saw a fault");
    assert!(console(&host, "a").await.starts_with(&printed), "the console's history is whole");

    // A pause stays one, and the new daemon's commands are obeyed.
    let paused = PauseVirtualMachineRequest { name: name("a") };
    host.vms().await.pause_virtual_machine(paused).await.expect("paused");
    host.kill().await;
    host.restart().await;
    let after = host.get("a").await;
    assert_eq!((after.observed_state(), after.desired_state()), (State::Paused, DesiredState::Paused));
    assert_eq!(after.worker_pid, worker.pid);
    let before = host.live_pmu("a").await;
    let resumed = ResumeVirtualMachineRequest { name: name("a") };
    host.vms().await.resume_virtual_machine(resumed).await.expect("resumed");
    until_beyond(&host, "a", &before).await;

    let stopped = host.stop_vm("a").await;
    assert_eq!((stopped.observed_state(), stopped.worker_pid), (State::Stopped, 0));
    until_gone(&worker).await;
    assert!(workers.alive().is_empty());
    assert_eq!(std::fs::read_dir(&workers.dir).expect("there").count(), 0, "no runtime directory is left");
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn a_worker_that_dies_fails_only_its_machine() {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    for id in ["a", "b"] {
        host.create(id, probe_spec(1, 16)).await;
    }
    let (a, b) = (identity(&host.start_vm("a").await), identity(&host.start_vm("b").await));
    let before = host.until_counting("b").await;
    kill_process(pid(a.pid), Signal::KILL).expect("SIGKILL");
    let failed = host.until("a", "FAILED", is(State::Failed)).await;
    assert_eq!((failed.reason.as_str(), failed.worker_pid), ("WORKER_DIED", 0), "{failed:?}");
    assert_eq!(failed.desired_state(), DesiredState::Running, "what the user wants stays");
    assert_eq!(identity(&host.get("b").await), b);
    until_beyond(&host, "b", &before).await;

    let again = host.start_vm("a").await;
    assert_eq!((again.observed_state(), again.incarnation), (State::Running, 2));
    let again = identity(&again);
    assert_ne!(again, a);
    host.delete("a").await;
    until_gone(&again).await;

    // One that dies while no daemon looks.
    host.kill().await;
    kill_process(pid(b.pid), Signal::KILL).expect("SIGKILL");
    until_gone(&b).await;
    host.restart().await;
    let failed = host.get("b").await;
    assert_eq!((failed.observed_state(), failed.reason.as_str()), (State::Failed, "WORKER_DIED"));
    assert!(workers.alive().is_empty());
    assert_eq!(host.list().await.len(), 1);
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn sigterm_leaves_machines_running_unless_told_otherwise() {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    host.create("a", probe_spec(1, 16)).await;
    let worker = identity(&host.start_vm("a").await);
    let before = host.until_counting("a").await;
    assert_eq!(host.terminate().await, 0);
    assert!(lives(&worker), "it outlives the daemon");

    host.restart_with(&["--isolation", "process", "--stop-vms"]).await;
    let after = host.get("a").await;
    assert_eq!((after.observed_state(), after.worker_pid), (State::Running, worker.pid), "{after:?}");
    until_beyond(&host, "a", &before).await;
    assert_eq!(host.terminate().await, 0);
    until_gone(&worker).await;
    assert!(workers.alive().is_empty());

    host.restart_with(&OPTIONS).await;
    let stopped = host.get("a").await;
    assert_eq!((stopped.observed_state(), stopped.worker_pid), (State::Stopped, 0));
    assert_eq!(host.terminate().await, 0);
}

#[tokio::test]
async fn a_worker_migrates_to_a_worker() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there) = (dir.path().join("a"), dir.path().join("b"));
    let workers = [Workers::of(&here), Workers::of(&there)];
    // Over TCP; the other tests migrate over Unix sockets.
    let tcp = ["--isolation", "process", "--peer-listen", "tcp:127.0.0.1:0"];
    let (a, mut b) = (Host::start(&here, &OPTIONS).await, Host::start(&there, &tcp).await);
    let destination = b.ready["peer_listen"][1].as_str().expect("a TCP address").to_owned();
    a.create("vm", probe_spec(1, 32)).await;
    let left = identity(&a.start_vm("vm").await);
    let before = a.until_counting("vm").await;
    let operation = a.migrate("vm", MigrationSpec { destination, ..MigrationSpec::default() }).await;
    let migration: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    assert_eq!(migration.state(), migration::State::Succeeded);
    until_gone(&left).await;
    let arrived = identity(&b.get("vm").await);
    let now = until_beyond(&b, "vm", &before).await;

    // What has arrived outlives its daemon too.
    b.kill().await;
    b.restart().await;
    let after = b.get("vm").await;
    assert_eq!((after.observed_state(), after.worker_pid), (State::Running, arrived.pid), "{after:?}");
    until_beyond(&b, "vm", &now).await;
    b.delete("vm").await;
    until_gone(&arrived).await;
    assert!(workers.iter().all(|w| w.alive().is_empty()));
}

#[tokio::test]
async fn a_socket_path_that_is_too_long_is_replaced() {
    let dir = tempfile::tempdir().expect("tempdir");
    let deep = dir.path().join("d".repeat(40));
    let workers = Workers::of(&deep);
    assert!(workers.dir.as_os_str().len() + 50 > 107, "long enough");
    let mut host = Host::start(&deep, &OPTIONS).await;
    host.create("a", probe_spec(1, 16)).await;
    let vm = host.start_vm("a").await;
    let worker = identity(&vm);
    let recorded = std::fs::read_to_string(workers.dir.join(&vm.uid).join("socket")).expect("recorded");
    host.kill().await;
    host.restart().await;
    assert_eq!(host.get("a").await.worker_pid, worker.pid);
    host.delete("a").await;
    until_gone(&worker).await;
    assert!(
        !Path::new(&recorded).exists() && !Path::new(&recorded).parent().expect("in a directory").exists()
    );
    assert_eq!(host.terminate().await, 0);
}

/// Nobody can find such a worker any more, and a daemon that starts takes its machine for dead: it must not run on beside
/// the one that is started then.
#[tokio::test]
async fn a_worker_whose_directory_is_deleted_while_its_daemon_is_dead_ends() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _workers = Workers::of(dir.path());
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    let mut started = Vec::new();
    for id in ["kept", "lost", "dead"] {
        host.create(id, probe_spec(1, 16)).await;
        let vm = host.start_vm(id).await;
        started.push((identity(&vm), dir.path().join("state/run").join(&vm.uid)));
    }
    host.until_counting("lost").await;
    host.kill().await;
    let console = std::fs::canonicalize(started[1].1.join("console")).expect("its console");
    let log = std::fs::File::open(started[1].1.join("log")).expect("its log");
    std::fs::remove_dir_all(&started[1].1).expect("deleted");
    until_gone(&started[1].0).await;
    assert!(lives(&started[0].0), "the other one, whose directory is there");
    assert!(!console.exists(), "{} is left", console.display());
    let told = std::io::read_to_string(log).expect("read");
    assert!(told.contains("its runtime directory was deleted"), "{told:?}");
    // One that could not clean up after itself: the next daemon does.
    let (dead, dead_dir) = &started[2];
    let of_dead = std::fs::canonicalize(dead_dir.join("console")).expect("its console");
    kill_process(pid(dead.pid), Signal::KILL).expect("SIGKILL");
    until_gone(dead).await;
    std::fs::remove_dir_all(dead_dir).expect("deleted");
    let of_kept = std::fs::canonicalize(started[0].1.join("console")).expect("its console");

    host.restart().await;
    assert!(!of_dead.exists() && of_kept.exists(), "{} and {}", of_dead.display(), of_kept.display());
    for console in [&console, &of_dead] {
        let note = format!("{}.of", console.display());
        assert!(std::fs::symlink_metadata(&note).is_err(), "{note} is left");
    }
    let kept = host.until("kept", "RUNNING", is(State::Running)).await;
    assert_eq!(kept.worker_pid, started[0].0.pid);
    let lost = host.get("lost").await;
    assert_eq!((lost.observed_state(), lost.worker_pid), (State::Stopped, 0), "{lost:?}");
    host.delete("kept").await;
    host.delete("lost").await;
    host.delete("dead").await;
    assert_eq!(host.terminate().await, 0);
}

/// Waits for a byte on the serial port, then switches the machine off (port 0x604).
const OFF_AT_INPUT: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz wait
    0x66, 0xba, 0x04, 0x06, // mov dx, 0x604
    0xb8, 0x00, 0x20, 0x00, 0x00, // mov eax, 0x2000
    0x66, 0xef, // out dx, ax
    0xeb, 0xfe, // jmp self
];

#[tokio::test]
async fn a_guest_that_shut_down_unseen_is_stopped() {
    unseen(&OPTIONS).await;
}

/// A spare's directory has got another name since the worker opened it.
#[tokio::test]
async fn a_guest_of_a_worker_that_was_a_spare_and_shut_down_unseen_is_stopped() {
    unseen(&["--isolation", "process", "--spare-workers", "2"]).await;
}

async fn unseen(options: &[&str]) {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers::of(dir.path());
    let kernel = dir.path().join("off.flat");
    std::fs::write(&kernel, OFF_AT_INPUT).expect("written");
    let mut host = Host::start(dir.path(), options).await;
    let begin = Instant::now();
    while options.len() > OPTIONS.len() && workers.alive().len() < 2 {
        assert!(begin.elapsed() < DEADLINE, "no spares");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let spares = workers.alive();
    let mut machines = Vec::new();
    for id in ["seen", "dead"] {
        let boot = KernelBoot { path: kernel.display().to_string(), ..KernelBoot::default() };
        let spec =
            VirtualMachineSpec { boot: Some(virtual_machine_spec::Boot::Kernel(boot)), ..probe_spec(1, 16) };
        host.create(id, spec).await;
        let vm = host.start_vm(id).await;
        machines.push((identity(&vm), vm));
    }
    assert!(spares.is_empty() || machines.iter().all(|(worker, _)| spares.contains(worker)));
    host.kill().await;
    for (_, vm) in &machines {
        // What a command that the dead daemon left in the socket would do.
        let socket = workers.dir.join(&vm.uid).join("worker.sock");
        let channel = tonic::transport::Endpoint::from_static("http://worker.invalid")
            .connect_with_connector(tower::service_fn(move |_: tonic::transport::Uri| {
                let socket = socket.clone();
                async move { tokio::net::UnixStream::connect(socket).await.map(hyper_util::rt::TokioIo::new) }
            }))
            .await
            .expect("connects");
        let mut client = vpmu_proto::worker::worker_service_client::WorkerServiceClient::new(channel);
        let fence = vpmu_proto::worker::Fence { vm_uid: vm.uid.clone(), incarnation: 1, term: 1 };
        let input = vpmu_proto::worker::WriteConsoleRequest { fence: Some(fence), data: b"x".to_vec() };
        client.write_console(input).await.expect("taken");
        let (exit, begin) = (workers.dir.join(&vm.uid).join("exit"), Instant::now());
        while !exit.exists() {
            assert!(begin.elapsed() < DEADLINE, "the end is not written down");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    let dead = &machines[1].0;
    kill_process(pid(dead.pid), Signal::KILL).expect("SIGKILL");
    until_gone(dead).await;

    host.restart().await;
    for id in ["seen", "dead"] {
        let vm = host.until(id, "STOPPED", is(State::Stopped)).await;
        assert_eq!((vm.reason.as_str(), vm.worker_pid), ("GUEST_SHUTDOWN", 0), "{id}: {vm:?}");
    }
    assert_eq!(host.terminate().await, 0);
    assert!(workers.alive().is_empty());
}

/// A daemon that dies in a migration leaves its worker: the table of handover.md, section 3, where the worker lives.
#[tokio::test]
async fn a_daemon_that_dies_in_a_migration_finds_its_worker() {
    // Who dies where, and whether the source keeps the machine.
    let cells = [
        (true, "after:source-start-copy", true),
        (true, "after:source-persist-quiesced", true),
        (true, "before:source-persist-handed-over", true),
        (true, "after:source-persist-handed-over", false),
        (false, "after:destination-persist-entered", false),
    ];
    for (source, point, stays) in cells {
        let dir = tempfile::tempdir().expect("tempdir");
        let (here, there) = (dir.path().join("a"), dir.path().join("b"));
        let workers = [Workers::of(&here), Workers::of(&there)];
        let held = ["--isolation", "process", "--hold-at", point];
        let mut a = Host::start(&here, if source { &held } else { &OPTIONS }).await;
        let mut b = Host::start(&there, if source { &OPTIONS } else { &held }).await;
        a.create("vm", probe_spec(1, 16)).await;
        let vm = a.start_vm("vm").await;
        let worker = identity(&vm);
        let before = a.until_counting("vm").await;
        a.migrate("vm", b.arrival()).await;
        let victim = if source { &mut a } else { &mut b };
        victim.kill_at_hold().await;
        victim.restart_with(&OPTIONS).await;
        let (keeper, other) = if stays { (&a, &b) } else { (&b, &a) };
        let begin = Instant::now();
        let found = loop {
            let found = keeper.list().await;
            if let Some(vm) = found.iter().find(|vm| vm.observed_state() == State::Running) {
                break vm.clone();
            }
            assert!(begin.elapsed() < DEADLINE, "{point}: it does not run: {found:?}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        };
        assert!(found.epoch > vm.epoch, "{point}: every decision burns an epoch: {found:?}");
        assert_eq!(stays, identity(&found) == worker, "{point}: {found:?}");
        until_beyond(keeper, "vm", &before).await;
        // Nothing runs on the other host, and what is left there ends.
        assert!(other.list().await.iter().all(|vm| vm.observed_state() != State::Running), "{point}");
        let begin = Instant::now();
        while workers.iter().map(|w| w.alive().len()).sum::<usize>() != 1 {
            assert!(begin.elapsed() < DEADLINE, "{point}: two workers");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        keeper.delete("vm").await;
        assert!(workers.iter().all(|w| w.alive().is_empty()), "{point}");
    }
}

/// The source dies after its decision, the destination before it has entered: the destination gives the machine back, and
/// the copy that outlived the source's daemon goes on.
#[tokio::test]
async fn a_machine_that_is_given_back_goes_on_in_the_worker_that_was_kept() {
    given_back(false).await;
}

/// The same while that worker does not answer: it holds the only copy, so it is asked until it does.
#[tokio::test]
async fn a_worker_that_is_silent_when_its_machine_is_given_back_is_waited_for() {
    given_back(true).await;
}

async fn given_back(silent: bool) {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there) = (dir.path().join("a"), dir.path().join("b"));
    let workers = [Workers::of(&here), Workers::of(&there)];
    let held = ["--isolation", "process", "--hold-at", "after:source-persist-handed-over"];
    let (mut a, mut b) = (Host::start(&here, &held).await, Host::start(&there, &OPTIONS).await);
    a.create("vm", probe_spec(1, 16)).await;
    let vm = a.start_vm("vm").await;
    let worker = identity(&vm);
    let before = a.until_counting("vm").await;
    a.migrate("vm", b.arrival()).await;
    a.kill_at_hold().await;
    b.kill().await;
    // A complete copy would be told to go on; without its worker there is none.
    for copy in workers[1].alive() {
        kill_process(pid(copy.pid), Signal::KILL).expect("SIGKILL");
        until_gone(&copy).await;
    }
    if silent {
        // The source cannot decide before it has its answer, so its worker has been attached and is not asked yet.
        a.restart_with(&["--isolation", "process", "--handover-timeout", "500"]).await;
        kill_process(pid(worker.pid), Signal::STOP).expect("SIGSTOP");
        b.restart().await;
        // It has been given back, and the worker's deadline has passed more than once.
        let asked = || {
            let log = std::fs::read_to_string(here.join("log")).expect("log");
            log.matches("a worker with a copy is asked again").count()
        };
        let begin = Instant::now();
        while asked() < 2 {
            assert!(begin.elapsed() < DEADLINE, "asked {} times", asked());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let shown = a.get("vm").await;
        assert_ne!(shown.observed_state(), State::Failed, "{shown:?}");
        assert!(lives(&worker), "the only copy was ended");
        kill_process(pid(worker.pid), Signal::CONT).expect("SIGCONT");
    } else {
        b.restart().await;
        a.restart_with(&OPTIONS).await;
    }
    let back = a.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!((back.worker_pid, back.epoch), (worker.pid, 3), "{back:?}");
    assert!(back.moved_to.is_empty() && back.migration.is_empty(), "{back:?}");
    until_beyond(&a, "vm", &before).await;
    assert!(b.list().await.is_empty());
    a.delete("vm").await;
    until_gone(&worker).await;
    assert!(workers.iter().all(|w| w.alive().is_empty()));
    assert_eq!((a.terminate().await, b.terminate().await), (0, 0));
}

/// SIGTERM in the middle of a copy: the migration is aborted, and the machine runs on without its daemon and after it.
#[tokio::test]
async fn sigterm_in_a_migration_leaves_the_machine_running() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (here, there) = (dir.path().join("a"), dir.path().join("b"));
    let workers = [Workers::of(&here), Workers::of(&there)];
    let (mut a, mut b) = (Host::start(&here, &OPTIONS).await, Host::start(&there, &OPTIONS).await);
    let probe = ProbeBoot { fill_bytes: 32 << 20, ..ProbeBoot::default() };
    let boot = Some(virtual_machine_spec::Boot::Probe(probe));
    a.create("vm", VirtualMachineSpec { boot, ..probe_spec(1, 64) }).await;
    let worker = identity(&a.start_vm("vm").await);
    let before = a.until_counting("vm").await;
    let spec = MigrationSpec { max_bandwidth: 1 << 20, ..b.arrival() };
    a.migrate("vm", spec).await;
    a.until("vm", "MIGRATING_OUT", is(State::MigratingOut)).await;
    assert_eq!(a.terminate().await, 0);
    assert!(lives(&worker), "it outlives the daemon");
    a.restart().await;
    let after = a.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!(after.worker_pid, worker.pid, "{after:?}");
    until_beyond(&a, "vm", &before).await;
    let list = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
    let list = a.migrations().await.list_migrations(list).await.expect("lists");
    let ended = list.into_inner().migrations;
    assert!(
        ended.iter().all(|m| matches!(m.state(), migration::State::Failed | migration::State::Cancelled)),
        "{ended:?}"
    );
    // A second one gets through, once the destination has dropped what had come of the first.
    let begin = Instant::now();
    while !b.list().await.is_empty() {
        assert!(begin.elapsed() < DEADLINE, "what began to arrive there stays");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let operation = a.migrate("vm", b.arrival()).await;
    a.finish(operation).await.expect("migrated");
    until_gone(&worker).await;
    b.delete("vm").await;
    assert!(workers.iter().all(|w| w.alive().is_empty()));
    assert_eq!((a.terminate().await, b.terminate().await), (0, 0));
}
