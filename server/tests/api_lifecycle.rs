//! A machine's life through the public API, on both hypervisors.

mod support;

use support::*;
use tokio_stream::StreamExt as _;
use tonic::Code;
use vpmu_proto::api::virtual_machine::{DesiredState, State};
use vpmu_proto::api::watch_virtual_machines_response::Kind;
use vpmu_proto::api::*;

#[tokio::test]
async fn life_on_the_simulated_hypervisor() {
    life("simulated").await;
}

#[tokio::test]
async fn life_on_kvm() {
    if have_kvm() {
        life("kvm").await;
    }
}

async fn life(hypervisor: &str) {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", hypervisor]).await;
    assert_eq!(host.ready["hypervisor"], hypervisor);
    assert_eq!(host.ready["pmu_mode"], "model");

    let created = host.create("a", probe_spec(2, 64)).await;
    assert_eq!((created.observed_state(), created.desired_state()), (State::Stopped, DesiredState::Stopped));
    assert_eq!((created.epoch, created.name.as_str()), (1, name("a").as_str()));

    let running = host.start_vm("a").await;
    assert_eq!((running.observed_state(), running.desired_state()), (State::Running, DesiredState::Running));
    assert_eq!((running.uid.as_str(), running.incarnation), (created.uid.as_str(), 1));
    assert_eq!((running.hypervisor.as_str(), running.vcpu_cores.len()), (hypervisor, 2));
    let pmu = host.until_counting("a").await;
    assert_eq!((pmu.mode.as_str(), pmu.vcpus.len()), ("model", 2));
    assert_eq!(pmu.shape.as_ref().expect("shape").gp_bitmap.count_ones(), 8);
    assert_eq!(pmu.probe.as_ref().expect("probe report").vcpus.iter().map(|v| v.faults).sum::<u64>(), 0);

    // Paused: what is stored is what it has, and it stands still.
    let mut vms = host.vms().await;
    let paused = vms
        .pause_virtual_machine(PauseVirtualMachineRequest { name: name("a") })
        .await
        .expect("paused")
        .into_inner();
    assert_eq!((paused.observed_state(), paused.desired_state()), (State::Paused, DesiredState::Paused));
    let stored = host.stored_pmu("a").await.expect("stored");
    assert_eq!(stored.cause, "pause");
    let still = host.live_pmu("a").await;
    for (stored, live) in stored.vcpus.iter().zip(&still.vcpus) {
        assert_eq!((&stored.digest, &stored.registers), (&live.digest, &live.registers));
    }
    assert_eq!(stored.vcpus.len(), 2);
    let again = vms.pause_virtual_machine(PauseVirtualMachineRequest { name: name("a") }).await;
    expect_error(again, Code::FailedPrecondition, "ILLEGAL_TRANSITION");

    let resumed = vms
        .resume_virtual_machine(ResumeVirtualMachineRequest { name: name("a") })
        .await
        .expect("resumed")
        .into_inner();
    assert_eq!(resumed.observed_state(), State::Running);
    let more = until_more(&host, &stored.vcpus).await;
    assert_eq!(more.probe.expect("probe report").vcpus.iter().map(|v| v.faults).sum::<u64>(), 0);

    let stopped = host.stop_vm("a").await;
    assert_eq!((stopped.observed_state(), stopped.desired_state()), (State::Stopped, DesiredState::Stopped));
    assert_eq!(host.stored_pmu("a").await.expect("stored").cause, "stop");
    assert!(!console(&host, "a").await.is_empty(), "the probe prints, and the history outlives the machine");

    let second = host.start_vm("a").await;
    assert_eq!((second.epoch, second.incarnation), (1, 2));
    let delete = DeleteVirtualMachineRequest { name: name("a"), ..DeleteVirtualMachineRequest::default() };
    let operation = vms.delete_virtual_machine(delete).await.expect("accepted").into_inner();
    host.finish(operation).await.expect("deleted, running as it was");
    assert!(host.list().await.is_empty());
    assert_eq!(host.terminate().await, 0);
    let left: Vec<_> =
        std::fs::read_dir(dir.path()).expect("list").map(|e| e.expect("entry").file_name()).collect();
    assert!(left.iter().all(|f| f == "state" || f == "log"), "left behind: {left:?}");
}

async fn until_more(host: &Host, before: &[VcpuPmu]) -> Pmu {
    let begin = std::time::Instant::now();
    let total = |vcpus: &[VcpuPmu]| -> u64 {
        vcpus.iter().flat_map(|v| &v.counters).filter(|c| !c.pmi_enabled).map(|c| c.value).sum()
    };
    loop {
        let pmu = host.live_pmu("a").await;
        if total(&pmu.vcpus) > total(before) {
            return pmu;
        }
        assert!(begin.elapsed() < DEADLINE, "the counters stand still");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
}

async fn console(host: &Host, id: &str) -> Vec<u8> {
    let request =
        AttachConsoleRequest { name: name(id), history_only: true, ..AttachConsoleRequest::default() };
    let mut stream =
        host.vms().await.attach_console(tokio_stream::once(request)).await.expect("attaches").into_inner();
    let mut out = Vec::new();
    while let Some(piece) = stream.message().await.expect("reads") {
        out.extend(piece.data);
    }
    out
}

#[tokio::test]
async fn a_watcher_sees_what_is_and_then_every_change() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("first", probe_spec(1, 16)).await;
    let mut watch = host
        .vms()
        .await
        .watch_virtual_machines(WatchVirtualMachinesRequest::default())
        .await
        .expect("watches")
        .into_inner();
    let mut next = async || watch.message().await.expect("stream").expect("open");
    assert_eq!(next().await.kind(), Kind::Existing);
    assert_eq!(next().await.kind(), Kind::Synced);
    host.create("second", probe_spec(1, 16)).await;
    let created = next().await;
    assert_eq!(created.kind(), Kind::Created);
    assert_eq!(created.virtual_machine.expect("machine").name, name("second"));
    host.start_vm("second").await;
    let mut states = Vec::new();
    let mut last = created.sequence;
    while states.last() != Some(&State::Running) {
        let event = next().await;
        assert_eq!(event.sequence, last + 1, "no event is missing");
        last = event.sequence;
        states.push(event.virtual_machine.expect("machine").observed_state());
    }
    assert_eq!(states, [State::Starting, State::Running]);
}

#[tokio::test]
async fn the_same_request_id_gets_the_first_answer() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    let mut request = create("once", probe_spec(1, 16));
    request.request_id = uuid::Uuid::new_v4().to_string();
    let (one, two) = (host.vms().await, host.vms().await);
    let (mut one, mut two) = (one, two);
    let (first, same) = tokio::join!(
        one.create_virtual_machine(request.clone()),
        two.create_virtual_machine(request.clone())
    );
    let (first, same) = (first.expect("created").into_inner(), same.expect("the same").into_inner());
    assert_eq!(first.name, same.name);
    host.kill().await;
    host.restart().await;
    let mut vms = host.vms().await;
    let later = vms.create_virtual_machine(request.clone()).await.expect("still the same").into_inner();
    assert_eq!((later.name.as_str(), later.done), (first.name.as_str(), true));
    request.virtual_machine_id = "other".to_owned();
    expect_error(vms.create_virtual_machine(request).await, Code::InvalidArgument, "REQUEST_ID_REUSED");
    assert_eq!(host.list().await.len(), 1);
}

#[tokio::test]
async fn lists_come_in_pages() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    for id in ["c", "a", "b"] {
        host.create(id, probe_spec(1, 16)).await;
    }
    let mut vms = host.vms().await;
    let mut names = Vec::new();
    let mut page_token = String::new();
    loop {
        let request =
            ListVirtualMachinesRequest { page_size: 2, page_token, ..ListVirtualMachinesRequest::default() };
        let page = vms.list_virtual_machines(request).await.expect("lists").into_inner();
        names.extend(page.virtual_machines.into_iter().map(|vm| vm.name));
        page_token = page.next_page_token;
        if page_token.is_empty() {
            break;
        }
    }
    assert_eq!(names, [name("a"), name("b"), name("c")]);
}

/// A list leaves out what is long and alike; who wants it asks for it.
#[tokio::test]
async fn lists_are_basic_or_full() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &[]).await;
    host.create("vm", probe_spec(1, 16)).await;
    host.start_vm("vm").await;
    let whole = host.get("vm").await;
    // KVM adds features of its own; a simulated host stores what was asked.
    assert_eq!(!whole.cpuid_differences.is_empty(), whole.hypervisor == "kvm", "{whole:?}");
    let basic = VirtualMachine { cpuid_differences: Vec::new(), ..whole.clone() };
    for (view, expected) in [
        (VirtualMachineView::Unspecified, &basic),
        (VirtualMachineView::Basic, &basic),
        (VirtualMachineView::Full, &whole),
    ] {
        let request =
            ListVirtualMachinesRequest { view: view.into(), ..ListVirtualMachinesRequest::default() };
        let listed = host.vms().await.list_virtual_machines(request).await.expect("lists").into_inner();
        assert_eq!(listed.virtual_machines, std::slice::from_ref(expected), "{view:?}");
    }
    let request = ListVirtualMachinesRequest { view: 9, ..ListVirtualMachinesRequest::default() };
    let refused = host.vms().await.list_virtual_machines(request).await;
    expect_error(refused, Code::InvalidArgument, "UNKNOWN_VIEW");
}

#[tokio::test]
async fn who_attaches_before_it_creates_sees_the_first_byte() {
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &[]).await;
    let attach = |await_machine| AttachConsoleRequest {
        name: name("later"),
        await_machine,
        ..AttachConsoleRequest::default()
    };
    // Who does not ask to wait is told that there is no such machine.
    let refused = host.vms().await.attach_console(tokio_stream::once(attach(false))).await;
    assert_eq!(refused.expect_err("there is none").code(), Code::NotFound);
    let input = tokio_stream::once(attach(true)).chain(tokio_stream::pending());
    let mut output = host.vms().await.attach_console(input).await.expect("attached").into_inner();
    host.create("other", probe_spec(1, 16)).await;
    host.create("later", probe_spec(1, 16)).await;
    // A machine that is created and not started has no worker, and so far no output: the stream ends, as it does for
    // whoever attaches now.
    assert_eq!(output.message().await.expect("no error"), None);
    let input = tokio_stream::once(AttachConsoleRequest { name: name("third"), ..attach(true) });
    let input = input.chain(tokio_stream::pending());
    let mut output = host.vms().await.attach_console(input).await.expect("attached").into_inner();
    let mut request = create("third", probe_spec(1, 16));
    request.virtual_machine.as_mut().expect("set").set_desired_state(DesiredState::Running);
    let mut vms = host.vms().await;
    let (operation, piece) = tokio::join!(vms.create_virtual_machine(request), output.message());
    let piece = piece.expect("no error").expect("output");
    assert_eq!(piece.offset, 0, "from the first byte on");
    assert!(!piece.data.is_empty());
    host.finish(operation.expect("accepted").into_inner()).await.expect("runs");
    assert_eq!(host.terminate().await, 0);
}
