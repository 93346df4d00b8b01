//! `vpmu.v1.PmuService`.

use std::sync::Arc;

use tonic::{Request, Response, Status};
use vpmu_proto::api::pmu_service_server::PmuService;
use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::api::*;

use crate::daemon::Daemon;
use crate::names::VmName;
use crate::pmu_view;
use crate::status::ApiError;

/// The service.
#[derive(Clone)]
pub struct PmuApi {
    daemon: Arc<Daemon>,
}

impl PmuApi {
    /// Over the daemon.
    pub fn new(daemon: Arc<Daemon>) -> Self {
        Self { daemon }
    }

    async fn live(&self, name: &str) -> Result<Pmu, ApiError> {
        let name = VmName::parse("name", name, "/pmu")?;
        let view = self.daemon.registry.get(&name)?.view();
        let worker = view.worker.clone().ok_or_else(|| {
            let state = crate::vm::transitions::state_name(view.state());
            ApiError::precondition(
                "VM_HAS_NO_WORKER",
                &name.to_string(),
                format!("{name} is {state} and has no live counters; start it, or get the persisted state with GetPmuState"),
            )
        })?;
        let images = worker.pmu().await?;
        let probed = matches!(view.vm.spec.as_ref().and_then(|s| s.boot.as_ref()), Some(Boot::Probe(_)));
        let probe = if probed { worker.probe_report().await.ok() } else { None };
        Ok(Pmu {
            name: format!("{name}/pmu"),
            mode: self.daemon.host.pmu_mode.to_owned(),
            shape: images.first().and_then(|i| i.shape.clone()).or_else(|| view.pmu_shape.clone()),
            host_pmu: self.daemon.host.host_pmu.clone(),
            vcpus: pmu_view::decode_all(&images, &worker.cores())?,
            read_time: Some(crate::ops::now()),
            probe,
            restored: view.vm.pmu_restored.as_deref().cloned(),
        })
    }

    async fn audit(&self, name: &str) -> Result<PmuAudit, ApiError> {
        let name = VmName::parse("name", name, "/pmu")?;
        let view = self.daemon.registry.get(&name)?.view();
        let worker = view.worker.clone().ok_or_else(|| {
            let state = crate::vm::transitions::state_name(view.state());
            let message = format!("{name} is {state} and is on no core; start it first");
            ApiError::precondition("VM_HAS_NO_WORKER", &name.to_string(), message)
        })?;
        let audits = worker.audit_pmu().await?;
        let vendor = self.daemon.host.shape.vendor;
        let mode = self.daemon.host.pmu_mode;
        let audited = if mode == "kvm" { 0 } else { audits.len() };
        let foreign = audits.into_iter().flat_map(|audit| {
            audit.foreign.into_iter().map(move |f| PmuForeignWrite {
                vcpu: audit.vcpu,
                core: audit.core,
                msr: f.msr,
                register: pmu::register_name(f.msr, vendor),
                expected: f.expected,
                found: f.found,
            })
        });
        Ok(PmuAudit {
            name: format!("{name}/pmu"),
            mode: mode.to_owned(),
            foreign: foreign.collect(),
            vcpus: u32::try_from(audited).unwrap_or(u32::MAX),
        })
    }

    fn persisted(&self, name: &str) -> Result<PmuState, ApiError> {
        let name = VmName::parse("name", name, "/pmuState")?;
        let handle = self.daemon.registry.get(&name)?;
        let records = self.daemon.store.get_pmu(&handle.uid);
        let newest = records.iter().max_by_key(|r| r.sequence).ok_or_else(|| {
            ApiError::not_found(
                "PmuState",
                &format!("{name}/pmuState"),
                "it is stored once the machine has run and was paused, stopped, migrated or checkpointed",
            )
        })?;
        let mut vcpus = Vec::with_capacity(records.len());
        for record in &records {
            if let Some(image) = &record.image {
                vcpus.push(pmu_view::decode(image, record.core)?);
            }
        }
        Ok(PmuState {
            name: format!("{name}/pmuState"),
            mode: newest.mode.clone(),
            shape: newest.image.as_ref().and_then(|i| i.shape.clone()),
            vcpus,
            epoch: newest.epoch,
            sequence: newest.sequence,
            capture_time: newest.capture_time,
            cause: newest.cause.clone(),
        })
    }
}

#[tonic::async_trait]
impl PmuService for PmuApi {
    async fn get_pmu(&self, request: Request<GetPmuRequest>) -> Result<Response<Pmu>, Status> {
        Ok(Response::new(self.live(&request.get_ref().name).await?))
    }

    async fn get_pmu_state(
        &self,
        request: Request<GetPmuStateRequest>,
    ) -> Result<Response<PmuState>, Status> {
        Ok(Response::new(self.persisted(&request.get_ref().name)?))
    }

    async fn audit_pmu(&self, request: Request<AuditPmuRequest>) -> Result<Response<PmuAudit>, Status> {
        Ok(Response::new(self.audit(&request.get_ref().name).await?))
    }

    async fn get_host_pmu_capabilities(
        &self,
        _: Request<GetHostPmuCapabilitiesRequest>,
    ) -> Result<Response<HostPmuCapabilities>, Status> {
        Ok(Response::new(self.daemon.capabilities()))
    }
}
