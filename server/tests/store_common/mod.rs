//! Records for the store's tests.
#![allow(dead_code, reason = "each test binary uses some of them")]

use vpmu_proto::api::{Migration, PmuShape, VirtualMachine, migration};
use vpmu_proto::longrunning::Operation;
use vpmu_proto::store::ownership_record::Phase;
use vpmu_proto::store::{MigrationRecord, OperationRecord, OwnershipRecord, PmuVcpuRecord, VmRecord};
use vpmu_proto::worker::{PmuImage, PmuImageRegister};

pub(crate) fn vm(uid: &str, etag: &str) -> VmRecord {
    let vm = VirtualMachine {
        name: format!("projects/default/virtualMachines/{uid}"),
        uid: uid.to_owned(),
        etag: etag.to_owned(),
        ..VirtualMachine::default()
    };
    VmRecord { vm: Some(vm), pmu_shape: Some(PmuShape::default()) }
}

/// A realistic image: 40 registers.
pub(crate) fn pmu(uid: &str, vcpu: u32, value: u64) -> PmuVcpuRecord {
    let registers =
        (0..40).map(|i| PmuImageRegister { msr: 0xc1 + i, value: value + u64::from(i) }).collect();
    PmuVcpuRecord {
        vm_uid: uid.to_owned(),
        image: Some(PmuImage { vcpu, registers, pmis: value, digest: vec![7; 32], ..PmuImage::default() }),
        cause: "pause".to_owned(),
        ..PmuVcpuRecord::default()
    }
}

pub(crate) fn migration(uid: &str, id: &str, seconds: u64, state: migration::State) -> MigrationRecord {
    let migration = Migration {
        name: format!("projects/default/virtualMachines/{uid}/migrations/{id}"),
        state: state.into(),
        create_time: Some(prost_types::Timestamp { seconds: seconds.cast_signed(), nanos: 0 }),
        ..Migration::default()
    };
    MigrationRecord { migration: Some(migration), vm_uid: uid.to_owned() }
}

pub(crate) fn operation(id: &str, seconds: u64, done: bool) -> OperationRecord {
    OperationRecord {
        operation: Some(Operation { name: format!("operations/{id}"), done, ..Operation::default() }),
        request_id: format!("request-{id}"),
        request_digest: vec![1; 32],
        create_time: Some(prost_types::Timestamp { seconds: seconds.cast_signed(), nanos: 0 }),
    }
}

pub(crate) fn owned(uid: &str, epoch: u64, incarnation: u64) -> OwnershipRecord {
    OwnershipRecord {
        vm_uid: uid.to_owned(),
        epoch,
        owner_host: "host-a".to_owned(),
        incarnation,
        phase: Phase::Owned.into(),
        ..OwnershipRecord::default()
    }
}
