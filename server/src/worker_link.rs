//! The control plane's end of one worker: a `vpmu.worker.v1` client, the fence that every command carries, and the
//! resources that the worker holds.
//!
//! In thread isolation the worker is served in this process over an in-memory channel (plain commands go to the service
//! itself, which is the same without the wire), in process isolation by a process
//! of its own over a Unix socket; nothing here relies on which but what starts, adopts and ends it. Every call has a deadline, so that no worker can hang an actor.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio_stream::{Stream, StreamExt as _};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Request, Response, Status};
use vcpu_worker::service::Worker;
use vpmu_proto::api::{ProbeReport, VirtualMachineSpec, VirtualMachineStats};
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use crate::capacity::Grant;
use crate::status::ApiError;
use crate::worker_process::{Processes, WorkerProcess};

/// The reason of an error that says nothing about the worker but that it did not answer in time: it may live.
pub const SILENT: &str = "WORKER_TIMEOUT";
/// Largest message that is taken from a worker, in bytes.
const MAX_ANSWER: usize = 16 << 20;
/// Deadline of building a machine: it may allocate and load much.
const BUILD: Duration = Duration::from_secs(120);
/// The same with all of its memory read from a snapshot.
const RESTORE: Duration = Duration::from_secs(900);
/// How long a process whose connection broke may take to end.
const GONE: Duration = Duration::from_secs(2);
/// Most console history that is kept of an ended machine, in bytes.
const CONSOLE_KEPT: usize = 1 << 20;

/// A call with one answer: of the service itself where that is in this process, else over the wire.
macro_rules! unary {
    ($link:expr, $deadline:expr, $method:ident, $request:expr) => {
        match &$link.inner.direct {
            Some(worker) => call($deadline, worker.$method(Request::new($request))).await,
            None => call($deadline, $link.client().$method($request)).await,
        }
    };
}

/// The same for a call that is answered by a stream.
macro_rules! streaming {
    ($link:expr, $method:ident, $request:expr) => {
        Ok(match &$link.inner.direct {
            Some(worker) => Told(call($link.inner.command, worker.$method(Request::new($request))).await?),
            None => Told(Box::pin(call($link.inner.command, $link.client().$method($request)).await?)),
        })
    };
}

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

/// What a worker tells one after the other, until it ends.
pub struct Told<T>(Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>);

impl<T> Told<T> {
    /// The next message, as [`tonic::Streaming::message`] has it.
    ///
    /// # Errors
    /// What the worker ended the stream with, or the connection.
    pub async fn message(&mut self) -> Result<Option<T>, Status> {
        self.next().await.transpose()
    }
}

impl<T> Stream for Told<T> {
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.0.as_mut().poll_next(context)
    }
}

/// A worker; cloned freely, ended by [`WorkerLink::end`] or with its last clone.
#[derive(Clone)]
pub struct WorkerLink {
    inner: Arc<Inner>,
}

/// A worker as who watches it holds it.
pub struct WeakWorker(std::sync::Weak<Inner>);

impl WeakWorker {
    /// Its events, asked for until it answers in some way. Whoever lets it go meanwhile ends this.
    pub async fn watch_until_answered(&self) -> Result<Told<WorkerEvent>, ApiError> {
        loop {
            let Some(inner) = self.0.upgrade() else {
                return Err(ApiError::internal("WORKER_GONE", "the worker was let go before it answered"));
            };
            // Each call waits for its deadline: there is no need to pause between them.
            match (WorkerLink { inner }).watch_events().await {
                Err(error) if error.reason() == SILENT => {}
                answer => return answer,
            }
        }
    }

    /// What to make of its event stream's end.
    pub async fn death(&self, detail: &str) -> WorkerEvent {
        match self.0.upgrade() {
            Some(inner) => WorkerLink { inner }.death(detail).await,
            None => crate::vm::actor::worker_died(detail),
        }
    }
}

/// How it is reached over gRPC.
enum To {
    Process(Box<WorkerServiceClient<Channel>>),
    Thread(vcpu_worker::channel::Wire),
}

fn client(channel: Channel) -> WorkerServiceClient<Channel> {
    WorkerServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER)
}

struct Inner {
    to: To,
    /// The service itself where it is in this process: commands then need no wire, only streams do.
    direct: Option<Worker>,
    fence: Fence,
    seq: AtomicU64,
    cores: Mutex<Arc<[u32]>>,
    grant: Mutex<Option<Grant>>,
    thread: tokio::sync::Mutex<Option<vcpu_worker::channel::InProcessWorker>>,
    process: Option<WorkerProcess>,
    outlives: bool,
    /// Deadline of an ordinary command.
    command: Duration,
}

/// Console output of an ended machine.
#[derive(Debug, Default)]
pub struct ConsoleHistory {
    /// Offset of `data` in the whole output.
    pub offset: u64,
    /// The kept part.
    pub data: Vec<u8>,
}

impl From<ConsoleState> for ConsoleHistory {
    fn from(state: ConsoleState) -> Self {
        Self { offset: state.offset, data: state.data }
    }
}

impl WorkerLink {
    /// Starts a worker, attaches to it and builds the machine, paused.
    pub async fn launch(
        factory: &WorkerFactory,
        grant: Grant,
        launch: Launch<'_>,
    ) -> Result<(Self, CreateVmResponse), ApiError> {
        let failed = |e| ApiError::internal("WORKER_START_FAILED", format!("cannot start a worker: {e}"));
        let (wire, thread, process) = if factory.processes.isolated() || launch.beside {
            let started = if launch.beside {
                factory.processes.start_beside(launch.vm_uid, launch.incarnation, launch.vm_name).await
            } else {
                factory.processes.start(launch.vm_uid, launch.vm_name).await
            };
            let (channel, process) = started.map_err(failed)?;
            (To::Process(Box::new(client(channel))), None, Some(process))
        } else {
            let options = vcpu_worker::service::WorkerOptions::new(
                Arc::clone(&factory.cores),
                factory.shutdown.child_token(),
            );
            let worker = vcpu_worker::channel::in_process(options).map_err(failed)?;
            (To::Thread(worker.wire()), Some(worker), None)
        };
        let fence =
            Fence { vm_uid: launch.vm_uid.to_owned(), incarnation: launch.incarnation, term: factory.term };
        let cores = grant.cores.clone();
        let memory_nodes = grant.memory_nodes.clone();
        // A worker in this process is where this process's threads are kept anyway.
        let housekeeping_cores = if process.is_some() { grant.housekeeping() } else { Vec::new() };
        let link = Self {
            inner: Arc::new(Inner {
                to: wire,
                direct: thread.as_ref().and_then(vcpu_worker::channel::InProcessWorker::direct),
                fence: fence.clone(),
                seq: AtomicU64::new(0),
                cores: Mutex::new(cores.as_slice().into()),
                grant: Mutex::new(Some(grant)),
                thread: tokio::sync::Mutex::new(thread),
                process,
                outlives: !factory.processes.stop_vms,
                command: factory.command,
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

    /// Why a call failed: the end of the worker's process, if that is why.
    pub async fn cause(&self, error: ApiError) -> ApiError {
        // What a broken connection looks like: the worker itself would have given a reason.
        let broken = ["WORKER_UNKNOWN", "WORKER_UNAVAILABLE", "WORKER_CANCELLED", "WORKER_INTERNAL"];
        if !broken.contains(&error.reason()) || self.inner.process.is_none() || !self.is_dead().await {
            return error;
        }
        let words = self.inner.process.as_ref().map(WorkerProcess::last_words).unwrap_or_default();
        let why = self.obituary().await;
        ApiError::internal(why.reason(), format!("{}; {words}", why.message()))
    }

    /// Takes over a process that a former daemon of the same store started. One that does not obey is ended if it is
    /// `dispensable`, and left alone otherwise.
    pub async fn adopt(
        factory: &WorkerFactory,
        process: WorkerProcess,
        vm_uid: &str,
        incarnation: u64,
        grant: impl FnOnce(Vec<u32>) -> Grant,
        dispensable: impl FnOnce(&ApiError) -> bool,
    ) -> Result<(Self, WorkerStatus), ApiError> {
        let fence = Fence { vm_uid: vm_uid.to_owned(), incarnation, term: factory.term };
        let client = client(process.connect());
        let attach = AttachRequest {
            store_id: factory.store_id.clone(),
            vm_uid: vm_uid.to_owned(),
            incarnation,
            term: factory.term,
        };
        let attached = call(factory.command, client.clone().attach(attach)).await;
        let status = match attached {
            Ok(answer) => answer.status.unwrap_or_default(),
            Err(error) => {
                if dispensable(&error) {
                    process.end().await;
                }
                process.keep();
                return Err(error);
            }
        };
        let cores: Vec<u32> = status.vcpus.iter().map(|v| v.core).collect();
        let inner = Inner {
            to: To::Process(Box::new(client)),
            direct: None,
            fence,
            seq: AtomicU64::new(0),
            cores: Mutex::new(cores.as_slice().into()),
            grant: Mutex::new(Some(grant(cores))),
            thread: tokio::sync::Mutex::new(None),
            process: Some(process),
            outlives: !factory.processes.stop_vms,
            command: factory.command,
        };
        Ok((Self { inner: Arc::new(inner) }, status))
    }

    /// Which start of its machine it is.
    pub fn incarnation(&self) -> u64 {
        self.inner.fence.incarnation
    }

    /// Process id in process isolation, else 0.
    pub fn pid(&self) -> u32 {
        self.inner.process.as_ref().map_or(0, WorkerProcess::pid)
    }

    /// How its process is confined; empty in thread isolation.
    pub fn sandbox(&self) -> &str {
        self.inner.process.as_ref().map_or("", WorkerProcess::sandbox)
    }

    /// Whether its machine goes on when the daemon ends: at an upgrade every process does.
    pub fn outlives_daemon(&self, upgrading: bool) -> bool {
        self.inner.process.is_some() && (self.inner.outlives || upgrading)
    }

    /// The daemon ends: the worker goes on without it.
    pub fn keep(&self) {
        if let Some(process) = &self.inner.process {
            process.keep();
        }
    }

    /// Whether its process has ended; false in thread isolation.
    pub async fn is_dead(&self) -> bool {
        let Some(process) = &self.inner.process else { return false };
        tokio::time::timeout(GONE, process.exited()).await.is_ok()
    }

    /// Returns once its process has ended; never in thread isolation, where nothing but the daemon's end can.
    pub async fn died(&self) {
        match &self.inner.process {
            Some(process) => process.exited().await,
            None => std::future::pending().await,
        }
    }

    /// Why its process, which has ended, ended.
    pub async fn obituary(&self) -> ApiError {
        let end = self.death("it died").await.end.unwrap_or_default();
        let (_, reason) = crate::vm::actor::ended_state(&end, true);
        ApiError::internal(reason, end.detail)
    }

    /// Whether a call failed because its process has ended: then the error has no words of the worker's own.
    pub async fn died_of(&self, error: &ApiError) -> bool {
        const BROKEN: [&str; 4] =
            ["WORKER_UNAVAILABLE", "WORKER_UNKNOWN", "WORKER_CANCELLED", "WORKER_INTERNAL"];
        BROKEN.contains(&error.reason()) && self.is_dead().await
    }

    /// What to make of a worker whose event stream broke: how its guest had ended, or that it died.
    pub async fn death(&self, detail: &str) -> WorkerEvent {
        let mut event = crate::vm::actor::worker_died(detail);
        if let Some(process) = &self.inner.process
            && self.is_dead().await
        {
            event = crate::vm::actor::worker_died(&format!("its process {} ended: {detail}", process.pid()));
            event.end = process.guest_end().or(event.end);
        }
        event
    }

    /// Does not keep it.
    pub fn downgrade(&self) -> WeakWorker {
        WeakWorker(Arc::downgrade(&self.inner))
    }

    fn client(&self) -> WorkerServiceClient<Channel> {
        match &self.inner.to {
            To::Process(client) => WorkerServiceClient::clone(client),
            To::Thread(wire) => client(wire.channel()),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "every request has it as an optional message")]
    fn fence(&self) -> Option<Fence> {
        Some(self.inner.fence.clone())
    }

    /// Host core of each vCPU.
    pub fn cores(&self) -> Arc<[u32]> {
        Arc::clone(&self.inner.cores.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Moves its vCPUs to other cores of this host; returns where they are.
    pub async fn place(
        &self,
        wanted: &crate::placement::Wanted,
        fifo_priority: u32,
    ) -> Result<Vec<u32>, ApiError> {
        let moving = {
            let grant = self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner);
            let ended = || ApiError::aborted("VM_GONE", "", "the machine ended meanwhile; look again");
            grant.as_ref().ok_or_else(ended)?.begin_move(wanted)?
        };
        let cores = moving.cores.clone();
        let request =
            UpdatePlacementRequest { fence: self.fence(), vcpu_cores: cores.clone(), fifo_priority };
        let error = match unary!(self, self.inner.command, update_placement, request) {
            Ok(answer) if answer.vcpu_cores == cores => {
                moving.keep();
                *self.inner.cores.lock().unwrap_or_else(PoisonError::into_inner) = cores.as_slice().into();
                return Ok(cores);
            }
            Ok(answer) => {
                let found = answer.vcpu_cores;
                ApiError::internal(
                    "PLACEMENT_UNCERTAIN",
                    format!(
                        "the worker says that its vCPUs are on {found:?} instead of {cores:?}; stop the machine"
                    ),
                )
            }
            Err(error) => error,
        };
        // Only a worker that refused, or moved everything back, is known to be where it was.
        if !matches!(error.code(), tonic::Code::FailedPrecondition | tonic::Code::InvalidArgument) {
            moving.leave_both();
        }
        Err(error)
    }

    /// Gives the right to run at `epoch`, and runs at once if asked. Returns the monotonic time of the first entry, ns.
    pub async fn grant(&self, epoch: u64, run: bool) -> Result<u64, ApiError> {
        let seq = self.inner.seq.fetch_add(1, Ordering::Relaxed) + 1;
        let request = GrantRequest { fence: self.fence(), epoch, seq, deadline_boottime_ns: 0, run };
        Ok(unary!(self, self.inner.command, grant, request)?.running_monotonic_ns)
    }

    /// Takes every right to run at `epoch` and below.
    pub async fn seal(&self, migration_id: &str, epoch: u64) -> Result<(), ApiError> {
        let request = SealRequest { fence: self.fence(), migration_id: migration_id.to_owned(), epoch };
        unary!(self, self.inner.command, seal, request).map(drop)
    }

    /// Lets a paused machine run on.
    pub async fn run(&self) -> Result<(), ApiError> {
        let request = RunRequest { fence: self.fence() };
        unary!(self, self.inner.command, run, request).map(drop)
    }

    /// Gets every vCPU out and returns the PMU images.
    pub async fn pause(&self) -> Result<Vec<PmuImage>, ApiError> {
        let request = PauseRequest { fence: self.fence() };
        Ok(unary!(self, self.inner.command, pause, request)?.pmu)
    }

    /// What the worker is.
    pub async fn status(&self) -> Result<WorkerStatus, ApiError> {
        unary!(self, self.inner.command, get_status, GetStatusRequest { fence: self.fence() })
    }

    /// PMU images now.
    pub async fn pmu(&self) -> Result<Vec<PmuImage>, ApiError> {
        Ok(unary!(self, self.inner.command, get_pmu, GetPmuRequest { fence: self.fence() })?.pmu)
    }

    /// Registers of its vCPUs' cores that somebody else wrote.
    pub async fn audit_pmu(&self) -> Result<Vec<CoreAudit>, ApiError> {
        Ok(unary!(self, self.inner.command, audit_pmu, AuditPmuRequest { fence: self.fence() })?.vcpus)
    }

    /// Where its threads that run no vCPU may be.
    pub async fn set_housekeeping(&self, cores: Vec<u32>) -> Result<(), ApiError> {
        let request = SetHousekeepingRequest { fence: self.fence(), cores };
        unary!(self, self.inner.command, set_housekeeping, request).map(drop)
    }

    /// Figures, read without stopping the guest.
    pub async fn stats(&self) -> Result<VirtualMachineStats, ApiError> {
        unary!(self, self.inner.command, get_stats, GetStatsRequest { fence: self.fence() })
    }

    /// The probe guest's report.
    pub async fn probe_report(&self) -> Result<ProbeReport, ApiError> {
        unary!(self, self.inner.command, get_probe_report, GetProbeReportRequest { fence: self.fence() })
    }

    /// Console output.
    pub async fn read_console(
        &self,
        offset: u64,
        follow: bool,
    ) -> Result<Told<ReadConsoleResponse>, ApiError> {
        let request = ReadConsoleRequest { fence: self.fence(), offset, follow };
        streaming!(self, read_console, request)
    }

    /// Console input; returns how many bytes were taken.
    pub async fn write_console(&self, data: Vec<u8>) -> Result<u32, ApiError> {
        let request = WriteConsoleRequest { fence: self.fence(), data };
        Ok(unary!(self, self.inner.command, write_console, request)?.accepted)
    }

    /// What its process left of console output; nothing in thread isolation.
    pub async fn last_output(&self) -> ConsoleHistory {
        let inner = Arc::clone(&self.inner);
        let read = move || inner.process.as_ref().and_then(WorkerProcess::last_output);
        let read = tokio::task::spawn_blocking(read).await;
        read.ok().flatten().map(ConsoleHistory::from).unwrap_or_default()
    }

    /// What there is of console output, bounded; also of a process that has died.
    pub async fn console_history(&self) -> ConsoleHistory {
        let mut history = ConsoleHistory::default();
        let Ok(mut stream) = self.read_console(0, false).await else { return self.last_output().await };
        loop {
            let piece = match tokio::time::timeout(self.inner.command, stream.message()).await {
                Ok(Ok(Some(piece))) => piece,
                Ok(Ok(None)) => break,
                Ok(Err(_)) | Err(_) => {
                    let last = self.last_output().await;
                    return if last.data.is_empty() { history } else { last };
                }
            };
            if history.data.is_empty() {
                history.offset = piece.offset;
            }
            history.data.extend_from_slice(&piece.data);
            if history.data.len() > CONSOLE_KEPT {
                let excess = history.data.len() - CONSOLE_KEPT;
                history.data.drain(..excess);
                history.offset += excess as u64;
            }
        }
        history
    }

    /// State changes that the guest or KVM caused.
    pub async fn watch_events(&self) -> Result<Told<WorkerEvent>, ApiError> {
        let request = WatchEventsRequest { fence: self.fence() };
        streaming!(self, watch_events, request)
    }

    /// Source: makes a certificate for a migration. Empty where the worker is of a version that cannot.
    pub async fn prepare_outgoing(&self, migration_id: &str) -> Result<Vec<u8>, ApiError> {
        let request = PrepareOutgoingRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        match unary!(self, self.inner.command, prepare_outgoing, request) {
            Ok(answer) => Ok(answer.certificate_sha256),
            Err(error) if error.code() == tonic::Code::Unimplemented => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Begins to write the paused machine to a file. Dropping the stream cancels it.
    pub async fn save_snapshot(
        &self,
        path: String,
        manifest: SnapshotManifest,
    ) -> Result<Told<SnapshotProgress>, ApiError> {
        let request = SaveSnapshotRequest { fence: self.fence(), path, manifest: Some(manifest) };
        streaming!(self, save_snapshot, request)
    }

    /// Source: begins copying.
    pub async fn migrate_out(
        &self,
        mut request: MigrateOutRequest,
    ) -> Result<Told<MigrateOutProgress>, ApiError> {
        request.fence = self.fence();
        streaming!(self, migrate_out, request)
    }

    /// Source, post-copy: how far it is with serving pages, after a moment or at the end.
    pub async fn wait_drained(&self, migration_id: &str) -> Result<WaitDrainedResponse, ApiError> {
        let request = WaitDrainedRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        unary!(self, self.inner.command, wait_drained, request)
    }

    /// Destination, post-copy: the source's worker has ended. A worker that has no such command finds out by time.
    pub async fn forget_source(&self, migration_id: &str) -> Result<(), ApiError> {
        let request = ForgetSourceRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        match unary!(self, self.inner.command, forget_source, request) {
            Err(error) if error.code() == tonic::Code::Unimplemented => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Source: stops, seals and sends the rest.
    pub async fn finish_migration(
        &self,
        migration_id: &str,
        epoch: u64,
        deadline: Duration,
    ) -> Result<FinishMigrationResponse, ApiError> {
        let request =
            FinishMigrationRequest { fence: self.fence(), migration_id: migration_id.to_owned(), epoch };
        unary!(self, deadline, finish_migration, request)
    }

    /// Source: gives up.
    pub async fn cancel_migration(&self, migration_id: &str) -> Result<(), ApiError> {
        let request = CancelMigrationRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        unary!(self, self.inner.command, cancel_migration, request).map(drop)
    }

    /// Destination: opens the data listener; answers its real address and certificate.
    pub async fn prepare_incoming(
        &self,
        mut request: PrepareIncomingRequest,
    ) -> Result<PrepareIncomingResponse, ApiError> {
        request.fence = self.fence();
        unary!(self, self.inner.command, prepare_incoming, request)
    }

    /// Destination: progress until ready.
    pub async fn watch_incoming(&self, migration_id: &str) -> Result<Told<IncomingProgress>, ApiError> {
        let request = WatchIncomingRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        streaming!(self, watch_incoming, request)
    }

    /// Ends the machine and returns its last PMU images; then ends the worker and gives its resources back.
    pub async fn shutdown(&self) -> Result<Vec<PmuImage>, ApiError> {
        let answer = unary!(self, self.inner.command, shutdown, ShutdownRequest { fence: self.fence() });
        self.end().await;
        Ok(answer?.pmu)
    }

    /// Ends the worker without asking it anything; its threads are joined.
    pub async fn end(&self) {
        if let Some(thread) = self.inner.thread.lock().await.take() {
            thread.join().await;
        }
        if let Some(process) = &self.inner.process {
            process.end().await;
        }
        drop(self.inner.grant.lock().unwrap_or_else(PoisonError::into_inner).take());
    }
}

async fn call<T>(
    deadline: Duration,
    future: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, ApiError> {
    match tokio::time::timeout(deadline, future).await {
        Ok(Ok(response)) => Ok(response.into_inner()),
        Ok(Err(status)) => Err(ApiError::from_status("worker", &status)),
        Err(_) => Err(ApiError::unavailable(
            SILENT,
            format!("the worker did not answer within {deadline:?}; stop the machine if this persists"),
        )),
    }
}
