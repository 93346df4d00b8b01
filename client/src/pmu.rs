//! Typed methods of `PmuService`.

use crate::client::Client;
use crate::error::ClientError;
use crate::names;
use vpmu_proto::api::{
    AuditPmuRequest, GetHostPmuCapabilitiesRequest, GetPmuRequest, GetPmuStateRequest, HostPmuCapabilities,
    Pmu, PmuAudit, PmuState,
};

impl Client {
    /// Reads a machine's counters now.
    pub async fn get_pmu(&self, vm: &str) -> Result<Pmu, ClientError> {
        let request = self.request(GetPmuRequest { name: names::vm(vm) });
        self.call("GetPmu", self.raw_pmu().get_pmu(request)).await
    }

    /// Reads a machine's PMU state as persisted in the host's store.
    pub async fn get_pmu_state(&self, vm: &str) -> Result<PmuState, ClientError> {
        let request = self.request(GetPmuStateRequest { name: names::vm(vm) });
        self.call("GetPmuState", self.raw_pmu().get_pmu_state(request)).await
    }

    /// Compares the registers of a machine's cores with what was left there.
    pub async fn audit_pmu(&self, vm: &str) -> Result<PmuAudit, ClientError> {
        let request = self.request(AuditPmuRequest { name: names::vm(vm) });
        self.call("AuditPmu", self.raw_pmu().audit_pmu(request)).await
    }

    /// What the host's PMU back end offers to guests.
    pub async fn host_capabilities(&self) -> Result<HostPmuCapabilities, ClientError> {
        let request = self.request(GetHostPmuCapabilitiesRequest {});
        self.call("GetHostPmuCapabilities", self.raw_pmu().get_host_pmu_capabilities(request)).await
    }
}
