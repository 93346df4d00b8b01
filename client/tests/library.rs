//! The library against a host on a real socket.

mod fake;

use fake::FakeHost;
use std::time::Duration;
use tonic::Code;
use vpmu_client::api::{VirtualMachine, VirtualMachineSpec};
use vpmu_client::{Client, ClientError, ConsoleOptions, Endpoint};

const DEADLINE: Duration = Duration::from_secs(10);

async fn connect(host: &FakeHost) -> Client {
    Client::connect(&host.endpoint(), DEADLINE).await.expect("connects")
}

#[tokio::test]
async fn nothing_there_is_named() {
    let directory = tempfile::tempdir().expect("a directory");
    let endpoint = Endpoint::unix(&directory.path().join("s")).expect("short");
    let error = Client::connect(&endpoint, DEADLINE).await.expect_err("nothing listens");
    assert_eq!((error.reason(), error.code()), ("CONNECT_FAILED", Code::Unavailable));
    assert!(error.to_string().contains(&endpoint.to_string()), "{error}");
    assert!(error.remedy().expect("a remedy").contains("vpmud serve"));
}

#[tokio::test]
async fn refusals_keep_their_details_over_the_wire() {
    let host = FakeHost::serve();
    let client = connect(&host).await;
    let error = client.get_vm("nobody").await.expect_err("not there");
    assert_eq!((error.reason(), error.code()), ("VM_NOT_FOUND", Code::NotFound));
    assert_eq!(error.remedy().as_deref(), Some("see `vpmuctl vm list`"));
    let spec = VirtualMachineSpec { vcpus: 10_000, ..VirtualMachineSpec::default() };
    let error = client.create_vm("a", spec).await.expect_err("too many");
    assert_eq!(error.refusal().expect("a refusal").violations[0].field, "spec.vcpus");
}

#[tokio::test]
async fn lists_are_read_to_the_last_page() {
    let host = FakeHost::serve();
    let names: Vec<String> =
        connect(&host).await.list_vms().await.expect("lists").into_iter().map(|vm| vm.name).collect();
    assert_eq!(names, ["projects/default/virtualMachines/a", "projects/default/virtualMachines/b"]);
}

#[tokio::test]
async fn operations_are_followed_to_their_end() {
    let host = FakeHost::serve();
    let client = connect(&host).await;
    let operation = client.create_vm("a", VirtualMachineSpec::default()).await.expect("accepted");
    let mut seen = Vec::new();
    let done = client.wait_operation(operation, DEADLINE, |state| seen.push(state.done)).await.expect("done");
    assert_eq!(seen, [false, false, true]);
    let vm: VirtualMachine = vpmu_client::wait::response(&done).expect("a machine");
    assert_eq!(vm.uid, "uid");

    let operation = client.start_vm("nocores").await.expect("accepted");
    let error = client.wait_operation(operation, DEADLINE, |_| {}).await.expect_err("fails");
    assert_eq!((error.reason(), error.code()), ("NO_CORES", Code::ResourceExhausted));
}

#[tokio::test]
async fn every_wait_has_an_end() {
    let host = FakeHost::serve();
    let client = connect(&host).await;
    let operation = client.delete_vm("a").await.expect("accepted");
    let deadline = Duration::from_millis(200);
    let error = client.wait_operation(operation, deadline, |_| {}).await.expect_err("never done");
    assert!(matches!(error, ClientError::Deadline { .. }), "{error}");

    let client = client.with_call_deadline(Duration::from_millis(100));
    let error = client.get_pmu("a").await.expect_err("never answers");
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
}

#[tokio::test]
async fn the_console_goes_both_ways() {
    let host = FakeHost::serve();
    let client = connect(&host).await;
    let options = ConsoleOptions { write: true, ..ConsoleOptions::default() };
    let mut session = client.attach_console("a", options).await.expect("attaches");
    assert_eq!(session.next().await.expect("streams").expect("history").data, b"hello\n");
    // Longer than one message may be.
    let long = vec![b'x'; 5000];
    assert!(session.input().send(&long).await);
    let mut echo = Vec::new();
    while echo.len() < long.len() {
        echo.extend(session.next().await.expect("streams").expect("an echo").data);
    }
    assert_eq!(echo, long.to_ascii_uppercase());

    let options = ConsoleOptions { history_only: true, ..ConsoleOptions::default() };
    let mut session = client.attach_console("a", options).await.expect("attaches");
    assert!(session.next().await.expect("streams").is_some());
    assert!(session.next().await.expect("ends").is_none());
}
