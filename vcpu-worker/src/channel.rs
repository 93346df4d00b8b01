//! A worker in this process, reached through the same gRPC service as one in another (isolation = thread).
//!
//! The connection is a pair of in-memory pipes; reconnecting makes another pair. Ending it ends the server, every
//! stream, every migration and every vCPU thread.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::DuplexStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Server, Uri};
use vpmu_proto::worker::worker_service_server::WorkerServiceServer;

use crate::service::{Worker, WorkerOptions};

/// Bytes under way in each direction.
const PIPE: usize = 256 * 1024;

/// Largest message either way. PMU images of 256 vCPUs fit many times over.
pub const MAX_MESSAGE: usize = 4 << 20;

/// Bound on ending a worker that was dropped.
const CLOSE: Duration = Duration::from_secs(30);

/// A worker in this process. Dropping it ends it in the background; [`InProcessWorker::join`] waits for the end.
#[derive(Debug)]
pub struct InProcessWorker {
    worker: Option<Worker>,
    wire: Wire,
}

impl InProcessWorker {
    /// Ends the worker and waits until none of its threads is left.
    pub async fn join(mut self) {
        if let Some(worker) = self.worker.take() {
            end(worker, self.wire.take()).await;
        }
    }

    /// The way to it over gRPC.
    pub fn wire(&self) -> Wire {
        self.wire.clone()
    }

    /// The worker itself, for calls that need no wire; none once it has been ended.
    pub fn direct(&self) -> Option<Worker> {
        self.worker.clone()
    }

    /// The worker itself, for what a process would show otherwise.
    pub fn is_ended(&self) -> bool {
        self.worker.as_ref().is_none_or(|worker| worker.ended().is_cancelled())
    }
}

impl Drop for InProcessWorker {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            match tokio::runtime::Handle::try_current() {
                Ok(runtime) => drop(runtime.spawn(end(worker, self.wire.take()))),
                // The runtime is gone or going: its tasks end with it, the vCPU threads with the machine.
                Err(_) => worker.ended().cancel(),
            }
        }
    }
}

async fn end(worker: Worker, server: Option<JoinHandle<()>>) {
    if let Err(error) = worker.close().await {
        tracing::warn!(%error, "ending a worker");
    }
    let Some(mut server) = server else { return };
    if tokio::time::timeout(CLOSE, &mut server).await.is_err() {
        tracing::warn!("a worker's server did not end: dropping its connections");
        server.abort();
    }
}

/// The gRPC connection to a worker in this process, made when it is first used: a machine that only lives and dies needs
/// none.
#[derive(Debug, Clone)]
pub struct Wire {
    worker: Worker,
    made: Arc<Mutex<Made>>,
}

#[derive(Debug, Default)]
struct Made {
    channel: Option<Channel>,
    server: Option<JoinHandle<()>>,
}

impl Wire {
    /// The connection. Must be called on a runtime. Of a worker that has ended it is one that refuses.
    pub fn channel(&self) -> Channel {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let Made { channel, server } = &mut *made;
        channel
            .get_or_insert_with(|| {
                let (channel, served) = serve(&self.worker);
                *server = Some(served);
                channel
            })
            .clone()
    }

    /// The server, if one was started.
    fn take(&self) -> Option<JoinHandle<()>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner).server.take()
    }
}

/// Starts a worker. Must be called on a runtime.
///
/// # Errors
/// If there is no runtime.
pub fn in_process(options: WorkerOptions) -> io::Result<InProcessWorker> {
    tokio::runtime::Handle::try_current().map_err(io::Error::other)?;
    let worker = Worker::new(options);
    let wire = Wire { worker: worker.clone(), made: Arc::default() };
    Ok(InProcessWorker { worker: Some(worker), wire })
}

fn serve(worker: &Worker) -> (Channel, JoinHandle<()>) {
    let (connections, accepted) = mpsc::channel::<DuplexStream>(1);
    let ended = worker.ended();
    let service = WorkerServiceServer::new(worker.clone())
        .max_decoding_message_size(MAX_MESSAGE)
        .max_encoding_message_size(MAX_MESSAGE);
    let server = tokio::spawn(async move {
        let incoming = ReceiverStream::new(accepted).map(Ok::<_, io::Error>);
        let served = Server::builder()
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, ended.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::warn!(%error, "in-process worker's server");
        }
    });
    let connect = tower::service_fn(move |_: Uri| {
        let connections = connections.clone();
        async move {
            let (near, far) = tokio::io::duplex(PIPE);
            let gone = |_| io::Error::new(io::ErrorKind::ConnectionRefused, "the worker has ended");
            connections.send(far).await.map_err(gone)?;
            Ok::<_, io::Error>(TokioIo::new(near))
        }
    });
    // The address is never looked up: the connector ignores it.
    (Endpoint::from_static("http://worker.invalid").connect_with_connector_lazy(connect), server)
}
