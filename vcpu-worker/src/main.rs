//! `vcpu-worker`: one virtual machine in a process of its own, served on a Unix socket.

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context as _;
use clap::Parser;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use vcpu_worker::channel::MAX_MESSAGE;
use vcpu_worker::cores::HostCores;
use vcpu_worker::service::{Worker, WorkerOptions};
use vpmu_proto::worker::worker_service_server::WorkerServiceServer;

/// Runs one virtual machine and serves vpmu.worker.v1 on a Unix socket.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where to listen; made with mode 0600, must not exist.
    #[arg(long)]
    socket: PathBuf,
    /// Host cores that vCPUs may be pinned to, e.g. 0,1.
    #[arg(long, value_delimiter = ',', required = true)]
    cores: Vec<u32>,
    /// The model of the host's PMU.
    #[arg(long, default_value = "intel:v5:8+4:48")]
    model_pmu: String,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt().with_writer(std::io::stderr).init();
    let args = Args::parse();
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(serve(args))
}

async fn serve(args: Args) -> anyhow::Result<()> {
    let shape = args.model_pmu.parse().with_context(|| format!("--model-pmu {}", args.model_pmu))?;
    let cores = Arc::new(HostCores::new(shape, &args.cores));
    let shutdown = CancellationToken::new();
    let listener = UnixListener::bind(&args.socket)
        .with_context(|| format!("listening on {}", args.socket.display()))?;
    std::fs::set_permissions(&args.socket, std::fs::Permissions::from_mode(0o600))?;
    let worker = Worker::new(WorkerOptions::new(cores, shutdown.clone()));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn({
        let shutdown = shutdown.clone();
        async move {
            terminate.recv().await;
            shutdown.cancel();
        }
    });
    let service = WorkerServiceServer::new(worker.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let ended = worker.ended();
    tonic::transport::Server::builder()
        .add_service(service)
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), ended.cancelled_owned())
        .await
        .context("serving")?;
    worker.close().await.context("ending the VM")?;
    std::fs::remove_file(&args.socket).with_context(|| format!("removing {}", args.socket.display()))?;
    Ok(())
}
