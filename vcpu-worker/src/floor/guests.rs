//! Guests of a few bytes: page tables, and code that never ends.

use crate::hypervisor::{EntryMode, HvError, InitialRegs};
use crate::memory::GuestMemory;

const CODE: u64 = 0x1_0000;
const GDT: u64 = 0x1000;
const IDT: u64 = 0x3000;
const PML4: u64 = 0x9000;
const PDPT: u64 = 0xa000;
const PD: u64 = 0xb000;

/// What a guest does for ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Guest {
    /// OUT to port 0x80, in ring 0.
    Out,
    /// RDMSR of IA32_PERF_GLOBAL_CTRL, in ring 0.
    RdMsr,
    /// Counts, in ring 3.
    Spin,
}

impl Guest {
    /// Writes it to the first 2 MiB of memory; how it starts.
    pub(super) fn load(self, memory: &GuestMemory) -> Result<InitialRegs, HvError> {
        let (code, mode): (&[u8], _) = match self {
            // mov edx, 0x80; 1: out dx, al; jmp 1b
            Self::Out => (&[0xba, 0x80, 0, 0, 0, 0xee, 0xeb, 0xfd], EntryMode::Long),
            // mov ecx, 0x38f; 1: rdmsr; jmp 1b
            Self::RdMsr => (&[0xb9, 0x8f, 0x03, 0, 0, 0x0f, 0x32, 0xeb, 0xfc], EntryMode::Long),
            // 1: inc rax; jmp 1b
            Self::Spin => (&[0x48, 0xff, 0xc0, 0xeb, 0xfb], EntryMode::LongUser),
        };
        let failed = |e: crate::memory::MemoryError| HvError::State {
            kind: "guest memory".to_owned(),
            problem: e.to_string(),
        };
        let gdt: [u64; 5] =
            [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
        for (at, entry) in (0u64..).zip(gdt) {
            memory.store_u64(GDT + at * 8, entry).map_err(failed)?;
        }
        // Present, writable, user, accessed; the leaves dirty and large too: the processor writes nothing of its own.
        memory.store_u64(PML4, PDPT | 0x27).map_err(failed)?;
        memory.store_u64(PDPT, PD | 0x27).map_err(failed)?;
        memory.store_u64(PD, 0xe7).map_err(failed)?;
        memory.write(CODE, code).map_err(failed)?;
        Ok(InitialRegs {
            mode,
            rip: CODE,
            rsp: 0x8000,
            cr3: PML4,
            // PAE, MCE, PGE, OSFXSR, OSXMMEXCPT.
            cr4: 0x6e0,
            gdt: (GDT, 39),
            idt: (IDT, 0xfff),
            ..InitialRegs::default()
        })
    }
}
