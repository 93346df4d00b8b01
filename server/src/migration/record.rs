//! Writes the machines' records and says what became of them.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use vpmu_proto::store::OwnershipRecord;

use crate::journal::JournalError;
use crate::status::ApiError;
use crate::store::{Store, StoreError};

/// What became of a record.
pub(super) enum Written {
    /// It is durable.
    Durable(OwnershipRecord),
    /// It may or may not survive a crash: it must be written again before anything follows from it.
    InDoubt(ApiError),
    /// It is not written.
    Refused(ApiError),
}

/// Appends a record to the journal.
pub(super) async fn write(store: &Store, record: OwnershipRecord) -> Written {
    match store.append_ownership(record).await {
        Ok(record) => Written::Durable(record),
        Err(error @ StoreError::Journal(JournalError::InDoubt { .. })) => Written::InDoubt(error.into()),
        Err(error) => Written::Refused(error.into()),
    }
}

/// Growing pauses between attempts.
pub(super) struct Backoff(Duration);

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const LAST: Duration = Duration::from_secs(5);

    pub(super) fn new() -> Self {
        Self(Self::FIRST)
    }

    pub(super) fn reset(&mut self) {
        self.0 = Self::FIRST;
    }

    /// Waits for the next attempt; false if the daemon ends first.
    pub(super) async fn pause(&mut self, shutdown: &CancellationToken) -> bool {
        let pause = self.0;
        self.0 = (pause * 2).min(Self::LAST);
        tokio::select! {
            () = tokio::time::sleep(pause) => true,
            () = shutdown.cancelled() => false,
        }
    }
}
