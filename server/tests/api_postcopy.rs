//! Post-copy between two real vpmud processes with a worker process each: on KVM where it is, else simulated.

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use support::wire::{cut, tcp};
use support::*;
use tonic::{Code, Streaming};
use vcpu_worker::memory::GuestMemory;
use vcpu_worker::probe::{ProbeConfig, verify_memory};
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::Operation;

/// Guest memory, MiB.
const MEMORY: u64 = 64;
/// Written once at the start.
const FILL: u64 = 8 << 20;
/// Written again and again, as fast as the guest can.
const WORKING_SET: u64 = 12 << 20;
/// Bytes a second of the link.
const LINK: u64 = 16 << 20;

/// Ends every worker that a test leaves, also when it panics. Made before the hosts, so that it is dropped after them.
struct Leftovers(PathBuf);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for worker in ["a", "b"].iter().flat_map(|side| workers(&self.0.join(side))) {
            let _ = kill_process(pid(worker.pid), Signal::KILL);
        }
    }
}

fn workers(host: &Path) -> Vec<Identity> {
    let entries = std::fs::read_dir(host.join("state/run")).into_iter().flatten().flatten();
    entries.filter_map(|e| Identity::read(&e.path())).filter(lives).collect()
}

fn lives(identity: &Identity) -> bool {
    Identity::of(identity.pid).is_ok_and(|now| now == *identity)
}

fn pid(pid: u32) -> Pid {
    Pid::from_raw(pid.cast_signed()).expect("a pid")
}

struct Pair {
    _dir: tempfile::TempDir,
    _leftovers: Leftovers,
    a: Host,
    b: Host,
}

async fn pair(more: &[&str]) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let hypervisor = if have_kvm() { "kvm" } else { "simulated" };
    let mut options = vec!["--hypervisor", hypervisor, "--isolation", "process"];
    options.extend(more);
    let leftovers = Leftovers(dir.path().to_owned());
    let a = Host::start(&dir.path().join("a"), &options).await;
    let b = Host::start(&dir.path().join("b"), &options).await;
    Pair { _dir: dir, _leftovers: leftovers, a, b }
}

fn probe() -> ProbeBoot {
    ProbeBoot { fill_bytes: FILL, working_set_bytes: WORKING_SET, ..ProbeBoot::default() }
}

/// A machine that has filled its memory and writes its working set again and again.
async fn busy(host: &Host) {
    let boot = Some(virtual_machine_spec::Boot::Probe(probe()));
    host.create("vm", VirtualMachineSpec { boot, ..probe_spec(1, MEMORY) }).await;
    host.start_vm("vm").await;
    // It counts before it writes: a guest that shares its core with other tests may take long to get there, and one that
    // has not written anything yet moves at once.
    let begin = Instant::now();
    while host.live_pmu("vm").await.probe.expect("a report").vcpus[0].pages_dirtied
        < (FILL + WORKING_SET) >> 12
    {
        assert!(begin.elapsed() < DEADLINE, "the guest does not write");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// More than the link can do within the goal, also for a guest that shares its core with other tests.
fn hard(to: String) -> MigrationSpec {
    MigrationSpec {
        destination: to,
        max_bandwidth: LINK,
        max_blackout: Some(prost_types::Duration { seconds: 0, nanos: 20_000_000 }),
        allow_postcopy: true,
        ..MigrationSpec::default()
    }
}

async fn begin(from: &Host, spec: MigrationSpec) -> (Operation, String, Streaming<Migration>) {
    let request =
        CreateMigrationRequest { parent: name("vm"), spec: Some(spec), ..CreateMigrationRequest::default() };
    let mut client = from.migrations().await;
    let operation = client.create_migration(request).await.expect("accepted").into_inner();
    let migration: Migration = unpack(operation.metadata.as_ref().expect("metadata"));
    let request = WatchMigrationRequest { name: migration.name.clone() };
    let watch = client.watch_migration(request).await.expect("watches").into_inner();
    (operation, migration.name, watch)
}

async fn next(watch: &mut Streaming<Migration>) -> Migration {
    let message = tokio::time::timeout(DEADLINE, watch.message()).await.expect("in time");
    message.expect("a stream").expect("an open one")
}

/// Follows it until memory follows.
async fn until_following(watch: &mut Streaming<Migration>) -> Migration {
    loop {
        let now = next(watch).await;
        let missing = now.progress.map_or(0, |p| p.missing_pages);
        match now.state() {
            migration::State::Postcopy if missing > 0 => return now,
            migration::State::Succeeded | migration::State::Failed | migration::State::Cancelled => {
                panic!("it ended before: {now:?}")
            }
            _ => {}
        }
    }
}

fn missing(migration: &Migration) -> u64 {
    migration.progress.expect("progress").missing_pages
}

async fn until_gone(identity: &Identity) {
    let begin = Instant::now();
    while lives(identity) {
        assert!(begin.elapsed() < DEADLINE, "{identity:?} does not end");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// The worker's guest memory, which must be whole: reading a page through another mapping makes it one of zeros.
fn memory(pid: u32) -> GuestMemory {
    let entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a worker").flatten();
    let open = |path: PathBuf| {
        let name = std::fs::read_link(&path).ok()?;
        let file = std::fs::File::options().read(true).write(true).open(&path).ok()?;
        let guest = name.to_string_lossy().starts_with("/memfd:");
        guest.then(|| GuestMemory::from_fd(file.into(), MEMORY << 20).ok()).flatten()
    };
    let mut found: Vec<_> = entries.filter_map(|e| open(e.path())).collect();
    assert_eq!(found.len(), 1, "process {pid} holds one guest's memory");
    found.remove(0)
}

async fn pause(host: &Host) {
    let request = PauseVirtualMachineRequest { name: name("vm") };
    host.vms().await.pause_virtual_machine(request).await.expect("pauses");
}

async fn resume(host: &Host) {
    let request = ResumeVirtualMachineRequest { name: name("vm") };
    host.vms().await.resume_virtual_machine(request).await.expect("resumes");
}

/// Every page that the guest wrote is as it wrote it, and its counters tell of every event once.
async fn whole(host: &Host) {
    let before = host.until_counting("vm").await;
    pause(host).await;
    let vm = host.get("vm").await;
    let config = ProbeConfig::from_boot(&probe(), 1, MEMORY << 20, 2_000_000, None);
    let pages = verify_memory(&memory(vm.worker_pid), &config).expect("what the guest wrote");
    assert_eq!(pages, (FILL + WORKING_SET) >> 12);
    let pmu = host.live_pmu("vm").await;
    let reports = pmu.probe.as_ref().map(|p| p.vcpus.clone()).expect("a report");
    assert_eq!((pmu.vcpus.len(), reports.len()), (1, 1));
    for (vcpu, report) in pmu.vcpus.iter().zip(&reports) {
        let value = |name: &str| vcpu.counters.iter().find(|c| c.name == name).map(|c| c.value);
        assert_eq!(value("gp0"), value("fixed0"), "instructions, counted twice: {vcpu:?}");
        assert_eq!(value("gp1"), value("fixed1"), "cycles, counted twice: {vcpu:?}");
        let taken = report.pmis..=report.pmis + 1;
        assert!(taken.contains(&vcpu.pmis), "{} interrupts raised, {} taken", vcpu.pmis, report.pmis);
        assert_eq!(report.faults, 0, "{report:?}");
    }
    resume(host).await;
    let loops = before.probe.expect("a report").vcpus[0].loops;
    let begin = Instant::now();
    while host.live_pmu("vm").await.probe.expect("a report").vcpus[0].loops <= loops {
        assert!(begin.elapsed() < DEADLINE, "the guest does not go on");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn what_copying_cannot_keep_up_with_moves_first_and_its_memory_follows() {
    let Pair { _dir, _leftovers, a, b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (operation, migration, mut watch) = begin(&a, hard(b.peer())).await;
    let following = until_following(&mut watch).await;

    // It runs there, and its source cannot run.
    b.until("vm", "running", is(State::Running)).await;
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let started = a.vms().await.start_virtual_machine(start).await;
    expect_error(started, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
    let cancel = CancelMigrationRequest { name: migration };
    expect_error(
        a.migrations().await.cancel_migration(cancel).await,
        Code::FailedPrecondition,
        "MIGRATION_COMMITTED",
    );
    // No second migration before all of it is there.
    let back = CreateMigrationRequest {
        parent: name("vm"),
        spec: Some(MigrationSpec { destination: a.peer(), ..MigrationSpec::default() }),
        ..CreateMigrationRequest::default()
    };
    let refused = match b.migrations().await.create_migration(back).await {
        Ok(operation) => b.finish(operation.into_inner()).await.expect_err("refused").message,
        Err(status) => status.message().to_owned(),
    };
    println!("a second migration meanwhile: {refused}");
    let stats = GetVirtualMachineStatsRequest { name: name("vm") };
    let stats = b.vms().await.get_virtual_machine_stats(stats).await.expect("figures").into_inner();
    let arriving = stats.arriving_memory.expect("memory arrives");

    let mut left = missing(&following);
    let last = loop {
        let now = next(&mut watch).await;
        match now.state() {
            migration::State::Postcopy => {
                assert!(missing(&now) <= left, "{} after {left} pages", missing(&now));
                left = missing(&now);
            }
            migration::State::Committed => {}
            _ => break now,
        }
    };
    let moved: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    assert_eq!((last.state(), missing(&moved)), (migration::State::Succeeded, 0));
    until_gone(&source).await;
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);

    let said: Vec<_> = moved.actions.iter().map(|action| (action.code.as_str(), &action.detail)).collect();
    let (code, detail) = said.last().expect("actions");
    assert_eq!(*code, "POSTCOPY", "{said:?}");
    assert!(detail.contains("pre-copy cannot meet the goals") && detail.contains("max_blackout"), "{detail}");
    let result = moved.result.expect("a result");
    println!(
        "blackout {} us, guest gap {:?} us, {} pages followed ({} placed when asked, {} faults), {} bytes, {} rounds, {:?}; {detail}",
        result.blackout_us,
        result.guest_gap_us,
        result.postcopy_pages,
        arriving.placed_pages,
        arriving.faults,
        result.bytes,
        result.rounds,
        result.breakdown
    );
    assert_eq!(result.mode, "postcopy");
    assert!(result.postcopy_pages >= missing(&following));
    // Most of what the guest writes all the time did not go while it stood still.
    assert!(result.postcopy_pages > WORKING_SET / 4096 / 2, "{result:?}");
    for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
        assert_eq!(
            (&stop.registers, &stop.digest, stop.pmis),
            (&resume.registers, &resume.digest, resume.pmis)
        );
    }
    whole(&b).await;
    // And back, in the usual way.
    pause(&b).await;
    let spec = MigrationSpec { destination: a.peer(), ..MigrationSpec::default() };
    let (operation, _, _watch) = begin(&b, spec).await;
    let moved: Migration = unpack(&b.finish(operation).await.expect("migrated"));
    assert_eq!(moved.result.expect("a result").mode, "precopy");
    resume(&a).await;
    whole(&a).await;
    a.stop_vm("vm").await;
}

/// So slow that there is time to look at it, or to disturb it, while memory follows.
fn slow(to: String) -> MigrationSpec {
    MigrationSpec {
        destination: to,
        max_bandwidth: LINK / 4,
        max_blackout: Some(prost_types::Duration { seconds: 0, nanos: 100_000_000 }),
        mode: migration_spec::Mode::Postcopy.into(),
        ..MigrationSpec::default()
    }
}

#[tokio::test]
async fn the_source_is_kept_until_the_last_page_has_arrived() {
    let Pair { _dir, _leftovers, a, b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (operation, _, mut watch) = begin(&a, slow(b.peer())).await;
    until_following(&mut watch).await;
    let there = workers(&b.dir);
    assert_eq!(there.len(), 1);
    // A destination that stands still gets nothing: there is no end until it goes on.
    kill_process(pid(there[0].pid), Signal::STOP).expect("stopped");
    for _ in 0..10 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert!(lives(&source), "pages are missing and their source has ended");
        assert_eq!(a.get("vm").await.observed_state(), State::MigratingOut);
    }
    kill_process(pid(there[0].pid), Signal::CONT).expect("goes on");
    let moved: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    assert_eq!(moved.result.expect("a result").mode, "postcopy");
    until_gone(&source).await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn it_never_moves_first_unless_that_is_allowed() {
    let Pair { _dir, _leftovers, a, b } = pair(&[]).await;
    busy(&a).await;
    let spec = MigrationSpec {
        allow_postcopy: false,
        max_duration: Some(prost_types::Duration { seconds: 4, nanos: 0 }),
        ..hard(b.peer())
    };
    let (operation, migration, _watch) = begin(&a, spec).await;
    let error = a.finish(operation).await.expect_err("it does not converge");
    assert_eq!(reason_of(&error), "PRECOPY_MAX_DURATION", "{error:?}");
    let request = GetMigrationRequest { name: migration };
    let ended = a.migrations().await.get_migration(request).await.expect("kept").into_inner();
    assert!(ended.actions.iter().all(|action| !action.code.starts_with("POSTCOPY")), "{:?}", ended.actions);
    assert_eq!(a.get("vm").await.observed_state(), State::Running);
    whole(&a).await;
    // The two do not go together.
    let both = MigrationSpec { mode: migration_spec::Mode::PrecopyOnly.into(), ..hard(b.peer()) };
    let request =
        CreateMigrationRequest { parent: name("vm"), spec: Some(both), ..CreateMigrationRequest::default() };
    let refused = a.migrations().await.create_migration(request).await;
    expect_error(refused, Code::InvalidArgument, "MODE_CONFLICT");
    // One that is paused dirties nothing: nothing is left for later, and it stays paused.
    pause(&a).await;
    let (operation, _, _watch) = begin(&a, MigrationSpec { max_bandwidth: 0, ..slow(b.peer()) }).await;
    let moved: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    let result = moved.result.expect("a result");
    assert_eq!((result.mode.as_str(), result.postcopy_pages), ("precopy", 0));
    assert_eq!(b.get("vm").await.observed_state(), State::Paused);
    resume(&b).await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn a_destination_that_cannot_wait_for_pages_gets_all_of_them_first_or_none() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: to take userfaultfd from a daemon needs root");
        return;
    }
    let isolated = ["--hypervisor", if have_kvm() { "kvm" } else { "simulated" }, "--isolation", "process"];
    let dir = tempfile::tempdir().expect("tempdir");
    let _leftovers = Leftovers(dir.path().to_owned());
    let a = Host::start(&dir.path().join("a"), &isolated).await;
    let b = Host::start_without_userfaultfd(&dir.path().join("b"), &isolated).await;
    busy(&a).await;
    let max_duration = Some(prost_types::Duration { seconds: 3, nanos: 0 });
    for spec in [hard(b.peer()), MigrationSpec { max_bandwidth: LINK, ..slow(b.peer()) }] {
        let (operation, migration, _watch) = begin(&a, MigrationSpec { max_duration, ..spec }).await;
        let error = a.finish(operation).await.expect_err("it does not converge");
        assert_eq!(reason_of(&error), "PRECOPY_MAX_DURATION", "{error:?}");
        let request = GetMigrationRequest { name: migration };
        let ended = a.migrations().await.get_migration(request).await.expect("kept").into_inner();
        let said: Vec<_> = ended.actions.iter().map(|action| action.code.as_str()).collect();
        assert!(said.contains(&"POSTCOPY_UNAVAILABLE") && !said.contains(&"POSTCOPY"), "{said:?}");
        let why = ended.actions.iter().find(|action| action.code == "POSTCOPY_UNAVAILABLE");
        assert!(why.is_some_and(|action| action.detail.contains("no userfaultfd")), "{why:?}");
        assert_eq!(a.get("vm").await.observed_state(), State::Running);
    }
    // What needs no page later goes there as to anybody.
    pause(&a).await;
    let spec = MigrationSpec { max_bandwidth: 0, ..slow(b.peer()) };
    let (operation, _, _watch) = begin(&a, spec).await;
    let moved: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    assert!(moved.actions.iter().any(|action| action.code == "POSTCOPY_UNAVAILABLE"), "{:?}", moved.actions);
    assert_eq!(moved.result.expect("a result").mode, "precopy");
    resume(&b).await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn a_cut_connection_is_opened_anew_and_the_rest_follows() {
    let Pair { _dir, _leftovers, a, b } = pair(&["--peer-listen", "tcp:127.0.0.1:0"]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (operation, _, mut watch) = begin(&a, MigrationSpec { require_tls: true, ..slow(tcp(&b)) }).await;
    until_following(&mut watch).await;
    assert_eq!(cut(source.pid), 1, "the one data connection");
    let moved: Migration = unpack(&a.finish(operation).await.expect("migrated"));
    let result = moved.result.expect("a result");
    assert_eq!((result.mode.as_str(), result.transport.as_str()), ("postcopy", "tcp+tls"));
    // The one that arrived lives, and so does what it said.
    let said = std::fs::read_dir(b.dir.join("state/run")).expect("runtime directories").flatten();
    let said: String =
        said.filter_map(|entry| std::fs::read_to_string(entry.path().join("log")).ok()).collect();
    assert!(said.contains("waiting for it to come back"), "{said}");
    until_gone(&source).await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

/// What a guest's end says where the source's host has told that its worker is gone; a destination that has to find that
/// out for itself waits for twenty seconds, and says that.
const TOLD: &str = "the source's worker has ended, as its host says";

#[tokio::test]
async fn a_source_that_dies_while_memory_follows_ends_the_guest_by_name() {
    let Pair { _dir, _leftovers, a, b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (operation, _, mut watch) = begin(&a, slow(b.peer())).await;
    until_following(&mut watch).await;
    b.until("vm", "running", is(State::Running)).await;
    kill_process(pid(source.pid), Signal::KILL).expect("killed");
    let error = a.finish(operation).await.expect_err("its memory is lost");
    assert_eq!(reason_of(&error), "POSTCOPY_SOURCE_LOST", "{error:?}");
    let lost = b.until("vm", "failed", is(State::Failed)).await;
    assert_eq!(lost.reason, "POSTCOPY_SOURCE_LOST", "{lost:?}");
    assert!(lost.message.contains(TOLD), "{lost:?}");
    // What was here is not the machine any more; it may be started afresh where it belongs.
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
    let start = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let refused = a.vms().await.start_virtual_machine(start).await;
    expect_error(refused, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
    b.start_vm("vm").await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn a_source_that_dies_with_its_daemon_is_told_of_by_the_next_one() {
    let Pair { _dir, _leftovers, mut a, b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (_operation, _, mut watch) = begin(&a, slow(b.peer())).await;
    until_following(&mut watch).await;
    b.until("vm", "running", is(State::Running)).await;
    a.kill().await;
    kill_process(pid(source.pid), Signal::KILL).expect("killed");
    until_gone(&source).await;
    a.restart().await;
    let lost = b.until("vm", "failed", is(State::Failed)).await;
    assert_eq!(lost.reason, "POSTCOPY_SOURCE_LOST", "{lost:?}");
    assert!(lost.message.contains(TOLD), "{lost:?}");
    a.until("vm", "moved", is(State::Moved)).await;
    b.start_vm("vm").await;
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn both_daemons_may_be_replaced_while_memory_follows() {
    let Pair { _dir, _leftovers, mut a, mut b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (_operation, migration, mut watch) = begin(&a, slow(b.peer())).await;
    until_following(&mut watch).await;
    b.until("vm", "running", is(State::Running)).await;
    let there = workers(&b.dir);
    assert_eq!(there.len(), 1);
    // Nothing can end meanwhile.
    kill_process(pid(there[0].pid), Signal::STOP).expect("stopped");
    a.kill().await;
    a.restart().await;
    assert!(lives(&source), "the one that has the pages was ended");
    kill_process(pid(there[0].pid), Signal::CONT).expect("goes on");
    b.kill().await;
    b.restart().await;
    let begin = Instant::now();
    let ended = loop {
        let request = GetMigrationRequest { name: migration.clone() };
        let now = a.migrations().await.get_migration(request).await.expect("kept").into_inner();
        if now.end_time.is_some() {
            break now;
        }
        assert!(begin.elapsed() < DEADLINE, "it does not end: {now:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    assert_eq!(ended.state(), migration::State::Succeeded, "{ended:?}");
    until_gone(&source).await;
    a.until("vm", "moved", is(State::Moved)).await;
    assert_eq!(b.get("vm").await.worker_pid, there[0].pid);
    whole(&b).await;
    b.stop_vm("vm").await;
}

#[tokio::test]
async fn a_machine_that_is_stopped_while_its_memory_follows_lets_its_source_go() {
    let Pair { _dir, _leftovers, a, b } = pair(&[]).await;
    busy(&a).await;
    let source = Identity::of(a.get("vm").await.worker_pid).expect("lives");
    let (operation, _, mut watch) = begin(&a, slow(b.peer())).await;
    until_following(&mut watch).await;
    b.until("vm", "running", is(State::Running)).await;
    pause(&b).await;
    let stopped = b.stop_vm("vm").await;
    assert_eq!(stopped.observed_state(), State::Stopped, "{stopped:?}");
    let error = a.finish(operation).await.expect_err("not all of it went over");
    assert_eq!(reason_of(&error), "POSTCOPY_DESTINATION_LOST", "{error:?}");
    until_gone(&source).await;
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);
    b.start_vm("vm").await;
    whole(&b).await;
    b.stop_vm("vm").await;
}
