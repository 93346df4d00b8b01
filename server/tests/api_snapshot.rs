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

/// What a restore of this file is refused with, at once or by its operation.
async fn restore_error(host: &Host, file: &str) -> tonic::Status {
    let request = RestoreVirtualMachineRequest {
        virtual_machine_id: "b".to_owned(),
        file: file.to_owned(),
        ..Default::default()
    };
    let operation = match host.vms().await.restore_virtual_machine(request).await {
        Ok(operation) => operation.into_inner(),
        Err(status) => return status,
    };
    let error = host.finish(operation).await.expect_err(file);
    tonic::Status::with_details(Code::from(error.code), &error.message, error.encode_to_vec().into())
}

/// What has to be in the directory for a case.
enum Bad {
    Bytes(Vec<u8>),
    Directory,
    Link,
    Nothing,
}

/// A bad file: its name, what it is, code, reason, and the words for its value and the remedy.
type Case = (&'static str, Bad, Code, &'static str, Vec<String>);

fn cases(good: &[u8]) -> Vec<Case> {
    let words = |words: &[&str]| words.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>();
    let with = |at: usize, change: fn(u8) -> u8| {
        let mut bytes = good.to_vec();
        bytes[at] = change(bytes[at]);
        Bad::Bytes(bytes)
    };
    let flip = |at: usize| with(at, |byte| byte ^ 1);
    let cut = |to: usize| Bad::Bytes(good[..to].to_vec());
    let word = |at: usize| u64::from_le_bytes(good[at..at + 8].try_into().expect("8")) as usize;
    // The header's sizes: memory, data, state, table.
    let (state, table) = (4096 + word(24), 4096 + word(24) + word(32));
    let wrong = |have: usize, want: usize| {
        vec![format!("is {have} bytes long"), format!("should be {want}"), "take it again".to_owned()]
    };
    let longer = [good, &[0]].concat();
    let damaged =
        |part: &str| vec![format!("is damaged: {part}: "), "take it again or use a copy".to_owned()];
    let whole = good.len();
    let (lost, other) = (Code::DataLoss, Code::FailedPrecondition);
    let not_one =
        |found: &str| vec![found.to_owned(), "name a file that `vpmuctl vm snapshot` wrote".to_owned()];
    vec![
        ("cut", cut(whole - 1), lost, "SNAPSHOT_LENGTH_WRONG", wrong(whole - 1, whole)),
        ("cut-in-data", cut(5000), lost, "SNAPSHOT_LENGTH_WRONG", wrong(5000, whole)),
        ("cut-in-header", cut(100), lost, "SNAPSHOT_LENGTH_WRONG", wrong(100, 4096)),
        ("cut-in-magic", cut(10), lost, "SNAPSHOT_LENGTH_WRONG", wrong(10, 4096)),
        ("longer", Bad::Bytes(longer), lost, "SNAPSHOT_LENGTH_WRONG", wrong(whole + 1, whole)),
        ("empty", cut(0), other, "SNAPSHOT_NOT_ONE", not_one("it is empty")),
        (
            "text",
            Bad::Bytes(b"hello".to_vec()),
            other,
            "SNAPSHOT_NOT_ONE",
            not_one("it begins with \"hello\" instead of VPMUSNAP"),
        ),
        ("directory", Bad::Directory, other, "SNAPSHOT_NOT_ONE", not_one("it is not a regular file")),
        (
            "link",
            Bad::Link,
            other,
            "SNAPSHOT_UNREADABLE",
            words(&["no link is followed: name the file itself"]),
        ),
        (
            "none",
            Bad::Nothing,
            Code::NotFound,
            "SNAPSHOT_UNREADABLE",
            words(&["No such file", "name a file that is in the snapshot directory"]),
        ),
        (
            "version",
            with(8, |_| 9),
            other,
            "SNAPSHOT_VERSION_UNSUPPORTED",
            words(&["has schema 9", "this build reads 1", "use a build that reads it, or take it again"]),
        ),
        ("bit-in-header", flip(20), lost, "SNAPSHOT_DAMAGED", damaged("header")),
        ("bit-in-data", flip(5000), lost, "SNAPSHOT_DAMAGED", damaged("data")),
        ("bit-in-state", flip(state + 10), lost, "SNAPSHOT_DAMAGED", damaged("state")),
        ("bit-in-table", flip(table + 3), lost, "SNAPSHOT_DAMAGED", damaged("table")),
    ]
}

/// Every one names the field, the file, what is wrong with it and what to do, and leaves no machine.
async fn bad_inputs(host: &Host, files: &Path) {
    let good = std::fs::read(files.join("good")).expect("read");
    for (file, bad, code, why, words) in cases(&good) {
        let path = files.join(file);
        match bad {
            Bad::Bytes(bytes) => std::fs::write(&path, bytes).expect("write"),
            Bad::Directory => std::fs::create_dir(&path).expect("made"),
            Bad::Link => std::os::unix::fs::symlink("good", &path).expect("linked"),
            Bad::Nothing => {}
        }
        let status = restore_error(host, file).await;
        assert_eq!(refused(&status), (code, why.to_owned()), "{file}: {status:?}");
        let details = status.get_error_details();
        let violations = &details.bad_request().expect("BadRequest").field_violations;
        assert_eq!(violations.iter().map(|v| v.field.as_str()).collect::<Vec<_>>(), ["file"], "{file}");
        let told = &details.error_info().expect("ErrorInfo").metadata;
        assert_eq!((told["field"].as_str(), told["value"].as_str()), ("file", file), "{told:?}");
        let shown = path.display().to_string();
        for word in words.iter().chain([&shown]) {
            assert!(status.message().contains(word), "{file}: {word:?} is not in {:?}", status.message());
        }
        match path.symlink_metadata() {
            Ok(known) if known.is_dir() => std::fs::remove_dir(&path).expect("remove"),
            Ok(_) => std::fs::remove_file(&path).expect("remove"),
            Err(_) => {}
        }
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
    bad_inputs(&host, &files).await;
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
