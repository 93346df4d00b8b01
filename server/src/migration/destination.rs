//! The destination before anything has arrived: a reservation, a worker that listens, and the task that goes on in
//! `destination_run` with a machine of `handover::destination`.
//!
//! Invariants: from Ready on the copy is dropped only on the source's abort; `Entered` is durable before the grant; one
//! task owns the worker until the machine's actor adopts it.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};
use tonic::{Status, Streaming};
use vpmu_proto::api::migration_spec::PmuRestore;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::{MigrationSpec, PmuLoss, PmuRestored, VirtualMachine};
use vpmu_proto::peer::{DestinationMessage, PrepareRequest, PrepareResponse, SourceMessage};
use vpmu_proto::store::{OwnershipRecord, VmRecord};
use vpmu_proto::worker::PrepareIncomingRequest;

use super::check;
use super::destination_run::Work;
use super::force::Ear;
use crate::daemon::Daemon;
use crate::handover::Handover;
use crate::handover::destination::Destination as Machine;
use crate::names::VmName;
use crate::peer::VERSION;
use crate::status::ApiError;
use crate::vm::registry::VmHandle;
use crate::worker_link::{Launch, WorkerLink};

/// How the names of data sockets begin.
const DATA_SOCKET: &str = "in-";
/// Longest socket path that workers can use.
const MAX_DATA_PATH: usize = 100;
/// Incarnation of the worker that receives: the first on this host at its epoch.
const INCARNATION: u64 = 1;

/// A stream from the source, handed to the task of its migration.
pub struct Conversation {
    /// The machine that its first message names.
    pub vm_uid: String,
    /// From the source.
    pub from: Streaming<SourceMessage>,
    /// To the source.
    pub to: mpsc::Sender<Result<DestinationMessage, Status>>,
}

/// Where streams of one incoming migration are handed in.
pub type Door = mpsc::Sender<Conversation>;

/// Where the data listener is opened: beside the way the source came.
pub enum Way {
    /// Over a Unix socket.
    Unix,
    /// Over TCP, to this address of ours.
    Tcp(std::net::IpAddr),
}

/// Reserves for one migration; everything is given back if any part fails.
pub async fn prepare(
    daemon: &Arc<Daemon>,
    request: PrepareRequest,
    way: Way,
) -> Result<PrepareResponse, ApiError> {
    if daemon.shutdown.is_cancelled() {
        return Err(ApiError::shutting_down());
    }
    let awake = daemon.awake.hold();
    let needs = request.requirements.clone().unwrap_or_default();
    let vm = needs.vm.clone().unwrap_or_default();
    let name = VmName::parse("requirements.vm.name", &vm.name, "")?;
    let migration_id = uuid::Uuid::try_parse(&request.migration_id).map_err(|_| {
        ApiError::invalid(
            "migration_id",
            &request.migration_id,
            "BAD_ID",
            "is not a UUID",
            "repair the source",
        )
    })?;
    if request.version != VERSION || request.epoch == 0 || request.epoch > u64::MAX - 8 {
        let found = format!("version {} epoch {}", request.version, request.epoch);
        return Err(ApiError::invalid(
            "version",
            found,
            "VERSION",
            "is not understood",
            "upgrade the older host",
        ));
    }
    check::refuse(&vm.name, &check::mismatches(daemon, &needs))?;
    let record = VmRecord { vm: Some(arriving(vm)), pmu_shape: check::pmu_there(daemon, &needs) };
    settled(daemon, uid(&record)).await?;
    vacated(daemon, uid(&record)).await?;
    let handle = match daemon.registry.get(&name) {
        Ok(handle) if handle.uid == uid(&record) => handle,
        Ok(_) | Err(_) => {
            daemon.registry.insert(daemon, &name, record.clone(), OwnershipRecord::default(), false)?
        }
    };
    let desired = record.vm.as_ref().map(VirtualMachine::desired_state);
    let machine = Machine::new(Handover {
        vm_uid: handle.uid.clone(),
        migration_id: migration_id.to_string(),
        epoch: request.epoch,
        host: daemon.host.host_id.clone(),
        peer_host: request.source_host.clone(),
        peer_address: request.source_address.clone(),
        peer_store: request.source_host.clone(),
        incarnation: INCARNATION,
        run: desired != Some(DesiredState::Paused),
    });
    let voice = daemon.migrations.answers.voice(&migration_id.to_string(), machine.answer());
    let (answer, prepared) = oneshot::channel();
    let mut work = Work::new(machine, voice, answer, Ear::of(daemon, &handle.uid));
    work.awake = Some(awake);
    let arrival = Incoming {
        daemon: Arc::clone(daemon),
        handle,
        record,
        id: migration_id,
        request,
        way,
        ownership: OwnershipRecord::default(),
        worker: None,
        work,
    };
    daemon.tasks.spawn(arrival.run());
    prepared.await.unwrap_or_else(|_| Err(ApiError::internal("TASK_FAILED", "the arrival's task failed")))
}

/// An earlier arrival of the machine, cut off by a restart of this daemon, is over: its source is asked about it.
async fn settled(daemon: &Daemon, uid: &str) -> Result<(), ApiError> {
    let Some(over) = daemon.migrations.settling().get(uid).cloned() else { return Ok(()) };
    tokio::time::timeout(daemon.limits.settle, over.cancelled()).await.map_err(|_| {
        ApiError::unavailable(
            "EARLIER_MIGRATION_OPEN",
            "an earlier migration of this machine to this host is not settled: its source does not answer; see that it is up",
        )
    })
}

/// The kernel has taken apart the worker that it had here, if it left a moment ago.
async fn vacated(daemon: &Daemon, uid: &str) -> Result<(), ApiError> {
    let gone = daemon.workers.processes.departing.gone(Some(uid));
    // The source waits for the answer to this call that long in all.
    tokio::time::timeout(daemon.limits.call / 2, gone).await.map_err(|_| {
        ApiError::unavailable(
            "FORMER_WORKER_ENDING",
            "the worker that this machine had here before is still being taken apart by the kernel; try again in a moment",
        )
    })
}

fn uid(record: &VmRecord) -> &str {
    record.vm.as_ref().map_or("", |vm| vm.uid.as_str())
}

/// The record as it is shown while it arrives.
pub(super) fn arriving(mut vm: VirtualMachine) -> VirtualMachine {
    vm.moved_to.clear();
    vm.vcpu_cores.clear();
    vm.reason.clear();
    vm.message.clear();
    vm.worker_pid = 0;
    vm.sandbox.clear();
    // It came as it is at its source: here it does not run yet.
    vm.set_observed_state(State::Incoming);
    vm
}

/// Where the worker that is to receive a machine listens, if that is a Unix socket.
pub(super) fn data_socket(daemon: &Daemon, id: uuid::Uuid) -> PathBuf {
    let file = format!("{DATA_SOCKET}{}.sock", &id.simple().to_string()[..12]);
    let path = state_dir(daemon).join(&file);
    if path.as_os_str().len() > MAX_DATA_PATH {
        return std::env::temp_dir().join(format!("vpmud-{file}"));
    }
    path
}

/// One machine on its way here.
pub(super) struct Incoming {
    pub(super) daemon: Arc<Daemon>,
    pub(super) handle: VmHandle,
    pub(super) record: VmRecord,
    pub(super) id: uuid::Uuid,
    /// What was asked; of no use once it is built.
    pub(super) request: PrepareRequest,
    pub(super) way: Way,
    /// The record that holds.
    pub(super) ownership: OwnershipRecord,
    pub(super) worker: Option<WorkerLink>,
    pub(super) work: Work,
}

impl Incoming {
    /// Builds what receives, and says where it listens.
    pub(super) async fn build(&mut self) -> Result<PrepareResponse, ApiError> {
        let vm = self.record.vm.clone().unwrap_or_default();
        let spec = vm.spec.unwrap_or_default();
        let asked = self.request.requirements.as_ref().and_then(|r| r.spec.clone()).unwrap_or_default();
        let local = self.request.requirements.as_ref().is_some_and(|needs| !needs.local_boot_id.is_empty());
        let certificate = std::mem::take(&mut self.request.certificate_sha256);
        // Memory that is handed over leaves no machine: there is nothing to encrypt.
        let encrypted = !local && self.encrypted(&asked, &certificate)?;
        let peer_certificate_sha256 = if encrypted { certificate } else { vec![] };
        if local {
            self.way = Way::Unix;
        }
        let listen = self.data_address();
        let grant = self.daemon.capacity.grant(self.handle.name.vm(), &spec)?;
        let launch = Launch {
            vm_uid: &self.handle.uid,
            vm_name: self.handle.name.vm(),
            incarnation: INCARNATION,
            spec: &spec,
            incoming: true,
            pmu_shape: self.record.pmu_shape.clone(),
            restore: None,
            beside: false,
            first: false,
        };
        let (worker, built) = WorkerLink::launch(&self.daemon.workers, grant, launch).await?;
        self.worker = Some(worker.clone());
        if self.record.pmu_shape.is_none() {
            self.record.pmu_shape = built.pmu_shape;
        }
        // Two UUIDs: 244 random bits, from the system's generator.
        let mut token = uuid::Uuid::new_v4().as_bytes().to_vec();
        token.extend_from_slice(uuid::Uuid::new_v4().as_bytes());
        let incoming = PrepareIncomingRequest {
            fence: None,
            migration_id: self.id.to_string(),
            attempt: self.request.attempt,
            token: token.clone(),
            listen,
            connections: if local { 1 } else { asked.connections.max(1) },
            memory_bytes: spec.memory_bytes,
            peer_certificate_sha256,
            local,
            recover_ms: super::limits::millis(self.daemon.limits.recover),
            pmu_restore: asked.pmu_restore,
        };
        let listening = worker.prepare_incoming(incoming).await?;
        Ok(PrepareResponse {
            data_address: listening.data_address,
            certificate_sha256: listening.certificate_sha256,
            token,
            lease_ms: u64::try_from(self.daemon.limits.lease.as_millis()).unwrap_or(u64::MAX),
            store_id: self.daemon.host.host_id.clone(),
        })
    }

    /// What is said of a PMU that did not come along whole; none if it did.
    pub(super) fn pmu_restored(&self, losses: Vec<PmuLoss>, losses_total: u32) -> Option<PmuRestored> {
        let needs = self.request.requirements.clone().unwrap_or_default();
        let policy = match needs.spec.unwrap_or_default().pmu_restore() {
            PmuRestore::BestEffort => "best_effort",
            PmuRestore::Reset => "reset",
            PmuRestore::Unspecified | PmuRestore::Require => return None,
        };
        let (had, has) = (needs.pmu_shape, self.record.pmu_shape.clone());
        (losses_total != 0 || had != has).then(|| PmuRestored {
            policy: policy.to_owned(),
            had,
            has,
            losses,
            losses_total,
            migration: format!("{}/migrations/{}", self.handle.name, self.id),
        })
    }

    /// Where the worker listens if it listens on a Unix socket.
    fn data_socket(&self) -> PathBuf {
        data_socket(&self.daemon, self.id)
    }

    /// The worker removes its socket when it has everything; one that died does not.
    pub(super) fn remove_data_socket(&self) {
        let _ = std::fs::remove_file(self.data_socket());
    }

    fn data_address(&self) -> String {
        match &self.way {
            Way::Unix => format!("unix:{}", self.data_socket().display()),
            Way::Tcp(ip) => format!("tcp:{}", std::net::SocketAddr::new(*ip, 0)),
        }
    }

    /// Whether the data connections use TLS: by default where memory leaves the host. Refused where that was asked for
    /// and the source cannot do it.
    fn encrypted(&self, asked: &MigrationSpec, certificate: &[u8]) -> Result<bool, ApiError> {
        let wanted = match &self.way {
            Way::Unix => asked.require_tls,
            Way::Tcp(ip) => asked.require_tls || !(asked.allow_plaintext || ip.is_loopback()),
        };
        let refuse = |reason: &str, text: String| {
            Err(ApiError::precondition(reason, &self.handle.name.to_string(), text))
        };
        match (&self.way, wanted) {
            (_, false) => Ok(false),
            (Way::Tcp(_), true) if !certificate.is_empty() => Ok(true),
            (Way::Unix, true) => refuse(
                "TLS_UNAVAILABLE",
                "TLS was asked for and the peer listener is a Unix socket, which is not encrypted; leave require_tls (vpmuctl: --tls) out, or use a TCP peer listener".to_owned(),
            ),
            (Way::Tcp(ip), true) => refuse(
                "PLAINTEXT_REFUSED",
                format!("memory would go to {ip} without TLS, for which the source gave no certificate; upgrade the source, or ask for it with allow_plaintext (vpmuctl: --plaintext) on a network you trust"),
            ),
        }
    }
}

/// Removes the data sockets of arrivals that were cut off with the last daemon: none is open when this one starts.
pub fn remove_data_sockets(daemon: &Daemon) {
    let entries = std::fs::read_dir(state_dir(daemon)).into_iter().flatten().flatten();
    for entry in entries {
        let name = entry.file_name();
        let ours =
            name.to_str().is_some_and(|n| n.starts_with(DATA_SOCKET) && n.split('.').nth(1) == Some("sock"));
        if ours && let Err(error) = std::fs::remove_file(entry.path()) {
            tracing::warn!(path = %entry.path().display(), %error, "a left socket cannot be removed");
        }
    }
}

fn state_dir(daemon: &Daemon) -> PathBuf {
    std::path::absolute(daemon.store.dir()).unwrap_or_else(|_| PathBuf::from("."))
}
