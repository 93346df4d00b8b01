//! ForceOwner and `vpmud store fence` with real daemons: a host that is gone, the one that takes its machine, and the
//! first when it comes back.
#![allow(missing_docs)]

mod support;

use std::time::Instant;

use rustix::process::Signal;
use support::*;
use tonic::Code;
use vpmu_proto::api::force_owner_request::{Attestation, Evidence};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::virtual_machine_spec::RestartPolicy;
use vpmu_proto::api::*;

const THREAD: [&str; 6] =
    ["--isolation", "thread", "--hypervisor", "simulated", "--handover-timeout", "2000"];
const PROCESS: [&str; 6] =
    ["--isolation", "process", "--hypervisor", "simulated", "--handover-timeout", "2000"];

/// Two hosts, dropped before their directory.
struct Pair {
    a: Host,
    b: Host,
    _dir: tempfile::TempDir,
}

impl Pair {
    async fn start(options: &[&str], hold_a: Option<&str>, hold_b: Option<&str>) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let with = |hold: Option<&'static str>| -> Vec<&str> {
            options.iter().copied().chain(hold.into_iter().flat_map(|h| ["--hold-at", h])).collect()
        };
        let (hold_a, hold_b) = (hold_a.map(leak), hold_b.map(leak));
        let a = Host::start(&dir.path().join("a"), &with(hold_a)).await;
        let b = Host::start(&dir.path().join("b"), &with(hold_b)).await;
        Self { a, b, _dir: dir }
    }
}

fn leak(text: &str) -> &'static str {
    String::from(text).leak()
}

impl Drop for Pair {
    fn drop(&mut self) {
        // Workers outlive their daemons here; none may outlive its test.
        for host in [&self.a, &self.b] {
            for entry in std::fs::read_dir(host.dir.join("state/run")).into_iter().flatten().flatten() {
                let worker = vcpu_worker::process::Identity::read(&entry.path());
                if let Some(worker) = worker
                    && vcpu_worker::process::Identity::of(worker.pid).is_ok_and(|now| now == worker)
                {
                    kill(worker.pid);
                }
            }
        }
    }
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
    let _ = rustix::process::kill_process(pid, Signal::KILL);
}

fn host_id(host: &Host) -> String {
    host.ready["host_id"].as_str().expect("a host id").to_owned()
}

/// Two hosts, and a machine that has moved from the first to the second.
async fn moved() -> Pair {
    let pair = Pair::start(&THREAD, None, None).await;
    pair.a.create("vm", spec()).await;
    pair.a.start_vm("vm").await;
    let operation = pair.a.migrate("vm", pair.b.arrival()).await;
    pair.a.finish(operation).await.expect("moved");
    pair
}

async fn force(host: &Host, evidence: impl Into<Option<Evidence>>) -> Result<VirtualMachine, tonic::Status> {
    let evidence = evidence.into();
    let request = ForceOwnerRequest { name: name("vm"), evidence, reason: "it burnt".to_owned() };
    Ok(host.migrations().await.force_owner(request).await?.into_inner())
}

fn word(host: &str) -> Evidence {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").expect("a boot id");
    let boot_id = boot_id.trim().to_owned();
    Evidence::Attestation(Attestation { host_id: host.to_owned(), boot_id, epoch: 0 })
}

fn token(text: &str) -> Evidence {
    Evidence::FenceToken(text.to_owned())
}

fn spec() -> VirtualMachineSpec {
    VirtualMachineSpec { restart_policy: RestartPolicy::Always.into(), ..probe_spec(1, 16) }
}

async fn superseded(host: &Host, owner: &str) {
    let vm = host.until("vm", "superseded", |vm| vm.reason == "SUPERSEDED").await;
    assert_eq!((vm.observed_state(), vm.moved_to.as_str()), (State::Moved, owner), "{vm:?}");
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let refused = host.vms().await.start_virtual_machine(start).await;
    expect_error(refused, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
}

/// A machine moved to a host that dies; its first host takes it by the token of the other's directory.
#[tokio::test(flavor = "multi_thread")]
async fn a_fenced_directory_gives_the_machine_up_for_good() {
    let mut pair = moved().await;
    let Pair { a, b, _dir } = &mut pair;
    let (id_a, id_b) = (host_id(a), host_id(b));

    // Evidence that is missing, unreadable, about another host, or contradicted.
    expect_error(force(a, None::<Evidence>).await, Code::InvalidArgument, "EVIDENCE_REQUIRED");
    expect_error(force(a, token("vpmu-fence-1-00-00")).await, Code::InvalidArgument, "BAD_TOKEN");
    expect_error(force(a, word("nobody")).await, Code::InvalidArgument, "BAD_ID");
    expect_error(force(a, word(&id_a)).await, Code::FailedPrecondition, "EVIDENCE_OF_THIS_HOST");
    expect_error(force(a, word(&id_b)).await, Code::FailedPrecondition, "HOST_ANSWERS");
    expect_error(force(b, word(&id_a)).await, Code::FailedPrecondition, "NOTHING_TO_FORCE");
    assert!(fence(&b.dir, &[]).expect_err("it runs").contains("in use"));
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
    assert_eq!(b.get("vm").await.observed_state(), State::Running);

    b.kill().await;
    let other = uuid::Uuid::new_v4().to_string();
    assert!(fence(&b.dir, &["--to", &id_b]).expect_err("itself").contains("FENCE_TO_ITSELF"));
    let fenced = fence(&b.dir, &[]).expect("fenced");
    assert_eq!(fence(&b.dir, &["--to", &id_a]).expect("again"), fenced);
    assert!(fence(&b.dir, &["--to", &other]).expect_err("another").contains("FENCED_FOR_ANOTHER"));

    let vm = force(a, token(&fenced)).await.expect("forced");
    assert_eq!((vm.observed_state(), vm.reason.as_str(), vm.epoch), (State::Failed, "FORCED", 4), "{vm:?}");
    let again = force(a, token(&fenced)).await.expect("the same");
    assert_eq!((again.epoch, again.etag), (vm.epoch, vm.etag));
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    assert_eq!(force(a, token(&fenced)).await.expect("the same").observed_state(), State::Running);

    // It comes back, with a policy that would start it, and cannot even ask: its own journal says it.
    a.signal(Signal::STOP);
    a.until_held().await;
    b.restart().await;
    superseded(b, &id_a).await;
    a.signal(Signal::CONT);
    assert_eq!(a.get("vm").await.observed_state(), State::Running);
    let request = DeleteVirtualMachineRequest { name: name("vm"), ..Default::default() };
    let deleted = b.vms().await.delete_virtual_machine(request).await.expect("accepted").into_inner();
    b.finish(deleted).await.expect("the tombstone goes");

    // What was forced stays so.
    a.kill().await;
    a.restart().await;
    assert_eq!(a.get("vm").await.epoch, 4);
}

/// The same on an operator's word; the host that was declared dead finds out when it comes back.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_comes_back_asks_before_its_policy_acts() {
    let mut pair = moved().await;
    let Pair { a, b, _dir } = &mut pair;
    let (id_a, id_b) = (host_id(a), host_id(b));
    b.kill().await;
    let vm = force(a, word(&id_b)).await.expect("forced");
    assert_eq!((vm.observed_state(), vm.reason.as_str(), vm.epoch), (State::Failed, "FORCED", 4), "{vm:?}");
    assert_eq!(force(a, word(&id_b)).await.expect("the same").etag, vm.etag);
    a.start_vm("vm").await;
    b.restart().await;
    superseded(b, &id_a).await;
    assert_eq!(a.get("vm").await.observed_state(), State::Running);
    // Its log is whole once it has ended.
    assert_eq!(b.terminate().await, 0);
    let log = std::fs::read_to_string(b.dir.join("log")).expect("a log");
    assert!(!log.contains("the restart policy starts it again"), "{log}");
    b.restart().await;
    superseded(b, &id_a).await;
}

/// A word that was false: the host was only cut off. It is told, asks, and ends what it has.
#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_was_only_cut_off_yields_once_it_is_told() {
    let mut pair = moved().await;
    let Pair { a, b, _dir } = &mut pair;
    let (id_a, id_b) = (host_id(a), host_id(b));
    b.signal(Signal::STOP);
    b.until_held().await;
    let forced = force(a, word(&id_b)).await;
    b.signal(Signal::CONT);
    assert_eq!(forced.expect("forced").epoch, 4);
    superseded(b, &id_a).await;
}

/// The destination dies between the commit and Entered: its fenced directory proves that the source's copy is the
/// newest. `hold`: where the source is killed in the middle of being forced.
async fn the_copy_at_the_source_goes_on(hold: Option<&str>) {
    let mut pair = Pair::start(&PROCESS, hold, Some("before:destination-persist-entered")).await;
    let Pair { a, b, _dir } = &mut pair;
    a.create("vm", probe_spec(1, 16)).await;
    a.start_vm("vm").await;
    let before = a.until_counting("vm").await;
    a.migrate("vm", b.arrival()).await;
    b.until_held().await;
    b.kill().await;
    assert!(fence(&b.dir, &[]).expect_err("its worker lives").contains("WORKER_ALIVE"));
    let fenced = fence(&b.dir, &["--end-worker"]).expect("fenced");
    if hold.is_some() {
        let mut client = a.migrations().await;
        let (name, evidence) = (name("vm"), Some(token(&fenced)));
        let request = ForceOwnerRequest { name, evidence, reason: "it burnt".to_owned() };
        let asked = tokio::spawn(async move { client.force_owner(request).await });
        a.kill_at_hold().await;
        asked.await.expect("no panic").expect_err("it died");
        a.restart_with(&PROCESS).await;
    }
    let vm = force(a, token(&fenced)).await.expect("forced");
    assert_eq!(vm.epoch, 4, "{vm:?}");
    let vm = a.until("vm", "running", is(State::Running)).await;
    assert_eq!((vm.epoch, vm.moved_to.as_str()), (4, ""), "{vm:?}");
    let begin = Instant::now();
    loop {
        let now = a.live_pmu("vm").await;
        let loops = |pmu: &Pmu| pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.loops).sum::<u64>();
        assert!(loops(&now) >= loops(&before), "it began afresh: {now:?}");
        if loops(&now) > loops(&before) {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "it does not go on");
    }
    b.restart_with(&PROCESS).await;
    assert!(b.list().await.is_empty(), "what had been arriving is forgotten");
    a.stop_vm("vm").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destination_that_had_not_entered_is_forced_out_and_the_copy_goes_on() {
    the_copy_at_the_source_goes_on(None).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_before_it_journals_the_force_is_asked_again() {
    the_copy_at_the_source_goes_on(Some("before:source-persist-owned")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_dies_after_it_journalled_the_force_goes_on() {
    the_copy_at_the_source_goes_on(Some("after:source-persist-owned")).await;
}

/// The source dies after it stopped the machine and before it committed: the destination's copy is the last, and the
/// fenced directory proves it.
#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_burns_before_its_commit_leaves_the_copy_to_the_destination() {
    let mut pair = Pair::start(&PROCESS, Some("before:source-persist-handed-over"), None).await;
    let Pair { a, b, _dir } = &mut pair;
    a.create("vm", probe_spec(1, 16)).await;
    let worker = a.start_vm("vm").await.worker_pid;
    let before = a.until_counting("vm").await;
    let mut client = a.migrations().await;
    let spec = Some(MigrationSpec { destination: b.peer(), ..MigrationSpec::default() });
    let request = CreateMigrationRequest { parent: name("vm"), spec, ..CreateMigrationRequest::default() };
    tokio::spawn(async move { client.create_migration(request).await.map(drop) });
    a.until_held().await;
    a.kill().await;
    kill(worker);
    // Nothing by itself: the source may have kept it.
    assert_eq!(b.get("vm").await.observed_state(), State::Incoming);
    let (id_a, id_b) = (host_id(a), host_id(b));
    let fenced = fence(&a.dir, &["--end-worker"]).expect("fenced");
    let vm = force(b, token(&fenced)).await.expect("forced");
    assert_eq!((vm.observed_state(), vm.epoch), (State::Running, 3), "{vm:?}");
    let now = b.until_counting("vm").await;
    let loops = |pmu: &Pmu| pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.loops).sum::<u64>();
    assert!(loops(&now) >= loops(&before), "it began afresh: {now:?}");
    a.restart_with(&PROCESS).await;
    superseded(a, &id_b).await;
    expect_error(force(a, word(&id_b)).await, Code::FailedPrecondition, "HOST_ANSWERS");
    assert_ne!(id_a, id_b);
    b.stop_vm("vm").await;
}
