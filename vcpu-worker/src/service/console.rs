//! Console rpcs: readers follow the ring, input goes to the serial port.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vpmu_proto::worker::{ReadConsoleResponse, WriteConsoleResponse};

use super::Inner;
use crate::error::WorkerError;

/// Stream of console output.
pub(super) type ReadStream = Pin<Box<dyn Stream<Item = Result<ReadConsoleResponse, Status>> + Send>>;

/// Most input in one request.
const INPUT: usize = 4096;

/// Chunks on the way to one reader.
const AHEAD: usize = 4;

pub(super) fn read(inner: &Inner, offset: u64, follow: bool) -> ReadStream {
    // Also before there is a machine: who reads it then misses nothing of the one that comes.
    let console = Arc::clone(&inner.console);
    let shutdown = inner.shutdown.clone();
    let (send, chunks) = mpsc::channel(AHEAD);
    tokio::spawn(async move {
        let mut more = console.watch();
        let mut at = offset;
        loop {
            more.mark_unchanged();
            let (offset, data) = console.read(at);
            if !data.is_empty() {
                at = offset.saturating_add(data.len() as u64);
                tokio::select! {
                    () = shutdown.cancelled() => return,
                    sent = send.send(Ok(ReadConsoleResponse { offset, data })) => if sent.is_err() { return },
                }
                continue;
            }
            if !follow {
                return;
            }
            tokio::select! {
                () = shutdown.cancelled() => return,
                () = send.closed() => return,
                changed = more.changed() => if changed.is_err() { return },
            }
        }
    });
    Box::pin(ReceiverStream::new(chunks))
}

pub(super) async fn write(inner: &Inner, data: Vec<u8>) -> Result<WriteConsoleResponse, WorkerError> {
    if data.len() > INPUT {
        return Err(WorkerError::invalid(
            "data",
            format!("{} bytes", data.len()),
            "send at most 4096 bytes at a time",
        ));
    }
    let devices = Arc::clone(inner.machine()?.devices());
    // The guest's interrupt line is an ioctl.
    let accepted = tokio::task::spawn_blocking(move || {
        crate::sandbox::hook(crate::sandbox::Kind::Control);
        devices.input(&data)
    })
    .await
    .map_err(|e| WorkerError::Thread { thread: "console input".to_owned(), problem: e.to_string() })?;
    Ok(WriteConsoleResponse { accepted: accepted as u32 })
}
