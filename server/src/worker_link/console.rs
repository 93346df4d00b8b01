//! Console output and input of a worker's machine, and what is left of the output when the worker has ended.
//!
//! Invariant: what is kept of an ended machine is bounded, and its offset in the whole output is right.

use std::sync::Arc;

use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::wire::{self, streaming, unary};
use super::{Told, WorkerLink};
use crate::status::ApiError;
use crate::worker_process::WorkerProcess;

/// Most console history that is kept of an ended machine, in bytes.
const CONSOLE_KEPT: usize = 1 << 20;

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
}
