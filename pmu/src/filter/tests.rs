//! The cases of the kernel's `pmu_event_filter_test.c`, and the filter against a plain re-statement of its rule.

use super::*;
use proptest::prelude::*;

const INTEL: [u64; 7] = [0x3C, 0xC0, 0x13C, 0x4F2E, 0x412E, 0xC4, 0xC5];
const BRANCHES: u64 = 0xC4;
const ENABLED: u64 = 1 << 22 | 1 << 17 | 1 << 16;

fn plain(action: u32, events: &[u64]) -> FilterSpec {
    FilterSpec { action, events: events.to_vec(), ..FilterSpec::default() }
}

fn intel(spec: FilterSpec) -> EventFilter {
    EventFilter::new(Vendor::Intel, spec).expect("a valid filter")
}

#[test]
fn without_a_filter_everything_counts() {
    for filter in [EventFilter::allow_all(), EventFilter::default()] {
        assert!(filter.is_allow_all());
        assert!(filter.allows_gp(Vendor::Intel, BRANCHES | ENABLED));
        assert!(filter.allows_gp(Vendor::Amd, 0x1_0000_00C2 | ENABLED));
        assert!((0..40).all(|i| filter.allows_fixed(i)));
    }
}

#[test]
fn lists_with_and_without_the_event() {
    let without: Vec<u64> = INTEL.into_iter().filter(|e| *e != BRANCHES).collect();
    assert!(
        !intel(plain(1, &INTEL)).allows_gp(Vendor::Intel, BRANCHES | ENABLED),
        "deny list with the member"
    );
    assert!(
        intel(plain(0, &INTEL)).allows_gp(Vendor::Intel, BRANCHES | ENABLED),
        "allow list with the member"
    );
    assert!(
        intel(plain(1, &without)).allows_gp(Vendor::Intel, BRANCHES | ENABLED),
        "deny list without the member"
    );
    assert!(
        !intel(plain(0, &without)).allows_gp(Vendor::Intel, BRANCHES | ENABLED),
        "allow list without the member"
    );
}

#[test]
fn amd_event_select_has_twelve_bits() {
    let deny = EventFilter::new(Vendor::Amd, plain(1, &[0x1_0000_00C2])).unwrap();
    assert!(deny.allows_gp(Vendor::Amd, 0xC2 | ENABLED), "denying 0x1C2 must not deny 0xC2");
    assert!(!deny.allows_gp(Vendor::Amd, 0x1_0000_00C2 | ENABLED));
    // On Intel bits 35:32 are no part of an event: a plain entry with them matches nothing.
    let deny = intel(plain(1, &[0x1_0000_00C2]));
    assert!(deny.allows_gp(Vendor::Intel, 0xC2) && deny.is_allow_all());
}

#[test]
fn only_event_and_unit_mask_of_the_selector_are_compared() {
    let deny = intel(plain(1, &[0x13C]));
    for rest in [0, ENABLED, 0xFF << 24 | 1 << 18 | 1 << 23 | 1 << 20, 0x7 << 32] {
        assert!(!deny.allows_gp(Vendor::Intel, 0x13C | rest));
        assert!(deny.allows_gp(Vendor::Intel, 0x3C | rest));
    }
}

/// The seven include and exclude combinations of the selftest: event 0xD0, LOADS 0x81, STORES 0x82, LOADS_STORES 0x83 (masked), or the AMD
/// ones 0x29 with 1, 2, 4. Each alone and behind 290 dummies.
#[test]
fn masked_entries_include_and_exclude() {
    let e = |mask, matched, exclude| masked_entry(0x29, mask, matched, exclude);
    let (load, store, both) = (1u8, 2u8, 4u8);
    let cases: [(&str, Vec<u64>, [bool; 3]); 7] = [
        ("only loads", vec![e(0xFF, load, false)], [true, false, false]),
        ("only stores", vec![e(0xFF, store, false)], [false, true, false]),
        ("only loads and stores", vec![e(0xFF, both, false)], [false, false, true]),
        ("loads or stores, not both", vec![e(!(load | store), 0, false)], [true, true, false]),
        ("all but loads", vec![e(0, 0, false), e(0xFF, load, true)], [false, true, true]),
        ("all but stores", vec![e(0, 0, false), e(0xFF, store, true)], [true, false, true]),
        ("nothing", vec![e(0, 0, false), e(0, 0, true)], [false, false, false]),
    ];
    for (name, entries, wanted) in cases {
        for dummies in [0u16, 290] {
            let mut events: Vec<u64> = (0..dummies)
                .map(|i| masked_entry(0x100 + (i & 0xFF), 0xFF, (i >> 8) as u8, i & 1 == 1))
                .collect();
            events.extend(&entries);
            let spec = FilterSpec { action: 0, flags: FLAG_MASKED_EVENTS, events, ..FilterSpec::default() };
            let filter = EventFilter::new(Vendor::Amd, spec).unwrap();
            for (umask, want) in [load, store, both].into_iter().zip(wanted) {
                let selector = 0x29 | u64::from(umask) << 8 | ENABLED;
                assert_eq!(
                    filter.allows_gp(Vendor::Amd, selector),
                    want,
                    "{name}, {dummies} dummies, unit mask {umask}"
                );
            }
        }
    }
}

#[test]
fn what_kvm_refuses_is_refused() {
    let new = |spec| EventFilter::new(Vendor::Intel, spec);
    assert_eq!(new(plain(2, &[])), Err(FilterError::Action { action: 2 }));
    let flags = FilterSpec { flags: 2, ..plain(0, &[]) };
    assert_eq!(new(flags), Err(FilterError::Flags { flags: 2 }));
    assert_eq!(new(plain(0, &[0xC0; 301])), Err(FilterError::TooMany { count: 301 }));
    assert!(new(plain(0, &[0xC0; 300])).is_ok());
    // Junk bits: accepted (and matching nothing) unmasked, refused masked.
    let junk = 0xC0 | 1 << 40;
    assert!(!intel(plain(0, &[junk])).allows_gp(Vendor::Intel, 0xC0));
    let masked = |entry| FilterSpec {
        action: 0,
        flags: FLAG_MASKED_EVENTS,
        events: vec![entry],
        ..FilterSpec::default()
    };
    assert_eq!(new(masked(junk)), Err(FilterError::Reserved { index: 0, entry: junk, reserved: 1 << 40 }));
    let wide = masked_entry(0x1C2, 0xFF, 0, false);
    assert_eq!(new(masked(wide)).unwrap_err().reason(), "FILTER_RESERVED", "a 12-bit event on Intel");
    assert!(EventFilter::new(Vendor::Amd, masked(wide)).is_ok());
}

#[test]
fn fixed_bitmap_decides_alone() {
    for bitmap in 0..16u32 {
        for (action, listed_counts) in [(0, true), (1, false)] {
            // The instructions event is on the list with the opposite effect of the bitmap for some bitmaps: it must not matter.
            let filter = intel(FilterSpec { fixed_counter_bitmap: bitmap, ..plain(action, &[0xC0, 0x3C]) });
            for i in 0..4 {
                assert_eq!(
                    filter.allows_fixed(i),
                    (bitmap >> i & 1 == 1) == listed_counts,
                    "bitmap {bitmap:#x} action {action} fixed {i}"
                );
            }
        }
    }
    let absent = intel(FilterSpec { fixed_counter_bitmap: u32::MAX, ..plain(1, &[]) });
    assert!(!absent.allows_fixed(31) && absent.allows_fixed(32));
    assert!(!absent.is_allow_all());
}

#[test]
fn the_given_form_is_kept() {
    let spec =
        FilterSpec { action: 0, flags: 0, fixed_counter_bitmap: 5, events: vec![0xC5, 0x3C, 0xC0 | 1 << 60] };
    assert_eq!(intel(spec.clone()).spec(), &spec);
}

proptest! {
    /// The rule said plainly: walk the whole list.
    #[test]
    fn equals_the_plain_rule(
        action in 0u32..2,
        entries in proptest::collection::vec((0u16..8, any::<u8>(), any::<u8>(), any::<bool>()), 0..60),
        event in 0u64..8, umask in any::<u8>(),
    ) {
        let events: Vec<u64> = entries.iter().map(|(e, mask, m, x)| masked_entry(*e, *mask, m & mask, *x)).collect();
        let spec = FilterSpec { action, flags: FLAG_MASKED_EVENTS, events, ..FilterSpec::default() };
        let filter = EventFilter::new(Vendor::Intel, spec).unwrap();
        let hit = |excluding: bool| entries.iter().any(|(e, mask, m, x)| {
            *x == excluding && u64::from(*e) == event && umask & mask == m & mask
        });
        let listed = hit(false) && !hit(true);
        prop_assert_eq!(filter.allows_gp(Vendor::Intel, event | u64::from(umask) << 8), listed == (action == 0));
    }
}
