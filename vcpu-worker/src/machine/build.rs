//! Builds a machine from a request: first a plan that checks everything, then the objects.
//!
//! Nothing is made before the whole request is known to be good; what fails later (memory, KVM, the kernel file) takes
//! everything made so far with it.

use std::sync::Arc;

use pmu::cpuid::GuestLeaves;
use pmu::{EventFilter, FilterSpec, GuestId, GuestPmu, Policy, Rates, Shape, Vendor};
use vpmu_proto::api;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::worker::{ConsoleState, CreateVmRequest};

use super::{Lifecycle, Machine, gather, options};
use crate::boot::BootError;
use crate::console::Console;
use crate::cores::{CoreSlot, HostCores};
use crate::devices::Devices;
use crate::error::WorkerError;
use crate::grant::RunRight;
use crate::hypervisor::kvm::features::CpuidPolicy;
use crate::hypervisor::kvm::{CpuidPmu, DirtyMode, KvmOptions, KvmVm};
use crate::hypervisor::simulated::{SimOptions, SimVm};
use crate::hypervisor::{InitialRegs, Vm};
use crate::memory::{GuestMemory, HugePages};
use crate::probe::{ProbeConfig, ProbePmu};
use crate::vcpu::request::Answer;
use crate::vcpu::throttle::Throttle;
use crate::vcpu::{Listener, Starting, VcpuHandle, VcpuSetup};

/// vCPUs of one machine.
const MAX_VCPUS: u32 = 256;
/// Bytes of a name; it becomes part of thread and memory names.
const MAX_NAME: usize = 128;
/// Guest memory comes in these.
const MEMORY_UNIT: u64 = 2 << 20;

/// Architectural events that the model counts: cycles, instructions, reference cycles (bits of CPUID.0AH:EBX).
const COUNTED_EVENTS: u32 = 0b111;

/// Which hypervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Kvm,
    Simulated,
}

/// What is not in the request.
pub struct BuildOptions {
    /// The worker's right to run.
    pub right: Arc<RunRight>,
    /// Event rates of the model.
    pub rates: Rates,
    /// Where the guest's output goes.
    pub console: Arc<Console>,
}

/// A request that was checked.
pub struct Plan {
    name: String,
    vcpus: u32,
    memory_bytes: u64,
    boot: Boot,
    kind: Kind,
    slots: Vec<Arc<CoreSlot>>,
    shape: Option<Shape>,
    policy: Policy,
    /// The guest sees the PMU in CPUID.
    exposed: bool,
    incoming: bool,
    /// KVM itself keeps the PMU.
    by_kernel: bool,
    filter: EventFilter,
    /// SCHED_FIFO priority of the vCPU threads.
    fifo: Option<u8>,
    /// NUMA nodes that memory is bound to.
    memory_nodes: Vec<u32>,
    /// State comes from a snapshot.
    restored: bool,
    huge_pages: HugePages,
    prefault: bool,
    features: CpuidPolicy,
    dirty: DirtyMode,
    warnings: Vec<String>,
}

impl Plan {
    /// Checks a request against the host.
    pub fn new(request: &CreateVmRequest, cores: &HostCores) -> Result<Self, WorkerError> {
        let spec = request
            .spec
            .as_ref()
            .ok_or_else(|| WorkerError::invalid("spec", "missing", "say what to build"))?;
        let name = &request.vm_name;
        if name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control) {
            let remedy = "give 1 to 128 bytes without control characters";
            return Err(WorkerError::invalid("vm_name", name.escape_default(), remedy));
        }
        if !(1..=MAX_VCPUS).contains(&spec.vcpus) {
            return Err(WorkerError::invalid("spec.vcpus", spec.vcpus, "give 1 to 256"));
        }
        if spec.memory_bytes == 0 || spec.memory_bytes % MEMORY_UNIT != 0 {
            let remedy = "give a multiple of 2 MiB, at least 2 MiB";
            return Err(WorkerError::invalid("spec.memory_bytes", spec.memory_bytes, remedy));
        }
        if request.incoming && request.restore.is_some() {
            let remedy = "state comes from a migration or from a snapshot: set one of incoming and restore";
            return Err(WorkerError::invalid("restore", "set", remedy));
        }
        let kind = match request.hypervisor.as_str() {
            "kvm" => Kind::Kvm,
            "simulated" => Kind::Simulated,
            other => return Err(WorkerError::invalid("hypervisor", other, "give kvm or simulated")),
        };
        if request.pmu_mode != cores.mode() {
            let remedy = format!("this worker was made for mode {}", cores.mode());
            return Err(WorkerError::invalid("pmu_mode", &request.pmu_mode, remedy));
        }
        let by_kernel = cores.mode() == "kvm";
        if by_kernel && kind != Kind::Kvm {
            let remedy = "KVM's own vPMU needs the hypervisor kvm";
            return Err(WorkerError::invalid("pmu_mode", &request.pmu_mode, remedy));
        }
        let model = &request.model_pmu;
        if !model.is_empty() && *model != cores.shape().to_string() {
            let remedy = format!("the cores of this host carry {}", cores.shape());
            return Err(WorkerError::invalid("model_pmu", model, remedy));
        }
        let boot = spec
            .boot
            .clone()
            .ok_or_else(|| WorkerError::invalid("spec.boot", "missing", "give probe or kernel"))?;
        if kind == Kind::Simulated && !matches!(boot, Boot::Probe(_)) {
            let remedy = "the simulated hypervisor runs the probe guest only";
            return Err(WorkerError::invalid("spec.kernel", "set", remedy));
        }
        let backing = options::backing(spec)?;
        let pmu = spec.pmu.clone().unwrap_or_default();
        let shape = match &request.pmu_shape {
            Some(given) => exact_shape(given, cores.shape())?,
            None => guest_shape(&pmu, cores.shape())?,
        };
        let mut warnings = Vec::new();
        let exposed =
            shape.is_some() && (by_kernel || matches!(boot, Boot::Probe(_)) || pmu.expose_without_rdpmc);
        if shape.is_some() && !by_kernel && !matches!(boot, Boot::Probe(_)) {
            warnings.push(
                if pmu.expose_without_rdpmc {
                    "CPUID shows the PMU, and RDPMC faults in this guest: Linux's perf driver will oops or panic"
                } else {
                    "CPUID hides the PMU from this guest, because RDPMC cannot be passed on in model and msr mode"
                }
                .to_owned(),
            );
        }
        let placement = request.placement.clone().unwrap_or_default();
        let policy = match pmu.switch_policy() {
            api::pmu_spec::SwitchPolicy::Lazy => Policy::Lazy,
            _ => Policy::Strict,
        };
        Ok(Self {
            name: request.vm_name.clone(),
            vcpus: spec.vcpus,
            memory_bytes: spec.memory_bytes,
            boot,
            kind,
            slots: slots(&request.vcpu_cores, spec.vcpus as usize, cores)?,
            shape,
            policy,
            exposed,
            incoming: request.incoming,
            by_kernel,
            filter: event_filter(&pmu, shape.as_ref().unwrap_or(cores.shape()))?,
            fifo: fifo(placement.fifo_priority)?,
            memory_nodes: placement.memory_nodes,
            restored: request.restore.is_some(),
            huge_pages: backing.pages,
            prefault: backing.prefault,
            features: options::features(spec)?,
            dirty: options::dirty(spec)?,
            warnings,
        })
    }
}

/// The cores that vCPUs are asked onto, one each.
pub(crate) fn slots(
    asked: &[u32],
    vcpus: usize,
    cores: &HostCores,
) -> Result<Vec<Arc<CoreSlot>>, WorkerError> {
    if asked.len() != vcpus {
        let remedy = format!("give one core for each of the {vcpus} vCPUs");
        return Err(WorkerError::invalid("vcpu_cores", format!("{} entries", asked.len()), remedy));
    }
    (0u32..)
        .zip(asked)
        .map(|(vcpu, core)| {
            cores.slot(*core).ok_or_else(|| WorkerError::Core { vcpu, core: *core, allowed: cores.ids() })
        })
        .collect()
}

/// A priority from outside; 0 is none.
pub(crate) fn fifo(priority: u32) -> Result<Option<u8>, WorkerError> {
    match u8::try_from(priority) {
        Ok(0) => Ok(None),
        Ok(priority @ 1..=99) => Ok(Some(priority)),
        _ => Err(WorkerError::invalid(
            "fifo_priority",
            priority,
            "give 1 to 99, or 0 for the ordinary scheduler",
        )),
    }
}

/// The events that the guest may count; all, unless the spec says otherwise.
fn event_filter(pmu: &api::PmuSpec, shape: &Shape) -> Result<EventFilter, WorkerError> {
    let Some(filter) = &pmu.event_filter else { return Ok(EventFilter::allow_all()) };
    EventFilter::new(shape.vendor, filter_spec(filter)).map_err(|e| {
        let value = format!("{} events", filter.events.len());
        WorkerError::invalid("spec.pmu.event_filter", value, e.to_string())
    })
}

/// A filter from the API in KVM's form.
pub fn filter_spec(filter: &api::PmuEventFilter) -> FilterSpec {
    FilterSpec {
        action: u32::from(filter.action() == api::pmu_event_filter::Action::Deny),
        flags: if filter.masked { pmu::filter::FLAG_MASKED_EVENTS } else { 0 },
        fixed_counter_bitmap: filter.fixed_counters,
        events: filter.events.clone(),
    }
}

/// The PMU that a machine has had elsewhere: this host must have all of it, and it gets no more than that.
fn exact_shape(given: &api::PmuShape, host: &Shape) -> Result<Option<Shape>, WorkerError> {
    let shape = crate::pmu_glue::shape_from_proto(given)
        .map_err(|problem| WorkerError::invalid("pmu_shape", "given", problem))?;
    if shape.gp == 0 && shape.fixed == 0 {
        return Ok(None);
    }
    match pmu::compat::refusal(&pmu::compat::check_shape(&shape, host)) {
        Some(m) => {
            let remedy = format!("{}: {}; {}", m.rule, m.message, m.remedy);
            Err(WorkerError::invalid("pmu_shape", shape, remedy))
        }
        None => Ok(Some(shape)),
    }
}

fn guest_shape(pmu: &api::PmuSpec, host: &Shape) -> Result<Option<Shape>, WorkerError> {
    if pmu.disabled {
        return Ok(None);
    }
    let (gp, fixed) = match (pmu.gp_counters, pmu.fixed_counters) {
        (0, 0) => (host.gp.count_ones(), host.fixed.count_ones()),
        given => given,
    };
    host.guest(gp, fixed).map(Some).map_err(|e| {
        WorkerError::invalid("spec.pmu", format!("{gp} GP + {fixed} fixed counters"), e.to_string())
    })
}

/// Answers of the vCPUs that a start state was sent to; empty for a machine whose state comes from elsewhere.
pub type Loads = Vec<Answer<Option<pmu::Image>>>;

/// Builds it. Blocks: memory, ioctls, files, threads.
pub fn build(plan: Plan, options: &BuildOptions) -> Result<(Machine, Loads, Vec<String>), WorkerError> {
    let memory = GuestMemory::with_pages(&plan.name, plan.memory_bytes, plan.huge_pages)?;
    // Before anything is touched: pages stay where they are first put.
    memory.bind(&plan.memory_nodes).map_err(|e| WorkerError::Memory(e.to_string()))?;
    if plan.prefault {
        memory.prefault()?;
    }
    let cpuid = plan.shape.as_ref().filter(|_| plan.exposed).map(cpuid_pmu).transpose()?;
    let vm: Arc<dyn Vm> = match plan.kind {
        Kind::Kvm => KvmVm::new(
            memory.clone(),
            KvmOptions {
                vcpus: plan.vcpus,
                // Without a PMU its registers fault, whoever would keep them.
                filter_pmu_msrs: !plan.by_kernel || plan.shape.is_none(),
                guest_pmu_cpuid: cpuid,
                kernel_pmu: plan.shape.filter(|_| plan.by_kernel),
                kernel_filter: Some(plan.filter.spec().clone()).filter(|_| !plan.filter.is_allow_all()),
                features: plan.features,
                dirty: plan.dirty,
            },
        )?,
        Kind::Simulated => SimVm::new(memory.clone(), SimOptions::default())?,
    };
    let console = Arc::clone(&options.console);
    // A machine that came to nothing before may have printed.
    console.restore(&ConsoleState::default());
    let devices = Arc::new(Devices::new(Arc::clone(&vm), Arc::clone(&console)));
    let lifecycle = Arc::new(Lifecycle::new());
    let throttle = Arc::new(Throttle::default());
    let mut starting = Vec::with_capacity(plan.slots.len());
    for (index, slot) in (0u32..).zip(&plan.slots) {
        let listener: Arc<dyn Listener> = lifecycle.clone();
        let switched = plan.shape.filter(|_| !plan.by_kernel);
        let pmu =
            switched.map(|shape| GuestPmu::new(next_guest_id(), shape, plan.policy, plan.filter.clone()));
        starting.push(VcpuHandle::spawn(VcpuSetup {
            index,
            vm_name: plan.name.clone(),
            vm: Arc::clone(&vm),
            devices: Arc::clone(&devices),
            slot: Arc::clone(slot),
            fifo: plan.fifo,
            pmu,
            rates: options.rates,
            right: Arc::clone(&options.right),
            listener,
            throttle: Arc::clone(&throttle),
        })?);
    }
    // While they make their vCPUs.
    let loads = if plan.incoming || plan.restored {
        Vec::new()
    } else {
        boot(&plan.boot, plan.shape.as_ref(), plan.vcpus, &memory)?
    };
    let loads = starting.iter().zip(loads).map(|(vcpu, regs)| vcpu.load(regs)).collect();
    let vcpus = starting.into_iter().map(Starting::started).collect::<Result<Vec<_>, _>>()?;
    lifecycle.know(vcpus.iter().map(VcpuHandle::link).collect());
    let machine = Machine {
        name: plan.name,
        vm,
        memory,
        devices,
        console,
        lifecycle,
        shape: plan.shape,
        probe: matches!(plan.boot, Boot::Probe(_)),
        incoming: plan.incoming,
        looks: tokio::sync::Semaphore::new(super::LOOKS),
        lazy: std::sync::Mutex::default(),
        throttle,
        vcpus,
    };
    Ok((machine, loads, plan.warnings))
}

impl Machine {
    /// Waits until the vCPUs have their start state; those without one wait to be started by the guest.
    pub async fn load(&self, loads: Loads) -> Result<(), WorkerError> {
        gather("setting the start state", loads.into_iter().map(Ok).collect()).await.map(drop)
    }
}

fn boot(
    boot: &Boot,
    shape: Option<&Shape>,
    vcpus: u32,
    memory: &GuestMemory,
) -> Result<Vec<InitialRegs>, WorkerError> {
    match boot {
        Boot::Probe(probe) => {
            let config =
                ProbeConfig::from_boot(probe, vcpus, memory.bytes(), tsc_khz(), shape.map(probe_pmu));
            crate::probe::load(memory, &config).map_err(|e| boot_error(&e))
        }
        Boot::Kernel(kernel) => Ok(vec![crate::boot::load(memory, kernel).map_err(|e| boot_error(&e))?]),
    }
}

pub(super) fn boot_error(error: &BootError) -> WorkerError {
    WorkerError::Boot { reason: error.reason(), field: error.field(), message: error.to_string() }
}

fn probe_pmu(shape: &Shape) -> ProbePmu {
    ProbePmu {
        amd: shape.vendor == Vendor::Amd,
        version: shape.version,
        gp: shape.gp,
        fixed: shape.fixed,
        gp_width: shape.gp_width,
        fixed_width: shape.fixed_width,
        full_width_writes: shape.perf_capabilities & (1 << 13) != 0,
    }
}

/// CPUID's PMU leaves for a shape.
fn cpuid_pmu(shape: &Shape) -> Result<CpuidPmu, WorkerError> {
    let leaves = GuestLeaves::of(shape, COUNTED_EVENTS)
        .map_err(|e| WorkerError::invalid("spec.pmu", shape, e.to_string()))?;
    let words = |l: pmu::cpuid::Leaf| [l.eax, l.ebx, l.ecx, l.edx];
    Ok(CpuidPmu {
        leaf_a: words(leaves.perfmon),
        leaf_8000_0022: words(leaves.amd_perfmon),
        perf_ctr_ext_core: leaves.amd_ext_core,
        pdcm: leaves.pdcm,
    })
}

/// The host's TSC frequency, asked once.
fn tsc_khz() -> u64 {
    static KHZ: std::sync::OnceLock<u64> = std::sync::OnceLock::new();
    *KHZ.get_or_init(|| u64::from(crate::host::probe().tsc_khz))
}

/// Ids of guest PMUs are never used twice in a process: a core knows its resident by it.
fn next_guest_id() -> GuestId {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(1);
    GuestId(NEXT.fetch_add(1, Ordering::Relaxed))
}
