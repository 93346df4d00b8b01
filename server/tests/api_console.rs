//! The console of a real guest through the API: what is typed comes back, one client types at a time, the others look on; and
//! what a machine says of a guest that ended by itself. Needs KVM.

mod support;

use std::time::{Duration, Instant};

use support::guest::*;
use support::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt as _;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

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

/// Attached to machine `a`; what is sent goes to its guest.
struct Session {
    input: mpsc::Sender<AttachConsoleRequest>,
    output: Streaming<AttachConsoleResponse>,
}

async fn attach(host: &Host, write: bool) -> Result<Session, Status> {
    let (input, requests) = mpsc::channel(4);
    let first = AttachConsoleRequest { name: name("a"), write, ..AttachConsoleRequest::default() };
    input.send(first).await.expect("room");
    let output = host.vms().await.attach_console(ReceiverStream::new(requests)).await?.into_inner();
    Ok(Session { input, output })
}

impl Session {
    async fn send(&self, data: &[u8]) {
        let request = AttachConsoleRequest { data: data.to_vec(), ..AttachConsoleRequest::default() };
        self.input.send(request).await.expect("attached");
    }

    async fn message(&mut self) -> Result<Option<AttachConsoleResponse>, Status> {
        tokio::time::timeout(DEADLINE, self.output.message()).await.expect("it answers")
    }

    async fn until_printed(&mut self, text: &[u8]) {
        let mut seen = Vec::new();
        while !seen.ends_with(text) {
            seen.extend(self.message().await.expect("reads").expect("goes on").data);
        }
    }

    async fn refused(mut self, reason: &str) {
        loop {
            match self.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("it ended without a word"),
                Err(status) => {
                    expect_error(Err::<(), _>(status), Code::InvalidArgument, reason);
                    return;
                }
            }
        }
    }
}

#[tokio::test]
async fn one_client_types_and_the_others_look_on() {
    if !have_kvm() {
        return;
    }
    for isolation in ["thread", "process"] {
        let dir = tempfile::tempdir().expect("tempdir");
        let mut host = Host::start(dir.path(), &["--isolation", isolation, "--stop-vms"]).await;
        host.create("a", flat(dir.path(), "echo", ECHO)).await;
        host.start_vm("a").await;

        let mut first = attach(&host, true).await.expect("attaches");
        let mut reader = attach(&host, false).await.expect("readers are welcome");
        expect_error(attach(&host, true).await.map(drop), Code::FailedPrecondition, "CONSOLE_TAKEN");
        first.send(b"HAL").await;
        first.until_printed(b"IBM").await;
        reader.until_printed(b"IBM").await;

        // Who only looks on may not type, nor anybody too much at once.
        reader.send(b"x").await;
        reader.refused("CONSOLE_READ_ONLY").await;
        first.send(&[b'y'; 4097]).await;
        first.refused("INPUT_TOO_LARGE").await;

        // The one that was refused has let go; so does one that hangs up, and one that only says that it will not type more.
        let mut second = until_attached(&host).await;
        second.send(b"a").await;
        second.until_printed(b"b").await;
        drop(second);
        let Session { input, output: _still_reading } = until_attached(&host).await;
        drop(input);
        drop(until_attached(&host).await);
        assert_eq!(host.terminate().await, 0);
    }
}

/// A guest that never reads: what fits is taken, the rest is refused with how much of it that is, and the session with it.
#[tokio::test]
async fn input_that_the_guest_does_not_read_is_refused_by_name() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--isolation", "process", "--stop-vms"]).await;
    host.create("a", flat(dir.path(), "idle", IDLE)).await;
    host.start_vm("a").await;
    let mut session = attach(&host, true).await.expect("attaches");
    session.send(&[b'x'; 4096]).await;
    session.send(&[b'y'; 4096]).await;
    let status = session.message().await.expect_err("nobody reads 8 KiB");
    let status = expect_error(Err::<(), _>(status), Code::ResourceExhausted, "CONSOLE_INPUT_FULL");
    let details = status.get_error_details();
    let accepted = &details.error_info().expect("why").metadata["accepted"];
    let accepted: u32 = accepted.parse().expect("a number");
    assert!(accepted < 4096, "{status:?}");
    assert!(status.message().contains(&format!("{accepted} of 4096 bytes")), "{status:?}");

    // Others may type now, and are told the same from the first byte on.
    let mut second = until_attached(&host).await;
    second.send(b"z").await;
    let status = second.message().await.expect_err("still nobody reads");
    let status = expect_error(Err::<(), _>(status), Code::ResourceExhausted, "CONSOLE_INPUT_FULL");
    assert_eq!(status.get_error_details().error_info().expect("why").metadata["accepted"], "0");
    assert_eq!(host.get("a").await.observed_state(), State::Running, "the guest is not to blame");
    assert_eq!(host.terminate().await, 0);
}

async fn until_attached(host: &Host) -> Session {
    let begin = Instant::now();
    loop {
        match attach(host, true).await {
            Ok(session) => return session,
            Err(status) => {
                assert!(begin.elapsed() < DEADLINE, "{status:?}");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

#[tokio::test]
async fn a_guest_that_ended_says_how_with_registers_and_instruction() {
    if !have_kvm() {
        return;
    }
    let cases: [(&str, &[u8], State, &str); 4] = [
        ("reset", RESET, State::Stopped, "GUEST_RESET"),
        ("power", POWER_OFF, State::Stopped, "GUEST_SHUTDOWN"),
        ("triple", TRIPLE_FAULT, State::Failed, "GUEST_TRIPLE_FAULT"),
        ("nowhere", NOWHERE, State::Failed, "HYPERVISOR_INTERNAL_ERROR"),
    ];
    let dir = tempfile::tempdir().expect("tempdir");
    let mut host = Host::start(dir.path(), &["--stop-vms"]).await;
    for (id, code, state, reason) in cases {
        host.create(id, flat(dir.path(), id, code)).await;
        let request = StartVirtualMachineRequest { name: name(id), request_id: String::new() };
        let operation = host.vms().await.start_virtual_machine(request).await.expect("accepted").into_inner();
        // The guest may have ended before its start was answered.
        let _ = host.finish(operation).await;
        let vm = host.until(id, "ended", |vm| vm.reason == reason).await;
        assert_eq!(vm.observed_state(), state, "{vm:?}");
        assert!(vm.message.contains(" rip 0x"), "registers, for people: {}", vm.message);
        assert!(vm.message.contains("code at rip: "), "and the instruction: {}", vm.message);
        assert!(vm.message.contains(" r15 0x"), "all of them: {}", vm.message);
    }
    assert_eq!(host.terminate().await, 0);
}
