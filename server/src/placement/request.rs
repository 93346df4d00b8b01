//! Judges the placement of a request before anything happens.

use vpmu_proto::api::CpuPlacement;
use vpmu_proto::api::cpu_placement::{Arrangement, Policy};

use super::Wanted;
use crate::capacity::Capacity;
use crate::status::ApiError;

/// Checks a placement for `vcpus` vCPUs (1 to 256) against this host, whoever else runs here. `field` is where it stands
/// in the request.
pub fn validate(
    field: &str,
    placement: &CpuPlacement,
    vcpus: u32,
    capacity: &Capacity,
) -> Result<(), ApiError> {
    let bad = |name: &str, value: String, reason: &str, problem: &str, remedy: &str| {
        Err(ApiError::invalid(&format!("{field}.{name}"), value, reason, problem, remedy))
    };
    if Policy::try_from(placement.policy).is_err() {
        let value = placement.policy.to_string();
        return bad("policy", value, "BAD_POLICY", "is no policy", "use SHARED or DEDICATED");
    }
    if Arrangement::try_from(placement.arrangement).is_err() {
        let value = placement.arrangement.to_string();
        return bad("arrangement", value, "BAD_ARRANGEMENT", "is no arrangement", "use PACKED or SPREAD");
    }
    let dedicated = placement.policy() == Policy::Dedicated;
    if placement.arrangement() != Arrangement::Unspecified && (!dedicated || !placement.cores.is_empty()) {
        return bad(
            "arrangement",
            placement.arrangement().as_str_name().to_owned(),
            "ARRANGEMENT_WITHOUT_CHOICE",
            "is for dedicated cores that the host chooses",
            "set policy to DEDICATED and leave cores empty, or leave arrangement unset",
        );
    }
    let priority = placement.fifo_priority;
    if priority > 99 {
        return bad(
            "fifo_priority",
            priority.to_string(),
            "FIFO_PRIORITY_OUT_OF_RANGE",
            "is more than 99",
            "use 1 to 99, or 0 for the ordinary scheduler",
        );
    }
    if priority != 0 && !dedicated {
        return bad(
            "fifo_priority",
            priority.to_string(),
            "FIFO_NEEDS_DEDICATED",
            "would keep everything else off cores that are shared",
            "set policy to DEDICATED, or leave fifo_priority 0",
        );
    }
    let wanted = Wanted::new(vcpus, placement);
    capacity.examine(&wanted).map_err(|refusal| refusal.invalid(&format!("{field}.cores")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vcpu_worker::host::Topology;

    #[test]
    fn what_contradicts_itself_is_refused_by_name() {
        let host = Capacity::new(1 << 30, Topology::plain(4), &[0, 1, 2, 3], &[0, 1, 2, 3]);
        let dedicated =
            CpuPlacement { policy: Policy::Dedicated.into(), fifo_priority: 10, ..CpuPlacement::default() };
        let answer = |placement: &CpuPlacement| {
            validate("spec.placement", placement, 2, &host)
                .map_or_else(|e| e.reason().to_owned(), |()| "ok".to_owned())
        };
        assert_eq!(answer(&dedicated), "ok");
        assert_eq!(answer(&CpuPlacement::default()), "ok");
        let change = |edit: fn(&mut CpuPlacement)| {
            let mut placement = dedicated.clone();
            edit(&mut placement);
            answer(&placement)
        };
        assert_eq!(change(|p| p.policy = 77), "BAD_POLICY");
        assert_eq!(change(|p| p.arrangement = -1), "BAD_ARRANGEMENT");
        assert_eq!(change(|p| p.fifo_priority = 100), "FIFO_PRIORITY_OUT_OF_RANGE");
        assert_eq!(change(|p| p.policy = 0), "FIFO_NEEDS_DEDICATED");
        assert_eq!(change(|p| p.cores = vec![1, 1]), "CORES_OVERLAP");
        assert_eq!(change(|p| p.cores = vec![1, 9]), "CORE_UNKNOWN");
        assert_eq!(change(|p| p.cores = vec![1]), "CORES_COUNT");
        let spread = |p: &mut CpuPlacement| {
            p.set_arrangement(Arrangement::Spread);
            p.cores = vec![1, 2];
        };
        assert_eq!(change(spread), "ARRANGEMENT_WITHOUT_CHOICE");
    }
}
