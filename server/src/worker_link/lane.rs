//! A stream that carries the commands to a worker that a guest or a caller waits for: a message each way. A call of
//! HTTP/2 sends its headers and its body apart, each of which wakes the worker, and passes more tasks on either side.
//!
//! ```text
//!   Closed ──open──► Opening ──► Open ◄──answered──► Busy     one command at a time; another goes as a call
//!      ▲                │                              │
//!      ├──── failed ────┘                              │      Opening ──► Unknown: a worker of a former version
//!      └─ the stream has ended, or nobody waits for the answer
//! ```
//!
//! Invariant: what is read from an open stream answers the command that was sent last. A stream whose answer was not
//! waited for is closed, which gives the command up as a call that is dropped.

use std::mem;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::FutureExt as _;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use vpmu_proto::worker::command_request::Command;
use vpmu_proto::worker::command_response::Outcome;
use vpmu_proto::worker::worker_service_client::WorkerServiceClient;
use vpmu_proto::worker::{CommandError, CommandRequest, CommandResponse};

use super::wire;
use crate::status::ApiError;

/// Of one worker, in another process.
#[derive(Default)]
pub(super) struct Lane(Mutex<State>);

#[derive(Default)]
enum State {
    #[default]
    Closed,
    Opening,
    Open(Box<Stream>),
    Busy,
    /// The worker has no such stream.
    Unknown,
}

struct Stream {
    commands: mpsc::Sender<CommandRequest>,
    answers: Streaming<CommandResponse>,
}

impl Stream {
    /// Nothing is on its way, so that whatever it has to say is its end.
    fn is_open(&mut self) -> bool {
        !self.commands.is_closed() && self.answers.message().now_or_never().is_none()
    }
}

/// An open stream that is used. It is open again only if its answer was waited for.
struct Use<'a> {
    lane: &'a Lane,
    next: State,
}

impl Drop for Use<'_> {
    fn drop(&mut self) {
        self.lane.set(mem::take(&mut self.next));
    }
}

impl Lane {
    /// What came of the command; none if it has to go as a call: no stream is open, it is in use, or the worker does not
    /// know the command.
    pub(super) async fn command(
        &self,
        deadline: Duration,
        command: &Command,
    ) -> Option<Result<Outcome, ApiError>> {
        let mut stream = self.take()?;
        let mut used = Use { lane: self, next: State::Closed };
        if !stream.is_open() {
            return None;
        }
        // There is room for one, and none is on its way.
        stream.commands.try_send(CommandRequest { command: Some(command.clone()) }).ok()?;
        let answer = tokio::time::timeout(deadline, stream.answers.message()).await;
        let answer = match wire::answered(deadline, answer) {
            Ok(Some(answer)) => answer,
            Ok(None) => return Some(Err(gone())),
            Err(error) => return Some(Err(error)),
        };
        let outcome = match (command, answer.outcome) {
            (_, Some(Outcome::Error(error))) => Err(status(error)),
            (Command::Run(_), Some(outcome @ Outcome::Run(_)))
            | (Command::Pause(_), Some(outcome @ Outcome::Pause(_)))
            | (Command::Grant(_), Some(outcome @ Outcome::Grant(_)))
            | (Command::Finish(_), Some(outcome @ Outcome::Finish(_))) => Ok(outcome),
            // Of a stream that answers something else nothing more is believed.
            _ => return Some(Err(confused())),
        };
        used.next = State::Open(stream);
        match outcome {
            Ok(outcome) => Some(Ok(outcome)),
            // A worker of a former version does not know the command, and has done nothing.
            Err(status) if status.code() == Code::Unimplemented => None,
            Err(status) => Some(Err(ApiError::from_status("worker", &status))),
        }
    }

    /// Opens it if it is not, behind the caller's back.
    pub(super) fn open(self: &Arc<Self>, mut client: WorkerServiceClient<Channel>, deadline: Duration) {
        {
            let mut state = self.lock();
            if !matches!(*state, State::Closed) {
                return;
            }
            *state = State::Opening;
        }
        let lane = Arc::downgrade(self);
        tokio::spawn(async move {
            let (commands, sent) = mpsc::channel(1);
            let opened = tokio::time::timeout(deadline, client.command(ReceiverStream::new(sent))).await;
            let state = match opened {
                Ok(Ok(answers)) => State::Open(Box::new(Stream { commands, answers: answers.into_inner() })),
                Ok(Err(status)) if status.code() == Code::Unimplemented => State::Unknown,
                Ok(Err(status)) => {
                    tracing::debug!(%status, "no stream of commands");
                    State::Closed
                }
                Err(_) => State::Closed,
            };
            // Who has let the worker go needs none.
            if let Some(lane) = lane.upgrade() {
                lane.set(state);
            }
        });
    }

    fn take(&self) -> Option<Box<Stream>> {
        let mut state = self.lock();
        match mem::replace(&mut *state, State::Busy) {
            State::Open(stream) => Some(stream),
            other => {
                *state = other;
                None
            }
        }
    }

    fn set(&self, state: State) {
        *self.lock() = state;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn status(error: CommandError) -> Status {
    Status::with_details(Code::from_i32(error.code), error.message, error.details.into())
}

/// As with a call whose connection breaks.
fn gone() -> ApiError {
    ApiError::from_status(
        "worker",
        &Status::unavailable("it closed the stream of commands before it answered"),
    )
}

/// Of an answer that is none to what was asked.
pub(super) fn confused() -> ApiError {
    ApiError::internal(
        "WORKER_ANSWER",
        "the worker answered something else than it was asked; stop the machine",
    )
}

#[cfg(test)]
mod tests;
