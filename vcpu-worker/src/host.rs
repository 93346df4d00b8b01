//! The host: what it has, and what a thread needs of it.
//!
//! - [`probe`] reads the facts once; nothing in it changes the host.
//! - [`topology`] reads its processors; [`affinity`] pins threads and keeps others off; [`schedule`] sets their class.
//! - [`pmu`] reads what matters to guests' PMUs, for the host check; [`msr`] takes a core's PMU through the msr driver.
//! - [`clock`] reads clocks; [`tick`] interrupts a vCPU thread by its own CPU time.
//! - [`features`] has the processor asked what it can do before that costs a guest anything.
//! - [`heap`] tells the allocator how to grow where many machines share a process.

pub mod affinity;
pub mod clock;
pub mod features;
pub mod heap;
pub mod msr;
pub mod pmu;
pub mod schedule;
pub mod tick;
pub mod topology;

use std::path::Path;

use rustix::thread::CpuSet;

pub use affinity::pin_current_thread;
pub use clock::{boot_id, boottime_ns, monotonic_ns, thread_cpu_ns};
pub use tick::{PerfReady, TickTimer};
pub use topology::Topology;

/// Why KVM cannot be used, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{problem}: {remedy}")]
pub struct KvmProblem {
    /// Stable code: `KVM_MISSING`, `KVM_FORBIDDEN`, `KVM_OPEN_FAILED`, `KVM_API_VERSION` or `KVM_VM_FAILED`.
    pub code: &'static str,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// What KVM says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmFacts {
    /// KVM_GET_API_VERSION.
    pub api_version: i32,
    /// Largest number of vCPUs of a VM.
    pub max_vcpus: u32,
    /// KVM's own PMU can be switched off (KVM_PMU_CAP_DISABLE).
    pub pmu_capability: bool,
    /// MSR accesses can be made exits: PMU modes `model` and `msr` need it.
    pub msr_filter: bool,
    /// Dirty pages can be re-armed piecewise.
    pub manual_dirty_log: bool,
    /// CPUID as guests can have it: (leaf, subleaf, [eax, ebx, ecx, edx]); for compatibility checks.
    pub cpuid: Vec<(u32, u32, [u32; 4])>,
    /// MSRs that are state of a vCPU.
    pub msrs: Vec<u32>,
}

/// What the host is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostFacts {
    /// KVM, or why not.
    pub kvm: Result<KvmFacts, KvmProblem>,
    /// All of the host's memory, bytes.
    pub memory_bytes: u64,
    /// What could be given out now, bytes (MemAvailable).
    pub memory_available_bytes: u64,
    /// Cores that are online, ascending.
    pub online_cores: Vec<u32>,
    /// Cores that this process may run on (sched_getaffinity), ascending.
    pub allowed_cores: Vec<u32>,
    /// Random id of this boot; empty where the kernel does not tell.
    pub boot_id: String,
    /// Host name.
    pub hostname: String,
    /// Kernel release.
    pub kernel: String,
    /// CPUID vendor, e.g. `GenuineIntel`.
    pub cpu_vendor: String,
    /// CPUID brand string.
    pub cpu_model: String,
    /// Time stamp counter frequency, kHz.
    pub tsc_khz: u32,
}

/// Major and minor number of a kernel release; (0, 0) if it is none.
pub fn kernel_version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

/// Reads the facts. Takes about a millisecond (20 more where KVM cannot be asked for the TSC frequency).
pub fn probe() -> HostFacts {
    let (kvm, tsc_khz) = match probe_kvm() {
        Ok((facts, khz)) => (Ok(facts), khz),
        Err(problem) => (Err(problem), None),
    };
    HostFacts {
        kvm,
        memory_bytes: meminfo("MemTotal"),
        memory_available_bytes: meminfo("MemAvailable"),
        online_cores: online_cores(),
        allowed_cores: allowed_cores(),
        boot_id: boot_id().to_owned(),
        hostname: sysctl("kernel/hostname"),
        kernel: sysctl("kernel/osrelease"),
        cpu_vendor: cpu_vendor(),
        cpu_model: cpu_model(),
        tsc_khz: tsc_khz.unwrap_or_else(clock::measure_tsc_khz),
    }
}

fn probe_kvm() -> Result<(KvmFacts, Option<u32>), KvmProblem> {
    use kvm_bindings::*;
    let path = Path::new("/dev/kvm");
    if !path.exists() {
        return Err(KvmProblem {
            code: "KVM_MISSING",
            problem: "/dev/kvm is not there".to_owned(),
            remedy: "load kvm_intel or kvm_amd, switch virtualisation on in the firmware (or nested virtualisation in \
                     the host's VM), or use --hypervisor simulated"
                .to_owned(),
        });
    }
    let kvm = kvm_ioctls::Kvm::new().map_err(|e| {
        let error = std::io::Error::from_raw_os_error(e.errno());
        if error.kind() == std::io::ErrorKind::PermissionDenied {
            KvmProblem {
                code: "KVM_FORBIDDEN",
                problem: "/dev/kvm may not be opened by this user".to_owned(),
                remedy: "add the user to group kvm, or use --hypervisor simulated".to_owned(),
            }
        } else {
            KvmProblem {
                code: "KVM_OPEN_FAILED",
                problem: format!("/dev/kvm cannot be opened: {error}"),
                remedy: "see the kernel log for kvm, or use --hypervisor simulated".to_owned(),
            }
        }
    })?;
    let api_version = kvm.get_api_version();
    if api_version != 12 {
        return Err(KvmProblem {
            code: "KVM_API_VERSION",
            problem: format!("/dev/kvm speaks API version {api_version}, not 12"),
            remedy: "use Linux 5.10 or later".to_owned(),
        });
    }
    let failed = |e: &dyn std::fmt::Display| KvmProblem {
        code: "KVM_VM_FAILED",
        problem: format!("KVM cannot make a virtual machine: {e}"),
        remedy: "see the kernel log for kvm, or use --hypervisor simulated".to_owned(),
    };
    let cpuid = crate::hypervisor::kvm::supported_cpuid().map_err(|e| failed(&e))?;
    let msrs = crate::hypervisor::kvm::state_msrs().map_err(|e| failed(&e))?;
    let vm = kvm.create_vm().map_err(|e| failed(&e))?;
    let tsc_khz = vm.create_vcpu(0).and_then(|vcpu| vcpu.get_tsc_khz()).ok().filter(|khz| *khz > 0);
    let has = |cap: u32| vm.check_extension_raw(cap.into()) > 0;
    let facts = KvmFacts {
        api_version,
        max_vcpus: u32::try_from(kvm.get_max_vcpus()).unwrap_or(u32::MAX),
        pmu_capability: has(KVM_CAP_PMU_CAPABILITY),
        msr_filter: has(KVM_CAP_X86_USER_SPACE_MSR) && has(KVM_CAP_X86_MSR_FILTER),
        manual_dirty_log: has(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2),
        cpuid,
        msrs,
    };
    Ok((facts, tsc_khz))
}

/// Cores that this process may run on, ascending.
pub fn allowed_cores() -> Vec<u32> {
    let Ok(set) = rustix::thread::sched_getaffinity(None) else { return Vec::new() };
    (0..CpuSet::MAX_CPU)
        .filter(|core| set.is_set(*core))
        .filter_map(|core| u32::try_from(core).ok())
        .collect()
}

fn online_cores() -> Vec<u32> {
    std::fs::read_to_string("/sys/devices/system/cpu/online")
        .map_or_else(|_| allowed_cores(), |s| parse_list(&s))
}

/// The kernel's list format, `0-3,8`.
fn parse_list(text: &str) -> Vec<u32> {
    let mut cores = Vec::new();
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<u32>(), last.parse::<u32>()) {
            cores.extend(first..=last.min(first.saturating_add(8191)));
        }
    }
    cores
}

fn sysctl(name: &str) -> String {
    std::fs::read_to_string(Path::new("/proc/sys").join(name)).unwrap_or_default().trim().to_owned()
}

fn meminfo(key: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let line = text.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
    line.and_then(|l| l.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

fn cpuid_text(leaves: impl Iterator<Item = [u32; 4]>) -> String {
    let bytes: Vec<u8> = leaves.flatten().flat_map(u32::to_le_bytes).collect();
    String::from_utf8_lossy(&bytes).trim_matches(|c: char| c == '\0' || c == ' ').to_owned()
}

fn cpuid(leaf: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid(leaf);
    [r.eax, r.ebx, r.ecx, r.edx]
}

fn cpu_vendor() -> String {
    let [_, ebx, ecx, edx] = cpuid(0);
    cpuid_text(std::iter::once([ebx, edx, ecx, 0]))
}

fn cpu_model() -> String {
    if cpuid(0x8000_0000)[0] < 0x8000_0004 {
        return String::new();
    }
    cpuid_text((0x8000_0002..=0x8000_0004).map(cpuid))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn facts_are_plausible() {
        let facts = probe();
        assert!(facts.memory_bytes >= facts.memory_available_bytes && facts.memory_available_bytes > 1 << 20);
        assert!(!facts.allowed_cores.is_empty());
        assert!(facts.allowed_cores.iter().all(|c| facts.online_cores.contains(c)), "{facts:?}");
        assert_eq!(facts.boot_id.len(), 36, "{}", facts.boot_id);
        assert!(
            ["GenuineIntel", "AuthenticAMD"].contains(&facts.cpu_vendor.as_str()),
            "{}",
            facts.cpu_vendor
        );
        assert!((100_000..100_000_000).contains(&facts.tsc_khz), "{}", facts.tsc_khz);
        let measured = clock::measure_tsc_khz();
        assert!(facts.tsc_khz.abs_diff(measured) < facts.tsc_khz / 20, "{} {measured}", facts.tsc_khz);
        match &facts.kvm {
            Ok(kvm) => assert!(kvm.cpuid.iter().any(|(leaf, ..)| *leaf == 1) && !kvm.msrs.is_empty()),
            Err(problem) => assert!(!problem.remedy.is_empty() && !crate::testing::require_kvm()),
        }
    }

    #[test]
    fn lists_are_parsed() {
        assert_eq!(parse_list("0-3,8\n"), [0, 1, 2, 3, 8]);
        assert_eq!(parse_list("0"), [0]);
        assert_eq!(parse_list("x,4-2,7"), [7]);
    }
}
