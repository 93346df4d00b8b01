//! `vpmu.v1.MigrationsService`.

use std::sync::Arc;
use std::time::Duration;

use tonic::{Request, Response, Status};
use vpmu_proto::api::migrations_service_server::MigrationsService;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::{Operation, operation as lro};

use super::{BoxStream, operation, page};
use crate::daemon::Daemon;
use crate::migration::{check, force, source_begin};
use crate::names::{MigrationName, VmName};
use crate::ops::{now, pack};
use crate::status::ApiError;
use crate::validate;
use crate::vm::transitions::{Action, Verdict, refusal, verdict};

/// The service.
#[derive(Clone)]
pub struct MigrationsApi {
    daemon: Arc<Daemon>,
}

impl MigrationsApi {
    /// Over the daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    async fn check(&self, request: CheckMigrationRequest) -> Result<CheckMigrationResponse, ApiError> {
        let name = VmName::parse("parent", &request.parent, "")?;
        let (spec, destination) = validate::migration(request.spec)?;
        let handle = self.daemon.registry.get(&name)?;
        let checked = Box::pin(source_begin::check(&self.daemon, &handle, &spec, &destination)).await?;
        Ok(CheckMigrationResponse {
            compatible: checked.mismatches.iter().all(|m| m.warning),
            mismatches: checked.mismatches,
            destination_host: checked.destination_host,
        })
    }

    async fn create(&self, request: CreateMigrationRequest) -> Result<Operation, ApiError> {
        let daemon = &self.daemon;
        let name = VmName::parse("parent", &request.parent, "")?;
        let (spec, destination) = validate::migration(request.spec.clone())?;
        let handle = daemon.registry.get(&name)?;
        if request.validate_only {
            return Box::pin(self.validate_only(&handle, spec, &destination)).await;
        }
        // No wait: whoever migrates wants to follow it. The metadata is filled when the migration has its name.
        Box::pin(operation(
            daemon,
            "CreateMigration",
            &request.request_id,
            &request,
            pack("Migration", &Migration::default()),
            Duration::ZERO,
            |seed| async {
                Self::admit(&handle)?;
                Box::pin(source_begin::begin(daemon, &handle, spec, &destination, |migration| {
                    seed.with_metadata(pack("Migration", migration))
                }))
                .await
            },
        ))
        .await
    }

    /// Refuses early what the actor would refuse, before another host is asked.
    fn admit(handle: &crate::vm::registry::VmHandle) -> Result<(), ApiError> {
        let view = handle.view();
        match verdict(view.state(), Action::Migrate) {
            Verdict::Via(_) => Ok(()),
            _ => Err(refusal(&handle.name.to_string(), view.state(), Action::Migrate, &view.vm.moved_to)),
        }
    }

    async fn validate_only(
        &self,
        handle: &crate::vm::registry::VmHandle,
        spec: MigrationSpec,
        destination: &crate::config::Address,
    ) -> Result<Operation, ApiError> {
        Self::admit(handle)?;
        let checked = Box::pin(source_begin::check(&self.daemon, handle, &spec, destination)).await?;
        check::refuse(&handle.name.to_string(), &checked.mismatches)?;
        let mut migration = Migration {
            name: MigrationName { vm: handle.name.clone(), id: uuid::Uuid::nil() }.to_string(),
            spec: Some(spec),
            create_time: Some(now()),
            source_host: self.daemon.host.host_id.clone(),
            destination_host: checked.destination_host,
            ..Migration::default()
        };
        migration.set_state(migration::State::Preparing);
        Ok(Operation {
            name: format!("operations/{}", uuid::Uuid::nil()),
            metadata: Some(pack("Migration", &migration)),
            done: true,
            result: Some(lro::Result::Response(pack("Migration", &migration))),
        })
    }

    fn list(&self, request: &ListMigrationsRequest) -> Result<ListMigrationsResponse, ApiError> {
        let size = validate::page_size(request.page_size, 100)?;
        let records = if let Some(project) = request.parent.strip_suffix("/virtualMachines/-") {
            let project = crate::names::parse_project("parent", project)?;
            let prefix = format!("projects/{project}/");
            let mut all = self.daemon.store.list_all_migrations();
            all.retain(|r| r.migration.as_ref().is_some_and(|m| m.name.starts_with(&prefix)));
            all
        } else {
            let name = VmName::parse("parent", &request.parent, "")?;
            self.daemon.store.list_migrations(&self.daemon.registry.get(&name)?.uid)
        };
        let live = self.daemon.migrations.outgoing();
        let all: Vec<Migration> = records
            .into_iter()
            .filter_map(|r| r.migration)
            .map(|m| {
                let id = MigrationName::parse("name", &m.name).ok().map(|n| n.id);
                id.and_then(|id| live.get(&id)).map_or(m, |now| now.borrow().clone())
            })
            .collect();
        drop(live);
        let start = if request.page_token.is_empty() {
            0
        } else {
            MigrationName::parse("page_token", &request.page_token)?;
            all.iter().position(|m| m.name == request.page_token).map_or(all.len(), |i| i + 1)
        };
        let rest: Vec<_> = all.into_iter().skip(start).collect();
        let (migrations, next_page_token) = page(rest, size, "", |m| m.name.clone(), |_, _| true);
        Ok(ListMigrationsResponse { migrations, next_page_token })
    }
}

#[tonic::async_trait]
impl MigrationsService for MigrationsApi {
    async fn check_migration(
        &self,
        request: Request<CheckMigrationRequest>,
    ) -> Result<Response<CheckMigrationResponse>, Status> {
        Ok(Response::new(Box::pin(self.check(request.into_inner())).await?))
    }

    async fn create_migration(
        &self,
        request: Request<CreateMigrationRequest>,
    ) -> Result<Response<Operation>, Status> {
        // In a task of its own: a caller that goes away in the middle must not leave half a migration.
        let this = self.clone();
        let created = tokio::spawn(async move { Box::pin(this.create(request.into_inner())).await }).await;
        let created = created
            .map_err(|e| ApiError::internal("TASK_FAILED", format!("the request's task failed: {e}")))?;
        Ok(Response::new(created?))
    }

    async fn get_migration(
        &self,
        request: Request<GetMigrationRequest>,
    ) -> Result<Response<Migration>, Status> {
        let name = MigrationName::parse("name", &request.get_ref().name)?;
        Ok(Response::new(crate::migration::get(&self.daemon, &name)?))
    }

    async fn list_migrations(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        Ok(Response::new(self.list(request.get_ref())?))
    }

    type WatchMigrationStream = BoxStream<Migration>;

    async fn watch_migration(
        &self,
        request: Request<WatchMigrationRequest>,
    ) -> Result<Response<Self::WatchMigrationStream>, Status> {
        let name = MigrationName::parse("name", &request.get_ref().name)?;
        let now = crate::migration::get(&self.daemon, &name)?;
        let live = self.daemon.migrations.outgoing().get(&name.id).cloned();
        let Some(mut live) = live else {
            return Ok(Response::new(Box::pin(tokio_stream::once(Ok(now)))));
        };
        let shutdown = self.daemon.shutdown.clone();
        let stream = async_stream::stream! {
            loop {
                let migration = live.borrow_and_update().clone();
                let over = matches!(
                    migration.state(),
                    migration::State::Succeeded | migration::State::Failed | migration::State::Cancelled
                );
                yield Ok(migration);
                if over {
                    return;
                }
                tokio::select! {
                    () = shutdown.cancelled() => {
                        yield Err(ApiError::shutting_down().into());
                        return;
                    }
                    changed = live.changed() => if changed.is_err() { return },
                }
            }
        };
        Ok(Response::new(Box::pin(stream)))
    }

    async fn force_owner(
        &self,
        request: Request<ForceOwnerRequest>,
    ) -> Result<Response<VirtualMachine>, Status> {
        // In a task of its own: what has begun goes on without its caller.
        let (daemon, request) = (Arc::clone(&self.daemon), request.into_inner());
        let forced = tokio::spawn(async move { Box::pin(force::force(&daemon, request)).await }).await;
        let forced = forced
            .map_err(|e| ApiError::internal("TASK_FAILED", format!("the request's task failed: {e}")))?;
        Ok(Response::new(crate::vm::view::whole(forced?)))
    }

    async fn cancel_migration(
        &self,
        request: Request<CancelMigrationRequest>,
    ) -> Result<Response<()>, Status> {
        crate::migration::cancel(&self.daemon, &request.get_ref().name)?;
        Ok(Response::new(()))
    }
}
