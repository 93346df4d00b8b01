//! One machine under soak: what it is, what may be done with it next, and the doing.
//!
//! ```text
//!   Absent --create--> Stopped --start--> Running <--pause/resume--> Paused
//!      \----------- restore ------------->/  stop, delete, migrate, place and snapshot: from both
//! ```
//! No daemon dies here, so that every operation must succeed.

use std::collections::BTreeMap;

use tonic::Status;
use vpmu_proto::api::migration_spec::Mode;
use vpmu_proto::api::{CpuPlacement, KernelBoot, ProbeBoot, VirtualMachineSpec, virtual_machine_spec};

use crate::support::load::{Api, Random};
use crate::support::probe_spec;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Is {
    Absent,
    Stopped,
    Running,
    Paused,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Op {
    Create,
    Start,
    Pause,
    Resume,
    Stop,
    Delete,
    Snapshot,
    Restore,
    RestoreLazily,
    Place,
    MoveLocally,
    MoveByCopy,
}

/// How often each operation was done.
pub type Counts = BTreeMap<Op, u64>;

#[derive(Debug)]
pub struct Machine {
    pub id: String,
    spec: VirtualMachineSpec,
    pub host: usize,
    pub is: Is,
    /// It has been on the other host, which keeps a record of where it went.
    pub trace: bool,
    /// There is a snapshot under its id.
    saved: bool,
}

impl Machine {
    pub fn new(id: String, spec: VirtualMachineSpec) -> Self {
        Self { id, spec, host: 0, is: Is::Absent, trace: false, saved: false }
    }

    fn choose(&self, random: &mut Random) -> Op {
        let legal: &[Op] = match self.is {
            Is::Absent if self.saved => &[Op::Create, Op::Restore, Op::RestoreLazily],
            Is::Absent => &[Op::Create],
            Is::Stopped => &[Op::Start, Op::Start, Op::Start, Op::Place, Op::Delete],
            Is::Running => &[
                Op::Pause,
                Op::Pause,
                Op::Pause,
                Op::Stop,
                Op::Delete,
                Op::Place,
                Op::Snapshot,
                Op::MoveLocally,
                Op::MoveByCopy,
            ],
            Is::Paused => &[
                Op::Resume,
                Op::Resume,
                Op::Resume,
                Op::Stop,
                Op::Delete,
                Op::Place,
                Op::Snapshot,
                Op::MoveLocally,
                Op::MoveByCopy,
            ],
        };
        random.pick(legal)
    }

    /// Does something that is legal.
    pub async fn step(
        &mut self,
        apis: &[Api; 2],
        cores: &[u32],
        random: &mut Random,
    ) -> (Op, Result<(), Status>) {
        let op = self.choose(random);
        if self.is == Is::Absent {
            self.host = usize::from(random.below(2) == 1);
        }
        (op, self.perform(op, apis, cores, random).await)
    }

    async fn perform(
        &mut self,
        op: Op,
        apis: &[Api; 2],
        cores: &[u32],
        random: &mut Random,
    ) -> Result<(), Status> {
        let (api, other, id) = (&apis[self.host], &apis[1 - self.host], &self.id);
        match op {
            Op::Create => {
                api.create(id, self.spec.clone()).await?;
                self.is = Is::Stopped;
            }
            Op::Start => {
                api.start(id).await?;
                self.is = Is::Running;
            }
            Op::Pause => {
                api.pause(id).await?;
                self.is = Is::Paused;
            }
            Op::Resume => {
                api.resume(id).await?;
                self.is = Is::Running;
            }
            Op::Stop => {
                api.stop(id).await?;
                self.is = Is::Stopped;
            }
            Op::Delete => self.delete(apis).await?,
            Op::Snapshot => {
                api.snapshot(id, id).await?;
                self.saved = true;
            }
            Op::Restore | Op::RestoreLazily => {
                api.restore(id, id, op == Op::RestoreLazily).await?;
                self.is = Is::Running;
            }
            Op::Place => {
                let placement = CpuPlacement { cores: vec![random.pick(cores)], ..CpuPlacement::default() };
                api.place(id, placement).await?;
            }
            Op::MoveLocally | Op::MoveByCopy => {
                let mode = if op == Op::MoveLocally { Mode::Local } else { Mode::PrecopyOnly };
                api.migrate(id, other, mode).await?;
                self.host = 1 - self.host;
                self.trace = true;
            }
        }
        Ok(())
    }

    /// Ends and removes it, and the record of where it went.
    pub async fn delete(&mut self, apis: &[Api; 2]) -> Result<(), Status> {
        if self.is != Is::Absent {
            apis[self.host].delete(&self.id).await?;
            self.is = Is::Absent;
        }
        if std::mem::take(&mut self.trace) {
            apis[1 - self.host].delete(&self.id).await?;
        }
        Ok(())
    }
}

/// What machines boot. Guests that compute all take the processor from the daemons, so that most of them halt, where the
/// hypervisor can run a kernel.
pub fn spec(number: u64, kvm: bool) -> VirtualMachineSpec {
    let boot = if kvm && !number.is_multiple_of(6) {
        let kernel = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/guest/payload.elf");
        let boot =
            KernelBoot { path: kernel.to_owned(), cmdline: "mode=h".to_owned(), ..KernelBoot::default() };
        virtual_machine_spec::Boot::Kernel(boot)
    } else {
        let boot =
            ProbeBoot { working_set_bytes: 1 << 20, dirty_pages_per_second: 50, ..ProbeBoot::default() };
        virtual_machine_spec::Boot::Probe(boot)
    };
    VirtualMachineSpec { boot: Some(boot), ..probe_spec(1, 8) }
}
