//! A virtual machine, flat.

use super::{bare, time};
use crate::names;
use serde::Serialize;
use vpmu_proto::api::{
    CpuPlacement, VirtualMachine, WatchVirtualMachinesResponse, cpu_placement, pmu_spec,
    virtual_machine_spec, watch_virtual_machines_response,
};

/// What `vm get --output json` prints.
#[derive(Clone, Debug, Serialize)]
pub struct VmView {
    /// Short name.
    pub name: String,
    /// Full resource name.
    pub resource: String,
    /// Stays the same for the life of the machine.
    pub uid: String,
    /// Changes with every change of the record.
    pub etag: String,
    /// `RUNNING`, `PAUSED` or `STOPPED`.
    pub desired_state: String,
    /// `CREATING`, `STOPPED`, `STARTING`, `RUNNING`, `PAUSED`, `STOPPING`, `MIGRATING_OUT`, `INCOMING`, `FAILED`, `MOVED`.
    pub observed_state: String,
    /// Stable code of why it is in that state; empty in the ordinary case.
    pub reason: String,
    /// The reason in words.
    pub message: String,
    /// Ownership epoch.
    pub epoch: u64,
    /// Worker starts under the epoch.
    pub incarnation: u64,
    /// Process id of the worker in process isolation, else 0.
    pub worker_pid: u32,
    /// How the worker's process is confined; empty in thread isolation.
    pub sandbox: String,
    /// `kvm` or `simulated`.
    pub hypervisor: String,
    /// `model`, `msr` or `kvm`.
    pub pmu_mode: String,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Guest memory in bytes.
    pub memory_bytes: u64,
    /// Host core of each vCPU; empty unless it has a worker.
    pub vcpu_cores: Vec<u32>,
    /// What it boots.
    pub boot: BootView,
    /// The PMU it asked for.
    pub pmu: PmuSpecView,
    /// Where CPUID as the guest sees it differs from what was asked for, register by register.
    pub cpuid_differences: Vec<String>,
    /// The host cores it asked for.
    pub placement: PlacementView,
    /// What happens when it ends by itself.
    pub restart_policy: String,
    /// Starts by the restart policy since a user's.
    pub restart_count: u32,
    /// When the restart policy tries again, or nothing.
    pub next_restart_time: Option<String>,
    /// Full name of the migration under way, or empty.
    pub migration: String,
    /// Host id it has moved to, or empty.
    pub moved_to: String,
    /// When it was created.
    pub create_time: Option<String>,
    /// When the record last changed.
    pub update_time: Option<String>,
}

/// What a machine boots.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum BootView {
    /// Nothing was said.
    None,
    /// The built-in probe guest; see `ProbeBoot` in the API.
    Probe {
        /// Working set that each vCPU dirties, in bytes.
        working_set_bytes: u64,
        /// Pages that each vCPU dirties a second.
        dirty_pages_per_second: u64,
        /// Events between two overflows.
        overflow_period: u64,
        /// Bytes filled with a pattern at the start.
        fill_bytes: u64,
        /// Gap above which it counts a hole, in microseconds.
        gap_threshold_us: u32,
    },
    /// A kernel file.
    Kernel {
        /// Path on the host.
        path: String,
        /// Path on the host, or empty.
        initrd_path: String,
        /// Kernel command line.
        cmdline: String,
    },
}

/// The PMU a machine asked for.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PmuSpecView {
    /// General-purpose counters; 0 with `fixed_counters` 0 is the host's default.
    pub gp_counters: u32,
    /// Fixed counters.
    pub fixed_counters: u32,
    /// `STRICT` or `LAZY`.
    pub switch_policy: String,
    /// No PMU at all.
    pub disabled: bool,
}

/// The host cores that a machine asked for.
#[derive(Clone, Debug, Default, Serialize)]
pub struct PlacementView {
    /// `SHARED` or `DEDICATED`.
    pub policy: String,
    /// `PACKED` or `SPREAD`; empty where it does not matter.
    pub arrangement: String,
    /// All on one NUMA node, memory bound to it.
    pub numa_local: bool,
    /// The cores that were named; empty if the host chooses.
    pub cores: Vec<u32>,
    /// SCHED_FIFO priority, 0 for the ordinary scheduler.
    pub fifo_priority: u32,
}

impl From<&CpuPlacement> for PlacementView {
    fn from(placement: &CpuPlacement) -> Self {
        let dedicated = placement.policy() == cpu_placement::Policy::Dedicated;
        let arrangement = match placement.arrangement() {
            _ if !dedicated || !placement.cores.is_empty() => "",
            cpu_placement::Arrangement::Spread => "SPREAD",
            cpu_placement::Arrangement::Packed | cpu_placement::Arrangement::Unspecified => "PACKED",
        };
        Self {
            policy: if dedicated { "DEDICATED" } else { "SHARED" }.to_owned(),
            arrangement: arrangement.to_owned(),
            numa_local: placement.numa_local,
            cores: placement.cores.clone(),
            fifo_priority: placement.fifo_priority,
        }
    }
}

impl From<&VirtualMachine> for VmView {
    fn from(vm: &VirtualMachine) -> Self {
        let spec = vm.spec.clone().unwrap_or_default();
        let boot = match &spec.boot {
            None => BootView::None,
            Some(virtual_machine_spec::Boot::Probe(probe)) => BootView::Probe {
                working_set_bytes: probe.working_set_bytes,
                dirty_pages_per_second: probe.dirty_pages_per_second,
                overflow_period: probe.overflow_period,
                fill_bytes: probe.fill_bytes,
                gap_threshold_us: probe.gap_threshold_us,
            },
            Some(virtual_machine_spec::Boot::Kernel(kernel)) => BootView::Kernel {
                path: kernel.path.clone(),
                initrd_path: kernel.initrd_path.clone(),
                cmdline: kernel.cmdline.clone(),
            },
        };
        let pmu = spec.pmu.as_ref().map_or_else(PmuSpecView::default, |pmu| PmuSpecView {
            gp_counters: pmu.gp_counters,
            fixed_counters: pmu.fixed_counters,
            switch_policy: match pmu.switch_policy() {
                pmu_spec::SwitchPolicy::Lazy => "LAZY".to_owned(),
                pmu_spec::SwitchPolicy::Strict | pmu_spec::SwitchPolicy::Unspecified => "STRICT".to_owned(),
            },
            disabled: pmu.disabled,
        });
        Self {
            name: names::short(&vm.name).to_owned(),
            resource: vm.name.clone(),
            uid: vm.uid.clone(),
            etag: vm.etag.clone(),
            desired_state: bare(vm.desired_state().as_str_name(), "DESIRED_STATE_"),
            observed_state: bare(vm.observed_state().as_str_name(), ""),
            reason: vm.reason.clone(),
            message: vm.message.clone(),
            epoch: vm.epoch,
            incarnation: vm.incarnation,
            worker_pid: vm.worker_pid,
            sandbox: vm.sandbox.clone(),
            hypervisor: vm.hypervisor.clone(),
            pmu_mode: vm.pmu_mode.clone(),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            vcpu_cores: vm.vcpu_cores.clone(),
            boot,
            pmu,
            cpuid_differences: vm.cpuid_differences.iter().map(difference).collect(),
            placement: PlacementView::from(&spec.placement.clone().unwrap_or_default()),
            restart_policy: bare(spec.restart_policy().as_str_name(), "RESTART_POLICY_"),
            restart_count: vm.restart_count,
            next_restart_time: time(vm.next_restart_time.as_ref()),
            migration: vm.migration.clone(),
            moved_to: vm.moved_to.clone(),
            create_time: time(vm.create_time.as_ref()),
            update_time: time(vm.update_time.as_ref()),
        }
    }
}

/// One line of `vm watch --output json`.
#[derive(Clone, Debug, Serialize)]
pub struct VmEventView {
    /// `EXISTING`, `CREATED`, `UPDATED`, `DELETED`, `SYNCED` or `LAGGED`.
    pub kind: String,
    /// Grows with every event of the daemon.
    pub sequence: u64,
    /// The machine after it happened.
    pub vm: Option<VmView>,
}

impl From<&WatchVirtualMachinesResponse> for VmEventView {
    fn from(event: &WatchVirtualMachinesResponse) -> Self {
        let kind: watch_virtual_machines_response::Kind = event.kind();
        Self {
            kind: bare(kind.as_str_name(), "KIND_"),
            sequence: event.sequence,
            vm: event.virtual_machine.as_ref().map(VmView::from),
        }
    }
}

/// `leaf 0x7/0 ebx: 0x10 asked, 0x30 shown (+smap)`
fn difference(d: &vpmu_proto::api::CpuidDifference) -> String {
    let mut text = format!(
        "leaf {:#x}/{} {}: {:#x} asked, {:#x} shown",
        d.leaf, d.subleaf, d.register, d.asked, d.stored
    );
    if !d.features.is_empty() {
        text = format!("{text} ({})", d.features.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_proto::api::{VirtualMachineSpec, virtual_machine};

    #[test]
    fn states_are_printed_bare() {
        let vm = VirtualMachine {
            name: "projects/default/virtualMachines/a".to_owned(),
            spec: Some(VirtualMachineSpec {
                vcpus: 2,
                memory_bytes: 256 << 20,
                ..VirtualMachineSpec::default()
            }),
            desired_state: virtual_machine::DesiredState::Running.into(),
            observed_state: virtual_machine::State::MigratingOut.into(),
            create_time: Some(prost_types::Timestamp { seconds: 1, nanos: 0 }),
            ..VirtualMachine::default()
        };
        let json = serde_json::to_value(VmView::from(&vm)).expect("serialises");
        assert_eq!(json["name"], "a");
        assert_eq!(json["desired_state"], "RUNNING");
        assert_eq!(json["observed_state"], "MIGRATING_OUT");
        assert_eq!(json["memory_bytes"], 256 << 20);
        assert_eq!(json["create_time"], "1970-01-01T00:00:01Z");
        assert_eq!(json["restart_policy"], "");
    }
}
