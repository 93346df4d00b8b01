//! Guest memory: one memfd, mapped shared, given to KVM in one or two slots.
//!
//! Two address spaces: guest physical addresses (`gpa`; RAM below 3 GiB, the rest from 4 GiB up) and memfd offsets
//! (`offset`; no holes), in which pages are counted, tracked and sent. The guest writes at any time, so no reference
//! to its memory ever leaves this module: data is copied in and out, or the kernel moves it (writev, readv), or, before
//! there is a guest, linux-loader writes a kernel into it.
//!
//! Invariants: the mapping lives as long as any clone; every access is checked against the length first; the memory
//! is left out of core dumps; the descriptor is closed on exec.

mod backing;
mod io;
mod loader;
mod mapping;
mod numa;
mod writes;

use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use crate::bitmap::PageBitmap;
pub use backing::HugePages;
pub(crate) use loader::KernelFormat;
use mapping::Mapping;
use writes::HostWrites;

/// Bytes of a page as tracked and sent.
pub const PAGE_SIZE: u64 = 4096;
/// Guest memory comes in multiples of this.
pub const GRANULE: u64 = 2 << 20;
/// RAM below this guest physical address; the 32-bit hole for devices follows.
pub const HOLE_START: u64 = 3 << 30;
/// RAM goes on here.
pub const HOLE_END: u64 = 4 << 30;
/// No guest is larger than this (4 TiB: what 4-level page tables with 48 bits and our slots surely hold).
pub const MAX_BYTES: u64 = 4 << 40;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The size cannot be given to a guest.
    #[error("memory size {bytes} bytes: {problem}; use a multiple of 2 MiB from 2 MiB to 4 TiB")]
    Size {
        /// Asked for.
        bytes: u64,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// An access outside of the guest's RAM.
    #[error("{space} {address:#x}+{len} is outside of the guest's {memory} bytes of memory")]
    OutOfRange {
        /// "guest address" or "memory offset".
        space: &'static str,
        /// Where.
        address: u64,
        /// How much.
        len: u64,
        /// Size of the memory.
        memory: u64,
    },
    /// An atomic access at an address that is not a multiple of 8.
    #[error("guest address {address:#x} is not a multiple of 8")]
    Unaligned {
        /// Where.
        address: u64,
    },
    /// What another process handed over cannot be a guest's memory.
    #[error(
        "the descriptor handed over cannot be guest memory: {problem}; move the machine by copying (mode precopy)"
    )]
    Foreign {
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The memory belongs to a guest that another worker may still run.
    #[error("guest memory that was handed over is not written before the grant")]
    Locked,
    /// The host's pool of huge pages is too small.
    #[error(
        "{wanted} huge pages of 2 MiB are wanted and {free} are free: raise vm.nr_hugepages by at least the difference, or \
         use ordinary pages"
    )]
    HugePages {
        /// Asked for.
        wanted: u64,
        /// There are.
        free: u64,
    },
    /// The host does not make huge pages of shared memory.
    #[error(
        "transparent huge pages of shared memory are {set:?} on this host: write advise to \
         /sys/kernel/mm/transparent_hugepage/shmem_enabled, or use ordinary pages"
    )]
    TransparentOff {
        /// What the switch says.
        set: String,
    },
    /// The operating system refused.
    #[error("{call} for guest memory failed: {source}")]
    Os {
        /// What was called.
        call: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl MemoryError {
    /// Field of the machine's spec that must be changed, where it is one's fault.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Size { .. } => Some("spec.memory_bytes"),
            Self::HugePages { .. } | Self::TransparentOff { .. } => Some("spec.memory_backing.huge_pages"),
            _ => None,
        }
    }

    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Size { .. } => "MEMORY_SIZE_INVALID",
            Self::OutOfRange { .. } => "MEMORY_OUT_OF_RANGE",
            Self::Unaligned { .. } => "MEMORY_UNALIGNED",
            Self::Foreign { .. } => "MEMORY_FOREIGN",
            Self::Locked => "MEMORY_LOCKED",
            Self::Os { .. } => "MEMORY_CALL_FAILED",
            Self::HugePages { .. } => "HUGE_PAGES_EXHAUSTED",
            Self::TransparentOff { .. } => "TRANSPARENT_HUGE_PAGES_OFF",
        }
    }
}

/// A piece of RAM as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// Guest physical address.
    pub gpa: u64,
    /// Where it is in the memfd.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
}

/// Memory of one guest; clones share it.
#[derive(Clone)]
pub struct GuestMemory {
    inner: Arc<Inner>,
}

struct Inner {
    mapping: Mapping,
    fd: OwnedFd,
    /// Another guest's memory, which is mapped instead of `fd` since it was handed over.
    foreign: OnceLock<OwnedFd>,
    /// It was handed over and must not be written yet.
    locked: AtomicBool,
    regions: Vec<Region>,
    writes: HostWrites,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "GuestMemory({} bytes)", self.bytes())
    }
}

impl GuestMemory {
    /// New zeroed memory; `name` appears in /proc/self/maps (cut to 200 bytes). No page is allocated yet.
    pub fn new(name: &str, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let fd = mapping::create_memfd(name, bytes, false)?;
        Self::from_fd(fd, bytes)
    }

    /// Maps the memfd of another process's guest, which must be exactly `bytes` long.
    pub fn from_fd(fd: OwnedFd, bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        mapping::check_foreign(&fd, bytes)?;
        let mapping = Mapping::new(&fd, bytes)?;
        let inner = Inner {
            mapping,
            fd,
            foreign: OnceLock::new(),
            locked: AtomicBool::new(false),
            regions: layout(bytes),
            writes: HostWrites::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Takes another guest's memory in the place of this one, which nobody has touched yet: at the same addresses, so
    /// that a VM built on it stays whole, and read-only until [`Self::unlock`]. That is enforced by the mapping itself:
    /// also KVM cannot write before. Once, for a VM whose vCPUs have not run.
    ///
    /// # Errors
    /// `Foreign`, `Size`, `Os`. After `Os` the memory is not fit for use.
    pub fn take_over(&self, fd: OwnedFd) -> Result<(), MemoryError> {
        mapping::check_foreign(&fd, self.bytes())?;
        if self.resident_pages().is_none_or(|pages| !pages.is_empty()) {
            return Err(MemoryError::Foreign { problem: "the memory that it would replace is in use" });
        }
        let foreign = || MemoryError::Foreign { problem: "another memory was handed over before" };
        self.inner.foreign.set(fd).map_err(|_| foreign())?;
        self.inner.locked.store(true, Ordering::SeqCst);
        self.inner.mapping.replace(self.inner.foreign.get().ok_or_else(foreign)?)
    }

    /// The right to run has come: memory that was handed over may be written. Does nothing to any other.
    ///
    /// # Errors
    /// `Os`.
    pub fn unlock(&self) -> Result<(), MemoryError> {
        if self.inner.locked.load(Ordering::SeqCst) {
            self.inner.mapping.unlock()?;
            self.inner.locked.store(false, Ordering::SeqCst);
        }
        Ok(())
    }

    fn writable(&self) -> Result<(), MemoryError> {
        if self.inner.locked.load(Ordering::SeqCst) { Err(MemoryError::Locked) } else { Ok(()) }
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.inner.mapping.len()
    }

    /// Size in pages of 4 KiB.
    pub fn pages(&self) -> u64 {
        self.bytes() / PAGE_SIZE
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.inner.foreign.get().unwrap_or(&self.inner.fd).as_fd()
    }

    /// RAM as the guest sees it, ascending; one region up to 3 GiB, else two.
    pub fn regions(&self) -> &[Region] {
        &self.inner.regions
    }

    /// Where `len` bytes at a guest address are in the memfd; None if they are not all RAM.
    pub fn offset_of(&self, gpa: u64, len: u64) -> Option<u64> {
        let end = gpa.checked_add(len)?;
        let region = self.regions().iter().find(|r| gpa >= r.gpa && end <= r.gpa + r.len)?;
        Some(region.offset + (gpa - region.gpa))
    }

    /// Guest address of a memfd offset.
    pub fn gpa_of(&self, offset: u64) -> Option<u64> {
        let region = self.regions().iter().find(|r| offset >= r.offset && offset < r.offset + r.len)?;
        Some(region.gpa + (offset - region.offset))
    }

    fn translate(&self, gpa: u64, len: usize) -> Result<u64, MemoryError> {
        self.offset_of(gpa, len as u64).ok_or(MemoryError::OutOfRange {
            space: "guest address",
            address: gpa,
            len: len as u64,
            memory: self.bytes(),
        })
    }

    /// Copies out of the guest. Not atomic: the guest may write meanwhile.
    pub fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let offset = self.translate(gpa, buf.len())?;
        self.inner.mapping.read(offset, buf)
    }

    /// Copies into the guest. Not atomic.
    pub fn write(&self, gpa: u64, data: &[u8]) -> Result<(), MemoryError> {
        let offset = self.translate(gpa, data.len())?;
        self.write_at(offset, data)
    }

    /// Atomic load (acquire) of an aligned word.
    pub fn load_u64(&self, gpa: u64) -> Result<u64, MemoryError> {
        let offset = self.translate(gpa, 8)?;
        self.inner.mapping.load_u64(offset).ok_or(MemoryError::Unaligned { address: gpa })
    }

    /// Atomic store (release) of an aligned word.
    pub fn store_u64(&self, gpa: u64, value: u64) -> Result<(), MemoryError> {
        let offset = self.translate(gpa, 8)?;
        self.writable()?;
        self.inner.mapping.store_u64(offset, value).ok_or(MemoryError::Unaligned { address: gpa })?;
        self.inner.writes.mark(offset, 8);
        Ok(())
    }

    /// Copies out of the memfd.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        self.inner.mapping.read(offset, buf)
    }

    /// Copies into the memfd.
    pub fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), MemoryError> {
        self.writable()?;
        self.inner.mapping.write(offset, data)?;
        self.inner.writes.mark(offset, data.len() as u64);
        Ok(())
    }

    /// Begins to note, or forgets, what this process writes (`write`, `write_at`, `store_u64`, `discard`): KVM's
    /// dirty log sees the guest's writes and KVM's own, not ours. `recv_into` is not noted: it fills the memory of a
    /// guest that does not run.
    pub fn track_writes(&self, on: bool) {
        self.inner.writes.track(on, self.pages());
    }

    /// Moves the pages written by this process since the last call into `into` (ored).
    pub fn take_writes(&self, into: &mut PageBitmap) {
        self.inner.writes.take(into);
    }

    /// Whether a piece of the memfd is all zero. A page that was never touched gets mapped by looking at it: ask
    /// [`Self::resident_pages`] first.
    pub fn is_zero(&self, offset: u64, len: u64) -> Result<bool, MemoryError> {
        self.inner.mapping.is_zero(offset, len)
    }

    /// Makes whole pages of the memfd read as zero and gives them back to the host.
    pub fn discard(&self, offset: u64, len: u64) -> Result<(), MemoryError> {
        self.inner.mapping.check(offset, len)?;
        if !offset.is_multiple_of(PAGE_SIZE) || !len.is_multiple_of(PAGE_SIZE) {
            return Err(MemoryError::Unaligned { address: offset });
        }
        if len == 0 {
            return Ok(());
        }
        self.writable()?;
        let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(self.fd(), flags, offset, len)
            .map_err(|e| MemoryError::Os { call: "fallocate", source: e.into() })?;
        self.inner.writes.mark(offset, len);
        Ok(())
    }

    /// Pages that were ever touched: all others are zero and need not be read. None where the kernel cannot tell.
    pub fn resident_pages(&self) -> Option<PageBitmap> {
        use rustix::fs::SeekFrom;
        let mut pages = PageBitmap::new(self.pages());
        let mut at = 0;
        // Positions are absolute, so that two threads seeking on the same descriptor do not disturb each other.
        while at < self.bytes() {
            let data = match rustix::fs::seek(self.fd(), SeekFrom::Data(at)) {
                Ok(data) => data,
                Err(rustix::io::Errno::NXIO) => break,
                Err(_) => return None,
            };
            let hole = rustix::fs::seek(self.fd(), SeekFrom::Hole(data)).ok()?;
            if hole <= data {
                return None;
            }
            let (first, end) = (data / PAGE_SIZE, hole.div_ceil(PAGE_SIZE));
            pages.set_range(first, end - first);
            at = hole;
        }
        Some(pages)
    }

    /// CRC-32C over pieces of the memfd, in order, continuing from `seed` (0 to begin).
    pub fn crc32c(&self, ranges: &[(u64, u64)], seed: u32) -> Result<u32, MemoryError> {
        // Through a buffer: the guest may write meanwhile, and no reference to its memory may exist then.
        let mut buf = vec![0u8; 32 << 10];
        let mut crc = seed;
        for &(offset, len) in ranges {
            self.inner.mapping.check(offset, len)?;
            let mut done = 0;
            while done < len {
                let here = (len - done).min(buf.len() as u64) as usize;
                self.inner.mapping.read(offset + done, &mut buf[..here])?;
                crc = crc32c::crc32c_append(crc, &buf[..here]);
                done += here as u64;
            }
        }
        Ok(crc)
    }

    /// Sends a header and then pieces of the memfd with writev until all is written. Blocks; a timeout set on the
    /// socket ends it with `WouldBlock`. A piece outside of the memory is `InvalidInput` and nothing is sent.
    pub fn send_vectored(
        &self,
        fd: BorrowedFd<'_>,
        header: &[u8],
        ranges: &[(u64, u64)],
    ) -> std::io::Result<()> {
        io::send(&self.inner.mapping, fd, header, ranges)
    }

    /// Reads pieces of the memfd with readv until all is there. Blocks; end of file is `UnexpectedEof`. A piece
    /// outside of the memory is `InvalidInput` and nothing is read.
    pub fn recv_into(&self, fd: BorrowedFd<'_>, ranges: &[(u64, u64)]) -> std::io::Result<()> {
        self.writable().map_err(std::io::Error::other)?;
        io::recv(&self.inner.mapping, fd, ranges)
    }

    /// Where the memfd begins in this process, for userfaultfd.
    pub(crate) fn address(&self) -> u64 {
        self.inner.mapping.address()
    }

    /// Address in this process of a region, for KVM's memory slots.
    pub(crate) fn host_address(&self, region: &Region) -> u64 {
        self.inner.mapping.address() + region.offset
    }
}

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    let problem = if bytes == 0 {
        "zero"
    } else if !bytes.is_multiple_of(GRANULE) {
        "not a multiple of 2 MiB"
    } else if bytes > MAX_BYTES {
        "too large"
    } else {
        return Ok(());
    };
    Err(MemoryError::Size { bytes, problem })
}

fn layout(bytes: u64) -> Vec<Region> {
    let low = bytes.min(HOLE_START);
    let mut regions = vec![Region { gpa: 0, offset: 0, len: low }];
    if bytes > low {
        regions.push(Region { gpa: HOLE_END, offset: low, len: bytes - low });
    }
    regions
}

#[cfg(test)]
mod tests;
