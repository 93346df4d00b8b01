//! The event filter: which events and fixed counters a guest may count, with the semantics of KVM's `KVM_SET_PMU_EVENT_FILTER`
//! (Documentation/virt/kvm/api.rst section 4.120; arch/x86/kvm/pmu.c `is_gp_event_allowed`, `is_fixed_event_allowed`).
//!
//! Invariants: an entry is checked when the filter is built, never at a query; a query allocates nothing; what KVM accepts and ignores is
//! accepted and ignored here too. The filter never changes what the guest reads back (I-18): it only decides what reaches the hardware.
//!
//! A filter compares the event select and unit mask only. On AMD the event select has 12 bits (7:0 and 35:32), on Intel 8.

use crate::shape::Vendor;

/// The most entries KVM takes (`KVM_PMU_EVENT_FILTER_MAX_EVENTS`).
pub const MAX_FILTER_EVENTS: usize = 300;
/// `KVM_PMU_EVENT_FLAG_MASKED_EVENTS`: the entries are masked entries, see [`masked_entry`].
pub const FLAG_MASKED_EVENTS: u32 = 1;

const EVENT_LOW: u64 = 0xFF;
const EVENT_HIGH: u64 = 0xF << 32;
const UMASK: u64 = 0xFF << 8;
const MASKED_UMASK_MASK: u64 = 0xFF << 56;
const MASKED_EXCLUDE: u64 = 1 << 55;

/// What happens to the events on the list; all others get the opposite.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FilterAction {
    /// Only listed events and fixed counters count (`KVM_PMU_EVENT_ALLOW` = 0).
    Allow,
    /// All but the listed events and fixed counters count (`KVM_PMU_EVENT_DENY` = 1).
    Deny,
}

/// Why a filter is refused. KVM refuses the same ones (EINVAL, E2BIG).
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FilterError {
    /// The action is neither allow nor deny.
    #[error("event filter action {action} does not exist: use 0 (allow) or 1 (deny)")]
    Action {
        /// The value given.
        action: u32,
    },
    /// A flag that does not exist.
    #[error("event filter flags {flags:#x} are unknown: only bit 0 (masked events) exists")]
    Flags {
        /// The value given.
        flags: u32,
    },
    /// Too many entries.
    #[error(
        "event filter has {count} entries: at most {MAX_FILTER_EVENTS} are possible; merge unit masks into masked entries"
    )]
    TooMany {
        /// How many were given.
        count: usize,
    },
    /// A masked entry with bits that a masked entry does not have.
    #[error(
        "event filter entry {index} is {entry:#018x}: reserved bits {reserved:#x} must be 0 in masked mode"
    )]
    Reserved {
        /// Position in the list.
        index: usize,
        /// The entry as given.
        entry: u64,
        /// Its reserved bits.
        reserved: u64,
    },
}

impl FilterError {
    /// A stable code for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Action { .. } => "FILTER_ACTION",
            Self::Flags { .. } => "FILTER_FLAGS",
            Self::TooMany { .. } => "FILTER_TOO_MANY",
            Self::Reserved { .. } => "FILTER_RESERVED",
        }
    }
}

/// The filter as KVM's ioctl takes it: `struct kvm_pmu_event_filter` in plain data.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FilterSpec {
    /// 0 allow, 1 deny.
    pub action: u32,
    /// 0 or [`FLAG_MASKED_EVENTS`].
    pub flags: u32,
    /// Bit i names fixed counter i; what it means depends on the action. Bits of absent counters are accepted.
    pub fixed_counter_bitmap: u32,
    /// Plain entries (event select and unit mask at their EVENTSEL positions) or masked entries, at most [`MAX_FILTER_EVENTS`].
    pub events: Vec<u64>,
}

/// A checked filter. [`EventFilter::allow_all`] is what a VM without a filter has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EventFilter {
    action: FilterAction,
    fixed: u32,
    /// Masked form, sorted by event select.
    includes: Vec<u64>,
    excludes: Vec<u64>,
    spec: FilterSpec,
}

impl Default for EventFilter {
    fn default() -> Self {
        Self::allow_all()
    }
}

impl EventFilter {
    /// Every event and every fixed counter is allowed: a deny list with nothing on it.
    #[must_use]
    pub fn allow_all() -> Self {
        let spec = FilterSpec { action: 1, ..FilterSpec::default() };
        Self { action: FilterAction::Deny, fixed: 0, includes: Vec::new(), excludes: Vec::new(), spec }
    }

    /// Checks a filter as KVM on a host of this vendor does. Plain entries with bits outside event select and unit mask are accepted and
    /// match nothing, as in KVM; masked entries with such bits are refused.
    pub fn new(vendor: Vendor, spec: FilterSpec) -> Result<Self, FilterError> {
        let action = match spec.action {
            0 => FilterAction::Allow,
            1 => FilterAction::Deny,
            action => return Err(FilterError::Action { action }),
        };
        if spec.flags & !FLAG_MASKED_EVENTS != 0 {
            return Err(FilterError::Flags { flags: spec.flags });
        }
        if spec.events.len() > MAX_FILTER_EVENTS {
            return Err(FilterError::TooMany { count: spec.events.len() });
        }
        let mut includes = Vec::new();
        let mut excludes = Vec::new();
        for (index, &entry) in spec.events.iter().enumerate() {
            if spec.flags & FLAG_MASKED_EVENTS != 0 {
                let reserved =
                    entry & !(event_select_mask(vendor) | UMASK | MASKED_UMASK_MASK | MASKED_EXCLUDE);
                if reserved != 0 {
                    return Err(FilterError::Reserved { index, entry, reserved });
                }
                if entry & MASKED_EXCLUDE == 0 { includes.push(entry) } else { excludes.push(entry) }
            } else if entry & !(event_select_mask(vendor) | UMASK) == 0 {
                includes.push(entry | MASKED_UMASK_MASK);
            }
        }
        includes.sort_unstable_by_key(|entry| event_select(*entry));
        excludes.sort_unstable_by_key(|entry| event_select(*entry));
        Ok(Self { action, fixed: spec.fixed_counter_bitmap, includes, excludes, spec })
    }

    /// The filter as it was given, for KVM's ioctl or for storing.
    #[must_use]
    pub fn spec(&self) -> &FilterSpec {
        &self.spec
    }

    /// Whether nothing is filtered.
    #[must_use]
    pub fn is_allow_all(&self) -> bool {
        self.action == FilterAction::Deny && self.fixed == 0 && self.includes.is_empty()
    }

    /// Whether a general-purpose counter with this selector may count. Only the event select and the unit mask are looked at.
    #[must_use]
    pub fn allows_gp(&self, vendor: Vendor, selector: u64) -> bool {
        let event = selector & event_select_mask(vendor);
        let umask = selector & UMASK;
        let listed = matches(&self.includes, event, umask) && !matches(&self.excludes, event, umask);
        listed == (self.action == FilterAction::Allow)
    }

    /// Whether fixed counter `index` may count. The bitmap decides alone; entries of the event list never apply to fixed counters.
    #[must_use]
    pub fn allows_fixed(&self, index: u32) -> bool {
        let listed = index < 32 && self.fixed >> index & 1 == 1;
        listed == (self.action == FilterAction::Allow)
    }
}

/// Encodes a masked entry (`KVM_PMU_ENCODE_MASKED_ENTRY`): it matches a selector of event `event` (12 bits) whose unit mask, restricted to
/// `mask`, equals `matched`; `exclude` takes such selectors off the list again.
#[must_use]
pub fn masked_entry(event: u16, mask: u8, matched: u8, exclude: bool) -> u64 {
    let event = u64::from(event);
    (event & 0xFF)
        | ((event & 0xF00) << 24)
        | (u64::from(mask) << 56)
        | (u64::from(matched) << 8)
        | if exclude { MASKED_EXCLUDE } else { 0 }
}

fn event_select_mask(vendor: Vendor) -> u64 {
    match vendor {
        Vendor::Intel => EVENT_LOW,
        Vendor::Amd => EVENT_LOW | EVENT_HIGH,
    }
}

fn event_select(entry: u64) -> u64 {
    entry & (EVENT_LOW | EVENT_HIGH)
}

fn matches(sorted: &[u64], event: u64, umask: u64) -> bool {
    let first = sorted.partition_point(|entry| event_select(*entry) < event);
    sorted
        .iter()
        .skip(first)
        .take_while(|entry| event_select(**entry) == event)
        .any(|entry| umask & (entry >> 48 & UMASK) == entry & UMASK)
}

#[cfg(test)]
mod tests;
