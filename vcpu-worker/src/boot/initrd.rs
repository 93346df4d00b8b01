//! The initial RAM disk: at the top of low memory, page aligned, above the kernel.

use std::io::Read as _;

use super::error::BootError;
use super::files::BootFile;
use super::map;
use crate::memory::GuestMemory;

/// An initrd in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Initrd {
    /// Guest physical address.
    pub address: u64,
    /// Bytes.
    pub len: u64,
}

/// Copies the file to the highest page below `limit` and the end of low RAM; it must lie above `kernel_end`.
pub(super) fn load(
    mem: &GuestMemory,
    mut file: BootFile,
    kernel_end: u64,
    limit: u64,
) -> Result<Initrd, BootError> {
    let top = map::low_ram_end(mem).min(limit);
    let floor = kernel_end.next_multiple_of(4096);
    let too_large =
        || BootError::TooLarge { what: "initrd", needed: floor.saturating_add(file.len), memory: top };
    let address = top.checked_sub(file.len).ok_or_else(too_large)? & !0xfff;
    if address < floor {
        return Err(too_large());
    }
    let mut chunk = vec![0u8; 1 << 20];
    let mut done = 0;
    while done < file.len {
        let want = (file.len - done).min(chunk.len() as u64) as usize;
        let got = file.file.read(&mut chunk[..want]).map_err(|e| file.unreadable(e))?;
        if got == 0 {
            return Err(file.unreadable("it became shorter while it was read"));
        }
        mem.write(address + done, &chunk[..got])?;
        done += got as u64;
    }
    Ok(Initrd { address, len: file.len })
}
