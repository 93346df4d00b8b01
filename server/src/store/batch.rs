//! Several records in one durable write.

use super::envelope;
use super::error::StoreError;
use super::keys::{Key, MAX_RECORD, check_id, last_segment};
use prost::Message;
use vpmu_proto::store::{MigrationRecord, OperationRecord, PmuVcpuRecord, VmRecord};

/// One change.
#[derive(Debug, Clone)]
pub(crate) enum Op {
    PutVm(String, Box<VmRecord>),
    DeleteVm(String),
    PutPmu(String, PmuVcpuRecord),
    PutMigration(String, String, Box<MigrationRecord>),
    PutOperation(String, OperationRecord),
    DeleteOperation(String),
}

/// Changes that become durable together or not at all.
#[derive(Debug, Clone, Default)]
pub struct Batch {
    pub(crate) ops: Vec<Op>,
}

impl Batch {
    /// An empty batch.
    pub fn new() -> Self {
        Self::default()
    }

    /// Stores a machine's record under `vm.uid`. The ownership fields (`epoch`, `incarnation`) are taken from the
    /// journal, whatever the record says.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if the uid is not usable as a key, `RECORD_TOO_LARGE`.
    pub fn put_vm(mut self, record: VmRecord) -> Result<Self, StoreError> {
        let uid = check_id("vm.uid", record.vm.as_ref().map_or("", |vm| &vm.uid))?;
        check_size(&Key::Vm(uid.clone()), &record)?;
        self.ops.push(Op::PutVm(uid, Box::new(record)));
        Ok(self)
    }

    /// Removes a machine with its PMU states and migrations. No error if it is not there.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if the uid is not usable as a key.
    pub fn delete_vm(mut self, uid: &str) -> Result<Self, StoreError> {
        self.ops.push(Op::DeleteVm(check_id("vm.uid", uid)?));
        Ok(self)
    }

    /// Stores a vCPU's PMU state as its latest; the last [`super::PMU_HISTORY`] are kept. `sequence` is raised above
    /// every earlier one of the machine.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if there is no image or the uid is not usable as a key, `RECORD_TOO_LARGE`.
    pub fn put_pmu(mut self, record: &PmuVcpuRecord) -> Result<Self, StoreError> {
        let uid = check_id("vm_uid", &record.vm_uid)?;
        let Some(image) = &record.image else {
            return Err(StoreError::bad_field("image", "", "give the vCPU's PMU image"));
        };
        check_size(&Key::Pmu(uid.clone(), image.vcpu, record.sequence), record)?;
        self.ops.push(Op::PutPmu(uid, record.clone()));
        Ok(self)
    }

    /// Stores a migration under its machine and the last segment of its name; the last [`super::MIGRATION_HISTORY`]
    /// of a machine are kept, ended ones going first.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if an id is not usable as a key, `RECORD_TOO_LARGE`.
    pub fn put_migration(mut self, record: &MigrationRecord) -> Result<Self, StoreError> {
        let uid = check_id("vm_uid", &record.vm_uid)?;
        let name = record.migration.as_ref().map_or("", |m| &m.name);
        let id = check_id("migration.name", last_segment(name))?;
        check_size(&Key::Migration(uid.clone(), id.clone()), record)?;
        self.ops.push(Op::PutMigration(uid, id, Box::new(record.clone())));
        Ok(self)
    }

    /// Stores an operation under the last segment of its name; the last [`super::OPERATION_HISTORY`] are kept, finished
    /// ones going first, oldest first.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if the name is not usable as a key, `RECORD_TOO_LARGE`.
    pub fn put_operation(mut self, record: &OperationRecord) -> Result<Self, StoreError> {
        let name = record.operation.as_ref().map_or("", |o| &o.name);
        let id = check_id("operation.name", last_segment(name))?;
        if record.request_id.len() > 128 {
            return Err(StoreError::bad_field("request_id", &record.request_id, "use at most 128 bytes"));
        }
        check_size(&Key::Operation(id.clone()), record)?;
        self.ops.push(Op::PutOperation(id, record.clone()));
        Ok(self)
    }

    /// Removes an operation. No error if it is not there.
    ///
    /// # Errors
    /// `RECORD_BAD_FIELD` if the id is not usable as a key.
    pub fn delete_operation(mut self, name: &str) -> Result<Self, StoreError> {
        self.ops.push(Op::DeleteOperation(check_id("operation.name", last_segment(name))?));
        Ok(self)
    }
}

fn check_size(key: &Key, record: &impl Message) -> Result<(), StoreError> {
    let bytes = record.encoded_len() + envelope::HEADER;
    if bytes > MAX_RECORD {
        return Err(StoreError::TooLarge { key: key.to_string(), bytes, max: MAX_RECORD });
    }
    Ok(())
}
