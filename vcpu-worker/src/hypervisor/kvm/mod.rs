//! The real thing: a virtual machine on /dev/kvm.
//!
//! - [`shell`] makes what every VM is, ahead or in its place.
//! - [`mod@vcpu`] runs a vCPU and translates its exits; [`kick`] gets it out again.
//! - [`cpuid`] and [`features`] decide what CPUID shows; [`msr_filter`] makes PMU MSR accesses exits.
//! - [`dirty`] tracks written pages; [`state`] saves and restores.
//!
//! Invariants: a VM's memory slots mirror `GuestMemory::regions`; the PMU of KVM is off and every PMU MSR exits
//! whenever `filter_pmu_msrs` is set; CPUID is set before the first entry and what KVM made of it is read back.

mod cpuid;
mod dirty;
pub mod features;
mod kick;
mod msr_filter;
mod shell;
mod state;
mod vcpu;

#[cfg(test)]
mod tests;

pub use cpuid::{CpuidDifference, CpuidPmu};
pub use dirty::DirtyMode;
pub use shell::prepare;
pub(crate) use vcpu::{KvmVcpu, initial_sregs};

use std::sync::{Arc, OnceLock};

use kvm_bindings::*;
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::Mutex;
use vpmu_proto::worker::StatePiece;

use super::{HvError, Statistic, Vcpu, Vm};
use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;
use crate::sys::{self, failed};

/// Largest number of vCPUs that we make: 255 is the broadcast id of an 8-bit APIC.
pub const MAX_VCPUS: u32 = 255;

/// How a VM is made.
#[derive(Debug, Clone, Default)]
pub struct KvmOptions {
    /// vCPUs that will be made, 1 to [`MAX_VCPUS`]; CPUID's topology says so.
    pub vcpus: u32,
    /// Switch KVM's own PMU off and let every PMU MSR access exit (PMU modes `model` and `msr`).
    pub filter_pmu_msrs: bool,
    /// What CPUID says about the PMU; None hides it.
    pub guest_pmu_cpuid: Option<CpuidPmu>,
    /// Which features CPUID shows.
    pub features: features::CpuidPolicy,
    /// How written pages are tracked.
    pub dirty: DirtyMode,
    /// The PMU that KVM itself keeps for each vCPU (PMU mode `kvm`), which CPUID shows; excludes `filter_pmu_msrs`.
    pub kernel_pmu: Option<pmu::Shape>,
    /// Which events KVM's vPMU counts; None for all.
    pub kernel_filter: Option<pmu::FilterSpec>,
}

/// The system descriptor and what is asked of it once a process.
struct System {
    kvm: Kvm,
    cpuid: CpuId,
    msrs: Vec<u32>,
}

/// Opens /dev/kvm once a process; a failure is not remembered, so that a later try may succeed.
fn system() -> Result<&'static System, HvError> {
    static SYSTEM: OnceLock<System> = OnceLock::new();
    if let Some(system) = SYSTEM.get() {
        return Ok(system);
    }
    let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
    if kvm.get_api_version() != 12 {
        return Err(HvError::Unsupported {
            what: "KVM API version 12",
            remedy: format!("this kernel has version {}; use Linux 5.10 or later", kvm.get_api_version()),
        });
    }
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
    let msrs = kvm.get_msr_index_list().map_err(failed("KVM_GET_MSR_INDEX_LIST"))?.as_slice().to_vec();
    Ok(SYSTEM.get_or_init(|| System { kvm, cpuid, msrs }))
}

/// Repeats a call that a signal to this thread (a tick, a kick) cut short: making VMs and vCPUs starts kernel threads,
/// which a pending signal stops.
pub(crate) fn uninterrupted<T>(
    call: impl Fn() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    loop {
        match call() {
            Err(e) if e.errno() == libc::EINTR => {}
            result => return result,
        }
    }
}

/// CPUID as this KVM supports it, as (leaf, subleaf, [eax, ebx, ecx, edx]).
pub fn supported_cpuid() -> Result<Vec<(u32, u32, [u32; 4])>, HvError> {
    let entries = system()?.cpuid.as_slice().iter();
    Ok(entries.map(|e| (e.function, e.index, [e.eax, e.ebx, e.ecx, e.edx])).collect())
}

/// MSRs that KVM lists as state of a vCPU.
pub fn state_msrs() -> Result<Vec<u32>, HvError> {
    Ok(system()?.msrs.clone())
}

/// What the parts of a VM share.
struct Shared {
    fd: VmFd,
    memory: GuestMemory,
    options: KvmOptions,
    system: &'static System,
    /// KVM_CAP_XSAVE2: bytes of the extended state; 0 where KVM lacks it.
    xsave_size: usize,
    sregs2: bool,
    /// For a VM that came from another host.
    tsc_shift: state::TscShift,
    /// Entries of each vCPU's dirty ring; 0 without rings.
    ring_entries: u32,
    rings: Mutex<Vec<sys::ring::Ring>>,
    /// KVM's statistics of the VM and of vCPUs, as they come.
    stats: Mutex<Vec<(Option<u32>, sys::stats::StatsFd)>>,
    /// Of the first vCPU.
    differences: OnceLock<Vec<CpuidDifference>>,
}

/// A virtual machine on KVM.
pub struct KvmVm {
    shared: Arc<Shared>,
    dirty: dirty::DirtyLog,
}

impl std::fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "KvmVm({:?}, {:?})", self.shared.memory, self.shared.options)
    }
}

impl KvmVm {
    /// Makes the VM: in-kernel interrupt controllers and timer, memory, PMU policy. vCPUs come later.
    pub fn new(memory: GuestMemory, options: KvmOptions) -> Result<Arc<Self>, HvError> {
        if options.vcpus == 0 || options.vcpus > MAX_VCPUS {
            return Err(HvError::Unsupported {
                what: "the number of vCPUs asked for",
                remedy: format!("ask for 1 to {MAX_VCPUS} vCPUs instead of {}", options.vcpus),
            });
        }
        let system = system()?;
        let mut shell = shell::take(system, options.filter_pmu_msrs)?;
        if let (Some(shape), Some(filter)) = (&options.kernel_pmu, &options.kernel_filter) {
            crate::kvm_pmu::set_event_filter(&shell.fd, shape.vendor, filter)?;
        }
        let ring_entries = dirty::enable_rings(&shell.fd, options.dirty, options.vcpus)?;
        let dirty = dirty::DirtyLog::new(&shell.fd, &memory, ring_entries > 0)?;
        shell.complete()?;
        let fd = shell.fd;
        let xsave_size = usize::try_from(fd.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let sregs2 = fd.check_extension_raw(KVM_CAP_SREGS2.into()) > 0;
        let tsc_shift = state::TscShift::new();
        let stats = sys::stats::StatsFd::open(&fd)?.map(|stats| (None, stats)).into_iter().collect();
        let shared = Shared {
            fd,
            memory,
            options,
            system,
            xsave_size,
            sregs2,
            tsc_shift,
            ring_entries,
            rings: Mutex::default(),
            stats: Mutex::new(stats),
            differences: OnceLock::new(),
        };
        Ok(Arc::new(Self { shared: Arc::new(shared), dirty }))
    }

    /// Makes a vCPU as its own type; see [`Vm::create_vcpu`].
    pub(crate) fn make_vcpu(&self, index: u32) -> Result<KvmVcpu, HvError> {
        KvmVcpu::new(Arc::clone(&self.shared), index)
    }
}

impl Vm for KvmVm {
    fn kind(&self) -> &'static str {
        "kvm"
    }

    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HvError> {
        Ok(Box::new(self.make_vcpu(index)?))
    }

    fn memory(&self) -> &GuestMemory {
        &self.shared.memory
    }

    fn start_dirty_tracking(&self) -> Result<(), HvError> {
        self.dirty.start(&self.shared)
    }

    fn collect_dirty(&self, into: &mut PageBitmap) -> Result<(), HvError> {
        self.dirty.collect(&self.shared, into)
    }

    fn stop_dirty_tracking(&self) -> Result<(), HvError> {
        self.dirty.stop(&self.shared)
    }

    fn drain_dirty_rings(&self) -> Result<(), HvError> {
        self.dirty.drain(&self.shared)
    }

    fn statistics(&self) -> Result<Vec<Statistic>, HvError> {
        let mut all = Vec::new();
        for (vcpu, fd) in self.shared.stats.lock().iter() {
            let figures = fd.read()?.into_iter();
            all.extend(figures.map(|(name, values)| Statistic { vcpu: *vcpu, name, values }));
        }
        Ok(all)
    }

    fn cpuid_differences(&self) -> Vec<CpuidDifference> {
        self.shared.differences.get().cloned().unwrap_or_default()
    }

    fn save(&self) -> Result<Vec<StatePiece>, HvError> {
        state::save_vm(&self.shared)
    }

    fn restore(&self, pieces: &[StatePiece]) -> Result<(), HvError> {
        state::restore_vm(&self.shared, pieces)
    }

    fn signal_msi(&self, address: u64, data: u32) -> Result<(), HvError> {
        let msi = kvm_msi {
            address_lo: address as u32,
            address_hi: (address >> 32) as u32,
            data,
            ..Default::default()
        };
        // 0 means that the guest blocks it (its APIC is off): lost, as on a real machine.
        self.shared.fd.signal_msi(msi).map(|_| ()).map_err(failed("KVM_SIGNAL_MSI"))
    }

    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<(), HvError> {
        self.shared.fd.set_irq_line(gsi, level).map_err(failed("KVM_IRQ_LINE"))
    }
}
