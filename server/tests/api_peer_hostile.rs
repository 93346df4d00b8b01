//! What a hostile host says to the peer service: a commit again, a decision of another epoch, another machine's
//! migration, a lie about ownership. Each is refused by name, and the machine is where it was.
#![allow(missing_docs)]

mod support;

use hyper_util::rt::TokioIo;
use support::*;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status, Streaming};
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;
use vpmu_proto::peer::migration_peer_service_client::MigrationPeerServiceClient;
use vpmu_proto::peer::resolve_response::Decision;
use vpmu_proto::peer::source_message::{Go, Message, Open};
use vpmu_proto::peer::*;

const OPTIONS: [&str; 4] = ["--isolation", "thread", "--hypervisor", "simulated"];

async fn peer(host: &Host) -> MigrationPeerServiceClient<Channel> {
    let socket = host.dir.join("peer.sock");
    let channel = Endpoint::from_static("http://vpmud.invalid")
        .connect_with_connector(tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        }))
        .await
        .expect("connects");
    MigrationPeerServiceClient::new(channel)
}

fn host_id(host: &Host) -> String {
    host.ready["host_id"].as_str().expect("a host id").to_owned()
}

/// A stream's messages, and how it ended.
async fn say(host: &Host, messages: Vec<SourceMessage>) -> Result<(), Status> {
    // The stream stays open: it is the other side that ends it.
    let (keep, rest) = tokio::sync::mpsc::channel::<SourceMessage>(8);
    for message in messages {
        keep.send(message).await.expect("room");
    }
    let outbox = tokio_stream::wrappers::ReceiverStream::new(rest);
    let mut stream: Streaming<DestinationMessage> = peer(host).await.handover(outbox).await?.into_inner();
    let listen = async {
        while stream.message().await?.is_some() {}
        Ok(())
    };
    let ended = tokio::time::timeout(DEADLINE, listen).await.expect("it ends the stream");
    drop(keep);
    ended
}

fn message(migration: &str, vm_uid: &str, epoch: u64, message: Message) -> SourceMessage {
    SourceMessage {
        migration_id: migration.to_owned(),
        vm_uid: vm_uid.to_owned(),
        epoch,
        message: Some(message),
    }
}

fn go(migration: &str, vm_uid: &str, epoch: u64) -> SourceMessage {
    message(migration, vm_uid, epoch, Message::Go(Go { state_digest: vec![7; 32], ..Go::default() }))
}

async fn prepare(host: &Host, vm: &VirtualMachine, epoch: u64) -> Result<String, Status> {
    let mut client = peer(host).await;
    let capabilities = client
        .negotiate(NegotiateRequest { versions: vec![1], host_id: String::new() })
        .await?
        .into_inner()
        .capabilities
        .expect("capabilities");
    let migration_id = uuid::Uuid::new_v4().to_string();
    let request = PrepareRequest {
        version: 1,
        migration_id: migration_id.clone(),
        source_host: uuid::Uuid::new_v4().to_string(),
        source_address: format!("unix:{}", host.dir.join("nobody.sock").display()),
        epoch,
        attempt: 1,
        requirements: Some(Requirements {
            vm: Some(vm.clone()),
            pmu_shape: capabilities.shape,
            hypervisor: capabilities.hypervisor,
            pmu_mode: capabilities.mode,
            spec: Some(MigrationSpec::default()),
            ..Requirements::default()
        }),
        ..PrepareRequest::default()
    };
    client.prepare(request).await.map(|_| migration_id)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_hostile_host_says_changes_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let a = Host::start(&dir.path().join("a"), &OPTIONS).await;
    let b = Host::start(&dir.path().join("b"), &OPTIONS).await;
    a.create("vm", probe_spec(1, 16)).await;
    a.start_vm("vm").await;
    let operation = a.migrate("vm", b.arrival()).await;
    let moved: Migration = unpack(&a.finish(operation).await.expect("moved"));
    let id = moved.name.rsplit('/').next().expect("an id").to_owned();
    let vm = b.get("vm").await;
    let uid = vm.uid.clone();

    // The commit again, at both ends: there is no arrival that it could be for.
    for host in [&a, &b] {
        let open = message(&id, &uid, 1, Message::Open(Open {}));
        let refused = say(host, vec![open, go(&id, &uid, 2)]).await;
        expect_error(refused, Code::NotFound, "INCOMING_MIGRATION_NOT_FOUND");
    }
    // Without its beginning.
    expect_error(say(&b, vec![go(&id, &uid, 2)]).await, Code::InvalidArgument, "OPEN_REQUIRED");
    // A machine that runs here, and one that left at a later epoch, do not arrive at a stale one.
    expect_error(prepare(&b, &vm, 1).await, Code::FailedPrecondition, "MIGRATION_INCOMPATIBLE");
    let stale = prepare(&a, &vm, 1).await;
    expect_error(stale, Code::Internal, "STALE_EPOCH");
    assert_eq!(a.get("vm").await.observed_state(), State::Moved);

    // Another machine arrives, and what is said to it is another's, or of another epoch.
    let other = VirtualMachine { name: name("other"), uid: uuid::Uuid::new_v4().to_string(), ..vm.clone() };
    let arriving = prepare(&b, &other, 5).await.expect("prepared");
    let open = |uid: &str| message(&arriving, uid, 5, Message::Open(Open {}));
    expect_error(say(&b, vec![open(&uid)]).await, Code::InvalidArgument, "OTHER_MACHINE");
    let mixed = say(&b, vec![open(&other.uid), go(&arriving, &uid, 6)]).await;
    expect_error(mixed, Code::InvalidArgument, "OTHER_MACHINE");
    let begin = std::time::Instant::now();
    while b.list().await.iter().any(|vm| vm.uid == other.uid) {
        assert!(begin.elapsed() < DEADLINE, "what was not promised is dropped with its source");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    let arriving = prepare(&b, &other, 5).await.expect("prepared again");
    let open = message(&arriving, &other.uid, 5, Message::Open(Open {}));
    let stale = say(&b, vec![open, go(&arriving, &other.uid, 5)]).await;
    expect_error(stale, Code::InvalidArgument, "WRONG_EPOCH");

    // A lie about who owns it proves nothing; another store's question is no question.
    let question = ResolveRequest {
        migration_id: id.clone(),
        vm_uid: uid.clone(),
        host_id: uuid::Uuid::new_v4().to_string(),
        store_id: host_id(&b),
        epoch: 1,
        forced_epoch: u64::MAX,
        released: true,
    };
    let answer = peer(&b).await.resolve(question.clone()).await.expect("answers").into_inner();
    assert_eq!((answer.decision(), answer.epoch), (Decision::Committed, 2));
    let elsewhere = ResolveRequest { store_id: host_id(&a), ..question };
    expect_error(peer(&b).await.resolve(elsewhere).await, Code::FailedPrecondition, "OTHER_STORE");

    // It runs where it was, and can move on.
    let now = b.get("vm").await;
    assert_eq!((now.observed_state(), now.epoch), (State::Running, 2), "{now:?}");
    let operation = b.migrate("vm", a.arrival()).await;
    b.finish(operation).await.expect("moved back");
    assert_eq!(a.get("vm").await.epoch, 3);
}
