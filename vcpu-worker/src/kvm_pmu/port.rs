//! The way to a vCPU's MSRs, in batches as KVM takes them.

use kvm_bindings::{KVM_MAX_MSR_ENTRIES, Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

use crate::hypervisor::HvError;
use crate::sys::failed;

/// A vCPU's MSRs. Both calls work through their batch in order and stop at the first register that is refused: the number processed
/// is returned, which is short then, and everything before it is done.
pub trait MsrPort {
    /// MSRs that KVM lists as state of a vCPU on this host (KVM_GET_MSR_INDEX_LIST). A property of the host, not of this vCPU.
    fn listed(&mut self) -> Result<Vec<u32>, HvError>;

    /// KVM_GET_MSRS: fills in the values of (MSR, value).
    fn get(&mut self, batch: &mut [(u32, u64)]) -> Result<usize, HvError>;

    /// KVM_SET_MSRS, host-initiated: 0xC1 is not sign-extended, the status register is set absolutely.
    fn set(&mut self, batch: &[(u32, u64)]) -> Result<usize, HvError>;
}

/// A vCPU of KVM.
#[derive(Debug)]
pub struct VcpuPort<'a> {
    fd: &'a VcpuFd,
    listed: &'a [u32],
}

impl<'a> VcpuPort<'a> {
    /// `listed` is [`crate::hypervisor::kvm::state_msrs`].
    #[must_use]
    pub fn new(fd: &'a VcpuFd, listed: &'a [u32]) -> Self {
        Self { fd, listed }
    }
}

const _: () = assert!(KVM_MAX_MSR_ENTRIES >= 2 * pmu::image::MAX_REGISTERS);

fn entries(batch: &[(u32, u64)]) -> Result<Msrs, HvError> {
    let entries: Vec<kvm_msr_entry> =
        batch.iter().map(|&(index, data)| kvm_msr_entry { index, data, reserved: 0 }).collect();
    Msrs::from_entries(&entries).map_err(|_| HvError::State {
        kind: "PMU registers".to_owned(),
        problem: format!("{} in one batch, KVM takes {KVM_MAX_MSR_ENTRIES}", batch.len()),
    })
}

impl MsrPort for VcpuPort<'_> {
    fn listed(&mut self) -> Result<Vec<u32>, HvError> {
        Ok(self.listed.to_vec())
    }

    fn get(&mut self, batch: &mut [(u32, u64)]) -> Result<usize, HvError> {
        let mut list = entries(batch)?;
        let read = self.fd.get_msrs(&mut list).map_err(failed("KVM_GET_MSRS"))?;
        for (to, from) in batch.iter_mut().zip(list.as_slice()).take(read) {
            to.1 = from.data;
        }
        Ok(read)
    }

    fn set(&mut self, batch: &[(u32, u64)]) -> Result<usize, HvError> {
        self.fd.set_msrs(&entries(batch)?).map_err(failed("KVM_SET_MSRS"))
    }
}
