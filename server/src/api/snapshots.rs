//! Snapshots: what is asked is judged here, before a machine or a file is touched.

use std::path::PathBuf;
use std::sync::Arc;

use vpmu_proto::api::{
    RestoreVirtualMachineRequest, SnapshotVirtualMachineRequest, VirtualMachine, virtual_machine,
};
use vpmu_proto::longrunning::Operation;
use vpmu_proto::store::{OwnershipRecord, VmRecord};
use vpmu_proto::worker::{RestoreFrom, SnapshotManifest};

use super::{INLINE_WAIT, operation};
use crate::daemon::Daemon;
use crate::names::{self, VmName};
use crate::status::ApiError;
use crate::validate;
use crate::vm::command::Command;

/// Longest file name in bytes.
const MAX_FILE: usize = 128;

/// A plain file name, so that nothing outside of the directory is reached.
fn file(name: &str) -> Result<&str, ApiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let begins = name.as_bytes().first().is_some_and(u8::is_ascii_alphanumeric);
    if begins && name.len() <= MAX_FILE && name.bytes().all(plain) {
        return Ok(name);
    }
    Err(ApiError::invalid(
        "file",
        name,
        "BAD_SNAPSHOT_FILE",
        "is no file name in the snapshot directory",
        "give 1 to 128 characters of [A-Za-z0-9._-] that start with a letter or a digit; vpmud's --snapshot-dir says where",
    ))
}

/// `SnapshotVirtualMachine`.
pub(super) async fn take(
    daemon: &Arc<Daemon>,
    request: &SnapshotVirtualMachineRequest,
) -> Result<Operation, ApiError> {
    let name = VmName::parse("name", &request.name, "")?;
    let file = file(&request.file)?.to_owned();
    let metadata = super::vms::metadata(&name, "snapshot");
    let method = "SnapshotVirtualMachine";
    operation(daemon, method, &request.request_id, request, metadata, INLINE_WAIT, |seed| async {
        daemon.registry.get(&name)?.ask(|reply| Command::Snapshot { file, seed, reply }).await
    })
    .await
}

/// `RestoreVirtualMachine`.
pub(super) async fn restore(
    daemon: &Arc<Daemon>,
    request: &RestoreVirtualMachineRequest,
) -> Result<Operation, ApiError> {
    let project = names::parse_project("parent", &request.parent)?;
    let name = VmName::new(&project, &request.virtual_machine_id)?;
    let path = daemon.snapshot_dir.join(file(&request.file)?);
    let metadata = super::vms::metadata(&name, "restore");
    let method = "RestoreVirtualMachine";
    operation(daemon, method, &request.request_id, request, metadata, INLINE_WAIT, |seed| async {
        let manifest = read(path.clone()).await?;
        let theirs = manifest.state.as_ref().map_or("", |s| s.hypervisor.as_str());
        if theirs != daemon.host.hypervisor {
            return Err(ApiError::precondition(
                "SNAPSHOT_HYPERVISOR_MISMATCH",
                &request.file,
                format!(
                    "snapshot {}: it was taken on {theirs:?} and this host runs {:?}; restore it on such a host",
                    request.file, daemon.host.hypervisor
                ),
            )
            .at_field("file", &request.file));
        }
        let spec = manifest.spec.unwrap_or_default();
        let spec = validate::spec(spec, &daemon.host, daemon.capacity.memory_bytes())?;
        let mut vm = VirtualMachine {
            name: name.to_string(),
            uid: uuid::Uuid::new_v4().to_string(),
            spec: Some(spec),
            hypervisor: daemon.host.hypervisor.to_owned(),
            pmu_mode: daemon.host.pmu_mode.to_owned(),
            ..VirtualMachine::default()
        };
        vm.set_observed_state(virtual_machine::State::Creating);
        let record = VmRecord { vm: Some(vm), pmu_shape: None };
        let from = RestoreFrom { path: path.to_string_lossy().into_owned(), lazy: request.lazy };
        let paused = request.paused;
        let handle = daemon.registry.insert(daemon, &name, record, OwnershipRecord::default(), false)?;
        handle.ask(|reply| Command::Restore { from, paused, seed, reply }).await
    })
    .await
}

async fn read(path: PathBuf) -> Result<SnapshotManifest, ApiError> {
    let opened = tokio::task::spawn_blocking(move || {
        vcpu_worker::snapshot::read::Snapshot::open(&path).map(|s| s.manifest().clone())
    });
    match opened.await {
        Ok(Ok(manifest)) => Ok(manifest),
        Ok(Err(error)) => {
            let status = vcpu_worker::error::WorkerError::from(error).to_status();
            Err(ApiError::from_status("file", &status))
        }
        Err(error) => Err(ApiError::internal("SNAPSHOT_READ", format!("reading the snapshot: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::file;

    #[test]
    fn files_stay_in_the_directory() {
        for good in ["a", "web-1.vpmusnap", "0_x", &"x".repeat(128)] {
            assert_eq!(file(good).expect("good"), good);
        }
        for bad in
            ["", ".", "..", ".a.part", "-a", "a/b", "/etc/passwd", "../x", "a\0", "ä", &"x".repeat(129)]
        {
            assert_eq!(file(bad).expect_err(bad).reason(), "BAD_SNAPSHOT_FILE");
        }
    }
}
