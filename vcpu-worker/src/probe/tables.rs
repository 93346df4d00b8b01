//! Descriptor and page tables as bytes. Pure.

use super::layout::{self, PAGE};

const PRESENT: u64 = 1;
const WRITE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const NO_CACHE: u64 = 1 << 4;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const LARGE: u64 = 1 << 7;
const TABLE: u64 = PRESENT | WRITE | USER | ACCESSED;
const GIB: u64 = 1 << 30;
const LARGE_PAGE: u64 = 2 << 20;
/// RAM below the hole for 32-bit devices ends here.
const HOLE: u64 = crate::memory::HOLE_START;
const HOLE_BYTES: u64 = crate::memory::HOLE_END - crate::memory::HOLE_START;

/// Where the page tables begin: behind the last vCPU block.
pub(super) fn page_tables(vcpus: u32) -> u64 {
    layout::BLOCKS + u64::from(vcpus) * layout::BLOCK
}

/// Pages that the page tables take: PML4, two page directory pointer tables, one directory for each GiB of RAM, one
/// for the local APIC.
fn table_pages(memory: u64) -> u64 {
    4 + memory.div_ceil(GIB)
}

/// First byte behind everything that the loader writes.
pub(super) fn first_free(vcpus: u32, memory: u64) -> u64 {
    page_tables(vcpus).saturating_add(table_pages(memory).saturating_mul(PAGE))
}

/// Page tables for `memory` bytes (multiple of 2 MiB, at most 512 GiB) at address `at`: virtual address = memory
/// offset, and the local APIC at [`layout::LAPIC_VA`]. Every page may be used from ring 3.
pub(super) fn build_page_tables(at: u64, memory: u64) -> Vec<u8> {
    let directories = memory.div_ceil(GIB);
    let (pdpt, pdpt_apic, pd_apic, pd) = (at + PAGE, at + 2 * PAGE, at + 3 * PAGE, at + 4 * PAGE);
    let mut out = vec![0u8; (table_pages(memory) * PAGE) as usize];
    let mut put = |table: u64, index: u64, entry: u64| {
        let here = (table - at + index * 8) as usize;
        out[here..here + 8].copy_from_slice(&entry.to_le_bytes());
    };
    put(at, 0, pdpt | TABLE);
    put(at, layout::LAPIC_VA >> 39, pdpt_apic | TABLE);
    put(pdpt_apic, 0, pd_apic | TABLE);
    put(pd_apic, 0, layout::LAPIC_PAGE | TABLE | DIRTY | LARGE | NO_CACHE);
    for i in 0..directories {
        put(pdpt, i, (pd + i * PAGE) | TABLE);
    }
    for i in 0..memory / LARGE_PAGE {
        let offset = i * LARGE_PAGE;
        let gpa = if offset < HOLE { offset } else { offset + HOLE_BYTES };
        // Dirty and accessed are set from the start: the processor then never writes to the tables.
        put(pd + i / 512 * PAGE, i % 512, gpa | TABLE | DIRTY | LARGE);
    }
    out
}

/// Limit of a GDT for `vcpus`.
pub(super) fn gdt_limit(vcpus: u32) -> u16 {
    (0x28 + 16 * vcpus - 1) as u16
}

/// GDT: null, kernel code 0x08 and data 0x10, user data 0x18 and code 0x20, a TSS descriptor a vCPU from 0x28.
pub(super) fn build_gdt(vcpus: u32) -> Vec<u8> {
    let mut words =
        vec![0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
    for vcpu in 0..vcpus {
        let base = layout::block(vcpu) + layout::P_TSS;
        // SDM volume 3 section 8.2.3: 64-bit TSS descriptor, type 11 (busy: it is loaded by the VMM).
        words.push(
            u64::from(layout::TSS_LIMIT) | (base & 0xff_ffff) << 16 | 0x8b << 40 | (base >> 24 & 0xff) << 56,
        );
        words.push(base >> 32);
    }
    words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect()
}

/// TSS selector of a vCPU.
pub(super) fn tss_selector(vcpu: u32) -> u16 {
    (0x28 + 16 * vcpu) as u16
}

/// 64-bit TSS with a ring-0 stack and no I/O permission bitmap.
pub(super) fn build_tss(rsp0: u64) -> [u8; layout::TSS_LIMIT as usize + 1] {
    let mut tss = [0u8; layout::TSS_LIMIT as usize + 1];
    tss[4..12].copy_from_slice(&rsp0.to_le_bytes());
    tss[0x66..0x68].copy_from_slice(&(layout::TSS_LIMIT as u16 + 1).to_le_bytes());
    tss
}

/// An interrupt gate: handler address, and whether ring 3 may use it by int3.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gate {
    /// Vector.
    pub vector: u8,
    /// Handler.
    pub handler: u64,
    /// Descriptor privilege level 3.
    pub user: bool,
}

/// A whole IDT of 256 gates; vectors that are not given are not present.
pub(super) fn build_idt(gates: &[Gate]) -> Vec<u8> {
    let mut idt = vec![0u8; 4096];
    for gate in gates {
        let h = gate.handler;
        let kind: u64 = if gate.user { 0xee } else { 0x8e };
        let low = h & 0xffff | 0x08 << 16 | kind << 40 | (h >> 16 & 0xffff) << 48;
        let at = usize::from(gate.vector) * 16;
        idt[at..at + 8].copy_from_slice(&low.to_le_bytes());
        idt[at + 8..at + 16].copy_from_slice(&(h >> 32).to_le_bytes());
    }
    idt
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Walks the tables as the processor does.
    fn walk(tables: &[u8], at: u64, va: u64) -> Option<(u64, u64)> {
        let entry = |table: u64, index: u64| {
            let here = (table - at + index * 8) as usize;
            u64::from_le_bytes(tables[here..here + 8].try_into().unwrap())
        };
        let mut table = at;
        for shift in [39, 30] {
            let e = entry(table, va >> shift & 511);
            if e & (PRESENT | USER | WRITE) != PRESENT | USER | WRITE {
                return None;
            }
            table = e & !0xfff;
        }
        let e = entry(table, va >> 21 & 511);
        if e & (PRESENT | LARGE) != PRESENT | LARGE {
            return None;
        }
        Some(((e & !0x1f_ffff) + (va & 0x1f_ffff), e))
    }

    proptest! {
        #[test]
        fn every_offset_maps_to_its_guest_address(granules in 1u64..8192, pick: u64) {
            let memory = granules * LARGE_PAGE;
            let at = page_tables(2);
            let t = build_page_tables(at, memory);
            let offset = pick % memory;
            let gpa = if offset < HOLE { offset } else { offset + GIB };
            prop_assert_eq!(walk(&t, at, offset).map(|w| w.0), Some(gpa));
            prop_assert_eq!(walk(&t, at, memory), None);
            let (apic, entry) = walk(&t, at, layout::LAPIC_VA + 0x340).unwrap();
            prop_assert_eq!(apic, 0xfee0_0340);
            prop_assert!(entry & NO_CACHE != 0);
            prop_assert_eq!(at + t.len() as u64, first_free(2, memory));
        }
    }

    #[test]
    fn descriptors_have_the_architecture_s_form() {
        let gdt = build_gdt(2);
        assert_eq!(gdt.len() as u16 - 1, gdt_limit(2));
        let tss1 = u64::from_le_bytes(gdt[0x38..0x40].try_into().unwrap());
        let base = layout::block(1) + layout::P_TSS;
        assert_eq!(tss1 >> 16 & 0xff_ffff | tss1 >> 56 << 24, base);
        assert_eq!(tss1 & 0xffff, 0x67);
        assert!(layout::GDT + build_gdt(layout::MAX_VCPUS).len() as u64 <= layout::IDT);
        let idt = build_idt(&[Gate { vector: 3, handler: 0x1234_5678_9abc, user: true }]);
        assert_eq!(&idt[48..64], &[0xbc, 0x9a, 8, 0, 0, 0xee, 0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, 0, 0]);
    }
}
