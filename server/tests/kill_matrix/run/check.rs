//! Whether what runs is all of the machine, and it alone: memory, turns, counters, interrupts, stored PMU state.

use std::time::{Duration, Instant};

use vcpu_worker::probe::{ProbeConfig, verify_memory};
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

use super::super::cell::{Cell, Fault, Got};
use super::memory::Copy;
use super::{DEADLINE, Extra, FILL, Host, MEMORY, Pmu, World, name, one, spec};

impl World {
    /// Exactly one copy runs, it is whole, and its counters tell of every event once.
    pub(super) async fn check(
        &mut self,
        (cell, extra): (Cell, Extra),
        (got, reason): (Got, &str),
        before: &Pmu,
        left: Copy,
    ) {
        if got == Got::Lost {
            if let Some(wanted) = cell.reason() {
                assert_eq!(reason, wanted, "{cell}: why it is lost");
            }
            // Nothing runs by itself; the user may start it afresh where it is.
            let here = if one(&self.a).await.is_some_and(|vm| vm.observed_state() != State::Moved) {
                &self.a
            } else {
                &self.b
            };
            here.start_vm("vm").await;
            here.until_counting("vm").await;
            return;
        }
        let winner = if got == Got::Src { &self.a } else { &self.b };
        if got == Got::Dst && extra.again.is_none() {
            self.compare_stored().await;
        }
        let now = until_beyond(winner, before, &format!("{cell}")).await;
        assert!(now.probe.iter().flat_map(|p| &p.vcpus).all(|v| v.faults == 0), "{cell}: {:?}", now.probe);
        if got == Got::Dst {
            let then = left.loops();
            until_beyond(winner, &now, &format!("{cell}")).await;
            assert_eq!(left.loops(), then, "{cell}: the copy at the source runs too");
        }
        until_it_stores(winner).await;
        let pause = PauseVirtualMachineRequest { name: name("vm") };
        changed(cell, winner.vms().await.pause_virtual_machine(pause).await, "pauses");
        let vm = winner.get("vm").await;
        let worker = (vm.worker_pid != 0).then(|| Identity::of(vm.worker_pid).expect("lives"));
        let memory = Copy::of(self, winner, worker.as_ref());
        let boot = match spec(cell).boot {
            Some(virtual_machine_spec::Boot::Probe(boot)) => boot,
            other => panic!("no probe: {other:?}"),
        };
        let config = ProbeConfig::from_boot(&boot, 1, MEMORY << 20, 2_000_000, None);
        let pages = verify_memory(&memory.0, &config)
            .unwrap_or_else(|error| panic!("{cell}: the guest's memory is not what it wrote: {error}"));
        assert!(pages >= FILL >> 12, "{cell}: {pages} pages checked");
        counted_once(cell, &winner.live_pmu("vm").await);
        let resume = ResumeVirtualMachineRequest { name: name("vm") };
        let at_rest = winner.live_pmu("vm").await;
        changed(cell, winner.vms().await.resume_virtual_machine(resume).await, "resumes");
        until_beyond(winner, &at_rest, &format!("{cell}")).await;
    }

    /// What the source stored at the stop is what the destination stored at its beginning.
    async fn compare_stored(&self) {
        let digests =
            |state: &PmuState| -> Vec<String> { state.vcpus.iter().map(|v| v.digest.clone()).collect() };
        let (Ok(out), Ok(here)) = (self.a.stored_pmu("vm").await, self.b.stored_pmu("vm").await) else {
            return;
        };
        // A checkpoint may have followed; a source that died has stored nothing.
        if out.cause == "migrate-out" && here.cause == "migrate-in" {
            assert_eq!(digests(&out), digests(&here), "PMU state at the stop and at the resume");
        }
    }
}

/// A store whose disk was full only reads until its daemon is started again: then a change is done and shown, and not
/// acknowledged.
fn changed<T>(cell: Cell, answer: Result<T, tonic::Status>, what: &str) {
    match answer {
        Err(status) if matches!(cell.fault, Fault::Disk(_)) => {
            assert!(status.message().contains("read-only"), "{cell}: {what}: {status:?}");
        }
        answer => drop(answer.unwrap_or_else(|status| panic!("{cell}: {what}: {status:?}"))),
    }
}

/// Two counters of the same event are equal to the event, and the guest took exactly the interrupts that were raised.
fn counted_once(cell: Cell, pmu: &Pmu) {
    for (vcpu, report) in pmu.vcpus.iter().zip(pmu.probe.iter().flat_map(|p| &p.vcpus)) {
        let value = |name: &str| vcpu.counters.iter().find(|c| c.name == name).map(|c| c.value);
        assert_eq!(value("gp0"), value("fixed0"), "{cell}: instructions, counted twice: {vcpu:?}");
        assert_eq!(value("gp1"), value("fixed1"), "{cell}: cycles, counted twice: {vcpu:?}");
        // One may have been injected that the guest has not taken yet.
        assert!(
            (report.pmis..=report.pmis + 1).contains(&vcpu.pmis),
            "{cell}: {} interrupts raised, {} taken",
            vcpu.pmis,
            report.pmis
        );
    }
}

/// The guest's turns and the counters that take no overflow.
fn figures(pmu: &Pmu) -> Vec<u64> {
    let turns =
        pmu.probe.iter().flat_map(|p| &p.vcpus).flat_map(|v| [v.heartbeats, v.loops, v.pages_dirtied]);
    let counters = pmu.vcpus.iter().flat_map(|v| &v.counters).filter(|c| c.live && !c.pmi_enabled);
    turns.chain(counters.map(|c| c.value)).collect()
}

/// Waits until everything has grown beyond `before`; nothing may go back.
async fn until_beyond(host: &Host, before: &Pmu, what: &str) -> Pmu {
    let (begin, old) = (Instant::now(), figures(before));
    loop {
        let now = host.live_pmu("vm").await;
        let new = figures(&now);
        assert_eq!(new.len(), old.len(), "{what}: {now:?}");
        assert!(
            new.iter().zip(&old).all(|(n, o)| n >= o),
            "{what}: something was lost: {old:?}, then {new:?}"
        );
        if new.iter().zip(&old).all(|(n, o)| n > o) {
            return now;
        }
        assert!(begin.elapsed() < DEADLINE, "{what}: it does not go on: {old:?}, then {new:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A store whose disk was full takes writes again by itself, in its own time.
async fn until_it_stores(host: &Host) {
    let begin = Instant::now();
    loop {
        let request = GetHostPmuCapabilitiesRequest::default();
        let known = host.pmu().await.get_host_pmu_capabilities(request).await.expect("answers").into_inner();
        if !known.notes.iter().any(|note| note.starts_with("the store is read-only")) {
            return;
        }
        assert!(begin.elapsed() < DEADLINE, "the store stays read-only: {:?}", known.notes);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
