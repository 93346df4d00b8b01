//! The serial console as a pair of ends: output comes as a stream, input goes through a bounded channel.

use crate::client::Client;
use crate::error::ClientError;
use crate::names;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use vpmu_proto::api::{AttachConsoleRequest, AttachConsoleResponse};

/// Most bytes of input in one message, by the API.
const MAX_INPUT: usize = 4096;

/// How to attach.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConsoleOptions {
    /// Where in the whole output to begin; history that was dropped is skipped.
    pub offset: u64,
    /// Print what there is and end.
    pub history_only: bool,
    /// Take the input side; one writer at a time.
    pub write: bool,
    /// If there is no machine of that name yet, wait for it (the server does, for 60 s).
    pub await_machine: bool,
}

/// An attached console. Dropping it detaches.
#[derive(Debug)]
pub struct ConsoleSession {
    output: Streaming<AttachConsoleResponse>,
    input: Option<mpsc::Sender<AttachConsoleRequest>>,
}

impl Client {
    /// Attaches to a machine's serial console.
    pub async fn attach_console(
        &self,
        vm: &str,
        options: ConsoleOptions,
    ) -> Result<ConsoleSession, ClientError> {
        let (input, messages) = mpsc::channel(16);
        let first = AttachConsoleRequest {
            name: names::vm(vm),
            offset: options.offset,
            history_only: options.history_only,
            write: options.write,
            data: Vec::new(),
            await_machine: options.await_machine,
        };
        // The channel is new and has room.
        let _ = input.try_send(first);
        let output =
            self.call("AttachConsole", self.raw_vms().attach_console(ReceiverStream::new(messages))).await?;
        Ok(ConsoleSession { output, input: Some(input) })
    }
}

impl ConsoleSession {
    /// The next piece of output; `None` when the server has ended the stream.
    pub async fn next(&mut self) -> Result<Option<AttachConsoleResponse>, ClientError> {
        Ok(self.output.message().await?)
    }

    /// An end for input that can be moved elsewhere; one that sends nothing once the input was closed.
    pub fn input(&self) -> ConsoleInput {
        ConsoleInput(self.input.clone().unwrap_or_else(|| mpsc::channel(1).0))
    }

    /// Says that no more is typed, once every [`ConsoleInput`] is dropped too: another client may type then. Output goes on.
    pub fn close_input(&mut self) {
        self.input = None;
    }
}

/// The input side of a console.
#[derive(Clone, Debug)]
pub struct ConsoleInput(mpsc::Sender<AttachConsoleRequest>);

impl ConsoleInput {
    /// Sends input to the guest; false when the session has ended.
    pub async fn send(&self, data: &[u8]) -> bool {
        for piece in data.chunks(MAX_INPUT) {
            let message = AttachConsoleRequest { data: piece.to_vec(), ..AttachConsoleRequest::default() };
            if self.0.send(message).await.is_err() {
                return false;
            }
        }
        true
    }
}
