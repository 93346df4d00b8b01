//! What a migration may ask of the way its memory travels, between two real vpmud processes over TCP.

mod support;

use support::*;
use tonic::Code;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

struct Pair {
    _dir: tempfile::TempDir,
    a: Host,
    b: Host,
}

async fn pair(hypervisor: &str) -> Pair {
    let dir = tempfile::tempdir().expect("tempdir");
    let options = ["--hypervisor", hypervisor, "--peer-listen", "tcp:127.0.0.1:0"];
    let a = Host::start(&dir.path().join("a"), &options).await;
    let b = Host::start(&dir.path().join("b"), &options).await;
    Pair { _dir: dir, a, b }
}

fn tcp(host: &Host) -> String {
    let listening = host.ready["peer_listen"].as_array().expect("addresses").iter();
    let mut tcp = listening.filter_map(|a| a.as_str()).filter(|a| a.starts_with("tcp:"));
    tcp.next().expect("a TCP peer listener").to_owned()
}

fn migrate(id: &str, spec: MigrationSpec) -> CreateMigrationRequest {
    CreateMigrationRequest { parent: name(id), spec: Some(spec), ..CreateMigrationRequest::default() }
}

async fn run(from: &Host, id: &str, spec: MigrationSpec) -> Migration {
    let operation =
        from.migrations().await.create_migration(migrate(id, spec)).await.expect("accepted").into_inner();
    unpack(&from.finish(operation).await.expect("migrated"))
}

#[tokio::test]
async fn over_tls_and_back_without() {
    let Pair { _dir, a, b } = pair("simulated").await;
    a.create("vm", probe_spec(2, 64)).await;
    a.start_vm("vm").await;
    a.until_counting("vm").await;
    let spec = MigrationSpec {
        destination: tcp(&b),
        require_tls: true,
        compression: migration_spec::Compression::Zstd.into(),
        ..MigrationSpec::default()
    };
    let migration = run(&a, "vm", spec).await;
    let said: Vec<_> = migration.actions.iter().map(|action| action.code.as_str()).collect();
    // Once it has converged it copies on until the order to finish comes; a round of that time may say otherwise again.
    assert!(said.contains(&"CONVERGED"), "{:?}", migration.actions);
    let result = migration.result.expect("result");
    assert_eq!((result.transport.as_str(), result.compression.as_str()), ("tcp+tls", "zstd"));
    assert!(result.page_wire_bytes < result.page_bytes, "{result:?}");
    assert_eq!(b.until_counting("vm").await.vcpus.len(), 2);
    // Loopback leaves no host, so nothing is encrypted there unasked.
    let spec = MigrationSpec { destination: tcp(&a), ..MigrationSpec::default() };
    let result = run(&b, "vm", spec).await.result.expect("result");
    assert_eq!((result.transport.as_str(), result.compression.as_str()), ("tcp", "none"));
    assert!(result.page_wire_bytes > result.page_bytes, "{result:?}");
    assert_eq!(a.get("vm").await.observed_state(), State::Running);

    let spec = MigrationSpec { destination: b.peer(), require_tls: true, ..MigrationSpec::default() };
    let refused = a.migrations().await.create_migration(migrate("vm", spec)).await;
    expect_error(refused, Code::InvalidArgument, "TLS_CONFLICT");
    a.stop_vm("vm").await;
}
