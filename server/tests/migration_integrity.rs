//! What arrives is what was there: guest memory compared page by page while both copies stand still, and the PMU state
//! of every vCPU by digest over hop after hop.
//!
//! ```text
//! VPMU_INTEGRITY=200      migrations whose memory is compared; default 3
//! VPMU_INTEGRITY_HOPS=20  hops from host to host and back; default 6
//! VPMU_INTEGRITY_PMIS=100 hops that stop with a counter overflow whose interrupt the guest has not taken; default 6
//! ```

mod support;

use std::path::{Path, PathBuf};

use support::*;
use vcpu_worker::memory::GuestMemory;
use vcpu_worker::probe::layout;
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine_spec::DirtyTracking;
use vpmu_proto::api::*;

const MEMORY: u64 = 32;

fn times(name: &str, default: u32) -> u32 {
    std::env::var(name).ok().map_or(default, |n| n.parse().expect("a number"))
}

fn memory(pid: u32) -> GuestMemory {
    let mut entries = std::fs::read_dir(format!("/proc/{pid}/fd")).expect("a worker").flatten();
    let open = |path: PathBuf| {
        let name = std::fs::read_link(&path).ok()?;
        let file = std::fs::File::options().read(true).write(true).open(&path).ok()?;
        let guest = name.to_string_lossy().starts_with("/memfd:");
        guest.then(|| GuestMemory::from_fd(file.into(), MEMORY << 20).ok()).flatten()
    };
    entries.find_map(|e| open(e.path())).expect("guest memory")
}

fn workers(host: &Path) -> Vec<Identity> {
    let entries = std::fs::read_dir(host.join("state/run")).into_iter().flatten().flatten();
    let lives = |i: &Identity| Identity::of(i.pid).is_ok_and(|now| now == *i);
    entries.filter_map(|e| Identity::read(&e.path())).filter(lives).collect()
}

/// Ends workers that a failed test leaves.
struct Leftovers(PathBuf);

impl Drop for Leftovers {
    fn drop(&mut self) {
        for side in ["a", "b"] {
            for worker in workers(&self.0.join(side)) {
                let pid = rustix::process::Pid::from_raw(worker.pid.cast_signed()).expect("a pid");
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

fn spec(vcpus: u32) -> VirtualMachineSpec {
    let probe = ProbeBoot { working_set_bytes: 2 << 20, fill_bytes: 8 << 20, ..ProbeBoot::default() };
    VirtualMachineSpec { boot: Some(virtual_machine_spec::Boot::Probe(probe)), ..probe_spec(vcpus, MEMORY) }
}

fn to(host: &Host) -> CreateMigrationRequest {
    CreateMigrationRequest {
        parent: name("vm"),
        spec: Some(MigrationSpec { destination: host.peer(), ..MigrationSpec::default() }),
        ..CreateMigrationRequest::default()
    }
}

/// Pages that differ, without the word in which the host tells the guest that it was resumed; and pages that are not
/// zero.
fn compare(left: &GuestMemory, right: &GuestMemory) -> (Vec<u64>, u64) {
    let (mut ours, mut theirs) = (vec![0; 4096], vec![0; 4096]);
    let (mut different, mut used) = (Vec::new(), 0);
    for page in 0..left.pages() {
        left.read_at(page * 4096, &mut ours).expect("reads");
        right.read_at(page * 4096, &mut theirs).expect("reads");
        for bytes in [&mut ours, &mut theirs] {
            if page == (layout::block(0) + layout::R_MARK) / 4096 {
                let at = ((layout::block(0) + layout::R_MARK) % 4096) as usize;
                bytes[at..at + 8].fill(0);
            }
        }
        if ours != theirs {
            different.push(page);
        }
        used += u64::from(ours.iter().any(|b| *b != 0));
    }
    (different, used)
}

/// Moves a machine to and fro, and compares all of its memory each time; `look` at each worker that has it.
async fn equal_page_by_page(hypervisor: &str, spec: VirtualMachineSpec, n: u32, look: impl Fn(u32)) {
    let free = ["--isolation", "process", "--hypervisor", hypervisor];
    let held = [&free[..], &["--hold-at", "before:destination-grant"]].concat();
    let dir = tempfile::tempdir().expect("tempdir");
    let _leftovers = Leftovers(dir.path().to_owned());
    let mut here = Host::start(&dir.path().join("a"), &free).await;
    let mut there = Host::start(&dir.path().join("b"), &free).await;
    here.create("vm", spec).await;
    look(here.start_vm("vm").await.worker_pid);
    let mut pages = 0;
    for number in 0..n {
        here.until_counting("vm").await;
        let left = memory(here.get("vm").await.worker_pid);
        assert_eq!(there.terminate().await, 0);
        there.restart_with(&held).await;
        let operation = here.migrations().await.create_migration(to(&there)).await.expect("accepted");
        there.until_held().await;
        // Sealed there, complete here, and neither runs.
        let arrived = workers(&there.dir);
        assert_eq!(arrived.len(), 1, "migration {number}");
        let (different, used) = compare(&left, &memory(arrived[0].pid));
        assert!(different.is_empty(), "migration {number}: pages {different:?} differ");
        assert!(used * 4096 >= 2 << 20, "migration {number}: only {used} pages are used");
        look(arrived[0].pid);
        pages += left.pages();
        there.signal(rustix::process::Signal::CONT);
        let moved: Migration = unpack(&here.finish(operation.into_inner()).await.expect("moved"));
        assert!(moved.result.expect("a result").rounds > 0);
        std::mem::swap(&mut here, &mut there);
    }
    println!("{n} migrations, {pages} pages compared, none differs");
    let probe = here.live_pmu("vm").await.probe.expect("a report");
    assert!(probe.vcpus.iter().all(|v| v.faults == 0), "{probe:?}");
    here.stop_vm("vm").await;
}

#[tokio::test]
async fn memory_is_equal_page_by_page_after_each_migration() {
    equal_page_by_page("simulated", spec(1), times("VPMU_INTEGRITY", 3), |_| {}).await;
}

/// Dirty rings that a worker has mapped, one a vCPU: 64 KiB of KVM's, beside the page that every vCPU shares with it.
fn rings(pid: u32) -> usize {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).expect("maps");
    let of_vcpus = maps.lines().filter(|line| line.contains("anon_inode:kvm-vcpu"));
    let bytes = of_vcpus.map(|line| {
        let range = line.split_whitespace().next().and_then(|r| r.split_once('-')).expect("a range");
        let [start, end] = [range.0, range.1].map(|at| u64::from_str_radix(at, 16).expect("an address"));
        end - start
    });
    bytes.filter(|bytes| *bytes == 64 << 10).count()
}

/// A guest that dirties so many MiB at so many pages a second, tracked that way.
fn tracked(
    tracking: DirtyTracking,
    spec: VirtualMachineSpec,
    mib: u64,
    pages_per_second: u64,
) -> VirtualMachineSpec {
    let probe = ProbeBoot {
        working_set_bytes: mib << 20,
        fill_bytes: 8 << 20,
        dirty_pages_per_second: pages_per_second,
        ..ProbeBoot::default()
    };
    let boot = Some(virtual_machine_spec::Boot::Probe(probe));
    VirtualMachineSpec { boot, dirty_tracking: tracking.into(), ..spec }
}

/// The way that the spec asks for is the one that KVM tracks by, here and where the machine goes, and misses nothing.
#[tokio::test]
async fn memory_is_equal_by_either_kind_of_dirty_tracking() {
    if !have_kvm() {
        return;
    }
    for (tracking, expected) in [(DirtyTracking::Bitmap, 0), (DirtyTracking::Ring, 2)] {
        let spec = tracked(tracking, probe_spec(2, MEMORY), 4, 20_000);
        let look = |pid| assert_eq!(rings(pid), expected, "{tracking:?}");
        equal_page_by_page("kvm", spec, times("VPMU_INTEGRITY", 3).min(2), look).await;
    }
}

/// In the first round, which nobody collects before its end: a guest that writes more pages than its ring holds goes on.
#[tokio::test]
async fn a_full_ring_is_emptied_while_the_guest_runs() {
    /// Of a ring.
    const ENTRIES: u64 = 4096;
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let _leftovers = Leftovers(dir.path().to_owned());
    let options = ["--isolation", "process", "--hypervisor", "kvm"];
    let mut here = Host::start(&dir.path().join("a"), &options).await;
    let mut there = Host::start(&dir.path().join("b"), &options).await;
    let spec = tracked(DirtyTracking::Ring, probe_spec(1, 64), 24, 200_000);
    here.create("vm", spec).await;
    here.start_vm("vm").await;
    here.until_counting("vm").await;
    // So slow that it is in its first round to the end.
    let operation = here.migrate("vm", MigrationSpec { max_bandwidth: 64 << 10, ..there.arrival() }).await;
    let migration: Migration = unpack(operation.metadata.as_ref().expect("metadata"));
    let written = async || here.live_pmu("vm").await.probe.expect("a report").vcpus[0].pages_dirtied;
    let (begin, mut first) = (std::time::Instant::now(), None);
    loop {
        let request = GetMigrationRequest { name: migration.name.clone() };
        let now = here.migrations().await.get_migration(request).await.expect("there").into_inner();
        let round = now.progress.map_or(0, |p| p.round);
        assert!(now.end_time.is_none() && round <= 1, "it is no longer in its first round: {now:?}");
        let pages = written().await;
        if round == 1 && pages > *first.get_or_insert(pages) + 4 * ENTRIES {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "it stands still at {pages} pages, from {first:?} on");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    let cancel = CancelMigrationRequest { name: migration.name };
    here.migrations().await.cancel_migration(cancel).await.expect("cancelled");
    assert_eq!(reason_of(&here.finish(operation).await.expect_err("cancelled")), "CANCELLED");
    here.stop_vm("vm").await;
    assert_eq!((here.terminate().await, there.terminate().await), (0, 0));
}

#[tokio::test]
async fn counters_go_on_over_hops_from_host_to_host_and_back() {
    let hops = times("VPMU_INTEGRITY_HOPS", 6);
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--hypervisor", if have_kvm() { "kvm" } else { "simulated" }];
    let mut here = Host::start(&dir.path().join("a"), &options).await;
    let mut there = Host::start(&dir.path().join("b"), &options).await;
    here.create("vm", spec(2)).await;
    here.start_vm("vm").await;
    let mut last: Vec<Vec<u64>> = Vec::new();
    for hop in 0..hops {
        here.until_counting("vm").await;
        let operation = here.migrations().await.create_migration(to(&there)).await.expect("accepted");
        let moved: Migration = unpack(&here.finish(operation.into_inner()).await.expect("moved"));
        let result = moved.result.expect("a result");
        assert_eq!(result.pmu_at_stop.len(), 2, "hop {hop}");
        for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
            assert_eq!(stop.digest, resume.digest, "hop {hop}, vCPU {}", stop.vcpu);
            assert_eq!(stop.counters, resume.counters, "hop {hop}, vCPU {}", stop.vcpu);
            assert_eq!((stop.pmis, stop.pmi_pending), (resume.pmis, resume.pmi_pending), "hop {hop}");
        }
        // Counters that take no overflow, and the interrupts raised so far.
        let now: Vec<Vec<u64>> = result
            .pmu_at_stop
            .iter()
            .map(|v| {
                let free = v.counters.iter().filter(|c| c.live && !c.pmi_enabled).map(|c| c.value);
                free.chain([v.pmis]).collect()
            })
            .collect();
        for (vcpu, (old, new)) in last.iter().zip(&now).enumerate() {
            assert!(
                old.iter().zip(new).all(|(o, n)| n >= o),
                "hop {hop}, vCPU {vcpu}: {old:?}, then {new:?}"
            );
        }
        last = now;
        std::mem::swap(&mut here, &mut there);
    }
    let end = here.until_counting("vm").await;
    for (vcpu, report) in end.vcpus.iter().zip(&end.probe.as_ref().expect("a report").vcpus) {
        assert_eq!(report.faults, 0, "{report:?}");
        assert!(vcpu.pmis >= last[vcpu.vcpu as usize][last[0].len() - 1], "{vcpu:?}");
    }
    println!("{hops} hops, every digest at the stop equal to the one at the resume");
}

/// A counter that overflows every 10,000 events, so that most stops come between an overflow and its interrupt. The guest
/// arms it anew in its handler and only there: of n interrupts taken, n+1 periods were armed. An interrupt that is lost
/// on the way ends them, which the guest calls a fault; one that comes twice finds no overflow, which is another.
#[tokio::test]
async fn an_overflow_that_waits_at_the_stop_interrupts_once_on_the_other_side() {
    let wanted = times("VPMU_INTEGRITY_PMIS", 6);
    let dir = tempfile::tempdir().expect("tempdir");
    let _leftovers = Leftovers(dir.path().to_owned());
    let options = ["--isolation", "process", "--hypervisor", if have_kvm() { "kvm" } else { "simulated" }];
    let mut here = Host::start(&dir.path().join("a"), &options).await;
    let mut there = Host::start(&dir.path().join("b"), &options).await;
    let probe = ProbeBoot { overflow_period: 10_000, dirty_pages_per_second: 200, ..ProbeBoot::default() };
    let boot = Some(virtual_machine_spec::Boot::Probe(probe));
    here.create("vm", VirtualMachineSpec { boot, ..probe_spec(1, MEMORY) }).await;
    here.start_vm("vm").await;
    let taken = |copy: &GuestMemory| vcpu_worker::probe::report(copy, 0).expect("a report").pmis;
    let (mut hops, mut waiting, mut owed, mut last) = (0, 0, 0, None);
    while waiting < wanted {
        assert!(hops < wanted * 20, "{waiting} of {hops} stops came with an overflow that waited");
        // Interrupts go on: what waited at the last stop has come, and so have those after it.
        let copy = memory(here.get("vm").await.worker_pid);
        let begin = std::time::Instant::now();
        while last.is_some_and(|last| taken(&copy) < last + 2) || taken(&copy) == 0 {
            assert!(begin.elapsed() < DEADLINE, "hop {hops}: no interrupt after {last:?}");
            tokio::time::sleep(std::time::Duration::from_millis(2)).await;
        }
        let operation = here.migrations().await.create_migration(to(&there)).await.expect("accepted");
        let moved: Migration = unpack(&here.finish(operation.into_inner()).await.expect("moved"));
        let result = moved.result.expect("a result");
        let (stop, resume) = (&result.pmu_at_stop[0], &result.pmu_at_resume[0]);
        assert_eq!((stop.pmis, stop.pmi_pending), (resume.pmis, resume.pmi_pending), "hop {hops}");
        assert_eq!(stop.digest, resume.digest, "hop {hops}");
        // The copy that was left, as it stood at the stop: raised is what was given to the virtual interrupt controller
        // and what is to be given to it.
        let (raised, taken) = (stop.pmis + u64::from(stop.pmi_pending), taken(&copy));
        let waits = raised.checked_sub(taken).expect("none is taken that was not raised");
        assert!(waits <= 1, "hop {hops}: {raised} raised, {taken} taken: one was lost");
        let counter = stop.counters.iter().find(|c| c.pmi_enabled).expect("the one that overflows");
        assert!(waits == 0 || counter.overflow, "hop {hops}: {stop:?}");
        waiting += u32::try_from(waits).expect("one or none");
        owed += u32::from(stop.pmi_pending);
        (hops, last) = (hops + 1, Some(taken));
        std::mem::swap(&mut here, &mut there);
    }
    let end = here.until_counting("vm").await;
    let report = &end.probe.as_ref().expect("a report").vcpus[0];
    assert_eq!(report.faults, 0, "{report:?}");
    println!(
        "{hops} hops, {waiting} with an overflow that waited ({owed} of them not yet raised), {} interrupts taken",
        report.pmis
    );
    here.stop_vm("vm").await;
}
