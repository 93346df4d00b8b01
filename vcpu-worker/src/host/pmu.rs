//! What of this host matters to guests' PMUs, as plain data for [`pmu::host_check`].
//!
//! Reads /proc, /sys, CPUID and KVM's feature MSRs. Opens msr devices to see whether they can be, and writes nothing anywhere. What cannot be
//! read is `None`, never a guess.

use std::fs::{self, OpenOptions};
use std::path::Path;

use pmu::Shape;
use pmu::cpuid::{Capabilities, CpuidLeaves, Leaf};
use pmu::host_check::Facts;

use super::{HostFacts, online_cores, parse_list};

/// IA32_PERF_CAPABILITIES, which KVM tells as a feature MSR.
const PERF_CAPABILITIES: u32 = 0x345;
/// Programs with perf events that are named at most.
const MAX_NAMED: usize = 64;

/// Gathers the facts. `host` is what [`super::probe`] found; `model` is what `model` mode would model.
#[must_use]
pub fn facts(host: &HostFacts, model: Option<Shape>) -> Facts {
    let leaves = leaves();
    let kvm = host.kvm.as_ref();
    Facts {
        kernel: host.kernel.clone(),
        pmu: Some(Capabilities::from_cpuid(&leaves).map_err(|e| e.to_string())),
        is_guest: leaves.features.ecx >> 31 == 1,
        model,
        kvm: Some(kvm.map(|_| ()).map_err(|problem| problem.problem.clone())),
        kvm_msr_filter: kvm.is_ok_and(|k| k.msr_filter),
        kvm_pmu_capability: kvm.is_ok_and(|k| k.pmu_capability),
        enable_pmu: parameter("kvm", "enable_pmu"),
        enable_mediated_pmu: vendor_parameter("enable_mediated_pmu"),
        nested: vendor_parameter("nested"),
        nmi_watchdog: text("/proc/sys/kernel/nmi_watchdog").and_then(|t| flag(&t)),
        perf_users: perf_users(),
        rdpmc: text("/sys/bus/event_source/devices/cpu/rdpmc").and_then(|t| t.parse().ok()),
        isolated_cores: text("/sys/devices/system/cpu/isolated").map_or_else(Vec::new, |t| parse_list(&t)),
        msr_cores: online_cores().into_iter().filter(|core| msr_opens(*core)).collect(),
        msr_allow_writes: text("/sys/module/msr/parameters/allow_writes"),
        lockdown: text("/sys/kernel/security/lockdown").map(|t| chosen(&t)),
    }
}

/// The PMU's CPUID leaves of the core that this thread is on; leaves beyond the processor's highest are 0.
fn leaves() -> CpuidLeaves {
    let get = |leaf: u32, sub: u32| {
        let highest = std::arch::x86_64::__cpuid(leaf & 0x8000_0000).eax;
        if leaf > highest {
            return Leaf::default();
        }
        let r = std::arch::x86_64::__cpuid_count(leaf, sub);
        Leaf { eax: r.eax, ebx: r.ebx, ecx: r.ecx, edx: r.edx }
    };
    let features = get(1, 0);
    CpuidLeaves {
        vendor: get(0, 0),
        features,
        extended_features: get(7, 1),
        perfmon: get(0xA, 0),
        perfmon_ext: get(0x23, 0),
        perfmon_ext_counters: get(0x23, 1),
        amd_features: get(0x8000_0001, 0),
        amd_perfmon: get(0x8000_0022, 0),
        perf_capabilities: if features.ecx >> 15 & 1 == 1 { perf_capabilities() } else { 0 },
    }
}

/// The host's PERF_CAPABILITIES as KVM supports them; 0 where KVM does not say.
fn perf_capabilities() -> u64 {
    let entry = kvm_bindings::kvm_msr_entry { index: PERF_CAPABILITIES, ..Default::default() };
    let Ok(mut msrs) = kvm_bindings::Msrs::from_entries(&[entry]) else { return 0 };
    let Ok(kvm) = kvm_ioctls::Kvm::new() else { return 0 };
    match kvm.get_msrs(&mut msrs) {
        Ok(1) => msrs.as_slice().first().map_or(0, |entry| entry.data),
        _ => 0,
    }
}

pub(super) fn text(path: impl AsRef<Path>) -> Option<String> {
    fs::read_to_string(path).ok().map(|t| t.trim().to_owned())
}

/// A module parameter or sysctl: Y, N, 1, 0.
pub(super) fn flag(text: &str) -> Option<bool> {
    match text {
        "Y" | "y" | "1" => Some(true),
        "N" | "n" | "0" => Some(false),
        _ => None,
    }
}

fn parameter(module: &str, name: &str) -> Option<bool> {
    flag(&text(format!("/sys/module/{module}/parameters/{name}"))?)
}

fn vendor_parameter(name: &str) -> Option<bool> {
    parameter("kvm_intel", name).or_else(|| parameter("kvm_amd", name))
}

/// The choice in brackets: "none [integrity] confidentiality".
fn chosen(text: &str) -> String {
    text.split_whitespace().find_map(|w| w.strip_prefix('[')?.strip_suffix(']')).unwrap_or(text).to_owned()
}

fn msr_opens(core: u32) -> bool {
    OpenOptions::new().read(true).write(true).open(format!("/dev/cpu/{core}/msr")).is_ok()
}

/// Processes with perf events open (software ones look the same from here), or `None` if some processes could not be looked at and none of
/// the others has any. Those of this program have software ones only ([`super::tick`]), and are left out.
pub(super) fn perf_users() -> Option<Vec<String>> {
    let mut users = Vec::new();
    let mut hidden = false;
    let own = program(Path::new("/proc/self"));
    for process in fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let open = match fs::read_dir(process.path().join("fd")) {
            Ok(open) => open,
            Err(error) => {
                hidden |= error.kind() == std::io::ErrorKind::PermissionDenied;
                continue;
            }
        };
        let is_event = |fd: fs::DirEntry| {
            fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("[perf_event]"))
        };
        let ours = pid == std::process::id() || own.is_some() && program(&process.path()) == own;
        if !ours && open.flatten().any(is_event) && users.len() < MAX_NAMED {
            let comm = text(process.path().join("comm")).unwrap_or_default();
            users.push(format!("{comm} (pid {pid})"));
        }
    }
    if hidden && users.is_empty() { None } else { Some(users) }
}

/// Name of the file that a process runs, also when that has been replaced.
fn program(process: &Path) -> Option<String> {
    let exe = fs::read_link(process.join("exe")).ok()?;
    let name = exe.file_name()?.to_string_lossy().into_owned();
    Some(name.strip_suffix(" (deleted)").unwrap_or(&name).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use pmu::host_check::{Level, Mode, report};

    #[test]
    fn this_hosts_facts_make_a_report() {
        let host = crate::host::probe();
        let model: Shape = "intel:v5:8+4:48".parse().unwrap();
        let facts = facts(&host, Some(model));
        assert_eq!(facts.kernel, host.kernel);
        assert_eq!(matches!(facts.kvm, Some(Ok(()))), host.kvm.is_ok());
        for mode in [Mode::Model, Mode::Msr, Mode::Kvm] {
            for line in report(&facts, mode) {
                assert!(line.level == Level::Ok || !line.remedy.is_empty(), "{line:?}");
            }
        }
    }

    #[test]
    fn files_are_read_as_the_kernel_writes_them() {
        assert_eq!(
            ["Y", "N", "1", "0", "?"].map(flag),
            [Some(true), Some(false), Some(true), Some(false), None]
        );
        assert_eq!(chosen("none [integrity] confidentiality"), "integrity");
        assert_eq!(chosen("[none] integrity"), "none");
        assert_eq!(chosen("odd"), "odd");
    }

    #[test]
    fn a_program_with_a_perf_event_is_found_by_the_name_of_its_descriptor() {
        // This process is left out in any case.
        let me = format!("(pid {})", std::process::id());
        assert!(perf_users().is_none_or(|users| users.iter().all(|user| !user.ends_with(&me))));
        let own = program(Path::new("/proc/self")).expect("a file");
        assert!(std::env::current_exe().expect("a file").ends_with(&own), "{own}");
    }
}
