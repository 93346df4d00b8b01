//! The restore policies `best_effort` and `reset`: a guest's PMU cut to what another host has, and a list of all that was cut.
//!
//! What fits is a matter of single registers: a counter, control or status keeps the bits that the other PMU has (a sampling
//! counter of −N stays −N when its width shrinks); a selector that does not fit as a whole selects another event, so it is
//! dropped. Whatever is not kept is named with both values, never only counted.

use super::values::mask;
use super::{check_shape, flavour, has_pmu, refusal};
use crate::guest::regs::Regs;
use crate::image::{Image, RestorePolicy};
use crate::registers::{Reg, decode, register_name};
use crate::shape::Shape;

/// A register that did not come along whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// MSR number.
    pub msr: u32,
    /// Its name.
    pub name: String,
    /// What the guest had.
    pub had: u64,
    /// What it has now; 0 for a register that is not there.
    pub has: u64,
}

/// An image that fits, and what it cost.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fitted {
    /// Of the other PMU's shape.
    pub image: Image,
    /// What differs from the image as it came.
    pub lost: Vec<Lost>,
}

/// The PMU that a guest goes on with at `host`: its own where all of it is there; otherwise, unless the policy is to
/// require it, the part that both have. `None`: it cannot go on there under this policy.
#[must_use]
pub fn shape_on(guest: &Shape, host: &Shape, policy: RestorePolicy) -> Option<Shape> {
    if refusal(&check_shape(guest, host)).is_none() {
        return Some(*guest);
    }
    if policy == RestorePolicy::Require || guest.validate().is_err() || host.validate().is_err() {
        return None;
    }
    if !has_pmu(host) {
        return (policy == RestorePolicy::Reset).then(Shape::none);
    }
    if flavour(guest) != flavour(host) {
        return None;
    }
    let mut both = super::values::common(guest, host);
    both.perf_capabilities &= host.perf_capabilities;
    // A format is a number, not a set of bits.
    for format in [0x3F, 0xF00] {
        if guest.perf_capabilities & format != host.perf_capabilities & format {
            both.perf_capabilities &= !format;
        }
    }
    both.validate().is_ok().then_some(both)
}

/// Whether a rule that does not hold is borne under a policy; what it costs is then reported.
#[must_use]
pub fn borne(rule: &str, policy: RestorePolicy) -> bool {
    match policy {
        RestorePolicy::Require => false,
        RestorePolicy::BestEffort => matches!(rule, "C2" | "C3" | "C4" | "C9"),
        RestorePolicy::Reset => matches!(rule, "C2" | "C3" | "C4" | "C7" | "C9"),
    }
}

/// Cuts an image to the shape `to`, or under the policy reset replaces it by the reset state. PMIs that were given stay
/// counted; one that is owed stays owed unless the PMU is reset.
#[must_use]
pub fn fit(image: &Image, to: &Shape, policy: RestorePolicy) -> Fitted {
    let initial = if has_pmu(to) { Regs::reset(to).to_registers(to) } else { Vec::new() };
    let mut lost = Vec::new();
    let mut note = |msr, had, has| {
        if had != has {
            lost.push(Lost { msr, name: register_name(msr, image.shape.vendor), had, has });
        }
    };
    let registers: Vec<(u32, u64)> = initial
        .into_iter()
        .map(|(msr, initial)| {
            let Some(had) = image.get(msr) else { return (msr, initial) };
            let has = if policy == RestorePolicy::Reset { initial } else { kept(to, msr, had) };
            note(msr, had, has);
            (msr, has)
        })
        .collect();
    for &(msr, had) in &image.registers {
        if registers.binary_search_by_key(&msr, |r| r.0).is_err() {
            note(msr, had, 0);
        }
    }
    lost.sort_by_key(|l| l.msr);
    let goes_on = policy != RestorePolicy::Reset;
    let image = Image {
        shape: *to,
        registers,
        in_service: goes_on && image.in_service,
        pmi_pending: goes_on && image.pmi_pending,
        pmis: image.pmis,
    };
    Fitted { image, lost }
}

/// What of a value a register of this PMU keeps.
fn kept(to: &Shape, msr: u32, had: u64) -> u64 {
    let reg = decode(to.vendor, to.version, msr);
    let bits = mask(to, reg).unwrap_or(0);
    match reg {
        Some(Reg::GpSelector(_)) if had & !bits != 0 => 0,
        _ => had & bits,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::filter::EventFilter;
    use crate::guest::{GuestId, GuestPmu, Policy};
    use crate::image::ImportOutcome;

    fn shape(text: &str) -> Shape {
        text.parse().expect(text)
    }

    fn guest(shape: Shape) -> GuestPmu {
        GuestPmu::new(GuestId(1), shape, Policy::Strict, EventFilter::allow_all())
    }

    /// A guest with every counter, selector and status bit set, and a PMI owed.
    fn full(shape: Shape) -> Image {
        let mut image = guest(shape).image();
        for (msr, value) in &mut image.registers {
            let reg = decode(shape.vendor, shape.version, *msr);
            *value = match reg {
                Some(Reg::GpSelector(_)) => 0x53_00C0,
                _ => mask(&shape, reg).expect("a register of the shape"),
            };
        }
        image.pmi_pending = true;
        image.pmis = 7;
        image.validate().expect("valid");
        image
    }

    #[test]
    fn what_fits_is_kept_to_the_bit_and_the_rest_is_named() {
        let (from, host) = (shape("intel:v5:8+4:48"), shape("intel:v4:4+3:40"));
        let image = full(from);
        assert_eq!(shape_on(&from, &host, RestorePolicy::Require), None);
        let to = shape_on(&from, &host, RestorePolicy::BestEffort).expect("a part fits");
        assert_eq!((to.version, to.gp, to.fixed, to.gp_width), (4, 0xF, 0x7, 40));
        let fitted = fit(&image, &to, RestorePolicy::BestEffort);
        fitted.image.validate().expect("valid");
        assert_eq!((fitted.image.pmi_pending, fitted.image.pmis), (true, 7), "the PMI is owed still");
        let mut there = guest(to);
        assert_eq!(
            there.import(&fitted.image, RestorePolicy::Require),
            ImportOutcome::Applied { dropped: Vec::new() }
        );
        assert_eq!(there.image().digest(), fitted.image.digest());
        // Everything that differs is named, and nothing else is.
        for &(msr, had) in &image.registers {
            let has = fitted.image.get(msr).unwrap_or(0);
            let named = fitted.lost.iter().find(|l| l.msr == msr).map(|l| (l.had, l.has));
            assert_eq!(named, (had != has).then_some((had, has)), "{msr:#x}");
        }
        assert_eq!(fitted.image.get(0xC1), Some((1 << 40) - 1), "a counter keeps its low bits");
        assert_eq!(fitted.image.get(0x38F), Some(0x7_0000_000F), "control keeps the counters that are there");
        assert_eq!(fitted.image.get(0xC1 + 4), None);
    }

    #[test]
    fn what_fits_whole_is_left_alone() {
        let (from, host) = (shape("intel:v5:4+3:48"), shape("intel:v5:8+4:48"));
        for policy in [RestorePolicy::Require, RestorePolicy::BestEffort, RestorePolicy::Reset] {
            assert_eq!(shape_on(&from, &host, policy), Some(from), "its own PMU, not the larger one");
        }
        let image = full(from);
        assert_eq!(fit(&image, &from, RestorePolicy::BestEffort), Fitted { image, lost: Vec::new() });
    }

    #[test]
    fn a_reset_begins_anew_and_owes_nothing() {
        let from = shape("amd:v2:6:48");
        let image = full(from);
        let fitted = fit(&image, &from, RestorePolicy::Reset);
        assert!(fitted.image.is_reset() && !fitted.image.pmi_pending, "{fitted:?}");
        assert_eq!(
            (fitted.image.pmis, fitted.lost.len()),
            (7, image.registers.len() - usize::from(image.get(0xC000_0301) == Some(0x3F)))
        );
    }

    #[test]
    fn another_flavour_fits_under_no_policy() {
        let (from, host) = (shape("intel:v5:8+4:48"), shape("amd:v2:6:48"));
        for policy in [RestorePolicy::Require, RestorePolicy::BestEffort, RestorePolicy::Reset] {
            assert_eq!(shape_on(&from, &host, policy), None);
            assert!(!borne("C1", policy));
        }
        assert_eq!(shape_on(&from, &Shape::none(), RestorePolicy::Reset), Some(Shape::none()));
        assert_eq!(shape_on(&from, &Shape::none(), RestorePolicy::BestEffort), None);
        let none = fit(&full(from), &Shape::none(), RestorePolicy::Reset);
        assert!(none.image.registers.is_empty() && !none.lost.is_empty());
    }
}
