//! AttachConsole: history from an offset, then what follows; input to the guest. A machine that is being created or started
//! is waited for until it has a worker; one that does not exist yet, if the client asks for that.

use std::sync::Arc;
use std::time::Duration;

use tokio_stream::StreamExt as _;
use tonic::{Status, Streaming};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::{AttachConsoleRequest, AttachConsoleResponse};

use super::BoxStream;
use super::details::explain;
use crate::daemon::Daemon;
use crate::names::VmName;
use crate::status::ApiError;
use crate::vm::registry::VmHandle;
use crate::vm::view::VmView;
use crate::worker_link::WorkerLink;

/// Largest input message in bytes.
const MAX_INPUT: usize = 4096;
/// A client must say what it wants within this time.
const FIRST_MESSAGE: Duration = Duration::from_secs(10);
/// A machine that does not exist yet is waited for this long.
const AWAIT: Duration = Duration::from_secs(60);
/// How long a machine may be on its way to its worker.
const STARTING: Duration = Duration::from_secs(30);
/// How long the end of a machine whose worker has died may take to be shown.
const ENDING: Duration = Duration::from_secs(10);
/// Bytes of one output message.
const CHUNK: usize = 64 << 10;
const METHOD: &str = "/vpmu.v1.VirtualMachinesService/AttachConsole";

pub(super) async fn attach(
    daemon: &Arc<Daemon>,
    mut input: Streaming<AttachConsoleRequest>,
) -> Result<BoxStream<AttachConsoleResponse>, Status> {
    let first = match tokio::time::timeout(FIRST_MESSAGE, input.message()).await {
        Ok(Ok(Some(first))) => first,
        Ok(Err(status)) => return Err(explain(&status, METHOD)),
        Ok(Ok(None)) | Err(_) => {
            return Err(ApiError::invalid(
                "name",
                "",
                "FIELD_REQUIRED",
                "was not sent",
                "send the machine's name in the first message",
            )
            .into());
        }
    };
    let name = VmName::parse("name", &first.name, "")?;
    if !first.await_machine {
        let handle = daemon.registry.get(&name)?;
        return open(daemon, &handle, first, input).await;
    }
    // Answered at once: the client sends its creation next, perhaps on the same connection.
    let daemon = Arc::clone(daemon);
    Ok(Box::pin(async_stream::stream! {
        let handle = tokio::select! {
            () = daemon.shutdown.cancelled() => {
                yield Err(ApiError::shutting_down().into());
                return;
            }
            handle = tokio::time::timeout(AWAIT, daemon.registry.wait_for(&name)) => handle,
        };
        let handle = match handle.map_err(|_| daemon.registry.get(&name)) {
            Ok(handle) | Err(Ok(handle)) => handle,
            Err(Err(missing)) => {
                yield Err(missing.into());
                return;
            }
        };
        match open(&daemon, &handle, first, input).await {
            Ok(mut output) => while let Some(piece) = output.next().await {
                yield piece;
            },
            Err(status) => yield Err(status),
        }
    }))
}

/// Who has the machine's console: its worker. Who only reads what comes may do so while that still builds the machine; before
/// it is built there is nobody to write to.
fn writer<'a>(view: &'a VmView, first: &AttachConsoleRequest) -> Option<&'a WorkerLink> {
    let opening = view.opening.as_ref().filter(|_| !first.write && !first.history_only);
    view.worker.as_ref().or(opening)
}

/// The view of a machine that is past its start, or not on the way to one.
async fn started(handle: &VmHandle, first: &AttachConsoleRequest) -> Arc<VmView> {
    let mut views = handle.watch();
    let past = |view: &Arc<VmView>| {
        writer(view, first).is_some()
            || view.deleted
            || !matches!(view.state(), State::Creating | State::Starting)
    };
    // Neither a machine that takes longer nor one that is gone has a console.
    let _ = tokio::time::timeout(STARTING, views.wait_for(past)).await;
    handle.view()
}

/// The view of a machine that no worker is building.
async fn built(handle: &VmHandle) -> Arc<VmView> {
    let mut views = handle.watch();
    let _ = tokio::time::timeout(STARTING, views.wait_for(|view| view.opening.is_none())).await;
    let mut view = VmView::clone(&handle.view());
    // One that takes longer has no console.
    view.opening = None;
    Arc::new(view)
}

async fn open(
    daemon: &Arc<Daemon>,
    handle: &VmHandle,
    first: AttachConsoleRequest,
    mut input: Streaming<AttachConsoleRequest>,
) -> Result<BoxStream<AttachConsoleResponse>, Status> {
    let mut view = if first.history_only { handle.view() } else { started(handle, &first).await };
    let (worker, mut output) = loop {
        let Some(worker) = writer(&view, &first).cloned() else {
            return Ok(history(&view.console, first.offset));
        };
        match worker.read_console(first.offset, !first.history_only).await {
            Ok(output) => break (worker, output),
            // One that builds its machine may not know yet whom it obeys, or may have failed.
            Err(_) if view.worker.is_none() => view = built(handle).await,
            Err(error) => return Err(error.into()),
        }
    };
    let (shutdown, views) = (daemon.shutdown.clone(), handle.watch());
    if first.history_only {
        let stream = async_stream::stream! {
            while let Some(piece) = output.message().await.transpose() {
                match piece {
                    Ok(piece) => yield Ok(AttachConsoleResponse { offset: piece.offset, data: piece.data }),
                    Err(status) => {
                        yield Err(ApiError::from_status("console", &status).into());
                        return;
                    }
                }
            }
        };
        return Ok(Box::pin(stream));
    }
    let write = first.write;
    // Given back when the stream ends, however it does.
    let typing = if write { Some(handle.console_input()?) } else { None };
    let (mut pending, mut at) = (first.data, first.offset);
    let stream = async_stream::stream! {
        let mut typing = typing;
        let mut input_open = true;
        loop {
            if !pending.is_empty() {
                if let Err(error) = feed(&worker, write, &pending).await {
                    yield Err(error.into());
                    return;
                }
                pending.clear();
            }
            tokio::select! {
                () = shutdown.cancelled() => {
                    yield Err(ApiError::shutting_down().into());
                    return;
                }
                piece = output.message() => match piece {
                    Ok(Some(piece)) => {
                        at = piece.offset + piece.data.len() as u64;
                        yield Ok(AttachConsoleResponse { offset: piece.offset, data: piece.data });
                    }
                    Ok(None) => return,
                    Err(status) => {
                        drop(typing.take());
                        let mut last_words = last_words(&worker, views, at).await;
                        while let Some(piece) = last_words.next().await {
                            yield piece;
                        }
                        yield Err(ApiError::from_status("console", &status).into());
                        return;
                    }
                },
                message = input.message(), if input_open => match message {
                    Ok(Some(message)) => pending = message.data,
                    Ok(None) => {
                        input_open = false;
                        drop(typing.take());
                    }
                    Err(status) => {
                        yield Err(explain(&status, METHOD));
                        return;
                    }
                },
            }
        }
    };
    Ok(Box::pin(stream))
}

async fn feed(worker: &WorkerLink, write: bool, data: &[u8]) -> Result<(), ApiError> {
    if !write {
        return Err(ApiError::invalid(
            "data",
            data.len(),
            "CONSOLE_READ_ONLY",
            "bytes of input came without write",
            "set write in the first message",
        ));
    }
    if data.len() > MAX_INPUT {
        return Err(ApiError::invalid(
            "data",
            data.len(),
            "INPUT_TOO_LARGE",
            "bytes are more than 4096",
            "send smaller pieces",
        ));
    }
    let accepted = worker.write_console(data.to_vec()).await? as usize;
    if accepted < data.len() {
        return Err(ApiError::exhausted(
            "CONSOLE_INPUT_FULL",
            format!(
                "the guest took {accepted} of {} bytes of input; send the rest once it reads",
                data.len()
            ),
        )
        .with("accepted", accepted));
    }
    Ok(())
}

/// What a worker whose process has died had printed and not sent; nothing if it lives.
async fn last_words(
    worker: &WorkerLink,
    mut views: tokio::sync::watch::Receiver<Arc<VmView>>,
    offset: u64,
) -> BoxStream<AttachConsoleResponse> {
    if !worker.is_dead().await {
        return Box::pin(tokio_stream::empty());
    }
    let over = |view: &Arc<VmView>| {
        view.deleted
            || view.worker.as_ref().or(view.opening.as_ref()).map(WorkerLink::pid) != Some(worker.pid())
    };
    match tokio::time::timeout(ENDING, views.wait_for(over)).await {
        Ok(Ok(view)) => history(&view.console, offset),
        _ => Box::pin(tokio_stream::empty()),
    }
}

/// What an ended machine left.
fn history(console: &crate::worker_link::ConsoleHistory, offset: u64) -> BoxStream<AttachConsoleResponse> {
    let skip =
        usize::try_from(offset.saturating_sub(console.offset)).unwrap_or(usize::MAX).min(console.data.len());
    let start = console.offset + skip as u64;
    let data = console.data.get(skip..).unwrap_or_default();
    let pieces: Vec<_> = data
        .chunks(CHUNK)
        .enumerate()
        .map(|(i, chunk)| {
            Ok(AttachConsoleResponse { offset: start + (i * CHUNK) as u64, data: chunk.to_vec() })
        })
        .collect();
    Box::pin(tokio_stream::iter(pieces))
}
