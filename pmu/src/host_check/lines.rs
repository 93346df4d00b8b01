//! The lines of the report, one function each.

use super::{Facts, KvmPmu, Level, Line, Mode, vendor};
use crate::registers::{CAP_FW_WRITE, CAP_PERF_METRICS};
use crate::shape::Vendor;

pub(super) fn all(facts: &Facts, mode: Mode) -> Vec<Line> {
    vec![
        kvm(facts),
        kvm_pmu(facts, mode),
        msr_filter(facts, mode),
        pmu_capability(facts, mode),
        pmu_shape(facts, mode),
        capabilities(facts, mode),
        nested(facts, mode),
        watchdog(facts, mode),
        perf_users(facts, mode),
        rdpmc(facts, mode),
        isolated(facts, mode),
        msr_device(facts, mode),
        interrupt(mode),
        boundary(facts, mode),
        emulated(mode),
    ]
}

fn line(
    id: &'static str,
    level: Level,
    message: impl Into<String>,
    remedy: impl Into<String>,
    patches: &'static [u8],
) -> Line {
    let remedy = if level == Level::Ok { String::new() } else { remedy.into() };
    Line { id, level, message: message.into(), remedy, patches }
}

fn kvm(facts: &Facts) -> Line {
    let (level, message) = match &facts.kvm {
        Some(Ok(())) => (Level::Ok, format!("KVM works (Linux {})", facts.kernel)),
        Some(Err(problem)) => (Level::Error, format!("KVM cannot be used: {problem}")),
        None => (Level::Error, "KVM was not probed".to_owned()),
    };
    line("kvm", level, message, "load kvm_intel or kvm_amd and give this user access to /dev/kvm", &[])
}

/// Patches that exist only inside a kernel with the mediated vPMU.
const MEDIATED: &[u8] = &[1, 2, 4, 5, 6, 9, 10, 11, 12, 13, 14, 15, 19, 30, 31];

fn kvm_pmu(facts: &Facts, mode: Mode) -> Line {
    let used = mode == Mode::Kvm;
    let (level, message, remedy) = match facts.kvm_pmu() {
        KvmPmu::Mediated => (Level::Ok, "KVM's vPMU is mediated: guests own the hardware while they run", ""),
        KvmPmu::Emulated => (
            if used { Level::Warning } else { Level::Ok },
            "KVM's vPMU is emulated by host perf events: counts are lost when the host's events compete",
            "use Linux 7.0 or later with kvm_intel.enable_mediated_pmu=Y (or kvm_amd's) and kernel.nmi_watchdog=0",
        ),
        KvmPmu::None => (
            if used { Level::Error } else { Level::Ok },
            "KVM has no vPMU here",
            "load kvm with enable_pmu=Y on a host with a PMU, or use --pmu model",
        ),
    };
    line("kvm_pmu", level, message, remedy, MEDIATED)
}

fn msr_filter(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (facts.kvm_msr_filter, mode) {
        (true, _) => (Level::Ok, "KVM can make PMU MSR accesses exits (MSR filter)"),
        (false, Mode::Kvm) => (Level::Ok, "KVM has no MSR filter; kvm mode needs none"),
        (false, _) => (Level::Error, "KVM has no MSR filter: PMU accesses of guests cannot be seen"),
    };
    line("msr_filter", level, message, "use Linux 5.10 or later", &[16, 17, 34, 36])
}

fn pmu_capability(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (facts.kvm_pmu_capability, mode) {
        (true, _) => (Level::Ok, "KVM's own vPMU can be switched off for each VM"),
        (false, Mode::Kvm) => (Level::Ok, "KVM's own vPMU cannot be switched off for a VM; kvm mode uses it"),
        (false, _) => (
            Level::Warning,
            "KVM's own vPMU cannot be switched off for a VM: the MSR filter alone keeps it out",
        ),
    };
    line(
        "pmu_capability",
        level,
        message,
        "nothing to do: the MSR filter keeps KVM's vPMU out; a KVM with KVM_CAP_PMU_CAPABILITY (Linux 5.18 and later, not every nested one) would switch it off as well",
        &[11],
    )
}

fn pmu_shape(facts: &Facts, mode: Mode) -> Line {
    let needed = mode != Mode::Model;
    let missing = if needed { Level::Error } else { Level::Ok };
    let place = if facts.is_guest { " (this host is itself a guest)" } else { "" };
    let model = facts.model.map_or_else(String::new, |shape| format!("; the model is {shape}"));
    let (level, message) = match &facts.pmu {
        Some(Ok(caps)) if caps.shape.gp != 0 => {
            let v6 = if caps.perfmon_v6 { ", PerfMon v6 treated as v5" } else { "" };
            (Level::Ok, format!("the host's PMU is {}{v6}{place}{model}", caps.shape))
        }
        Some(Ok(_)) => (missing, format!("the host has no PMU{place}{model}")),
        Some(Err(problem)) => (missing, format!("the host's PMU cannot be driven: {problem}{model}")),
        None => (missing, format!("the host's PMU was not probed{model}")),
    };
    line("pmu_shape", level, message, "use a host whose PMU is visible, or --pmu model", &[12, 22])
}

fn capabilities(facts: &Facts, mode: Mode) -> Line {
    let Some(Ok(caps)) = &facts.pmu else {
        return line(
            "perf_capabilities",
            Level::Ok,
            "no PERF_CAPABILITIES to pass on",
            "",
            &[18, 25, 26, 27, 29],
        );
    };
    let bits = caps.shape.perf_capabilities;
    let has = |mask| if bits & mask != 0 { "yes" } else { "no" };
    let message = format!(
        "PERF_CAPABILITIES {bits:#x}: full-width writes {}, PERF_METRICS {}; guests get full-width writes only, never LBR, PEBS or metrics",
        has(CAP_FW_WRITE),
        has(CAP_PERF_METRICS)
    );
    let lacking = mode == Mode::Msr && caps.shape.vendor == Vendor::Intel && bits & CAP_FW_WRITE == 0;
    let level = if lacking { Level::Error } else { Level::Ok };
    line(
        "perf_capabilities",
        level,
        message,
        "msr mode needs full-width counter writes: use another host or --pmu model",
        &[18, 25, 26, 27, 29],
    )
}

fn nested(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (facts.nested, mode) {
        (Some(true), Mode::Msr) => (
            Level::Warning,
            "nested virtualisation is on: guests of guests would count in their parent's counters",
        ),
        (Some(true), _) => {
            (Level::Ok, "nested virtualisation is on; a guest's own guests count as that guest")
        }
        (Some(false), _) => (Level::Ok, "nested virtualisation is off"),
        (None, _) => (Level::Ok, "nested virtualisation: unknown"),
    };
    line("nested", level, message, "load kvm_intel or kvm_amd with nested=0", &[41])
}

fn watchdog(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (facts.nmi_watchdog, mode) {
        (Some(false), _) => (Level::Ok, "the NMI watchdog is off"),
        (_, Mode::Model) => (Level::Ok, "the NMI watchdog does not matter to the model"),
        (Some(true), Mode::Kvm) if facts.kvm_pmu() == KvmPmu::Emulated => {
            (Level::Warning, "the NMI watchdog holds one counter of every core")
        }
        (Some(true), _) => (Level::Error, "the NMI watchdog holds one counter of every core"),
        (None, _) => (Level::Warning, "kernel.nmi_watchdog could not be read"),
    };
    line("nmi_watchdog", level, message, "sysctl -w kernel.nmi_watchdog=0", &[3])
}

fn perf_users(facts: &Facts, mode: Mode) -> Line {
    let remedy = "stop these profilers while guests use the PMU";
    let (level, message) = match (&facts.perf_users, mode) {
        (_, Mode::Model) => (Level::Ok, "host perf events do not matter to the model".to_owned()),
        (Some(users), _) if users.is_empty() => {
            (Level::Ok, "no program holds hardware perf events".to_owned())
        }
        (Some(users), _) => {
            let level = if mode == Mode::Msr { Level::Error } else { Level::Warning };
            let shown: Vec<&str> = users.iter().take(5).map(String::as_str).collect();
            (level, format!("{} programs hold perf events: {}", users.len(), shown.join(", ")))
        }
        (None, _) => (Level::Warning, "whether programs hold hardware perf events is unknown".to_owned()),
    };
    line("perf_users", level, message, remedy, &[2, 31])
}

fn rdpmc(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (facts.rdpmc, mode) {
        (Some(0 | 1), _) => (Level::Ok, "programs may not execute RDPMC freely".to_owned()),
        (_, Mode::Model | Mode::Kvm) => {
            (Level::Ok, "who may execute RDPMC on the host does not matter here".to_owned())
        }
        (Some(value), Mode::Msr) => (
            Level::Error,
            format!("any program may execute RDPMC (rdpmc is {value}) and read what guests left in counters"),
        ),
        (None, Mode::Msr) => (Level::Warning, "the perf rdpmc setting is unknown".to_owned()),
    };
    line("rdpmc", level, message, "echo 1 > /sys/bus/event_source/devices/cpu/rdpmc", &[14, 24])
}

fn isolated(facts: &Facts, mode: Mode) -> Line {
    let count = facts.isolated_cores.len();
    let level = match mode {
        Mode::Msr if count == 0 => Level::Error,
        _ => Level::Ok,
    };
    line(
        "isolated_cores",
        level,
        format!("{count} isolated cores"),
        "boot with isolcpus= and nohz_full= for the cores that guests get",
        &[],
    )
}

fn msr_device(facts: &Facts, mode: Mode) -> Line {
    let writes = facts.msr_allow_writes.as_deref().unwrap_or("unknown");
    let locked = facts.lockdown.as_deref().is_some_and(|l| l != "none");
    let good = !facts.msr_cores.is_empty() && writes == "on" && !locked;
    let mut message =
        format!("{} cores have a writable msr device, allow_writes is {writes}", facts.msr_cores.len());
    if locked {
        message.push_str(", and the kernel is locked down");
    }
    let level = if mode == Mode::Msr && !good { Level::Error } else { Level::Ok };
    line("msr_device", level, message, "modprobe msr allow_writes=on, as root, without kernel lockdown", &[])
}

/// How an overflow interrupt reaches the guest.
fn interrupt(mode: Mode) -> Line {
    let (level, message) = match mode {
        Mode::Kvm => (Level::Ok, "overflow interrupts are delivered by the kernel"),
        Mode::Model => (
            Level::Ok,
            "overflow interrupts are injected by the VMM at the end of the tick (1 ms at most) in which they fall due",
        ),
        Mode::Msr => (
            Level::Warning,
            "overflow interrupts are polled at each pause: the hardware's interrupt enables stay 0, because the host's LAPIC is the kernel's",
        ),
    };
    line(
        "overflow_interrupt",
        level,
        message,
        "use --pmu kvm for prompt overflow interrupts",
        &[4, 5, 6, 7, 8, 30],
    )
}

/// How exactly counting begins and ends with the guest's execution.
fn boundary(facts: &Facts, mode: Mode) -> Line {
    let (level, message) = match (mode, vendor(facts)) {
        (Mode::Model, _) => {
            (Level::Ok, "counting is modelled: events are CPU time inside the guest times configured rates")
        }
        (Mode::Kvm, _) => (Level::Ok, "global control is switched by the kernel at VM-entry and VM-exit"),
        (Mode::Msr, Some(Vendor::Amd)) => (Level::Ok, "GuestOnly selectors count inside the guest only"),
        (Mode::Msr, _) => (
            Level::Warning,
            "global control is written around KVM_RUN: kernel-mode counters also count the host's way in and out",
        ),
    };
    line(
        "counting_boundary",
        level,
        message,
        "count user mode only in the guest, or use --pmu kvm",
        &[28, 32],
    )
}

/// Instructions that somebody completes for the guest.
fn emulated(mode: Mode) -> Line {
    let (level, message) = match mode {
        Mode::Kvm => (Level::Ok, "instructions that KVM emulates are counted by KVM"),
        Mode::Model => (
            Level::Ok,
            "events are modelled from CPU time: instructions that KVM or the VMM completes are not added",
        ),
        Mode::Msr => (
            Level::Warning,
            "instructions that the VMM completes are counted; those that KVM emulates inside the kernel are not",
        ),
    };
    line("emulated_instructions", level, message, "none: it is a bounded undercount", &[38, 39])
}
