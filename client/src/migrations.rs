//! Typed methods of `MigrationsService`.

use crate::client::{Client, request_id};
use crate::error::ClientError;
use crate::names;
use std::time::Duration;
use tonic::Streaming;
use vpmu_proto::api::{
    CancelMigrationRequest, CheckMigrationRequest, CheckMigrationResponse, CreateMigrationRequest,
    ForceOwnerRequest, GetMigrationRequest, ListMigrationsRequest, Migration, MigrationSpec, VirtualMachine,
    WatchMigrationRequest, force_owner_request, migration,
};
use vpmu_proto::longrunning::Operation;

impl Client {
    /// Names everything that would keep a machine from moving.
    pub async fn check_migration(
        &self,
        vm: &str,
        spec: MigrationSpec,
    ) -> Result<CheckMigrationResponse, ClientError> {
        let request = self.request(CheckMigrationRequest { parent: names::vm(vm), spec: Some(spec) });
        self.call("CheckMigration", self.raw_migrations().check_migration(request)).await
    }

    /// Starts a migration. [`Client::migration_of`] finds its name in the operation.
    pub async fn create_migration(&self, vm: &str, spec: MigrationSpec) -> Result<Operation, ClientError> {
        let request = self.request(CreateMigrationRequest {
            parent: names::vm(vm),
            spec: Some(spec),
            request_id: request_id(),
            validate_only: false,
        });
        self.call("CreateMigration", self.raw_migrations().create_migration(request)).await
    }

    /// Gets one migration by its full name.
    pub async fn get_migration(&self, name: &str) -> Result<Migration, ClientError> {
        let request = self.request(GetMigrationRequest { name: name.to_owned() });
        self.call("GetMigration", self.raw_migrations().get_migration(request)).await
    }

    /// Lists a machine's migrations, newest first; `None` lists those of all machines.
    pub async fn list_migrations(&self, vm: Option<&str>) -> Result<Vec<Migration>, ClientError> {
        let mut all = Vec::new();
        let mut page_token = String::new();
        loop {
            let request = self.request(ListMigrationsRequest {
                parent: names::vm(vm.unwrap_or("-")),
                page_size: 0,
                page_token,
            });
            let page = self.call("ListMigrations", self.raw_migrations().list_migrations(request)).await?;
            all.extend(page.migrations);
            if page.next_page_token.is_empty() {
                return Ok(all);
            }
            page_token = page.next_page_token;
        }
    }

    /// Streams a migration's progress by its full name; the last message has a terminal state.
    pub async fn watch_migration(&self, name: &str) -> Result<Streaming<Migration>, ClientError> {
        let request = WatchMigrationRequest { name: name.to_owned() };
        self.call("WatchMigration", self.raw_migrations().watch_migration(request)).await
    }

    /// Cancels a migration that has not been committed, by its full name.
    pub async fn cancel_migration(&self, name: &str) -> Result<(), ClientError> {
        let request = self.request(CancelMigrationRequest { name: name.to_owned() });
        self.call("CancelMigration", self.raw_migrations().cancel_migration(request)).await
    }

    /// Makes the host the owner of a machine that another host may own, against evidence. The same request again
    /// changes nothing.
    pub async fn force_owner(
        &self,
        vm: &str,
        evidence: force_owner_request::Evidence,
        reason: &str,
    ) -> Result<VirtualMachine, ClientError> {
        let request = self.request(ForceOwnerRequest {
            name: names::vm(vm),
            evidence: Some(evidence),
            reason: reason.to_owned(),
        });
        self.call("ForceOwner", self.raw_migrations().force_owner(request)).await
    }

    /// The migration that an operation of [`Client::create_migration`] is about: its metadata.
    pub fn migration_of(operation: &Operation) -> Result<Migration, ClientError> {
        let metadata = operation
            .metadata
            .as_ref()
            .ok_or_else(|| ClientError::Protocol { what: format!("{} has no metadata", operation.name) })?;
        crate::wait::unpack(metadata)
    }
}

/// Nothing more will happen to a migration in this state.
pub(crate) fn terminal(state: migration::State) -> bool {
    use migration::State;
    matches!(state, State::Succeeded | State::Failed | State::Cancelled | State::InDoubt)
}

impl Client {
    /// Follows a migration, by its full name, to a terminal state or for at most `deadline`. `progress` sees every state.
    ///
    /// # Errors
    /// [`ClientError::Deadline`]; the migration itself goes on in that case.
    pub async fn follow_migration(
        &self,
        name: &str,
        deadline: Duration,
        mut progress: impl FnMut(&Migration),
    ) -> Result<Migration, ClientError> {
        let follow = async {
            let mut stream = self.watch_migration(name).await?;
            while let Some(migration) = stream.message().await? {
                progress(&migration);
                if terminal(migration.state()) {
                    return Ok(migration);
                }
            }
            // The stream has ended early (the daemon is going down): what the record says is the best that is known.
            self.get_migration(name).await
        };
        tokio::time::timeout(deadline, follow)
            .await
            .unwrap_or_else(|_| Err(ClientError::Deadline { what: name.to_owned(), waited: deadline }))
    }
}
