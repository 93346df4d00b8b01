//! How a worker comes to be held: started for a machine that it builds, or taken over from a former daemon.
//!
//! Invariants: nothing is asked of a worker before it attaches with this daemon's term, so that commands of an earlier
//! one are refused there; a start that fails leaves no worker and no grant behind.

use std::sync::atomic::{AtomicBool, AtomicU64};
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
    /// The machine has never had a worker.
    pub first: bool,
}

#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn start_failed(error: std::io::Error) -> ApiError {
    ApiError::internal("WORKER_START_FAILED", format!("cannot start a worker: {error}"))
}

fn attach_request(factory: &WorkerFactory, launch: &Launch<'_>) -> AttachRequest {
    AttachRequest {
        store_id: factory.store_id.clone(),
        vm_uid: launch.vm_uid.to_owned(),
        incarnation: launch.incarnation,
        term: factory.term,
    }
}

/// How a worker that was found is attached.
pub(super) struct First {
    request: AttachRequest,
    /// What it holds, by the cores that it says its vCPUs are on.
    grant: Box<dyn Fn(Vec<u32>) -> Grant + Send + Sync>,
    attached: OnceCell<()>,
}

impl WorkerLink {
    /// Starts a worker, attaches to it and has the machine built, paused.
    pub async fn launch(
        factory: &WorkerFactory,
        grant: Grant,
        launch: Launch<'_>,
    ) -> Result<(Self, CreateVmResponse), ApiError> {
        let link = Self::open(factory, grant, &launch).await?;
        let built = link.build(factory, launch).await?;
        Ok((link, built))
    }

    /// Starts a worker, which [`Self::build`] has attach if it has not yet.
    pub async fn open(factory: &WorkerFactory, grant: Grant, launch: &Launch<'_>) -> Result<Self, ApiError> {
        let (way, thread, process) = if factory.processes.isolated() || launch.beside {
            let (uid, name) = (launch.vm_uid, launch.vm_name);
            let started = if launch.beside {
                factory.processes.start_beside(uid, launch.incarnation, name).await
            } else if launch.first {
                factory.processes.start_first(uid, name).await
            } else {
                factory.processes.start(uid, name).await
            };
            let (channel, process) = started.map_err(start_failed)?;
            (Way::There(client(channel)), None, Some(process))
        } else {
            let options = vcpu_worker::service::WorkerOptions::new(
                Arc::clone(&factory.cores),
                factory.shutdown.child_token(),
            );
            let (worker, thread) = InProcessWorker::start(options).map_err(start_failed)?;
            (Way::Here(worker), Some(thread), None)
        };
        let fence =
            Fence { vm_uid: launch.vm_uid.to_owned(), incarnation: launch.incarnation, term: factory.term };
        // One that may be of another version may not know that it can.
        let attaches_with_build = process.as_ref().is_some_and(WorkerProcess::is_of_own_binary);
        let link = Self {
            inner: Arc::new(Inner {
                way,
                lane: Arc::default(),
                attaches_with_build,
                fence,
                seq: AtomicU64::new(0),
                cores: Mutex::new(grant.cores.as_slice().into()),
                grant: Mutex::new(Some(grant)),
                thread: tokio::sync::Mutex::new(thread),
                process,
                outlives: !factory.processes.stop_vms,
                departed: AtomicBool::default(),
                command: factory.command,
                first: None,
            }),
        };
        if link.inner.attaches_with_build {
            return Ok(link);
        }
        match unary!(link, factory.command, attach, attach_request(factory, launch)) {
            Ok(_) => Ok(link),
            Err(error) => Err(link.failed(error).await),
        }
    }

    /// Waits until a worker that was a spare is where its machine's is looked for.
    pub async fn claimed(&self) -> Result<(), ApiError> {
        match &self.inner.process {
            Some(process) => process.claimed().await.map_err(start_failed),
            None => Ok(()),
        }
    }

    /// Has it build its machine, paused. One that does not is ended.
    pub async fn build(
        &self,
        factory: &WorkerFactory,
        launch: Launch<'_>,
    ) -> Result<CreateVmResponse, ApiError> {
        let (memory_nodes, housekeeping_cores) = {
            let grant = self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner);
            // A worker in this process is where this process's threads are kept anyway.
            let apart = grant.as_ref().filter(|_| self.inner.process.is_some());
            (
                grant.as_ref().map(|grant| grant.memory_nodes.clone()).unwrap_or_default(),
                apart.map(Grant::housekeeping).unwrap_or_default(),
            )
        };
        let attach = self.inner.attaches_with_build.then(|| attach_request(factory, &launch));
        let request = CreateVmRequest {
            attach,
            fence: self.fence(),
            vm_name: launch.vm_name.to_owned(),
            spec: Some(launch.spec.clone()),
            vcpu_cores: self.cores().to_vec(),
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
        let built = Box::pin(async { unary!(self, within, create_vm, request) });
        let waited = async {
            tokio::select! {
                biased;
                built = built => built,
                silent = Box::pin(self.silent()) => Err(silent),
            }
        };
        match tokio::try_join!(biased; waited, self.claimed()) {
            Ok((response, ())) => {
                if let Some(process) = &self.inner.process {
                    process.has_machine();
                }
                Ok(response)
            }
            Err(error) => Err(self.failed(error).await),
        }
    }

    /// Returns once a worker that takes its time is found to answer nothing at all.
    async fn silent(&self) -> ApiError {
        loop {
            tokio::time::sleep(self.inner.command).await;
            match self.status().await {
                Err(error) if error.reason() == wire::SILENT => return error,
                Ok(_) | Err(_) => {}
            }
        }
    }

    /// Ends one that came to nothing; why, if it can be told better.
    async fn failed(&self, error: ApiError) -> ApiError {
        // What it has left is read where it is.
        drop(self.claimed().await);
        let error = self.cause(error).await;
        self.end().await;
        error
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
            attaches_with_build: false,
            fence,
            seq: AtomicU64::new(0),
            cores: Mutex::new(cores.as_slice().into()),
            grant: Mutex::new(Some(grant(cores))),
            thread: tokio::sync::Mutex::new(None),
            process: Some(process),
            outlives: !factory.processes.stop_vms,
            departed: AtomicBool::default(),
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
