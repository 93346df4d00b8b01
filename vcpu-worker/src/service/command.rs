//! Commands on one stream: a message each way, where a call sends its headers and its body apart and wakes the worker for
//! each.
//!
//! Invariants: one command at a time, in order; a command that fails is answered, and the stream goes on; who goes away
//! gives up the command that is being served, as with a call.

use std::pin::Pin;

use futures_util::StreamExt as _;
use tokio_stream::Stream;
use tonic::{Request, Status, Streaming};
use vpmu_proto::worker::command_request::Command;
use vpmu_proto::worker::command_response::Outcome;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::{CommandError, CommandRequest, CommandResponse};

use super::Worker;

/// Stream of answers.
pub(super) type AnswerStream = Pin<Box<dyn Stream<Item = Result<CommandResponse, Status>> + Send>>;

/// Answers what comes until nothing does, or the worker ends.
pub(super) fn serve(worker: &Worker, commands: Streaming<CommandRequest>) -> AnswerStream {
    let ended = worker.inner.shutdown.clone().cancelled_owned();
    let worker = worker.clone();
    Box::pin(commands.take_until(ended).then(move |command| one(worker.clone(), command)))
}

async fn one(worker: Worker, command: Result<CommandRequest, Status>) -> Result<CommandResponse, Status> {
    let outcome = match command?.command {
        Some(Command::Run(run)) => worker.run(Request::new(run)).await.map(|r| Outcome::Run(r.into_inner())),
        Some(Command::Pause(pause)) => {
            worker.pause(Request::new(pause)).await.map(|r| Outcome::Pause(r.into_inner()))
        }
        Some(Command::Grant(grant)) => {
            worker.grant(Request::new(grant)).await.map(|r| Outcome::Grant(r.into_inner()))
        }
        Some(Command::Finish(finish)) => {
            worker.finish_migration(Request::new(finish)).await.map(|r| Outcome::Finish(r.into_inner()))
        }
        // Of a later daemon: it makes a call of it.
        None => Err(Status::unimplemented("command: this worker does not know it; call it")),
    };
    Ok(CommandResponse { outcome: Some(outcome.unwrap_or_else(|status| Outcome::Error(told(&status)))) })
}

fn told(status: &Status) -> CommandError {
    CommandError {
        code: status.code().into(),
        message: status.message().to_owned(),
        details: status.details().to_vec(),
    }
}
