//! The mapping itself, and every access of this process to it.
//!
//! Invariant: `base..base+len` is mapped readable and writable from `new` to `drop`, and every access is inside it.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::SealFlags;

use super::MemoryError;

/// A shared mapping of a whole memfd.
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: u64,
}

// SAFETY: the mapping is plain shared memory that stays until drop; all access is by copies, atomics or the kernel.
unsafe impl Send for Mapping {}
// SAFETY: as above; concurrent access yields some mix of old and new bytes, which callers are told.
unsafe impl Sync for Mapping {}

fn os(call: &'static str) -> MemoryError {
    MemoryError::Os { call, source: std::io::Error::last_os_error() }
}

/// What a memory file must be sealed against before it is mapped: cut short, it would kill whoever touches its end.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW);

/// An unlinked memory file of the given length, which can no longer change.
pub(super) fn create_memfd(name: &str, bytes: u64, huge: bool) -> Result<OwnedFd, MemoryError> {
    let mut name: Vec<u8> = name.bytes().filter(|b| *b != 0).take(200).collect();
    if name.is_empty() {
        name.extend_from_slice(b"guest");
    }
    let name = CString::new(name).unwrap_or_default();
    let huge = if huge { libc::MFD_HUGETLB | libc::MFD_HUGE_2MB } else { 0 };
    let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING | huge;
    // SAFETY: `name` is a NUL-terminated string that outlives the call; the result is checked.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), flags) };
    if fd < 0 {
        return Err(os("memfd_create"));
    }
    // SAFETY: `fd` was just returned by the kernel and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    rustix::fs::ftruncate(&fd, bytes).map_err(|e| MemoryError::Os { call: "ftruncate", source: e.into() })?;
    // SEAL too: nobody who gets the descriptor may forbid writing later.
    rustix::fs::fcntl_add_seals(&fd, SEALS | SealFlags::SEAL)
        .map_err(|e| MemoryError::Os { call: "F_ADD_SEALS", source: e.into() })?;
    Ok(fd)
}

/// A descriptor from another process is a memory file of exactly `bytes` that can neither shrink nor grow.
pub(super) fn check_foreign(fd: &OwnedFd, bytes: u64) -> Result<(), MemoryError> {
    let os = |call| move |e: rustix::io::Errno| MemoryError::Os { call, source: e.into() };
    let seals = rustix::fs::fcntl_get_seals(fd)
        .map_err(|_| MemoryError::Foreign { problem: "it is not a memory file" })?;
    if !seals.contains(SEALS) {
        return Err(MemoryError::Foreign { problem: "it is not sealed against a change of its size" });
    }
    let stat = rustix::fs::fstat(fd).map_err(os("fstat"))?;
    if u64::try_from(stat.st_size) != Ok(bytes) {
        return Err(MemoryError::Size { bytes, problem: "the memory handed over has another size" });
    }
    Ok(())
}

/// Whether a memory file is made of huge pages.
pub(super) fn is_hugetlb(fd: &OwnedFd) -> bool {
    const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
    rustix::fs::fstatfs(fd).is_ok_and(|stat| stat.f_type == HUGETLBFS_MAGIC)
}

impl Mapping {
    pub(super) fn new(fd: &OwnedFd, bytes: u64) -> Result<Self, MemoryError> {
        let len = usize::try_from(bytes)
            .map_err(|_| MemoryError::Size { bytes, problem: "does not fit this process's address space" })?;
        // Huge pages are set aside now: one that is short later would kill the process (SIGBUS).
        let huge = is_hugetlb(fd);
        let reserve = if huge { 0 } else { libc::MAP_NORESERVE };
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory; result checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | reserve,
                fd.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            let error = std::io::Error::last_os_error();
            if huge && error.raw_os_error() == Some(libc::ENOMEM) {
                return Err(super::backing::exhausted(bytes));
            }
            return Err(MemoryError::Os { call: "mmap", source: error });
        }
        let Some(base) = NonNull::new(base.cast::<u8>()) else { return Err(os("mmap")) };
        let mapping = Self { base, len: bytes };
        // SAFETY: exactly the mapping made above.
        if unsafe { libc::madvise(base.as_ptr().cast(), len, libc::MADV_DONTDUMP) } != 0 {
            return Err(os("madvise(MADV_DONTDUMP)"));
        }
        Ok(mapping)
    }

    /// Lets the kernel use huge pages where it can.
    pub(super) fn advise_huge(&self) -> Result<(), MemoryError> {
        // SAFETY: exactly this mapping; advice changes no content.
        let ret = unsafe { libc::madvise(self.base.as_ptr().cast(), self.len as usize, libc::MADV_HUGEPAGE) };
        if ret == 0 { Ok(()) } else { Err(os("madvise(MADV_HUGEPAGE)")) }
    }

    /// Gives every page of a piece its memory. Blocks.
    pub(super) fn populate(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        let at = self.pointer(offset, len)?;
        loop {
            // SAFETY: inside the mapping (checked); content is kept.
            if unsafe { libc::madvise(at.cast(), len as usize, libc::MADV_POPULATE_WRITE) } == 0 {
                return Ok(());
            }
            let source = std::io::Error::last_os_error();
            if source.kind() != std::io::ErrorKind::Interrupted {
                return Err(MemoryError::Os { call: "madvise(MADV_POPULATE_WRITE)", source });
            }
        }
    }

    /// Puts another file of the same length, checked by [`check_foreign`], into the place of this one, to be read only.
    pub(super) fn replace(&self, fd: &OwnedFd) -> Result<(), MemoryError> {
        // SAFETY: exactly the mapping made in `new` is replaced, in one step, by one of the same length and address, so
        // every pointer that is checked against it stays inside a mapping. What is read meanwhile is some mix of old
        // and new bytes, as callers are told; writers are kept out by the owner until `unlock`.
        let at = unsafe {
            libc::mmap(
                self.base.as_ptr().cast(),
                self.len as usize,
                libc::PROT_READ,
                libc::MAP_SHARED | libc::MAP_NORESERVE | libc::MAP_FIXED,
                fd.as_raw_fd(),
                0,
            )
        };
        if at == libc::MAP_FAILED {
            return Err(os("mmap(MAP_FIXED)"));
        }
        // SAFETY: exactly the mapping made above.
        if unsafe { libc::madvise(at, self.len as usize, libc::MADV_DONTDUMP) } != 0 {
            return Err(os("madvise(MADV_DONTDUMP)"));
        }
        Ok(())
    }

    /// Ends what `replace` began: it may be written.
    pub(super) fn unlock(&self) -> Result<(), MemoryError> {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: exactly this mapping, which stays readable; nothing is moved or lost.
        if unsafe { libc::mprotect(self.base.as_ptr().cast(), self.len as usize, access) } != 0 {
            return Err(os("mprotect"));
        }
        Ok(())
    }

    pub(super) fn len(&self) -> u64 {
        self.len
    }

    pub(super) fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    pub(super) fn check(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(MemoryError::OutOfRange {
                space: "memory offset",
                address: offset,
                len,
                memory: self.len,
            }),
        }
    }

    /// Pointer to `len` bytes at `offset`, checked.
    pub(super) fn pointer(&self, offset: u64, len: u64) -> Result<*mut u8, MemoryError> {
        self.check(offset, len)?;
        // SAFETY: offset is within the mapping, whose length fits usize.
        Ok(unsafe { self.base.as_ptr().add(offset as usize) })
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let from = self.pointer(offset, buf.len() as u64)?;
        // SAFETY: `from` is valid for buf.len() bytes (checked), `buf` is ours and cannot overlap the mapping, to
        // which no reference exists. The guest may write meanwhile: bytes are plain data and any mix is accepted.
        unsafe { std::ptr::copy_nonoverlapping(from.cast_const(), buf.as_mut_ptr(), buf.len()) };
        Ok(())
    }

    pub(super) fn write(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        let to = self.pointer(offset, data.len() as u64)?;
        // SAFETY: as in `read`, the other way round.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to, data.len()) };
        Ok(())
    }

    fn word(&self, offset: u64) -> Option<&AtomicU64> {
        let at = self.pointer(offset, 8).ok()?;
        if !(at as usize).is_multiple_of(8) {
            return None;
        }
        // SAFETY: inside the mapping for as long as &self lives, aligned, and AtomicU64 allows concurrent writers.
        Some(unsafe { AtomicU64::from_ptr(at.cast()) })
    }

    pub(super) fn load_u64(&self, offset: u64) -> Option<u64> {
        self.word(offset).map(|w| w.load(Ordering::Acquire))
    }

    pub(super) fn store_u64(&self, offset: u64, value: u64) -> Option<()> {
        self.word(offset).map(|w| w.store(value, Ordering::Release))
    }

    pub(super) fn is_zero(&self, offset: u64, len: u64) -> Result<bool, MemoryError> {
        let at = self.pointer(offset, len)?;
        let head = len.min(8);
        let mut first = [0u8; 8];
        self.read(offset, &mut first[..head as usize])?;
        if first != [0; 8] || len <= 8 {
            return Ok(first == [0; 8]);
        }
        // The C library's memcmp of the piece with itself shifted by 8 bytes: vectorised in every build profile.
        // SAFETY: both operands are inside the checked piece. A write of the guest meanwhile changes which answer
        // is given, nothing else.
        Ok(unsafe { libc::memcmp(at.cast(), at.add(8).cast(), (len - 8) as usize) } == 0)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `new`; no pointer into it outlives its owner.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len as usize) };
    }
}
