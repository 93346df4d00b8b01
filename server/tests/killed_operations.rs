//! What a daemon was doing when it was killed by SIGKILL: every operation that it had begun ends as aborted, and what was
//! decided by then is done by the next one.

mod support;

use std::path::Path;
use std::time::Instant;

use rustix::process::{Signal, kill_process};
use support::workers::*;
use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::*;
use vpmu_proto::longrunning::{GetOperationRequest, ListOperationsRequest, Operation, operation};

/// How often the ownership journal names a machine: once a record.
fn records_of(state: &Path, uid: &str) -> usize {
    let segments = std::fs::read_dir(state.join("journal")).expect("the journal").flatten();
    let files = segments.filter_map(|e| std::fs::read(e.path()).ok());
    files.map(|data| data.windows(uid.len()).filter(|w| *w == uid.as_bytes()).count()).sum()
}

async fn operation(host: &Host, name: &str) -> Operation {
    let request = GetOperationRequest { name: name.to_owned() };
    host.operations().await.get_operation(request).await.expect("known").into_inner()
}

fn delete_request(id: &str, request_id: &str) -> DeleteVirtualMachineRequest {
    DeleteVirtualMachineRequest {
        name: name(id),
        request_id: request_id.to_owned(),
        ..DeleteVirtualMachineRequest::default()
    }
}

#[tokio::test]
async fn operations_that_were_cut_off_are_aborted_and_what_was_decided_is_done() {
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers::of(dir.path());
    let mut host = Host::start(dir.path(), &["--isolation", "process"]).await;
    let mut vms = Vec::new();
    for id in ["deleted", "kept", "stopped"] {
        host.create(id, probe_spec(1, 16)).await;
        vms.push(host.start_vm(id).await);
    }
    let [deleted, kept, stopped] = [0, 1, 2].map(|at| identity(&vms[at]));
    let before = host.until_counting("kept").await;

    // Their workers do not answer: neither operation comes to its end.
    for worker in [&deleted, &stopped] {
        kill_process(pid(worker.pid), Signal::STOP).expect("SIGSTOP");
    }
    let (state, uid) = (dir.path().join("state"), &vms[0].uid);
    let records = records_of(&state, uid);
    assert!(records > 0, "the journal is read as it is written");
    let (mut one, mut other) = (host.vms().await, host.vms().await);
    let request_id = uuid::Uuid::new_v4().to_string();
    let request = StopVirtualMachineRequest { name: name("stopped"), request_id: String::new() };
    let (delete, stop) = tokio::join!(
        one.delete_virtual_machine(delete_request("deleted", &request_id)),
        other.stop_virtual_machine(request)
    );
    let (delete, stop) = (delete.expect("accepted").into_inner(), stop.expect("accepted").into_inner());
    host.until("stopped", "STOPPING", is(State::Stopping)).await;
    let begin = Instant::now();
    while records_of(&state, uid) == records {
        assert!(begin.elapsed() < DEADLINE, "the delete is not journalled");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    for cut_off in [&delete, &stop] {
        assert!(!operation(&host, &cut_off.name).await.done, "{cut_off:?}");
    }
    host.kill().await;
    for worker in [&deleted, &stopped] {
        assert!(lives(worker), "it outlives the daemon");
        kill_process(pid(worker.pid), Signal::CONT).expect("SIGCONT");
    }
    host.restart().await;

    let listed = host.operations().await.list_operations(ListOperationsRequest::default()).await;
    let listed = listed.expect("lists").into_inner().operations;
    for cut_off in [&delete, &stop] {
        let found = operation(&host, &cut_off.name).await;
        assert!(found.done && listed.contains(&found), "{found:?}");
        let Some(operation::Result::Error(error)) = &found.result else { panic!("{found:?}") };
        assert_eq!((error.code, reason_of(error).as_str()), (Code::Aborted as i32, "HOST_RESTARTED"));
        assert_eq!(found.metadata, cut_off.metadata, "what it was is still told");
        // Whoever waits for it is told at once.
        assert_eq!(host.finish(cut_off.clone()).await.expect_err("aborted").code, Code::Aborted as i32);
    }

    // The delete was decided: nothing of the machine is left, and asked again the same request is the same operation.
    until_gone(&deleted).await;
    let names: Vec<_> = host.list().await.into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, [name("kept"), name("stopped")]);
    let again = host.vms().await.delete_virtual_machine(delete_request("deleted", &request_id)).await;
    assert_eq!(again.expect("known").into_inner().name, delete.name);
    // So was the stop; and the machine beside them never noticed.
    let vm = host.until("stopped", "STOPPED", is(State::Stopped)).await;
    assert_eq!(vm.desired_state(), DesiredState::Stopped, "{vm:?}");
    until_gone(&stopped).await;
    assert_eq!(workers.alive(), std::slice::from_ref(&kept));
    until_beyond(&host, "kept", &before).await;
    let directories = std::fs::read_dir(&workers.dir).expect("there").count();
    assert_eq!(directories, 1, "a runtime directory is left");
    let left = cgroups_of(&host);
    assert!(!left.iter().any(|cgroup| !cgroup.contains(&vms[1].uid)), "{left:?} are left");

    // Its name is free, and the machine that takes it is another one.
    let namesake = host.create("deleted", probe_spec(1, 16)).await;
    assert_eq!(host.start_vm("stopped").await.incarnation, 2);
    for id in ["kept", "stopped"] {
        host.delete(id).await;
    }
    assert_eq!(host.terminate().await, 0);
    let store = vpmu_server::store::Store::open(&state).expect("opens");
    let records = store.list_vms();
    let uids: Vec<_> = records.iter().filter_map(|r| r.vm.as_ref()).map(|vm| &vm.uid).collect();
    assert_eq!(uids, [&namesake.uid], "no record of what was deleted is left");
    store.close().await;
}
