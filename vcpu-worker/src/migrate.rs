//! Moves a machine between workers: drives the data plane on a thread of its own at either end.
//!
//! Source: copies while the guest runs, says when the goal can be met, goes on copying until it is told to finish or to
//! stop. Destination: receives into memory that nobody else writes, sets the state into paused vCPUs, then says READY.
//! Who may run is not decided here: finishing seals the source, and only a grant lets the destination in.

use std::sync::Mutex;

use tokio::sync::watch;

use crate::dataplane::{DataplaneError, SessionId};
use crate::error::WorkerError;

mod actions;
mod finish;
mod following;
mod incoming;
mod outgoing;
mod switch;

pub use incoming::{Door, IncomingMigration, IncomingState, Phase};
pub use outgoing::{OutgoingMigration, OutgoingState, Source};

/// Parses what both ends are given; names the field that is wrong.
pub fn session(migration_id: &str, attempt: u32, token: &[u8]) -> Result<SessionId, WorkerError> {
    let id = uuid(migration_id)
        .ok_or_else(|| WorkerError::invalid("migration_id", migration_id, "give a UUID of 36 characters"))?;
    if attempt == 0 {
        return Err(WorkerError::invalid("attempt", attempt, "attempts begin with 1"));
    }
    let token = token.try_into().map_err(|_| {
        WorkerError::invalid("token", format!("{} bytes", token.len()), "give 32 random bytes")
    })?;
    Ok(SessionId { migration_id: id, attempt, token })
}

/// Connections as the data plane counts them.
pub fn connections(n: u32) -> Result<u16, WorkerError> {
    match u16::try_from(n) {
        Ok(n @ 1..=16) => Ok(n),
        _ => Err(WorkerError::invalid("connections", n, "give 1 to 16")),
    }
}

fn uuid(text: &str) -> Option<[u8; 16]> {
    let hyphens = [8, 13, 18, 23];
    let well_formed = text.len() == 36
        && text
            .bytes()
            .enumerate()
            .all(|(i, b)| if hyphens.contains(&i) { b == b'-' } else { b.is_ascii_hexdigit() });
    if !well_formed {
        return None;
    }
    let digits: String = text.chars().filter(|c| *c != '-').collect();
    u128::from_str_radix(&digits, 16).ok().map(u128::to_be_bytes)
}

/// A data-plane error of one migration.
pub fn failed(id: &str, error: &DataplaneError) -> WorkerError {
    match error {
        DataplaneError::Cancelled => WorkerError::Cancelled { what: "the migration" },
        DataplaneError::Address { value, problem } => WorkerError::invalid("address", value, problem.clone()),
        error => {
            WorkerError::Migration { id: id.to_owned(), reason: error.reason(), message: error.to_string() }
        }
    }
}

/// Tells when a thread has ended; kept by the thread, so that a panic tells too.
struct EndMark(watch::Sender<bool>);

impl Drop for EndMark {
    fn drop(&mut self) {
        self.0.send_replace(true);
    }
}

/// The owner's side of a migration thread.
struct Thread {
    ended: watch::Receiver<bool>,
    handle: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Thread {
    fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<Self, WorkerError> {
        let (mark, ended) = watch::channel(false);
        let mark = EndMark(mark);
        let handle = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                let _mark = mark;
                // It works as much as a guest does: whoever answers calls goes first.
                if let Err(error) = crate::host::schedule::carry() {
                    tracing::debug!(%error, "a migration thread keeps the priority of one that answers calls");
                }
                if let Err(error) = crate::sandbox::enter(crate::sandbox::Kind::Data) {
                    tracing::error!(%error, "a migration thread cannot be confined and does nothing");
                    return;
                }
                crate::sandbox::hook(crate::sandbox::Kind::Data);
                body();
            })
            .map_err(|e| WorkerError::Thread { thread: name.to_owned(), problem: e.to_string() })?;
        Ok(Self { ended, handle: Mutex::new(Some(handle)) })
    }

    fn is_ended(&self) -> bool {
        *self.ended.borrow()
    }

    /// Waits for its end.
    async fn joined(&self) {
        let mut ended = self.ended.clone();
        // An error means that the mark is gone, which is an end too.
        drop(ended.wait_for(|ended| *ended).await);
        let handle = self.handle.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        if let Some(handle) = handle
            && tokio::task::spawn_blocking(move || handle.join().is_err()).await.unwrap_or(true)
        {
            tracing::error!("migration thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sessions_are_checked() {
        let id = "0123abcd-4567-89ab-cdef-000000000001";
        let session = session(id, 1, &[7; 32]).unwrap();
        assert_eq!(session.migration_id[..4], [0x01, 0x23, 0xab, 0xcd]);
        for bad in ["", "0123abcd456789abcdef000000000001", "+123abcd-4567-89ab-cdef-000000000001"] {
            assert!(super::session(bad, 1, &[7; 32]).is_err(), "{bad}");
        }
        assert!(super::session(id, 0, &[7; 32]).is_err());
        assert!(super::session(id, 1, &[7; 31]).is_err());
        assert!(connections(0).is_err() && connections(17).is_err());
        assert_eq!(connections(16).unwrap(), 16);
    }
}
