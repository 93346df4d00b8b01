//! CPU features by name, and the policies that choose among them.
//!
//! `host` shows what KVM supports; `baseline` the features of x86-64-v3 and nothing newer, so that a guest finds them on
//! any host that has those; a list shows exactly the named ones. Features that are not in the table (the PMU aside,
//! which is decided elsewhere) are the processor's ground floor, and stay. KVM may force features back on:
//! what it stored is read back, and the differences are shown by name.

use kvm_bindings::kvm_cpuid_entry2;

/// A bit of a CPUID register.
struct Feature {
    name: &'static str,
    leaf: u32,
    subleaf: u32,
    /// EAX, EBX, ECX, EDX.
    register: usize,
    bit: u32,
    baseline: bool,
}

/// What a guest is to see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum CpuidPolicy {
    /// All that KVM supports.
    #[default]
    Host,
    /// x86-64-v3.
    Baseline,
    /// These features.
    Features(Vec<String>),
}

/// Names that a policy asks for and that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The feature.
    pub feature: String,
    /// What is wrong with it.
    pub problem: &'static str,
}

macro_rules! features {
    ($($leaf:literal / $subleaf:literal $register:ident: $($name:ident $bit:literal $($base:ident)?),*;)*) => {
        const FEATURES: &[Feature] = &[$($(Feature {
            name: stringify!($name),
            leaf: $leaf,
            subleaf: $subleaf,
            register: Register::$register as usize,
            bit: $bit,
            baseline: features!(@ $($base)?),
        }),*),*];
    };
    (@ v3) => { true };
    (@) => { false };
}

#[derive(Clone, Copy)]
enum Register {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

features! {
    0x1 / 0 Ecx: sse3 0 v3, pclmulqdq 1, ssse3 9 v3, fma 12 v3, cx16 13 v3, pcid 17, sse4_1 19 v3, sse4_2 20 v3, movbe 22 v3,
        popcnt 23 v3, aes 25, xsave 26 v3, avx 28 v3, f16c 29 v3, rdrand 30;
    0x7 / 0 Ebx: fsgsbase 0, bmi1 3 v3, avx2 5 v3, smep 7, bmi2 8 v3, erms 9, invpcid 10, avx512f 16, avx512dq 17, rdseed 18,
        adx 19, smap 20, avx512ifma 21, clflushopt 23, clwb 24, avx512cd 28, sha_ni 29, avx512bw 30, avx512vl 31;
    0x7 / 0 Ecx: avx512vbmi 1, umip 2, pku 3, waitpkg 5, avx512_vbmi2 6, shstk 7, gfni 8, vaes 9, vpclmulqdq 10, avx512_vnni 11,
        avx512_bitalg 12, avx512_vpopcntdq 14, la57 16, rdpid 22, bus_lock_detect 24, movdiri 27, movdir64b 28;
    0x7 / 0 Edx: fsrm 4, avx512_vp2intersect 8, serialize 14, ibt 20, amx_bf16 22, avx512_fp16 23, amx_tile 24, amx_int8 25;
    0x7 / 1 Eax: sha512 0, sm3 1, sm4 2, avx_vnni 4, avx512_bf16 5, fzrm 10, fsrs 11, fsrc 12, amx_fp16 21, avx_ifma 23;
    0xd / 1 Eax: xsaveopt 0, xsavec 1, xgetbv1 2, xsaves 3;
    0x80000001 / 0 Ecx: lahf_lm 0 v3, abm 5 v3, sse4a 6, misalignsse 7, prefetchw 8, xop 11, fma4 16, tbm 21;
    0x80000001 / 0 Edx: pdpe1gb 26, rdtscp 27;
}

fn entry(supported: &[kvm_cpuid_entry2], leaf: u32, subleaf: u32) -> Option<[u32; 4]> {
    let found = supported.iter().find(|e| e.function == leaf && e.index == subleaf)?;
    Some([found.eax, found.ebx, found.ecx, found.edx])
}

impl CpuidPolicy {
    fn wants(&self, feature: &Feature) -> bool {
        match self {
            Self::Host => true,
            Self::Baseline => feature.baseline,
            Self::Features(names) => names.iter().any(|n| n == feature.name),
        }
    }

    /// Whether this host can show it: every name known, every feature there.
    pub(super) fn check(&self, supported: &[kvm_cpuid_entry2]) -> Result<(), Refused> {
        if let Self::Features(names) = self
            && let Some(unknown) = names.iter().find(|n| !FEATURES.iter().any(|f| f.name == n.as_str()))
        {
            let feature = unknown.chars().take(32).collect();
            return Err(Refused { feature, problem: "is no feature that is known here" });
        }
        for feature in FEATURES.iter().filter(|f| *self != Self::Host && self.wants(f)) {
            let regs = entry(supported, feature.leaf, feature.subleaf).unwrap_or_default();
            if regs[feature.register] >> feature.bit & 1 == 0 {
                return Err(Refused {
                    feature: feature.name.to_owned(),
                    problem: "is not offered by this host",
                });
            }
        }
        Ok(())
    }

    /// Clears what the policy does not show.
    pub(super) fn apply(&self, entries: &mut [kvm_cpuid_entry2]) {
        if *self == Self::Host {
            return;
        }
        for e in entries.iter_mut() {
            let mut regs = [e.eax, e.ebx, e.ecx, e.edx];
            for f in FEATURES.iter().filter(|f| (f.leaf, f.subleaf) == (e.function, e.index)) {
                if !self.wants(f) {
                    regs[f.register] &= !(1 << f.bit);
                }
            }
            [e.eax, e.ebx, e.ecx, e.edx] = regs;
        }
        let shown = |leaf, subleaf, register: Register, bit: u32| {
            entry(entries, leaf, subleaf).is_some_and(|r: [u32; 4]| r[register as usize] >> bit & 1 == 1)
        };
        // Extended state that no feature is left for.
        let mut states = u32::MAX;
        for (there, bits) in [
            (shown(0x1, 0, Register::Ecx, 28), 0x4),
            (shown(0x7, 0, Register::Ebx, 16), 0xe0),
            (shown(0x7, 0, Register::Ecx, 3), 0x200),
            (shown(0x7, 0, Register::Edx, 24), 0x6_0000),
        ] {
            states &= if there { u32::MAX } else { !bits };
        }
        for e in entries.iter_mut().filter(|e| (e.function, e.index) == (0xd, 0)) {
            e.eax &= states;
        }
    }
}

/// Checks a policy against what this host's KVM supports.
pub fn check(policy: &CpuidPolicy) -> Result<Result<(), Refused>, crate::hypervisor::HvError> {
    Ok(policy.check(super::system()?.cpuid.as_slice()))
}

/// Features in a register's bits, by name; for messages.
pub fn names(leaf: u32, subleaf: u32, register: usize, bits: u32) -> Vec<&'static str> {
    let here = FEATURES.iter().filter(|f| (f.leaf, f.subleaf, f.register) == (leaf, subleaf, register));
    here.filter(|f| bits >> f.bit & 1 == 1).map(|f| f.name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        let all = |function, index| kvm_cpuid_entry2 {
            function,
            index,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        };
        vec![all(1, 0), all(7, 0), all(7, 1), all(0xd, 0), all(0xd, 1), all(0x8000_0001, 0)]
    }

    #[test]
    fn a_list_shows_exactly_what_it_names() {
        let policy = CpuidPolicy::Features(vec!["sse4_2".to_owned(), "avx2".to_owned(), "avx".to_owned()]);
        let mut shown = host();
        policy.check(&shown).expect("all there");
        policy.apply(&mut shown);
        let of = |leaf, subleaf, register| {
            names(leaf, subleaf, register, entry(&shown, leaf, subleaf).unwrap()[register])
        };
        assert_eq!(of(1, 0, 2), ["sse4_2", "avx"]);
        assert_eq!(of(7, 0, 1), ["avx2"]);
        assert!(of(7, 0, 3).is_empty() && of(7, 1, 0).is_empty() && of(0x8000_0001, 0, 2).is_empty());
        let states = entry(&shown, 0xd, 0).unwrap()[0];
        assert_eq!(states & 0x6_02e7, 0x7, "x87, SSE and AVX state, no other that has a feature");
        assert_eq!(entry(&shown, 1, 0).unwrap()[3], u32::MAX, "the ground floor stays");
    }

    #[test]
    fn what_cannot_be_had_is_named() {
        let mut old = host();
        for leaf in old.iter_mut().filter(|e| e.function == 7) {
            leaf.ebx = 0;
        }
        let list = |name: &str| CpuidPolicy::Features(vec![name.to_owned()]);
        let refused =
            |policy: CpuidPolicy, host: &[kvm_cpuid_entry2]| policy.check(host).expect_err("refused").feature;
        assert_eq!(refused(list("warp"), &host()), "warp");
        assert_eq!(refused(list("avx2"), &old), "avx2");
        assert_eq!(refused(CpuidPolicy::Baseline, &old), "bmi1");
        CpuidPolicy::Baseline.check(&host()).expect("a newer host has it");
        CpuidPolicy::Host.check(&old).expect("whatever there is");
    }
}
