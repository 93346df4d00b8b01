//! Migration rpcs at both ends.

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vpmu_proto::api::migration_spec;
use vpmu_proto::worker::{
    FinishMigrationResponse, IncomingProgress, MigrateOutProgress, MigrateOutRequest, PrepareIncomingRequest,
    PrepareIncomingResponse, PrepareOutgoingResponse, WaitDrainedResponse,
};

use super::Inner;
use crate::dataplane::postcopy::RECOVER;
use crate::dataplane::precopy::Goals;
use crate::dataplane::{Compression, DataAddress, Fingerprint, Identity, Tls};
use crate::error::WorkerError;
use crate::migrate::{
    Door, IncomingMigration, IncomingState, OutgoingMigration, OutgoingState, Source, connections, session,
};

/// Progress of the source.
pub(super) type OutStream = Pin<Box<dyn Stream<Item = Result<MigrateOutProgress, Status>> + Send>>;
/// Progress of the destination.
pub(super) type InStream = Pin<Box<dyn Stream<Item = Result<IncomingProgress, Status>> + Send>>;

/// Messages on the way to a reader; it always gets the newest, not every one.
const AHEAD: usize = 4;

/// Goal where none is given.
const BLACKOUT: Duration = Duration::from_millis(20);

/// What a stop costs besides pages: kick and put, saving, two durable records, setting, entering.
const FIXED: Duration = Duration::from_millis(2);

/// How long one question for the end of a post-copy is kept: as often progress is told.
const DRAINED: Duration = Duration::from_millis(100);

fn recover(ms: u64) -> Duration {
    if ms == 0 { RECOVER } else { Duration::from_millis(ms) }
}

/// How often progress is told between rounds.
const EVERY: Duration = Duration::from_millis(50);

fn address(field: &'static str, text: &str) -> Result<DataAddress, WorkerError> {
    text.parse()
        .map_err(|e: crate::dataplane::DataplaneError| WorkerError::invalid(field, text, e.to_string()))
}

/// The other side's certificate, as given.
fn fingerprint(bytes: &[u8]) -> Result<Option<Fingerprint>, WorkerError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    bytes.try_into().map(Some).map_err(|_| {
        let found = format!("{} bytes", bytes.len());
        WorkerError::invalid("peer_certificate_sha256", found, "give the 32 bytes of a SHA-256, or none")
    })
}

fn compression(wanted: i32) -> Result<Compression, WorkerError> {
    use migration_spec::Compression as Asked;
    Ok(match Asked::try_from(wanted) {
        Ok(Asked::Unspecified | Asked::None) => Compression::None,
        Ok(Asked::Lz4) => Compression::Lz4,
        Ok(Asked::Zstd) => Compression::Zstd,
        Ok(Asked::Adaptive) => Compression::Auto,
        Err(_) => return Err(WorkerError::invalid("compression", wanted, "use NONE, LZ4, ZSTD or ADAPTIVE")),
    })
}

fn new_identity(id: &str) -> Result<Arc<Identity>, WorkerError> {
    Identity::generate().map(Arc::new).map_err(|e| crate::migrate::failed(id, &e))
}

pub(super) async fn prepare_outgoing(
    inner: &Inner,
    migration_id: &str,
) -> Result<PrepareOutgoingResponse, WorkerError> {
    session(migration_id, 1, &[0; 32])?;
    let _control = inner.control.lock().await;
    inner.machine()?;
    let identity = new_identity(migration_id)?;
    let certificate_sha256 = identity.fingerprint().to_vec();
    inner.held().identity = Some((migration_id.to_owned(), identity));
    Ok(PrepareOutgoingResponse { certificate_sha256 })
}

/// TLS as the source uses it; the certificate is used once.
fn outgoing_tls(inner: &Inner, r: &MigrateOutRequest) -> Result<Option<Tls>, WorkerError> {
    let Some(peer) = fingerprint(&r.peer_certificate_sha256)? else { return Ok(None) };
    match inner.held().identity.take() {
        Some((id, identity)) if id == r.migration_id => Ok(Some(Tls::new(identity, peer))),
        _ => Err(WorkerError::State {
            what: "migrating over TLS",
            state: "without a certificate of this migration".to_owned(),
            remedy: "call PrepareOutgoing first",
        }),
    }
}

pub(super) async fn migrate_out(inner: &Arc<Inner>, r: &MigrateOutRequest) -> Result<OutStream, WorkerError> {
    let session = session(&r.migration_id, r.attempt, &r.token)?;
    let address = address("data_address", &r.data_address)?;
    let connections = connections(r.connections)?;
    let _control = inner.control.lock().await;
    let machine = inner.machine()?;
    let tls = outgoing_tls(inner, r)?;
    let refuse = |state: String, remedy| Err(WorkerError::State { what: "migrating", state, remedy });
    let previous = inner.held().outgoing.clone();
    if let Some(previous) = previous {
        if !previous.is_ended() {
            return refuse(
                format!("migration {} is under way", previous.id()),
                "cancel it or wait for its end",
            );
        }
        previous.joined().await;
    }
    if let Some(incoming) = &inner.held().incoming
        && incoming.phase() != crate::migrate::Phase::Entered
    {
        return refuse(format!("migration {} arrives", incoming.id()), "wait until it has entered");
    }
    if let Some(end) = machine.end() {
        return refuse(format!("ENDED ({})", end.kind().as_str_name()), "start the VM again");
    }
    // The sender takes pages that are not there for zero.
    machine.memory_is_here("migrating")?;
    let max_blackout =
        if r.max_blackout_us == 0 { BLACKOUT } else { Duration::from_micros(r.max_blackout_us) };
    let max_duration = (r.max_duration_ms != 0).then(|| Duration::from_millis(r.max_duration_ms));
    let goals = Goals::new(max_blackout, max_duration, FIXED);
    let sealer = Arc::downgrade(inner);
    let source = Source {
        machine,
        session,
        address,
        connections,
        local: r.local,
        goals,
        bandwidth: r.max_bandwidth,
        tls,
        compression: compression(r.compression)?,
        allow_throttle: r.allow_throttle,
        allow_postcopy: r.allow_postcopy,
        postcopy: r.postcopy,
        recover: recover(r.recover_ms),
        seal: Box::new(move |epoch| {
            if let Some(inner) = sealer.upgrade() {
                inner.seal(epoch);
            }
        }),
        runtime: Handle::current(),
    };
    let outgoing = OutgoingMigration::start(&r.migration_id, source)?;
    inner.held().outgoing = Some(Arc::clone(&outgoing));
    Ok(follow_out(inner, &outgoing))
}

fn follow_out(inner: &Arc<Inner>, outgoing: &Arc<OutgoingMigration>) -> OutStream {
    let mut states = outgoing.watch();
    let outgoing = Arc::clone(outgoing);
    let shutdown = inner.shutdown.clone();
    let (send, stream) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let mut every = tokio::time::interval(EVERY);
        loop {
            let state = states.borrow_and_update().clone();
            let (message, last) = match state {
                OutgoingState::Copying(progress) => (Ok(outgoing.progress(&progress)), false),
                OutgoingState::Finished => return,
                OutgoingState::Failed(error) => (Err(error.to_status()), true),
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                sent = send.send(message) => if sent.is_err() || last { return },
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = send.closed() => return,
                changed = states.changed() => if changed.is_err() { return },
                _ = every.tick() => {}
            }
        }
    });
    Box::pin(ReceiverStream::new(stream))
}

fn unknown(asked: &str, held: Option<&str>) -> WorkerError {
    WorkerError::State {
        what: "this migration command",
        state: match held {
            Some(id) => format!("migration {id}, not {:?}", asked.chars().take(64).collect::<String>()),
            None => "without a migration".to_owned(),
        },
        remedy: "name the migration that is under way",
    }
}

fn outgoing(inner: &Inner, id: &str) -> Result<Arc<OutgoingMigration>, WorkerError> {
    let held = inner.held().outgoing.clone();
    match held {
        Some(outgoing) if outgoing.id() == id => Ok(outgoing),
        other => Err(unknown(id, other.as_ref().map(|m| m.id()))),
    }
}

pub(super) async fn finish(
    inner: &Arc<Inner>,
    migration_id: &str,
    epoch: u64,
) -> Result<FinishMigrationResponse, WorkerError> {
    if epoch == 0 {
        return Err(WorkerError::invalid("epoch", 0, "epochs begin with 1"));
    }
    let _control = inner.control.lock().await;
    outgoing(inner, migration_id)?.finish(epoch).await
}

pub(super) async fn wait_drained(
    inner: &Inner,
    migration_id: &str,
) -> Result<WaitDrainedResponse, WorkerError> {
    let outgoing = outgoing(inner, migration_id)?;
    // Not under `control`: what else is asked of the worker does not wait for it.
    let over = outgoing.over(DRAINED).await;
    let problem = over.as_ref().and_then(|end| end.as_ref().err()).map(ToString::to_string);
    Ok(WaitDrainedResponse {
        over: over.is_some(),
        problem: problem.unwrap_or_default(),
        ..outgoing.following()
    })
}

pub(super) async fn cancel(inner: &Inner, migration_id: &str) -> Result<(), WorkerError> {
    let outgoing = outgoing(inner, migration_id)?;
    // Not under `control`: a finish that waits for a destination which does not answer ends by this.
    outgoing.cancel();
    outgoing.joined().await;
    let mut held = inner.held();
    if held.outgoing.as_ref().is_some_and(|held| Arc::ptr_eq(held, &outgoing)) {
        held.outgoing = None;
    }
    Ok(())
}

pub(super) async fn prepare_incoming(
    inner: &Arc<Inner>,
    r: &PrepareIncomingRequest,
) -> Result<PrepareIncomingResponse, WorkerError> {
    let session = session(&r.migration_id, r.attempt, &r.token)?;
    let listen = address("listen", &r.listen)?;
    // The state alone needs no more than one.
    let connections = if r.local { 1 } else { connections(r.connections)? };
    let _control = inner.control.lock().await;
    let machine = inner.machine()?;
    if !machine.is_incoming() {
        return Err(WorkerError::State {
            what: "receiving a migration",
            state: "not created for one".to_owned(),
            remedy: "create the VM with incoming = true",
        });
    }
    if let Some(incoming) = &inner.held().incoming {
        return Err(WorkerError::State {
            what: "receiving a migration",
            state: format!("migration {} has begun", incoming.id()),
            remedy: "its memory is no longer empty: create the VM again",
        });
    }
    if r.memory_bytes != machine.memory().bytes() {
        let remedy = format!("this VM has {} bytes", machine.memory().bytes());
        return Err(WorkerError::invalid("memory_bytes", r.memory_bytes, remedy));
    }
    let (id, local, runtime) = (r.migration_id.clone(), r.local, Handle::current());
    let recover = recover(r.recover_ms);
    let pmu = crate::pmu_glue::policy_from_proto(r.pmu_restore());
    let (mut tls, mut certificate_sha256) = (None, Vec::new());
    if let Some(peer) = fingerprint(&r.peer_certificate_sha256)? {
        let identity = new_identity(&id)?;
        certificate_sha256 = identity.fingerprint().to_vec();
        tls = Some(Tls::new(identity, peer));
    }
    if tls.is_some() && matches!(listen, DataAddress::Unix(_)) {
        return Err(WorkerError::invalid("listen", &r.listen, "use a tcp address for TLS"));
    }
    let started = tokio::task::spawn_blocking(move || {
        IncomingMigration::start(
            &id,
            session,
            &listen,
            Door { connections, tls, local, recover, pmu },
            machine,
            runtime,
        )
    });
    let (incoming, data_address) = started
        .await
        .map_err(|e| WorkerError::Thread { thread: "data listener".to_owned(), problem: e.to_string() })??;
    inner.held().incoming = Some(incoming);
    Ok(PrepareIncomingResponse { data_address, certificate_sha256 })
}

fn incoming(inner: &Inner, migration_id: &str) -> Result<Arc<IncomingMigration>, WorkerError> {
    match inner.held().incoming.clone() {
        Some(incoming) if incoming.id() == migration_id => Ok(incoming),
        other => Err(unknown(migration_id, other.as_ref().map(|m| m.id()))),
    }
}

pub(super) fn forget_source(inner: &Inner, migration_id: &str) -> Result<(), WorkerError> {
    incoming(inner, migration_id)?.forget_source();
    Ok(())
}

pub(super) fn watch_incoming(inner: &Arc<Inner>, migration_id: &str) -> Result<InStream, WorkerError> {
    let incoming = incoming(inner, migration_id)?;
    let mut states = incoming.watch();
    let shutdown = inner.shutdown.clone();
    let (send, stream) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let mut every = tokio::time::interval(EVERY);
        loop {
            let state = states.borrow_and_update().clone();
            let (message, last) = match state {
                IncomingState::Receiving => {
                    (Ok(IncomingProgress { bytes_received: incoming.bytes(), ..Default::default() }), false)
                }
                IncomingState::Ready(progress, _) => (Ok(progress), true),
                IncomingState::Failed(error) => (Err(error.to_status()), true),
            };
            tokio::select! {
                () = shutdown.cancelled() => return,
                sent = send.send(message) => if sent.is_err() || last { return },
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = send.closed() => return,
                changed = states.changed() => if changed.is_err() { return },
                _ = every.tick() => {}
            }
        }
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}
