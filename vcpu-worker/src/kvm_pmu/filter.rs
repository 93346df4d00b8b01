//! The PMU event filter of a VM: which events KVM's vPMU counts (KVM_SET_PMU_EVENT_FILTER, kernel's api.rst section 4.120).

use kvm_bindings::KVM_CAP_PMU_EVENT_FILTER;
use kvm_ioctls::VmFd;
use pmu::filter::MAX_FILTER_EVENTS;
use pmu::{EventFilter, FilterError, FilterSpec, Vendor};

use super::KvmPmuError;
use crate::sys::{self, PMU_EVENT_FILTER_HEADER};

/// `struct kvm_pmu_event_filter` with its events: action, count, fixed counters, flags, 16 bytes of zero, 8 bytes an event. At most 300
/// events. The contents are judged by [`EventFilter::new`].
pub fn event_filter_bytes(spec: &FilterSpec) -> Result<Vec<u8>, FilterError> {
    let count = spec.events.len();
    if count > MAX_FILTER_EVENTS {
        return Err(FilterError::TooMany { count });
    }
    let mut bytes = Vec::with_capacity(PMU_EVENT_FILTER_HEADER + 8 * count);
    for word in [spec.action, count as u32, spec.fixed_counter_bitmap, spec.flags] {
        bytes.extend_from_slice(&word.to_le_bytes());
    }
    bytes.resize(PMU_EVENT_FILTER_HEADER, 0);
    for event in &spec.events {
        bytes.extend_from_slice(&event.to_le_bytes());
    }
    Ok(bytes)
}

/// Sets the VM's filter, replacing the one before. A filter that KVM on a host of this vendor would refuse is refused before it is asked,
/// by name.
pub fn set_event_filter(vm: &VmFd, vendor: Vendor, spec: &FilterSpec) -> Result<(), KvmPmuError> {
    if vm.check_extension_raw(KVM_CAP_PMU_EVENT_FILTER.into()) <= 0 {
        return Err(KvmPmuError::FilterMissing);
    }
    let filter = EventFilter::new(vendor, spec.clone())?;
    sys::set_pmu_event_filter(vm, &event_filter_bytes(filter.spec())?)?;
    Ok(())
}
