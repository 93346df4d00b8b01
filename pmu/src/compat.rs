//! Whether a guest's PMU can continue on another host: rules C1 to C9, checked before any write.
//!
//! | rule | holds if | otherwise |
//! |---|---|---|
//! | C1 | same vendor and PMU flavour (architectural; K7, PerfCtrExtCore, PerfMonV2) | refused |
//! | C2 | the target has the guest's version, each of its counters (bitmaps, not counts) and at least its widths | refused |
//! | C3 | the guest's PERF_CAPABILITIES are a subset of the target's; LBR and PEBS formats equal or 0 | refused |
//! | C4 | every value of the image fits the guest's registers and the target's | refused; status bits only: masked, warning |
//! | C5 | the target's event filter allows what the source's allowed, for the selectors in use | warning: those counters freeze |
//! | C6 | same processor family and model, or only architectural events in use | warning: events may mean something else |
//! | C7 | the target has a PMU, or the guest has none and its image is empty | refused |
//! | C8 | under KVM, the target has exactly the guest's counters | warning: slower, KVM intercepts RDPMC |
//! | C9 | a set status bit can be put back on the target | refused |
//!
//! Every mismatch is named, not only the first. The answer depends on the arguments only.

use crate::cpuid::{AMD_STABLE_EVENTS, FamilyModel, INTEL_ARCH_EVENTS};
use crate::filter::EventFilter;
use crate::image::{Image, MAX_REGISTERS};
use crate::registers::SEL_EN;
use crate::shape::{Shape, Vendor};

mod fit;
mod values;

pub use fit::{Fitted, Lost, borne, fit, shape_on};

/// One rule that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// "C1" to "C9".
    pub rule: &'static str,
    /// What does not fit, with both sides' values.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
    /// The guest may continue all the same; what it loses is in the message.
    pub warning: bool,
}

impl Mismatch {
    fn refusal(rule: &'static str, message: String, remedy: impl Into<String>) -> Self {
        Self { rule, message, remedy: remedy.into(), warning: false }
    }

    fn warning(rule: &'static str, message: String, remedy: impl Into<String>) -> Self {
        Self { rule, message, remedy: remedy.into(), warning: true }
    }
}

/// What is known besides the image and the target's shape.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompatContext {
    /// The processor the guest ran on; with `None` here or below, C6 is not judged.
    pub source_cpu: Option<FamilyModel>,
    /// The processor it is to run on.
    pub target_cpu: Option<FamilyModel>,
    /// The event filter that was in force; `None` allows all.
    pub source_filter: Option<EventFilter>,
    /// The event filter that will be in force; `None` allows all.
    pub target_filter: Option<EventFilter>,
    /// The target's PMU is switched off (`KVM_PMU_CAP_DISABLE`, `enable_pmu=0`, leaf 0AH hidden).
    pub target_pmu_disabled: bool,
    /// A set overflow status bit can be put back: the status lives in the image (`model`, `msr`), or KVM sets it absolutely, or the
    /// hardware has a STATUS_SET port.
    pub target_status_set: bool,
    /// The target runs the guest's PMU in KVM's own vPMU (C8 matters there only).
    pub target_is_kvm: bool,
    /// What C1 or C2 says of the target's counters is not said again as C4 for each of their registers.
    pub brief: bool,
}

impl Default for CompatContext {
    /// A target that keeps the status in the image, with its PMU on, no filter, and processors unknown.
    fn default() -> Self {
        Self {
            source_cpu: None,
            target_cpu: None,
            source_filter: None,
            target_filter: None,
            target_pmu_disabled: false,
            target_status_set: true,
            target_is_kvm: false,
            brief: false,
        }
    }
}

/// The first mismatch that refuses, if any.
#[must_use]
pub fn refusal(mismatches: &[Mismatch]) -> Option<&Mismatch> {
    mismatches.iter().find(|mismatch| !mismatch.warning)
}

/// The rules that need no image: C1, C2, C3 and C7 of a guest's shape against a target host. For the check before a copy begins.
#[must_use]
pub fn check_shape(guest: &Shape, target_host: &Shape) -> Vec<Mismatch> {
    let mut found = Vec::new();
    shapes(guest, target_host, false, &mut found);
    found
}

/// All rules of an image against a target host, in the order C1, C2, C3, C7, C4, C5, C6, C8, C9.
#[must_use]
pub fn check(image: &Image, target_host: &Shape, context: &CompatContext) -> Vec<Mismatch> {
    let mut found = Vec::new();
    let guest = &image.shape;
    if !shapes(guest, target_host, context.target_pmu_disabled, &mut found) {
        return found;
    }
    if image.registers.len() > MAX_REGISTERS {
        let message = format!(
            "the image holds {} registers, at most {MAX_REGISTERS} are possible",
            image.registers.len()
        );
        found.push(Mismatch::refusal("C4", message, "take the image from the source again"));
        return found;
    }
    let lacking = context.brief && found.iter().any(|m| m.rule == "C2" || m.rule == "C1");
    let limit = if lacking { guest } else { target_host };
    values::check(image, limit, context.target_status_set, &mut found);
    filter(image, context, &mut found);
    events(image, context, &mut found);
    let (wanted, has) = ((guest.gp, guest.fixed), (target_host.gp, target_host.fixed));
    if context.target_is_kvm && has_pmu(guest) && wanted != has && guest.vendor == target_host.vendor {
        let message = format!(
            "the guest's counters ({guest}) are fewer than the target's ({target_host}): KVM then intercepts RDPMC"
        );
        found.push(Mismatch::warning(
            "C8",
            message,
            "give guests all of the host's counters where RDPMC must be fast",
        ));
    }
    found
}

fn has_pmu(shape: &Shape) -> bool {
    shape.gp != 0 || shape.fixed != 0
}

/// C1, C2, C3, C7; false if a shape is no shape at all, so that nothing else can be judged.
fn shapes(guest: &Shape, target: &Shape, disabled: bool, found: &mut Vec<Mismatch>) -> bool {
    for (whose, shape) in [("guest's", guest), ("target's", target)] {
        if let Err(error) = shape.validate() {
            let remedy = "take the shape from CPUID or from the virtual machine's record again";
            found.push(Mismatch::refusal("C2", format!("the {whose} PMU is impossible: {error}"), remedy));
            return false;
        }
    }
    if !has_pmu(guest) {
        return true;
    }
    if disabled || !has_pmu(target) {
        let message = format!("the guest has a PMU ({guest}), the target has none");
        let remedy = "enable the PMU on the target, choose another target, or restore with the policy reset";
        found.push(Mismatch::refusal("C7", message, remedy));
        return true;
    }
    let (have, want) = (flavour(guest), flavour(target));
    if have != want {
        let message = format!("the guest's PMU is {have}, the target's is {want}");
        found.push(Mismatch::refusal(
            "C1",
            message,
            format!("choose a target with {have}: no register maps onto another flavour's"),
        ));
        if guest.vendor != target.vendor {
            return true; // Counter numbers of two vendors cannot be compared.
        }
    }
    let mut refuse = |message| {
        found.push(Mismatch::refusal("C2", message, format!("choose a target whose PMU includes {guest}")));
    };
    if guest.vendor == Vendor::Intel && guest.version > target.version {
        refuse(format!("the guest's PMU is version {}, the target's is {}", guest.version, target.version));
    }
    for (name, want, have) in [("general-purpose", guest.gp, target.gp), ("fixed", guest.fixed, target.fixed)]
    {
        if want & !have != 0 {
            refuse(format!(
                "the guest's {name} counters are {want:#x}, the target lacks {:#x}",
                want & !have
            ));
        }
    }
    // Wider counters are no mismatch: values are masked, and the switcher keeps the bits above the guest's width set, so that wraps coincide.
    for (name, exists, want, have) in [
        ("general-purpose", guest.gp != 0, guest.gp_width, target.gp_width),
        ("fixed", guest.fixed != 0, guest.fixed_width, target.fixed_width),
    ] {
        if exists && want > have {
            refuse(format!("the guest's {name} counters have {want} bits, the target's {have}"));
        }
    }
    capabilities(guest, target, found);
    true
}

fn flavour(shape: &Shape) -> &'static str {
    match (shape.vendor, shape.version) {
        (Vendor::Intel, _) => "Intel architectural PerfMon",
        (Vendor::Amd, 0) => "AMD K7",
        (Vendor::Amd, 1) => "AMD PerfCtrExtCore",
        (Vendor::Amd, _) => "AMD PerfMonV2",
    }
}

fn capabilities(guest: &Shape, target: &Shape, found: &mut Vec<Mismatch>) {
    const FORMATS: [(&str, u64); 2] = [("LBR format", 0x3F), ("PEBS format", 0xF00)];
    let (want, have) = (guest.perf_capabilities, target.perf_capabilities);
    let mut refuse = |message| {
        let remedy = "choose a target that has them, or create the guest without them (only full-width writes are passed on by default)";
        found.push(Mismatch::refusal("C3", message, remedy));
    };
    for (name, mask) in FORMATS {
        if want & mask != 0 && want & mask != have & mask {
            refuse(format!("the guest's {name} is {:#x}, the target's {:#x}", want & mask, have & mask));
        }
    }
    let missing = want & !have & !FORMATS.iter().fold(0, |all, (_, mask)| all | mask);
    if missing != 0 {
        refuse(format!("the guest's PERF_CAPABILITIES are {want:#x}, the target lacks {missing:#x}"));
    }
}

/// C5: selectors in use that only the source's filter let through.
fn filter(image: &Image, context: &CompatContext, found: &mut Vec<Mismatch>) {
    let all = EventFilter::allow_all();
    let source = context.source_filter.as_ref().unwrap_or(&all);
    let target = context.target_filter.as_ref().unwrap_or(&all);
    let vendor = image.shape.vendor;
    let mut frozen = Vec::new();
    for (i, selector) in values::selectors(image) {
        if selector & SEL_EN != 0 && source.allows_gp(vendor, selector) && !target.allows_gp(vendor, selector)
        {
            frozen.push(format!("gp{i} ({selector:#x})"));
        }
    }
    for (i, field) in values::fixed_fields(image) {
        if field & 3 != 0 && source.allows_fixed(i) && !target.allows_fixed(i) {
            frozen.push(format!("fixed{i}"));
        }
    }
    if !frozen.is_empty() {
        let message = format!("the target's event filter freezes {}", frozen.join(", "));
        found.push(Mismatch::warning(
            "C5",
            message,
            "allow these events on the target, or expect the counters to stand still",
        ));
    }
}

/// C6: raw events on a different processor.
fn events(image: &Image, context: &CompatContext, found: &mut Vec<Mismatch>) {
    let (Some(source), Some(target)) = (context.source_cpu, context.target_cpu) else { return };
    if source == target {
        return;
    }
    let raw: Vec<String> = values::selectors(image)
        .filter(|(_, selector)| selector & SEL_EN != 0 && !architectural(image.shape.vendor, *selector))
        .map(|(i, selector)| format!("gp{i} ({selector:#x})"))
        .collect();
    if !raw.is_empty() {
        let message = format!(
            "{} count model-specific events, and the target is family {:#x} model {:#x}, not {:#x} model {:#x}: their meaning may change",
            raw.join(", "),
            target.family,
            target.model,
            source.family,
            source.model
        );
        found.push(Mismatch::warning(
            "C6",
            message,
            "choose a target of the same processor model, or use architectural events",
        ));
    }
}

/// The event means the same on every processor of the vendor. Edge, invert and count mask keep that meaning.
fn architectural(vendor: Vendor, selector: u64) -> bool {
    const EVENT_HIGH: u64 = 0xF << 32;
    let event = (selector & 0xFFFF) as u16;
    match vendor {
        Vendor::Intel => INTEL_ARCH_EVENTS.contains(&event),
        Vendor::Amd => selector & EVENT_HIGH == 0 && AMD_STABLE_EVENTS.contains(&event),
    }
}

#[cfg(test)]
mod tests;
