//! Gives the vCPUs of a machine other cores: all of them, or none.
//!
//! What the new cores need is opened first. Every thread is then asked at once and says where the kernel says that it is.
//! If one fails, all are sent back, those that never left included: one that did not answer in time may still go, and then
//! goes back. In mode `msr` a core has one user, so two vCPUs cannot change places in one step.

use std::sync::Arc;

use super::Machine;
use crate::cores::{CoreSlot, HostCores};
use crate::error::WorkerError;
use crate::vcpu::VcpuHandle;
use crate::vcpu::request::{Place, Request};

/// A core and the SCHED_FIFO priority on it.
type Target = (Arc<CoreSlot>, Option<u8>);

impl Machine {
    /// Moves vCPU i to `targets[i]`; returns the cores as read back. May block for files being opened.
    ///
    /// # Errors
    /// With what failed, and whether all are back where they were.
    pub async fn place(&self, targets: Vec<Target>, cores: &HostCores) -> Result<Vec<u32>, WorkerError> {
        let now = |v: &VcpuHandle| Some((cores.slot(v.core())?, v.fifo()));
        let before: Option<Vec<Target>> = self.vcpus.iter().map(now).collect();
        let before = before.ok_or_else(|| WorkerError::State {
            what: "moving the vCPUs",
            state: "on a core that this worker does not know".to_owned(),
            remedy: "stop and start the machine",
        })?;
        let ids = |targets: &[Target]| -> Vec<u32> { targets.iter().map(|(slot, _)| slot.id()).collect() };
        let (wanted, old) = (ids(&targets), ids(&before));
        // Nothing has moved if this fails.
        let places = self.prepare(targets)?;
        let problem = match self.send_to(places).await {
            Ok(got) if got == wanted => return Ok(got),
            Ok(got) => format!("the kernel put the vCPUs on {got:?} instead of {wanted:?}"),
            Err(error) => error.to_string(),
        };
        let back = match self.prepare(before) {
            Ok(places) => self.send_to(places).await,
            Err(error) => Err(error),
        };
        let back = match back {
            Ok(got) if got == old => Ok(()),
            Ok(got) => Err(format!("they are on {got:?}")),
            Err(error) => Err(error.to_string()),
        };
        Err(WorkerError::Placement { problem, old, back })
    }

    fn prepare(&self, targets: Vec<Target>) -> Result<Vec<Place>, WorkerError> {
        let place = |(vcpu, (slot, fifo)): (&VcpuHandle, Target)| {
            let elsewhere = slot.id() != vcpu.core() && self.shape.is_some();
            let prepared = if elsewhere { Some(slot.prepare()?) } else { None };
            Ok(Place { slot, prepared, fifo })
        };
        self.vcpus.iter().zip(targets).map(place).collect()
    }

    async fn send_to(&self, places: Vec<Place>) -> Result<Vec<u32>, WorkerError> {
        let ask =
            |(vcpu, place): (&VcpuHandle, Place)| vcpu.ask(|reply| Request::Place(Box::new(place), reply));
        let answers = self.vcpus.iter().zip(places).map(ask).collect();
        super::gather("moving the vCPUs", answers).await
    }
}
