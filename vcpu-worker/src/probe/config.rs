//! What is asked of the probe guest, with bounds and defaults.

use vpmu_proto::api::ProbeBoot;

use super::layout::{self, PAGE};
use super::tables;
use crate::boot::BootError;

/// The guest's PMU as far as the probe must know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbePmu {
    /// AMD, else Intel.
    pub amd: bool,
    /// Intel architectural PerfMon version; AMD: 0 = K7, 1 = PerfCtrExtCore, 2 = PerfMonV2.
    pub version: u8,
    /// Which general-purpose counters exist.
    pub gp: u64,
    /// Which fixed counters exist.
    pub fixed: u64,
    /// Bits in a general-purpose counter.
    pub gp_width: u8,
    /// Bits in a fixed counter.
    pub fixed_width: u8,
    /// Counters can be written in their full width at 0x4C1 (PERF_CAPABILITIES bit 13).
    pub full_width_writes: bool,
}

/// What the probe guest shall do. Fields are resolved: defaults are filled in by [`ProbeConfig::from_boot`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProbeConfig {
    /// vCPUs, 1 to 256.
    pub vcpus: u32,
    /// Guest memory, bytes.
    pub memory_bytes: u64,
    /// Working set of each vCPU, bytes, rounded down to pages; 0 dirties nothing.
    pub working_set_bytes: u64,
    /// Pages that each vCPU dirties a second; 0 is as fast as it can.
    pub dirty_pages_per_second: u64,
    /// Events between two overflows, [`ProbeConfig::MIN_PERIOD`] to 2^31 (more with full-width writes).
    pub overflow_period: u64,
    /// Memory filled once at the start by all vCPUs together, bytes, rounded down to pages.
    pub fill_bytes: u64,
    /// Gap above which a hole is counted, microseconds, 1 to 1,000,000.
    pub gap_threshold_us: u32,
    /// Guest TSC frequency, kHz.
    pub tsc_khz: u64,
    /// Heartbeat period, microseconds, 100 to 1,000,000.
    pub heartbeat_us: u32,
    /// Heartbeats between two checks of the counters, at least 1.
    pub check_every: u32,
    /// Heartbeats between two progress lines; 0 prints nothing at all.
    pub line_every: u32,
    /// The guest's PMU; None uses no PMU.
    pub pmu: Option<ProbePmu>,
}

impl ProbeConfig {
    /// Smallest overflow period: below it a guest could spend all its time in its handler.
    pub const MIN_PERIOD: u64 = 10_000;
    /// Overflow period unless given.
    pub const DEFAULT_PERIOD: u64 = 50_000_000;
    /// Working set of each vCPU unless given, bytes.
    pub const DEFAULT_WORKING_SET: u64 = 1 << 20;
    /// Pages dirtied a second where neither rate nor working set is given.
    pub const DEFAULT_RATE: u64 = 1000;

    /// A probe that uses `pmu` and has every default.
    pub fn new(vcpus: u32, memory_bytes: u64, tsc_khz: u64, pmu: Option<ProbePmu>) -> Self {
        Self::from_boot(&ProbeBoot::default(), vcpus, memory_bytes, tsc_khz, pmu)
    }

    /// Resolves the defaults of a user's `ProbeBoot`. Out-of-range values are kept for [`Self::validate`] to name.
    pub fn from_boot(
        boot: &ProbeBoot,
        vcpus: u32,
        memory_bytes: u64,
        tsc_khz: u64,
        pmu: Option<ProbePmu>,
    ) -> Self {
        let given = |value: u64, default: u64| if value == 0 { default } else { value };
        let free = memory_bytes.saturating_sub(tables::first_free(vcpus, memory_bytes));
        let default_ws = Self::DEFAULT_WORKING_SET.min(free / u64::from(vcpus.max(1)) / 2);
        let rate_unset = boot.dirty_pages_per_second == 0 && boot.working_set_bytes == 0;
        Self {
            vcpus,
            memory_bytes,
            working_set_bytes: given(boot.working_set_bytes, default_ws),
            dirty_pages_per_second: if rate_unset { Self::DEFAULT_RATE } else { boot.dirty_pages_per_second },
            overflow_period: given(boot.overflow_period, Self::DEFAULT_PERIOD),
            fill_bytes: boot.fill_bytes,
            gap_threshold_us: if boot.gap_threshold_us == 0 { 1000 } else { boot.gap_threshold_us },
            tsc_khz,
            heartbeat_us: 1000,
            check_every: 50,
            line_every: 2000,
            pmu,
        }
    }

    /// Pages in each vCPU's working set.
    pub fn ws_pages(&self) -> u64 {
        self.working_set_bytes / PAGE
    }

    /// Pages in the fill area.
    pub fn fill_pages(&self) -> u64 {
        self.fill_bytes / PAGE
    }

    /// Memory offset of a vCPU's working set.
    pub fn ws_offset(&self, vcpu: u32) -> u64 {
        self.free_offset() + u64::from(vcpu) * self.ws_pages() * PAGE
    }

    /// Memory offset of the fill area, behind all working sets.
    pub fn fill_offset(&self) -> u64 {
        self.ws_offset(self.vcpus)
    }

    /// First page of the fill area that `vcpu` fills, and how many: shares differ by at most one page.
    pub fn fill_share(&self, vcpu: u32) -> (u64, u64) {
        let (n, total) = (u64::from(self.vcpus), self.fill_pages());
        let (each, rest) = (total / n, total % n);
        let v = u64::from(vcpu);
        (v * each + v.min(rest), each + u64::from(v < rest))
    }

    /// First memory offset that the workload may use.
    pub fn free_offset(&self) -> u64 {
        tables::first_free(self.vcpus, self.memory_bytes)
    }

    /// Checks every bound; names the field, its value and what to give instead.
    pub fn validate(&self) -> Result<(), BootError> {
        let bad = |field, value: u64, remedy: &str| {
            Err(BootError::Probe { field, value, remedy: remedy.to_owned() })
        };
        if self.vcpus == 0 || self.vcpus > layout::MAX_VCPUS {
            return bad("vcpus", self.vcpus.into(), "give 1 to 256");
        }
        if self.memory_bytes > layout::MAX_MEMORY {
            return bad("memory_bytes", self.memory_bytes, "give at most 512 GiB");
        }
        if !(1_000..=100_000_000).contains(&self.tsc_khz) {
            return bad("tsc_khz", self.tsc_khz, "the host's TSC frequency must be 1 MHz to 100 GHz");
        }
        if !(1..=1_000_000).contains(&self.gap_threshold_us) {
            return bad("gap_threshold_us", self.gap_threshold_us.into(), "give 1 to 1,000,000");
        }
        if !(100..=1_000_000).contains(&self.heartbeat_us) {
            return bad("heartbeat_us", self.heartbeat_us.into(), "give 100 to 1,000,000");
        }
        if self.check_every == 0 {
            return bad("check_every", 0, "give at least 1");
        }
        if self.dirty_pages_per_second > 1_000_000_000 {
            let remedy = "give at most 1,000,000,000, or 0 for as fast as it can";
            return bad("dirty_pages_per_second", self.dirty_pages_per_second, remedy);
        }
        if let Some(pmu) = &self.pmu {
            self.validate_period(pmu)?;
        }
        // Sums saturate, so that absurd sizes are refused as too large instead of wrapping.
        let needed = self
            .free_offset()
            .saturating_add(self.working_set_bytes.saturating_mul(u64::from(self.vcpus)))
            .saturating_add(self.fill_bytes);
        if needed > self.memory_bytes {
            return Err(BootError::TooLarge { what: "probe", needed, memory: self.memory_bytes });
        }
        Ok(())
    }

    fn validate_period(&self, pmu: &ProbePmu) -> Result<(), BootError> {
        if !(32..=63).contains(&pmu.gp_width) || (pmu.fixed != 0 && !(32..=63).contains(&pmu.fixed_width)) {
            return Err(BootError::Probe {
                field: "counter width",
                value: pmu.gp_width.into(),
                remedy: "counters of 32 to 63 bits are supported".to_owned(),
            });
        }
        let full = pmu.amd || pmu.full_width_writes;
        let most = if full { (1 << (pmu.gp_width - 1)) - 1 } else { 1 << 31 };
        if !(Self::MIN_PERIOD..=most).contains(&self.overflow_period) {
            return Err(BootError::Probe {
                field: "overflow_period",
                value: self.overflow_period,
                remedy: format!("give {} to {most}", Self::MIN_PERIOD),
            });
        }
        Ok(())
    }
}
