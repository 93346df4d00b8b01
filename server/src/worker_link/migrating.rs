//! Commands of a migration, to the worker at its source and to the one at its destination.
//!
//! They are thin: the order, and what each answer means, is [`crate::handover`]'s. A worker of an earlier version that
//! does not know a command is no failure where a migration can do without it.

use std::time::Duration;

use vpmu_proto::worker::command_request::Command;
use vpmu_proto::worker::command_response::Outcome;
use vpmu_proto::worker::worker_service_server::WorkerService as _;
use vpmu_proto::worker::*;

use super::lane::confused;
use super::wire::{self, streaming, unary};
use super::{Told, WorkerLink};
use crate::status::ApiError;

impl WorkerLink {
    /// Source: makes a certificate for a migration. Empty where the worker is of a version that cannot.
    pub async fn prepare_outgoing(&self, migration_id: &str) -> Result<Vec<u8>, ApiError> {
        let request = PrepareOutgoingRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        match unary!(self, self.inner.command, prepare_outgoing, request) {
            Ok(answer) => Ok(answer.certificate_sha256),
            Err(error) if error.code() == tonic::Code::Unimplemented => Ok(Vec::new()),
            Err(error) => Err(error),
        }
    }

    /// Source: begins copying.
    pub async fn migrate_out(
        &self,
        mut request: MigrateOutRequest,
    ) -> Result<Told<MigrateOutProgress>, ApiError> {
        request.fence = self.fence();
        let told = streaming!(self, migrate_out, request);
        // For the stop.
        self.open_lane();
        told
    }

    /// Source, post-copy: how far it is with serving pages, after a moment or at the end.
    pub async fn wait_drained(&self, migration_id: &str) -> Result<WaitDrainedResponse, ApiError> {
        let request = WaitDrainedRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        unary!(self, self.inner.command, wait_drained, request)
    }

    /// Destination, post-copy: the source's worker has ended. A worker that has no such command finds out by time.
    pub async fn forget_source(&self, migration_id: &str) -> Result<(), ApiError> {
        let request = ForgetSourceRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        match unary!(self, self.inner.command, forget_source, request) {
            Err(error) if error.code() == tonic::Code::Unimplemented => Ok(()),
            answer => answer.map(drop),
        }
    }

    /// Source: stops, seals and sends the rest.
    pub async fn finish_migration(
        &self,
        migration_id: &str,
        epoch: u64,
        deadline: Duration,
    ) -> Result<FinishMigrationResponse, ApiError> {
        let request =
            FinishMigrationRequest { fence: self.fence(), migration_id: migration_id.to_owned(), epoch };
        match self.command(Command::Finish(request), deadline).await? {
            Outcome::Finish(answer) => Ok(answer),
            _ => Err(confused()),
        }
    }

    /// Source: gives up.
    pub async fn cancel_migration(&self, migration_id: &str) -> Result<(), ApiError> {
        let request = CancelMigrationRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        unary!(self, self.inner.command, cancel_migration, request).map(drop)
    }

    /// Destination: opens the data listener; answers its real address and certificate.
    pub async fn prepare_incoming(
        &self,
        mut request: PrepareIncomingRequest,
    ) -> Result<PrepareIncomingResponse, ApiError> {
        request.fence = self.fence();
        // For the grant.
        self.open_lane();
        unary!(self, self.inner.command, prepare_incoming, request)
    }

    /// Destination: progress until ready.
    pub async fn watch_incoming(&self, migration_id: &str) -> Result<Told<IncomingProgress>, ApiError> {
        let request = WatchIncomingRequest { fence: self.fence(), migration_id: migration_id.to_owned() };
        streaming!(self, watch_incoming, request)
    }
}
