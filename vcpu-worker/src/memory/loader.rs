//! linux-loader's way into guest memory.
//!
//! It wants vm-memory's types. They are given the mapping that is there: a second one of the same memory would cost every
//! start a mapping, the page faults of it and, at its end, a word to all machines of the process (the kernel tells each of
//! them of pages that go). Invariant: what borrows the mapping here does not leave this module.
#![allow(unsafe_code)]

use std::fs::File;

use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{KernelLoader as _, KernelLoaderResult};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use super::{GuestMemory, MemoryError, Region};

/// Kinds of kernels that linux-loader reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum KernelFormat {
    /// An ELF image: its segments at their physical addresses.
    Elf,
    /// A bzImage: its protected-mode part at its preferred address.
    BzImage,
}

impl GuestMemory {
    /// Loads a kernel; how that went is in the inner result.
    ///
    /// # Errors
    /// `Locked`, if the memory must not be written yet; `Os`, if it cannot be shown to linux-loader.
    pub(crate) fn load_kernel(
        &self,
        format: KernelFormat,
        file: &mut File,
    ) -> Result<Result<KernelLoaderResult, linux_loader::loader::Error>, MemoryError> {
        self.writable()?;
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let mut regions = Vec::with_capacity(self.regions().len());
        for Region { gpa, offset, len } in self.regions() {
            let at = self.inner.mapping.pointer(*offset, *len)?;
            // SAFETY: `len` bytes from `at` are inside the mapping (checked), which is readable, writable (checked) and
            // stays for as long as `self`; all that is made of it is dropped in this function, and dropping does not unmap
            // what was there.
            let region = unsafe { MmapRegion::<()>::build_raw(at, *len as usize, access, flags) };
            let region = GuestRegionMmap::new(region.map_err(refused)?, GuestAddress(*gpa));
            regions.push(region.ok_or_else(|| refused("a region beyond the address space"))?);
        }
        let memory = GuestMemoryMmap::from_regions(regions).map_err(refused)?;
        let loaded = match format {
            KernelFormat::Elf => Elf::load(&memory, None, file, None),
            KernelFormat::BzImage => BzImage::load(&memory, None, file, None),
        };
        // What linux-loader writes is not seen here.
        self.inner.writes.mark(0, self.bytes());
        Ok(loaded)
    }
}

fn refused(problem: impl std::fmt::Display) -> MemoryError {
    let source = std::io::Error::other(problem.to_string());
    MemoryError::Os { call: "describing it to linux-loader", source }
}
