//! Tells watchers what the guest or KVM caused.

use std::pin::Pin;
use std::sync::Arc;

use tokio::sync::{broadcast, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use vpmu_proto::worker::WorkerEvent;

use super::Inner;
use crate::machine::Machine;

/// Stream of events.
pub(super) type EventStream = Pin<Box<dyn Stream<Item = Result<WorkerEvent, Status>> + Send>>;

impl Inner {
    pub(super) fn present(&self) -> WorkerEvent {
        WorkerEvent { state: self.state().into(), end: self.held().machine.as_ref().and_then(|m| m.end()) }
    }
}

/// Turns what vCPU threads report into events, for as long as the worker lives.
pub(super) fn follow(inner: &Arc<Inner>, machine: &Arc<Machine>) {
    let mut changes = machine.changes();
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        loop {
            tokio::select! {
                () = inner.shutdown.cancelled() => return,
                changed = changes.changed() => if changed.is_err() { return },
            }
            // No watcher is no error.
            drop(inner.events.send(inner.present()));
        }
    });
}

/// The present state if the guest has ended already, then every event.
pub(super) fn watch(inner: &Arc<Inner>) -> EventStream {
    let mut events = inner.events.subscribe();
    let (send, stream) = mpsc::channel(super::EVENTS);
    let inner = Arc::clone(inner);
    tokio::spawn(async move {
        let present = inner.present();
        if present.end.is_some() && send.send(Ok(present)).await.is_err() {
            return;
        }
        loop {
            let event = tokio::select! {
                () = inner.shutdown.cancelled() => return,
                () = send.closed() => return,
                event = events.recv() => event,
            };
            let event = match event {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(_)) => inner.present(),
                Err(broadcast::error::RecvError::Closed) => return,
            };
            tokio::select! {
                () = inner.shutdown.cancelled() => return,
                sent = send.send(Ok(event)) => if sent.is_err() { return },
            }
        }
    });
    Box::pin(ReceiverStream::new(stream))
}
