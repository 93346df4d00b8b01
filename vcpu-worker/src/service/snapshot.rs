//! Snapshot rpcs: writing one of a paused machine, and filling a new machine from one.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vpmu_proto::worker::{RestoreFrom, SaveSnapshotRequest, SnapshotManifest, SnapshotProgress};

use super::Inner;
use crate::error::WorkerError;
use crate::machine::Machine;
use crate::snapshot::lazy::PREFETCH_PAGES;
use crate::snapshot::read::Snapshot;
use crate::snapshot::write::{self, Progress};
use crate::snapshot::{SnapshotError, VERSION};

/// Progress of a snapshot, then its end.
pub(super) type SaveStream = Pin<Box<dyn Stream<Item = Result<SnapshotProgress, Status>> + Send>>;

/// Messages on the way to a reader.
const AHEAD: usize = 4;
/// How often progress is told.
const EVERY: Duration = Duration::from_millis(50);

fn path(text: &str) -> Result<PathBuf, WorkerError> {
    let path = Path::new(text);
    if path.is_absolute() && path.file_name().is_some() && !text.contains('\0') && text.len() < 4096 {
        return Ok(path.to_owned());
    }
    Err(WorkerError::invalid("path", text, "give the absolute path of a file"))
}

/// Writes the machine to a file; it stays paused meanwhile, since this holds `control`. Ends early when the reader goes
/// away.
pub(super) fn save(inner: &Arc<Inner>, r: SaveSnapshotRequest) -> Result<SaveStream, WorkerError> {
    let path = path(&r.path)?;
    let manifest = r
        .manifest
        .filter(|m| m.spec.is_some() && m.state.is_none())
        .ok_or_else(|| WorkerError::invalid("manifest", "unfit", "say what machine it is, without state"))?;
    let (send, stream) = mpsc::channel(AHEAD);
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        let last = run(&inner, &path, manifest, &send).await.map_err(Status::from);
        // A reader that has gone away asked for nothing more.
        drop(send.send(last).await);
    });
    Ok(Box::pin(ReceiverStream::new(stream)))
}

async fn run(
    inner: &Arc<Inner>,
    path: &Path,
    mut manifest: SnapshotManifest,
    send: &mpsc::Sender<Result<SnapshotProgress, Status>>,
) -> Result<SnapshotProgress, WorkerError> {
    let _control = inner.control.lock().await;
    let machine = inner.machine()?;
    let refuse = |state: String, remedy| Err(WorkerError::State { what: "a snapshot", state, remedy });
    if let Some(end) = machine.end() {
        return refuse(format!("ENDED ({})", end.kind().as_str_name()), "start the VM again");
    }
    if machine.is_running() {
        return refuse("RUNNING".to_owned(), "pause it first");
    }
    let (leaving, arriving) = {
        let held = inner.held();
        let arriving = held.incoming.as_ref().is_some_and(|m| m.phase() != crate::migrate::Phase::Entered);
        (held.outgoing.as_ref().is_some_and(|m| !m.is_ended()), arriving)
    };
    if leaving || arriving {
        return refuse("MIGRATING".to_owned(), "wait for the migration's end");
    }
    machine.memory_is_here("a snapshot")?;
    let progress = Arc::new(Progress::default());
    inner.held().saving = Some(Arc::clone(&progress));
    let mut writing = tokio::task::spawn_blocking({
        let (progress, path, runtime) = (Arc::clone(&progress), path.to_owned(), Handle::current());
        move || {
            // Reading the VM's state makes ioctls.
            let state = runtime.block_on(machine.finish_save(machine.begin_save(), true))?;
            (manifest.version, manifest.state) = (VERSION, Some(state));
            Ok::<_, WorkerError>(write::write(&path, &manifest, machine.memory(), &progress)?)
        }
    });
    let message = || SnapshotProgress {
        bytes_done: progress.done.load(Ordering::Relaxed),
        bytes_total: progress.total.load(Ordering::Relaxed),
        ..SnapshotProgress::default()
    };
    let mut every = tokio::time::interval(EVERY);
    let ended = loop {
        tokio::select! {
            ended = &mut writing => break ended,
            () = send.closed() => progress.cancel.store(true, Ordering::Relaxed),
            _ = every.tick() => {}
        }
        if progress.cancel.load(Ordering::Relaxed) {
            // It looks at the flag with every chunk.
            break (&mut writing).await;
        }
        // Full: the reader gets the next.
        drop(send.try_send(Ok(message())));
    };
    inner.held().saving = None;
    let written = ended
        .map_err(|e| WorkerError::Thread { thread: "snapshot".to_owned(), problem: e.to_string() })??;
    let total = progress.total.load(Ordering::Relaxed);
    Ok(SnapshotProgress {
        bytes_done: total,
        bytes_total: total,
        done: true,
        file_bytes: written.file_bytes,
        pages: written.pages,
    })
}

/// Sets a snapshot into a new machine.
pub(super) async fn restore(machine: &Arc<Machine>, from: RestoreFrom) -> Result<(), WorkerError> {
    let path = path(&from.path)?;
    let (machine, runtime) = (Arc::clone(machine), Handle::current());
    let restored = tokio::task::spawn_blocking(move || {
        let mut snapshot = Snapshot::open(&path)?;
        snapshot.fits(machine.memory())?;
        let state = snapshot.take_state().ok_or_else(|| SnapshotError::Damaged {
            path,
            part: "state",
            problem: "it is missing".to_owned(),
        })?;
        if from.lazy {
            let missing = snapshot.pages();
            machine.begin_lazy(missing, Arc::new(snapshot), Some(PREFETCH_PAGES))?;
        } else {
            snapshot.load(machine.memory())?;
        }
        runtime.block_on(machine.restore(state))?;
        if machine.is_probe() {
            crate::probe::mark_resumed(machine.memory());
        }
        Ok::<_, WorkerError>(())
    });
    restored
        .await
        .map_err(|e| WorkerError::Thread { thread: "restoring".to_owned(), problem: e.to_string() })?
}
