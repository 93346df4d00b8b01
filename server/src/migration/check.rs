//! What would keep a machine from moving; judged at the destination, changing nothing.

use vpmu_proto::api::{MigrationMismatch, VirtualMachineSpec};
use vpmu_proto::peer::{CpuidLeaf, Requirements};

use crate::daemon::Daemon;
use crate::names::VmName;
use crate::status::ApiError;
use crate::validate;

mod hosts;
mod pmu;

pub(super) use hosts::versions;
use hosts::{free_disk, state_disk, tsc};
pub use hosts::{wall_clock_us, wall_clocks};
pub use pmu::there as pmu_there;

/// Most CPUID leaves and PMU images that are looked at.
const MAX_LEAVES: usize = 512;

/// Everything that does not fit this host.
pub fn mismatches(daemon: &Daemon, needs: &Requirements) -> Vec<MigrationMismatch> {
    let mut found = Vec::new();
    let vm = needs.vm.clone().unwrap_or_default();
    let spec = vm.spec.clone().unwrap_or_default();
    name(daemon, &vm.name, &vm.uid, &mut found);
    if needs.hypervisor != daemon.host.hypervisor {
        let message =
            format!("the machine runs on {:?}, this host on {:?}", needs.hypervisor, daemon.host.hypervisor);
        add(&mut found, "HYPERVISOR", message, "start this vpmud with the same --hypervisor");
    }
    if needs.pmu_mode != daemon.host.pmu_mode {
        let message =
            format!("the machine's PMU mode is {:?}, this host's {:?}", needs.pmu_mode, daemon.host.pmu_mode);
        add(&mut found, "PMU_MODE", message, "start this vpmud with the same --pmu");
    }
    if !needs.local_boot_id.is_empty() && needs.local_boot_id != daemon.host.boot_id {
        found.push(other_boot(&needs.local_boot_id, &daemon.host.boot_id));
    }
    sizes(daemon, &spec, &mut found);
    match free_disk(daemon.store.dir()) {
        Ok(free) => found.extend(state_disk(free)),
        Err(error) => tracing::warn!(%error, "how much the state directory can hold is not known"),
    }
    pmu::judge(daemon, needs, &mut found);
    if needs.hypervisor == "kvm" {
        cpu(&needs.cpuid, &daemon.host.cpuid, &mut found);
        found.extend(tsc(needs.tsc_khz, daemon.host.tsc_khz));
    }
    found
}

fn add(found: &mut Vec<MigrationMismatch>, rule: &str, message: String, remedy: &str) {
    found.push(MigrationMismatch {
        rule: rule.to_owned(),
        message,
        remedy: remedy.to_owned(),
        warning: false,
    });
}

/// Memory cannot be handed over: the hosts are not the same boot of one machine.
pub(super) fn other_boot(source: &str, destination: &str) -> MigrationMismatch {
    let show = |id: &str| if id.is_empty() { "none".to_owned() } else { crate::status::clip(id, 64) };
    MigrationMismatch {
        rule: "OTHER_MACHINE".to_owned(),
        message: format!(
            "mode local hands memory over within one machine, and the boot ids differ: {} here, {} there",
            show(source),
            show(destination)
        ),
        remedy: "use mode auto or precopy, which copies".to_owned(),
        warning: false,
    }
}

fn name(daemon: &Daemon, name: &str, uid: &str, found: &mut Vec<MigrationMismatch>) {
    let Ok(parsed) = VmName::parse("vm.name", name, "") else {
        add(
            found,
            "NAME",
            format!("{:?} is not a machine's name", crate::status::clip(name, 80)),
            "repair the source",
        );
        return;
    };
    if uuid::Uuid::try_parse(uid).is_err() {
        add(found, "UID", format!("{:?} is not a uid", crate::status::clip(uid, 80)), "repair the source");
    }
    let taken = match daemon.registry.get(&parsed) {
        Ok(handle) if handle.uid == uid => {
            let state = handle.view().state();
            (state != vpmu_proto::api::virtual_machine::State::Moved)
                .then(|| format!("it is here already, {}", state.as_str_name()))
        }
        Ok(_) => Some("another machine has that name here".to_owned()),
        Err(_) => None,
    };
    if let Some(why) = taken {
        add(found, "NAME_IN_USE", format!("{parsed}: {why}"), "delete or rename one of them");
    }
}

fn sizes(daemon: &Daemon, spec: &VirtualMachineSpec, found: &mut Vec<MigrationMismatch>) {
    if !(1..=validate::MAX_VCPUS).contains(&spec.vcpus) {
        let message = format!("{} vCPUs; this host takes 1 to {}", spec.vcpus, validate::MAX_VCPUS);
        add(found, "CORES", message, "use another host");
    } else if let Err(refusal) = daemon.capacity.check_cores(&crate::placement::Wanted::of(spec)) {
        let remedy = "free cores on this host, change the machine's placement (vpmuctl vm placement) or use another host";
        add(found, "CORES", refusal.to_string(), remedy);
    }
    let free = daemon.capacity.free_bytes();
    if spec.memory_bytes == 0
        || !spec.memory_bytes.is_multiple_of(validate::MEMORY_STEP)
        || spec.memory_bytes > free
    {
        let message =
            format!("the machine has {} bytes of memory, this host has {free} free", spec.memory_bytes);
        add(found, "MEMORY", message, "free memory on this host or use another");
    }
}

/// Feature words: leaf, subleaf and which of EAX, EBX, ECX, EDX hold plain feature bits.
const FEATURES: [(u32, u32, [u32; 4]); 5] = [
    // OSXSAVE (ECX 27) follows the guest's CR4.
    (1, 0, [0, 0, !(1 << 27), u32::MAX]),
    (7, 0, [0, u32::MAX, u32::MAX, u32::MAX]),
    (7, 1, [u32::MAX, 0, 0, u32::MAX]),
    (0xd, 0, [u32::MAX, 0, 0, u32::MAX]),
    (0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
];

fn cpu(guest: &[CpuidLeaf], host: &[CpuidLeaf], found: &mut Vec<MigrationMismatch>) {
    let guest = guest.get(..MAX_LEAVES.min(guest.len())).unwrap_or_default();
    let find = |leaves: &[CpuidLeaf], function, index| {
        leaves
            .iter()
            .find(|l| l.function == function && l.index == index)
            .map(|l| [l.eax, l.ebx, l.ecx, l.edx])
    };
    if let (Some([_, b, c, d]), Some([_, hb, hc, hd])) = (find(guest, 0, 0), find(host, 0, 0))
        && (b, c, d) != (hb, hc, hd)
    {
        add(
            found,
            "CPU_VENDOR",
            "the hosts' processors are of different vendors".to_owned(),
            "use a host of the same vendor",
        );
        return;
    }
    for (function, index, masks) in FEATURES {
        let Some(needed) = find(guest, function, index) else { continue };
        let offered = find(host, function, index).unwrap_or_default();
        for (register, ((needed, offered), mask)) in
            ["EAX", "EBX", "ECX", "EDX"].iter().zip(needed.iter().zip(offered).zip(masks))
        {
            let lacking = needed & mask & !offered;
            if lacking != 0 {
                let message = format!(
                    "CPUID {function:#x}.{index} {register}: this host lacks features {lacking:#010x}"
                );
                add(found, "CPU_FEATURES", message, "use a host whose processor has them");
            }
        }
    }
}

/// The refusal for mismatches that are more than warnings.
pub fn refuse(vm: &str, found: &[MigrationMismatch]) -> Result<(), ApiError> {
    let fatal: Vec<_> = found.iter().filter(|m| !m.warning).collect();
    let Some(first) = fatal.first() else { return Ok(()) };
    let more = if fatal.len() > 1 {
        format!(" (and {} more; see CheckMigration)", fatal.len() - 1)
    } else {
        String::new()
    };
    let rules: Vec<&str> = fatal.iter().map(|m| m.rule.as_str()).take(16).collect();
    Err(ApiError::precondition(
        "MIGRATION_INCOMPATIBLE",
        vm,
        format!("{}: {}; {}{more}", first.rule, first.message, first.remedy),
    )
    .with("rules", rules.join(",")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, index, eax, ebx, ecx, edx }
    }

    #[test]
    fn a_missing_feature_is_named_and_an_extra_one_is_not() {
        let guest = [leaf(0, 0, [1, 2, 3, 4]), leaf(7, 0, [0, 0b101, 0, 0]), leaf(1, 0, [0, 0, 1 << 27, 0])];
        let host = [leaf(0, 0, [9, 2, 3, 4]), leaf(7, 0, [0, 0b110, 0, 0])];
        let mut found = Vec::new();
        cpu(&guest, &host, &mut found);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].message.contains("EBX") && found[0].message.contains("0x00000001"), "{found:?}");
    }

    #[test]
    fn warnings_refuse_nothing() {
        let warning =
            MigrationMismatch { rule: "C9".into(), message: "m".into(), remedy: "r".into(), warning: true };
        assert!(refuse("vm", std::slice::from_ref(&warning)).is_ok());
        let fatal = MigrationMismatch { warning: false, ..warning.clone() };
        let error = refuse("vm", &[warning, fatal]).expect_err("refused");
        assert_eq!(error.reason(), "MIGRATION_INCOMPATIBLE");
    }
}
