//! Reads: from memory but for the PMU history, which a blocking thread fetches.

use super::error::StoreError;
use super::keys::{Key, check_id, last_segment};
use super::view::{View, decode};
use super::{Shared, Store};
use std::sync::PoisonError;
use vpmu_proto::store::{MigrationRecord, OperationRecord, PmuVcpuRecord, VmRecord};

/// Epoch in a machine's stored record.
pub(crate) fn cached_epoch(shared: &Shared, uid: &str) -> Option<u64> {
    let view = shared.view.read().unwrap_or_else(PoisonError::into_inner);
    view.vms.get(uid)?.vm.as_ref().map(|vm| vm.epoch)
}

impl Store {
    fn view<T>(&self, read: impl FnOnce(&View) -> T) -> T {
        read(&self.inner.shared.view.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// A machine's record with its ownership as it is now.
    pub fn get_vm(&self, uid: &str) -> Option<VmRecord> {
        self.view(|v| v.vms.get(uid).cloned()).map(|record| self.with_ownership(record))
    }

    /// All machines' records, by uid.
    pub fn list_vms(&self) -> Vec<VmRecord> {
        let records: Vec<_> = self.view(|v| v.vms.values().cloned().collect());
        records.into_iter().map(|record| self.with_ownership(record)).collect()
    }

    fn with_ownership(&self, mut record: VmRecord) -> VmRecord {
        if let Some(vm) = &mut record.vm
            && let Some(held) = self.ownership(&vm.uid)
        {
            (vm.epoch, vm.incarnation) = (held.epoch, held.incarnation);
        }
        record
    }

    /// A machine's latest PMU states, by vCPU.
    pub fn get_pmu(&self, uid: &str) -> Vec<PmuVcpuRecord> {
        self.view(|v| {
            v.pmu.get(uid).map(|p| p.values().map(|s| s.latest.clone()).collect()).unwrap_or_default()
        })
    }

    /// A vCPU's latest PMU state.
    pub fn get_vcpu_pmu(&self, uid: &str, vcpu: u32) -> Option<PmuVcpuRecord> {
        self.view(|v| Some(v.pmu.get(uid)?.get(&vcpu)?.latest.clone()))
    }

    /// A vCPU's kept PMU states, newest first; at most [`super::PMU_HISTORY`].
    ///
    /// # Errors
    /// [`StoreError::Closed`], [`StoreError::Corrupt`] if one cannot be read.
    pub async fn pmu_history(&self, uid: &str, vcpu: u32) -> Result<Vec<PmuVcpuRecord>, StoreError> {
        let uid = check_id("vm_uid", uid)?;
        let sequences =
            self.view(|v| v.pmu.get(&uid).and_then(|p| p.get(&vcpu)).map(|s| s.sequences.clone()));
        let reader = self.inner.shared.reader.read().unwrap_or_else(PoisonError::into_inner).clone();
        let reader = reader.ok_or_else(|| match self.inner.shared.failed() {
            Some(cause) => StoreError::ReadOnly { cause },
            None => StoreError::Closed,
        })?;
        let path = self.inner.dir.clone();
        let read = move || {
            let mut records = Vec::new();
            for sequence in sequences.unwrap_or_default().into_iter().rev() {
                let key = Key::Pmu(uid.clone(), vcpu, sequence);
                let decoded = reader.get(&key).and_then(|bytes| bytes.map(|b| decode(&b)).transpose());
                // Gone in the meantime: a newer one took its place.
                records.extend(decoded.map_err(|problem| StoreError::Corrupt {
                    path: path.clone(),
                    message: format!("{key}: {problem}"),
                })?);
            }
            Ok(records)
        };
        tokio::task::spawn_blocking(read).await.map_err(|_| StoreError::Closed)?
    }

    /// A migration by its machine and the last segment of its name (or the whole name).
    pub fn get_migration(&self, uid: &str, name: &str) -> Option<MigrationRecord> {
        self.view(|v| v.migrations.get(uid)?.get(last_segment(name)).cloned())
    }

    /// A machine's migrations, newest first.
    pub fn list_migrations(&self, uid: &str) -> Vec<MigrationRecord> {
        newest_first(
            self.view(|v| v.migrations.get(uid).map(|m| m.values().cloned().collect()).unwrap_or_default()),
        )
    }

    /// All machines' migrations, newest first.
    pub fn list_all_migrations(&self) -> Vec<MigrationRecord> {
        newest_first(self.view(|v| v.migrations.values().flat_map(|m| m.values().cloned()).collect()))
    }

    /// An operation by its name or the last segment of it.
    pub fn get_operation(&self, name: &str) -> Option<OperationRecord> {
        self.view(|v| v.operations.get(last_segment(name)).cloned())
    }

    /// The operation that answers a request id.
    pub fn operation_by_request(&self, request_id: &str) -> Option<OperationRecord> {
        self.view(|v| v.operations.get(v.by_request.get(request_id)?).cloned())
    }

    /// All operations, oldest first.
    pub fn list_operations(&self) -> Vec<OperationRecord> {
        let mut all: Vec<_> = self.view(|v| v.operations.values().cloned().collect());
        all.sort_by_key(|r| r.create_time.as_ref().map(|t| (t.seconds, t.nanos)));
        all
    }
}

fn newest_first(mut all: Vec<MigrationRecord>) -> Vec<MigrationRecord> {
    let time = |r: &MigrationRecord| r.migration.as_ref()?.create_time.as_ref().map(|t| (t.seconds, t.nanos));
    all.sort_by_key(|r| std::cmp::Reverse(time(r)));
    all
}
