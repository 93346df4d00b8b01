//! The destination: receives a machine, promises Ready, enters on Go, or gives back.
//!
//! ```text
//! Prepare -> Reserved --stream opens--> Receiving --state set--> Ready --Go--> Entered
//!               | lease over              | failed, stream lost     | Abort -> dropped
//!               +------> dropped <--------+                         | stream lost: keeps the copy, asks the source
//! ```
//! Invariants: from Ready on the copy is dropped only on the source's abort; `Entered` is durable before the grant; one
//! task owns the worker until the machine's actor adopts it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use vpmu_proto::api::VirtualMachine;
use vpmu_proto::peer::{DestinationMessage, PrepareRequest, PrepareResponse, SourceMessage};
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{OwnershipRecord, VmRecord};
use vpmu_proto::worker::{PmuImage, PrepareIncomingRequest};

use super::check;
use crate::daemon::Daemon;
use crate::names::VmName;
use crate::peer::VERSION;
use crate::status::ApiError;
use crate::vm::command::Command;
use crate::vm::registry::VmHandle;
use crate::worker_link::{Launch, WorkerLink};

/// A reservation without a stream ends after this long.
pub(super) const LEASE: Duration = Duration::from_secs(8);
/// Longest socket path that workers can use.
const MAX_DATA_PATH: usize = 100;

/// A stream from the source, handed to the task of its migration.
pub struct Conversation {
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
    let record = VmRecord { vm: Some(arriving(vm)), pmu_shape: needs.pmu_shape.clone() };
    let ownership = OwnershipRecord {
        vm_uid: uid(&record).to_owned(),
        epoch: request.epoch,
        owner_host: request.source_host.clone(),
        incarnation: 0,
        phase: Phase::Incoming as i32,
        migration_id: migration_id.to_string(),
        peer_host: request.source_host.clone(),
        peer_address: request.source_address.clone(),
        peer_store: request.source_host.clone(),
        ..OwnershipRecord::default()
    };
    let handle = match daemon.registry.get(&name) {
        Ok(handle) if handle.uid == uid(&record) => handle,
        Ok(_) | Err(_) => {
            daemon.registry.insert(daemon, &name, record.clone(), OwnershipRecord::default(), false)?
        }
    };
    let (announced, journalled) = (Box::new(record.clone()), ownership.clone());
    handle.ask(|reply| Command::Receive { record: announced, ownership: journalled, reply }).await?;
    let mut arrival = Incoming {
        daemon: Arc::clone(daemon),
        handle,
        record,
        ownership,
        id: migration_id,
        source_address: request.source_address.clone(),
        worker: None,
        images: Vec::new(),
    };
    match arrival.build(&request, &way).await {
        Ok(response) => {
            let (door, streams) = mpsc::channel(1);
            daemon.migrations.incoming().insert(migration_id, door);
            daemon.tasks.spawn(arrival.run(streams));
            Ok(response)
        }
        Err(error) => {
            arrival.drop_copy(0).await;
            Err(error)
        }
    }
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
    vm
}

/// One machine on its way here.
pub(super) struct Incoming {
    pub(super) daemon: Arc<Daemon>,
    pub(super) handle: VmHandle,
    pub(super) record: VmRecord,
    pub(super) ownership: OwnershipRecord,
    pub(super) id: uuid::Uuid,
    pub(super) source_address: String,
    pub(super) worker: Option<WorkerLink>,
    pub(super) images: Vec<PmuImage>,
}

impl Incoming {
    async fn build(&mut self, request: &PrepareRequest, way: &Way) -> Result<PrepareResponse, ApiError> {
        let vm = self.record.vm.clone().unwrap_or_default();
        let spec = vm.spec.unwrap_or_default();
        let asked = request.requirements.as_ref().and_then(|r| r.spec.clone()).unwrap_or_default();
        let listen = self.data_address(way, asked.allow_plaintext)?;
        let grant = self.daemon.capacity.grant(spec.memory_bytes, spec.vcpus)?;
        let launch = Launch {
            vm_uid: &self.handle.uid,
            vm_name: self.handle.name.vm(),
            incarnation: 1,
            spec: &spec,
            incoming: true,
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
            attempt: request.attempt,
            token: token.clone(),
            listen,
            connections: asked.connections.max(1),
            memory_bytes: spec.memory_bytes,
        };
        let data_address = worker.prepare_incoming(incoming).await?;
        Ok(PrepareResponse {
            data_address,
            token,
            lease_ms: u64::try_from(LEASE.as_millis()).unwrap_or(u64::MAX),
            store_id: self.daemon.host.host_id.clone(),
        })
    }

    fn data_address(&self, way: &Way, plaintext: bool) -> Result<String, ApiError> {
        match way {
            Way::Unix => {
                let file = format!("in-{}.sock", &self.id.simple().to_string()[..12]);
                let dir = std::path::absolute(self.daemon.store.dir()).unwrap_or_else(|_| PathBuf::from("."));
                let mut path = dir.join(&file);
                if path.as_os_str().len() > MAX_DATA_PATH {
                    path = std::env::temp_dir().join(format!("vpmud-{file}"));
                }
                Ok(format!("unix:{}", path.display()))
            }
            Way::Tcp(ip) if ip.is_loopback() || plaintext => {
                Ok(format!("tcp:{}", std::net::SocketAddr::new(*ip, 0)))
            }
            Way::Tcp(ip) => Err(ApiError::precondition(
                "PLAINTEXT_REFUSED",
                &self.handle.name.to_string(),
                format!(
                    "memory would go to {ip} without TLS; ask for it with allow_plaintext (vpmuctl: --plaintext) on a network you trust"
                ),
            )),
        }
    }

    /// It did not arrive: everything is given back. `epoch` is the source's, 0 if it did not say.
    pub(super) async fn drop_copy(&mut self, epoch: u64) {
        if let Some(worker) = self.worker.take() {
            worker.end().await;
        }
        let epoch = epoch.clamp(self.ownership.epoch, self.ownership.epoch + 1);
        if let Err(error) = self.journal(Phase::Aborted, epoch, &[]).await {
            tracing::error!(vm = %self.handle.name, %error, "the abort could not be journalled");
        }
        let ownership = self.ownership.clone();
        let _ = self.handle.ask(|reply| Command::DropIncoming { ownership, reply }).await;
    }

    pub(super) async fn journal(&mut self, phase: Phase, epoch: u64, digest: &[u8]) -> Result<(), ApiError> {
        let entered = phase == Phase::Entered;
        let record = OwnershipRecord {
            epoch,
            phase: phase as i32,
            digest: digest.to_vec(),
            owner_host: if entered {
                self.daemon.host.host_id.clone()
            } else {
                self.ownership.owner_host.clone()
            },
            incarnation: u64::from(entered),
            lsn: 0,
            ..self.ownership.clone()
        };
        self.ownership = self.daemon.store.append_ownership(record).await?;
        Ok(())
    }
}
