//! The story, step by step. Each step talks to the hosts through the public API only.

use super::error::{DemoError, Step as _};
use super::host::Host;
use super::report::{self, MigrationFigures, Report};
use super::say::Say;
use super::workdir::WorkDir;
use std::time::{Duration, Instant};
use vpmu_client::api::{
    Migration, MigrationSpec, Pmu, PmuState, ProbeBoot, VcpuPmu, VirtualMachine, VirtualMachineSpec,
    virtual_machine, virtual_machine_spec,
};
use vpmu_client::progress::MigrationBar;
use vpmu_client::{Client, units, wait};

const VM: &str = "demo";
const VCPUS: u32 = 2;
const MEMORY: u64 = 256 << 20;
/// Each vCPU keeps dirtying this much...
const WORKING_SET: u64 = 4 << 20;
/// ...at this many pages a second: 8 MiB/s a vCPU, which pre-copy has to chase.
const DIRTY_RATE: u64 = 2000;
/// Filled with a pattern first, so that there is something to copy.
const FILL: u64 = 64 << 20;

/// Bound of each wait; each of them takes well under a second on a quiet machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks.
const LOOK: Duration = Duration::from_millis(100);

/// The two hosts, as far as they have been started.
#[derive(Debug, Default)]
pub(super) struct Hosts {
    a: Option<Host>,
    b: Option<Host>,
}

impl Hosts {
    /// Ends both, and says what did not end as it should.
    pub(super) async fn end(&mut self) -> Result<(), DemoError> {
        let (a, b) = (self.a.take(), self.b.take());
        let end = |host: Option<Host>| async move {
            match host {
                Some(host) => host.end().await,
                None => Ok(()),
            }
        };
        let (a, b) = tokio::join!(end(a), end(b));
        a.and(b)
    }

    /// The last lines of both logs, on standard error.
    pub(super) fn show_logs(&self) {
        self.a.iter().chain(&self.b).for_each(Host::show_log);
    }
}

/// Tells the whole story and fills the report.
pub(super) async fn run(
    workdir: &WorkDir,
    hypervisor: &str,
    say: Say,
    hosts: &mut Hosts,
    report: &mut Report,
) -> Result<(), DemoError> {
    let begin = Instant::now();
    let directory = workdir.path();

    say.chapter(1, "two hosts, as processes with stores of their own");
    let (a, b) =
        tokio::join!(Host::start("a", directory, hypervisor), Host::start("b", directory, hypervisor));
    // Where one has failed the other is killed: by its drop, or at the end of the demo.
    let (a, b) = (hosts.a.insert(a?), hosts.b.insert(b?));
    let offer = a.client.host_capabilities().await.step("ask host a what it offers")?;
    report.hypervisor.clone_from(&offer.hypervisor);
    report.pmu_mode.clone_from(&offer.mode);
    report.host_pmu.clone_from(&offer.host_pmu);
    report.vcpus = VCPUS;
    report.memory_mib = MEMORY >> 20;
    let modelled = if offer.mode == "model" { " (modelled counts, not hardware)" } else { "" };
    say.line(&format!("  processes {} and {}; {}", a.pid(), b.pid(), offer.hypervisor));
    say.line(&format!("  PMU mode {}{modelled}, {}", offer.mode, offer.host_pmu));

    say.chapter(2, "a machine on host a, created and started over the API");
    let vm = create(&a.client).await?;
    say.line(&format!(
        "  {VM}: {VCPUS} vCPUs on cores {:?}, {}, uid {}",
        vm.vcpu_cores,
        units::bytes(MEMORY),
        vm.uid
    ));

    say.chapter(3, "its counters move");
    let first = a.client.get_pmu(VM).await.step("read the counters on host a")?;
    let (moved, last) = until("the counters of the new machine did not all move", async || {
        let now = a.client.get_pmu(VM).await.step("read the counters on host a")?;
        Ok(if all_beyond(&first.vcpus, &now.vcpus) {
            Ok(now)
        } else {
            Err(lagging(&first.vcpus, &now.vcpus))
        })
    })
    .await?;
    report.check("counters_move", true, format!("{} counters on host a", live(&moved.vcpus)));
    say.line(&show_movement(&first, &moved, last));

    say.chapter(4, "live migration to host b");
    let before = a.client.get_pmu(VM).await.step("read the counters on host a")?;
    let migration = migrate(&a.client, &b.peer.to_string(), say).await?;
    report.migration = MigrationFigures::of(&migration);
    let result = migration.result.clone().unwrap_or_default();
    say.line(&format!(
        "  {} over {} in {} rounds, {:.1} ms in all, standing still for {:.1} ms",
        units::bytes(result.bytes),
        result.transport,
        result.rounds,
        result.total_us as f64 / 1000.0,
        result.blackout_us as f64 / 1000.0
    ));

    say.chapter(5, "each counter continues on host b");
    let (after, _) = until("the counters of the moved machine did not all go on", async || {
        let now = b.client.get_pmu(VM).await.step("read the counters on host b")?;
        let beyond = all_beyond(&result.pmu_at_resume, &now.vcpus);
        Ok(if beyond { Ok(now) } else { Err(lagging(&result.pmu_at_resume, &now.vcpus)) })
    })
    .await?;
    report.counters = report::join(&before.vcpus, &result.pmu_at_stop, &result.pmu_at_resume, &after.vcpus);
    say.line(&report::table(&report.counters));
    check_migration(report, &migration, &after);
    check_whereabouts(report, &a.client, &b.client, &vm).await?;

    say.chapter(6, "host b dies of SIGKILL, and comes back");
    let acknowledged = pause(report, &b.client).await?;
    let pid = b.pid();
    b.kill().await?;
    let b = hosts.b.insert(Host::start("b", directory, hypervisor).await?);
    say.line(&format!("  process {pid} is dead, process {} serves the same store", b.pid()));
    let found = b.client.get_pmu_state(VM).await.step("read the persisted PMU state")?;
    check_persisted(report, &acknowledged, &found);
    say.line(&show_persisted(&found));
    check_restarted(report, &b.client, &vm).await?;

    say.chapter(7, "cleaning up");
    let deletion = b.client.delete_vm(VM).await.step("delete the machine")?;
    b.client.wait_operation(deletion, PATIENCE, |_| {}).await.step("delete the machine")?;
    report.seconds = begin.elapsed().as_secs_f64();
    Ok(())
}

/// Creates the machine and starts it.
async fn create(client: &Client) -> Result<VirtualMachine, DemoError> {
    let spec = VirtualMachineSpec {
        vcpus: VCPUS,
        memory_bytes: MEMORY,
        boot: Some(virtual_machine_spec::Boot::Probe(ProbeBoot {
            working_set_bytes: WORKING_SET,
            dirty_pages_per_second: DIRTY_RATE,
            fill_bytes: FILL,
            ..ProbeBoot::default()
        })),
        ..VirtualMachineSpec::default()
    };
    let operation = client.create_vm(VM, spec).await.step("create the machine")?;
    client.wait_operation(operation, PATIENCE, |_| {}).await.step("create the machine")?;
    let operation = client.start_vm(VM).await.step("start the machine")?;
    client.wait_for(operation, PATIENCE).await.step("start the machine")
}

/// Migrates with a progress bar and waits for the end.
async fn migrate(client: &Client, destination: &str, say: Say) -> Result<Migration, DemoError> {
    let spec = MigrationSpec {
        destination: destination.to_owned(),
        allow_plaintext: true,
        ..MigrationSpec::default()
    };
    let operation = client.create_migration(VM, spec).await.step("start the migration")?;
    let name = Client::migration_of(&operation).step("start the migration")?.name;
    let bar = MigrationBar::new("  copying", true);
    let mut phases: Vec<String> = Vec::new();
    client
        .follow_migration(&name, PATIENCE, |migration| {
            bar.update(migration);
            if !migration.phase.is_empty() && phases.last() != Some(&migration.phase) {
                phases.push(migration.phase.clone());
            }
        })
        .await
        .step("follow the migration")?;
    bar.finish();
    say.line(&format!("  {}", phases.join(" > ")));
    let done = client.wait_operation(operation, PATIENCE, |_| {}).await.step("migrate the machine")?;
    wait::response(&done).step("migrate the machine")
}

/// Pauses on host b, which makes the PMU state durable, and returns what was acknowledged.
async fn pause(report: &mut Report, client: &Client) -> Result<PmuState, DemoError> {
    client.pause_vm(VM).await.step("pause the machine")?;
    let live = client.get_pmu(VM).await.step("read the counters of the paused machine")?;
    let state = client.get_pmu_state(VM).await.step("read the persisted PMU state")?;
    let same = without_cores(&live.vcpus) == without_cores(&state.vcpus);
    report.check(
        "pause_is_durable",
        same && !state.vcpus.is_empty(),
        format!("record {} of epoch {} has the paused machine's registers", state.sequence, state.epoch),
    );
    let (mut off, mut taken, mut faults) = (Vec::new(), 0, 0);
    for probe in live.probe.iter().flat_map(|probe| &probe.vcpus) {
        taken += probe.pmis;
        faults += probe.faults;
        let injected = live.vcpus.iter().find(|vcpu| vcpu.vcpu == probe.vcpu).map_or(0, |vcpu| vcpu.pmis);
        // One may have been injected whose handler has not run yet.
        if !(probe.pmis..=probe.pmis + 1).contains(&injected) {
            off.push(format!("vCPU {}: {injected} injected, {} taken", probe.vcpu, probe.pmis));
        }
    }
    (report.pmis, report.guest_faults) = (taken, faults);
    report.check("guest_faults", faults == 0, format!("the guest found {faults} faults in its own view"));
    report.check(
        "pmis_neither_lost_nor_doubled",
        off.is_empty() && taken > 0,
        if off.is_empty() { format!("{taken} taken, each injected once") } else { off.join("; ") },
    );
    Ok(state)
}

fn check_migration(report: &mut Report, migration: &Migration, after: &Pmu) {
    let result = migration.result.clone().unwrap_or_default();
    let differing: Vec<String> = report
        .counters
        .iter()
        .filter(|line| line.at_stop != line.at_resume)
        .map(|line| format!("vCPU {} {}: {} and {}", line.vcpu, line.counter, line.at_stop, line.at_resume))
        .collect();
    let (stop, resume) = (without_cores(&result.pmu_at_stop), without_cores(&result.pmu_at_resume));
    let registers: usize = stop.iter().map(|vcpu| vcpu.registers.len()).sum();
    report.check(
        "at_stop_equals_at_resume",
        differing.is_empty() && stop == resume && stop.len() == VCPUS as usize && registers > 0,
        if differing.is_empty() {
            format!("{registers} registers, to the bit")
        } else {
            differing.join("; ")
        },
    );
    let back: Vec<String> = report
        .counters
        .iter()
        .filter(|line| !line.monotonic())
        .map(|line| format!("vCPU {} {}", line.vcpu, line.counter))
        .collect();
    report.check(
        "no_counter_went_back",
        back.is_empty() && report.counters.iter().any(|line| !line.pmi),
        if back.is_empty() {
            format!("{} counters over both hosts", report.counters.len())
        } else {
            back.join("; ")
        },
    );
    let faults: u64 = after.probe.iter().flat_map(|probe| &probe.vcpus).map(|vcpu| vcpu.faults).sum();
    report.check(
        "no_fault_after_the_move",
        faults == 0,
        format!("the guest found {faults} faults since it moved"),
    );
    // Where the host does not measure the hole, the guest's own report does.
    if let Some(figures) = &mut report.migration
        && figures.guest_gap_ms.is_none()
    {
        let gap = after.probe.iter().flat_map(|probe| &probe.vcpus).map(|vcpu| vcpu.last_gap_ns).max();
        figures.guest_gap_ms = gap.filter(|gap| *gap > 0).map(|gap| gap as f64 / 1e6);
    }
}

/// One owner: it runs on b and not on a, under the next epoch.
async fn check_whereabouts(
    report: &mut Report,
    a: &Client,
    b: &Client,
    vm: &VirtualMachine,
) -> Result<(), DemoError> {
    let there = b.get_vm(VM).await.step("ask host b for the machine")?;
    let here = match a.get_vm(VM).await {
        Ok(vm) => vm.observed_state().as_str_name().to_owned(),
        Err(error) if error.code() == tonic::Code::NotFound => "not there".to_owned(),
        Err(error) => return Err(error).step("ask host a for the machine"),
    };
    let moved = here == virtual_machine::State::Moved.as_str_name() || here == "not there";
    report.check(
        "one_owner",
        there.observed_state() == virtual_machine::State::Running
            && moved
            && there.uid == vm.uid
            && there.epoch > vm.epoch,
        format!(
            "{} on b in epoch {}; {} on a, which had epoch {}",
            there.observed_state().as_str_name(),
            there.epoch,
            here,
            vm.epoch
        ),
    );
    Ok(())
}

fn check_persisted(report: &mut Report, acknowledged: &PmuState, found: &PmuState) {
    let pins = |state: &PmuState| PmuState { vcpus: without_cores(&state.vcpus), ..state.clone() };
    let same = pins(acknowledged) == pins(found);
    let registers: usize = found.vcpus.iter().map(|vcpu| vcpu.registers.len()).sum();
    report.check(
        "persisted_state_survives_sigkill",
        same,
        if same {
            format!("record {}, {registers} registers, as acknowledged", found.sequence)
        } else {
            format!("acknowledged was {}, found is {}", one_line(acknowledged), one_line(found))
        },
    );
}

async fn check_restarted(report: &mut Report, b: &Client, vm: &VirtualMachine) -> Result<(), DemoError> {
    let restarted = b.get_vm(VM).await.step("ask the restarted host for the machine")?;
    report.check(
        "machine_is_known_after_restart",
        restarted.uid == vm.uid
            && restarted.observed_state() == virtual_machine::State::Stopped
            && restarted.reason == "HOST_RESTARTED",
        format!("{} because of {}", restarted.observed_state().as_str_name(), restarted.reason),
    );
    Ok(())
}

/// Looks again and again until `look` finds what it wants; tells how long that took.
async fn until<T>(
    what: &'static str,
    mut look: impl AsyncFnMut() -> Result<Result<T, String>, DemoError>,
) -> Result<(T, Duration), DemoError> {
    let begin = Instant::now();
    loop {
        match look().await? {
            Ok(found) => return Ok((found, begin.elapsed())),
            Err(last) if begin.elapsed() > PATIENCE => {
                return Err(DemoError::Waited { what, waited: PATIENCE, last });
            }
            Err(_) => tokio::time::sleep(LOOK).await,
        }
    }
}

/// Every counter that counts now is beyond where it was, and every vCPU has had an overflow interrupt since.
fn all_beyond(before: &[VcpuPmu], now: &[VcpuPmu]) -> bool {
    live(now) > 0 && lagging(before, now).is_empty()
}

/// What has not moved, in words; empty if all has.
fn lagging(before: &[VcpuPmu], now: &[VcpuPmu]) -> String {
    let mut behind = Vec::new();
    for vcpu in now {
        let Some(earlier) = before.iter().find(|earlier| earlier.vcpu == vcpu.vcpu) else { continue };
        for counter in vcpu.counters.iter().filter(|counter| counter.live && !counter.pmi_enabled) {
            let was = earlier.counters.iter().find(|was| was.name == counter.name).map_or(0, |was| was.value);
            if counter.value <= was {
                behind.push(format!("vCPU {} {} at {}", vcpu.vcpu, counter.name, counter.value));
            }
        }
        if !vcpu.counters.iter().any(|counter| counter.live) {
            behind.push(format!("vCPU {} has no live counter", vcpu.vcpu));
        }
        if vcpu.pmis <= earlier.pmis {
            behind.push(format!("vCPU {} at {} PMIs", vcpu.vcpu, vcpu.pmis));
        }
    }
    behind.join(", ")
}

/// Number of counters that count.
fn live(vcpus: &[VcpuPmu]) -> usize {
    vcpus.iter().flat_map(|vcpu| &vcpu.counters).filter(|counter| counter.live).count()
}

/// For comparisons: the pin is the host's business and not the guest's state.
fn without_cores(vcpus: &[VcpuPmu]) -> Vec<VcpuPmu> {
    vcpus.iter().map(|vcpu| VcpuPmu { core: 0, ..vcpu.clone() }).collect()
}

fn show_movement(first: &Pmu, moved: &Pmu, elapsed: Duration) -> String {
    let mut lines = vec![format!("  within {:.1} s:", elapsed.as_secs_f64())];
    for (was, is) in first.vcpus.iter().zip(&moved.vcpus) {
        for (was, counter) in was.counters.iter().zip(&is.counters).filter(|(_, counter)| counter.live) {
            lines.push(format!(
                "  vCPU {} {:8} {:>20} -> {:>20}{}",
                is.vcpu,
                counter.name,
                units::grouped(was.value),
                units::grouped(counter.value),
                if counter.pmi_enabled {
                    format!("  takes overflows, {} so far", is.pmis)
                } else {
                    String::new()
                },
            ));
        }
    }
    lines.join("\n")
}

fn show_persisted(state: &PmuState) -> String {
    state
        .vcpus
        .iter()
        .map(|vcpu| {
            let digest = vcpu.digest.get(..16).unwrap_or(&vcpu.digest);
            format!(
                "  vCPU {}: {} registers, digest {digest}..., {} PMIs",
                vcpu.vcpu,
                vcpu.registers.len(),
                vcpu.pmis
            )
        })
        .collect::<Vec<_>>()
        .join("\n")
}

fn one_line(state: &PmuState) -> String {
    let digests: Vec<&str> = state.vcpus.iter().map(|vcpu| vcpu.digest.as_str()).collect();
    format!("record {} of epoch {} with digests {}", state.sequence, state.epoch, digests.join(" "))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_client::api::PmuCounter;

    fn reading(value: u64, pmis: u64) -> Vec<VcpuPmu> {
        let counter = PmuCounter { name: "gp0".to_owned(), value, live: true, ..PmuCounter::default() };
        vec![VcpuPmu { counters: vec![counter], pmis, ..VcpuPmu::default() }]
    }

    #[test]
    fn movement_needs_every_counter_and_an_interrupt() {
        assert!(all_beyond(&reading(1, 0), &reading(2, 1)));
        assert!(!all_beyond(&reading(1, 0), &reading(1, 1)), "the counter stands");
        assert!(!all_beyond(&reading(1, 1), &reading(2, 1)), "no interrupt came");
        assert!(!all_beyond(&[], &[]), "nothing counts");
    }

    #[test]
    fn an_altered_record_is_not_intact() {
        let state = PmuState { vcpus: reading(5, 1), sequence: 3, ..PmuState::default() };
        let mut report = Report::default();
        let mut repinned = state.clone();
        repinned.vcpus[0].core = 7;
        check_persisted(&mut report, &state, &repinned);
        check_persisted(&mut report, &state, &PmuState { vcpus: reading(6, 1), ..state.clone() });
        check_persisted(&mut report, &state, &PmuState { sequence: 2, ..state.clone() });
        assert_eq!(report.checks.iter().map(|check| check.ok).collect::<Vec<_>>(), [true, false, false]);
    }
}
