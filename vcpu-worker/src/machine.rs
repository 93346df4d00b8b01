//! The virtual machine: memory, hypervisor objects, devices and vCPU threads as one thing.
//!
//! Commands go to all vCPUs first and are awaited afterwards, so that stopping the world takes as long as its slowest
//! vCPU and not their sum. Every wait has a deadline. Invariant: once the guest has ended, no vCPU runs again.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use pmu::{Image, Shape};
use tokio::sync::{Semaphore, watch};
use vpmu_proto::api;
use vpmu_proto::worker::{GuestEnd, PmuImage, VcpuStatus};

use crate::console::Console;
use crate::devices::Devices;
use crate::error::WorkerError;
use crate::hypervisor::Vm;
use crate::lazy::LazyMemory;
use crate::memory::GuestMemory;
use crate::pmu_glue::image_to_proto;
use crate::vcpu::request::{Answer, Request};
use crate::vcpu::state::State;
use crate::vcpu::throttle::Throttle;
use crate::vcpu::{Left, Listener, VcpuHandle, VcpuLink};

mod answers;
pub mod build;
mod lazy;
pub mod options;
mod place;
pub mod snapshot;
pub mod throttle;

use answers::{Asked, gather};
pub use build::BuildOptions;

/// Bound on every command to the vCPUs. Far above what any takes; a host that is out of breath may need it.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(10);

/// Looks at the PMUs that may be under way at once; others wait. Leaves room in the vCPUs' inboxes for commands.
pub(crate) const LOOKS: usize = 16;

/// What vCPU threads report, and what watchers see.
pub struct Lifecycle {
    end: Mutex<Option<GuestEnd>>,
    links: OnceLock<Vec<VcpuLink>>,
    changes: watch::Sender<u64>,
}

impl Lifecycle {
    fn new() -> Self {
        Self { end: Mutex::new(None), links: OnceLock::new(), changes: watch::Sender::new(0) }
    }

    /// Whom to pause when one vCPU ends the guest.
    fn know(&self, links: Vec<VcpuLink>) {
        // Set once, when the machine is built.
        drop(self.links.set(links));
    }

    /// How the guest ended, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Listener for Lifecycle {
    fn left(&self, vcpu: u32, how: Left) {
        if let Left::Ended(end) = how {
            // The first end counts: what other vCPUs run into afterwards is its consequence.
            self.end.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(end);
            for (index, link) in self.links.get().into_iter().flatten().enumerate() {
                if index as u32 != vcpu {
                    // One that has ended, or has more to do than it can take, stops by itself or by those.
                    drop(link.send(Request::Pause(None)));
                }
            }
        }
        self.changes.send_modify(|n| *n += 1);
    }
}

/// One virtual machine.
pub struct Machine {
    name: String,
    vm: Arc<dyn Vm>,
    memory: GuestMemory,
    devices: Arc<Devices>,
    console: Arc<Console>,
    lifecycle: Arc<Lifecycle>,
    shape: Option<Shape>,
    probe: bool,
    incoming: bool,
    looks: Semaphore,
    /// Memory that is yet to come. Dropped before the vCPUs, which may wait for it.
    lazy: Mutex<Option<LazyMemory>>,
    throttle: Arc<Throttle>,
    vcpus: Vec<VcpuHandle>,
}

impl std::fmt::Debug for Machine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Machine")
            .field("name", &self.name)
            .field("vcpus", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

impl Machine {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The hypervisor's VM.
    pub fn vm(&self) -> &Arc<dyn Vm> {
        &self.vm
    }

    /// Guest memory.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Console output.
    pub fn console(&self) -> &Arc<Console> {
        &self.console
    }

    /// Devices.
    pub fn devices(&self) -> &Arc<Devices> {
        &self.devices
    }

    /// The guest's PMU; none if it has none.
    pub fn shape(&self) -> Option<&Shape> {
        self.shape.as_ref()
    }

    /// Whether the probe guest was booted.
    pub fn is_probe(&self) -> bool {
        self.probe
    }

    /// Whether it was built to receive a migration.
    pub fn is_incoming(&self) -> bool {
        self.incoming
    }

    /// How the guest ended, if it has.
    pub fn end(&self) -> Option<GuestEnd> {
        self.lifecycle.end()
    }

    /// Tells when vCPUs left the guest by themselves.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.lifecycle.changes.subscribe()
    }

    /// Whether any vCPU is in its run loop.
    pub fn is_running(&self) -> bool {
        self.vcpus.iter().any(|v| v.state() == State::Running)
    }

    /// Host core of each vCPU.
    pub fn cores(&self) -> Vec<u32> {
        self.vcpus.iter().map(VcpuHandle::core).collect()
    }

    /// Figures of each vCPU.
    pub fn statistics(&self) -> Vec<VcpuStatus> {
        self.vcpus
            .iter()
            .map(|v| {
                let s = v.stats();
                VcpuStatus {
                    vcpu: v.index(),
                    core: v.core(),
                    exits: s.exits,
                    pmu_msr_exits: s.pmu_msr_exits,
                    pmis: s.pmis,
                    guest_ns: s.guest_ns,
                }
            })
            .collect()
    }

    /// Our figures and the hypervisor's, read without stopping anybody.
    pub fn all_statistics(&self) -> Result<api::VirtualMachineStats, WorkerError> {
        let vcpus = self
            .statistics()
            .into_iter()
            .map(|s| api::VcpuStats {
                vcpu: s.vcpu,
                core: s.core,
                exits: s.exits,
                pmu_msr_exits: s.pmu_msr_exits,
                pmis: s.pmis,
                guest_ns: s.guest_ns,
                hypervisor: Vec::new(),
            })
            .collect();
        let mut all = api::VirtualMachineStats { vcpus, ..api::VirtualMachineStats::default() };
        for figure in self.vm.statistics()? {
            let list = match figure.vcpu {
                None => Some(&mut all.hypervisor),
                Some(vcpu) => all.vcpus.iter_mut().find(|v| v.vcpu == vcpu).map(|v| &mut v.hypervisor),
            };
            if let Some(list) = list {
                list.push(api::HypervisorStatistic { name: figure.name, values: figure.values });
            }
        }
        all.arriving_memory = self.lazy_stats().map(|lazy| api::ArrivingMemory {
            missing_pages: lazy.missing,
            placed_pages: lazy.placed,
            faults: lazy.faults,
        });
        Ok(all)
    }

    /// Enters the guest on every vCPU; returns CLOCK_MONOTONIC nanoseconds of the first entry.
    pub async fn run(&self) -> Result<u64, WorkerError> {
        let entered = self.ask("running the vCPUs", |v| v.ask(Request::Run)).await?;
        if self.end().is_some() {
            // The guest ended on one vCPU before another had entered, which the end's pause came too early for. One that
            // cannot be refused comes first: nobody saves this guest.
            for vcpu in &self.vcpus {
                vcpu.send(Request::Pause(None))?;
            }
            self.ask("pausing the vCPUs of a guest that has ended", |v| {
                v.ask(|reply| Request::Pause(Some(reply)))
            })
            .await?;
        }
        Ok(entered.into_iter().min().unwrap_or(0))
    }

    /// Gets every vCPU out of the guest, PMU put; returns the images.
    pub async fn pause(&self) -> Result<Vec<PmuImage>, WorkerError> {
        let images = self.ask("pausing the vCPUs", |v| v.ask(|reply| Request::Pause(Some(reply)))).await?;
        Ok(to_proto(images))
    }

    /// The PMU of every vCPU now.
    pub async fn look(&self) -> Result<Vec<PmuImage>, WorkerError> {
        // Never closed; were it, a look more would do no harm.
        let _turn = self.looks.acquire().await;
        Ok(to_proto(self.ask("reading the PMUs", |v| v.ask(Request::Look)).await?))
    }

    /// Registers of each vCPU's core that somebody else wrote; its PMU is put for it.
    pub async fn audit(&self) -> Result<Vec<Vec<pmu::core::ForeignWrite>>, WorkerError> {
        let _turn = self.looks.acquire().await;
        self.ask("auditing the cores", |v| v.ask(Request::Audit)).await
    }

    /// Ends every vCPU thread and waits for it; returns the last images. The VM and its memory are gone with it, unless somebody
    /// else holds them.
    pub async fn stop(self: Arc<Self>) -> Result<Vec<PmuImage>, WorkerError> {
        let images = self.stop_vcpus().await;
        // The kernel takes a VM apart in RCU's time and its memory page by page: whoever serves calls does not wait for that.
        if let Err(error) = tokio::task::spawn_blocking(move || drop(self)).await {
            tracing::error!(%error, "taking a machine apart");
        }
        images
    }

    async fn stop_vcpus(self: &Arc<Self>) -> Result<Vec<PmuImage>, WorkerError> {
        let machine = Arc::clone(self);
        // Before the vCPUs are asked: one may wait for a page inside KVM's emulator, where no kick reaches it.
        if let Err(error) = tokio::task::spawn_blocking(move || machine.end_lazy()).await {
            tracing::error!(%error, "giving up on memory that has not come");
        }
        let images = self.ask("stopping the vCPUs", |v| v.ask(|reply| Request::Stop(Some(reply)))).await;
        let machine = Arc::clone(self);
        let joined = tokio::task::spawn_blocking(move || machine.vcpus.iter().for_each(VcpuHandle::join));
        match tokio::time::timeout(COMMAND_DEADLINE, joined).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                return Err(WorkerError::Thread {
                    thread: "vCPU join".to_owned(),
                    problem: error.to_string(),
                });
            }
            Err(_) => {
                return Err(WorkerError::Deadline {
                    what: "joining the vCPU threads",
                    within: COMMAND_DEADLINE,
                });
            }
        }
        Ok(to_proto(images?))
    }

    /// The probe guest's report.
    pub fn probe_report(&self) -> Result<api::ProbeReport, WorkerError> {
        if !self.probe {
            return Err(WorkerError::State {
                what: "reading the probe's report",
                state: "not a probe guest".to_owned(),
                remedy: "create the VM with spec.probe",
            });
        }
        let vcpus = (0..self.vcpus.len() as u32)
            .map(|vcpu| {
                crate::probe::report(&self.memory, vcpu).map_err(|e| WorkerError::Boot {
                    reason: e.reason(),
                    field: None,
                    message: e.to_string(),
                })
            })
            .collect::<Result<_, _>>()?;
        Ok(api::ProbeReport { vcpus })
    }

    /// Sends to every vCPU, then waits for all of them.
    async fn ask<T>(
        &self,
        what: &'static str,
        send: impl Fn(&VcpuHandle) -> Result<Answer<T>, WorkerError>,
    ) -> Result<Vec<T>, WorkerError> {
        let _asked = Asked::now();
        let answers: Vec<_> = self.vcpus.iter().map(send).collect();
        answers::look(&answers, |vcpu| self.vcpus[vcpu].core());
        gather(what, answers).await
    }
}

/// Images in vCPU order as messages; guests without a PMU have none.
pub(crate) fn to_proto(images: Vec<Option<Image>>) -> Vec<PmuImage> {
    (0u32..).zip(images).filter_map(|(vcpu, image)| Some(image_to_proto(vcpu, &image?))).collect()
}
