//! What a PMU looks like: vendor, version, which counters exist and how wide they are.
//!
//! Counters are bitmaps and need not be contiguous (CPUID.0AH:ECX of v5, CPUID.23H of v6). A guest's shape is a subset
//! of a host's. The short form (`intel:v5:8+4:48`, `amd:v2:6:48`) is what the command line takes and prints; a count
//! may also be a bitmap in hexadecimal (`intel:v5:0xb5+0xf:48`).

use std::fmt;
use std::str::FromStr;

use crate::registers::{CAP_FW_WRITE, MAX_FIXED, MAX_GP, MAX_INTEL_GP};

/// Processor vendor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Vendor {
    /// Intel architectural PerfMon.
    Intel,
    /// AMD K7, PerfCtrExtCore or PerfMonV2.
    Amd,
}

impl Vendor {
    /// "intel" or "amd".
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Intel => "intel",
            Self::Amd => "amd",
        }
    }
}

impl fmt::Display for Vendor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Vendor {
    type Err = ShapeError;
    fn from_str(s: &str) -> Result<Self, ShapeError> {
        match s {
            "intel" => Ok(Self::Intel),
            "amd" => Ok(Self::Amd),
            _ => Err(ShapeError::Syntax { text: s.into(), problem: "the vendor must be intel or amd" }),
        }
    }
}

/// A PMU's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Shape {
    /// Vendor.
    pub vendor: Vendor,
    /// Intel: architectural PerfMon version, 0 (no PMU) to 5. AMD: 0 = K7, 1 = PerfCtrExtCore, 2 = PerfMonV2.
    pub version: u8,
    /// Which general-purpose counters exist.
    pub gp: u64,
    /// Which fixed counters exist (Intel v2 and later).
    pub fixed: u64,
    /// Bits in a general-purpose counter, 32 to 64.
    pub gp_width: u8,
    /// Bits in a fixed counter, 32 to 64; the same as `gp_width` where there are none.
    pub fixed_width: u8,
    /// IA32_PERF_CAPABILITIES as seen by the owner of this shape; 0 on AMD.
    pub perf_capabilities: u64,
}

/// A shape that cannot be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ShapeError {
    /// Not the short form.
    #[error("PMU shape \"{text}\": {problem}; write it as intel:v5:8+4:48 or amd:v2:6:48")]
    Syntax {
        /// What was given.
        text: String,
        /// What is wrong.
        problem: &'static str,
    },
    /// A field is out of range.
    #[error("PMU shape: {field} is {value}, must be {range}")]
    Range {
        /// Field.
        field: &'static str,
        /// Value.
        value: u64,
        /// What it may be.
        range: &'static str,
    },
    /// A guest asks for more than its host has.
    #[error("{field} is {asked}, but this host's PMU has {available}; ask for at most {available}")]
    Exceeds {
        /// Field.
        field: &'static str,
        /// Asked.
        asked: u32,
        /// Available.
        available: u32,
    },
}

impl ShapeError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Syntax { .. } => "PMU_SHAPE_SYNTAX",
            Self::Range { .. } => "PMU_SHAPE_RANGE",
            Self::Exceeds { .. } => "PMU_SHAPE_EXCEEDS_HOST",
        }
    }
}

impl Shape {
    /// A contiguous shape with full-width writes on Intel.
    pub fn new(vendor: Vendor, version: u8, gp: u32, fixed: u32, width: u8) -> Result<Self, ShapeError> {
        if gp as usize > MAX_GP || fixed as usize > MAX_FIXED {
            return Err(ShapeError::Range {
                field: "the number of counters",
                value: u64::from(gp.max(fixed)),
                range: "at most 16 general-purpose and 8 fixed",
            });
        }
        let shape = Self {
            vendor,
            version,
            gp: low(gp),
            fixed: low(fixed),
            gp_width: width,
            fixed_width: width,
            perf_capabilities: if vendor == Vendor::Intel && version > 0 { CAP_FW_WRITE } else { 0 },
        };
        shape.validate()?;
        Ok(shape)
    }

    /// The shape of a guest without a PMU.
    pub const fn none() -> Self {
        Self {
            vendor: Vendor::Intel,
            version: 0,
            gp: 0,
            fixed: 0,
            gp_width: 48,
            fixed_width: 48,
            perf_capabilities: 0,
        }
    }

    /// Checks every field; a shape from outside must pass before it is used.
    pub fn validate(&self) -> Result<(), ShapeError> {
        let range = |field, value, range| Err(ShapeError::Range { field, value, range });
        let (max_version, max_gp, max_fixed) = match self.vendor {
            Vendor::Intel => (5, MAX_INTEL_GP, if self.version >= 2 { MAX_FIXED as u32 } else { 0 }),
            Vendor::Amd => (2, if self.version == 0 { 4 } else { MAX_GP as u32 }, 0),
        };
        if self.version > max_version {
            return range(
                "version",
                self.version.into(),
                "v0 to v5 on Intel, v0 (K7) to v2 (PerfMonV2) on AMD",
            );
        }
        if self.gp >= 1 << max_gp || (self.vendor == Vendor::Intel && self.version == 0 && self.gp != 0) {
            return range("the general-purpose counter bitmap", self.gp, "within the flavour's counters");
        }
        if self.fixed >= 1 << max_fixed {
            return range(
                "the fixed counter bitmap",
                self.fixed,
                "within the flavour's counters (none on AMD and Intel v1)",
            );
        }
        for (field, width) in [("gp_width", self.gp_width), ("fixed_width", self.fixed_width)] {
            if !(32..=64).contains(&width) {
                return range(field, width.into(), "32 to 64 bits");
            }
        }
        Ok(())
    }

    /// A guest's shape: the lowest `gp` general-purpose and `fixed` fixed counters of this host. Version and widths are
    /// the host's; of PERF_CAPABILITIES only full-width writes are passed on.
    pub fn guest(&self, gp: u32, fixed: u32) -> Result<Self, ShapeError> {
        let exceeds = |field, asked, available| Err(ShapeError::Exceeds { field, asked, available });
        if gp > self.gp_count() {
            return exceeds("the number of general-purpose counters", gp, self.gp_count());
        }
        if fixed > self.fixed_count() {
            return exceeds("the number of fixed counters", fixed, self.fixed_count());
        }
        Ok(Self {
            gp: lowest(self.gp, gp),
            fixed: lowest(self.fixed, fixed),
            perf_capabilities: self.perf_capabilities & CAP_FW_WRITE,
            ..*self
        })
    }

    /// Number of general-purpose counters.
    pub const fn gp_count(&self) -> u32 {
        self.gp.count_ones()
    }

    /// Number of fixed counters.
    pub const fn fixed_count(&self) -> u32 {
        self.fixed.count_ones()
    }

    /// General-purpose counter `i` exists.
    pub const fn has_gp(&self, i: u32) -> bool {
        i < 64 && self.gp >> i & 1 == 1
    }

    /// Fixed counter `i` exists.
    pub const fn has_fixed(&self, i: u32) -> bool {
        i < 64 && self.fixed >> i & 1 == 1
    }

    /// Largest value of a general-purpose counter.
    #[inline]
    pub const fn gp_mask(&self) -> u64 {
        u64::MAX >> (64 - self.gp_width)
    }

    /// Largest value of a fixed counter.
    #[inline]
    pub const fn fixed_mask(&self) -> u64 {
        u64::MAX >> (64 - self.fixed_width)
    }

    /// A global control exists: Intel v2 and later, AMD PerfMonV2. So does an overflow status.
    #[inline]
    pub const fn has_global(&self) -> bool {
        self.version >= 2
    }

    /// The bits that all counters have in global control and overflow status.
    #[inline]
    pub const fn counter_bits(&self) -> u64 {
        self.gp | self.fixed << 32
    }

    /// Bits that exist in fixed control: OS, USR and PMI of each counter; ANY is always reserved.
    pub const fn fixed_control_bits(&self) -> u64 {
        let mut bits = 0;
        let mut left = self.fixed;
        while left != 0 {
            bits |= 0xB << (4 * left.trailing_zeros());
            left &= left - 1;
        }
        bits
    }

    /// Full-width counter writes (0x4C1) exist.
    pub const fn has_full_width_writes(&self) -> bool {
        self.perf_capabilities & CAP_FW_WRITE != 0
    }
}

const fn low(n: u32) -> u64 {
    (1 << n) - 1
}

fn lowest(bitmap: u64, n: u32) -> u64 {
    let (mut left, mut out) = (bitmap, 0);
    for _ in 0..n {
        out |= left & left.wrapping_neg();
        left &= left.wrapping_sub(1);
    }
    out
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |bitmap: u64| {
            if bitmap == low(bitmap.count_ones()) {
                bitmap.count_ones().to_string()
            } else {
                format!("{bitmap:#x}")
            }
        };
        write!(f, "{}:v{}:{}", self.vendor, self.version, count(self.gp))?;
        if self.vendor == Vendor::Intel {
            write!(f, "+{}", count(self.fixed))?;
        }
        write!(f, ":{}", self.gp_width)?;
        if self.fixed != 0 && self.fixed_width != self.gp_width {
            write!(f, "+{}", self.fixed_width)?;
        }
        Ok(())
    }
}

impl FromStr for Shape {
    type Err = ShapeError;

    fn from_str(text: &str) -> Result<Self, ShapeError> {
        let syntax = |problem| ShapeError::Syntax { text: text.chars().take(80).collect(), problem };
        let parts: Vec<&str> = text.split(':').collect();
        let [vendor, version, counters, widths] = parts[..] else {
            return Err(syntax("it has four parts: vendor, version, counters, width"));
        };
        let vendor: Vendor = vendor.parse().map_err(|_| syntax("the vendor must be intel or amd"))?;
        let version = version
            .strip_prefix('v')
            .and_then(|v| v.parse::<u8>().ok())
            .ok_or_else(|| syntax("the version is v and a number"))?;
        let bitmap = |s: &str, max: usize| -> Result<u64, ShapeError> {
            if let Some(hex) = s.strip_prefix("0x") {
                return u64::from_str_radix(hex, 16)
                    .map_err(|_| syntax("a bitmap is 0x and hexadecimal digits"));
            }
            match s.parse::<u32>() {
                Ok(n) if n as usize <= max => Ok(low(n)),
                _ => Err(syntax("a counter count is a number, at most 16 general-purpose and 8 fixed")),
            }
        };
        let (gp, fixed) = counters.split_once('+').unwrap_or((counters, "0"));
        let (gp_width, fixed_width) = widths.split_once('+').unwrap_or((widths, widths));
        let width = |s: &str| s.parse::<u8>().map_err(|_| syntax("the width is a number of bits"));
        let shape = Self {
            vendor,
            version,
            gp: bitmap(gp, MAX_GP)?,
            fixed: bitmap(fixed, MAX_FIXED)?,
            gp_width: width(gp_width)?,
            fixed_width: width(fixed_width)?,
            perf_capabilities: if vendor == Vendor::Intel && version > 0 { CAP_FW_WRITE } else { 0 },
        };
        shape.validate()?;
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn short_form_round_trips() {
        for text in [
            "intel:v5:8+4:48",
            "amd:v2:6:48",
            "intel:v1:2+0:40",
            "amd:v0:4:48",
            "intel:v5:0xb5+0xb:48",
            "intel:v2:4+3:48+40",
        ] {
            assert_eq!(text.parse::<Shape>().expect(text).to_string(), text);
        }
    }

    #[test]
    fn bad_short_forms_say_what_is_wrong() {
        for text in [
            "",
            "intel",
            "via:v2:4:48",
            "intel:5:8+4:48",
            "intel:v9:8+4:48",
            "amd:v2:6+1:48",
            "intel:v5:99+4:48",
            "intel:v5:8+4:300",
            "intel:v1:2+1:48",
            "intel:v5:0xffffffffffffffff+4:48",
        ] {
            assert!(text.parse::<Shape>().is_err(), "{text} must be refused");
        }
    }

    #[test]
    fn a_guest_gets_the_lowest_counters_of_its_host() {
        let host: Shape = "intel:v5:0xb5+0xb:48".parse().expect("shape");
        let guest = host.guest(2, 2).expect("subset");
        assert_eq!((guest.gp, guest.fixed), (0b101, 0b11));
        assert_eq!(
            host.guest(9, 0),
            Err(ShapeError::Exceeds {
                field: "the number of general-purpose counters",
                asked: 9,
                available: 5
            })
        );
        assert!(host.guest(0, 4).is_err());
    }

    #[test]
    fn fixed_control_leaves_any_thread_reserved() {
        let shape: Shape = "intel:v5:8+3:48".parse().expect("shape");
        assert_eq!(shape.fixed_control_bits(), 0xBBB);
    }
}
