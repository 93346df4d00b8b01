//! A model that records every access and fails the one it was asked to.

use pmu::{Hardware, HwError, ModelPmu};

/// One access: kind, MSR or index, value (`None` for the one that failed).
pub(crate) type Access = (&'static str, u32, Option<u64>);

/// The model behind a recorder.
pub(crate) struct Recorder {
    pub(crate) model: ModelPmu,
    pub(crate) accesses: Vec<Access>,
    /// Accesses until the one that fails.
    pub(crate) fail_in: Option<u64>,
    /// An access failed since this was last cleared; later ones are not recorded.
    pub(crate) failed: bool,
    /// The host's own doing: not recorded, and no access of it fails.
    pub(crate) aside: bool,
}

impl Recorder {
    pub(crate) fn new(model: ModelPmu) -> Self {
        Self { model, accesses: Vec::new(), fail_in: None, failed: false, aside: false }
    }

    fn record(
        &mut self,
        kind: &'static str,
        register: u32,
        access: impl FnOnce(&mut ModelPmu) -> Result<u64, HwError>,
    ) -> Result<u64, HwError> {
        if self.aside {
            return access(&mut self.model);
        }
        let fails = match &mut self.fail_in {
            Some(1) => {
                self.fail_in = None;
                true
            }
            Some(left) => {
                *left -= 1;
                false
            }
            None => false,
        };
        let result = if fails { Err(HwError::Injected) } else { access(&mut self.model) };
        // The attempt to quiesce after a failure is made, and is not part of the operation's list: the failed access
        // is its last entry.
        if !self.failed {
            self.accesses.push((kind, register, result.ok()));
        }
        self.failed |= result.is_err();
        result
    }
}

impl Hardware for Recorder {
    fn rdmsr(&mut self, msr: u32) -> Result<u64, HwError> {
        self.record("rdmsr", msr, |m| m.rdmsr(msr))
    }
    fn wrmsr(&mut self, msr: u32, value: u64) -> Result<(), HwError> {
        self.record("wrmsr", msr, |m| m.wrmsr(msr, value).map(|()| value)).map(|_| ())
    }
    fn rdpmc(&mut self, index: u32) -> Result<u64, HwError> {
        self.record("rdpmc", index, |m| m.rdpmc(index))
    }
}
