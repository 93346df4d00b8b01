//! Machines that cannot be made of what they are asked to be made of: a typed error that names the field, and nothing left
//! behind: no worker, no directory, no cgroup, no core that stays taken.
#![allow(missing_docs)]

mod support;

use std::path::Path;

use support::load::{Reaper, workers};
use support::workers::cgroups_of;
use support::*;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vpmu_proto::api::memory_backing::HugePages;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;
use vpmu_proto::google::rpc;

/// One machine that cannot start: what is wrong, its spec, the reason, the field.
type Case = (&'static str, VirtualMachineSpec, &'static str, &'static str);

const PAYLOAD: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/bench/guest/payload.elf");

fn kernel(path: &Path, initrd: &str, cmdline: &str) -> VirtualMachineSpec {
    let boot = KernelBoot {
        path: path.to_str().expect("text").to_owned(),
        initrd_path: initrd.to_owned(),
        cmdline: cmdline.to_owned(),
    };
    VirtualMachineSpec {
        boot: Some(virtual_machine_spec::Boot::Kernel(boot)),
        // A claim on a whole core that stayed would be missed at once: this host has few.
        placement: Some(CpuPlacement {
            policy: cpu_placement::Policy::Dedicated.into(),
            ..CpuPlacement::default()
        }),
        ..probe_spec(1, 8)
    }
}

/// Reason and field of an operation's error.
fn named(error: &rpc::Status) -> (String, String) {
    let details = Status::with_details(
        Code::from_i32(error.code),
        &error.message,
        prost::Message::encode_to_vec(error).into(),
    )
    .get_error_details();
    let field = details.bad_request().and_then(|b| b.field_violations.first()).map(|v| v.field.clone());
    (reason_of(error), field.unwrap_or_default())
}

/// What a machine that never ran must not leave on its host.
async fn nothing_is_left(host: &Host, what: &str) {
    assert_eq!(workers(&host.dir).len(), 0, "{what}: a worker");
    let dirs: Vec<_> =
        std::fs::read_dir(host.dir.join("state/run")).into_iter().flatten().flatten().collect();
    assert!(dirs.is_empty(), "{what}: {dirs:?}");
    assert_eq!(cgroups_of(host), [""; 0], "{what}: a cgroup");
    let request = GetHostPmuCapabilitiesRequest::default();
    let host = host.pmu().await.get_host_pmu_capabilities(request).await.expect("answers").into_inner();
    for cpu in host.topology {
        assert!(cpu.dedicated_to.is_empty() && cpu.vcpus == 0, "{what}: {cpu:?}");
    }
}

#[tokio::test]
async fn what_cannot_be_booted_is_named_and_leaves_nothing() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let mut host = Host::start(dir.path(), &["--hypervisor", "kvm", "--isolation", "process"]).await;
    let good = std::fs::read(PAYLOAD).expect("the measured guest");
    let file = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).expect("written");
        path
    };
    let text = file("text", b"#!/bin/sh\necho this is no kernel\n");
    let (head, cut) = (file("head", &good[..100]), file("cut", &good[..good.len() / 2]));
    let huge = file("huge.flat", &vec![0x90; 9 << 20]);
    let payload = Path::new(PAYLOAD);
    let backed = |pages: HugePages| VirtualMachineSpec {
        memory_backing: Some(MemoryBacking { huge_pages: pages.into(), prefault: false }),
        // More than any pool of huge pages, and less than the host's memory.
        memory_bytes: 2 << 30,
        ..kernel(payload, "", "mode=h")
    };
    let mut cases: Vec<Case> = vec![
        ("a script", kernel(&text, "", ""), "NOT_A_KERNEL", "spec.kernel.path"),
        ("100 bytes of a kernel", kernel(&head, "", ""), "KERNEL_TRUNCATED", "spec.kernel.path"),
        ("half a kernel", kernel(&cut, "", ""), "KERNEL_TRUNCATED", "spec.kernel.path"),
        ("9 MiB into 8", kernel(&huge, "", ""), "LARGER_THAN_MEMORY", "spec.memory_bytes"),
        (
            "no such file",
            kernel(Path::new("/nowhere/vmlinux"), "", ""),
            "KERNEL_FILE_MISSING",
            "spec.kernel.path",
        ),
        ("a directory", kernel(dir.path(), "", ""), "KERNEL_FILE_UNREADABLE", "spec.kernel.path"),
        (
            "no such initrd",
            kernel(payload, "/nowhere/initrd", ""),
            "KERNEL_FILE_MISSING",
            "spec.kernel.initrd_path",
        ),
        (
            "a bell in the command line",
            kernel(payload, "", "a\u{7}b"),
            "CMDLINE_INVALID",
            "spec.kernel.cmdline",
        ),
    ];
    let pool = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    if pool.ok().and_then(|text| text.trim().parse::<u64>().ok()).unwrap_or(0) < 1024 {
        let field = "spec.memory_backing.huge_pages";
        cases.push(("no huge pages", backed(HugePages::Hugetlb), "HUGE_PAGES_EXHAUSTED", field));
    }

    for (number, (what, spec, reason, field)) in cases.into_iter().enumerate() {
        // Created and started later, and in one call.
        for at_once in [false, true] {
            let id = format!("bad-{number}-{at_once}");
            let mut request = create(&id, spec.clone());
            if at_once {
                let vm = request.virtual_machine.as_mut().expect("machine");
                vm.set_desired_state(virtual_machine::DesiredState::Running);
            }
            let created = host.vms().await.create_virtual_machine(request).await;
            let mut operation = created.unwrap_or_else(|e| panic!("{what}: {e:?}")).into_inner();
            if !at_once {
                host.finish(operation).await.expect("created");
                let start = StartVirtualMachineRequest { name: name(&id), request_id: String::new() };
                operation =
                    host.vms().await.start_virtual_machine(start).await.expect("accepted").into_inner();
            }
            let error = host.finish(operation).await.expect_err(what);
            assert_eq!(named(&error), (reason.to_owned(), field.to_owned()), "{what}: {error:?}");
            assert_ne!(error.code, Code::Internal as i32, "{what}: {error:?}");
            let vm = host.get(&id).await;
            assert_eq!(
                (vm.observed_state(), vm.reason.as_str(), vm.worker_pid),
                (State::Failed, reason, 0),
                "{what}"
            );
            assert!(vm.vcpu_cores.is_empty(), "{what}: {vm:?}");
            nothing_is_left(&host, what).await;
            let request = DeleteVirtualMachineRequest { name: name(&id), ..Default::default() };
            let operation = host.vms().await.delete_virtual_machine(request).await.expect("accepted");
            host.finish(operation.into_inner()).await.expect("deleted");
        }
    }

    // What the request alone shows is refused before there is a machine.
    let long =
        host.vms().await.create_virtual_machine(create("bad", kernel(payload, "", &"x".repeat(2048)))).await;
    let zero = host.vms().await.create_virtual_machine(create("bad", kernel(payload, "", "a\0b"))).await;
    for refused in [
        expect_error(long, Code::InvalidArgument, "CMDLINE_TOO_LONG"),
        expect_error(zero, Code::InvalidArgument, "CMDLINE_ZERO_BYTE"),
    ] {
        let details = refused.get_error_details();
        let field = &details.bad_request().expect("BadRequest").field_violations[0].field;
        assert_eq!(field, "virtual_machine.spec.kernel.cmdline");
    }
    let core = host.ready["pid"].as_u64().map(|_| vcpu_worker::host::allowed_cores()[0]).expect("a host");
    let overlap = VirtualMachineSpec {
        vcpus: 2,
        placement: Some(CpuPlacement { cores: vec![core, core], ..CpuPlacement::default() }),
        ..probe_spec(2, 8)
    };
    let overlap = host.vms().await.create_virtual_machine(create("bad", overlap)).await;
    expect_error(overlap, Code::InvalidArgument, "CORES_OVERLAP");
    assert_eq!(host.list().await, [], "no record is left");
    nothing_is_left(&host, "refusals").await;
    let log = std::fs::read_to_string(dir.path().join("log")).expect("log");
    assert!(!log.contains("panicked"), "{log}");
    assert_eq!(host.terminate().await, 0);
}

async fn restore(host: &Host, file: &str, lazy: bool) -> (Code, String) {
    let request = RestoreVirtualMachineRequest {
        virtual_machine_id: "back".to_owned(),
        file: file.to_owned(),
        lazy,
        ..Default::default()
    };
    let operation = match host.vms().await.restore_virtual_machine(request).await {
        Ok(operation) => operation.into_inner(),
        Err(refused) => {
            let details = refused.get_error_details();
            return (refused.code(), details.error_info().map(|i| i.reason.clone()).unwrap_or_default());
        }
    };
    let error = host.finish(operation).await.expect_err("refused");
    (Code::from_i32(error.code), reason_of(&error))
}

#[tokio::test]
async fn a_bad_snapshot_leaves_no_machine_and_no_worker() {
    let dir = tempfile::tempdir().expect("tempdir");
    let _reaper = Reaper(vec![dir.path().to_owned()]);
    let mut host = Host::start(dir.path(), &["--isolation", "process"]).await;
    host.create("a", probe_spec(1, 8)).await;
    host.start_vm("a").await;
    host.until_counting("a").await;
    let request =
        SnapshotVirtualMachineRequest { name: name("a"), file: "good".to_owned(), ..Default::default() };
    let operation = host.vms().await.snapshot_virtual_machine(request).await.expect("accepted").into_inner();
    host.finish(operation).await.expect("taken");
    host.stop_vm("a").await;
    let before = host.list().await;

    let files = dir.path().join("state/snapshots");
    let good = std::fs::read(files.join("good")).expect("read");
    let flipped = |at: usize| {
        let mut bytes = good.clone();
        bytes[at] ^= 0x10;
        bytes
    };
    let mut version = good.clone();
    version[8] = 9;
    let page = good.len() / 2;
    for (what, bytes, code, reason) in [
        ("another version", version, Code::FailedPrecondition, "SNAPSHOT_VERSION_UNSUPPORTED"),
        ("a flipped bit of a page", flipped(page), Code::DataLoss, "SNAPSHOT_DAMAGED"),
        ("a byte less", good[..good.len() - 1].to_vec(), Code::DataLoss, "SNAPSHOT_LENGTH_WRONG"),
        ("something else", b"hello".to_vec(), Code::FailedPrecondition, "SNAPSHOT_NOT_ONE"),
        ("nothing", Vec::new(), Code::FailedPrecondition, "SNAPSHOT_NOT_ONE"),
    ] {
        std::fs::write(files.join("bad"), bytes).expect("written");
        assert_eq!(restore(&host, "bad", false).await, (code, reason.to_owned()), "{what}");
        assert_eq!(host.list().await, before, "{what}: a record is left");
        nothing_is_left(&host, what).await;
    }
    std::fs::remove_file(files.join("bad")).expect("removed");
    std::fs::create_dir(files.join("bad")).expect("made");
    for lazy in [false, true] {
        for (file, code, reason) in [
            ("bad", Code::FailedPrecondition, "SNAPSHOT_NOT_ONE"),
            ("none", Code::NotFound, "SNAPSHOT_UNREADABLE"),
        ] {
            assert_eq!(restore(&host, file, lazy).await, (code, reason.to_owned()), "{file}, lazy {lazy}");
        }
        assert_eq!(host.list().await, before, "a record is left");
        nothing_is_left(&host, "unreadable").await;
    }
    assert_eq!(host.terminate().await, 0);
}
