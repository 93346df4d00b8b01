//! KVM's own statistics (KVM_GET_STATS_FD): described once, then read without stopping anybody.
//!
//! Everything that the descriptor says about itself is bounded before it is used.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd as _};
use std::os::unix::fs::FileExt as _;

use super::{ioc, last_os};
use crate::hypervisor::HvError;

const KVM_GET_STATS_FD: libc::c_ulong = ioc(0, 0xce, 0);
/// `struct kvm_stats_header`: flags, name_size, num_desc, id_offset, desc_offset, data_offset.
const HEADER: usize = 24;
/// `struct kvm_stats_desc` before its name: flags, exponent, size, offset, bucket_size.
const DESCRIPTION: usize = 16;

const _: () = {
    assert!(KVM_GET_STATS_FD == 0xaece);
    assert!(size_of::<kvm_bindings::kvm_stats_header>() == HEADER);
    assert!(size_of::<kvm_bindings::kvm_stats_desc>() == DESCRIPTION);
};

/// One figure.
struct Described {
    name: String,
    /// Words.
    size: usize,
    /// Where in the data, bytes.
    offset: usize,
}

/// The statistics of a VM or a vCPU.
pub(crate) struct StatsFd {
    file: File,
    data_offset: u64,
    data_bytes: usize,
    figures: Vec<Described>,
}

fn u32_at(bytes: &[u8], at: usize) -> usize {
    bytes.get(at..).and_then(|b| b.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b) as usize)
}

impl StatsFd {
    /// Opens and reads the descriptions; None where this KVM has none.
    pub(crate) fn open(fd: &impl AsRawFd) -> Result<Option<Self>, HvError> {
        // SAFETY: takes no argument and returns a new descriptor.
        let stats = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD, 0) };
        if stats < 0 {
            let error = last_os("KVM_GET_STATS_FD");
            let unknown = [libc::ENOTTY, libc::EINVAL];
            let HvError::Os { source, .. } = &error else { return Err(error) };
            return if source.raw_os_error().is_some_and(|e| unknown.contains(&e)) {
                Ok(None)
            } else {
                Err(error)
            };
        }
        // SAFETY: just returned by the kernel, nobody else has it.
        let file = unsafe { File::from_raw_fd(stats) };
        Self::describe(file)
            .map(Some)
            .map_err(|source| HvError::Os { call: "read of KVM's statistics", source })
    }

    fn describe(file: File) -> std::io::Result<Self> {
        let odd = || std::io::Error::other("KVM describes its statistics in a way that makes no sense");
        let mut header = [0u8; HEADER];
        file.read_exact_at(&mut header, 0)?;
        let [name_size, count, desc_offset, data_offset] = [4, 8, 16, 20].map(|at| u32_at(&header, at));
        if name_size > 256 || count > 1024 {
            return Err(odd());
        }
        let each = DESCRIPTION + name_size;
        let mut bytes = vec![0u8; each * count];
        file.read_exact_at(&mut bytes, desc_offset as u64)?;
        let mut figures = Vec::with_capacity(count);
        let mut data_bytes = 0;
        for description in bytes.chunks_exact(each) {
            let size = description.get(6..8).map_or(0, |b| usize::from(u16::from_le_bytes([b[0], b[1]])));
            let offset = u32_at(description, 8);
            let end = offset.saturating_add(size * 8);
            if size == 0 || end > 1 << 20 {
                return Err(odd());
            }
            data_bytes = data_bytes.max(end);
            let name = description[DESCRIPTION..].split(|b| *b == 0).next().unwrap_or_default();
            figures.push(Described { name: String::from_utf8_lossy(name).into_owned(), size, offset });
        }
        Ok(Self { file, data_offset: data_offset as u64, data_bytes, figures })
    }

    /// All figures now: name and words (one, or a histogram's buckets).
    pub(crate) fn read(&self) -> Result<Vec<(String, Vec<u64>)>, HvError> {
        let mut data = vec![0u8; self.data_bytes];
        self.file
            .read_exact_at(&mut data, self.data_offset)
            .map_err(|source| HvError::Os { call: "read of KVM's statistics", source })?;
        let words = |f: &Described| {
            data[f.offset..f.offset + f.size * 8]
                .as_chunks::<8>()
                .0
                .iter()
                .map(|w| u64::from_le_bytes(*w))
                .collect()
        };
        Ok(self.figures.iter().map(|f| (f.name.clone(), words(f))).collect())
    }
}
