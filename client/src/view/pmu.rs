//! PMU state and host capabilities, flat.

use super::time;
use crate::names;
use serde::Serialize;
use vpmu_proto::api::{
    HostCpu, HostPmuCapabilities, Pmu, PmuAudit, PmuLoss, PmuRestored, PmuShape, PmuState, ProbeVcpuReport,
    VcpuPmu,
};

/// What a PMU looks like.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct ShapeView {
    /// `intel` or `amd`.
    pub vendor: String,
    /// PerfMon version, by the vendor's count.
    pub version: u32,
    /// Which general-purpose counters exist.
    pub gp_bitmap: u64,
    /// Which fixed counters exist.
    pub fixed_bitmap: u64,
    /// Bits in a general-purpose counter.
    pub gp_width: u32,
    /// Bits in a fixed counter.
    pub fixed_width: u32,
    /// `IA32_PERF_CAPABILITIES` as the guest sees it.
    pub perf_capabilities: u64,
}

impl From<&PmuShape> for ShapeView {
    fn from(shape: &PmuShape) -> Self {
        Self {
            vendor: shape.vendor.clone(),
            version: shape.version,
            gp_bitmap: shape.gp_bitmap,
            fixed_bitmap: shape.fixed_bitmap,
            gp_width: shape.gp_width,
            fixed_width: shape.fixed_width,
            perf_capabilities: shape.perf_capabilities,
        }
    }
}

/// A shape in words: `intel v5, 8 general-purpose and 4 fixed counters of 48 bits`.
pub fn shape_text(shape: &PmuShape) -> String {
    let gp = shape.gp_bitmap.count_ones();
    let fixed = shape.fixed_bitmap.count_ones();
    if fixed == 0 {
        format!("{} v{}, {gp} counters of {} bits", shape.vendor, shape.version, shape.gp_width)
    } else {
        format!(
            "{} v{}, {gp} general-purpose and {fixed} fixed counters of {} bits",
            shape.vendor, shape.version, shape.gp_width
        )
    }
}

/// One counter.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CounterView {
    /// `gp0`, `fixed1`.
    pub name: String,
    /// Value.
    pub value: u64,
    /// Event selector as the guest wrote it.
    pub selector: u64,
    /// It counts.
    pub live: bool,
    /// Its overflow status bit.
    pub overflow: bool,
    /// An overflow raises a PMI.
    pub pmi_enabled: bool,
}

/// One register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct RegisterView {
    /// MSR number.
    pub msr: u32,
    /// Its name.
    pub name: String,
    /// Its value.
    pub value: u64,
}

/// One vCPU's PMU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct VcpuView {
    /// vCPU index.
    pub vcpu: u32,
    /// Host core.
    pub core: u32,
    /// Counters, decoded.
    pub counters: Vec<CounterView>,
    /// Every register of the image.
    pub registers: Vec<RegisterView>,
    /// PMIs injected since the vCPU was created.
    pub pmis: u64,
    /// An overflow interrupt is owed to the guest.
    pub pmi_pending: bool,
    /// A PMI is in service.
    pub in_service: bool,
    /// SHA-256 of shape and registers, hex.
    pub digest: String,
}

impl From<&VcpuPmu> for VcpuView {
    fn from(pmu: &VcpuPmu) -> Self {
        Self {
            vcpu: pmu.vcpu,
            core: pmu.core,
            counters: pmu
                .counters
                .iter()
                .map(|c| CounterView {
                    name: c.name.clone(),
                    value: c.value,
                    selector: c.selector,
                    live: c.live,
                    overflow: c.overflow,
                    pmi_enabled: c.pmi_enabled,
                })
                .collect(),
            registers: pmu
                .registers
                .iter()
                .map(|r| RegisterView { msr: r.msr, name: r.name.clone(), value: r.value })
                .collect(),
            pmis: pmu.pmis,
            pmi_pending: pmu.pmi_pending,
            in_service: pmu.in_service,
            digest: pmu.digest.clone(),
        }
    }
}

/// What one vCPU of the probe guest says of itself.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProbeView {
    /// vCPU index.
    pub vcpu: u32,
    /// Heartbeats.
    pub heartbeats: u64,
    /// Turns of its loop.
    pub loops: u64,
    /// Pages it dirtied.
    pub pages_dirtied: u64,
    /// PMIs that its handler took.
    pub pmis: u64,
    /// Faults in its own view.
    pub faults: u64,
    /// Code of the first fault; 0 for none.
    pub first_fault: u64,
    /// Longest gap between two turns, in milliseconds.
    pub max_gap_ms: f64,
    /// Longest gap since the last migration resumed it, in milliseconds.
    pub last_gap_ms: f64,
    /// Gaps above the threshold.
    pub gaps: u64,
}

impl From<&ProbeVcpuReport> for ProbeView {
    fn from(report: &ProbeVcpuReport) -> Self {
        Self {
            vcpu: report.vcpu,
            heartbeats: report.heartbeats,
            loops: report.loops,
            pages_dirtied: report.pages_dirtied,
            pmis: report.pmis,
            faults: report.faults,
            first_fault: report.first_fault,
            max_gap_ms: report.max_gap_ns as f64 / 1e6,
            last_gap_ms: report.last_gap_ns as f64 / 1e6,
            gaps: report.gaps,
        }
    }
}

/// What `pmu show --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct PmuView {
    /// Short name of the machine.
    pub name: String,
    /// `model`, `msr` or `kvm`.
    pub mode: String,
    /// The counts are modelled, not hardware.
    pub modelled: bool,
    /// The guest's PMU.
    pub shape: ShapeView,
    /// What the host's PMU (or its model) is.
    pub host_pmu: String,
    /// One entry a vCPU.
    pub vcpus: Vec<VcpuView>,
    /// When it was read.
    pub read_time: Option<String>,
    /// The probe guest's report, one entry a vCPU, if it is the probe.
    pub probe: Option<Vec<ProbeView>>,
    /// What a migration under best_effort or reset did not bring along.
    pub restored: Option<RestoredView>,
}

/// What of a PMU did not come along.
#[derive(Clone, Debug, Serialize)]
pub struct RestoredView {
    /// `best_effort` or `reset`.
    pub policy: String,
    /// Name of the migration.
    pub migration: String,
    /// How many registers did not come along whole.
    pub losses_total: u32,
    /// The first of them, each as `vCPU 0 IA32_PMC4 0x7 is now 0x0`.
    pub losses: Vec<String>,
}

impl From<&PmuRestored> for RestoredView {
    fn from(restored: &PmuRestored) -> Self {
        let text = |l: &PmuLoss| format!("vCPU {} {} {:#x} is now {:#x}", l.vcpu, l.name, l.had, l.has);
        Self {
            policy: restored.policy.clone(),
            migration: restored.migration.clone(),
            losses_total: restored.losses_total,
            losses: restored.losses.iter().map(text).collect(),
        }
    }
}

impl From<&Pmu> for PmuView {
    fn from(pmu: &Pmu) -> Self {
        Self {
            name: names::vm_of(&pmu.name).to_owned(),
            modelled: pmu.mode == "model",
            mode: pmu.mode.clone(),
            shape: pmu.shape.as_ref().map(ShapeView::from).unwrap_or_default(),
            host_pmu: pmu.host_pmu.clone(),
            vcpus: pmu.vcpus.iter().map(VcpuView::from).collect(),
            read_time: time(pmu.read_time.as_ref()),
            probe: pmu.probe.as_ref().map(|probe| probe.vcpus.iter().map(ProbeView::from).collect()),
            restored: pmu.restored.as_ref().map(RestoredView::from),
        }
    }
}

/// What `pmu show --persisted --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct PmuStateView {
    /// Short name of the machine.
    pub name: String,
    /// `model`, `msr` or `kvm`.
    pub mode: String,
    /// The counts are modelled, not hardware.
    pub modelled: bool,
    /// The guest's PMU.
    pub shape: ShapeView,
    /// One entry a vCPU.
    pub vcpus: Vec<VcpuView>,
    /// Ownership epoch at which it was taken.
    pub epoch: u64,
    /// Grows with each record of one machine.
    pub sequence: u64,
    /// When it was taken.
    pub capture_time: Option<String>,
    /// Why it was taken.
    pub cause: String,
}

impl From<&PmuState> for PmuStateView {
    fn from(state: &PmuState) -> Self {
        Self {
            name: names::vm_of(&state.name).to_owned(),
            modelled: state.mode == "model",
            mode: state.mode.clone(),
            shape: state.shape.as_ref().map(ShapeView::from).unwrap_or_default(),
            vcpus: state.vcpus.iter().map(VcpuView::from).collect(),
            epoch: state.epoch,
            sequence: state.sequence,
            capture_time: time(state.capture_time.as_ref()),
            cause: state.cause.clone(),
        }
    }
}

/// What `host info --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct HostView {
    /// Identity of the host's store.
    pub host_id: String,
    /// Version of the daemon.
    pub daemon_version: String,
    /// `kvm` or `simulated`.
    pub hypervisor: String,
    /// `model`, `msr` or `kvm`.
    pub pmu_mode: String,
    /// The counts are modelled, not hardware.
    pub modelled: bool,
    /// Short form of the host's PMU.
    pub host_pmu: String,
    /// The largest PMU that a guest can get.
    pub shape: ShapeView,
    /// Cores that machines may use.
    pub cores: Vec<u32>,
    /// Why a mode is not offered.
    pub notes: Vec<String>,
    /// The host's processors and who has them.
    pub topology: Vec<HostCpuView>,
}

/// What `pmu audit --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct PmuAuditView {
    /// Short name of the machine.
    pub name: String,
    /// `model`, `msr` or `kvm`.
    pub mode: String,
    /// vCPUs whose cores were audited.
    pub vcpus: u32,
    /// Registers that somebody else wrote.
    pub foreign: Vec<ForeignWriteView>,
}

/// A register that somebody else wrote.
#[derive(Clone, Debug, Serialize)]
pub struct ForeignWriteView {
    /// vCPU index.
    pub vcpu: u32,
    /// Host core.
    pub core: u32,
    /// MSR number.
    pub msr: u32,
    /// Its name.
    pub register: String,
    /// What was left there.
    pub expected: u64,
    /// What is there.
    pub found: u64,
}

impl From<&PmuAudit> for PmuAuditView {
    fn from(audit: &PmuAudit) -> Self {
        let foreign = audit.foreign.iter().map(|f| ForeignWriteView {
            vcpu: f.vcpu,
            core: f.core,
            msr: f.msr,
            register: f.register.clone(),
            expected: f.expected,
            found: f.found,
        });
        Self {
            name: names::short(audit.name.trim_end_matches("/pmu")).to_owned(),
            mode: audit.mode.clone(),
            vcpus: audit.vcpus,
            foreign: foreign.collect(),
        }
    }
}

/// One processor of a host.
#[derive(Clone, Debug, Serialize)]
pub struct HostCpuView {
    /// Linux's number.
    pub cpu: u32,
    /// Physical package.
    pub package: u32,
    /// NUMA node.
    pub node: u32,
    /// Lowest-numbered processor of its physical core.
    pub core: u32,
    /// Lowest-numbered processor behind its last-level cache.
    pub cache: u32,
    /// Isolated from the scheduler.
    pub isolated: bool,
    /// nohz_full.
    pub nohz_full: bool,
    /// vCPUs may use it.
    pub usable: bool,
    /// Machine that its core is dedicated to, or empty.
    pub dedicated_to: String,
    /// vCPUs that are pinned to it.
    pub vcpus: u32,
}

impl From<&HostCpu> for HostCpuView {
    fn from(cpu: &HostCpu) -> Self {
        Self {
            cpu: cpu.cpu,
            package: cpu.package,
            node: cpu.node,
            core: cpu.core,
            cache: cpu.cache,
            isolated: cpu.isolated,
            nohz_full: cpu.nohz_full,
            usable: cpu.usable,
            dedicated_to: cpu.dedicated_to.clone(),
            vcpus: cpu.vcpus,
        }
    }
}

impl From<&HostPmuCapabilities> for HostView {
    fn from(host: &HostPmuCapabilities) -> Self {
        Self {
            host_id: host.host_id.clone(),
            daemon_version: host.daemon_version.clone(),
            hypervisor: host.hypervisor.clone(),
            modelled: host.mode == "model",
            pmu_mode: host.mode.clone(),
            host_pmu: host.host_pmu.clone(),
            shape: host.shape.as_ref().map(ShapeView::from).unwrap_or_default(),
            cores: host.cores.clone(),
            notes: host.notes.clone(),
            topology: host.topology.iter().map(HostCpuView::from).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_proto::api::PmuRegister;

    #[test]
    fn registers_are_plain_integers() {
        let pmu = Pmu {
            name: "projects/default/virtualMachines/a/pmu".to_owned(),
            mode: "model".to_owned(),
            vcpus: vec![VcpuPmu {
                registers: vec![PmuRegister { msr: 0x38f, name: "GLOBAL_CTRL".to_owned(), value: u64::MAX }],
                ..VcpuPmu::default()
            }],
            ..Pmu::default()
        };
        let json = serde_json::to_string(&PmuView::from(&pmu)).expect("serialises");
        assert!(json.contains("\"value\":18446744073709551615"), "{json}");
        assert!(json.contains("\"modelled\":true") && json.contains("\"name\":\"a\""), "{json}");
    }
}
