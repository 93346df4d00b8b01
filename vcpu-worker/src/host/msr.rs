//! Takes one core's PMU through the msr driver: the lock file, the device, and the proof that nobody else uses it.
//!
//! Two steps: [`open`] opens files, on any thread; [`Opened::take`] uses the device, which refuses accesses from any thread
//! that is not pinned to the core. What cannot be determined counts against taking the core ([`pmu::msr_device::check`]).

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use pmu::msr_device::{Failure, MsrDevice, OpenError, Preconditions, check};
use pmu::{Hardware as _, HwError, Shape};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::pmu::{flag, perf_users, text};
use crate::cores::MsrPaths;

/// IA32_PEBS_ENABLE.
const PEBS_ENABLE: u32 = 0x3F1;
/// IA32_DS_AREA.
const DS_AREA: u32 = 0x600;
/// IA32_DEBUGCTL.
const DEBUG_CONTROL: u32 = 0x1D9;
/// PerfMon v6: reload and PEBS configuration of counter i are at 4i from here (general-purpose, fixed).
const V6_CONFIGURATION: [u32; 4] = [0x1902, 0x1903, 0x1982, 0x1983];
/// Counters of each kind that v6 has room for.
const V6_COUNTERS: u32 = 8;
/// Between two looks at whether somebody else writes the enables.
const LOOK: Duration = Duration::from_millis(10);

/// Why a core's PMU is not taken.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MsrError {
    /// Somebody has the core's lock file.
    #[error("the PMU of core {core} belongs to another vCPU or program ({}); give this vCPU another core", .path.display())]
    Busy {
        /// The core.
        core: u32,
        /// The lock file.
        path: PathBuf,
    },
    /// The lock file cannot be used.
    #[error("lock file {}: {source}; make its directory writable", .path.display())]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The device cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The device does not answer.
    #[error("the msr device of core {core}: {source}; see that the core is online and the msr driver works")]
    Access {
        /// The core.
        core: u32,
        /// Why not.
        source: HwError,
    },
    /// Preconditions do not hold.
    #[error("core {core}'s PMU cannot be taken: {}", listed(.failures))]
    Preconditions {
        /// The core.
        core: u32,
        /// All that do not.
        failures: Vec<Failure>,
    },
}

fn listed(list: &[Failure]) -> String {
    list.iter().map(|f| format!("[{}] {}; {}", f.id, f.message, f.remedy)).collect::<Vec<_>>().join(". ")
}

impl MsrError {
    /// Stable reason code.
    #[must_use]
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Busy { .. } => "MSR_CORE_BUSY",
            Self::Lock { .. } => "MSR_LOCK_FAILED",
            Self::Open(error) => error.reason(),
            Self::Access { source, .. } => source.reason(),
            Self::Preconditions { .. } => "MSR_PRECONDITIONS",
        }
    }
}

/// A core's device, locked and open, and what the host says about using it. Nothing has been read or written.
#[derive(Debug)]
pub struct Opened {
    core: u32,
    device: MsrDevice,
    lock: File,
    /// None for a file that stands in for the driver.
    outside: Option<Preconditions>,
}

/// Locks a core and opens its device; any thread may. Dropping it gives the core back.
///
/// # Errors
/// If somebody has the core, there is no device, or the host is not set up for it.
pub fn open(core: u32, shape: Shape, paths: &MsrPaths) -> Result<Opened, MsrError> {
    let path = paths.locks.join(format!("vpmu-msr-{core}.lock"));
    let failed = |source| MsrError::Lock { path: path.clone(), source };
    let lock = File::options().create(true).truncate(false).write(true).open(&path).map_err(failed)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(MsrError::Busy { core, path }),
        Err(errno) => return Err(failed(errno.into())),
    }
    if !paths.driver {
        let file = paths.devices.join(core.to_string()).join("msr");
        return Ok(Opened { core, device: MsrDevice::open_path(&file, shape)?, lock, outside: None });
    }
    let device = MsrDevice::open(core, shape)?;
    let outside = outside(core);
    // Before anything is written to a PMU that somebody may be using.
    let failures = check(&outside);
    if !failures.is_empty() {
        return Err(MsrError::Preconditions { core, failures });
    }
    Ok(Opened { core, device, lock, outside: Some(outside) })
}

impl Opened {
    /// The core.
    #[must_use]
    pub fn core(&self) -> u32 {
        self.core
    }

    /// Stops the PMU and looks at its registers, on a thread that is pinned to the core; takes 10 ms. The core is taken as
    /// long as the file lives.
    ///
    /// # Errors
    /// With every precondition that does not hold.
    pub fn take(mut self, shape: &Shape) -> Result<(MsrDevice, File), MsrError> {
        let core = self.core;
        if let Some(outside) = self.outside.take() {
            let found =
                look(outside, shape, &mut self.device).map_err(|source| MsrError::Access { core, source })?;
            let failures = check(&found);
            if !failures.is_empty() {
                return Err(MsrError::Preconditions { core, failures });
            }
        }
        Ok((self.device, self.lock))
    }
}

/// What can be known without touching the PMU; its registers are taken to be as they should.
fn outside(core: u32) -> Preconditions {
    Preconditions {
        core,
        nmi_watchdog: text("/proc/sys/kernel/nmi_watchdog").and_then(|t| flag(&t)),
        perf_events: perf_users(),
        msr_allow_writes: text("/sys/module/msr/parameters/allow_writes"),
        control_after_zero: Some([0, 0]),
        pebs_enable: Some(0),
        ds_area: Some(0),
        debug_control: Some(0),
        status_after_reset: Some(0),
        rdpmc: text("/sys/bus/event_source/devices/cpu/rdpmc").and_then(|t| t.parse().ok()),
        isolated: super::Topology::of_this_host().cpu(core).map(|cpu| cpu.isolated),
        v6_configuration: Some(Vec::new()),
    }
}

/// A register that may not be there.
fn read_or_0(device: &mut MsrDevice, msr: u32) -> Result<u64, HwError> {
    match device.rdmsr(msr) {
        Err(HwError::Fault) => Ok(0),
        read => read,
    }
}

/// Stops all counters and says what enables them afterwards.
fn stop(device: &mut MsrDevice, shape: &Shape) -> Result<u64, HwError> {
    if shape.has_global() {
        device.wrmsr(shape.control_msr(), 0)?;
        return device.rdmsr(shape.control_msr());
    }
    let mut all = 0;
    for i in (0..pmu::registers::MAX_GP as u32).filter(|i| shape.has_gp(*i)) {
        device.wrmsr(shape.selector_msr(i), 0)?;
        all |= device.rdmsr(shape.selector_msr(i))?;
    }
    Ok(all)
}

/// Adds what the PMU itself says; stops and resets it.
fn look(outside: Preconditions, shape: &Shape, device: &mut MsrDevice) -> Result<Preconditions, HwError> {
    let first = stop(device, shape)?;
    std::thread::sleep(LOOK);
    let second = stop(device, shape)?;
    let intel = shape.vendor == pmu::Vendor::Intel;
    let mut status = 0;
    if shape.has_global() {
        let reset = if intel {
            pmu::registers::IA32_PERF_GLOBAL_STATUS_RESET
        } else {
            pmu::registers::AMD_GLOBAL_STATUS_CLR
        };
        // Everything that the register of this version takes: the counters, and what freezes them from version 4 on.
        let freeze = if intel && shape.version >= 4 { 3 << 58 } else { 0 };
        device.wrmsr(reset, shape.counter_bits() | freeze)?;
        status = device.rdmsr(shape.status_msr())?;
    }
    let mut v6 = Vec::new();
    for base in V6_CONFIGURATION.into_iter().filter(|_| intel) {
        for msr in (0..V6_COUNTERS).map(|i| base + 4 * i) {
            let value = read_or_0(device, msr)?;
            if value != 0 {
                v6.push((msr, value));
            }
        }
    }
    let if_intel = |device: &mut MsrDevice, msr| if intel { read_or_0(device, msr) } else { Ok(0) };
    Ok(Preconditions {
        control_after_zero: Some([first, second]),
        pebs_enable: Some(if_intel(device, PEBS_ENABLE)?),
        ds_area: Some(if_intel(device, DS_AREA)?),
        debug_control: Some(read_or_0(device, DEBUG_CONTROL)?),
        status_after_reset: Some(status),
        v6_configuration: Some(v6),
        ..outside
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn paths(dir: &std::path::Path) -> MsrPaths {
        MsrPaths { devices: dir.join("cpu"), locks: dir.to_owned(), driver: false }
    }

    #[test]
    fn a_core_is_taken_once_and_given_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        let paths = paths(dir.path());
        let shape: Shape = "intel:v1:1+0:40".parse().expect("a shape");
        assert_eq!(open(0, shape, &paths).expect_err("no device").reason(), "MSR_DEVICE_ABSENT");
        let file = dir.path().join("cpu/0");
        std::fs::create_dir_all(&file).expect("directory");
        File::create(file.join("msr")).and_then(|f| f.set_len(0x2000)).expect("device");
        let opened = open(0, shape, &paths).expect("free: the failed try kept no lock");
        assert_eq!(open(0, shape, &paths).expect_err("open").reason(), "MSR_CORE_BUSY");
        let taken = opened.take(&shape).expect("a file has no preconditions");
        assert_eq!(open(0, shape, &paths).expect_err("taken").reason(), "MSR_CORE_BUSY");
        drop(taken);
        drop(open(0, shape, &paths).expect("given back"));
        let nowhere = MsrPaths { locks: dir.path().join("absent"), ..paths };
        assert_eq!(open(0, shape, &nowhere).expect_err("no directory").reason(), "MSR_LOCK_FAILED");
    }

    #[test]
    fn the_kernels_device_is_asked_for_by_name() {
        let dir = tempfile::tempdir().expect("tempdir");
        let paths = MsrPaths { locks: dir.path().to_owned(), ..MsrPaths::of_this_host() };
        let core = super::super::allowed_cores()[0];
        match open(core, "intel:v5:8+4:48".parse().expect("a shape"), &paths).map(drop) {
            // Only where every precondition holds.
            Ok(()) => {}
            Err(MsrError::Open(error)) => {
                assert_eq!(error.path, format!("/dev/cpu/{core}/msr"));
                assert!(error.to_string().contains(error.remedy), "{error}");
            }
            Err(MsrError::Preconditions { failures, .. }) => {
                assert!(failures.iter().all(|f| !f.remedy.is_empty()), "{failures:?}");
            }
            Err(error) => assert!(matches!(error, MsrError::Access { .. }), "{error}"),
        }
    }
}
