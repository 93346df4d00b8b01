//! How a worker comes to be held: started for a machine that it builds, or taken over from a former daemon.
//!
//! Invariants: nothing is asked of a worker before it has attached with this daemon's term, so that commands of an earlier
//! one are refused there; a start that fails leaves no worker and no grant behind.

use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;
use vcpu_worker::in_process::InProcessWorker;
use vpmu_proto::api::VirtualMachineSpec;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::ending::is_mute;
use super::wire::{self, Way, call, client, unary};
use super::{Inner, WorkerLink};
use crate::capacity::Grant;
use crate::status::ApiError;
use crate::worker_process::{Processes, WorkerProcess};

/// Deadline of building a machine: it may allocate and load much.
const BUILD: Duration = Duration::from_secs(120);
/// The same with all of its memory read from a snapshot.
const RESTORE: Duration = Duration::from_secs(900);

/// What this host's workers are made of.
#[derive(Clone)]
pub struct WorkerFactory {
    /// One PMU and core token a host core, shared by all machines of this process.
    pub cores: Arc<vcpu_worker::cores::HostCores>,
    /// "kvm" or "simulated".
    pub hypervisor: &'static str,
    /// "model", "msr" or "kvm".
    pub pmu_mode: &'static str,
    /// The modelled host PMU.
    pub model_pmu: String,
    /// Identity of the store.
    pub store_id: String,
    /// Term of this daemon.
    pub term: u64,
    /// Ends workers in this process with the daemon.
    pub shutdown: CancellationToken,
    /// Deadline of an ordinary command.
    pub command: Duration,
    /// Workers in processes of their own.
    pub processes: Arc<Processes>,
}

/// What a new worker is told.
pub struct Launch<'a> {
    /// Machine.
    pub vm_uid: &'a str,
    /// For thread names.
    pub vm_name: &'a str,
    /// Which start this is.
    pub incarnation: u64,
    /// What to build.
    pub spec: &'a VirtualMachineSpec,
    /// State arrives by migration.
    pub incoming: bool,
    /// The PMU that it is to have, exactly; none: what the spec asks for.
    pub pmu_shape: Option<vpmu_proto::api::PmuShape>,
    /// State comes from a snapshot.
    pub restore: Option<RestoreFrom>,
    /// The machine has a worker that goes on meanwhile; this one is a process.
    pub beside: bool,
}

/// How a worker that was found is attached.
pub(super) struct First {
    request: AttachRequest,
    /// What it holds, by the cores that it says its vCPUs are on.
    grant: Box<dyn Fn(Vec<u32>) -> Grant + Send + Sync>,
    attached: OnceCell<()>,
}

impl WorkerLink {
    /// Starts a worker, attaches to it and builds the machine, paused.
    pub async fn launch(
        factory: &WorkerFactory,
        grant: Grant,
        launch: Launch<'_>,
    ) -> Result<(Self, CreateVmResponse), ApiError> {
        let failed = |e| ApiError::internal("WORKER_START_FAILED", format!("cannot start a worker: {e}"));
        let (way, thread, process) = if factory.processes.isolated() || launch.beside {
            let started = if launch.beside {
                factory.processes.start_beside(launch.vm_uid, launch.incarnation, launch.vm_name).await
            } else {
                factory.processes.start(launch.vm_uid, launch.vm_name).await
            };
            let (channel, process) = started.map_err(failed)?;
            (Way::There(client(channel)), None, Some(process))
        } else {
            let options = vcpu_worker::service::WorkerOptions::new(
                Arc::clone(&factory.cores),
                factory.shutdown.child_token(),
            );
            let (worker, thread) = InProcessWorker::start(options).map_err(failed)?;
            (Way::Here(worker), Some(thread), None)
        };
        let fence =
            Fence { vm_uid: launch.vm_uid.to_owned(), incarnation: launch.incarnation, term: factory.term };
        let cores = grant.cores.clone();
        let memory_nodes = grant.memory_nodes.clone();
        // A worker in this process is where this process's threads are kept anyway.
        let housekeeping_cores = if process.is_some() { grant.housekeeping() } else { Vec::new() };
        let link = Self {
            inner: Arc::new(Inner {
                way,
                lane: Arc::default(),
                fence: fence.clone(),
                seq: AtomicU64::new(0),
                cores: Mutex::new(cores.as_slice().into()),
                grant: Mutex::new(Some(grant)),
                thread: tokio::sync::Mutex::new(thread),
                process,
                outlives: !factory.processes.stop_vms,
                command: factory.command,
                first: None,
            }),
        };
        let built = async {
            let attach = AttachRequest {
                store_id: factory.store_id.clone(),
                vm_uid: launch.vm_uid.to_owned(),
                incarnation: launch.incarnation,
                term: factory.term,
            };
            unary!(link, factory.command, attach, attach)?;
            let request = CreateVmRequest {
                fence: Some(fence),
                vm_name: launch.vm_name.to_owned(),
                spec: Some(launch.spec.clone()),
                vcpu_cores: cores,
                hypervisor: factory.hypervisor.to_owned(),
                pmu_mode: factory.pmu_mode.to_owned(),
                model_pmu: factory.model_pmu.clone(),
                incoming: launch.incoming,
                placement: Some(ThreadPlacement {
                    fifo_priority: launch.spec.placement.as_ref().map_or(0, |p| p.fifo_priority),
                    memory_nodes,
                    housekeeping_cores,
                }),
                restore: launch.restore,
                pmu_shape: launch.pmu_shape,
            };
            let within = if request.restore.is_some() { RESTORE } else { BUILD };
            unary!(link, within, create_vm, request)
        };
        match built.await {
            Ok(response) => {
                if let Some(process) = &link.inner.process {
                    process.has_machine();
                }
                Ok((link, response))
            }
            Err(error) => {
                let error = link.cause(error).await;
                link.end().await;
                Err(error)
            }
        }
    }

    /// Takes over a process that a former daemon of the same store started. One that refuses is ended if it is
    /// `dispensable`, and left alone otherwise. Of one that does not answer nothing is known: it may live, and is
    /// attached before the first call that it answers. `cores`: where its vCPUs are until it says where.
    pub async fn adopt(
        factory: &WorkerFactory,
        process: WorkerProcess,
        (vm_uid, incarnation): (&str, u64),
        cores: Vec<u32>,
        grant: impl Fn(Vec<u32>) -> Grant + Send + Sync + 'static,
        dispensable: impl FnOnce(&ApiError) -> bool,
    ) -> Result<(Self, Option<WorkerStatus>), ApiError> {
        let fence = Fence { vm_uid: vm_uid.to_owned(), incarnation, term: factory.term };
        let request = AttachRequest {
            store_id: factory.store_id.clone(),
            vm_uid: vm_uid.to_owned(),
            incarnation,
            term: factory.term,
        };
        let inner = Inner {
            way: Way::There(client(process.connect())),
            lane: Arc::default(),
            fence,
            seq: AtomicU64::new(0),
            cores: Mutex::new(cores.as_slice().into()),
            grant: Mutex::new(Some(grant(cores))),
            thread: tokio::sync::Mutex::new(None),
            process: Some(process),
            outlives: !factory.processes.stop_vms,
            command: factory.command,
            first: Some(First { request, grant: Box::new(grant), attached: OnceCell::new() }),
        };
        let link = Self { inner: Arc::new(inner) };
        let mut status = None;
        match link.attached_as(|found| status = Some(found)).await {
            Ok(()) => Ok((link, status)),
            Err(error) if link.may_live(&error).await => Ok((link, None)),
            Err(error) => {
                // One that has no word of its own, and does not live, has ended.
                if dispensable(&error) || is_mute(&error) {
                    link.end().await;
                }
                link.keep();
                Err(error)
            }
        }
    }

    /// Attaches to it if it has not been yet: it obeys this daemon from then on, and no earlier one.
    pub(super) async fn attached(&self) -> Result<(), ApiError> {
        self.attached_as(drop).await
    }

    async fn attached_as(&self, told: impl FnOnce(WorkerStatus)) -> Result<(), ApiError> {
        let (Some(first), Way::There(client)) = (&self.inner.first, &self.inner.way) else { return Ok(()) };
        let attaching = async || {
            let answer = call(self.inner.command, client.clone().attach(first.request.clone())).await?;
            let status = answer.status.unwrap_or_default();
            let cores: Vec<u32> = status.vcpus.iter().map(|v| v.core).collect();
            let mut held = self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner);
            // None if it was ended meanwhile.
            if held.is_some() && *self.cores() != *cores {
                *self.inner.cores.lock().unwrap_or_else(PoisonError::into_inner) = cores.as_slice().into();
                *held = Some((first.grant)(cores));
            }
            drop(held);
            told(status);
            Ok(())
        };
        first.attached.get_or_try_init(attaching).await.copied()
    }
}
