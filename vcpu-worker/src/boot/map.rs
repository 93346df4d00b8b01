//! What lies where below 1 MiB while a kernel starts.

use crate::memory::GuestMemory;

/// Flat GDT: null, unused, code 0x10, data 0x18 (the selectors of Linux's boot protocol).
pub(super) const GDT: u64 = 0x500;
/// Its limit.
pub(super) const GDT_LIMIT: u16 = 31;
/// PVH start info.
pub(super) const START_INFO: u64 = 0x6000;
/// PVH module list.
pub(super) const MODULES: u64 = 0x6100;
/// PVH memory map.
pub(super) const MEMMAP: u64 = 0x6200;
/// Linux zero page (boot_params).
pub(super) const ZERO_PAGE: u64 = 0x7000;
/// Command line, zero-terminated.
pub(super) const CMDLINE: u64 = 0x20000;
/// Conventional memory ends here (extended BIOS data area).
const LOW_END: u64 = 0x9fc00;
/// Kernels lie from here up.
pub(super) const HIGH: u64 = 1 << 20;

/// The GDT's bytes.
pub(super) fn gdt() -> [u8; 32] {
    let words: [u64; 4] = [0, 0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
    let mut out = [0; 32];
    for (bytes, word) in out.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    out
}

/// Usable RAM as (address, bytes), ascending.
pub(super) fn ram(mem: &GuestMemory) -> Vec<(u64, u64)> {
    let mut ram = vec![(0, LOW_END)];
    for r in mem.regions() {
        let start = r.gpa.max(HIGH);
        let end = r.gpa + r.len;
        if end > start {
            ram.push((start, end - start));
        }
    }
    ram
}

/// First byte behind the RAM below the hole: kernel and initrd lie below it.
pub(super) fn low_ram_end(mem: &GuestMemory) -> u64 {
    mem.regions().first().map_or(0, |r| r.gpa + r.len)
}
