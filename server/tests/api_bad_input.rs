//! Bad input: each with a typed error, and nothing changed.

mod support;

use support::*;
use tonic::Code;
use vpmu_proto::api::*;

/// One spec with one thing wrong.
type Case = (&'static str, Box<dyn Fn(&mut VirtualMachineSpec)>, &'static str);

#[tokio::test]
async fn every_bad_request_is_a_typed_error_and_changes_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("kept", probe_spec(1, 16)).await;
    let before = host.list().await;
    let mut vms = host.vms().await;

    let cases: Vec<Case> = vec![
        ("zero vCPUs", Box::new(|s| s.vcpus = 0), "VCPUS_OUT_OF_RANGE"),
        ("10,000 vCPUs", Box::new(|s| s.vcpus = 10_000), "VCPUS_OUT_OF_RANGE"),
        ("no memory", Box::new(|s| s.memory_bytes = 0), "MEMORY_NOT_ALIGNED"),
        (
            "memory not a multiple of 2 MiB",
            Box::new(|s| s.memory_bytes = (64 << 20) + 4096),
            "MEMORY_NOT_ALIGNED",
        ),
        ("memory beyond the host's", Box::new(|s| s.memory_bytes = 1 << 50), "MEMORY_BEYOND_HOST"),
        ("nothing to boot", Box::new(|s| s.boot = None), "FIELD_REQUIRED"),
        (
            "a relative kernel path",
            Box::new(|s| {
                let kernel = KernelBoot { path: "vmlinux".to_owned(), ..KernelBoot::default() };
                s.boot = Some(virtual_machine_spec::Boot::Kernel(kernel));
            }),
            "BAD_PATH",
        ),
        (
            "more counters than the host has",
            Box::new(|s| s.pmu = Some(PmuSpec { gp_counters: 9, fixed_counters: 3, ..PmuSpec::default() })),
            "PMU_SHAPE_UNAVAILABLE",
        ),
        ("a restart policy that is none", Box::new(|s| s.restart_policy = 9), "BAD_RESTART_POLICY"),
    ];
    for (what, spoil, reason) in cases {
        let mut spec = probe_spec(1, 64);
        spoil(&mut spec);
        println!("{what}");
        expect_error(vms.create_virtual_machine(create("new", spec)).await, Code::InvalidArgument, reason);
    }

    for id in ["", "UPPER", "-a", "a-", "a/b", "ä", &"x".repeat(64)] {
        expect_error(
            vms.create_virtual_machine(create(id, probe_spec(1, 64))).await,
            Code::InvalidArgument,
            "BAD_ID",
        );
    }
    let mut named = create("new", probe_spec(1, 64));
    named.virtual_machine.as_mut().expect("machine").uid = "mine".to_owned();
    expect_error(vms.create_virtual_machine(named).await, Code::InvalidArgument, "OUTPUT_ONLY_FIELD");
    let mut odd = create("new", probe_spec(1, 64));
    odd.request_id = "not a uuid".to_owned();
    expect_error(vms.create_virtual_machine(odd).await, Code::InvalidArgument, "BAD_REQUEST_ID");
    expect_error(
        vms.create_virtual_machine(create("kept", probe_spec(1, 64))).await,
        Code::AlreadyExists,
        "VIRTUAL_MACHINE_ALREADY_EXISTS",
    );

    let unknown = "VIRTUAL_MACHINE_NOT_FOUND";
    expect_error(
        vms.get_virtual_machine(GetVirtualMachineRequest { name: name("nobody") }).await,
        Code::NotFound,
        unknown,
    );
    let start = StartVirtualMachineRequest { name: name("nobody"), request_id: String::new() };
    expect_error(vms.start_virtual_machine(start).await, Code::NotFound, unknown);
    let delete =
        DeleteVirtualMachineRequest { name: name("nobody"), ..DeleteVirtualMachineRequest::default() };
    expect_error(vms.delete_virtual_machine(delete).await, Code::NotFound, unknown);
    expect_error(
        vms.pause_virtual_machine(PauseVirtualMachineRequest { name: name("nobody") }).await,
        Code::NotFound,
        unknown,
    );
    expect_error(
        vms.get_virtual_machine(GetVirtualMachineRequest { name: "kept".to_owned() }).await,
        Code::InvalidArgument,
        "BAD_RESOURCE_NAME",
    );

    // Illegal transitions of a stopped machine.
    let illegal = "ILLEGAL_TRANSITION";
    expect_error(
        vms.resume_virtual_machine(ResumeVirtualMachineRequest { name: name("kept") }).await,
        Code::FailedPrecondition,
        illegal,
    );
    expect_error(
        vms.pause_virtual_machine(PauseVirtualMachineRequest { name: name("kept") }).await,
        Code::FailedPrecondition,
        illegal,
    );
    let stop = StopVirtualMachineRequest { name: name("kept"), request_id: String::new() };
    expect_error(vms.stop_virtual_machine(stop).await, Code::FailedPrecondition, illegal);
    let wrong =
        DeleteVirtualMachineRequest { name: name("kept"), etag: "old".to_owned(), request_id: String::new() };
    expect_error(vms.delete_virtual_machine(wrong).await, Code::Aborted, "ETAG_MISMATCH");
    let mut pmu = host.pmu().await;
    expect_error(
        pmu.get_pmu(GetPmuRequest { name: name("kept") }).await,
        Code::FailedPrecondition,
        "VM_HAS_NO_WORKER",
    );
    expect_error(host.stored_pmu("kept").await, Code::NotFound, "PMU_STATE_NOT_FOUND");

    // Migrations of what cannot move, and to nowhere.
    let mut migrations = host.migrations().await;
    let migrate = |to: &str| CreateMigrationRequest {
        parent: name("kept"),
        spec: Some(MigrationSpec { destination: to.to_owned(), ..MigrationSpec::default() }),
        ..CreateMigrationRequest::default()
    };
    expect_error(migrations.create_migration(migrate("")).await, Code::InvalidArgument, "FIELD_REQUIRED");
    expect_error(
        migrations.create_migration(migrate("http://x")).await,
        Code::InvalidArgument,
        "BAD_ADDRESS",
    );
    expect_error(
        migrations.create_migration(migrate("unix:/nowhere.sock")).await,
        Code::FailedPrecondition,
        illegal,
    );

    // 100 MiB in one request.
    let mut huge = create("new", probe_spec(1, 64));
    huge.request_id = "x".repeat(100 << 20);
    expect_error(vms.create_virtual_machine(huge).await, Code::ResourceExhausted, "REQUEST_TOO_LARGE");

    assert_eq!(host.list().await, before, "nothing has changed");
}

#[tokio::test]
async fn wrong_options_are_refused_with_a_reason() {
    let dir = tempfile::tempdir().expect("tempdir");
    let refused: [(&[&str], i32, &str); 9] = [
        (&["--pmu", "msr"], 1, "PMU_MODE_UNAVAILABLE"),
        (&["--pmu", "kvm"], 1, "PMU_MODE_UNAVAILABLE"),
        (&["--model-pmu", "intel:v9:99"], 1, "BAD_MODEL_PMU"),
        (&["--cores", "4095"], 1, "BAD_CORES"),
        (&["--listen", "tcp:0.0.0.0:0"], 1, "LOOPBACK_ONLY"),
        (&["--peer-listen", "tcp:0.0.0.0:0"], 1, "TLS_REQUIRED"),
        (&["--peer-tls-ca", "/dev/null"], 2, "--peer-tls-cert"),
        (
            &["--peer-tls-ca", "/dev/null", "--peer-tls-cert", "/dev/null", "--peer-tls-key", "/dev/null"],
            1,
            "TLS_FILE_CONTENT",
        ),
        (&["--listen", "nonsense"], 2, "write unix:PATH or tcp:ADDR:PORT"),
    ];
    for (options, code, said) in refused {
        let options: Vec<String> = options.iter().map(ToString::to_string).collect();
        let (exit, log) = spawn(dir.path(), &options).await.map(|_| ()).expect_err("refused");
        assert_eq!(exit, Some(code), "{options:?}: {log}");
        assert!(log.contains(said), "{options:?}: {log}");
        assert!(!dir.path().join("api.sock").exists(), "{options:?} left a socket");
    }
}
