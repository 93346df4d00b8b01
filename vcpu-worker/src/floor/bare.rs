//! A virtual machine made with the ioctls that none can do without, and nothing around them.
#![allow(unsafe_code)]

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_regs,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vpmu_proto::api::KernelBoot;

use crate::hypervisor::kvm::{initial_sregs, uninterrupted};
use crate::hypervisor::{EntryMode, HvError, InitialRegs};
use crate::memory::GuestMemory;
use crate::sys::failed;

/// The serial port.
const SERIAL: u16 = 0x3f8;

/// /dev/kvm, opened once, and what is asked of it once.
#[derive(Debug)]
pub struct BareHost {
    kvm: Kvm,
    cpuid: CpuId,
}

/// A machine with one vCPU.
#[derive(Debug)]
pub struct BareVm {
    // Dropped in this order: nothing of the VM is left when its memory goes.
    pub(super) vcpu: VcpuFd,
    pub(super) vm: VmFd,
    _memory: GuestMemory,
}

impl BareHost {
    /// Opens it.
    ///
    /// # Errors
    /// If there is no usable /dev/kvm.
    pub fn open() -> Result<Self, HvError> {
        let kvm = Kvm::new().map_err(failed("opening /dev/kvm"))?;
        let cpuid =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self { kvm, cpuid })
    }

    /// Memory of `bytes` with `kernel` loaded into it, and a VM on it that is ready to run.
    ///
    /// # Errors
    /// Any of the memory, the kernel's file or KVM.
    pub fn boot(&self, bytes: u64, kernel: &KernelBoot) -> Result<BareVm, HvError> {
        let other = |kind: &str, problem: String| HvError::State { kind: kind.to_owned(), problem };
        let memory = GuestMemory::new("bare", bytes).map_err(|e| other("memory", e.to_string()))?;
        let regs = crate::boot::load(&memory, kernel).map_err(|e| other("kernel", e.to_string()))?;
        self.make(memory, &regs)
    }

    /// A VM with the least memory and nothing in it.
    pub(super) fn empty(&self) -> Result<BareVm, HvError> {
        let memory = GuestMemory::new("bare", crate::memory::GRANULE)
            .map_err(|e| HvError::State { kind: "memory".to_owned(), problem: e.to_string() })?;
        self.make(memory, &InitialRegs { mode: EntryMode::Protected32, ..InitialRegs::default() })
    }

    fn make(&self, memory: GuestMemory, regs: &InitialRegs) -> Result<BareVm, HvError> {
        let vm = uninterrupted(|| self.kvm.create_vm()).map_err(failed("KVM_CREATE_VM"))?;
        for (slot, region) in (0u32..).zip(memory.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: region.gpa,
                memory_size: region.len,
                userspace_addr: memory.host_address(region),
            };
            // SAFETY: the range is mapped by `memory`, which the machine holds for longer than its descriptors.
            unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        }
        // After the memory: with the controllers' devices there, each change of a slot waits for a grace period.
        vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        let vcpu = uninterrupted(|| vm.create_vcpu(0)).map_err(failed("KVM_CREATE_VCPU"))?;
        vcpu.set_cpuid2(&self.cpuid).map_err(failed("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        initial_sregs(&mut sregs, regs);
        vcpu.set_sregs(&sregs).map_err(failed("KVM_SET_SREGS"))?;
        let general = kvm_regs {
            rip: regs.rip,
            rsp: regs.rsp,
            rflags: regs.rflags | 2,
            rbx: regs.rbx,
            rsi: regs.rsi,
            rdi: regs.rdi,
            ..Default::default()
        };
        vcpu.set_regs(&general).map_err(failed("KVM_SET_REGS"))?;
        Ok(BareVm { vcpu, vm, _memory: memory })
    }
}

impl BareVm {
    /// Runs until the guest writes a byte to the serial port, and returns it.
    ///
    /// # Errors
    /// If KVM fails or the guest does anything else that ends an entry.
    pub fn first_byte(&mut self) -> Result<u8, HvError> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(SERIAL, data)) => return Ok(data.first().copied().unwrap_or_default()),
                Ok(VcpuExit::IoOut(..) | VcpuExit::Intr) => {}
                Ok(other) => {
                    let problem = format!("{other:?} before the first byte");
                    return Err(HvError::State { kind: "exit".to_owned(), problem });
                }
                Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
                Err(e) => return Err(failed("KVM_RUN")(e)),
            }
        }
    }
}
