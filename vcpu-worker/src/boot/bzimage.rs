//! bzImage kernels by the 32-bit boot protocol (Documentation/arch/x86/boot.rst).

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use vm_memory::ByteValued as _;

use super::error::BootError;
use super::files::BootFile;
use super::initrd::Initrd;
use super::map;
use crate::hypervisor::{EntryMode, InitialRegs};
use crate::memory::{GuestMemory, KernelFormat};

/// Protocol 2.10 (Linux 2.6.31) is the first that tells `init_size`.
const OLDEST: u16 = 0x20a;
/// type_of_loader: unregistered.
const LOADER: u8 = 0xff;
const E820_RAM: u32 = 1;

/// A bzImage in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct BzLoaded {
    header: setup_header,
    entry: u64,
    /// First byte behind what the kernel uses before it knows its memory.
    pub end: u64,
    /// First byte that an initrd must not reach.
    pub initrd_limit: u64,
}

/// Loads the protected-mode part to its preferred address.
pub(super) fn load(mem: &GuestMemory, kernel: &mut BootFile) -> Result<BzLoaded, BootError> {
    let setup_sects = kernel.at(0x1f1, 1)?.first().copied().unwrap_or(0);
    // Zero means four (boot.rst).
    let setup = (u64::from(if setup_sects == 0 { 4 } else { setup_sects }) + 1) * 512;
    let size = match kernel.len.checked_sub(setup) {
        Some(size) if size > 0 && kernel.len >= 0x270 => size,
        _ => {
            return Err(BootError::Truncated {
                problem: format!("{} bytes, its set-up part alone has {setup}", kernel.len),
            });
        }
    };
    let syssize = kernel.at(0x1f4, 4)?;
    let promised = syssize.try_into().map_or(0, |b| u64::from(u32::from_le_bytes(b)) * 16);
    // The field counts paragraphs, rounded up.
    if promised > size.next_multiple_of(16) {
        return Err(BootError::Truncated {
            problem: format!("its header promises {promised} bytes of kernel, the file has {size}"),
        });
    }
    // Where it goes: checked before linux-loader writes there.
    let load = kernel.at(0x214, 4)?.try_into().map_or(0, |b| u64::from(u32::from_le_bytes(b)));
    if load < map::HIGH {
        return Err(BootError::NotAKernel { problem: "a kernel that is loaded below 1 MiB".to_owned() });
    }
    let low_end = map::low_ram_end(mem);
    if load + size > low_end {
        return Err(BootError::TooLarge { what: "kernel", needed: load + size, memory: mem.bytes() });
    }
    let result = mem
        .load_kernel(KernelFormat::BzImage, &mut kernel.file)?
        .map_err(|e| BootError::NotAKernel { problem: e.to_string() })?;
    let header = result
        .setup_header
        .ok_or_else(|| BootError::NotAKernel { problem: "no set-up header".to_owned() })?;
    if header.version < OLDEST {
        let version = header.version;
        return Err(BootError::NotAKernel {
            problem: format!("boot protocol {version:#x} is older than 0x20a"),
        });
    }
    let end = load + size.max(u64::from(header.init_size));
    if end > low_end {
        return Err(BootError::TooLarge { what: "kernel", needed: end, memory: mem.bytes() });
    }
    let initrd_limit = u64::from(header.initrd_addr_max).saturating_add(1);
    Ok(BzLoaded { header, entry: load, end, initrd_limit })
}

/// Writes the zero page.
pub(super) fn finish(
    mem: &GuestMemory,
    kernel: BzLoaded,
    cmdline: &str,
    initrd: Option<Initrd>,
) -> Result<InitialRegs, BootError> {
    let limit = kernel.header.cmdline_size;
    if cmdline.len() as u64 > u64::from(limit) {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), limit: limit as usize });
    }
    let mut params = boot_params { hdr: kernel.header, ..boot_params::default() };
    params.hdr.type_of_loader = LOADER;
    params.hdr.cmd_line_ptr = map::CMDLINE as u32;
    params.hdr.cmdline_size = cmdline.len() as u32;
    if let Some(initrd) = initrd {
        // Below the 4 GiB hole, so both fit.
        params.hdr.ramdisk_image = initrd.address as u32;
        params.hdr.ramdisk_size = initrd.len as u32;
    }
    let ram = map::ram(mem);
    let mut table = params.e820_table;
    for (entry, &(addr, size)) in table.iter_mut().zip(&ram) {
        *entry = boot_e820_entry { addr, size, r#type: E820_RAM };
    }
    params.e820_table = table;
    params.e820_entries = ram.len() as u8;
    mem.write(map::ZERO_PAGE, params.as_slice())?;
    Ok(InitialRegs {
        mode: EntryMode::Protected32,
        rip: kernel.entry,
        rflags: 2,
        rsi: map::ZERO_PAGE,
        gdt: (map::GDT, map::GDT_LIMIT),
        ..InitialRegs::default()
    })
}
