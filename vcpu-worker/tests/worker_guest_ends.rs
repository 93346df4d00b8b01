//! Guests that end by themselves, and console input and output of a guest that is not the probe. The guests are a few
//! bytes of 32-bit code each.

mod worker_common;

use std::path::Path;

use tonic::Code;
use vpmu_proto::api::{self, virtual_machine_spec::Boot};
use vpmu_proto::worker::guest_end::Kind;
use vpmu_proto::worker::worker_status::State;
use vpmu_proto::worker::*;
use worker_common::*;

fn spec(path: &Path, vcpus: u32) -> api::VirtualMachineSpec {
    api::VirtualMachineSpec {
        vcpus,
        memory_bytes: 16 << 20,
        boot: Some(Boot::Kernel(api::KernelBoot {
            path: path.display().to_string(),
            initrd_path: String::new(),
            cmdline: String::new(),
        })),
        pmu: None,
        ..Default::default()
    }
}

/// `mov dx, port; mov eax, value; out dx, (e)ax of that size; jmp self`
fn out(port: u16, value: u32, wide: bool) -> Vec<u8> {
    let [p0, p1] = port.to_le_bytes();
    let [v0, v1, v2, v3] = value.to_le_bytes();
    let mut code = vec![0x66, 0xba, p0, p1, 0xb8, v0, v1, v2, v3];
    if wide {
        code.extend([0x66, 0xef]);
    } else {
        code.push(0xee);
    }
    code.extend([0xeb, 0xfe]);
    code
}

/// Reads bytes from the serial port as they come and sends each back plus one.
const ECHO: &[u8] = &[
    0x66, 0xba, 0xfd, 0x03, // wait: mov dx, 0x3fd
    0xec, // in al, dx
    0xa8, 0x01, // test al, 1
    0x74, 0xf7, // jz wait
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xec, // in al, dx
    0xfe, 0xc0, // inc al
    0xee, // out dx, al
    0xeb, 0xed, // jmp wait
];

async fn ended(host: &mut Host) -> GuestEnd {
    let mut events = host
        .client
        .watch_events(WatchEventsRequest { fence: host.fence() })
        .await
        .expect("watch")
        .into_inner();
    let next = async {
        loop {
            let event = events.message().await.expect("event").expect("open");
            if let Some(end) = event.end.clone() {
                assert_eq!(event.state(), State::Ended);
                return end;
            }
        }
    };
    tokio::time::timeout(PATIENCE, next).await.expect("the guest ends")
}

#[tokio::test(flavor = "multi_thread")]
async fn every_end_is_told_apart() {
    if !kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let cases: [(&str, Vec<u8>, Kind); 5] = [
        ("i8042", out(0x64, 0xfe, false), Kind::Reset),
        ("cf9", out(0xcf9, 0x06, false), Kind::Reset),
        ("power", out(0x604, 0x2000, true), Kind::Shutdown),
        // No IDT: the first exception is a triple fault.
        ("triple", vec![0x0f, 0x0b], Kind::TripleFault),
        // A jump to where there is no memory cannot be emulated.
        ("nowhere", vec![0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0], Kind::InternalError),
    ];
    for (name, code, kind) in cases {
        let path = dir.path().join(format!("{name}.flat"));
        std::fs::write(&path, code).expect("write");
        let mut host = Host::new(&host_cores(), name);
        host.attach().await;
        let created = host.create("kvm", spec(&path, 2), false).await;
        assert_eq!(created.warnings.len(), 1, "its PMU is hidden: {:?}", created.warnings);
        host.grant(1, 1, true).await.expect("grant");
        let end = ended(&mut host).await;
        println!("{name}: {end:?}");
        assert_eq!((end.kind(), end.vcpu), (kind, 0), "{name}: {}", end.detail);
        assert!(end.detail.contains(" rip 0x"), "registers, for people: {}", end.detail);
        if kind == Kind::TripleFault {
            assert!(end.detail.contains("code at rip: [0f, 0b"), "and the instruction: {}", end.detail);
        }
        let status = host.status().await;
        assert_eq!((status.state(), status.end), (State::Ended, Some(end)));
        refused(host.run().await, Code::FailedPrecondition, "ILLEGAL_STATE");
        assert_eq!(host.pause().await.len(), 2, "images can still be read");
        host.shutdown().await;
    }
    console(dir.path()).await;
    assert_eq!(worker_threads(), Vec::<String>::new());
}

async fn console(dir: &Path) {
    let path = dir.join("echo.flat");
    std::fs::write(&path, ECHO).expect("write");
    let mut host = Host::new(&host_cores(), "echo");
    host.attach().await;
    host.create("kvm", spec(&path, 1), false).await;
    host.grant(1, 1, true).await.expect("grant");
    let request = ReadConsoleRequest { fence: host.fence(), offset: 0, follow: true };
    let mut follow = host.client.read_console(request).await.expect("console").into_inner();
    // More than the FIFO's 64 bytes, so that the queue behind it is used.
    let data: Vec<u8> = (0..1000u32).map(|i| (i % 64 + 48) as u8).collect();
    let written =
        host.client.write_console(WriteConsoleRequest { fence: host.fence(), data: data.clone() }).await;
    assert_eq!(written.expect("write").into_inner().accepted, 1000);
    let mut seen = Vec::new();
    let read = async {
        while seen.len() < data.len() {
            let chunk = follow.message().await.expect("chunk").expect("open");
            assert_eq!(chunk.offset, seen.len() as u64);
            seen.extend(chunk.data);
        }
    };
    tokio::time::timeout(PATIENCE, read).await.expect("all of it comes back");
    assert_eq!(seen, data.iter().map(|b| b + 1).collect::<Vec<_>>());
    // A second reader begins where it likes.
    let request = ReadConsoleRequest { fence: host.fence(), offset: 990, follow: false };
    let mut tail = host.client.read_console(request).await.expect("console").into_inner();
    let chunk = tail.message().await.expect("chunk").expect("some");
    assert_eq!((chunk.offset, &chunk.data[..]), (990, &seen[990..]));
    assert_eq!(tail.message().await.expect("end"), None);
    host.shutdown().await;
    while let Ok(Some(_)) = follow.message().await {}
}
