//! Whether and how KVM's own vPMU works on this host.
//!
//! The judgement emulated / mediated is [`Facts::kvm_pmu`]; here it is checked against what KVM itself offers: CPUID as guests can have it and
//! the list of MSRs that are state. A PMU that KVM does not list could be neither saved nor moved, so it counts as none.

use pmu::Shape;
use pmu::cpuid::{Capabilities, CpuidLeaves, Leaf};
use pmu::host_check::{Facts, KvmPmu as Kind};
use pmu::registers::{MAX_FIXED, MAX_GP};

use super::{KvmPmuError, MsrPort, check, list};
use crate::host::{HostFacts, KvmFacts, kernel_version};

/// What a guest's PMU can be under this KVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Detected {
    /// Emulated or mediated.
    pub kind: Kind,
    /// The largest PMU that KVM offers (KVM_GET_SUPPORTED_CPUID), restricted to the counters that it lists as state.
    pub shape: Shape,
    /// KVM_PMU_CAP_DISABLE: the vPMU can be switched off for a VM.
    pub can_disable: bool,
    /// Mediated on a kernel before 7.0: not the mainline implementation.
    pub backported: bool,
}

/// Judges the facts. `None` is a refusal that names the fact.
pub fn detect(host: &HostFacts, facts: &Facts) -> Result<Detected, KvmPmuError> {
    let none = |why: String, remedy| Err(KvmPmuError::None { why, remedy });
    let kvm = match &host.kvm {
        Ok(kvm) => kvm,
        Err(problem) => return none(problem.problem.clone(), "make KVM usable, or use --pmu model"),
    };
    if facts.enable_pmu == Some(false) {
        return none(
            "kvm.enable_pmu is N (off, or kvm found no PMU when it was loaded)".to_owned(),
            "load kvm with enable_pmu=Y on a host with a PMU, or use --pmu model",
        );
    }
    const REMEDY: &str = "use a host whose PMU is visible, or --pmu model";
    match &facts.pmu {
        Some(Ok(caps)) if caps.shape.gp != 0 => {}
        Some(Ok(_)) => return none("the host has no PMU".to_owned(), REMEDY),
        Some(Err(problem)) => return none(format!("the host's PMU cannot be driven: {problem}"), REMEDY),
        None => return none("the host's PMU was not probed".to_owned(), REMEDY),
    }
    let offered = match Capabilities::from_cpuid(&leaves(kvm, facts)) {
        Ok(offered) => offered.shape,
        Err(error) => return none(format!("what KVM offers guests cannot be driven: {error}"), REMEDY),
    };
    let shape = listed(offered, &kvm.msrs);
    if shape.gp == 0 {
        return none(format!("KVM offers {offered} and lists none of its counters as state"), REMEDY);
    }
    let kind = facts.kvm_pmu();
    if kind == Kind::None {
        return none("the host check finds none".to_owned(), REMEDY);
    }
    Ok(Detected {
        kind,
        shape,
        can_disable: facts.kvm_pmu_capability,
        backported: kind == Kind::Mediated && kernel_version(&facts.kernel) < (7, 0),
    })
}

/// The PMU's leaves as KVM supports them; what it does not tell is 0.
fn leaves(kvm: &KvmFacts, facts: &Facts) -> CpuidLeaves {
    let get = |leaf: u32, subleaf: u32| {
        let found = kvm.cpuid.iter().find(|(l, s, _)| *l == leaf && *s == subleaf);
        found.map_or(Leaf::default(), |&(_, _, [eax, ebx, ecx, edx])| Leaf { eax, ebx, ecx, edx })
    };
    CpuidLeaves {
        vendor: get(0, 0),
        features: get(1, 0),
        extended_features: get(7, 1),
        perfmon: get(0xA, 0),
        perfmon_ext: get(0x23, 0),
        perfmon_ext_counters: get(0x23, 1),
        amd_features: get(0x8000_0001, 0),
        amd_perfmon: get(0x8000_0022, 0),
        perf_capabilities: match &facts.pmu {
            Some(Ok(caps)) => caps.shape.perf_capabilities,
            _ => 0,
        },
    }
}

/// Leaves out counters whose registers KVM does not list.
fn listed(mut shape: Shape, msrs: &[u32]) -> Shape {
    let lists = |msr| msrs.contains(&msr);
    for i in 0..MAX_GP as u32 {
        if shape.has_gp(i) && !(lists(shape.counter_msr(i)) && lists(shape.selector_msr(i))) {
            shape.gp &= !(1 << i);
        }
    }
    for i in 0..MAX_FIXED as u32 {
        if shape.has_fixed(i) && !lists(shape.fixed_msr(i)) {
            shape.fixed &= !(1 << i);
        }
    }
    shape
}

/// What a vCPU's PMU registers say when they are read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Every register is refused or reads 0: KVM keeps no PMU for this vCPU.
    Silent {
        /// Names of those that KVM refuses to read.
        refused: String,
        /// Names of those that read 0.
        zero: String,
    },
    /// A register holds something.
    Alive {
        /// MSR.
        msr: u32,
        /// Its value.
        value: u64,
    },
}

/// Reads every register that a guest of this shape would have, each by itself. A fresh vCPU with a vPMU of v2 or later is alive (global
/// control is not 0 after reset); one of K7, PerfCtrExtCore or Intel v1 that never counted is silent too.
pub fn observe(port: &mut impl MsrPort, shape: &Shape) -> Result<Observed, KvmPmuError> {
    let (mut refused, mut zero) = (Vec::new(), Vec::new());
    for msr in list::expected(shape) {
        let mut batch = [(msr, 0)];
        match port.get(&mut batch)? {
            0 => refused.push(msr),
            _ if batch[0].1 == 0 => zero.push(msr),
            _ => return Ok(Observed::Alive { msr, value: batch[0].1 }),
        }
    }
    Ok(Observed::Silent {
        refused: check::names(refused.into_iter(), shape.vendor),
        zero: check::names(zero.into_iter(), shape.vendor),
    })
}
