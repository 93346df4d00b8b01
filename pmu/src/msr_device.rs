//! A host core's real PMU through the msr driver: `/dev/cpu/N/msr`.
//!
//! One access is one 8-byte pread or pwrite at the MSR's number (Linux `arch/x86/kernel/msr.c`). The driver answers EIO where the
//! instruction faults. Counters are read by pread of the counter's MSR, because RDPMC needs CR4.PCE; for the same price.
//!
//! Invariants: exactly one system call per access, nothing cached; interrupt enables never reach this hardware ([`Hardware::STRIP_PMI`]),
//! since nobody on the host would claim the NMI; an access from a thread that is not on the device's core is refused (I-17), because the
//! driver would send an IPI and the count in flight would be another core's. The caller holds the core's lock file, is pinned, and has
//! had the [`Preconditions`] of I-24 checked. This module reads no other file: probes of /proc, /sys and perf arrive as plain data.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::hardware::{Hardware, HwError};
use crate::registers::{CAP_PERF_METRICS, MSR_PERF_METRICS, RDPMC_FIXED};
use crate::shape::{Shape, Vendor};

mod preconditions;

pub use preconditions::{Failure, Preconditions, check};

/// RDPMC index of PERF_METRICS.
const RDPMC_METRICS: u32 = 1 << 29;
/// EIO: the driver's answer to #GP.
const EIO: i32 = 5;

/// One core's msr device.
#[derive(Debug)]
pub struct MsrDevice {
    file: File,
    shape: Shape,
    /// The core that accesses must come from; `None` for a file opened by path.
    core: Option<u32>,
}

/// Why a core's msr device cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {path}: {source}; {remedy}")]
pub struct OpenError {
    /// The device file.
    pub path: String,
    /// What the system answered.
    pub source: io::Error,
    /// What to do about it.
    pub remedy: &'static str,
}

impl OpenError {
    /// A stable code for programs.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self.source.kind() {
            io::ErrorKind::NotFound => "MSR_DEVICE_ABSENT",
            io::ErrorKind::PermissionDenied => "MSR_DEVICE_PERMISSION",
            _ => "MSR_DEVICE_ERROR",
        }
    }
}

impl MsrDevice {
    /// Opens `/dev/cpu/<core>/msr`. `host` is the shape of the core's PMU (from CPUID), needed to find the MSR behind an RDPMC index.
    pub fn open(core: u32, host: Shape) -> Result<Self, OpenError> {
        Ok(Self { core: Some(core), ..Self::open_path(Path::new(&format!("/dev/cpu/{core}/msr")), host)? })
    }

    /// As [`MsrDevice::open`] on any file that answers reads and writes by MSR number as the driver does (msr-safe's, for one); the core of the
    /// calling thread is not checked.
    pub fn open_path(path: &Path, host: Shape) -> Result<Self, OpenError> {
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(|source| OpenError {
            path: path.display().to_string(),
            remedy: match source.kind() {
                io::ErrorKind::NotFound => "load the msr module (modprobe msr) and check that the core is online",
                io::ErrorKind::PermissionDenied => {
                    "run as root with CAP_SYS_RAWIO, without kernel lockdown (Secure Boot), with msr.allow_writes=on"
                }
                _ => "check that the core is online and the msr driver works (rdmsr from msr-tools)",
            },
            source,
        })?;
        Ok(Self { file, shape: host, core: None })
    }

    /// The calling thread is on the core.
    fn on_core(&self) -> Result<(), HwError> {
        let Some(expected) = self.core else { return Ok(()) };
        let actual = u32::try_from(rustix::thread::sched_getcpu()).unwrap_or(u32::MAX);
        if actual == expected { Ok(()) } else { Err(HwError::WrongCore { expected, actual }) }
    }

    /// The MSR that holds the counter of an RDPMC index; `None` where RDPMC would fault.
    fn counter_msr(&self, index: u32) -> Option<u32> {
        if self.shape.has_gp(index) {
            return Some(self.shape.counter_msr(index));
        }
        if self.shape.vendor == Vendor::Amd {
            return None;
        }
        if index == RDPMC_METRICS {
            return (self.shape.perf_capabilities & CAP_PERF_METRICS != 0).then_some(MSR_PERF_METRICS);
        }
        let i = index.checked_sub(RDPMC_FIXED)?;
        self.shape.has_fixed(i).then(|| self.shape.fixed_msr(i))
    }
}

impl Hardware for MsrDevice {
    const STRIP_PMI: bool = true;

    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.on_core()?;
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, u64::from(msr)).map_err(|error| access(&error))?;
        Ok(u64::from_le_bytes(value))
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.on_core()?;
        self.file.write_all_at(&value.to_le_bytes(), u64::from(msr)).map_err(|error| access(&error))
    }

    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        let msr = self.counter_msr(index).ok_or(HwError::Fault)?;
        self.rdmsr(msr)
    }
}

/// EIO is the driver's #GP. A read that ends early carries no errno; it is reported as errno 0.
fn access(error: &io::Error) -> HwError {
    match error.raw_os_error() {
        Some(EIO) => HwError::Fault,
        Some(errno) => HwError::Io(errno),
        None => HwError::Io(0),
    }
}

#[cfg(test)]
mod tests;
