//! Which of the fed events a counter counts.

use crate::rates::Events;
use crate::shape::Vendor;

const EVENT_AND_UMASK: u64 = 0xFFFF;
const EDGE: u64 = 1 << 18;
const INV: u64 = 1 << 23;
const CMASK: u64 = 0xFF << 24;
/// AMD: bits 11:8 of the event select.
const EVENT_HIGH: u64 = 0xF << 32;

/// What a GP selector counts; enabled or not is not looked at. EDGE, INV and CMASK ask for cycles with a condition, which a feed cannot
/// know: such a counter stands still rather than count something else.
pub(super) fn of_selector(vendor: Vendor, selector: u64, events: &Events, extended: bool) -> u64 {
    if selector & (EDGE | INV | CMASK | EVENT_HIGH) != 0 {
        return 0;
    }
    match (vendor, selector & EVENT_AND_UMASK) {
        (Vendor::Intel, 0x003C) | (Vendor::Amd, 0x0076) => events.cycles,
        (_, 0x00C0) => events.instructions,
        (Vendor::Intel, 0x013C) => events.ref_cycles,
        (Vendor::Intel, 0x00C4) | (Vendor::Amd, 0x00C2) if extended => events.branches,
        (Vendor::Intel, 0x01A4) if extended => events.slots,
        _ => 0,
    }
}

/// What fixed counter `index` counts: instructions, cycles, reference cycles, slots.
pub(super) fn of_fixed(index: usize, events: &Events) -> u64 {
    match index {
        0 => events.instructions,
        1 => events.cycles,
        2 => events.ref_cycles,
        3 => events.slots,
        _ => 0,
    }
}
