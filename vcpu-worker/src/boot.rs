//! Puts a kernel from the host's file system into guest memory: a PVH ELF, a bzImage, or a flat image.
//!
//! * ELF with a PVH note (Linux `vmlinux`, unikernels): segments at their physical addresses, entered at the note's
//!   address in 32-bit protected mode with EBX = start info (`xen/include/public/arch-x86/hvm/start_info.h`).
//! * bzImage: the 32-bit boot protocol (Documentation/arch/x86/boot.rst), ESI = zero page.
//! * flat image: a file whose name ends in `.flat`; copied to 1 MiB and entered there as PVH is.
//!
//! Addresses below 1 MiB that are used: see [`map`]. The memory must be fresh, and nothing is tracked or running yet.
//! One processor is described to the guest: there are no ACPI or MP tables.

mod bzimage;
mod error;
mod files;
mod flat;
mod initrd;
mod map;
mod pvh;

use std::path::Path;

use vpmu_proto::api::KernelBoot;

pub use error::BootError;
use files::BootFile;

use crate::hypervisor::InitialRegs;
use crate::memory::GuestMemory;

/// Longest kernel command line in bytes (COMMAND_LINE_SIZE of x86 Linux less its terminating zero).
pub const CMDLINE_MAX: usize = 2047;

/// Loads a kernel and says how the first vCPU starts. Everything about files, sizes and text is checked before the
/// first byte is written, as far as headers tell.
pub fn load(mem: &GuestMemory, spec: &KernelBoot) -> Result<InitialRegs, BootError> {
    check_cmdline(&spec.cmdline)?;
    let path = Path::new(&spec.path);
    let mut kernel = BootFile::open("kernel", path)?;
    let initrd = match spec.initrd_path.as_str() {
        "" => None,
        path => Some(BootFile::open("initrd", Path::new(path))?),
    };
    let head = kernel.head(0x300)?;
    let loaded = if head.starts_with(b"\x7fELF") {
        Kind::Pvh(pvh::load(mem, &mut kernel)?)
    } else if head.get(0x202..0x206) == Some(b"HdrS".as_slice()) {
        Kind::BzImage(Box::new(bzimage::load(mem, &mut kernel)?))
    } else if path.extension().is_some_and(|e| e == "flat") {
        Kind::Pvh(flat::load(mem, &mut kernel)?)
    } else {
        let start: Vec<String> = head.iter().take(4).map(|b| format!("{b:02x}")).collect();
        return Err(BootError::NotAKernel { problem: format!("it begins with bytes {}", start.join(" ")) });
    };
    let (kernel_end, limit) = match &loaded {
        Kind::Pvh(k) => (k.end, u64::MAX),
        Kind::BzImage(k) => (k.end, k.initrd_limit),
    };
    let initrd = initrd.map(|file| initrd::load(mem, file, kernel_end, limit)).transpose()?;
    let mut cmdline = spec.cmdline.clone().into_bytes();
    cmdline.push(0);
    mem.write(map::CMDLINE, &cmdline)?;
    mem.write(map::GDT, &map::gdt())?;
    match loaded {
        Kind::Pvh(k) => pvh::finish(mem, k.entry, initrd),
        Kind::BzImage(k) => bzimage::finish(mem, *k, &spec.cmdline, initrd),
    }
}

enum Kind {
    Pvh(Loaded),
    BzImage(Box<bzimage::BzLoaded>),
}

/// A kernel in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Loaded {
    /// Where it is entered.
    entry: u64,
    /// First byte behind it, uninitialised data included.
    end: u64,
}

fn check_cmdline(cmdline: &str) -> Result<(), BootError> {
    if cmdline.len() > CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong { len: cmdline.len(), limit: CMDLINE_MAX });
    }
    match cmdline.bytes().enumerate().find(|(_, b)| !(0x20..0x7f).contains(b)) {
        Some((at, byte)) => Err(BootError::CmdlineByte { at, byte }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
