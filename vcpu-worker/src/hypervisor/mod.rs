//! What a vCPU thread needs of a hypervisor, and nothing more.
//!
//! Two implementations: [`kvm`] and [`simulated`] (a scripted guest on the same threads, switcher, memory and
//! migration, for hosts without /dev/kvm and for tests at scale). Which one runs is always shown to the user.
//!
//! Contract of the run loop: `run` enters the guest and returns one [`Exit`]. An exit that wants an answer
//! (`RdMsr`, `WrMsr`, `PioIn`, `MmioRead`) is answered by exactly one `complete` before the next `run`. `kick` may
//! be called from any thread at any time and makes the present or the next `run` return `Exit::Interrupted`; it
//! stays in force until the vCPU's own thread calls `clear_kick` after an exit, and the thread then checks its
//! requests again (kvm-facts section 5: clearing right before the run loses kicks).

pub mod kvm;
pub mod simulated;

use std::sync::Arc;

use vpmu_proto::worker::StatePiece;

use crate::bitmap::PageBitmap;
use crate::memory::GuestMemory;

/// Why the guest was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// RDMSR of a filtered MSR; wants `Completion::Value` or `Completion::Fault`.
    RdMsr {
        /// MSR number.
        index: u32,
    },
    /// WRMSR of a filtered MSR; wants `Completion::Done` or `Completion::Fault`.
    WrMsr {
        /// MSR number.
        index: u32,
        /// EDX:EAX.
        value: u64,
    },
    /// IN; wants `Completion::Value` (little endian, `size` bytes).
    PioIn {
        /// Port.
        port: u16,
        /// 1, 2 or 4.
        size: u8,
    },
    /// OUT.
    PioOut {
        /// Port.
        port: u16,
        /// Bytes in `data`.
        size: u8,
        /// Little endian.
        data: u32,
    },
    /// Load from an address with no memory; wants `Completion::Value`.
    MmioRead {
        /// Guest physical address.
        addr: u64,
        /// 1 to 8.
        size: u8,
    },
    /// Store to an address with no memory.
    MmioWrite {
        /// Guest physical address.
        addr: u64,
        /// 1 to 8.
        size: u8,
        /// Little endian.
        data: u64,
    },
    /// HLT without an in-kernel interrupt controller, or an idle scripted guest.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// KVM_EXIT_SYSTEM_EVENT: 1 shutdown, 2 reset, 3 crash.
    SystemEvent(u32),
    /// KVM could not emulate; suberror and the words that came with it.
    InternalError {
        /// Suberror.
        suberror: u32,
        /// Data words.
        data: Vec<u64>,
    },
    /// VM entry failed.
    FailEntry {
        /// Hardware reason.
        reason: u64,
    },
    /// Kicked, or a signal arrived.
    Interrupted,
    /// The dirty ring must be collected before the vCPU may go on.
    DirtyRingFull,
}

/// Answer to an exit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Completion {
    /// Done, nothing to return.
    Done,
    /// A value for a read.
    Value(u64),
    /// #GP(0) for an MSR access.
    Fault,
}

/// Errors of a hypervisor. `reason` codes are stable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HvError {
    /// An ioctl or system call failed.
    #[error("{call} failed: {source}")]
    Os {
        /// What was called.
        call: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
    /// The host lacks something.
    #[error("this host lacks {what}: {remedy}")]
    Unsupported {
        /// What.
        what: &'static str,
        /// What to do about it.
        remedy: String,
    },
    /// KVM's own vPMU.
    #[error("{message}")]
    Pmu {
        /// Stable code.
        reason: &'static str,
        /// What is wrong, with its remedy.
        message: String,
    },
    /// State that cannot be set into this VM.
    #[error("state piece {kind}: {problem}")]
    State {
        /// The piece.
        kind: String,
        /// What is wrong with it.
        problem: String,
    },
}

impl HvError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Os { .. } => "HYPERVISOR_CALL_FAILED",
            Self::Unsupported { .. } => "HYPERVISOR_UNSUPPORTED",
            Self::Pmu { reason, .. } => reason,
            Self::State { .. } => "STATE_REJECTED",
        }
    }
}

/// A flat 64-bit segment start state: enough to start a vCPU in ring 0 or ring 3 with paging on, or in 32-bit
/// protected mode for PVH.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InitialRegs {
    /// Entry mode.
    pub mode: EntryMode,
    /// RIP.
    pub rip: u64,
    /// RSP.
    pub rsp: u64,
    /// RFLAGS (bit 1 is always set).
    pub rflags: u64,
    /// RBX (PVH start info).
    pub rbx: u64,
    /// RSI (Linux boot parameters).
    pub rsi: u64,
    /// RDI (first argument).
    pub rdi: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// GDT base and limit.
    pub gdt: (u64, u16),
    /// IDT base and limit.
    pub idt: (u64, u16),
    /// Task register: selector, base, limit; selector 0 leaves the reset value.
    pub tss: (u16, u64, u32),
}

/// In which mode a vCPU starts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum EntryMode {
    /// Long mode, ring 0, CS 0x08, SS 0x10.
    #[default]
    Long,
    /// Long mode, ring 3, CS 0x23, SS 0x1b.
    LongUser,
    /// 32-bit protected mode, paging off, flat segments (PVH).
    Protected32,
}

/// One vCPU; used by its own thread only.
pub trait Vcpu: Send {
    /// Enters the guest until something happens.
    fn run(&mut self) -> Result<Exit, HvError>;
    /// Answers the last exit.
    fn complete(&mut self, answer: Completion) -> Result<(), HvError>;
    /// Lets a half-done I/O or MSR instruction finish without running further guest code (one entry with
    /// immediate exit, if one may be left), so that state may be read. An instruction may need several answers
    /// (string input, a store wider than 8 bytes): `Some(exit)` is handled and answered like any other, then this is
    /// called again until it returns `None`.
    fn finish_pending(&mut self) -> Result<Option<Exit>, HvError>;
    /// Whether state read now would be whole. KVM does not report a software exception (INT3) that it has yet to
    /// deliver; where it has moved RIP past the instruction already (PVM does, VMX and SVM do not) a restored vCPU would
    /// skip it. If false, the guest is entered for a moment more and this is asked again.
    fn settled(&mut self) -> Result<bool, HvError> {
        Ok(true)
    }
    /// A handle that other threads kick this vCPU with. Called once, on the vCPU's own thread.
    fn kicker(&self) -> Arc<dyn Kick>;
    /// Forgets kicks so far; see the module's contract.
    fn clear_kick(&mut self);
    /// Start state.
    fn set_initial(&mut self, regs: &InitialRegs) -> Result<(), HvError>;
    /// Makes an application processor runnable (KVM_MP_STATE_RUNNABLE).
    fn set_runnable(&mut self) -> Result<(), HvError>;
    /// State in the order in which it must be set again.
    fn save(&mut self) -> Result<Vec<StatePiece>, HvError>;
    /// Sets saved state.
    fn restore(&mut self, pieces: &[StatePiece]) -> Result<(), HvError>;
    /// Whether the hypervisor itself keeps this vCPU's PMU (PMU mode `kvm`).
    fn has_pmu(&self) -> bool {
        false
    }
    /// The PMU that the hypervisor keeps; none if it keeps none.
    fn save_pmu(&mut self) -> Result<Option<pmu::Image>, HvError> {
        Ok(None)
    }
    /// Sets it, after `restore`, and reads it back. Returns whether it holds overflows that the guest has not acknowledged
    /// and that interrupt.
    fn restore_pmu(&mut self, _: &pmu::Image) -> Result<bool, HvError> {
        Err(HvError::Unsupported {
            what: "a PMU of its own for this vCPU",
            remedy: "restore it where the PMU mode is the same".to_owned(),
        })
    }
    /// Current LVT performance counter register of its local APIC.
    fn lvtpc(&mut self) -> Result<u32, HvError>;
    /// Injects an NMI.
    fn inject_nmi(&mut self) -> Result<(), HvError>;
    /// Registers and instruction bytes, for people.
    fn describe(&mut self) -> String;
}

/// Gets one vCPU out of the guest.
pub trait Kick: Send + Sync {
    /// See the module's contract.
    fn kick(&self);
}

/// One figure of a hypervisor's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statistic {
    /// Which vCPU; None for the VM.
    pub vcpu: Option<u32>,
    /// The hypervisor's name for it.
    pub name: String,
    /// One value, or the buckets of a histogram.
    pub values: Vec<u64>,
}

/// One virtual machine; shared by its threads.
pub trait Vm: Send + Sync {
    /// "kvm" or "simulated".
    fn kind(&self) -> &'static str;
    /// Makes vCPU `index`; called on the thread that will run it.
    fn create_vcpu(&self, index: u32) -> Result<Box<dyn Vcpu>, HvError>;
    /// Guest memory.
    fn memory(&self) -> &GuestMemory;
    /// Begins dirty tracking: after it returns, every write is seen by a later `collect_dirty`.
    fn start_dirty_tracking(&self) -> Result<(), HvError>;
    /// Moves the dirty pages so far into `into` (ored, memfd page numbers) and re-arms them.
    fn collect_dirty(&self, into: &mut PageBitmap) -> Result<(), HvError>;
    /// Ends dirty tracking.
    fn stop_dirty_tracking(&self) -> Result<(), HvError>;
    /// VM-wide state: irqchips, PIT, clock.
    fn save(&self) -> Result<Vec<StatePiece>, HvError>;
    /// Sets VM-wide state.
    fn restore(&self, pieces: &[StatePiece]) -> Result<(), HvError>;
    /// Empties full dirty rings, so that a vCPU that met `DirtyRingFull` may go on; what was in them is in the next
    /// `collect_dirty`.
    fn drain_dirty_rings(&self) -> Result<(), HvError> {
        Ok(())
    }
    /// The hypervisor's own figures, read without stopping anything: of the VM (None) and of each vCPU.
    fn statistics(&self) -> Result<Vec<Statistic>, HvError> {
        Ok(Vec::new())
    }
    /// Where CPUID as the first vCPU sees it differs from what was asked for.
    fn cpuid_differences(&self) -> Vec<kvm::CpuidDifference> {
        Vec::new()
    }
    /// Delivers a message-signalled interrupt, from any thread.
    fn signal_msi(&self, address: u64, data: u32) -> Result<(), HvError>;
    /// Raises or lowers a legacy interrupt line.
    fn set_irq_line(&self, gsi: u32, level: bool) -> Result<(), HvError>;
}
