//! What must be true of a host core before its PMU is taken through the msr driver (I-24).
//!
//! The probes (of /proc, /sys, perf and the MSRs themselves) belong to the caller; here is only the judgement, so that every failure is
//! found at once, named, and comes with its remedy.

/// What was found on a host and one of its cores. `None` means that it could not be determined, which counts as a failure: a core is taken
/// only on proof.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Preconditions {
    /// The core, as Linux numbers it.
    pub core: u32,
    /// `kernel.nmi_watchdog`: the hard-lockup detector holds a counter on every core.
    pub nmi_watchdog: Option<bool>,
    /// Hardware perf events open on this core, or system-wide ones; a description of each.
    pub perf_events: Option<Vec<String>>,
    /// The msr module's `allow_writes` parameter: "on", "off" or "default".
    pub msr_allow_writes: Option<String>,
    /// GLOBAL_CTRL (or, without one, the or of all event selects) read after each of two writes of 0, 10 ms apart. Both must be 0: if not,
    /// someone else writes it.
    pub control_after_zero: Option<[u64; 2]>,
    /// IA32_PEBS_ENABLE; 0 where the register does not exist.
    pub pebs_enable: Option<u64>,
    /// IA32_DS_AREA; 0 where the register does not exist.
    pub ds_area: Option<u64>,
    /// IA32_DEBUGCTL: bits 11, 12 and 14 freeze counters.
    pub debug_control: Option<u64>,
    /// GLOBAL_STATUS bits 58 and 59 after a RESET of all bits.
    pub status_after_reset: Option<u64>,
    /// Whether user programs may execute RDPMC (`/sys/bus/event_source/devices/cpu/rdpmc`): 0 never, 1 with an own event, 2 always.
    pub rdpmc: Option<u32>,
    /// Whether the core is isolated from the scheduler (`isolcpus`, or a cpuset partition of type isolated).
    pub isolated: Option<bool>,
    /// PerfMon v6 reload and PEBS configuration registers that are not 0, as (MSR, value); empty on other hosts.
    pub v6_configuration: Option<Vec<(u32, u64)>>,
}

/// A precondition that does not hold.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Stable id.
    pub id: &'static str,
    /// What was found.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

const FREEZE_BITS: u64 = 1 << 11 | 1 << 12 | 1 << 14;
const STATUS_FREEZE: u64 = 1 << 58 | 1 << 59;

/// Every precondition that does not hold, in a fixed order; empty means that the core may be taken.
#[must_use]
pub fn check(found: &Preconditions) -> Vec<Failure> {
    let core = found.core;
    let mut failures = Vec::new();
    let mut fail = |id, message: String, remedy: String| failures.push(Failure { id, message, remedy });
    let unknown = |what: &str| format!("{what} could not be determined");

    let watchdog = "set kernel.nmi_watchdog=0 (sysctl -w kernel.nmi_watchdog=0)".to_owned();
    match found.nmi_watchdog {
        Some(false) => {}
        Some(true) => fail("nmi_watchdog", "the NMI watchdog holds a counter on every core".into(), watchdog),
        None => fail("nmi_watchdog", unknown("kernel.nmi_watchdog"), watchdog),
    }
    let perf = format!("stop the profilers that cover core {core} and let no perf user onto it");
    match &found.perf_events {
        Some(events) if events.is_empty() => {}
        Some(events) => {
            let shown: Vec<&str> = events.iter().take(5).map(String::as_str).collect();
            let count = events.len();
            fail(
                "perf_events",
                format!("{count} perf events use core {core}'s PMU: {}", shown.join(", ")),
                perf,
            );
        }
        None => fail("perf_events", unknown("whether perf events use the core"), perf),
    }
    let writes =
        "load msr with allow_writes=on (echo on > /sys/module/msr/parameters/allow_writes)".to_owned();
    match found.msr_allow_writes.as_deref() {
        Some("on") => {}
        Some(other) => fail(
            "msr_allow_writes",
            format!("the msr module's allow_writes is \"{other}\", not \"on\""),
            writes,
        ),
        None => fail("msr_allow_writes", unknown("the msr module's allow_writes"), writes),
    }
    let writer =
        format!("find what programs core {core}'s PMU (perf, another msr user, firmware) and stop it");
    match found.control_after_zero {
        Some([0, 0]) => {}
        Some([first, second]) => {
            let message = format!(
                "core {core}'s counter enables read {first:#x} and {second:#x} after writes of 0, 10 ms apart"
            );
            fail("foreign_writer", message, writer);
        }
        None => fail("foreign_writer", unknown("whether someone else writes the counter enables"), writer),
    }
    let pebs = "stop the profiler that uses PEBS or BTS on this core".to_owned();
    let mut zero = |id, name: &str, value: Option<u64>, mask: u64, remedy: &str| match value {
        Some(value) if value & mask == 0 => {}
        Some(value) => fail(
            id,
            format!("{name} is {value:#x} on core {core}; {:#x} must be 0", value & mask),
            remedy.to_owned(),
        ),
        None => fail(id, unknown(&format!("{name} of core {core}")), remedy.to_owned()),
    };
    zero("pebs_enable", "IA32_PEBS_ENABLE", found.pebs_enable, u64::MAX, &pebs);
    zero("ds_area", "IA32_DS_AREA", found.ds_area, u64::MAX, &pebs);
    zero(
        "freeze_bits",
        "IA32_DEBUGCTL",
        found.debug_control,
        FREEZE_BITS,
        "set cpu/freeze_on_smi to 0 and stop LBR users: bits 11, 12 and 14 stop counters by themselves",
    );
    zero(
        "status_freeze",
        "GLOBAL_STATUS after a reset",
        found.status_after_reset,
        STATUS_FREEZE,
        "something freezes the counters again and again: find the other user of this PMU",
    );
    let rdpmc = "echo 0 > /sys/bus/event_source/devices/cpu/rdpmc: otherwise programs on this core can read guests' counters";
    match found.rdpmc {
        Some(0 | 1) => {}
        Some(value) => {
            fail("rdpmc", format!("any program may execute RDPMC (rdpmc is {value})"), rdpmc.to_owned());
        }
        None => fail("rdpmc", unknown("the perf rdpmc setting"), rdpmc.to_owned()),
    }
    let isolate =
        format!("boot with isolcpus={core} nohz_full={core}, or make an isolated cpuset partition of it");
    match found.isolated {
        Some(true) => {}
        Some(false) => {
            fail("isolated", format!("core {core} is not isolated: other threads run on it"), isolate);
        }
        None => fail("isolated", unknown("whether the core is isolated"), isolate),
    }
    let v6 = "clear the PerfMon v6 reload and PEBS configuration registers: stop the profiler that uses them"
        .to_owned();
    match &found.v6_configuration {
        Some(registers) if registers.is_empty() => {}
        Some(registers) => {
            let shown: Vec<String> =
                registers.iter().take(5).map(|(msr, value)| format!("{msr:#x}={value:#x}")).collect();
            fail("v6_configuration", format!("core {core} has {}", shown.join(", ")), v6);
        }
        None => fail("v6_configuration", unknown("the PerfMon v6 configuration registers"), v6),
    }
    failures
}
