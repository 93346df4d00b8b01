//! What CPUID shows a guest.
//!
//! What KVM supports, made into one package of `vcpus` cores with one thread each, with the hypervisor bit set, and
//! with the PMU as the worker decides: hidden (leaf 0AH, 8000_0022H, PDCM, PerfCtrExtCore and friends zero) unless
//! [`CpuidPmu`] says otherwise (switch rules, section 8). KVM may edit what it is given; the vCPU reads it back.

use kvm_bindings::*;

/// The PMU leaves that a guest sees.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuidPmu {
    /// Leaf 0AH: EAX, EBX, ECX, EDX (Intel architectural PerfMon).
    pub leaf_a: [u32; 4],
    /// Leaf 8000_0022H: EAX, EBX, ECX, EDX (AMD PerfMonV2).
    pub leaf_8000_0022: [u32; 4],
    /// CPUID.8000_0001H:ECX\[23\], six core counters at C001_0200H.
    pub perf_ctr_ext_core: bool,
    /// CPUID.1:ECX\[15\], IA32_PERF_CAPABILITIES exists.
    pub pdcm: bool,
}

/// A register of a leaf that KVM stored differently from what it was given.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CpuidDifference {
    /// Leaf.
    pub leaf: u32,
    /// Subleaf.
    pub subleaf: u32,
    /// EAX, EBX, ECX, EDX as given.
    pub asked: [u32; 4],
    /// As KVM stored them; zeros for a leaf that it dropped.
    pub stored: [u32; 4],
}

const PDCM: u32 = 1 << 15;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
const HTT: u32 = 1 << 28;
/// Leaf 7 EDX: architectural LBR.
const ARCH_LBR: u32 = 1 << 19;
/// 8000_0001H ECX: PerfCtrExtCore, PerfCtrExtNB, DataBreakpointExtension is left, PerfTsc, PerfCtrExtLLC.
const PERF_CTR_EXT_CORE: u32 = 1 << 23;
const AMD_PERF_BITS: u32 = PERF_CTR_EXT_CORE | 1 << 24 | 1 << 27 | 1 << 28;

/// Entries for vCPU `index` of `vcpus`, from what KVM supports.
pub(super) fn build(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    vcpus: u32,
    tsc_deadline: bool,
    pmu: Option<&CpuidPmu>,
) -> Vec<kvm_cpuid_entry2> {
    let hidden = CpuidPmu::default();
    let pmu = pmu.unwrap_or(&hidden);
    // Bits of an APIC id that number the cores of the package.
    let core_bits = vcpus.next_power_of_two().trailing_zeros();
    let mut entries: Vec<kvm_cpuid_entry2> = Vec::with_capacity(supported.len() + 4);
    for entry in supported {
        let mut e = *entry;
        match e.function {
            0x1 => {
                e.ebx = (e.ebx & 0xffff) | (vcpus.min(255) << 16) | ((index & 0xff) << 24);
                e.ecx = (e.ecx & !PDCM) | HYPERVISOR;
                if pmu.pdcm {
                    e.ecx |= PDCM;
                }
                if tsc_deadline {
                    e.ecx |= TSC_DEADLINE;
                }
                if vcpus > 1 {
                    e.edx |= HTT;
                } else {
                    e.edx &= !HTT;
                }
            }
            // Cache topology, Intel and AMD: the last level is shared by all cores, the others by none.
            0x4 | 0x8000_001d if e.eax & 0x1f != 0 => {
                let sharing = if e.eax >> 5 & 7 >= 3 { (1 << core_bits) - 1 } else { 0 };
                e.eax = (e.eax & 0x3fff) | (sharing << 14);
                if e.function == 0x4 {
                    e.eax |= (vcpus - 1).min(63) << 26;
                }
            }
            0x7 if e.index == 0 => e.edx &= !ARCH_LBR,
            0xa => [e.eax, e.ebx, e.ecx, e.edx] = pmu.leaf_a,
            // Extended topology: built below. Architectural LBR: hidden.
            0xb | 0x1f => continue,
            0x1c => [e.eax, e.ebx, e.ecx, e.edx] = [0; 4],
            0x8000_0001 => {
                e.ecx &= !AMD_PERF_BITS;
                if pmu.perf_ctr_ext_core {
                    e.ecx |= PERF_CTR_EXT_CORE;
                }
            }
            0x8000_0008 => e.ecx = (e.ecx & !0xf0ff) | (vcpus - 1).min(255) | (core_bits << 12),
            0x8000_001e => {
                e.eax = index;
                e.ebx = (e.ebx & !0xffff) | (index & 0xff);
                e.ecx &= !0x7ff;
            }
            0x8000_0022 => [e.eax, e.ebx, e.ecx, e.edx] = pmu.leaf_8000_0022,
            _ => {}
        }
        entries.push(e);
    }
    let max_basic = supported.iter().find(|e| e.function == 0).map_or(0, |e| e.eax);
    if max_basic >= 0xb {
        entries.extend(topology(index, vcpus, core_bits));
    }
    // A vendor's leaf that this host does not have is shown all the same when the model PMU is that vendor's.
    for (function, regs) in [(0xa, pmu.leaf_a), (0x8000_0022, pmu.leaf_8000_0022)] {
        if regs != [0; 4] && !entries.iter().any(|e| e.function == function) {
            let [eax, ebx, ecx, edx] = regs;
            entries.push(kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() });
            let base = function & 0x8000_0000;
            if let Some(max) = entries.iter_mut().find(|e| e.function == base) {
                max.eax = max.eax.max(function);
            }
        }
    }
    entries
}

/// Leaf 0BH: one thread a core, all cores in one package.
fn topology(index: u32, vcpus: u32, core_bits: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |subleaf: u32, eax: u32, ebx: u32, kind: u32| kvm_cpuid_entry2 {
        function: 0xb,
        index: subleaf,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax,
        ebx,
        ecx: subleaf | kind << 8,
        edx: index,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, core_bits, vcpus, 2), level(2, 0, 0, 0)]
}

/// Bytes of a list of entries: 40 each, little endian, in the order of `struct kvm_cpuid_entry2`.
pub(super) fn to_bytes(entries: &[kvm_cpuid_entry2]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(entries.len() * ENTRY_SIZE);
    for e in entries {
        for word in [e.function, e.index, e.flags, e.eax, e.ebx, e.ecx, e.edx, 0, 0, 0] {
            bytes.extend_from_slice(&word.to_le_bytes());
        }
    }
    bytes
}

const ENTRY_SIZE: usize = 40;
const _: () = assert!(size_of::<kvm_cpuid_entry2>() == ENTRY_SIZE);

/// The reverse of [`to_bytes`]; what is wrong with the bytes otherwise.
pub(super) fn from_bytes(bytes: &[u8]) -> Result<Vec<kvm_cpuid_entry2>, String> {
    if bytes.is_empty() || !bytes.len().is_multiple_of(ENTRY_SIZE) {
        return Err(format!("{} bytes are no list of {ENTRY_SIZE}-byte entries", bytes.len()));
    }
    let count = bytes.len() / ENTRY_SIZE;
    if count > KVM_MAX_CPUID_ENTRIES {
        return Err(format!("{count} entries are more than {KVM_MAX_CPUID_ENTRIES}"));
    }
    let mut entries = Vec::with_capacity(count);
    for chunk in bytes.chunks_exact(ENTRY_SIZE) {
        let mut words = [0u32; 7];
        for (word, raw) in words.iter_mut().zip(chunk.as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*raw);
        }
        let [function, index, flags, eax, ebx, ecx, edx] = words;
        entries.push(kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, padding: [0; 3] });
    }
    Ok(entries)
}

/// Where what KVM stored differs from what it was given.
pub(super) fn differences(asked: &[kvm_cpuid_entry2], stored: &[kvm_cpuid_entry2]) -> Vec<CpuidDifference> {
    let regs = |e: &kvm_cpuid_entry2| [e.eax, e.ebx, e.ecx, e.edx];
    asked
        .iter()
        .filter_map(|a| {
            let found = stored.iter().find(|s| s.function == a.function && s.index == a.index);
            let stored = found.map_or([0; 4], regs);
            (stored != regs(a)).then_some(CpuidDifference {
                leaf: a.function,
                subleaf: a.index,
                asked: regs(a),
                stored,
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> kvm_cpuid_entry2 {
        let [eax, ebx, ecx, edx] = regs;
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> [u32; 4] {
        let e = entries.iter().find(|e| e.function == function && e.index == index).expect("leaf");
        [e.eax, e.ebx, e.ecx, e.edx]
    }

    #[test]
    fn pmu_is_hidden_unless_given() {
        let supported = [
            entry(0, 0, [0x10, 0, 0, 0]),
            entry(1, 0, [0, 0x0712_0800, PDCM, 0]),
            entry(0xa, 0, [0x0730_0805, 0, 0, 0x603]),
            entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            entry(0x8000_0001, 0, [0, 0, u32::MAX, 0]),
        ];
        let hidden = build(&supported, 3, 6, true, None);
        assert_eq!(get(&hidden, 0xa, 0), [0; 4]);
        assert_eq!(get(&hidden, 0x8000_0001, 0)[2] & AMD_PERF_BITS, 0);
        let [_, ebx, ecx, edx] = get(&hidden, 1, 0);
        assert_eq!((ebx >> 24, ebx >> 16 & 0xff, ebx & 0xffff), (3, 6, 0x0800));
        assert_eq!((ecx & PDCM, ecx & HYPERVISOR, ecx & TSC_DEADLINE), (0, HYPERVISOR, TSC_DEADLINE));
        assert_eq!(edx & HTT, HTT);
        assert_eq!(get(&hidden, 0xb, 1), [3, 6, 0x201, 3]);
        let pmu = CpuidPmu {
            leaf_a: [1, 2, 3, 4],
            leaf_8000_0022: [1, 6, 0, 0],
            perf_ctr_ext_core: true,
            pdcm: true,
        };
        let shown = build(&supported, 0, 1, false, Some(&pmu));
        assert_eq!(get(&shown, 0xa, 0), [1, 2, 3, 4]);
        assert_eq!(get(&shown, 0x8000_0022, 0), [1, 6, 0, 0]);
        assert_eq!(get(&shown, 0x8000_0000, 0)[0], 0x8000_0022);
        assert_eq!(get(&shown, 0x8000_0001, 0)[2] & AMD_PERF_BITS, PERF_CTR_EXT_CORE);
        assert_eq!(get(&shown, 1, 0)[2] & PDCM, PDCM);
    }

    #[test]
    fn bytes_round_trip_and_are_bounded() {
        let entries = vec![entry(1, 2, [3, 4, 5, 6]), entry(7, 0, [u32::MAX; 4])];
        assert_eq!(from_bytes(&to_bytes(&entries)).expect("good"), entries);
        assert!(from_bytes(&[]).is_err());
        assert!(from_bytes(&[0; 41]).is_err());
        assert!(from_bytes(&vec![0; 257 * ENTRY_SIZE]).is_err());
        assert!(differences(&entries, &entries).is_empty());
        assert_eq!(differences(&entries, &entries[..1])[0].stored, [0; 4]);
    }
}
