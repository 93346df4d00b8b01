//! A PMU's shape from CPUID, of this host or of any described one, and the CPUID leaves that show a shape to a guest.
//!
//! Sources: Intel SDM vol. 2 CPUID leaves 0AH and 23H, vol. 3 chapter 20; AMD PPR for 8000_0001H and 8000_0022H. The leaves arrive as
//! plain data (whoever may execute CPUID fills [`CpuidLeaves`]; a leaf above the processor's highest is all 0), so any processor can be
//! described. Every number is bounded before it is used; no input panics.
//!
//! A PerfMon v6 host is treated as v5: its counters come from the bitmaps of leaf 23H, and whoever drives its MSRs must find the reload
//! and PEBS configuration registers 0 ([`Capabilities::perfmon_v6`]).

use crate::registers::{CAP_FW_WRITE, MAX_FIXED, MAX_GP, MAX_INTEL_GP};
use crate::shape::{Shape, ShapeError, Vendor};

/// Number of architectural events of leaf 0AH that exist so far.
const ARCH_EVENT_COUNT: u32 = 8;
/// The architectural events as selectors (unit mask, event), in the order of CPUID.0AH:EBX: core cycles, instructions, reference cycles,
/// last level cache references and misses, branches, branch misses, top-down slots.
pub const INTEL_ARCH_EVENTS: [u16; ARCH_EVENT_COUNT as usize] =
    [0x003C, 0x00C0, 0x013C, 0x4F2E, 0x412E, 0x00C4, 0x00C5, 0x01A4];
/// AMD events that mean the same on every processor since K7: cycles, instructions, branches, branch misses.
pub const AMD_STABLE_EVENTS: [u16; 4] = [0x0076, 0x00C0, 0x00C2, 0x00C3];

/// What one CPUID leaf answers.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// EAX.
    pub eax: u32,
    /// EBX.
    pub ebx: u32,
    /// ECX.
    pub ecx: u32,
    /// EDX.
    pub edx: u32,
}

/// Everything of CPUID that says something about the PMU. Leaves that the processor does not have are all 0.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuidLeaves {
    /// 0H: the vendor string in EBX, EDX, ECX.
    pub vendor: Leaf,
    /// 1H: family and model in EAX, PDCM in ECX\[15\].
    pub features: Leaf,
    /// 7H sub-leaf 1: ArchPerfmonExt in EAX\[8\].
    pub extended_features: Leaf,
    /// 0AH: architectural PerfMon.
    pub perfmon: Leaf,
    /// 23H sub-leaf 0: which sub-leaves are valid, in EAX.
    pub perfmon_ext: Leaf,
    /// 23H sub-leaf 1: counter bitmaps, GP in EAX, fixed in EBX.
    pub perfmon_ext_counters: Leaf,
    /// 8000_0001H: PerfCtrExtCore in ECX\[23\].
    pub amd_features: Leaf,
    /// 8000_0022H: PerfMonV2 in EAX\[0\], number of core counters in EBX\[3:0\].
    pub amd_perfmon: Leaf,
    /// IA32_PERF_CAPABILITIES; looked at only if CPUID announces it (PDCM).
    pub perf_capabilities: u64,
}

/// Why CPUID describes no PMU that this crate drives, or cannot show a shape.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuidError {
    /// Neither Intel nor AMD (Hygon counts as AMD).
    #[error(
        "CPU vendor \"{vendor}\" has no PMU that is known here: use a host with an Intel or AMD processor"
    )]
    Vendor {
        /// The vendor string, printable characters only.
        vendor: String,
    },
    /// More counters than there is room for. Leaving some of them unmanaged would leak them to guests, so none are taken.
    #[error(
        "CPUID announces {field} {value:#x}: at most {max} are handled; use the model or KVM's own vPMU on this host"
    )]
    TooMany {
        /// Which counters.
        field: &'static str,
        /// The count or bitmap announced.
        value: u64,
        /// How many are handled.
        max: u32,
    },
    /// The numbers contradict each other or the architecture.
    #[error("CPUID describes an impossible PMU: {0}")]
    Shape(#[from] ShapeError),
    /// CPUID has no way to say this shape.
    #[error("CPUID cannot show a guest the shape {shape}: {problem}; give the guest {remedy}")]
    NotExpressible {
        /// The shape.
        shape: String,
        /// Why not.
        problem: &'static str,
        /// What can be shown.
        remedy: &'static str,
    },
}

impl CpuidError {
    /// A stable code for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Vendor { .. } => "CPUID_VENDOR",
            Self::TooMany { .. } => "CPUID_TOO_MANY_COUNTERS",
            Self::Shape(_) => "CPUID_SHAPE",
            Self::NotExpressible { .. } => "CPUID_NOT_EXPRESSIBLE",
        }
    }
}

/// What a processor's PMU can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Capabilities {
    /// Its shape. Intel without a PMU (and any processor whose hypervisor hides it) has version 0 and no counters.
    pub shape: Shape,
    /// Intel: bit i says that architectural event i ([`INTEL_ARCH_EVENTS`]) can be counted. AMD: 0.
    pub arch_events: u32,
    /// A v6 host (ArchPerfmonExt): it has reload and PEBS configuration registers (0x1902 + 4i ...), which must be 0.
    pub perfmon_v6: bool,
    /// Display family and model.
    pub family_model: FamilyModel,
}

/// A processor's display family and model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct FamilyModel {
    /// Family, with the extended family added where the base family is 0FH.
    pub family: u16,
    /// Model, with the extended model.
    pub model: u8,
}

impl FamilyModel {
    /// From CPUID.1H:EAX.
    #[must_use]
    pub fn from_signature(eax: u32) -> Self {
        let base = eax >> 8 & 0xF;
        let family = if base == 0xF { base + (eax >> 20 & 0xFF) } else { base };
        let extended = if base == 0xF || base == 6 { eax >> 16 & 0xF } else { 0 };
        Self { family: family as u16, model: (extended << 4 | eax >> 4 & 0xF) as u8 }
    }
}

impl Capabilities {
    /// Reads a processor's PMU from its CPUID leaves.
    pub fn from_cpuid(leaves: &CpuidLeaves) -> Result<Self, CpuidError> {
        match vendor(&leaves.vendor)? {
            Vendor::Intel => Self::intel(leaves),
            Vendor::Amd => Self::amd(leaves),
        }
    }

    fn intel(leaves: &CpuidLeaves) -> Result<Self, CpuidError> {
        let Leaf { eax, ebx, ecx, edx } = leaves.perfmon;
        let family_model = FamilyModel::from_signature(leaves.features.eax);
        let version = (eax & 0xFF).min(5) as u8;
        if version == 0 {
            return Ok(Self { shape: Shape::none(), arch_events: 0, perfmon_v6: false, family_model });
        }
        let perfmon_v6 = leaves.extended_features.eax >> 8 & 1 == 1;
        let (mut gp, mut fixed) = (low_bits(eax >> 8 & 0xFF), 0);
        if version >= 2 {
            fixed = low_bits(edx & 0x1F) | if version >= 5 { u64::from(ecx) } else { 0 };
        }
        if perfmon_v6 && leaves.perfmon_ext.eax >> 1 & 1 == 1 {
            gp = u64::from(leaves.perfmon_ext_counters.eax);
            fixed = u64::from(leaves.perfmon_ext_counters.ebx);
        }
        bounded("general-purpose counters", gp, MAX_INTEL_GP)?;
        bounded("fixed counters", fixed, MAX_FIXED as u32)?;
        let gp_width = (eax >> 16 & 0xFF) as u8;
        let events = low_bits((eax >> 24).min(ARCH_EVENT_COUNT)) as u32;
        let shape = Shape {
            vendor: Vendor::Intel,
            version,
            gp,
            fixed,
            gp_width,
            fixed_width: if fixed == 0 { gp_width } else { (edx >> 5 & 0xFF) as u8 },
            perf_capabilities: if leaves.features.ecx >> 15 & 1 == 1 { leaves.perf_capabilities } else { 0 },
        };
        shape.validate()?;
        Ok(Self { shape, arch_events: events & !ebx, perfmon_v6, family_model })
    }

    fn amd(leaves: &CpuidLeaves) -> Result<Self, CpuidError> {
        let ext_core = leaves.amd_features.ecx >> 23 & 1 == 1;
        let v2 = leaves.amd_perfmon.eax & 1 == 1;
        // KVM drops PerfMonV2 from guests without PerfCtrExtCore; a bare V2 flag is not usable, because its counters are the core ones.
        let (version, gp) = match (ext_core, v2) {
            (false, _) => (0, 0xF),
            (true, false) => (1, 0x3F),
            (true, true) => (2, low_bits(leaves.amd_perfmon.ebx & 0xF)),
        };
        bounded("core counters", gp, MAX_GP as u32)?;
        let shape = Shape {
            vendor: Vendor::Amd,
            version,
            gp,
            fixed: 0,
            gp_width: 48,
            fixed_width: 48,
            perf_capabilities: 0,
        };
        shape.validate()?;
        let family_model = FamilyModel::from_signature(leaves.features.eax);
        Ok(Self { shape, arch_events: 0, perfmon_v6: false, family_model })
    }
}

/// The part of CPUID that shows a guest its PMU; everything else of the guest's CPUID stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct GuestLeaves {
    /// 0AH, all of it (0 on AMD and without a PMU).
    pub perfmon: Leaf,
    /// 1H:ECX\[15\], whether PERF_CAPABILITIES exists.
    pub pdcm: bool,
    /// IA32_PERF_CAPABILITIES, to be set before the first run; 0 if `pdcm` is false.
    pub perf_capabilities: u64,
    /// 8000_0001H:ECX\[23\].
    pub amd_ext_core: bool,
    /// 8000_0022H EAX and EBX (other fields 0).
    pub amd_perfmon: Leaf,
}

impl GuestLeaves {
    /// No PMU at all: what a guest sees in `model` and `msr` mode unless it is told otherwise (switch.md section 8). Leaves 7H.1 EAX\[8\]
    /// and 23H must be 0 too.
    #[must_use]
    pub fn hidden() -> Self {
        Self::default()
    }

    /// The leaves for this shape. `arch_events` are the architectural events that the guest may count (Intel; bits of
    /// [`INTEL_ARCH_EVENTS`]).
    pub fn of(shape: &Shape, arch_events: u32) -> Result<Self, CpuidError> {
        shape.validate()?;
        let refuse =
            |problem, remedy| Err(CpuidError::NotExpressible { shape: shape.to_string(), problem, remedy });
        if shape.gp & shape.gp.wrapping_add(1) != 0 {
            return refuse("its general-purpose counters have gaps", "the lowest counters, without a gap");
        }
        match shape.vendor {
            Vendor::Intel if shape.version == 0 => Ok(Self::hidden()),
            Vendor::Intel if shape.version < 5 && shape.fixed & shape.fixed.wrapping_add(1) != 0 => refuse(
                "below v5 its fixed counters must not have gaps",
                "the lowest fixed counters, without a gap",
            ),
            Vendor::Intel => Ok(Self::intel(shape, arch_events)),
            Vendor::Amd => match (shape.version, shape.gp_count()) {
                _ if shape.gp_width != 48 => refuse("AMD counters are 48 bits wide", "counters of 48 bits"),
                (0, 4) => Ok(Self::hidden()),
                (1, 6) => Ok(Self { amd_ext_core: true, ..Self::hidden() }),
                (2, n @ 1..=15) => Ok(Self {
                    amd_ext_core: true,
                    amd_perfmon: Leaf { eax: 1, ebx: n, ..Leaf::default() },
                    ..Self::hidden()
                }),
                (0, _) => refuse("K7 has four counters", "4 counters, or PerfMonV2"),
                (1, _) => refuse("PerfCtrExtCore has six counters", "6 counters, or PerfMonV2"),
                _ => refuse("PerfMonV2 announces 1 to 15 counters", "1 to 15 counters"),
            },
        }
    }

    fn intel(shape: &Shape, arch_events: u32) -> Self {
        let fixed_contiguous = shape.fixed.trailing_ones();
        let eax = u32::from(shape.version)
            | shape.gp_count() << 8
            | u32::from(shape.gp_width) << 16
            | ARCH_EVENT_COUNT << 24;
        let mut edx = 0;
        if shape.version >= 2 && shape.fixed != 0 {
            edx = fixed_contiguous | u32::from(shape.fixed_width) << 5;
        }
        if shape.version >= 5 {
            edx |= 1 << 15; // AnyThread is deprecated: bit 21 and the ANY fields are always reserved here.
        }
        let ebx = !arch_events & low_bits(ARCH_EVENT_COUNT) as u32;
        let ecx = if shape.version >= 5 { shape.fixed as u32 } else { 0 };
        Self {
            perfmon: Leaf { eax, ebx, ecx, edx },
            pdcm: shape.perf_capabilities != 0,
            perf_capabilities: shape.perf_capabilities,
            ..Self::default()
        }
    }

    /// Whether full-width counter writes are announced.
    #[must_use]
    pub fn full_width_writes(&self) -> bool {
        self.pdcm && self.perf_capabilities & CAP_FW_WRITE != 0
    }
}

fn vendor(leaf: &Leaf) -> Result<Vendor, CpuidError> {
    let bytes: Vec<u8> = [leaf.ebx, leaf.edx, leaf.ecx].iter().flat_map(|word| word.to_le_bytes()).collect();
    match bytes.as_slice() {
        b"GenuineIntel" => Ok(Vendor::Intel),
        b"AuthenticAMD" | b"HygonGenuine" => Ok(Vendor::Amd),
        other => {
            let vendor =
                other.iter().map(|b| if b.is_ascii_graphic() { char::from(*b) } else { '.' }).collect();
            Err(CpuidError::Vendor { vendor })
        }
    }
}

fn bounded(field: &'static str, bitmap: u64, max: u32) -> Result<(), CpuidError> {
    if bitmap & !low_bits(max) == 0 { Ok(()) } else { Err(CpuidError::TooMany { field, value: bitmap, max }) }
}

fn low_bits(n: u32) -> u64 {
    1u64.checked_shl(n).map_or(u64::MAX, |bit| bit - 1)
}

#[cfg(test)]
mod tests;
