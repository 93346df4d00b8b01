//! What is durable, in memory, for readers: no read waits for the disk.
//!
//! Only the writer changes it, after a commit is durable, holding the lock for map updates alone.

use super::disk::{Damaged, Loaded};
use super::envelope::Problem;
use super::keys::{Key, last_segment};
use prost::Message;
use std::collections::{BTreeMap, HashMap, VecDeque};
use vpmu_proto::store::{MigrationRecord, OperationRecord, PmuVcpuRecord, VmRecord};

/// A vCPU's PMU states: the latest, and where the earlier ones are.
#[derive(Debug, Clone)]
pub(crate) struct PmuSlot {
    pub(crate) latest: PmuVcpuRecord,
    /// Sequence numbers that are stored, ascending; the last is `latest`.
    pub(crate) sequences: VecDeque<u64>,
}

/// A change of the view.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    PutVm(String, Box<VmRecord>),
    RemoveVm(String),
    PutPmu(String, Box<PmuVcpuRecord>, VecDeque<u64>),
    PutMigration(String, String, Box<MigrationRecord>),
    RemoveMigration(String, String),
    PutOperation(String, Box<OperationRecord>),
    RemoveOperation(String),
}

/// Everything but the PMU history, decoded.
#[derive(Debug, Default)]
pub(crate) struct View {
    pub(crate) vms: BTreeMap<String, VmRecord>,
    pub(crate) pmu: BTreeMap<String, BTreeMap<u32, PmuSlot>>,
    pub(crate) migrations: BTreeMap<String, BTreeMap<String, MigrationRecord>>,
    pub(crate) operations: BTreeMap<String, OperationRecord>,
    pub(crate) by_request: HashMap<String, String>,
}

impl View {
    pub(crate) fn apply(&mut self, change: Change) {
        match change {
            Change::PutVm(uid, record) => drop(self.vms.insert(uid, *record)),
            Change::RemoveVm(uid) => {
                self.vms.remove(&uid);
                self.pmu.remove(&uid);
                self.migrations.remove(&uid);
            }
            Change::PutPmu(uid, latest, sequences) => {
                let vcpu = latest.image.as_ref().map_or(0, |i| i.vcpu);
                self.pmu.entry(uid).or_default().insert(vcpu, PmuSlot { latest: *latest, sequences });
            }
            Change::PutMigration(uid, id, record) => {
                self.migrations.entry(uid).or_default().insert(id, *record);
            }
            Change::RemoveMigration(uid, id) => {
                if let Some(of_vm) = self.migrations.get_mut(&uid) {
                    of_vm.remove(&id);
                }
            }
            Change::PutOperation(id, record) => {
                if !record.request_id.is_empty() {
                    self.by_request.insert(record.request_id.clone(), id.clone());
                }
                self.operations.insert(id, *record);
            }
            Change::RemoveOperation(id) => {
                if let Some(gone) = self.operations.remove(&id)
                    && self.by_request.get(&gone.request_id) == Some(&id)
                {
                    self.by_request.remove(&gone.request_id);
                }
            }
        }
    }

    /// Decodes what was read at open; what cannot be decoded is added to `damaged`.
    pub(crate) fn load(loaded: &Loaded, damaged: &mut Vec<Damaged>) -> Self {
        let mut view = Self::default();
        for (key, (bytes, _)) in &loaded.records {
            if let Err(problem) = view.load_one(key, bytes) {
                damaged.push(Damaged { key: key.to_string(), problem });
            }
        }
        view
    }

    fn load_one(&mut self, key: &Key, bytes: &[u8]) -> Result<(), Problem> {
        match key {
            Key::Host => {}
            Key::Vm(uid) => {
                let record: VmRecord = decode(bytes)?;
                belongs(record.vm.as_ref().is_some_and(|vm| vm.uid == *uid))?;
                self.apply(Change::PutVm(uid.clone(), Box::new(record)));
            }
            Key::Pmu(uid, vcpu, sequence) => {
                let record: PmuVcpuRecord = decode(bytes)?;
                let of_vcpu = record.image.as_ref().is_some_and(|i| i.vcpu == *vcpu);
                belongs(record.vm_uid == *uid && of_vcpu && record.sequence == *sequence)?;
                // Keys come in ascending order of the sequence, so the last one stays.
                let known = self.pmu.get(uid).and_then(|p| p.get(vcpu)).map(|p| p.sequences.clone());
                let mut sequences = known.unwrap_or_default();
                sequences.push_back(*sequence);
                self.apply(Change::PutPmu(uid.clone(), Box::new(record), sequences));
            }
            Key::Migration(uid, id) => {
                let record: MigrationRecord = decode(bytes)?;
                let name = record.migration.as_ref().map_or("", |m| &m.name);
                belongs(record.vm_uid == *uid && last_segment(name) == id)?;
                self.apply(Change::PutMigration(uid.clone(), id.clone(), Box::new(record)));
            }
            Key::Operation(id) => {
                let record: OperationRecord = decode(bytes)?;
                belongs(record.operation.as_ref().is_some_and(|o| last_segment(&o.name) == id))?;
                self.apply(Change::PutOperation(id.clone(), Box::new(record)));
            }
        }
        Ok(())
    }
}

pub(crate) fn decode<M: Message + Default>(bytes: &[u8]) -> Result<M, Problem> {
    M::decode(bytes).map_err(|e| Problem::Undecodable(e.to_string()))
}

fn belongs(yes: bool) -> Result<(), Problem> {
    if yes { Ok(()) } else { Err(Problem::WrongKey) }
}
