//! Where everything of the probe guest lies: the one place that loader, assembly, parser and the simulated guest
//! share.
//!
//! Guest virtual addresses are memfd offsets (RAM above the 4 GiB hole is mapped right behind RAM below it), so
//! neither the guest nor the verifier has to know about the hole. Everything in this file lies below 3 GiB, where
//! offset, physical and virtual address are the same. One more mapping, at [`LAPIC_VA`], is the local APIC's page.
//!
//! ```text
//! 0x01000  GDT (null, kernel code/data, user data/code, one TSS descriptor a vCPU)
//! 0x03000  IDT
//! 0x04000  code blob
//! 0x10000  one block of three pages a vCPU: parameters + TSS | stacks | report page
//! then     page tables, then free memory (working sets, fill area)
//! ```
//!
//! Invariant: a field once released keeps its offset; the report page's [`VERSION`] grows with any change.

/// Guest page.
pub const PAGE: u64 = 4096;
/// GDT address.
pub const GDT: u64 = 0x1000;
/// IDT address.
pub const IDT: u64 = 0x3000;
/// Where the code blob is copied to.
pub const CODE: u64 = 0x4000;
/// First byte that is no longer the code blob's.
pub const CODE_END: u64 = 0x10000;
/// First vCPU block.
pub const BLOCKS: u64 = 0x10000;
/// Bytes of a vCPU block.
pub const BLOCK: u64 = 3 * PAGE;
/// Most vCPUs.
pub const MAX_VCPUS: u32 = 256;
/// Virtual address of the 2 MiB page that holds the local APIC (its second PML4 slot).
pub const LAPIC_VA: u64 = 1 << 39;
/// Physical address of the local APIC's 2 MiB page.
pub const LAPIC_PAGE: u64 = 0xfee0_0000;
/// Most memory that the page tables can map (one PML4 slot).
pub const MAX_MEMORY: u64 = 1 << 39;
/// Vector of the performance monitoring interrupt.
pub const PMI_VECTOR: u8 = 0xf2;
/// Vector of spurious interrupts.
pub const SPURIOUS_VECTOR: u8 = 0xff;

/// Address of a vCPU's block.
pub const fn block(vcpu: u32) -> u64 {
    BLOCKS + vcpu as u64 * BLOCK
}

/// Address of a vCPU's report page.
pub const fn report_page(vcpu: u32) -> u64 {
    block(vcpu) + REPORT
}

// --- Parameters: offsets in a block's first page; written by the loader, read by the guest -----------------------

/// u64: virtual address of the local APIC.
pub const P_LAPIC: u64 = 0x000;
/// u32: LVT performance counter register value.
pub const P_LVTPC: u64 = 0x008;
/// u32: bit of the overflow counter in the status register (status registers' low half).
pub const P_STATUS_BIT: u64 = 0x00c;
/// u32: overflow status MSR; 0 if this PMU has none.
pub const P_STATUS_MSR: u64 = 0x010;
/// u32: MSR that clears overflow status bits.
pub const P_CLEAR_MSR: u64 = 0x014;
/// u32: overflow counter's MSR; 0 if nothing overflows.
pub const P_OVF_MSR: u64 = 0x018;
/// u32: RDPMC index to MSR: stride of general-purpose counters.
pub const P_RDPMC_STRIDE: u64 = 0x01c;
/// u64: preset value of the overflow counter.
pub const P_PRESET: u64 = 0x020;
/// u32: RDPMC index to MSR: first general-purpose counter.
pub const P_RDPMC_GP: u64 = 0x028;
/// u32: RDPMC index to MSR: first fixed counter less `1 << 30`, wrapping.
pub const P_RDPMC_FIXED: u64 = 0x02c;
/// u64: heartbeat period, TSC ticks.
pub const P_BEAT: u64 = 0x030;
/// u64: heartbeats between two checks.
pub const P_CHECK_EVERY: u64 = 0x038;
/// u64: heartbeats between two progress lines.
pub const P_LINE_EVERY: u64 = 0x040;
/// u64: vCPUs whose progress this vCPU prints; 0 prints nothing.
pub const P_LINES: u64 = 0x048;
/// u64: gap threshold, TSC ticks.
pub const P_GAP: u64 = 0x050;
/// u64: virtual address of this vCPU's working set.
pub const P_WS: u64 = 0x058;
/// u64: pages in it.
pub const P_WS_PAGES: u64 = 0x060;
/// u64: TSC ticks between two dirtied pages; 0 is as fast as it can.
pub const P_WS_TICKS: u64 = 0x068;
/// u64: salt of this vCPU's working set pattern.
pub const P_WS_SALT: u64 = 0x070;
/// u64: virtual address of this vCPU's share of the fill area.
pub const P_FILL: u64 = 0x078;
/// u64: pages in it.
pub const P_FILL_PAGES: u64 = 0x080;
/// u64: number of its first page in the whole fill area.
pub const P_FILL_FIRST: u64 = 0x088;
/// u64: this vCPU's index.
pub const P_VCPU: u64 = 0x090;
/// u64: TSC frequency, kHz.
pub const P_TSC_KHZ: u64 = 0x098;
/// u64: vCPUs of the machine.
pub const P_VCPUS: u64 = 0x0a0;
/// u64: entries at [`P_SETUP`].
pub const P_SETUP_COUNT: u64 = 0x0a8;
/// u64: entries at [`P_CHECKS`].
pub const P_CHECK_COUNT: u64 = 0x0b0;
/// Set-up writes, 16 bytes each: u32 MSR, u32 zero, u64 value.
pub const P_SETUP: u64 = 0x100;
/// Most set-up writes.
pub const SETUP_MAX: usize = 96;
/// Bytes of a set-up write.
pub const SETUP_BYTES: u64 = 16;
/// Checks, 32 bytes each: u32 MSR or RDPMC index, u32 kind, u64 operand, u64 slot, u64 fault code.
pub const P_CHECKS: u64 = 0x700;
/// Most checks.
pub const CHECKS_MAX: usize = 64;
/// Bytes of a check.
pub const CHECK_BYTES: u64 = 32;
/// The vCPU's task state segment.
pub const P_TSS: u64 = 0xf80;
/// Limit of the TSS: no I/O permission bitmap, so ring 3 reaches ports through the gate only.
pub const TSS_LIMIT: u32 = 0x67;

/// Check kind: the register equals the operand.
pub const CHECK_EQUAL: u32 = 0;
/// Check kind: the counter did not go backwards since the slot's value; operand is 64 - width.
pub const CHECK_MONOTONIC: u32 = 1;
/// Check kind: the same, read by RDPMC.
pub const CHECK_RDPMC: u32 = 2;
/// Check kind: the overflow counter has not stood past its overflow for two checks without an interrupt between;
/// operand is 64 - width.
pub const CHECK_OVERFLOW: u32 = 3;

// --- Stacks: second page of a block ------------------------------------------------------------------------------

/// Offset of the stack page.
pub const STACK: u64 = PAGE;
/// Offset of the ring-3 stack's top.
pub const USER_STACK: u64 = PAGE + 0x800;
/// Offset of the ring-0 stack's top; the last eight bytes of the page hold the block's address.
pub const KERNEL_STACK: u64 = 2 * PAGE - 16;

// --- Report: third page of a block; offsets are from the block's start, all fields u64 -----------------------------

/// Offset of the report page in a block.
pub const REPORT: u64 = 2 * PAGE;
/// [`MAGIC`], written by the loader.
pub const R_MAGIC: u64 = REPORT;
/// [`VERSION`].
pub const R_VERSION: u64 = REPORT + 0x008;
/// vCPU index.
pub const R_VCPU: u64 = REPORT + 0x010;
/// Heartbeats.
pub const R_BEATS: u64 = REPORT + 0x018;
/// TSC at the last heartbeat.
pub const R_BEAT_TSC: u64 = REPORT + 0x020;
/// Turns of the loop.
pub const R_LOOPS: u64 = REPORT + 0x028;
/// Longest gap between two turns, ticks.
pub const R_MAX_GAP: u64 = REPORT + 0x030;
/// Gaps above the threshold.
pub const R_GAPS: u64 = REPORT + 0x038;
/// Longest gap since the mark changed, ticks.
pub const R_LAST_GAP: u64 = REPORT + 0x040;
/// Mark that the guest has seen.
pub const R_MARK_SEEN: u64 = REPORT + 0x048;
/// Mark that the host writes: "resumed".
pub const R_MARK: u64 = REPORT + 0x050;
/// Interrupts that the handler took.
pub const R_PMIS: u64 = REPORT + 0x058;
/// Faults in its own view.
pub const R_FAULTS: u64 = REPORT + 0x060;
/// Code of the first fault.
pub const R_FIRST: u64 = REPORT + 0x068;
/// First fault: MSR, RDPMC index or vector.
pub const R_FIRST_WHERE: u64 = REPORT + 0x070;
/// First fault: what was expected (last value, programmed value).
pub const R_FIRST_EXPECTED: u64 = REPORT + 0x078;
/// First fault: what was there.
pub const R_FIRST_GOT: u64 = REPORT + 0x080;
/// Pages dirtied.
pub const R_DIRTIED: u64 = REPORT + 0x088;
/// Pass over the working set that is going on, from 1.
pub const R_WS_PASS: u64 = REPORT + 0x090;
/// Next page of the working set to be written in this pass.
pub const R_WS_NEXT: u64 = REPORT + 0x098;
/// Pages of its share of the fill area that are filled.
pub const R_FILLED: u64 = REPORT + 0x0a0;
/// Whole rounds of checks done.
pub const R_CHECKS: u64 = REPORT + 0x0a8;
/// Times the TSC went backwards between two turns.
pub const R_TSC_BACK: u64 = REPORT + 0x0b0;
/// Where it is: 0 not started, [`STAGE_SETUP`], [`STAGE_RUNNING`], [`STAGE_HALTED`].
pub const R_STAGE: u64 = REPORT + 0x0b8;
/// Frame of an unexpected exception, six words: error code if it has one, RIP, CS, RFLAGS, RSP, SS.
pub const R_FRAME: u64 = REPORT + 0x0c0;
/// Working state: next check, [`P_CHECK_COUNT`] when none is going on.
pub const R_CHECK_POS: u64 = REPORT + 0x0f0;
/// Working state: heartbeats until the next check.
pub const R_CHECK_WAIT: u64 = REPORT + 0x0f8;
/// Working state: heartbeats until the next progress line.
pub const R_LINE_WAIT: u64 = REPORT + 0x100;
/// Working state: next byte to send of the text at [`R_TX`].
pub const R_TX_POS: u64 = REPORT + 0x108;
/// Working state: bytes of text at [`R_TX`].
pub const R_TX_LEN: u64 = REPORT + 0x110;
/// Working state: 1 if the overflow counter stood past its overflow at the last check.
pub const R_OVF_SEEN: u64 = REPORT + 0x118;
/// Working state: interrupts at that check.
pub const R_OVF_PMIS: u64 = REPORT + 0x120;
/// Working state: TSC at which the next page is due.
pub const R_WS_DUE: u64 = REPORT + 0x128;
/// Working state: TSC at which the next heartbeat is due.
pub const R_BEAT_DUE: u64 = REPORT + 0x130;
/// Working state: TSC at the last turn (the simulated guest's; the assembly keeps it in a register).
pub const R_TURN_TSC: u64 = REPORT + 0x138;
/// Last value a slot's counter was seen at, [`CHECKS_MAX`] words.
pub const R_SLOTS: u64 = REPORT + 0x200;
/// Text on its way to the serial port.
pub const R_TX: u64 = REPORT + 0x800;
/// Room for it.
pub const TX_MAX: usize = 0x800;

/// Marks a report page: "VPMUPROB".
pub const MAGIC: u64 = u64::from_le_bytes(*b"VPMUPROB");
/// Version of this layout.
pub const VERSION: u64 = 1;

/// Programs its counters.
pub const STAGE_SETUP: u64 = 1;
/// In its main loop.
pub const STAGE_RUNNING: u64 = 2;
/// Stopped after an exception that it does not handle.
pub const STAGE_HALTED: u64 = 3;

/// Fault: a counter went backwards.
pub const FAULT_BACKWARDS: u64 = 1;
/// Fault: the disabled counter changed.
pub const FAULT_PARKED: u64 = 2;
/// Fault: a selector lost its programmed value.
pub const FAULT_SELECTOR: u64 = 3;
/// Fault: fixed counter control or global control lost its programmed value.
pub const FAULT_CONTROL: u64 = 4;
/// Fault: programming a register raised #GP.
pub const FAULT_SETUP: u64 = 5;
/// Fault: reading a register raised #GP.
pub const FAULT_READ: u64 = 6;
/// Fault: an interrupt came with no overflow.
pub const FAULT_SPURIOUS_PMI: u64 = 7;
/// Fault: an overflow brought no interrupt.
pub const FAULT_LOST_PMI: u64 = 8;
/// Fault: an unexpected exception; its vector is added.
pub const FAULT_EXCEPTION: u64 = 0x100;

/// Pages filled or dirtied in one turn at most: bounds a turn to about 50 microseconds with dirty logging on.
pub const TURN_PAGES: u64 = 16;
/// Serial port.
pub const COM1: u16 = 0x3f8;
/// Factor of the fill pattern (2^64 / golden ratio, odd).
pub const FILL_FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// Every word of page `page` of the fill area.
pub const fn fill_word(page: u64) -> u64 {
    page.wrapping_add(1).wrapping_mul(FILL_FACTOR)
}

/// Salt of a vCPU's working set.
pub const fn ws_salt(vcpu: u32) -> u64 {
    (vcpu as u64 + 1).wrapping_mul(0xd6e8_feb8_6659_fd93)
}

/// First word of page `page` (number in the working set) in pass `pass`; the page's last word is its complement.
pub const fn ws_word(salt: u64, pass: u64, page: u64) -> u64 {
    ((pass << 32) | (page & 0xffff_ffff)) ^ salt
}
