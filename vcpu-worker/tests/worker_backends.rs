//! PMU back ends on real vCPU threads: the processor's counters through a file that stands in for the msr driver, the
//! event filter, the audit, and overflows of a guest that spins.

mod worker_common;

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::Code;
use vcpu_worker::cores::{Backend, HostCores, MsrPaths};
use vpmu_proto::api;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

/// One counter and no global control: its two registers are far enough apart for a plain file, which has 8 bytes at an
/// MSR's number as the driver does.
const PLAIN: &str = "intel:v1:1+0:40";
const COUNTER: u64 = 0xc1;
const SELECTOR: u64 = 0x186;
/// EVENTSEL.INT and EVENTSEL.EN.
const INT: u64 = 1 << 20;
const EN: u64 = 1 << 22;

fn paths(dir: &Path) -> MsrPaths {
    MsrPaths { devices: dir.join("cpu"), locks: dir.to_owned(), driver: false }
}

fn device(dir: &Path, core: u32) -> File {
    let dir: PathBuf = dir.join("cpu").join(core.to_string());
    std::fs::create_dir_all(&dir).expect("directory");
    let file = File::options()
        .create(true)
        .truncate(true)
        .read(true)
        .write(true)
        .open(dir.join("msr"))
        .expect("device");
    file.set_len(0x2000).expect("length");
    file
}

fn read(file: &File, msr: u64) -> u64 {
    let mut bytes = [0; 8];
    file.read_exact_at(&mut bytes, msr).expect("read");
    u64::from_le_bytes(bytes)
}

async fn until(what: &str, mut is: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !is() {
        assert!(begin.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        // The guest may need the core that this thread is on.
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

fn request(host: &Host, hypervisor: &str, mode: &str) -> CreateVmRequest {
    let mut spec = probe_spec(1, 32);
    spec.pmu = Some(api::PmuSpec { gp_counters: 1, ..Default::default() });
    let mut request = host.create_request(hypervisor, spec, false);
    request.vcpu_cores = vec![0];
    mode.clone_into(&mut request.pmu_mode);
    PLAIN.clone_into(&mut request.model_pmu);
    request
}

async fn audit(host: &mut Host) -> Vec<ForeignWrite> {
    let answer = host.client.audit_pmu(AuditPmuRequest { fence: host.fence() }).await.expect("audit");
    answer.into_inner().vcpus.remove(0).foreign
}

#[tokio::test(flavor = "multi_thread")]
async fn the_processors_counters_are_switched_through_the_msr_device() {
    for hypervisor in hypervisors() {
        let dir = tempfile::tempdir().expect("tempdir");
        let msr = device(dir.path(), 0);
        // What some earlier user left: a clean start takes it away.
        msr.write_all_at(&0x1111_u64.to_le_bytes(), COUNTER).expect("write");
        // Full-width writes go to another MSR than reads, which a file does not know.
        let shape = pmu::Shape { perf_capabilities: 0, ..PLAIN.parse().expect("a shape") };
        let cores = Arc::new(HostCores::with(Backend::Msr(paths(dir.path())), shape, &[0, 1]));
        let mut host = Host::new(&cores, "vm-a");
        host.attach().await;
        let wrong = request(&host, hypervisor, "model");
        refused(host.client.create_vm(wrong).await, Code::InvalidArgument, "INVALID_FIELD");
        let create = request(&host, hypervisor, "msr");
        host.client.create_vm(create).await.expect("create");
        host.grant(1, 1, true).await.expect("grant");
        until("the guest's selector is in the device", || read(&msr, SELECTOR) & EN != 0).await;
        assert_eq!(read(&msr, SELECTOR) & INT, 0, "no interrupt is armed on hardware");

        // A core has room for one vCPU, in this process and any other.
        let mut second = Host::new(&cores, "vm-b");
        second.attach().await;
        let create = request(&second, hypervisor, "msr");
        refused(second.client.create_vm(create).await, Code::FailedPrecondition, "MSR_CORE_BUSY");
        let mut create = request(&second, hypervisor, "msr");
        create.vcpu_cores = vec![1];
        refused(second.client.create_vm(create).await, Code::FailedPrecondition, "MSR_DEVICE_ABSENT");

        // What the hardware counted is the guest's, and nothing stays behind.
        // What is written into a file between a put and a load is lost, and the guest may be about to program: try again then.
        let begin = Instant::now();
        loop {
            until("the guest has armed its counter", || read(&msr, COUNTER) > 1 << 39).await;
            let counted = read(&msr, COUNTER) + 12_345;
            msr.write_all_at(&counted.to_le_bytes(), COUNTER).expect("write");
            let image = host.pause().await.remove(0);
            if register(&image, COUNTER as u32) == counted {
                break;
            }
            assert!(begin.elapsed() < PATIENCE, "{hypervisor}: {counted:#x} never reaches the guest");
            assert_eq!((read(&msr, SELECTOR), read(&msr, COUNTER)), (0, 0), "scrubbed");
            host.run().await.expect("run");
        }
        assert_eq!((read(&msr, SELECTOR), read(&msr, COUNTER)), (0, 0), "scrubbed");
        assert_eq!(audit(&mut host).await, []);
        msr.write_all_at(&0x55_u64.to_le_bytes(), SELECTOR).expect("write");
        assert_eq!(audit(&mut host).await, [ForeignWrite { msr: 0x186, expected: 0, found: 0x55 }]);
        host.run().await.expect("run");
        until("the guest's selector is back", || read(&msr, SELECTOR) & EN != 0).await;
        let then = host.report().await.vcpus[0];
        let now = host.report_until("it runs", |r| r.vcpus[0].heartbeats > then.heartbeats + 60).await;
        assert_eq!(now.vcpus[0].faults, 0, "{now:?}");

        // To another core while it runs: the old device is left clean and free.
        let other = device(dir.path(), 1);
        let n = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
        if n > 1 {
            let place = UpdatePlacementRequest { fence: host.fence(), vcpu_cores: vec![1], fifo_priority: 0 };
            let moved = host.client.update_placement(place).await.expect("moved").into_inner();
            assert_eq!(moved.vcpu_cores, [1]);
            assert_eq!((read(&msr, SELECTOR), read(&msr, COUNTER)), (0, 0));
            until("it counts there", || read(&other, SELECTOR) & EN != 0).await;
            let create = request(&second, hypervisor, "msr");
            second.client.create_vm(create).await.expect("the old core is free");
            second.shutdown().await;
        }
        host.shutdown().await;
        assert_eq!((read(&msr, SELECTOR), read(&other, SELECTOR)), (0, 0));
        let mut third = Host::new(&cores, "vm-c");
        third.attach().await;
        let create = request(&third, hypervisor, "msr");
        third.client.create_vm(create).await.expect("given back");
        third.shutdown().await;
    }
}

#[tokio::test]
async fn the_kernels_pmu_is_not_faked() {
    let shape = MODEL.parse().expect("a shape");
    let cores = Arc::new(HostCores::with(Backend::Kvm, shape, &[0]));
    let mut host = Host::new(&cores, "vm-k");
    host.attach().await;
    let mut request = host.create_request("simulated", probe_spec(1, 32), false);
    request.pmu_mode = "kvm".to_owned();
    request.vcpu_cores = vec![0];
    refused(host.client.create_vm(request.clone()).await, Code::InvalidArgument, "INVALID_FIELD");
    if kvm() {
        // Where KVM has a vPMU of this shape the machine is made; elsewhere it says which register KVM lacks.
        request.hypervisor = "kvm".to_owned();
        match host.client.create_vm(request).await {
            Ok(_) => assert_eq!(host.state().await, State::Paused),
            Err(status) => assert!(reason(&status).starts_with("PMU_KVM_"), "{status:?}"),
        }
    }
    host.shutdown().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn filtered_events_are_programmed_and_count_nothing() {
    use api::pmu_event_filter::Action;
    for hypervisor in hypervisors() {
        let cores = host_cores();
        let mut host = Host::new(&cores, "vm-f");
        host.attach().await;
        let mut spec = probe_spec(1, 32);
        let filter = api::PmuEventFilter { action: Action::Allow.into(), ..Default::default() };
        spec.pmu.as_mut().expect("set").event_filter = Some(filter);
        host.create(hypervisor, spec, false).await;
        host.grant(1, 1, true).await.expect("grant");
        host.report_until("it has programmed its counters", |r| r.vcpus[0].heartbeats > 60).await;
        let before = host.pmu().await;
        assert_ne!(register(&before[0], 0x38f), 0, "the guest reads back what it wrote");
        let then = host.report().await.vcpus[0];
        let now = host.report_until("it runs on", |r| r.vcpus[0].heartbeats > then.heartbeats + 60).await;
        assert_eq!(host.pmu().await, before, "nothing counts");
        assert_eq!((now.vcpus[0].pmis, now.vcpus[0].faults), (0, 0), "{now:?}");
        host.shutdown().await;

        let mut bad = probe_spec(1, 32);
        let filter = api::PmuEventFilter { events: vec![0; 301], ..Default::default() };
        bad.pmu.as_mut().expect("set").event_filter = Some(filter);
        let mut host = Host::new(&cores, "vm-g");
        host.attach().await;
        let request = host.create_request(hypervisor, bad, false);
        refused(host.client.create_vm(request).await, Code::InvalidArgument, "INVALID_FIELD");
        host.shutdown().await;
    }
}

/// A guest that spins without exits is interrupted by the thread's own clock: each overflow is delivered within a tick
/// of the CPU time at which it fell due. Judged in the guest's CPU time, so a busy host changes nothing.
#[tokio::test(flavor = "multi_thread")]
async fn overflows_of_a_guest_that_spins_arrive_by_the_tick() {
    const PERIOD_NS: u64 = 2_000_000;
    const TICK_NS: u64 = 1_000_000;
    // The scripted guest does not spin: it gives its time back at each turn.
    for hypervisor in hypervisors().into_iter().filter(|hypervisor| *hypervisor == "kvm") {
        let cores = host_cores();
        let mut host = Host::new(&cores, "vm-t");
        host.attach().await;
        let mut spec = probe_spec(1, 32);
        let Some(api::virtual_machine_spec::Boot::Probe(probe)) = &mut spec.boot else { panic!("a probe") };
        // 3.2 instructions a nanosecond in the model.
        probe.overflow_period = PERIOD_NS * 16 / 5;
        (probe.working_set_bytes, probe.dirty_pages_per_second, probe.fill_bytes) = (0, 0, 0);
        host.create(hypervisor, spec, false).await;
        host.grant(1, 1, true).await.expect("grant");
        host.report_until("overflows arrive", |r| r.vcpus[0].pmis > 3).await;
        host.pause().await;
        let before = host.status().await.vcpus[0];
        host.run().await.expect("run");
        let begin = Instant::now();
        let mut ran = 0;
        while ran < 150 * PERIOD_NS {
            assert!(begin.elapsed() < PATIENCE, "{hypervisor}: only {ran} ns of CPU time");
            tokio::task::yield_now().await;
            ran = host.status().await.vcpus[0].guest_ns - before.guest_ns;
        }
        host.pause().await;
        let after = host.status().await.vcpus[0];
        let (ran, pmis) = (after.guest_ns - before.guest_ns, after.pmis - before.pmis);
        // No more than there were periods, and no period longer than itself and a tick (two at the edges).
        assert!(pmis <= ran / PERIOD_NS + 1, "{hypervisor}: {pmis} interrupts in {ran} ns");
        assert!(pmis + 2 >= ran / (PERIOD_NS + 2 * TICK_NS), "{hypervisor}: {pmis} interrupts in {ran} ns");
        assert_eq!(host.report().await.vcpus[0].faults, 0);
        host.shutdown().await;
    }
}
