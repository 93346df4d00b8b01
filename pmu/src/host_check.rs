//! What a host's kernel and set-up mean for guests' PMUs: one line for each thing that matters, with its remedy.
//!
//! This is the judgement only; the facts come as plain data from whoever may probe /proc, /sys, KVM and CPUID. It is also where the parts
//! of the 41 RFC patches that only a kernel can do are accounted for: each line names the patches it stands for (`README.md` has the
//! table), so that nothing of the series is passed over in silence.

use crate::cpuid::Capabilities;
use crate::shape::{Shape, Vendor};

mod lines;

/// How guests' PMUs are run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// The software PMU.
    Model,
    /// The real PMU through the msr driver.
    Msr,
    /// KVM's own vPMU.
    Kvm,
}

/// How KVM runs its own vPMU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum KvmPmu {
    /// Guests get the hardware while they run (Linux 7.0, `enable_mediated_pmu=Y`).
    Mediated,
    /// By perf events of the host: counts can be lost when the host's events compete.
    Emulated,
    /// There is none (`enable_pmu=N`, or a host without a PMU).
    None,
}

/// What was found. `None` means that it could not be determined.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Facts {
    /// Kernel release.
    pub kernel: String,
    /// The host's PMU by CPUID, or why there is none to drive.
    pub pmu: Option<Result<Capabilities, String>>,
    /// This host is itself a guest (CPUID.1:ECX\[31\]).
    pub is_guest: bool,
    /// What `model` mode models.
    pub model: Option<Shape>,
    /// KVM can be used, or why not.
    pub kvm: Option<Result<(), String>>,
    /// KVM_CAP_X86_MSR_FILTER with KVM_CAP_X86_USER_SPACE_MSR.
    pub kvm_msr_filter: bool,
    /// KVM_CAP_PMU_CAPABILITY offers KVM_PMU_CAP_DISABLE.
    pub kvm_pmu_capability: bool,
    /// `kvm.enable_pmu`.
    pub enable_pmu: Option<bool>,
    /// `enable_mediated_pmu` of kvm_intel or kvm_amd; `None` where the kernel has no such parameter.
    pub enable_mediated_pmu: Option<bool>,
    /// `nested` of kvm_intel or kvm_amd.
    pub nested: Option<bool>,
    /// `kernel.nmi_watchdog`.
    pub nmi_watchdog: Option<bool>,
    /// Programs with hardware perf events open, a description of each.
    pub perf_users: Option<Vec<String>>,
    /// `/sys/bus/event_source/devices/cpu/rdpmc`.
    pub rdpmc: Option<u32>,
    /// Cores isolated from the scheduler.
    pub isolated_cores: Vec<u32>,
    /// Cores whose `/dev/cpu/N/msr` can be opened for writing.
    pub msr_cores: Vec<u32>,
    /// The msr module's `allow_writes`.
    pub msr_allow_writes: Option<String>,
    /// Kernel lockdown: "none", "integrity" or "confidentiality".
    pub lockdown: Option<String>,
}

impl Facts {
    /// How KVM's own vPMU works here.
    #[must_use]
    pub fn kvm_pmu(&self) -> KvmPmu {
        let has_pmu = matches!(&self.pmu, Some(Ok(caps)) if caps.shape.gp != 0);
        match (self.enable_pmu, self.enable_mediated_pmu) {
            (Some(false), _) => KvmPmu::None,
            _ if !has_pmu || !matches!(self.kvm, Some(Ok(()))) => KvmPmu::None,
            (_, Some(true)) => KvmPmu::Mediated,
            _ => KvmPmu::Emulated,
        }
    }
}

/// How bad a line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, with the loss that the message names.
    Warning,
    /// The mode cannot be used.
    Error,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Stable id.
    pub id: &'static str,
    /// How bad it is for the mode that was asked about.
    pub level: Level,
    /// What was found and what it means.
    pub message: String,
    /// What to do; empty where nothing is to be done.
    pub remedy: String,
    /// The RFC patches that this line stands for.
    pub patches: &'static [u8],
}

/// The report for one mode, always the same lines in the same order.
#[must_use]
pub fn report(facts: &Facts, mode: Mode) -> Vec<Line> {
    lines::all(facts, mode)
}

fn vendor(facts: &Facts) -> Option<Vendor> {
    match &facts.pmu {
        Some(Ok(caps)) => Some(caps.shape.vendor),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
