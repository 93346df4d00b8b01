//! Snapshots through the API: of a running and a paused machine, into the same daemon, another one, and lazily.
#![allow(missing_docs)]

mod support;

use std::path::Path;

use prost::Message as _;
use support::*;
use tonic::Code;
use tonic_types::StatusExt as _;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;
use vpmu_proto::longrunning::{CancelOperationRequest, ListOperationsRequest, Operation};

/// gRPC code and reason, of a refusal or of an operation that failed.
type Refused = (Code, String);

fn refused(status: &tonic::Status) -> Refused {
    (status.code(), status.get_error_details().error_info().map(|i| i.reason.clone()).unwrap_or_default())
}

async fn finish<M: prost::Message + Default>(host: &Host, operation: Operation) -> Result<M, Refused> {
    match host.finish(operation).await {
        Ok(any) => Ok(unpack(&any)),
        Err(status) => Err((Code::from(status.code), reason_of(&status))),
    }
}

async fn snapshot(host: &Host, id: &str, file: &str) -> Result<Snapshot, Refused> {
    let request =
        SnapshotVirtualMachineRequest { name: name(id), file: file.to_owned(), ..Default::default() };
    let operation = host.vms().await.snapshot_virtual_machine(request).await.map_err(|s| refused(&s))?;
    finish(host, operation.into_inner()).await
}

fn is_refused<T: std::fmt::Debug>(result: Result<T, Refused>, code: Code, reason: &str) {
    assert_eq!(result.expect_err(reason), (code, reason.to_owned()));
}

async fn restore(
    host: &Host,
    id: &str,
    file: &str,
    lazy: bool,
    paused: bool,
) -> Result<VirtualMachine, Refused> {
    let request = RestoreVirtualMachineRequest {
        virtual_machine_id: id.to_owned(),
        file: file.to_owned(),
        lazy,
        paused,
        ..Default::default()
    };
    let operation = host.vms().await.restore_virtual_machine(request).await.map_err(|s| refused(&s))?;
    finish(host, operation.into_inner()).await
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("list")
        .map(|e| e.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

async fn a_machine_lives_on(hypervisor: &str, isolation: &str) {
    let (one, two) = (tempfile::tempdir().expect("tempdir"), tempfile::tempdir().expect("tempdir"));
    let files = tempfile::tempdir().expect("tempdir");
    let files = files.path().to_str().expect("text");
    let options =
        ["--hypervisor", hypervisor, "--isolation", isolation, "--snapshot-dir", files, "--stop-vms"];
    let mut host = Host::start(one.path(), &options).await;
    let mut other = Host::start(two.path(), &options).await;
    let origin = host.create("a", probe_spec(2, 64)).await;
    host.start_vm("a").await;
    host.until_counting("a").await;

    // Running: out for it, and it goes on.
    let taken: Snapshot = snapshot(&host, "a", "one").await.expect("taken");
    assert_eq!((taken.vm_uid.as_str(), taken.memory_bytes), (origin.uid.as_str(), 64 << 20));
    assert_eq!(taken.file_bytes, std::fs::metadata(Path::new(files).join("one")).expect("there").len());
    assert!(taken.pause_us > 0 && taken.pages > 0);
    assert_eq!(host.get("a").await.observed_state(), State::Running);
    host.until_counting("a").await;

    // Paused: it stays so, and what is restored has exactly its PMU.
    host.vms()
        .await
        .pause_virtual_machine(PauseVirtualMachineRequest { name: name("a") })
        .await
        .expect("paused");
    let taken: Snapshot = snapshot(&host, "a", "one").await.expect("replaced");
    assert_eq!(taken.pause_us, 0);
    assert_eq!(host.get("a").await.observed_state(), State::Paused);
    assert_eq!(names(Path::new(files)), ["one"]);
    let images = |pmu: Pmu| pmu.vcpus.into_iter().map(|v| (v.digest, v.registers)).collect::<Vec<_>>();
    let before = images(host.live_pmu("a").await);
    for (at, id, lazy) in [(&host, "b", false), (&other, "c", false), (&other, "d", true)] {
        let vm = restore(at, id, "one", lazy, true).await.expect("restored");
        assert_eq!((vm.observed_state(), vm.epoch, vm.incarnation), (State::Paused, 1, 1));
        assert_ne!(vm.uid, origin.uid, "a machine of its own");
        assert_eq!(images(at.live_pmu(id).await), before);
        let resume = ResumeVirtualMachineRequest { name: name(id) };
        at.vms().await.resume_virtual_machine(resume).await.expect("resumed");
        let pmu = at.until_counting(id).await;
        assert_eq!(pmu.probe.expect("probe").vcpus.iter().map(|v| v.faults).sum::<u64>(), 0);
    }
    let vm = restore(&host, "e", "one", true, false).await.expect("restored");
    assert_eq!(
        (vm.observed_state(), vm.desired_state()),
        (State::Running, virtual_machine::DesiredState::Running)
    );
    host.until_counting("e").await;
    is_refused(
        restore(&host, "e", "one", true, false).await,
        Code::AlreadyExists,
        "VIRTUAL_MACHINE_ALREADY_EXISTS",
    );
    assert_eq!((host.terminate().await, other.terminate().await), (0, 0));
}

#[tokio::test]
async fn a_machine_lives_on_from_a_file_simulated() {
    a_machine_lives_on("simulated", "thread").await;
}

#[tokio::test]
async fn a_machine_lives_on_from_a_file_on_kvm_in_processes() {
    if have_kvm() {
        a_machine_lives_on("kvm", "process").await;
    }
}

#[tokio::test]
async fn bad_files_leave_no_machine_and_cancelled_ones_no_file() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("a", probe_spec(1, 16)).await;
    is_refused(snapshot(&host, "a", "x").await, Code::FailedPrecondition, "ILLEGAL_TRANSITION");
    host.start_vm("a").await;
    for bad in ["", "../x", "/etc/passwd", ".x.part"] {
        is_refused(snapshot(&host, "a", bad).await, Code::InvalidArgument, "BAD_SNAPSHOT_FILE");
        is_refused(restore(&host, "b", bad, false, false).await, Code::InvalidArgument, "BAD_SNAPSHOT_FILE");
        let request =
            SnapshotVirtualMachineRequest { name: name("a"), file: bad.to_owned(), ..Default::default() };
        let refused = host.vms().await.snapshot_virtual_machine(request).await.expect_err(bad);
        let details = refused.get_error_details();
        let violations = &details.bad_request().expect("a field").field_violations;
        assert_eq!(violations.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), ["file"], "{bad:?}");
    }
    snapshot(&host, "a", "good").await.expect("taken");
    let files = dir.path().join("state/snapshots");
    assert_eq!(names(&files), ["good"]);
    let good = std::fs::read(files.join("good")).expect("read");
    let mut cases: Vec<(&str, Vec<u8>, Code, &str)> = vec![
        ("cut", good[..good.len() - 1].to_vec(), Code::DataLoss, "SNAPSHOT_LENGTH_WRONG"),
        ("text", b"hello".to_vec(), Code::FailedPrecondition, "SNAPSHOT_NOT_ONE"),
    ];
    let mut version = good.clone();
    version[8] = 9;
    cases.push(("version", version, Code::FailedPrecondition, "SNAPSHOT_VERSION_UNSUPPORTED"));
    let mut page = good.clone();
    page[5000] ^= 1;
    cases.push(("page", page, Code::DataLoss, "SNAPSHOT_DAMAGED"));
    for (file, bytes, code, why) in cases {
        std::fs::write(files.join(file), bytes).expect("write");
        is_refused(restore(&host, "b", file, false, false).await, code, why);
        std::fs::remove_file(files.join(file)).expect("remove");
    }
    is_refused(restore(&host, "b", "none", true, false).await, Code::NotFound, "SNAPSHOT_UNREADABLE");
    assert_eq!(host.list().await.len(), 1, "no machine is left of them");

    // Cancelled or done: never something between.
    let request =
        SnapshotVirtualMachineRequest { name: name("a"), file: "cancelled".to_owned(), ..Default::default() };
    let (mut vms, mut operations) = (host.vms().await, host.operations().await);
    let asked = tokio::spawn(async move { vms.snapshot_virtual_machine(request).await });
    let begin = std::time::Instant::now();
    let running = loop {
        assert!(begin.elapsed() < DEADLINE, "the operation appears");
        let listed = operations.list_operations(ListOperationsRequest::default()).await;
        let found = listed.expect("lists").into_inner().operations.into_iter().find(|o| {
            let metadata =
                o.metadata.as_ref().map(|m| OperationMetadata::decode(m.value.as_slice()).expect("decodes"));
            metadata.is_some_and(|m| m.verb == "snapshot") && !o.name.is_empty()
        });
        if let Some(found) = found {
            break found;
        }
    };
    operations.cancel_operation(CancelOperationRequest { name: running.name.clone() }).await.expect("asked");
    let ended = finish::<Snapshot>(&host, asked.await.expect("joined").expect("accepted").into_inner()).await;
    match ended {
        Ok(_) => assert_eq!(names(&files), ["cancelled", "good"]),
        Err(refused) => {
            assert_eq!(refused, (Code::Cancelled, "CANCELLED".to_owned()));
            assert_eq!(names(&files), ["good"]);
        }
    }
    assert_eq!(host.get("a").await.observed_state(), State::Running);
    host.until_counting("a").await;
    assert_eq!(host.terminate().await, 0);
}
