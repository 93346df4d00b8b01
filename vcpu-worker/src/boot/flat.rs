//! Flat images: no header at all, so the file name says what it is.

use std::io::{Read as _, Seek as _};

use super::error::BootError;
use super::files::BootFile;
use super::{Loaded, map};
use crate::memory::GuestMemory;

/// Copies the whole file to 1 MiB.
pub(super) fn load(mem: &GuestMemory, kernel: &mut BootFile) -> Result<Loaded, BootError> {
    if kernel.len == 0 {
        return Err(BootError::NotAKernel { problem: "the file is empty".to_owned() });
    }
    let end = map::HIGH.saturating_add(kernel.len);
    if end > map::low_ram_end(mem) {
        return Err(BootError::TooLarge { what: "kernel", needed: end, memory: mem.bytes() });
    }
    kernel.file.rewind().map_err(|e| kernel.unreadable(e))?;
    // Bounded by guest memory, which was checked above.
    let mut bytes = Vec::new();
    (&kernel.file).take(kernel.len).read_to_end(&mut bytes).map_err(|e| kernel.unreadable(e))?;
    mem.write(map::HIGH, &bytes)?;
    Ok(Loaded { entry: map::HIGH, end })
}
