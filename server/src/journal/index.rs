//! The record that holds for each machine, in memory.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use vpmu_proto::store::OwnershipRecord;

/// Latest durable record by machine; shared with readers, changed by the journal's thread only.
#[derive(Debug, Clone, Default)]
pub struct Index {
    records: Arc<RwLock<BTreeMap<String, OwnershipRecord>>>,
}

impl Index {
    pub(crate) fn new(records: BTreeMap<String, OwnershipRecord>) -> Self {
        Self { records: Arc::new(RwLock::new(records)) }
    }

    /// The record that holds for a machine.
    pub fn latest(&self, vm_uid: &str) -> Option<OwnershipRecord> {
        self.records.read().unwrap_or_else(PoisonError::into_inner).get(vm_uid).cloned()
    }

    /// The records that hold, by uid.
    pub fn all(&self) -> Vec<OwnershipRecord> {
        self.records.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// How many of the records that hold are as asked. Copies none: nearly every append asks.
    pub(crate) fn count(&self, asked: impl Fn(&OwnershipRecord) -> bool) -> u64 {
        let records = self.records.read().unwrap_or_else(PoisonError::into_inner);
        records.values().filter(|record| asked(record)).count() as u64
    }

    /// Forgets the records that are as asked: nothing on disk tells of them any more.
    pub(crate) fn forget(&self, asked: impl Fn(&OwnershipRecord) -> bool) {
        self.records.write().unwrap_or_else(PoisonError::into_inner).retain(|_, record| !asked(record));
    }

    pub(crate) fn put(&self, record: OwnershipRecord) {
        let mut records = self.records.write().unwrap_or_else(PoisonError::into_inner);
        records.insert(record.vm_uid.clone(), record);
    }
}
