//! Judges requests before anything happens: every size, count and id from outside is bounded here.

use std::path::Path;

use vpmu_proto::api::virtual_machine_spec::{Boot, RestartPolicy};
use vpmu_proto::api::{
    CreateVirtualMachineRequest, MigrationSpec, VirtualMachine, VirtualMachineSpec, cpu_placement,
    migration_spec, pmu_event_filter, pmu_spec, virtual_machine,
};

use crate::config::Address;
use crate::daemon::HostInfo;
use crate::status::ApiError;

/// Most vCPUs of one machine.
pub const MAX_VCPUS: u32 = 256;
/// Guest memory comes in these steps, in bytes.
pub const MEMORY_STEP: u64 = 2 << 20;
/// Longest kernel command line in bytes.
const MAX_CMDLINE: usize = 2047;
/// Longest path in bytes (PATH_MAX with its final zero is 4096).
const MAX_PATH: usize = 4095;
/// Most data connections of a migration.
const MAX_CONNECTIONS: u32 = 16;
/// Where a spec stands in a create request.
const SPEC: &str = "virtual_machine.spec";

/// Checks the machine of a create request: only spec and desired_state may be set.
pub fn new_machine(request: &CreateVirtualMachineRequest) -> Result<(VirtualMachineSpec, bool), ApiError> {
    let missing = |field| {
        ApiError::invalid(
            field,
            "",
            "FIELD_REQUIRED",
            "is missing",
            "send the machine's spec with vcpus, memory_bytes and what to boot",
        )
    };
    let vm = request.virtual_machine.as_ref().ok_or_else(|| missing("virtual_machine"))?;
    let spec = vm.spec.clone().ok_or_else(|| missing(SPEC))?;
    let allowed = VirtualMachine {
        spec: vm.spec.clone(),
        desired_state: vm.desired_state,
        ..VirtualMachine::default()
    };
    if *vm != allowed {
        return Err(ApiError::invalid(
            "virtual_machine",
            "output-only fields",
            "OUTPUT_ONLY_FIELD",
            "are set",
            "set only spec and desired_state; the id goes into virtual_machine_id",
        ));
    }
    let start = match virtual_machine::DesiredState::try_from(vm.desired_state) {
        Ok(virtual_machine::DesiredState::Unspecified | virtual_machine::DesiredState::Stopped) => false,
        Ok(virtual_machine::DesiredState::Running) => true,
        _ => {
            return Err(ApiError::invalid(
                "virtual_machine.desired_state",
                vm.desired_state,
                "BAD_DESIRED_STATE",
                "cannot be asked for at creation",
                "use DESIRED_STATE_STOPPED or DESIRED_STATE_RUNNING",
            ));
        }
    };
    Ok((spec, start))
}

/// Checks a spec against this host and fills in what is left open.
pub fn spec(
    mut spec: VirtualMachineSpec,
    host: &HostInfo,
    host_memory: u64,
) -> Result<VirtualMachineSpec, ApiError> {
    if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
        return Err(ApiError::invalid(
            &format!("{SPEC}.vcpus"),
            spec.vcpus,
            "VCPUS_OUT_OF_RANGE",
            "is not from 1 to 256",
            "ask for as many vCPUs as the guest needs, at most 256",
        ));
    }
    memory(spec.memory_bytes, host_memory)?;
    match &spec.boot {
        None => {
            return Err(ApiError::invalid(
                &format!("{SPEC}.boot"),
                "",
                "FIELD_REQUIRED",
                "is missing",
                "set probe for the built-in guest, or kernel with the path of a kernel file",
            ));
        }
        Some(Boot::Probe(probe)) => {
            for (field, value) in
                [("working_set_bytes", probe.working_set_bytes), ("fill_bytes", probe.fill_bytes)]
            {
                if value > spec.memory_bytes {
                    return Err(ApiError::invalid(
                        &format!("{SPEC}.probe.{field}"),
                        value,
                        "BEYOND_GUEST_MEMORY",
                        "is more than the guest's memory",
                        "give the guest more memory or ask for less",
                    ));
                }
            }
        }
        Some(Boot::Kernel(kernel)) => {
            path(&format!("{SPEC}.kernel.path"), &kernel.path)?;
            if !kernel.initrd_path.is_empty() {
                path(&format!("{SPEC}.kernel.initrd_path"), &kernel.initrd_path)?;
            }
            let field = format!("{SPEC}.kernel.cmdline");
            if kernel.cmdline.len() > MAX_CMDLINE {
                let (problem, remedy) = ("is longer than 2047 bytes", "shorten it");
                return Err(ApiError::invalid(&field, &kernel.cmdline, "CMDLINE_TOO_LONG", problem, remedy));
            }
            if kernel.cmdline.contains('\0') {
                let (problem, remedy) = ("holds a zero byte", "leave it out");
                return Err(ApiError::invalid(&field, &kernel.cmdline, "CMDLINE_ZERO_BYTE", problem, remedy));
            }
        }
    }
    if host.hypervisor == "kvm" {
        vcpu_worker::machine::options::check_features(&spec)
            .map_err(|e| ApiError::from_status("virtual_machine", &e.to_status()))?;
    }
    pmu(&mut spec, host)?;
    match RestartPolicy::try_from(spec.restart_policy) {
        Ok(_) => {}
        Err(_) => {
            return Err(ApiError::invalid(
                &format!("{SPEC}.restart_policy"),
                spec.restart_policy,
                "BAD_RESTART_POLICY",
                "is no restart policy",
                "give NEVER, ON_FAILURE or ALWAYS",
            ));
        }
    }
    Ok(spec)
}

fn memory(bytes: u64, host: u64) -> Result<(), ApiError> {
    let field = format!("{SPEC}.memory_bytes");
    if bytes == 0 || !bytes.is_multiple_of(MEMORY_STEP) {
        return Err(ApiError::invalid(
            &field,
            bytes,
            "MEMORY_NOT_ALIGNED",
            "is not a positive multiple of 2 MiB (2097152)",
            "round it to 2 MiB",
        ));
    }
    if bytes > host {
        return Err(ApiError::invalid(
            &field,
            bytes,
            "MEMORY_BEYOND_HOST",
            &format!("is more than this host's {host} bytes"),
            "ask for less or use a larger host",
        ));
    }
    Ok(())
}

fn path(field: &str, text: &str) -> Result<(), ApiError> {
    if text.len() <= MAX_PATH && Path::new(text).is_absolute() && !text.contains('\0') {
        return Ok(());
    }
    Err(ApiError::invalid(
        field,
        text,
        "BAD_PATH",
        "is not an absolute path of at most 4095 bytes",
        "give the full path on the host",
    ))
}

fn pmu(spec: &mut VirtualMachineSpec, host: &HostInfo) -> Result<(), ApiError> {
    let wanted = spec.pmu.get_or_insert_default();
    if pmu_spec::SwitchPolicy::try_from(wanted.switch_policy).is_err() {
        return Err(ApiError::invalid(
            &format!("{SPEC}.pmu.switch_policy"),
            wanted.switch_policy,
            "BAD_SWITCH_POLICY",
            "is no policy",
            "use STRICT or LAZY",
        ));
    }
    if wanted.disabled {
        if wanted.gp_counters != 0 || wanted.fixed_counters != 0 {
            return Err(ApiError::invalid(
                &format!("{SPEC}.pmu.disabled"),
                true,
                "PMU_DISABLED_WITH_COUNTERS",
                "contradicts gp_counters and fixed_counters",
                "leave the counters 0 or the PMU enabled",
            ));
        }
        return Ok(());
    }
    if wanted.gp_counters == 0 && wanted.fixed_counters == 0 {
        wanted.gp_counters = host.shape.gp.count_ones();
        wanted.fixed_counters = host.shape.fixed.count_ones();
    }
    host.shape.guest(wanted.gp_counters, wanted.fixed_counters).map(drop).map_err(|e| {
        ApiError::invalid(
            &format!("{SPEC}.pmu"),
            format!("{}+{}", wanted.gp_counters, wanted.fixed_counters),
            "PMU_SHAPE_UNAVAILABLE",
            &format!("counters are not what this host ({}) can give: {e}", host.host_pmu),
            "ask for fewer, or leave both 0 for all of them",
        )
    })
}

/// Checks the PMU against what holds it on this host.
pub fn pmu_on_host(spec: &VirtualMachineSpec, host: &HostInfo) -> Result<(), ApiError> {
    let Some(pmu) = spec.pmu.as_ref().filter(|pmu| !pmu.disabled) else { return Ok(()) };
    let dedicated = spec.placement.as_ref().is_some_and(|p| p.policy() == cpu_placement::Policy::Dedicated);
    if host.pmu_mode == "msr" && !dedicated {
        return Err(ApiError::invalid(
            &format!("{SPEC}.placement.policy"),
            "SHARED",
            "MSR_NEEDS_DEDICATED",
            "does not go with the processor's own counters: a core's PMU has room for one vCPU in mode msr",
            "set policy to DEDICATED, or pmu.disabled",
        ));
    }
    let Some(filter) = &pmu.event_filter else { return Ok(()) };
    let field = format!("{SPEC}.pmu.event_filter");
    if pmu_event_filter::Action::try_from(filter.action).is_err() {
        let field = format!("{field}.action");
        return Err(ApiError::invalid(
            &field,
            filter.action,
            "BAD_ACTION",
            "is no action",
            "use ALLOW or DENY",
        ));
    }
    // Judged before it is copied: the list comes from outside.
    if filter.events.len() > pmu::filter::MAX_FILTER_EVENTS {
        return Err(ApiError::invalid(
            &format!("{field}.events"),
            filter.events.len(),
            "FILTER_TOO_MANY",
            "entries are more than 300",
            "merge unit masks into masked entries",
        ));
    }
    let checked = pmu::EventFilter::new(host.shape.vendor, vcpu_worker::machine::build::filter_spec(filter));
    checked.map(drop).map_err(|e| {
        ApiError::invalid(&field, "events", e.reason(), &format!("cannot be used: {e}"), "correct the entry")
    })
}

/// Checks what is asked of a migration.
pub fn migration(spec: Option<MigrationSpec>) -> Result<(MigrationSpec, Address), ApiError> {
    let spec = spec.unwrap_or_default();
    if spec.destination.is_empty() {
        return Err(ApiError::invalid(
            "spec.destination",
            "",
            "FIELD_REQUIRED",
            "is missing",
            "give the destination's peer listener, unix:PATH or tcp:ADDR:PORT",
        ));
    }
    let destination: Address = spec.destination.parse().map_err(|e: crate::config::ConfigError| {
        ApiError::invalid(
            "spec.destination",
            &spec.destination,
            e.reason(),
            "is no address",
            "write unix:PATH or tcp:ADDR:PORT",
        )
    })?;
    if spec.connections > MAX_CONNECTIONS {
        return Err(ApiError::invalid(
            "spec.connections",
            spec.connections,
            "CONNECTIONS_OUT_OF_RANGE",
            "is more than 16",
            "use 1 to 16, or 0 for one",
        ));
    }
    for (field, duration) in
        [("spec.max_blackout", &spec.max_blackout), ("spec.max_duration", &spec.max_duration)]
    {
        if let Some(d) = duration
            && (d.seconds < 0 || d.nanos < 0 || d.seconds > 86_400 || (d.seconds == 0 && d.nanos == 0))
        {
            return Err(ApiError::invalid(
                field,
                format!("{}s {}ns", d.seconds, d.nanos),
                "DURATION_OUT_OF_RANGE",
                "is not above 0 and at most a day",
                "leave it unset for the default",
            ));
        }
    }
    if spec.require_tls && (spec.allow_plaintext || matches!(destination, Address::Unix(_))) {
        return Err(ApiError::invalid(
            "spec.require_tls",
            "true",
            "TLS_CONFLICT",
            "does not go with allow_plaintext, nor with a Unix socket, which is not encrypted",
            "leave one of them out, or name a TCP peer listener",
        ));
    }
    if migration_spec::Compression::try_from(spec.compression).is_err() {
        return Err(ApiError::invalid(
            "spec.compression",
            spec.compression,
            "BAD_COMPRESSION",
            "is no compression",
            "use NONE, LZ4, ZSTD or ADAPTIVE",
        ));
    }
    match migration_spec::Mode::try_from(spec.mode) {
        Ok(_) => {}
        Err(_) => {
            return Err(ApiError::invalid(
                "spec.mode",
                spec.mode,
                "BAD_MODE",
                "is no mode",
                "use AUTO, PRECOPY_ONLY, POSTCOPY or LOCAL",
            ));
        }
    }
    if spec.allow_postcopy && spec.mode() == migration_spec::Mode::PrecopyOnly {
        return Err(ApiError::invalid(
            "spec.allow_postcopy",
            "true",
            "MODE_CONFLICT",
            "does not go with mode PRECOPY_ONLY",
            "leave one of them out",
        ));
    }
    match migration_spec::PmuRestore::try_from(spec.pmu_restore) {
        Ok(_) => {}
        Err(_) => {
            return Err(ApiError::invalid(
                "spec.pmu_restore",
                spec.pmu_restore,
                "BAD_PMU_RESTORE",
                "is no policy",
                "use REQUIRE, BEST_EFFORT or RESET",
            ));
        }
    }
    Ok((spec, destination))
}

/// A page size: 0 means `default`, more than 1000 means 1000 (AIP-158), negative is refused.
pub fn page_size(asked: i32, default: usize) -> Result<usize, ApiError> {
    match usize::try_from(asked) {
        Ok(0) => Ok(default),
        Ok(n) => Ok(n.min(1000)),
        Err(_) => Err(ApiError::invalid(
            "page_size",
            asked,
            "BAD_PAGE_SIZE",
            "is negative",
            "use 1 to 1000, or 0 for the default",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_aligned_and_within_the_host() {
        assert!(memory(256 << 20, 1 << 30).is_ok());
        for (bytes, reason) in [
            (0, "MEMORY_NOT_ALIGNED"),
            ((2 << 20) + 4096, "MEMORY_NOT_ALIGNED"),
            (2 << 30, "MEMORY_BEYOND_HOST"),
            (u64::MAX, "MEMORY_NOT_ALIGNED"),
            (u64::MAX - MEMORY_STEP + 1, "MEMORY_BEYOND_HOST"),
        ] {
            assert_eq!(memory(bytes, 1 << 30).expect_err("refused").reason(), reason, "{bytes}");
        }
    }

    #[test]
    fn migration_specs_are_bounded() {
        let good = MigrationSpec { destination: "unix:/run/p.sock".to_owned(), ..MigrationSpec::default() };
        assert!(migration(Some(good.clone())).is_ok());
        assert_eq!(migration(None).expect_err("refused").reason(), "FIELD_REQUIRED");
        let many = MigrationSpec { connections: 17, ..good.clone() };
        let both = MigrationSpec {
            destination: "tcp:127.0.0.1:7171".to_owned(),
            require_tls: true,
            allow_plaintext: true,
            ..good.clone()
        };
        assert_eq!(migration(Some(both)).expect_err("refused").reason(), "TLS_CONFLICT");
        let unix = MigrationSpec { require_tls: true, ..good.clone() };
        assert_eq!(migration(Some(unix)).expect_err("refused").reason(), "TLS_CONFLICT");
        assert_eq!(migration(Some(many)).expect_err("refused").reason(), "CONNECTIONS_OUT_OF_RANGE");
        let long =
            MigrationSpec { max_blackout: Some(prost_types::Duration { seconds: -1, nanos: 0 }), ..good };
        assert_eq!(migration(Some(long)).expect_err("refused").reason(), "DURATION_OUT_OF_RANGE");
    }
}
