//! `vpmud serve`: opens everything, says that it is ready, serves until it is asked to end, and ends cleanly.
//!
//! Order at the start: store (and its lock) → listeners → recovery → services → ready line. At the end: no new work →
//! streams and servers → machines (their PMU state durable) → store → socket files.

use std::io::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tonic_health::pb::health_server::{Health, HealthServer};
use tracing_appender::non_blocking::ErrorCounter;
use vpmu_proto::api::migrations_service_server::MigrationsServiceServer;
use vpmu_proto::api::pmu_service_server::PmuServiceServer;
use vpmu_proto::api::virtual_machines_service_server::VirtualMachinesServiceServer;
use vpmu_proto::longrunning::operations_server::OperationsServer;
use vpmu_proto::peer::migration_peer_service_server::MigrationPeerServiceServer;

use crate::api;
use crate::api::details::DetailsLayer;
use crate::capacity::Capacity;
use crate::config::{Address, ConfigError, ServeConfig};
use crate::daemon::{Daemon, HostInfo};
use crate::judge::Host;
use crate::listen::{self, ListenError, Listener};
use crate::ops::Ops;
use crate::status::ApiError;
use crate::store::{self, Store, StoreError};
use crate::worker_link::WorkerFactory;

/// Largest request in bytes.
const MAX_REQUEST: usize = 4 << 20;
/// Streams and requests at once on one connection.
const MAX_STREAMS: u32 = 256;
/// Connections get this long to finish at the end.
const DRAIN: Duration = Duration::from_secs(5);
/// Machines and migrations get this long at the end.
const ENDING: Duration = Duration::from_secs(30);

/// What is served, as health knows it; the empty name stands for all.
const SERVICES: [&str; 6] = [
    "",
    "vpmu.v1.VirtualMachinesService",
    "vpmu.v1.PmuService",
    "vpmu.v1.MigrationsService",
    "google.longrunning.Operations",
    "vpmu.peer.v1.MigrationPeerService",
];

/// Why it does not serve.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// Options.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Listeners.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// Recovery.
    #[error("cannot bring the machines of the last run back: {0}")]
    Recovery(ApiError),
    /// The system.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: std::io::Error,
    },
}

impl ServeError {
    /// Stable reason code.
    pub fn reason(&self) -> &str {
        match self {
            Self::Config(e) => e.reason(),
            Self::Store(e) => e.reason(),
            Self::Listen(e) => e.reason(),
            Self::Recovery(e) => e.reason(),
            Self::Io { .. } => "SYSTEM",
        }
    }
}

fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> ServeError {
    move |source| ServeError::Io { what, source }
}

/// Serves until SIGTERM or SIGINT, or until this daemon is to become another binary, which it returns.
pub async fn run(config: ServeConfig, lost: ErrorCounter) -> Result<Option<PathBuf>, ServeError> {
    // Signals first: one that comes while it starts must end it in order too.
    let mut terminate = signal(SignalKind::terminate()).map_err(io("cannot handle SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io("cannot handle SIGINT"))?;
    config.check()?;
    let host = Host::judge(&config).await?;
    let store = open_store(config.state_dir.clone()).await?;
    let result = serve(&config, host, store.clone(), lost, async {
        tokio::select! {
            _ = terminate.recv() => tracing::info!("SIGTERM: ending"),
            _ = interrupt.recv() => tracing::info!("SIGINT: ending"),
            () = crate::parent::gone(config.exit_with_parent) => tracing::info!("standard input ended: ending"),
        }
    })
    .await;
    store.close().await;
    result
}

async fn open_store(dir: PathBuf) -> Result<Store, ServeError> {
    let opened = tokio::task::spawn_blocking(move || Store::open(&dir)).await;
    let store = opened.map_err(|e| io("cannot open the store")(std::io::Error::other(e)))??;
    for damaged in store.damaged() {
        tracing::error!(key = %damaged.key, problem = %damaged.problem, "a stored record is damaged and is left out");
    }
    Ok(store)
}

async fn serve(
    config: &ServeConfig,
    host: Host,
    store: Store,
    lost: ErrorCounter,
    asked_to_end: impl Future<Output = ()>,
) -> Result<Option<PathBuf>, ServeError> {
    let tls = match config.peer_tls.clone() {
        Some(files) => {
            let loaded = tokio::task::spawn_blocking(move || crate::peer::tls::PeerTls::load(files)).await;
            let loaded =
                loaded.map_err(|e| io("cannot read the peer certificate")(std::io::Error::other(e)))?;
            Some(loaded.map_err(ConfigError::from)?)
        }
        None => None,
    };
    let mut listeners = Vec::new();
    for address in &config.listen {
        listeners.push((listen::open(address).await?, true));
    }
    for address in &config.peer_listen {
        listeners.push((listen::open(address).await?, false));
    }
    let addresses = |public: bool| -> Vec<String> {
        listeners.iter().filter(|(_, p)| *p == public).map(|(l, _)| absolute(&l.address)).collect()
    };
    let (listen, peer_listen) = (addresses(true), addresses(false));
    let reached = peer_listen.iter().chain(&listen);
    let peering = crate::peer::Peering {
        limits: config.limits(),
        tls,
        plaintext: config.peer_plaintext,
        // As they are shown, so as others can use them.
        listeners: reached.filter_map(|address| address.parse().ok()).collect(),
    };

    let end_workers = CancellationToken::new();
    let isolated = config.isolation == crate::config::Isolation::Process;
    let run_dir =
        std::path::absolute(config.state_dir.join("run")).map_err(io("cannot find the state directory"))?;
    // Nobody waits for it: it looks at what others have left, too.
    drop(tokio::task::spawn_blocking(crate::worker_process::sweep_consoles));
    // Kept until this returns: no machine's start waits for what its workers' timers would have to make first. Not beside
    // the counters themselves: their owner is to see no other.
    let hold = || {
        let held = vcpu_worker::host::PerfReady::hold();
        held.inspect_err(
            |error| tracing::debug!(%error, "no perf events: modelled counters run on POSIX timers"),
        )
    };
    let _perf_ready = (host.pmu_mode != "msr").then(|| tokio::task::spawn_blocking(hold));
    let cgroups = if isolated {
        crate::cgroup::Cgroups::discover(store.store_id(), &run_dir, config.cgroup_controllers)
    } else {
        crate::cgroup::Cgroups::default()
    };
    let backend =
        vcpu_worker::cores::Backend::named(host.pmu_mode).unwrap_or(vcpu_worker::cores::Backend::Model);
    let workers = WorkerFactory {
        cores: Arc::new(vcpu_worker::cores::HostCores::with(backend, host.shape, &host.cores)),
        hypervisor: host.hypervisor.as_str(),
        pmu_mode: host.pmu_mode,
        model_pmu: host.pmu_name.clone(),
        store_id: store.store_id().to_owned(),
        term: store.term(),
        shutdown: end_workers.clone(),
        command: config.limits().command,
        processes: Arc::new(crate::worker_process::Processes {
            run_dir,
            cores: host.cores.clone(),
            model_pmu: host.pmu_name.clone(),
            pmu_mode: host.pmu_mode,
            enabled: isolated,
            stop_vms: config.stop_vms,
            seccomp: config.seccomp,
            violate: config.worker_violates,
            cgroups: Arc::new(cgroups),
            image: std::sync::Mutex::default(),
            departing: crate::worker_process::Departing::default(),
            spares: crate::spare::Spares::new(if isolated { config.spare_workers as usize } else { 0 }),
        }),
    };
    let daemon = Arc::new(Daemon {
        ops: Ops::open(store.clone()).await.map_err(ServeError::Recovery)?,
        host: HostInfo {
            host_id: store.store_id().to_owned(),
            hypervisor: host.hypervisor.as_str(),
            pmu_mode: host.pmu_mode,
            shape: host.shape,
            host_pmu: host.pmu_name,
            notes: host.notes,
            boot_id: host.boot_id,
            tsc_khz: host.tsc_khz,
            cpuid: host.cpuid,
        },
        capacity: Capacity::new(host.memory_bytes, host.topology, &host.cores, &host.own_cores),
        awake: crate::awake::Awake::open(config.keep_awake),
        events: crate::vm::events::Events::default(),
        workers,
        registry: crate::vm::registry::Registry::default(),
        migrations: crate::migration::Migrations::default(),
        peering: peering.clone(),
        snapshot_dir: snapshot_dir(config)?,
        shutdown: CancellationToken::new(),
        recovered: CancellationToken::new(),
        tasks: TaskTracker::new(),
        upgrading: std::sync::atomic::AtomicBool::new(false),
        auto_local: config.local_migration == crate::config::LocalMigration::Auto,
        hold_at: config.hold_at.iter().copied().map(Into::into).collect(),
        limits: config.limits(),
        store,
    });
    let (survivors, copies) = crate::adopt::before_recovery(&daemon).await.map_err(ServeError::Recovery)?;
    crate::migration::recover::recover(&daemon, copies).await.map_err(ServeError::Recovery)?;
    crate::adopt::after_recovery(&daemon, survivors).await;

    daemon.tasks.spawn(crate::housekeeping::keep(Arc::clone(&daemon), host.own_cores));
    daemon.tasks.spawn(crate::lag::watch(daemon.shutdown.clone(), lost));

    let health = health(&daemon).await;
    let mut servers = tokio::task::JoinSet::new();
    let mut files = Vec::new();
    for (listener, public) in listeners {
        let Listener { socket, file, .. } = listener;
        files.extend(file);
        let router = router(&daemon, public, health.clone());
        let ending = daemon.shutdown.clone().cancelled_owned();
        // The API's listeners are this machine's own: its clients have no certificates.
        let tls = if public { None } else { peering.tls.clone() };
        let incoming = socket.incoming(tls, daemon.shutdown.clone());
        servers.spawn(async move { router.serve_with_incoming_shutdown(incoming, ending).await });
    }
    // Other hosts are asked once this one answers them.
    crate::migration::later::at_start(&daemon);
    let (switch, mut image) = tokio::sync::mpsc::channel(1);
    crate::upgrade::serve(&daemon, switch).await;
    match say_ready(&daemon, &listen, &peer_listen) {
        Err(error) if crate::upgrade::is_successor() => tracing::warn!(%error, "not said"),
        said => said?,
    }
    crate::upgrade::serves(&config.state_dir);
    daemon.workers.processes.refill();

    let mut next = None;
    tokio::select! {
        () = asked_to_end => {}
        Some(image) = image.recv() => next = Some(image),
        ended = servers.join_next() => tracing::error!(?ended, "a listener ended by itself; ending"),
    }
    end(&daemon, servers, &end_workers).await;
    drop(files);
    Ok(next)
}

/// Makes the directory of snapshots, and removes from it what a host that died was writing.
fn snapshot_dir(config: &ServeConfig) -> Result<PathBuf, ServeError> {
    use std::os::unix::fs::DirBuilderExt as _;
    let failed = "cannot use the snapshot directory";
    let asked = config.snapshot_dir.clone().unwrap_or_else(|| config.state_dir.join("snapshots"));
    let dir = std::path::absolute(asked).map_err(io(failed))?;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(io(failed))?;
    vcpu_worker::snapshot::write::sweep(&dir).map_err(io(failed))?;
    Ok(dir)
}

/// Ends everything in order; each step is bounded.
async fn end(
    daemon: &Arc<Daemon>,
    mut servers: tokio::task::JoinSet<Result<(), tonic::transport::Error>>,
    end_workers: &CancellationToken,
) {
    daemon.shutdown.cancel();
    let drained = tokio::time::timeout(DRAIN, async { while servers.join_next().await.is_some() {} });
    if drained.await.is_err() {
        tracing::warn!("some connections did not end in time and are closed");
        servers.shutdown().await;
    }
    daemon.workers.processes.close_spares().await;
    let machines = async {
        let handles = daemon.registry.list(None);
        futures_util::future::join_all(handles.iter().map(crate::vm::registry::VmHandle::end)).await;
        daemon.tasks.close();
        daemon.tasks.wait().await;
        daemon.workers.processes.departing.gone(None).await;
    };
    if tokio::time::timeout(ENDING, machines).await.is_err() {
        tracing::error!("some machines did not end in time");
    }
    end_workers.cancel();
}

fn absolute(address: &Address) -> String {
    match address {
        Address::Unix(path) => {
            Address::Unix(std::path::absolute(path).unwrap_or_else(|_| path.clone())).to_string()
        }
        Address::Tcp(_) => address.to_string(),
    }
}

fn say_ready(daemon: &Daemon, listen: &[String], peer_listen: &[String]) -> Result<(), ServeError> {
    let line = serde_json::json!({
        "ready": true,
        "listen": listen,
        "peer_listen": peer_listen,
        "host_id": daemon.host.host_id,
        "hypervisor": daemon.host.hypervisor,
        "pmu_mode": daemon.host.pmu_mode,
        "host_pmu": daemon.host.host_pmu,
        "pid": std::process::id(),
    });
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(io("cannot write the ready line to standard output"))
}

/// Health of every service; NOT_SERVING once the store takes no writes or the daemon ends.
async fn health(daemon: &Arc<Daemon>) -> HealthServer<impl Health> {
    use tonic_health::ServingStatus;
    let (reporter, server) = tonic_health::server::health_reporter();
    let names = SERVICES;
    for name in names {
        reporter.set_service_status(name, ServingStatus::Serving).await;
    }
    let daemon = Arc::clone(daemon);
    let tasks = daemon.tasks.clone();
    tasks.spawn(async move {
        let mut tick = tokio::time::interval(Duration::from_secs(1));
        let (mut serving, mut recoveries) = (true, 0);
        loop {
            tokio::select! {
                () = daemon.shutdown.cancelled() => break,
                _ = tick.tick() => {}
            }
            if recoveries != daemon.store.recoveries() {
                recoveries = daemon.store.recoveries();
                store_again(&daemon).await;
            }
            let well = daemon.store.health() == store::Health::Serving;
            if well != serving {
                serving = well;
                let status = if well { ServingStatus::Serving } else { ServingStatus::NotServing };
                for name in names {
                    reporter.set_service_status(name, status).await;
                }
            }
        }
        for name in names {
            reporter.set_service_status(name, ServingStatus::NotServing).await;
        }
    });
    server
}

/// Stores what changed while the store took no writes.
async fn store_again(daemon: &Arc<Daemon>) {
    for machine in daemon.registry.list(None) {
        if let Err(error) = machine.ask(|reply| crate::vm::command::Command::StoreAgain { reply }).await {
            tracing::error!(vm = %machine.name, %error, "its record could not be stored again");
        }
    }
    daemon.ops.store_again().await;
}

fn router(
    daemon: &Arc<Daemon>,
    public: bool,
    health: HealthServer<impl Health>,
) -> Router<tower::layer::util::Stack<DetailsLayer, tower::layer::util::Identity>> {
    let d = || Arc::clone(daemon);
    let silence = daemon.limits.listener;
    let router = Server::builder()
        .http2_keepalive_interval(Some(silence))
        .http2_keepalive_timeout(Some(silence.mul_f64(2.0 / 3.0)))
        .max_concurrent_streams(Some(MAX_STREAMS))
        .concurrency_limit_per_connection(MAX_STREAMS as usize)
        .layer(DetailsLayer)
        .add_service(health)
        .add_service(
            // PMU images of a large machine come along with the requirements.
            MigrationPeerServiceServer::new(api::peer::PeerApi::new(d()))
                .max_decoding_message_size(MAX_REQUEST),
        );
    if !public {
        return router;
    }
    let reflection = || {
        let builder = tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(vpmu_proto::FILE_DESCRIPTOR_SET)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
        // What is served here: the workers' service is not, though its messages are part of the hosts'.
        let served = SERVICES.into_iter().filter(|name| !name.is_empty());
        served
            .chain(["grpc.health.v1.Health"])
            .fold(builder, tonic_reflection::server::Builder::with_service_name)
    };
    // The descriptors are compiled in: they can only be wrong for all users at once, which a test shows.
    let v1 = reflection().build_v1().ok();
    let v1alpha = reflection().build_v1alpha().ok();
    router
        .add_optional_service(v1)
        .add_optional_service(v1alpha)
        .add_service(
            VirtualMachinesServiceServer::new(api::vms::Vms::new(d())).max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(PmuServiceServer::new(api::pmu::PmuApi::new(d())).max_decoding_message_size(MAX_REQUEST))
        .add_service(
            MigrationsServiceServer::new(api::migrations::MigrationsApi::new(d()))
                .max_decoding_message_size(MAX_REQUEST),
        )
        .add_service(
            OperationsServer::new(api::operations::OperationsApi::new(d()))
                .max_decoding_message_size(MAX_REQUEST),
        )
}
