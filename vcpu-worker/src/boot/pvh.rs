//! ELF images with a PVH entry note.
//!
//! linux-loader reads the segments and the note; because its errors do not tell a short file from small memory, the
//! headers are checked here first. Nothing is trusted: every sum is checked.

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::start_info;

use super::error::BootError;
use super::files::BootFile;
use super::initrd::Initrd;
use super::{Loaded, map};
use crate::hypervisor::{EntryMode, InitialRegs};
use crate::memory::{GuestMemory, KernelFormat};

const HEADER: u64 = 64;
const PROGRAM_HEADER: u64 = 56;
const PT_LOAD: u32 = 1;
const EM_X86_64: u16 = 62;

fn u16_at(b: &[u8], at: usize) -> u16 {
    b.get(at..at + 2).and_then(|s| s.try_into().ok()).map_or(0, u16::from_le_bytes)
}

fn u32_at(b: &[u8], at: usize) -> u32 {
    b.get(at..at + 4).and_then(|s| s.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(b: &[u8], at: usize) -> u64 {
    b.get(at..at + 8).and_then(|s| s.try_into().ok()).map_or(0, u64::from_le_bytes)
}

/// Checks headers against the file and the guest's memory; returns the first byte behind all segments.
fn check(mem: &GuestMemory, kernel: &mut BootFile) -> Result<u64, BootError> {
    let header = kernel.head(HEADER)?;
    let truncated = |problem: String| BootError::Truncated { problem };
    if (header.len() as u64) < HEADER {
        return Err(truncated(format!("{} bytes, an ELF header has {HEADER}", header.len())));
    }
    let no = |problem: &str| Err(BootError::NotAKernel { problem: problem.to_owned() });
    if header.get(4..6) != Some(&[2, 1]) || u16_at(&header, 18) != EM_X86_64 {
        return no("an ELF, but not a little-endian 64-bit x86-64 one");
    }
    if u64::from(u16_at(&header, 54)) != PROGRAM_HEADER {
        return no("an ELF with program headers of another size than 56 bytes");
    }
    let count = u64::from(u16_at(&header, 56));
    let bytes = count * PROGRAM_HEADER;
    let headers = kernel.at(u64_at(&header, 32).min(i64::MAX as u64), bytes)?;
    if (headers.len() as u64) < bytes {
        return Err(truncated("the file ends within its program headers".to_owned()));
    }
    let mut end = 0;
    for h in headers.chunks_exact(PROGRAM_HEADER as usize).filter(|h| u32_at(h, 0) == PT_LOAD) {
        let (offset, address) = (u64_at(h, 8), u64_at(h, 24));
        let (in_file, in_memory) = (u64_at(h, 32), u64_at(h, 40));
        if offset.checked_add(in_file).is_none_or(|e| e > kernel.len) {
            return Err(truncated(format!(
                "a segment wants {in_file} bytes at {offset}, the file has {}",
                kernel.len
            )));
        }
        if address < map::HIGH {
            return no("a segment lies below 1 MiB, where the boot data are");
        }
        let needed = address.saturating_add(in_file.max(in_memory));
        if needed > map::low_ram_end(mem) {
            return Err(BootError::TooLarge { what: "kernel", needed, memory: mem.bytes() });
        }
        end = needed.max(end);
    }
    if end == 0 {
        return no("an ELF with nothing to load");
    }
    Ok(end)
}

/// Loads the segments and finds the entry.
pub(super) fn load(mem: &GuestMemory, kernel: &mut BootFile) -> Result<Loaded, BootError> {
    let end = check(mem, kernel)?;
    let result = mem
        .load_kernel(KernelFormat::Elf, &mut kernel.file)?
        .map_err(|e| BootError::NotAKernel { problem: e.to_string() })?;
    match result.pvh_boot_cap {
        PvhBootCapability::PvhEntryPresent(entry) if entry.0 < end && entry.0 >= map::HIGH => {
            Ok(Loaded { entry: entry.0, end })
        }
        PvhBootCapability::PvhEntryPresent(entry) => {
            Err(BootError::NotAKernel { problem: format!("its PVH entry {:#x} lies outside of it", entry.0) })
        }
        _ => Err(BootError::NotAKernel { problem: "an ELF without a PVH entry note".to_owned() }),
    }
}

/// Writes start info, module list and memory map.
pub(super) fn finish(
    mem: &GuestMemory,
    entry: u64,
    initrd: Option<Initrd>,
) -> Result<InitialRegs, BootError> {
    let ram = map::ram(mem);
    let mut memmap = Vec::new();
    for (addr, size) in &ram {
        memmap.extend_from_slice(&addr.to_le_bytes());
        memmap.extend_from_slice(&size.to_le_bytes());
        memmap.extend_from_slice(&start_info::XEN_HVM_MEMMAP_TYPE_RAM.to_le_bytes());
        memmap.extend_from_slice(&[0; 4]);
    }
    mem.write(map::MEMMAP, &memmap)?;
    if let Some(initrd) = initrd {
        let mut module = Vec::new();
        for word in [initrd.address, initrd.len, 0, 0] {
            module.extend_from_slice(&word.to_le_bytes());
        }
        mem.write(map::MODULES, &module)?;
    }
    // struct hvm_start_info, version 1.
    let mut info = Vec::new();
    for half in [start_info::XEN_HVM_START_MAGIC_VALUE, 1, 0, u32::from(initrd.is_some())] {
        info.extend_from_slice(&half.to_le_bytes());
    }
    for word in [if initrd.is_some() { map::MODULES } else { 0 }, map::CMDLINE, 0, map::MEMMAP] {
        info.extend_from_slice(&word.to_le_bytes());
    }
    info.extend_from_slice(&(ram.len() as u32).to_le_bytes());
    info.extend_from_slice(&[0; 4]);
    mem.write(map::START_INFO, &info)?;
    Ok(InitialRegs {
        mode: EntryMode::Protected32,
        rip: entry,
        rflags: 2,
        rbx: map::START_INFO,
        gdt: (map::GDT, map::GDT_LIMIT),
        ..InitialRegs::default()
    })
}
