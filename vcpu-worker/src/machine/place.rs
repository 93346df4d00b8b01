//! Gives the vCPUs of a machine other cores: all of them, or none.
//!
//! Every thread is asked at once and says where the kernel says that it is. If one fails, all are sent back, those that
//! never left included: one that did not answer in time may still go, and then goes back.

use super::Machine;
use crate::cores::HostCores;
use crate::error::WorkerError;
use crate::vcpu::VcpuHandle;
use crate::vcpu::request::{Place, Request};

impl Machine {
    /// Moves vCPU i to `places[i]`; returns the cores as read back.
    ///
    /// # Errors
    /// With what failed, and whether all are back where they were.
    pub async fn place(&self, places: Vec<Place>, cores: &HostCores) -> Result<Vec<u32>, WorkerError> {
        let before: Option<Vec<Place>> =
            self.vcpus.iter().map(|v| Some(Place { slot: cores.slot(v.core())?, fifo: v.fifo() })).collect();
        let before = before.ok_or_else(|| WorkerError::State {
            what: "moving the vCPUs",
            state: "on a core that this worker does not know".to_owned(),
            remedy: "stop and start the machine",
        })?;
        let wanted: Vec<u32> = places.iter().map(|place| place.slot.id()).collect();
        let problem = match self.send_to(places).await {
            Ok(got) if got == wanted => return Ok(got),
            Ok(got) => format!("the kernel put the vCPUs on {got:?} instead of {wanted:?}"),
            Err(error) => error.to_string(),
        };
        let old: Vec<u32> = before.iter().map(|place| place.slot.id()).collect();
        let back = match self.send_to(before).await {
            Ok(got) if got == old => Ok(()),
            Ok(got) => Err(format!("they are on {got:?}")),
            Err(error) => Err(error.to_string()),
        };
        Err(WorkerError::Placement { problem, old, back })
    }

    async fn send_to(&self, places: Vec<Place>) -> Result<Vec<u32>, WorkerError> {
        let ask = |(vcpu, place): (&VcpuHandle, Place)| vcpu.ask(|reply| Request::Place(place, reply));
        let answers = self.vcpus.iter().zip(places).map(ask).collect();
        super::gather("moving the vCPUs", answers).await
    }
}
