//! The lines that the replay tool takes.

use serde::Deserialize;

/// One line. Numbers are plain integers up to 2^64 - 1.
#[derive(Debug, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Input {
    /// A core; nothing is known of it.
    Host(Host),
    /// The host writes a register behind the switcher's back.
    HostSet { msr: u32, value: u64 },
    /// A guest.
    Guest(Guest),
    /// Load and resume.
    Load { id: String },
    /// Pause and put.
    Put { id: String },
    /// A trapped write.
    GuestWrmsr { id: String, msr: u32, value: u64 },
    /// A trapped read.
    GuestRdmsr { id: String, msr: u32 },
    /// A trapped RDPMC.
    GuestRdpmc { id: String, index: u32 },
    /// Events happen.
    Count { events: Counts },
    /// The raw register.
    HwRead { msr: u32 },
    /// The n-th next access fails once; 1 is the next one.
    FailAccess { n: u64 },
}

/// A core.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Host {
    pub(crate) vendor: String,
    pub(crate) version: u8,
    pub(crate) gp: Option<u32>,
    pub(crate) fixed: Option<u32>,
    pub(crate) gp_bitmap: Option<u64>,
    pub(crate) fixed_bitmap: Option<u64>,
    pub(crate) gp_width: Option<u8>,
    pub(crate) fixed_width: Option<u8>,
}

/// A guest: counters by number or bitmap; version and widths are the host's unless given.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guest {
    pub(crate) id: String,
    pub(crate) gp: Option<u32>,
    pub(crate) fixed: Option<u32>,
    pub(crate) gp_bitmap: Option<u64>,
    pub(crate) fixed_bitmap: Option<u64>,
    pub(crate) version: Option<u8>,
    pub(crate) gp_width: Option<u8>,
    pub(crate) fixed_width: Option<u8>,
    pub(crate) policy: Option<String>,
    pub(crate) fw_write: Option<bool>,
}

/// How often each event happens.
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Counts {
    pub(crate) cycles: u64,
    pub(crate) instructions: u64,
    pub(crate) ref_cycles: u64,
    pub(crate) slots: u64,
}
