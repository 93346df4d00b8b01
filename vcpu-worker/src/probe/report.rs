//! Reads the report pages.

use vpmu_proto::api::ProbeVcpuReport;

use super::layout;
use crate::memory::{GuestMemory, MemoryError};

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProbeError {
    /// No report page of this vCPU.
    #[error("vCPU {vcpu} has no probe report page: the guest is not the probe, or has fewer vCPUs")]
    NotAProbe {
        /// Asked for.
        vcpu: u32,
    },
    /// A report page of another layout.
    #[error("probe report page has version {found}, this host reads {}", layout::VERSION)]
    Version {
        /// What it says.
        found: u64,
    },
    /// Guest memory refused an access.
    #[error("guest memory: {0}")]
    Memory(#[from] MemoryError),
}

impl ProbeError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotAProbe { .. } => "NOT_A_PROBE",
            Self::Version { .. } => "PROBE_VERSION_UNKNOWN",
            Self::Memory(e) => e.reason(),
        }
    }
}

/// What the public report leaves out: for messages about a fault and for tests.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Details {
    /// 0 not started, else `STAGE_*` of [`layout`].
    pub stage: u64,
    /// TSC at the last heartbeat.
    pub beat_tsc: u64,
    /// First fault: its code, where (MSR, RDPMC index), what was expected, what was there.
    pub first_fault: [u64; 4],
    /// Frame of an unexpected exception.
    pub frame: [u64; 6],
    /// Rounds of checks.
    pub checks: u64,
    /// Times the TSC went backwards.
    pub tsc_backwards: u64,
    /// Current pass over the working set, next page in it.
    pub working_set: (u64, u64),
    /// Pages filled.
    pub filled: u64,
}

impl std::fmt::Display for Details {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [code, place, expected, got] = self.first_fault;
        let what = match code {
            0 => return write!(f, "no fault"),
            layout::FAULT_BACKWARDS => "counter went backwards",
            layout::FAULT_PARKED => "disabled counter changed",
            layout::FAULT_SELECTOR => "selector lost its value",
            layout::FAULT_CONTROL => "control register lost its value",
            layout::FAULT_SETUP => "#GP when programming",
            layout::FAULT_READ => "#GP when reading",
            layout::FAULT_SPURIOUS_PMI => "interrupt without overflow",
            layout::FAULT_LOST_PMI => "overflow without interrupt",
            _ => {
                let vector = code.wrapping_sub(layout::FAULT_EXCEPTION);
                return write!(f, "exception {vector}, frame {:#x?}", self.frame);
            }
        };
        write!(f, "{what}: register {place:#x}, expected {expected:#x}, got {got:#x}")
    }
}

fn base(mem: &GuestMemory, vcpu: u32) -> Result<u64, ProbeError> {
    if !is_probe(mem, vcpu) {
        return Err(ProbeError::NotAProbe { vcpu });
    }
    let base = layout::block(vcpu);
    match mem.load_u64(base + layout::R_VERSION)? {
        layout::VERSION => Ok(base),
        found => Err(ProbeError::Version { found }),
    }
}

/// Whether memory holds a report page of this vCPU.
pub fn is_probe(mem: &GuestMemory, vcpu: u32) -> bool {
    vcpu < layout::MAX_VCPUS
        && mem.load_u64(layout::block(vcpu) + layout::R_MAGIC).is_ok_and(|magic| magic == layout::MAGIC)
}

/// What a vCPU says of itself. May be called while it runs; fields are then of slightly different moments.
pub fn report(mem: &GuestMemory, vcpu: u32) -> Result<ProbeVcpuReport, ProbeError> {
    let base = base(mem, vcpu)?;
    let word = |offset: u64| mem.load_u64(base + offset);
    let khz = word(layout::P_TSC_KHZ)?;
    let ns = |ticks: u64| {
        let ns = u128::from(ticks) * 1_000_000 / u128::from(khz.max(1));
        u64::try_from(ns).unwrap_or(u64::MAX)
    };
    Ok(ProbeVcpuReport {
        vcpu,
        heartbeats: word(layout::R_BEATS)?,
        max_gap_ns: ns(word(layout::R_MAX_GAP)?),
        gaps: word(layout::R_GAPS)?,
        pmis: word(layout::R_PMIS)?,
        faults: word(layout::R_FAULTS)?,
        first_fault: word(layout::R_FIRST)?,
        pages_dirtied: word(layout::R_DIRTIED)?,
        loops: word(layout::R_LOOPS)?,
        // Until the vCPU has turned once since the mark, the window still belongs to the time before it.
        last_gap_ns: if word(layout::R_MARK)? == word(layout::R_MARK_SEEN)? {
            ns(word(layout::R_LAST_GAP)?)
        } else {
            0
        },
    })
}

/// The rest of a report.
pub fn details(mem: &GuestMemory, vcpu: u32) -> Result<Details, ProbeError> {
    let base = base(mem, vcpu)?;
    let word = |offset: u64| mem.load_u64(base + offset);
    let mut frame = [0; 6];
    for (i, f) in frame.iter_mut().enumerate() {
        *f = word(layout::R_FRAME + i as u64 * 8)?;
    }
    Ok(Details {
        stage: word(layout::R_STAGE)?,
        beat_tsc: word(layout::R_BEAT_TSC)?,
        first_fault: [
            word(layout::R_FIRST)?,
            word(layout::R_FIRST_WHERE)?,
            word(layout::R_FIRST_EXPECTED)?,
            word(layout::R_FIRST_GOT)?,
        ],
        frame,
        checks: word(layout::R_CHECKS)?,
        tsc_backwards: word(layout::R_TSC_BACK)?,
        working_set: (word(layout::R_WS_PASS)?, word(layout::R_WS_NEXT)?),
        filled: word(layout::R_FILLED)?,
    })
}

/// Tells every vCPU that it is about to be resumed: `last_gap_ns` then is the longest gap from there on, which
/// begins with the hole that it is resumed from. Call it while the vCPUs are stopped. Does nothing to a guest that is
/// not the probe.
pub fn mark_resumed(mem: &GuestMemory) {
    for vcpu in 0..layout::MAX_VCPUS {
        let Ok(base) = base(mem, vcpu) else { return };
        if let Ok(mark) = mem.load_u64(base + layout::R_MARK) {
            // The address was read just now, so it can be written.
            let _ = mem.store_u64(base + layout::R_MARK, mark.wrapping_add(1));
        }
    }
}
