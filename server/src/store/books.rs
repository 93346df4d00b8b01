//! The writer's books: which keys exist, what must go when a bound is reached, and what a change means for sled.
//!
//! They run ahead of the disk by the group that is being written; if that group fails the store is read-only until they
//! have been made anew, so they are never wrong when it matters.

use super::batch::Op;
use super::envelope;
use super::error::StoreError;
use super::keys::{Key, PART};
use super::view::{Change, View};
use super::{MIGRATION_HISTORY, OPERATION_HISTORY, PMU_HISTORY};
use prost::Message;
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use vpmu_proto::api::migration::State;
use vpmu_proto::store::{MigrationRecord, OperationRecord, PmuVcpuRecord, VmRecord};

/// Age of a record: creation time, then its id.
type Age = (i64, i32, String);

/// Gives a machine's ownership epoch and incarnation as the journal has them.
pub(crate) type OwnershipOf<'a> = &'a dyn Fn(&str) -> Option<(u64, u64)>;

/// One group as it goes to sled and, once durable, to the view.
#[derive(Default)]
pub(crate) struct Plan {
    pub(crate) batch: sled::Batch,
    pub(crate) changes: Vec<Change>,
}

#[derive(Debug, Default)]
pub(crate) struct Books {
    /// Parts of records that have more than one.
    parts: HashMap<Key, u16>,
    vms: BTreeSet<String>,
    pmu: BTreeMap<String, BTreeMap<u32, VecDeque<u64>>>,
    /// Per machine: ended migrations sort before open ones.
    migrations: BTreeMap<String, BTreeMap<String, (bool, Age)>>,
    operations: HashMap<String, (bool, Age)>,
    finished: BTreeSet<Age>,
}

impl Books {
    pub(crate) fn new(view: &View, parts: impl IntoIterator<Item = (Key, u16)>) -> Self {
        let mut books =
            Self { parts: parts.into_iter().filter(|(_, n)| *n > 1).collect(), ..Self::default() };
        books.vms = view.vms.keys().cloned().collect();
        for (uid, vcpus) in &view.pmu {
            let of_vm = vcpus.iter().map(|(vcpu, slot)| (*vcpu, slot.sequences.clone())).collect();
            books.pmu.insert(uid.clone(), of_vm);
        }
        for (uid, of_vm) in &view.migrations {
            let of_vm = of_vm.iter().map(|(id, m)| (id.clone(), migration_order(id, m))).collect();
            books.migrations.insert(uid.clone(), of_vm);
        }
        for (id, record) in &view.operations {
            books.note_operation(id, record);
        }
        books
    }

    /// Whether all of a request can be done; nothing has changed if not.
    pub(crate) fn admit(&self, ops: &[Op]) -> Result<(), StoreError> {
        let unfinished = |r: &OperationRecord| r.operation.as_ref().is_none_or(|o| !o.done);
        let new = ops.iter().filter(
            |op| matches!(op, Op::PutOperation(id, r) if unfinished(r) && !self.operations.contains_key(id)),
        );
        let count = self.operations.len() - self.finished.len() + new.count();
        if count > OPERATION_HISTORY {
            return Err(StoreError::OperationsFull { count, max: OPERATION_HISTORY });
        }
        Ok(())
    }

    /// Adds one change to the plan.
    pub(crate) fn plan(&mut self, op: Op, ownership: OwnershipOf<'_>, plan: &mut Plan) {
        match op {
            Op::PutVm(uid, record) => self.put_vm(uid, *record, ownership, plan),
            Op::DeleteVm(uid) => self.delete_vm(uid, plan),
            Op::PutPmu(uid, record) => self.put_pmu(uid, record, plan),
            Op::PutMigration(uid, id, record) => self.put_migration(&uid, id, *record, plan),
            Op::PutOperation(id, record) => self.put_operation(id, record, plan),
            Op::DeleteOperation(id) => self.remove_operation(&id, plan),
        }
    }

    fn put_vm(&mut self, uid: String, mut record: VmRecord, ownership: OwnershipOf<'_>, plan: &mut Plan) {
        if let Some(vm) = &mut record.vm {
            (vm.epoch, vm.incarnation) = ownership(&uid).unwrap_or_default();
        }
        self.write(Key::Vm(uid.clone()), &record, plan);
        self.vms.insert(uid.clone());
        plan.changes.push(Change::PutVm(uid, Box::new(record)));
    }

    fn delete_vm(&mut self, uid: String, plan: &mut Plan) {
        if self.vms.remove(&uid) {
            self.erase(&Key::Vm(uid.clone()), plan);
        }
        for (vcpu, sequences) in self.pmu.remove(&uid).unwrap_or_default() {
            for sequence in sequences {
                self.erase(&Key::Pmu(uid.clone(), vcpu, sequence), plan);
            }
        }
        for id in self.migrations.remove(&uid).unwrap_or_default().into_keys() {
            self.erase(&Key::Migration(uid.clone(), id), plan);
        }
        plan.changes.push(Change::RemoveVm(uid));
    }

    fn put_pmu(&mut self, uid: String, mut record: PmuVcpuRecord, plan: &mut Plan) {
        let vcpu = record.image.as_ref().map_or(0, |i| i.vcpu);
        let of_vm = self.pmu.entry(uid.clone()).or_default();
        let last = of_vm.values().filter_map(|s| s.back().copied()).max().unwrap_or(0);
        record.sequence = record.sequence.max(last.saturating_add(1));
        let sequences = of_vm.entry(vcpu).or_default();
        sequences.push_back(record.sequence);
        let mut gone = Vec::new();
        while sequences.len() > PMU_HISTORY {
            gone.extend(sequences.pop_front());
        }
        let kept = sequences.clone();
        for sequence in gone {
            self.erase(&Key::Pmu(uid.clone(), vcpu, sequence), plan);
        }
        self.write(Key::Pmu(uid.clone(), vcpu, record.sequence), &record, plan);
        plan.changes.push(Change::PutPmu(uid, Box::new(record), kept));
    }

    fn put_migration(&mut self, uid: &str, id: String, record: MigrationRecord, plan: &mut Plan) {
        let of_vm = self.migrations.entry(uid.to_owned()).or_default();
        of_vm.insert(id.clone(), migration_order(&id, &record));
        let oldest =
            of_vm.iter().filter(|(other, _)| **other != id).min_by_key(|(_, order)| (*order).clone());
        let oldest = oldest.map(|(id, _)| id.clone()).filter(|_| of_vm.len() > MIGRATION_HISTORY);
        if let Some(gone) = oldest {
            of_vm.remove(&gone);
            self.erase(&Key::Migration(uid.to_owned(), gone.clone()), plan);
            plan.changes.push(Change::RemoveMigration(uid.to_owned(), gone));
        }
        self.write(Key::Migration(uid.to_owned(), id.clone()), &record, plan);
        plan.changes.push(Change::PutMigration(uid.to_owned(), id, Box::new(record)));
    }

    fn put_operation(&mut self, id: String, record: OperationRecord, plan: &mut Plan) {
        self.write(Key::Operation(id.clone()), &record, plan);
        self.note_operation(&id, &record);
        plan.changes.push(Change::PutOperation(id, Box::new(record)));
        while self.operations.len() > OPERATION_HISTORY {
            let Some((_, _, gone)) = self.finished.first().cloned() else { break };
            self.remove_operation(&gone, plan);
        }
    }

    fn remove_operation(&mut self, id: &str, plan: &mut Plan) {
        if let Some((_, age)) = self.operations.remove(id) {
            self.finished.remove(&age);
            self.erase(&Key::Operation(id.to_owned()), plan);
            plan.changes.push(Change::RemoveOperation(id.to_owned()));
        }
    }

    fn note_operation(&mut self, id: &str, record: &OperationRecord) {
        if let Some((_, age)) = self.operations.remove(id) {
            self.finished.remove(&age);
        }
        let time = record.create_time.as_ref().map_or((0, 0), |t| (t.seconds, t.nanos));
        let age = (time.0, time.1, id.to_owned());
        let done = record.operation.as_ref().is_some_and(|o| o.done);
        if done {
            self.finished.insert(age.clone());
        }
        self.operations.insert(id.to_owned(), (done, age));
    }

    /// Writes a record in as many parts as it needs and removes parts of an earlier, longer one.
    pub(crate) fn write(&mut self, key: Key, record: &impl Message, plan: &mut Plan) {
        let sealed = envelope::seal(&record.encode_to_vec());
        let mut count: u16 = 0;
        for part in sealed.chunks(PART) {
            plan.batch.insert(key.part(count), part);
            count = count.saturating_add(1);
        }
        for stale in count..self.parts.remove(&key).unwrap_or(0) {
            plan.batch.remove(key.part(stale));
        }
        if count > 1 {
            self.parts.insert(key, count);
        }
    }

    fn erase(&mut self, key: &Key, plan: &mut Plan) {
        for part in 0..self.parts.remove(key).unwrap_or(1) {
            plan.batch.remove(key.part(part));
        }
    }
}

/// Orders a machine's migrations: ended ones first, oldest first.
fn migration_order(id: &str, record: &MigrationRecord) -> (bool, Age) {
    let Some(migration) = &record.migration else { return (false, (0, 0, id.to_owned())) };
    let open = !matches!(migration.state(), State::Succeeded | State::Failed | State::Cancelled);
    let time = migration.create_time.as_ref().map_or((0, 0), |t| (t.seconds, t.nanos));
    (open, (time.0, time.1, id.to_owned()))
}
