//! One core's PMU behind one type, whatever its hardware is: the software model, or the processor's through the msr driver.
//!
//! The branch is taken once an operation, above the switcher: below it each kind is the switcher's own monomorphic code.

use std::fs::File;
use std::path::{Path, PathBuf};

use pmu::core::ForeignWrite;
use pmu::msr_device::MsrDevice;
use pmu::{Core, CpuMode, Events, GuestAccess, GuestPmu, Hardware, HwError, ModelPmu, Shape, SwitchError};

/// EBADF: the device of a core that nobody has claimed.
const CLOSED: HwError = HwError::Io(9);

/// The processor's PMU; closed while no vCPU has claimed the core.
#[derive(Debug, Default)]
pub(super) struct MsrPmu {
    open: Option<(MsrDevice, File)>,
}

impl Hardware for MsrPmu {
    const STRIP_PMI: bool = MsrDevice::STRIP_PMI;

    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.open.as_mut().ok_or(CLOSED)?.0.rdmsr(msr)
    }

    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.open.as_mut().ok_or(CLOSED)?.0.wrmsr(msr, value)
    }

    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.open.as_mut().ok_or(CLOSED)?.0.rdpmc(index)
    }
}

/// A core's PMU.
pub struct CorePmu(Kind);

enum Kind {
    Model(Box<Core<ModelPmu>>),
    Msr(Box<Core<MsrPmu>>),
}

macro_rules! on_core {
    ($pmu:expr, $core:ident => $what:expr) => {
        match &mut $pmu.0 {
            Kind::Model($core) => $what,
            Kind::Msr($core) => $what,
        }
    };
}

impl CorePmu {
    pub(super) fn model(shape: Shape) -> Self {
        Self(Kind::Model(Box::new(Core::new(ModelPmu::new(shape), shape))))
    }

    pub(super) fn msr(shape: Shape) -> Self {
        Self(Kind::Msr(Box::new(Core::new(MsrPmu::default(), shape))))
    }

    /// Puts the device in, held by its lock file; nothing is known of the core from here on.
    pub(super) fn open(&mut self, device: MsrDevice, lock: File) {
        if let Kind::Msr(core) = &mut self.0 {
            core.hardware_mut().open = Some((device, lock));
            core.forget();
        }
    }

    /// Closes the device and gives the lock file up.
    pub(super) fn close(&mut self) {
        if let Kind::Msr(core) = &mut self.0 {
            core.hardware_mut().open = None;
            core.forget();
        }
    }

    /// Whether this guest is loaded.
    pub fn is_loaded(&mut self, guest: &GuestPmu) -> bool {
        on_core!(self, core => core.is_loaded(guest))
    }

    /// See [`Core::load`].
    pub fn load(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.load(guest))
    }

    /// See [`Core::resume`].
    pub fn resume(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.resume(guest))
    }

    /// See [`Core::pause`].
    pub fn pause(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.pause(guest))
    }

    /// See [`Core::put`].
    pub fn put(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.put(guest))
    }

    /// See [`Core::sync`].
    pub fn sync(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.sync(guest))
    }

    /// See [`Core::release`].
    pub fn release(&mut self, guest: &mut GuestPmu) -> Result<(), SwitchError> {
        on_core!(self, core => core.release(guest))
    }

    /// See [`Core::guest_rdmsr`].
    pub fn guest_rdmsr(&mut self, guest: &mut GuestPmu, msr: u32) -> Result<GuestAccess, SwitchError> {
        on_core!(self, core => core.guest_rdmsr(guest, msr))
    }

    /// See [`Core::guest_wrmsr`].
    pub fn guest_wrmsr(
        &mut self,
        guest: &mut GuestPmu,
        msr: u32,
        value: u64,
    ) -> Result<GuestAccess, SwitchError> {
        on_core!(self, core => core.guest_wrmsr(guest, msr, value))
    }

    /// See [`Core::audit`].
    pub fn audit(&mut self) -> Result<Vec<ForeignWrite>, SwitchError> {
        on_core!(self, core => core.audit())
    }

    /// Gives the model what the guest did; the processor's counts by itself.
    pub fn feed(&mut self, events: &Events) {
        if let Kind::Model(core) = &mut self.0 {
            core.hardware_mut().feed(events, CpuMode::Guest);
        }
    }

    /// A register as it stands, without side effects on the model.
    pub fn peek(&mut self, msr: u32) -> Result<u64, HwError> {
        match &mut self.0 {
            Kind::Model(core) => core.hardware().clone().rdmsr(msr),
            Kind::Msr(core) => core.hardware_mut().rdmsr(msr),
        }
    }
}

/// Where msr devices and their lock files are.
#[derive(Debug, Clone)]
pub struct MsrPaths {
    /// `<devices>/<core>/msr`.
    pub devices: PathBuf,
    /// `<locks>/msr-<core>.lock`, made if it is not there.
    pub locks: PathBuf,
    /// They are the msr driver's: accesses must come from the core, and its preconditions must hold. False only for files
    /// that stand in for it.
    pub driver: bool,
}

impl MsrPaths {
    /// The kernel's, with locks that all daemons of the host share.
    #[must_use]
    pub fn of_this_host() -> Self {
        Self {
            devices: Path::new("/dev/cpu").to_owned(),
            locks: Path::new("/run/lock").to_owned(),
            driver: true,
        }
    }
}
