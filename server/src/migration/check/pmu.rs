//! Rules C1 to C9 for a machine that would come here, under its policy for what does not fit.

use pmu::RestorePolicy;
use pmu::compat::{self, CompatContext, Mismatch};
use pmu::cpuid::FamilyModel;
use vcpu_worker::pmu_glue;
use vpmu_proto::api::{MigrationMismatch, PmuShape};
use vpmu_proto::peer::{CpuidLeaf, Requirements};

use crate::daemon::Daemon;
use crate::validate;

/// Most mismatches of the PMU that are named.
const MOST: usize = 64;

fn policy(needs: &Requirements) -> RestorePolicy {
    pmu_glue::policy_from_proto(needs.spec.clone().unwrap_or_default().pmu_restore())
}

/// The PMU that the machine has here: its own, or under another policy than require what of it this host has. One that
/// cannot be had is left as it is: the check has refused it.
pub fn there(daemon: &Daemon, needs: &Requirements) -> Option<PmuShape> {
    let given = needs.pmu_shape.as_ref()?;
    let fitted = pmu_glue::shape_from_proto(given)
        .ok()
        .and_then(|shape| compat::shape_on(&shape, &daemon.host.shape, policy(needs)));
    Some(fitted.map_or_else(|| given.clone(), |shape| pmu_glue::shape_to_proto(&shape)))
}

/// Everything about the PMU that does not fit.
pub(super) fn judge(daemon: &Daemon, needs: &Requirements, found: &mut Vec<MigrationMismatch>) {
    found.extend(mismatches(&daemon.host.shape, &daemon.host.cpuid, needs));
}

fn mismatches(host: &pmu::Shape, cpuid: &[CpuidLeaf], needs: &Requirements) -> Vec<MigrationMismatch> {
    let policy = policy(needs);
    let mut found: Vec<MigrationMismatch> = Vec::new();
    let mut broken = Vec::new();
    let shape = match needs.pmu_shape.as_ref().map(pmu_glue::shape_from_proto) {
        Some(Ok(shape)) => Some(shape),
        Some(Err(error)) => {
            broken.push(error);
            None
        }
        None => None,
    };
    let fits = shape.as_ref().is_none_or(|shape| compat::shape_on(shape, host, policy).is_some());
    let mut add = |more: Vec<Mismatch>| {
        for m in more {
            let m = soften(m, policy, fits);
            if found.len() < MOST && !found.contains(&m) {
                found.push(m);
            }
        }
    };
    if let Some(shape) = &shape {
        add(compat::check_shape(shape, host));
    }
    let mut context = context(needs, cpuid);
    match filters(needs, host) {
        Ok(filter) => (context.source_filter, context.target_filter) = filter,
        Err(m) => add(vec![m]),
    }
    for image in needs.pmu.iter().take(validate::MAX_VCPUS as usize) {
        match pmu_glue::image_from_proto(image) {
            Ok(checked) => add(compat::check(&checked, host, &context)),
            Err(error) => broken.push(error.to_string()),
        }
    }
    for message in broken.into_iter().take(8) {
        let (rule, remedy) = ("PMU_IMAGE".to_owned(), "repair the source".to_owned());
        found.push(MigrationMismatch { rule, message, remedy, warning: false });
    }
    found
}

/// A rule that the policy bears is a warning that says what it costs.
fn soften(m: Mismatch, policy: RestorePolicy, fits: bool) -> MigrationMismatch {
    let borne = !m.warning && fits && compat::borne(m.rule, policy);
    let remedy = match policy {
        _ if !borne => m.remedy,
        RestorePolicy::Reset => {
            "none is needed: pmu_restore is reset, so the PMU begins anew there".to_owned()
        }
        _ => "none is needed: pmu_restore is best_effort, so what does not fit is dropped and reported"
            .to_owned(),
    };
    MigrationMismatch { rule: m.rule.to_owned(), message: m.message, remedy, warning: m.warning || borne }
}

/// C6 is about processors that count: a model counts the same everywhere.
fn context(needs: &Requirements, target: &[CpuidLeaf]) -> CompatContext {
    let counted_by_hardware = needs.pmu_mode != "model";
    let family_model = |leaves: &[CpuidLeaf]| {
        let leaf = leaves.iter().find(|l| l.function == 1 && counted_by_hardware)?;
        Some(FamilyModel::from_signature(leaf.eax))
    };
    CompatContext {
        source_cpu: family_model(&needs.cpuid),
        target_cpu: family_model(target),
        // In every mode the status travels in the image, and KVM sets it absolutely.
        target_status_set: true,
        target_is_kvm: needs.pmu_mode == "kvm",
        brief: true,
        ..CompatContext::default()
    }
}

type Filters = (Option<pmu::EventFilter>, Option<pmu::EventFilter>);

/// C5: the machine's own filter comes along with it, for the vendor that it was made for; one that cannot be made for
/// this host's lets nothing through here.
fn filters(needs: &Requirements, host: &pmu::Shape) -> Result<Filters, Mismatch> {
    let spec = needs.vm.as_ref().and_then(|vm| vm.spec.as_ref()).and_then(|spec| spec.pmu.as_ref());
    let Some(filter) = spec.and_then(|pmu| pmu.event_filter.as_ref()) else { return Ok((None, None)) };
    let made = |vendor| pmu::EventFilter::new(vendor, vcpu_worker::machine::build::filter_spec(filter));
    let source = needs.pmu_shape.as_ref().and_then(|shape| pmu_glue::shape_from_proto(shape).ok());
    match made(host.vendor) {
        Ok(target) => Ok((source.and_then(|shape| made(shape.vendor).ok()), Some(target))),
        Err(error) => Err(Mismatch {
            rule: "C5",
            message: format!("the machine's event filter cannot be had here: {error}"),
            remedy: "give the machine a filter that this host's processor knows".to_owned(),
            warning: false,
        }),
    }
}

#[cfg(test)]
#[path = "pmu_tests.rs"]
mod tests;
