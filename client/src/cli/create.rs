//! `vpmuctl vm create`.

use super::failure::Failure;
use super::placement::PlacementArgs;
use super::{Context, vm};
use clap::{ArgGroup, Args, ValueEnum};
use std::path::PathBuf;
use std::process::ExitCode;
use vpmu_client::api::{
    CpuPlacement, CpuidSpec, CreateVirtualMachineRequest, KernelBoot, MemoryBacking, PmuEventFilter, PmuSpec,
    ProbeBoot, VirtualMachine, VirtualMachineSpec, cpuid_spec, memory_backing, pmu_event_filter, pmu_spec,
    virtual_machine, virtual_machine_spec,
};
use vpmu_client::{names, units};

const EXAMPLES: &str = "\
Examples:
  # The built-in probe guest: counts, takes overflow interrupts, dirties memory, checks its own view.
  vpmuctl vm create web-1 --vcpus 2 --memory 256MiB --probe --start
  # A busier one: each vCPU dirties 16 MiB at 20000 pages a second; 64 MiB are filled with a pattern first.
  vpmuctl vm create web-2 --vcpus 1 --memory 512MiB --probe --working-set 16MiB --dirty-rate 20000 --fill 64MiB
  # Two whole cores of its own, their siblings idle, close together, with memory of their NUMA node.
  vpmuctl vm create web-3 --vcpus 2 --memory 256MiB --probe --placement dedicated --numa-local
  # A Linux kernel.
  vpmuctl vm create lin-1 --vcpus 1 --memory 512MiB --kernel /boot/vmlinuz --cmdline 'console=ttyS0'";

/// Create a machine, and start it with --start.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES, group = ArgGroup::new("boot").required(true).args(["probe", "kernel"]))]
pub(crate) struct CreateArgs {
    /// Its name: 1 to 63 characters of [a-z0-9-], starting with a letter and not ending with a hyphen.
    name: String,
    /// Number of vCPUs; each is pinned to a host core (see Cores).
    #[arg(long)]
    vcpus: u32,
    /// Guest memory: a multiple of 2 MiB.
    #[arg(long, value_parser = units::parse_bytes, value_name = "SIZE")]
    memory: u64,
    /// Start it at once.
    #[arg(long)]
    start: bool,
    /// Check only: say what would be refused, create nothing.
    #[arg(long, conflicts_with = "start")]
    validate_only: bool,

    /// Boot the built-in probe guest.
    #[arg(long, help_heading = "Probe guest")]
    probe: bool,
    /// Memory that each vCPU keeps dirtying; unset means 1MiB.
    #[arg(long, requires = "probe", conflicts_with = "kernel", value_parser = units::parse_bytes, value_name = "SIZE", help_heading = "Probe guest")]
    working_set: Option<u64>,
    /// Pages that each vCPU dirties a second.
    #[arg(
        long,
        requires = "probe",
        conflicts_with = "kernel",
        value_name = "PAGES",
        help_heading = "Probe guest"
    )]
    dirty_rate: Option<u64>,
    /// Memory filled with a verifiable pattern once at the start.
    #[arg(long, requires = "probe", conflicts_with = "kernel", value_parser = units::parse_bytes, value_name = "SIZE", help_heading = "Probe guest")]
    fill: Option<u64>,
    /// Events between two overflows of the overflow counter; unset means 50000000.
    #[arg(
        long,
        requires = "probe",
        conflicts_with = "kernel",
        value_name = "EVENTS",
        help_heading = "Probe guest"
    )]
    overflow_period: Option<u64>,
    /// Gap in its own time above which the guest counts a hole, in microseconds; unset means 1000.
    #[arg(
        long,
        requires = "probe",
        conflicts_with = "kernel",
        value_name = "US",
        help_heading = "Probe guest"
    )]
    gap_threshold_us: Option<u32>,

    /// Boot this kernel, a PVH ELF or a bzImage on the host.
    #[arg(long, value_name = "FILE", help_heading = "Kernel")]
    kernel: Option<PathBuf>,
    /// Its initrd, on the host.
    #[arg(long, requires = "kernel", conflicts_with = "probe", value_name = "FILE", help_heading = "Kernel")]
    initrd: Option<PathBuf>,
    /// Its command line.
    #[arg(
        long,
        requires = "kernel",
        conflicts_with = "probe",
        value_name = "STR",
        allow_hyphen_values = true,
        help_heading = "Kernel"
    )]
    cmdline: Option<String>,

    /// General-purpose counters of the guest's PMU; the host's default if neither this nor --pmu-fixed is given.
    #[arg(long, value_name = "N", help_heading = "PMU")]
    pmu_gp: Option<u32>,
    /// Fixed counters of the guest's PMU.
    #[arg(long, value_name = "N", help_heading = "PMU")]
    pmu_fixed: Option<u32>,
    /// No PMU at all.
    #[arg(long, conflicts_with_all = ["pmu_gp", "pmu_fixed"], help_heading = "PMU")]
    no_pmu: bool,
    /// How much is undone when a vCPU leaves a core.
    #[arg(long, value_enum, default_value = "strict", help_heading = "PMU")]
    switch_policy: SwitchPolicy,
    /// Events that the guest's counters may count, and no others: selector values as hex or decimal, e.g. 0x3c,0xc0.
    #[arg(long, conflicts_with_all = ["no_pmu", "pmu_deny"], value_delimiter = ',', value_parser = parse_event, value_name = "EVENTS", help_heading = "PMU")]
    pmu_allow: Vec<u64>,
    /// Events that the guest's counters may not count.
    #[arg(long, conflicts_with = "no_pmu", value_delimiter = ',', value_parser = parse_event, value_name = "EVENTS", help_heading = "PMU")]
    pmu_deny: Vec<u64>,
    /// Show the PMU to a guest that will use RDPMC, which faults in model and msr mode.
    #[arg(long, help_heading = "PMU")]
    expose_without_rdpmc: bool,

    #[command(flatten)]
    placement: PlacementArgs,

    /// Huge pages for its memory.
    #[arg(long, value_enum, default_value = "none", help_heading = "Memory")]
    huge_pages: HugePages,
    /// Give every page its memory at the start.
    #[arg(long, help_heading = "Memory")]
    prefault: bool,
    /// How written pages are tracked during a migration.
    #[arg(long, value_enum, default_value = "auto", help_heading = "Memory")]
    dirty_tracking: DirtyTracking,

    /// What CPUID shows: all that KVM supports, or x86-64-v3 and nothing newer.
    #[arg(long, value_enum, default_value = "host", help_heading = "CPUID")]
    cpuid: Cpuid,
    /// Show exactly these features, by their names in /proc/cpuinfo, e.g. avx2,sse4_2, and the processor's ground floor.
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "NAMES",
        conflicts_with = "cpuid",
        help_heading = "CPUID"
    )]
    cpu_features: Vec<String>,

    /// When it is started again by itself: after 0.5 s, then twice as long each time up to 5 minutes.
    #[arg(long, value_enum, default_value = "never")]
    restart: Restart,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum HugePages {
    /// Pages of 4 KiB.
    None,
    /// 2 MiB pages of the host's pool (vm.nr_hugepages), set aside at the start.
    Hugetlb,
    /// Huge pages where the kernel finds them; the host must allow them for shared memory.
    Transparent,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DirtyTracking {
    /// What the host does best.
    Auto,
    /// KVM's bitmap of each memory slot.
    Bitmap,
    /// KVM's ring of each vCPU.
    Ring,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Cpuid {
    /// All that the host's KVM supports.
    Host,
    /// The features of x86-64-v3 and nothing newer.
    Baseline,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum SwitchPolicy {
    /// Every put scrubs the core.
    Strict,
    /// The guest stays resident, quiesced, until someone else needs the core.
    Lazy,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Restart {
    /// Never.
    Never,
    /// After a failure.
    OnFailure,
    /// After every end that was not asked for.
    Always,
}

pub(crate) async fn run(context: &Context, args: CreateArgs) -> Result<ExitCode, Failure> {
    let mut machine = VirtualMachine { spec: Some(spec(&args)?), ..VirtualMachine::default() };
    if args.start {
        // One call: its records are made durable while the machine is built.
        machine.set_desired_state(virtual_machine::DesiredState::Running);
    }
    let operation = context
        .client
        .create_vm_with(CreateVirtualMachineRequest {
            parent: names::DEFAULT_PROJECT.to_owned(),
            virtual_machine_id: args.name.clone(),
            virtual_machine: Some(machine),
            request_id: uuid::Uuid::new_v4().to_string(),
            validate_only: args.validate_only,
        })
        .await?;
    let machine = vm::finish(context, operation).await?;
    vm::show(context, &machine)?;
    Ok(ExitCode::SUCCESS)
}

fn spec(args: &CreateArgs) -> Result<VirtualMachineSpec, Failure> {
    let boot = if let Some(kernel) = &args.kernel {
        virtual_machine_spec::Boot::Kernel(KernelBoot {
            path: absolute(kernel)?,
            initrd_path: args.initrd.as_ref().map(absolute).transpose()?.unwrap_or_default(),
            cmdline: args.cmdline.clone().unwrap_or_default(),
        })
    } else {
        virtual_machine_spec::Boot::Probe(ProbeBoot {
            working_set_bytes: args.working_set.unwrap_or_default(),
            dirty_pages_per_second: args.dirty_rate.unwrap_or_default(),
            overflow_period: args.overflow_period.unwrap_or_default(),
            fill_bytes: args.fill.unwrap_or_default(),
            gap_threshold_us: args.gap_threshold_us.unwrap_or_default(),
        })
    };
    let (gp_counters, fixed_counters) = (args.pmu_gp.unwrap_or_default(), args.pmu_fixed.unwrap_or_default());
    if (args.pmu_gp.is_some() || args.pmu_fixed.is_some()) && gp_counters == 0 && fixed_counters == 0 {
        return Err(Failure::usage(
            "a PMU without counters: use --no-pmu, or leave both options out for the host's default",
        ));
    }
    let switch_policy = match args.switch_policy {
        SwitchPolicy::Strict => pmu_spec::SwitchPolicy::Strict,
        SwitchPolicy::Lazy => pmu_spec::SwitchPolicy::Lazy,
    };
    let restart_policy = match args.restart {
        Restart::Never => virtual_machine_spec::RestartPolicy::Never,
        Restart::OnFailure => virtual_machine_spec::RestartPolicy::OnFailure,
        Restart::Always => virtual_machine_spec::RestartPolicy::Always,
    };
    Ok(VirtualMachineSpec {
        vcpus: args.vcpus,
        memory_bytes: args.memory,
        boot: Some(boot),
        pmu: Some(PmuSpec {
            gp_counters,
            fixed_counters,
            switch_policy: switch_policy.into(),
            disabled: args.no_pmu,
            expose_without_rdpmc: args.expose_without_rdpmc,
            event_filter: event_filter(args),
        }),
        restart_policy: restart_policy.into(),
        memory_backing: Some(backing(args)).filter(|b| *b != MemoryBacking::default()),
        cpuid: Some(cpuid(args)).filter(|c| *c != CpuidSpec::default()),
        dirty_tracking: match args.dirty_tracking {
            DirtyTracking::Auto => 0,
            DirtyTracking::Bitmap => virtual_machine_spec::DirtyTracking::Bitmap.into(),
            DirtyTracking::Ring => virtual_machine_spec::DirtyTracking::Ring.into(),
        },
        placement: Some(args.placement.spec()).filter(|placement| *placement != CpuPlacement::default()),
    })
}

fn backing(args: &CreateArgs) -> MemoryBacking {
    let huge_pages = match args.huge_pages {
        HugePages::None => memory_backing::HugePages::Unspecified,
        HugePages::Hugetlb => memory_backing::HugePages::Hugetlb,
        HugePages::Transparent => memory_backing::HugePages::Transparent,
    };
    MemoryBacking { huge_pages: huge_pages.into(), prefault: args.prefault }
}

fn cpuid(args: &CreateArgs) -> CpuidSpec {
    let policy = match args.cpuid {
        _ if !args.cpu_features.is_empty() => cpuid_spec::Policy::List,
        Cpuid::Host => cpuid_spec::Policy::Unspecified,
        Cpuid::Baseline => cpuid_spec::Policy::Baseline,
    };
    CpuidSpec { policy: policy.into(), features: args.cpu_features.clone() }
}

/// Fixed counters are events too: a list of allowed events leaves them all on, as a list of denied ones does.
fn event_filter(args: &CreateArgs) -> Option<PmuEventFilter> {
    let (action, events, fixed_counters) = if args.pmu_allow.is_empty() {
        (pmu_event_filter::Action::Deny, &args.pmu_deny, 0)
    } else {
        (pmu_event_filter::Action::Allow, &args.pmu_allow, u32::MAX)
    };
    let filter =
        PmuEventFilter { action: action.into(), events: events.clone(), fixed_counters, masked: false };
    (!events.is_empty()).then_some(filter)
}

/// Event select and unit mask, `0x412e` or decimal.
fn parse_event(text: &str) -> Result<u64, String> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.map_err(|_| format!("{text:?} is no event: write its select and unit mask, e.g. 0x412e"))
}

/// The daemon has another working directory: paths are sent absolute.
fn absolute(path: &PathBuf) -> Result<String, Failure> {
    let path = std::path::absolute(path)?;
    path.to_str()
        .map(str::to_owned)
        .ok_or_else(|| Failure::usage(format!("{} is not UTF-8: rename the file", path.display())))
}
