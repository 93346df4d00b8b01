//! What a request says about memory, CPUID and dirty tracking, as the parts that do it want it.

use vpmu_proto::api::virtual_machine_spec::DirtyTracking;
use vpmu_proto::api::{CpuidDifference, VirtualMachineSpec, cpuid_spec, memory_backing};

use crate::error::WorkerError;
use crate::hypervisor::kvm::features::{CpuidPolicy, names};
use crate::hypervisor::kvm::{self, DirtyMode};
use crate::memory::HugePages;

/// Most features of a list.
const MAX_FEATURES: usize = 128;
/// What a leaf is made of, in order.
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// What memory is made of.
pub(super) struct Backing {
    pub(super) pages: HugePages,
    pub(super) prefault: bool,
}

pub(super) fn backing(spec: &VirtualMachineSpec) -> Result<Backing, WorkerError> {
    let asked = spec.memory_backing.unwrap_or_default();
    let pages = match memory_backing::HugePages::try_from(asked.huge_pages) {
        Ok(memory_backing::HugePages::Unspecified) => HugePages::None,
        Ok(memory_backing::HugePages::Hugetlb) => HugePages::Hugetlb,
        Ok(memory_backing::HugePages::Transparent) => HugePages::Transparent,
        Err(_) => {
            let remedy = "give HUGETLB, TRANSPARENT or nothing";
            return Err(WorkerError::invalid("spec.memory_backing.huge_pages", asked.huge_pages, remedy));
        }
    };
    Ok(Backing { pages, prefault: asked.prefault })
}

/// The CPUID policy, not yet held against the host.
pub fn features(spec: &VirtualMachineSpec) -> Result<CpuidPolicy, WorkerError> {
    let asked = spec.cpuid.clone().unwrap_or_default();
    let policy = match cpuid_spec::Policy::try_from(asked.policy) {
        Ok(cpuid_spec::Policy::Unspecified | cpuid_spec::Policy::Host) => CpuidPolicy::Host,
        Ok(cpuid_spec::Policy::Baseline) => CpuidPolicy::Baseline,
        Ok(cpuid_spec::Policy::List) if asked.features.len() <= MAX_FEATURES => {
            return Ok(CpuidPolicy::Features(asked.features));
        }
        Ok(cpuid_spec::Policy::List) => {
            let remedy = "give at most 128 names";
            return Err(WorkerError::invalid("spec.cpuid.features", asked.features.len(), remedy));
        }
        Err(_) => {
            return Err(WorkerError::invalid(
                "spec.cpuid.policy",
                asked.policy,
                "give HOST, BASELINE or LIST",
            ));
        }
    };
    if asked.features.is_empty() {
        return Ok(policy);
    }
    Err(WorkerError::invalid("spec.cpuid.features", asked.features.join(","), "features go with policy LIST"))
}

/// The same, held against this host's KVM.
pub fn check_features(spec: &VirtualMachineSpec) -> Result<(), WorkerError> {
    kvm::features::check(&features(spec)?)?.map_err(|refused| {
        let remedy = format!("it {}; `vpmuctl vm create --help` says how to name features", refused.problem);
        WorkerError::invalid("spec.cpuid.features", refused.feature, remedy)
    })
}

pub(super) fn dirty(spec: &VirtualMachineSpec) -> Result<DirtyMode, WorkerError> {
    match DirtyTracking::try_from(spec.dirty_tracking) {
        Ok(DirtyTracking::Unspecified) => Ok(DirtyMode::Auto),
        Ok(DirtyTracking::Bitmap) => Ok(DirtyMode::Bitmap),
        Ok(DirtyTracking::Ring) => Ok(DirtyMode::Ring),
        Err(_) => Err(WorkerError::invalid(
            "spec.dirty_tracking",
            spec.dirty_tracking,
            "give BITMAP, RING or nothing",
        )),
    }
}

/// Differences register by register, with the features that they are about.
pub(crate) fn differences(found: &[kvm::CpuidDifference]) -> Vec<CpuidDifference> {
    let mut out = Vec::new();
    for d in found {
        for (at, register) in REGISTERS.into_iter().enumerate() {
            let (asked, stored) = (d.asked[at], d.stored[at]);
            if asked == stored {
                continue;
            }
            let (leaf, subleaf, register) = (d.leaf, d.subleaf, register.to_owned());
            let features = Vec::new();
            let mut difference = CpuidDifference { leaf, subleaf, register, asked, stored, features };
            spell(&mut difference);
            out.push(difference);
        }
    }
    out
}

/// Names the features that a difference is about, by its bits.
pub fn spell(difference: &mut CpuidDifference) {
    let (leaf, subleaf) = (difference.leaf, difference.subleaf);
    let (asked, stored) = (difference.asked, difference.stored);
    let Some(at) = REGISTERS.iter().position(|name| *name == difference.register) else { return };
    let signed = |sign: char, bits| {
        names(leaf, subleaf, at, bits).into_iter().map(move |name| format!("{sign}{name}"))
    };
    difference.features = signed('+', stored & !asked).chain(signed('-', asked & !stored)).collect();
}

#[cfg(test)]
mod tests {
    use super::*;
    use vpmu_proto::api::cpuid_spec::Policy;
    use vpmu_proto::api::memory_backing::HugePages as Asked;
    use vpmu_proto::api::{CpuidSpec, MemoryBacking};

    #[test]
    fn each_word_of_the_request_becomes_what_it_means() {
        let named = || vec!["avx2".to_owned()];
        let policy = |policy: i32, list: Vec<String>| {
            let cpuid = Some(CpuidSpec { policy, features: list });
            features(&VirtualMachineSpec { cpuid, ..Default::default() }).map_err(|e| e.to_string())
        };
        assert_eq!(features(&VirtualMachineSpec::default()).expect("good"), CpuidPolicy::Host);
        assert_eq!(policy(Policy::Unspecified.into(), vec![]), Ok(CpuidPolicy::Host));
        assert_eq!(policy(Policy::Host.into(), vec![]), Ok(CpuidPolicy::Host));
        assert_eq!(policy(Policy::Baseline.into(), vec![]), Ok(CpuidPolicy::Baseline));
        assert_eq!(policy(Policy::List.into(), named()), Ok(CpuidPolicy::Features(named())));
        for (asked, list, field) in [
            (Policy::Baseline.into(), named(), "spec.cpuid.features"),
            (Policy::List.into(), vec![String::new(); 129], "spec.cpuid.features"),
            (9, vec![], "spec.cpuid.policy"),
        ] {
            let refused = policy(asked, list).expect_err("refused");
            assert!(refused.starts_with(field), "{refused}");
        }

        let tracking = |dirty_tracking: i32| {
            dirty(&VirtualMachineSpec { dirty_tracking, ..Default::default() }).map_err(|e| e.to_string())
        };
        assert_eq!(tracking(DirtyTracking::Unspecified.into()), Ok(DirtyMode::Auto));
        assert_eq!(tracking(DirtyTracking::Bitmap.into()), Ok(DirtyMode::Bitmap));
        assert_eq!(tracking(DirtyTracking::Ring.into()), Ok(DirtyMode::Ring));
        assert!(tracking(7).expect_err("refused").starts_with("spec.dirty_tracking"));

        let made_of = |huge_pages: i32, prefault: bool| {
            let memory_backing = Some(MemoryBacking { huge_pages, prefault });
            let found = backing(&VirtualMachineSpec { memory_backing, ..Default::default() });
            found.map(|b| (b.pages, b.prefault)).map_err(|e| e.to_string())
        };
        assert_eq!(made_of(Asked::Unspecified.into(), true), Ok((HugePages::None, true)));
        assert_eq!(made_of(Asked::Hugetlb.into(), false), Ok((HugePages::Hugetlb, false)));
        assert_eq!(made_of(Asked::Transparent.into(), false), Ok((HugePages::Transparent, false)));
        assert!(made_of(-1, false).expect_err("refused").starts_with("spec.memory_backing.huge_pages"));
    }
}
