//! The rpcs, one line of thought each.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use vpmu_proto::api::ProbeReport;
use vpmu_proto::worker as proto;
use vpmu_proto::worker::worker_service_server::WorkerService;

use super::{Worker, command, console, create, events, migration, placement, snapshot};
use crate::error::WorkerError;
use crate::grant::Grant;
use crate::migrate::Phase;

type Answer<T> = Result<Response<T>, Status>;

/// Longest identifier that is taken from outside.
const MAX_ID: usize = 128;

#[tonic::async_trait]
impl WorkerService for Worker {
    async fn attach(&self, request: Request<proto::AttachRequest>) -> Answer<proto::AttachResponse> {
        self.attach_as(&request.into_inner())?;
        Ok(Response::new(proto::AttachResponse { status: Some(self.inner.status()) }))
    }

    async fn create_vm(&self, request: Request<proto::CreateVmRequest>) -> Answer<proto::CreateVmResponse> {
        let mut r = request.into_inner();
        if let Some(attach) = r.attach.take() {
            self.attach_as(&attach)?;
        }
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(create::create(&self.inner, r).await?))
    }

    async fn grant(&self, request: Request<proto::GrantRequest>) -> Answer<proto::GrantResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        let running_monotonic_ns = self.grant_and_run(&r).await?;
        Ok(Response::new(proto::GrantResponse { running_monotonic_ns }))
    }

    async fn seal(&self, request: Request<proto::SealRequest>) -> Answer<proto::SealResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        // Before anything else: what is queued ahead of the pause cannot let a vCPU in any more.
        let sealed_epoch = self.inner.seal(r.epoch);
        let _control = self.inner.control.lock().await;
        if let Ok(machine) = self.inner.machine()
            && self.inner.may_run().is_err()
        {
            machine.pause().await?;
        }
        Ok(Response::new(proto::SealResponse { sealed_epoch }))
    }

    async fn run(&self, request: Request<proto::RunRequest>) -> Answer<proto::RunResponse> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        let _control = self.inner.control.lock().await;
        self.enter().await?;
        Ok(Response::new(proto::RunResponse {}))
    }

    async fn pause(&self, request: Request<proto::PauseRequest>) -> Answer<proto::PauseResponse> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        let _control = self.inner.control.lock().await;
        let pmu = self.inner.machine()?.pause().await?;
        Ok(Response::new(proto::PauseResponse { pmu }))
    }

    type CommandStream = command::AnswerStream;

    async fn command(
        &self,
        request: Request<tonic::Streaming<proto::CommandRequest>>,
    ) -> Answer<Self::CommandStream> {
        Ok(Response::new(command::serve(self, request.into_inner())))
    }

    async fn get_status(&self, request: Request<proto::GetStatusRequest>) -> Answer<proto::WorkerStatus> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        Ok(Response::new(self.inner.status()))
    }

    async fn get_pmu(&self, request: Request<proto::GetPmuRequest>) -> Answer<proto::GetPmuResponse> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        let machine = self.inner.machine()?;
        let pmu = machine.look().await?;
        Ok(Response::new(proto::GetPmuResponse { pmu, vcpu_cores: machine.cores() }))
    }

    async fn get_stats(
        &self,
        request: Request<proto::GetStatsRequest>,
    ) -> Answer<vpmu_proto::api::VirtualMachineStats> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        Ok(Response::new(self.inner.machine()?.all_statistics()?))
    }

    async fn audit_pmu(&self, request: Request<proto::AuditPmuRequest>) -> Answer<proto::AuditPmuResponse> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        let machine = self.inner.machine()?;
        let found = machine.audit().await?;
        let vcpus = (0u32..).zip(found).zip(machine.cores());
        let vcpus = vcpus.map(|((vcpu, found), core)| proto::CoreAudit {
            vcpu,
            core,
            foreign: found
                .into_iter()
                .map(|f| proto::ForeignWrite { msr: f.msr, expected: f.expected, found: f.found })
                .collect(),
        });
        Ok(Response::new(proto::AuditPmuResponse { vcpus: vcpus.collect() }))
    }

    async fn get_probe_report(&self, request: Request<proto::GetProbeReportRequest>) -> Answer<ProbeReport> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        Ok(Response::new(self.inner.machine()?.probe_report()?))
    }

    type ReadConsoleStream = console::ReadStream;

    async fn read_console(
        &self,
        request: Request<proto::ReadConsoleRequest>,
    ) -> Answer<Self::ReadConsoleStream> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(console::read(&self.inner, r.offset, r.follow)))
    }

    async fn write_console(
        &self,
        request: Request<proto::WriteConsoleRequest>,
    ) -> Answer<proto::WriteConsoleResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(console::write(&self.inner, r.data).await?))
    }

    type WatchEventsStream = events::EventStream;

    async fn watch_events(
        &self,
        request: Request<proto::WatchEventsRequest>,
    ) -> Answer<Self::WatchEventsStream> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        Ok(Response::new(events::watch(&self.inner)))
    }

    async fn update_placement(
        &self,
        request: Request<proto::UpdatePlacementRequest>,
    ) -> Answer<proto::UpdatePlacementResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        // Once begun it runs to its end, also if the caller goes away: all of them move, or none.
        let inner = Arc::clone(&self.inner);
        let done = tokio::spawn(async move { placement::update(&inner, &r).await });
        let answer = done.await.map_err(|e| Status::internal(format!("moving the vCPUs: {e}")))?;
        Ok(Response::new(proto::UpdatePlacementResponse { vcpu_cores: answer? }))
    }

    async fn set_housekeeping(
        &self,
        request: Request<proto::SetHousekeepingRequest>,
    ) -> Answer<proto::SetHousekeepingResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        let threads = placement::housekeeping(r.cores).await?;
        Ok(Response::new(proto::SetHousekeepingResponse { threads }))
    }

    type MigrateOutStream = migration::OutStream;

    async fn migrate_out(
        &self,
        request: Request<proto::MigrateOutRequest>,
    ) -> Answer<Self::MigrateOutStream> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(migration::migrate_out(&self.inner, &r).await?))
    }

    async fn finish_migration(
        &self,
        request: Request<proto::FinishMigrationRequest>,
    ) -> Answer<proto::FinishMigrationResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        // Once begun it runs to its end, also if the caller goes away: half a handover helps nobody.
        let inner = Arc::clone(&self.inner);
        let done = tokio::spawn(async move { migration::finish(&inner, &r.migration_id, r.epoch).await });
        let answer = done.await.map_err(|e| Status::internal(format!("finishing the migration: {e}")))?;
        Ok(Response::new(answer?))
    }

    async fn cancel_migration(
        &self,
        request: Request<proto::CancelMigrationRequest>,
    ) -> Answer<proto::CancelMigrationResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        migration::cancel(&self.inner, &r.migration_id).await?;
        Ok(Response::new(proto::CancelMigrationResponse {}))
    }

    async fn prepare_incoming(
        &self,
        request: Request<proto::PrepareIncomingRequest>,
    ) -> Answer<proto::PrepareIncomingResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(migration::prepare_incoming(&self.inner, &r).await?))
    }

    async fn wait_drained(
        &self,
        request: Request<proto::WaitDrainedRequest>,
    ) -> Answer<proto::WaitDrainedResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(migration::wait_drained(&self.inner, &r.migration_id).await?))
    }

    async fn prepare_outgoing(
        &self,
        request: Request<proto::PrepareOutgoingRequest>,
    ) -> Answer<proto::PrepareOutgoingResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(migration::prepare_outgoing(&self.inner, &r.migration_id).await?))
    }

    async fn forget_source(
        &self,
        request: Request<proto::ForgetSourceRequest>,
    ) -> Answer<proto::ForgetSourceResponse> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        migration::forget_source(&self.inner, &r.migration_id)?;
        Ok(Response::new(proto::ForgetSourceResponse {}))
    }

    type WatchIncomingStream = migration::InStream;

    async fn watch_incoming(
        &self,
        request: Request<proto::WatchIncomingRequest>,
    ) -> Answer<Self::WatchIncomingStream> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(migration::watch_incoming(&self.inner, &r.migration_id)?))
    }

    type SaveSnapshotStream = snapshot::SaveStream;

    async fn save_snapshot(
        &self,
        request: Request<proto::SaveSnapshotRequest>,
    ) -> Answer<Self::SaveSnapshotStream> {
        let r = request.into_inner();
        self.inner.fence(r.fence.as_ref())?;
        Ok(Response::new(snapshot::save(&self.inner, r)?))
    }

    async fn shutdown(&self, request: Request<proto::ShutdownRequest>) -> Answer<proto::ShutdownResponse> {
        self.inner.fence(request.get_ref().fence.as_ref())?;
        let pmu = self.close().await?;
        Ok(Response::new(proto::ShutdownResponse { pmu }))
    }
}

impl Worker {
    fn attach_as(&self, r: &proto::AttachRequest) -> Result<(), WorkerError> {
        for (field, value) in [("store_id", &r.store_id), ("vm_uid", &r.vm_uid)] {
            if value.is_empty() || value.len() > MAX_ID {
                return Err(WorkerError::invalid(field, value, "give 1 to 128 bytes"));
            }
        }
        Ok(self.inner.rights().attach(&r.store_id, &r.vm_uid, r.incarnation, r.term)?)
    }

    async fn grant_and_run(&self, r: &proto::GrantRequest) -> Result<u64, WorkerError> {
        let term = r.fence.as_ref().map_or(0, |f| f.term);
        if r.epoch == 0 {
            return Err(WorkerError::invalid("epoch", 0, "epochs begin with 1"));
        }
        let _control = self.inner.control.lock().await;
        let incoming = self.inner.held().incoming.clone();
        if let Some(incoming) = &incoming
            && !matches!(incoming.phase(), Phase::Ready | Phase::Entered)
        {
            return Err(WorkerError::State {
                what: "granting",
                state: format!("{:?}", incoming.phase()),
                remedy: "wait until WatchIncoming says READY",
            });
        }
        if r.run {
            self.inner.machine()?;
        }
        let deadline_ns = (r.deadline_boottime_ns != 0).then_some(r.deadline_boottime_ns);
        self.inner.grant(Grant { epoch: r.epoch, term, seq: r.seq, deadline_ns })?;
        if incoming.is_some() {
            let unlocked = self.inner.machine()?.memory().unlock();
            unlocked.map_err(|e| WorkerError::Memory(e.to_string()))?;
        }
        if let Some(incoming) = &incoming
            && incoming.enter()
        {
            crate::probe::mark_resumed(self.inner.machine()?.memory());
        }
        if incoming.is_none() {
            self.end_left_log().await?;
        }
        if r.run { self.enter().await } else { Ok(0) }
    }

    /// A machine that is given back was finished with, and its dirty log is still on. The caller holds `control`.
    async fn end_left_log(&self) -> Result<(), WorkerError> {
        let finished = self.inner.held().outgoing.take_if(|outgoing| outgoing.is_finished());
        let Some(finished) = finished else { return Ok(()) };
        finished.joined().await;
        let machine = self.inner.machine()?;
        let ended = tokio::task::spawn_blocking(move || machine.vm().stop_dirty_tracking());
        let ended = ended.await.map_err(|e| WorkerError::Thread {
            thread: "end of the dirty log".to_owned(),
            problem: e.to_string(),
        })?;
        if let Err(error) = ended {
            // It costs time, nothing else.
            tracing::warn!(%error, "the dirty log of a machine that came back is still on");
        }
        Ok(())
    }

    /// Lets the vCPUs in; the caller holds `control`.
    async fn enter(&self) -> Result<u64, WorkerError> {
        let machine = self.inner.machine()?;
        self.inner.may_run()?;
        if let Some(end) = machine.end() {
            return Err(WorkerError::State {
                what: "running",
                state: format!("ENDED ({})", end.kind().as_str_name()),
                remedy: "start the VM again",
            });
        }
        if let Some(incoming) = &self.inner.held().incoming
            && incoming.phase() != Phase::Entered
        {
            return Err(WorkerError::State {
                what: "running",
                state: format!("{:?}", incoming.phase()),
                remedy: "grant an epoch first",
            });
        }
        machine.run().await
    }
}
