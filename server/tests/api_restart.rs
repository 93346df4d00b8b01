//! What survives: SIGKILL, restart, a second daemon on the same directory.

mod support;

use support::*;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::*;

#[tokio::test]
async fn after_sigkill_every_acknowledged_record_reads_back_identical() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("idle", probe_spec(1, 16)).await;
    host.create("busy", probe_spec(2, 32)).await;
    host.start_vm("busy").await;
    host.until_counting("busy").await;
    let mut vms = host.vms().await;
    vms.pause_virtual_machine(PauseVirtualMachineRequest { name: name("busy") }).await.expect("paused");
    let (machines, pmu) = (host.list().await, host.stored_pmu("busy").await.expect("stored"));
    let operations = list_operations(&host).await;
    let id = host.ready["host_id"].clone();

    host.kill().await;
    host.restart().await;
    assert_eq!(host.ready["host_id"], id);
    assert_eq!(host.stored_pmu("busy").await.expect("stored"), pmu);
    assert_eq!(list_operations(&host).await, operations);
    let after = host.list().await;
    assert_eq!(after.len(), 2);
    for (before, after) in machines.into_iter().zip(after) {
        if before.name == name("busy") {
            assert_eq!((after.observed_state(), after.reason.as_str()), (State::Stopped, "HOST_RESTARTED"));
            assert_eq!(after.desired_state(), DesiredState::Paused, "what the user wants stays");
        }
        // observed_state and what explains it are recomputed; everything else is what was acknowledged.
        let recomputed = VirtualMachine {
            observed_state: before.observed_state,
            reason: before.reason.clone(),
            message: before.message.clone(),
            vcpu_cores: before.vcpu_cores.clone(),
            ..after
        };
        assert_eq!(recomputed, before);
    }
    let again = host.start_vm("busy").await;
    assert_eq!((again.observed_state(), again.incarnation), (State::Running, 2));
}

async fn list_operations(host: &Host) -> Vec<vpmu_proto::longrunning::Operation> {
    host.operations()
        .await
        .list_operations(vpmu_proto::longrunning::ListOperationsRequest::default())
        .await
        .expect("lists")
        .into_inner()
        .operations
}

#[tokio::test]
async fn a_second_vpmud_on_the_same_directory_is_refused() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("kept", probe_spec(1, 16)).await;
    let (code, log) = spawn(dir.path(), &["--hypervisor".to_owned(), "simulated".to_owned()])
        .await
        .map(|_| ())
        .expect_err("refused");
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("STATE_DIR_IN_USE"), "{log}");
    let pid = host.child.id().expect("running").to_string();
    assert!(log.contains(&pid), "names the holder {pid}: {log}");
    assert_eq!(host.list().await.len(), 1, "the first one serves on");
}

#[tokio::test]
async fn sigterm_stops_machines_and_keeps_their_state() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("busy", probe_spec(1, 16)).await;
    host.start_vm("busy").await;
    host.until_counting("busy").await;
    // An open stream must not hold the end up.
    let mut watch = host
        .vms()
        .await
        .watch_virtual_machines(WatchVirtualMachinesRequest::default())
        .await
        .expect("watches")
        .into_inner();
    assert_eq!(host.terminate().await, 0);
    while let Ok(Some(_)) = watch.message().await {}
    assert!(!host.socket().exists());
    host.restart().await;
    let vm = host.get("busy").await;
    assert_eq!((vm.observed_state(), vm.reason.as_str()), (State::Stopped, "HOST_RESTARTED"));
    assert_eq!(vm.desired_state(), DesiredState::Running);
    let stored = host.stored_pmu("busy").await.expect("stored");
    assert_eq!(stored.cause, "stop");
    assert!(stored.vcpus[0].counters.iter().any(|c| c.value > 0));
}
