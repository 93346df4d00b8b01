//! The guest's code as bytes, assembled by rustc from `guest.S`.
//!
//! Invariant: the code is position independent and knows the rest of the world through the constants of
//! [`super::layout`] only; the loader copies it to [`layout::CODE`].
#![allow(unsafe_code)]

use std::arch::global_asm;

use super::layout;

global_asm!(
    include_str!("guest.S"),
    P_LAPIC = const layout::P_LAPIC,
    P_LVTPC = const layout::P_LVTPC,
    P_STATUS_BIT = const layout::P_STATUS_BIT,
    P_STATUS_MSR = const layout::P_STATUS_MSR,
    P_CLEAR_MSR = const layout::P_CLEAR_MSR,
    P_OVF_MSR = const layout::P_OVF_MSR,
    P_RDPMC_STRIDE = const layout::P_RDPMC_STRIDE,
    P_PRESET = const layout::P_PRESET,
    P_RDPMC_GP = const layout::P_RDPMC_GP,
    P_RDPMC_FIXED = const layout::P_RDPMC_FIXED,
    P_BEAT = const layout::P_BEAT,
    P_CHECK_EVERY = const layout::P_CHECK_EVERY,
    P_LINE_EVERY = const layout::P_LINE_EVERY,
    P_LINES = const layout::P_LINES,
    P_GAP = const layout::P_GAP,
    P_WS = const layout::P_WS,
    P_WS_PAGES = const layout::P_WS_PAGES,
    P_WS_TICKS = const layout::P_WS_TICKS,
    P_WS_SALT = const layout::P_WS_SALT,
    P_FILL = const layout::P_FILL,
    P_FILL_PAGES = const layout::P_FILL_PAGES,
    P_FILL_FIRST = const layout::P_FILL_FIRST,
    P_VCPU = const layout::P_VCPU,
    P_SETUP_COUNT = const layout::P_SETUP_COUNT,
    P_CHECK_COUNT = const layout::P_CHECK_COUNT,
    P_SETUP = const layout::P_SETUP,
    SETUP_BYTES = const layout::SETUP_BYTES,
    P_CHECKS = const layout::P_CHECKS,
    CHECK_EQUAL = const layout::CHECK_EQUAL,
    CHECK_RDPMC = const layout::CHECK_RDPMC,
    CHECK_OVERFLOW = const layout::CHECK_OVERFLOW,
    R_BEATS = const layout::R_BEATS,
    R_BEAT_TSC = const layout::R_BEAT_TSC,
    R_LOOPS = const layout::R_LOOPS,
    R_MAX_GAP = const layout::R_MAX_GAP,
    R_GAPS = const layout::R_GAPS,
    R_LAST_GAP = const layout::R_LAST_GAP,
    R_MARK_SEEN = const layout::R_MARK_SEEN,
    R_MARK = const layout::R_MARK,
    R_PMIS = const layout::R_PMIS,
    R_FAULTS = const layout::R_FAULTS,
    R_FIRST = const layout::R_FIRST,
    R_FIRST_WHERE = const layout::R_FIRST_WHERE,
    R_FIRST_EXPECTED = const layout::R_FIRST_EXPECTED,
    R_FIRST_GOT = const layout::R_FIRST_GOT,
    R_DIRTIED = const layout::R_DIRTIED,
    R_WS_PASS = const layout::R_WS_PASS,
    R_WS_NEXT = const layout::R_WS_NEXT,
    R_FILLED = const layout::R_FILLED,
    R_CHECKS = const layout::R_CHECKS,
    R_TSC_BACK = const layout::R_TSC_BACK,
    R_STAGE = const layout::R_STAGE,
    R_FRAME = const layout::R_FRAME,
    R_CHECK_POS = const layout::R_CHECK_POS,
    R_CHECK_WAIT = const layout::R_CHECK_WAIT,
    R_LINE_WAIT = const layout::R_LINE_WAIT,
    R_TX_POS = const layout::R_TX_POS,
    R_TX_LEN = const layout::R_TX_LEN,
    R_OVF_SEEN = const layout::R_OVF_SEEN,
    R_OVF_PMIS = const layout::R_OVF_PMIS,
    R_SLOTS = const layout::R_SLOTS,
    R_TX = const layout::R_TX,
    BLOCK = const layout::BLOCK,
    BLOCKS = const layout::BLOCKS,
    STAGE_SETUP = const layout::STAGE_SETUP,
    STAGE_RUNNING = const layout::STAGE_RUNNING,
    STAGE_HALTED = const layout::STAGE_HALTED,
    FAULT_SETUP = const layout::FAULT_SETUP,
    FAULT_READ = const layout::FAULT_READ,
    FAULT_SPURIOUS_PMI = const layout::FAULT_SPURIOUS_PMI,
    FAULT_EXCEPTION = const layout::FAULT_EXCEPTION,
    SPURIOUS_VECTOR = const layout::SPURIOUS_VECTOR,
    TURN_PAGES = const layout::TURN_PAGES,
    FILL_FACTOR = const layout::FILL_FACTOR.cast_signed(),
    COM1 = const layout::COM1,
);

// SAFETY: both are labels of the assembly above, around its bytes.
unsafe extern "C" {
    static vpmu_probe_start: u8;
    static vpmu_probe_end: u8;
}

/// The code blob with the offsets that its head names.
#[derive(Debug, Clone, Copy)]
pub(super) struct Blob {
    /// All bytes.
    pub bytes: &'static [u8],
    /// Ring-3 entry.
    pub entry: u32,
    /// int3 handler.
    pub gate: u32,
    /// #GP handler.
    pub gp: u32,
    /// Counter overflow handler.
    pub pmi: u32,
    /// Handler of spurious interrupts.
    pub ignore: u32,
    /// First of 32 exception stubs, eight bytes apart.
    pub vectors: u32,
}

/// The assembled guest.
pub(super) fn blob() -> Blob {
    let start = &raw const vpmu_probe_start;
    let end = &raw const vpmu_probe_end;
    let len = end.addr() - start.addr();
    // SAFETY: both symbols are defined by the assembly above, in this order and in one read-only section, so the
    // bytes between them are initialised, immutable and live as long as the program.
    let bytes = unsafe { std::slice::from_raw_parts(start, len) };
    let word =
        |i: usize| u32::from_le_bytes([bytes[i * 4], bytes[i * 4 + 1], bytes[i * 4 + 2], bytes[i * 4 + 3]]);
    Blob {
        bytes,
        entry: word(0),
        gate: word(1),
        gp: word(2),
        pmi: word(3),
        ignore: word(4),
        vectors: word(5),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blob_is_whole_and_fits() {
        let b = blob();
        assert!(b.bytes.len() as u64 <= layout::CODE_END - layout::CODE);
        for offset in [b.entry, b.gate, b.gp, b.pmi, b.ignore, b.vectors + 31 * 8] {
            assert!((offset as usize) < b.bytes.len(), "offset {offset:#x} of {:#x}", b.bytes.len());
        }
        // push imm8 / jmp: each stub must keep to its eight bytes, or the IDT would point into the middle of one.
        for v in 0..32u8 {
            let at = b.vectors as usize + usize::from(v) * 8;
            assert_eq!(&b.bytes[at..at + 2], &[0x6a, v], "stub of vector {v}");
        }
        assert_eq!(b.bytes[b.gate as usize..][..4], [0x41, 0x83, 0xf8, 0x01], "cmp r8d, 1");
    }
}
