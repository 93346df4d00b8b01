//! What becomes of a PMU at a host that has less of it, or more, under each policy: registers, counts and interrupts as
//! the public API shows them on both sides.

mod support;

use std::collections::BTreeSet;
use std::time::Instant;

use support::guest::{filled, until_filled, verify};
use support::*;
use tonic::Code;
use vpmu_proto::api::migration_spec::PmuRestore;
use vpmu_proto::api::*;

const LARGE: &str = "intel:v5:8+4:48";
const SMALL: &str = "intel:v5:4+3:40";

struct Pair {
    _dir: tempfile::TempDir,
    a: Host,
    b: Host,
}

async fn pair(a: &str, b: &str) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let start = |side: &str, model: &str| {
        let (path, model) = (dir.path().join(side), model.to_owned());
        async move {
            Host::start(&path, &["--hypervisor", "simulated", "--pmu", "model", "--model-pmu", &model]).await
        }
    };
    let (a, b) = (start("a", a).await, start("b", b).await);
    a.create("vm", filled(2, 32, 4)).await;
    a.start_vm("vm").await;
    until_filled(&a, "vm").await;
    Pair { _dir: dir, a, b }
}

fn spec(to: &Host, policy: PmuRestore) -> MigrationSpec {
    MigrationSpec { pmu_restore: policy.into(), ..to.arrival() }
}

async fn run(from: &Host, spec: MigrationSpec) -> Migration {
    let started = from.migrate("vm", spec).await;
    unpack(&from.finish(started).await.expect("migrated"))
}

/// Each register that is not the same on both sides: (vCPU, MSR, had, has).
fn differences(result: &MigrationResult) -> BTreeSet<(u32, u32, u64, u64)> {
    let mut found = BTreeSet::new();
    for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
        for had in &stop.registers {
            let has = resume.registers.iter().find(|r| r.msr == had.msr).map_or(0, |r| r.value);
            if has != had.value {
                found.insert((stop.vcpu, had.msr, had.value, has));
            }
        }
    }
    found
}

fn named(restored: &PmuRestored) -> BTreeSet<(u32, u32, u64, u64)> {
    assert_eq!(restored.losses.len(), restored.losses_total as usize);
    restored.losses.iter().map(|l| (l.vcpu, l.msr, l.had, l.has)).collect()
}

/// Waits until the guest has taken more interrupts than it had.
async fn until_more_pmis(host: &Host, before: &Pmu) -> Pmu {
    let pmis = |pmu: &Pmu| pmu.probe.iter().flat_map(|p| &p.vcpus).map(|v| v.pmis).collect::<Vec<_>>();
    let begin = Instant::now();
    loop {
        let now = host.live_pmu("vm").await;
        if pmis(&now).iter().zip(pmis(before)).all(|(now, before)| *now > before) {
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "no interrupts: {now:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

/// At rest: two counters of one event are equal, and each interrupt that was raised was taken once.
async fn counted_once(host: &Host) {
    let pause = PauseVirtualMachineRequest { name: name("vm") };
    host.vms().await.pause_virtual_machine(pause).await.expect("pauses");
    let pmu = host.live_pmu("vm").await;
    for (vcpu, report) in pmu.vcpus.iter().zip(pmu.probe.iter().flat_map(|p| &p.vcpus)) {
        let value = |name: &str| vcpu.counters.iter().find(|c| c.name == name).map(|c| c.value);
        assert!(value("gp0").is_some_and(|v| v > 0));
        assert_eq!(value("gp0"), value("fixed0"), "instructions: {vcpu:?}");
        assert_eq!(value("gp1"), value("fixed1"), "cycles: {vcpu:?}");
        // One may have been injected that the guest has not taken yet.
        assert!((report.pmis..=report.pmis + 1).contains(&vcpu.pmis), "{report:?} {}", vcpu.pmis);
        assert_eq!(report.faults, 0, "{report:?}");
    }
    let resume = ResumeVirtualMachineRequest { name: name("vm") };
    host.vms().await.resume_virtual_machine(resume).await.expect("resumes");
}

#[tokio::test]
async fn best_effort_keeps_what_fits_and_names_the_rest() {
    let Pair { _dir, a, b } = pair(LARGE, SMALL).await;
    // Unless it was said that a part is enough, all of it must fit.
    let request = CreateMigrationRequest {
        parent: name("vm"),
        spec: Some(spec(&b, PmuRestore::Require)),
        ..CreateMigrationRequest::default()
    };
    let refused = a.migrations().await.create_migration(request).await;
    let status = expect_error(refused, Code::FailedPrecondition, "MIGRATION_INCOMPATIBLE");
    assert!(status.message().starts_with("C2: "), "{status:?}");
    let check = CheckMigrationRequest { parent: name("vm"), spec: Some(spec(&b, PmuRestore::BestEffort)) };
    let check = a.migrations().await.check_migration(check).await.expect("checks").into_inner();
    assert!(check.compatible && !check.mismatches.is_empty(), "{check:?}");
    assert!(check.mismatches.iter().all(|m| m.rule == "C2" && m.warning), "{check:?}");

    let before = a.live_pmu("vm").await;
    let migration = run(&a, spec(&b, PmuRestore::BestEffort)).await;
    assert!(migration.actions.iter().any(|a| a.code == "PMU_REDUCED"), "{:?}", migration.actions);
    let result = migration.result.expect("result");
    let restored = result.pmu_restored.clone().expect("something was lost");
    assert_eq!(
        (restored.policy.as_str(), restored.migration.as_str()),
        ("best_effort", migration.name.as_str())
    );
    let bitmaps =
        |shape: &Option<PmuShape>| shape.as_ref().map(|s| (s.gp_bitmap, s.fixed_bitmap, s.gp_width));
    assert_eq!(bitmaps(&restored.had), Some((0xFF, 0xF, 48)));
    assert_eq!(bitmaps(&restored.has), Some((0xF, 0x7, 40)));
    assert_eq!(named(&restored), differences(&result), "what differs is named, and nothing else");
    assert!(!restored.losses.is_empty());
    for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
        assert_eq!(
            (stop.pmis, stop.pmi_pending, stop.in_service),
            (resume.pmis, resume.pmi_pending, resume.in_service)
        );
        for counter in &resume.counters {
            let then = stop.counters.iter().find(|c| c.name == counter.name).expect("it had that too");
            let kept = then.value & ((1 << 40) - 1);
            assert_eq!((counter.value, counter.selector), (kept, then.selector), "{counter:?}");
        }
    }
    assert_eq!(b.live_pmu("vm").await.restored.as_ref(), Some(&restored));
    let vm = b.get("vm").await;
    assert_eq!(vm.pmu_restored.as_deref(), Some(&restored));
    let cores: Vec<u32> = result.pmu_at_resume.iter().map(|v| v.core).collect();
    assert_eq!(cores, vm.vcpu_cores, "where it counts on");
    let at_stop: Vec<u32> = result.pmu_at_stop.iter().map(|v| v.core).collect();
    assert_eq!(at_stop, before.vcpus.iter().map(|v| v.core).collect::<Vec<_>>());
    // The counter that interrupted is among what was lost; what was kept counts on.
    let begin = Instant::now();
    let gp0 = |vcpus: &[VcpuPmu]| {
        let all = vcpus.iter().flat_map(|v| &v.counters);
        all.filter(|c| c.name == "gp0").map(|c| c.value).collect::<Vec<_>>()
    };
    let resumed = gp0(&result.pmu_at_resume);
    while !gp0(&b.live_pmu("vm").await.vcpus).iter().zip(&resumed).all(|(now, then)| now > then) {
        assert!(begin.elapsed() < DEADLINE, "gp0 stands at {resumed:?}");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    verify(&b, "vm").await;

    // Started anew it would have all that was asked for when it was made, which this host has not.
    b.stop_vm("vm").await;
    let request = StartVirtualMachineRequest { name: name("vm"), request_id: String::new() };
    let started = b.vms().await.start_virtual_machine(request).await.expect("accepted").into_inner();
    let error = b.finish(started).await.expect_err("refused");
    assert!(error.message.contains("ask for at most 4"), "{error:?}");
}

#[tokio::test]
async fn best_effort_loses_nothing_where_all_of_it_fits() {
    let Pair { _dir, a, b } = pair(LARGE, LARGE).await;
    let before = a.live_pmu("vm").await;
    let migration = run(&a, spec(&b, PmuRestore::BestEffort)).await;
    let result = migration.result.expect("result");
    assert_eq!((result.pmu_restored.clone(), differences(&result)), (None, BTreeSet::new()));
    assert!(migration.actions.iter().all(|a| !a.code.starts_with("PMU_")), "{:?}", migration.actions);
    until_more_pmis(&b, &before).await;
    counted_once(&b).await;
}

#[tokio::test]
async fn a_reset_begins_anew_and_says_what_was_there() {
    let Pair { _dir, a, b } = pair(LARGE, LARGE).await;
    let migration = run(&a, spec(&b, PmuRestore::Reset)).await;
    assert!(migration.actions.iter().any(|a| a.code == "PMU_RESET"), "{:?}", migration.actions);
    let result = migration.result.expect("result");
    let restored = result.pmu_restored.clone().expect("all was lost");
    assert_eq!(restored.policy, "reset");
    assert_eq!(named(&restored), differences(&result));
    for (stop, resume) in result.pmu_at_stop.iter().zip(&result.pmu_at_resume) {
        assert!(stop.counters.iter().any(|c| c.live && c.value > 0), "{stop:?}");
        assert!(resume.counters.iter().all(|c| c.value == 0 && c.selector == 0 && !c.overflow), "{resume:?}");
        assert!(!resume.pmi_pending && !resume.in_service, "nothing is owed");
    }
    assert_eq!(b.live_pmu("vm").await.restored, Some(restored));
    // The machine itself is whole.
    verify(&b, "vm").await;
    // Started anew nothing is missing any more.
    b.stop_vm("vm").await;
    b.start_vm("vm").await;
    let fresh = b.until_counting("vm").await;
    assert_eq!((fresh.restored, b.get("vm").await.pmu_restored), (None, None));
}

#[tokio::test]
async fn at_a_larger_host_it_keeps_the_pmu_that_it_has() {
    let Pair { _dir, a, b } = pair(SMALL, LARGE).await;
    let before = a.live_pmu("vm").await;
    let there = run(&a, spec(&b, PmuRestore::Require)).await.result.expect("result");
    assert_eq!(differences(&there), BTreeSet::new());
    let now = until_more_pmis(&b, &before).await;
    assert_eq!(now.shape, before.shape, "its own PMU, not the host's");
    counted_once(&b).await;
    let back = run(&b, spec(&a, PmuRestore::Require)).await.result.expect("result");
    assert_eq!(differences(&back), BTreeSet::new());
    until_more_pmis(&a, &now).await;
    counted_once(&a).await;
}
