//! What a guest printed last, after its worker was killed: to the byte, for whoever was attached and for whoever asks later,
//! with a daemon that looked and without.

mod support;

use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};
use support::guest::Workers;
use support::*;
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const OPTIONS: [&str; 2] = ["--isolation", "process"];
/// Prints the alphabet for ever: byte `n` of its output is the letter `n` modulo 26.
const ALPHABET: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x61, // mov al, 'a'
    0xee, // next: out dx, al
    0xfe, 0xc0, // inc al
    0x3c, 0x7b, // cmp al, 'z' + 1
    0x75, 0xf9, // jne next
    0xb0, 0x61, // mov al, 'a'
    0xeb, 0xf5, // jmp next
];

/// A part of the output.
#[derive(Debug, Default)]
struct Seen {
    from: u64,
    data: Vec<u8>,
}

impl Seen {
    fn end(&self) -> u64 {
        self.from + self.data.len() as u64
    }

    #[track_caller]
    fn check(&self) {
        for (n, byte) in (self.from..).zip(&self.data) {
            assert_eq!(*byte, b'a' + (n % 26) as u8, "byte {n} of {}..{}", self.from, self.end());
        }
    }

    fn add(&mut self, piece: AttachConsoleResponse) {
        if self.data.is_empty() {
            self.from = piece.offset;
        }
        assert_eq!(piece.offset, self.end(), "pieces follow each other");
        self.data.extend(piece.data);
    }
}

async fn attach(host: &Host, history_only: bool) -> tonic::Streaming<AttachConsoleResponse> {
    let request = AttachConsoleRequest { name: name("a"), history_only, ..AttachConsoleRequest::default() };
    host.vms().await.attach_console(tokio_stream::once(request)).await.expect("attaches").into_inner()
}

async fn history(host: &Host) -> Seen {
    let (mut stream, mut seen) = (attach(host, true).await, Seen::default());
    while let Some(piece) = stream.message().await.expect("reads") {
        seen.add(piece);
    }
    seen
}

/// A machine that prints for ever, and its worker.
async fn printing(host: &Host, dir: &Path) -> Identity {
    let kernel = dir.join("alphabet.flat");
    std::fs::write(&kernel, ALPHABET).expect("written");
    let boot = KernelBoot { path: kernel.display().to_string(), ..KernelBoot::default() };
    let boot = Some(virtual_machine_spec::Boot::Kernel(boot));
    host.create("a", VirtualMachineSpec { boot, ..probe_spec(1, 16) }).await;
    let vm = host.start_vm("a").await;
    Identity::of(vm.worker_pid).expect("the worker lives")
}

async fn until_printed(host: &Host, more_than: u64) -> Seen {
    let begin = Instant::now();
    loop {
        let seen = history(host).await;
        if seen.end() > more_than {
            return seen;
        }
        assert!(begin.elapsed() < DEADLINE, "it prints nothing: {}", seen.end());
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

fn kill(worker: &Identity) {
    let pid = Pid::from_raw(worker.pid.cast_signed()).expect("a pid");
    kill_process(pid, Signal::KILL).expect("SIGKILL");
}

async fn until_gone(worker: &Identity) {
    let begin = Instant::now();
    while Identity::of(worker.pid).is_ok_and(|now| now == *worker) {
        assert!(begin.elapsed() < DEADLINE, "{worker:?} does not end");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
}

/// The file that the ring is in; the machine's runtime directory has it or a link to it.
fn ring(dir: &Path, uid: &str) -> PathBuf {
    std::fs::canonicalize(dir.join("state/run").join(uid).join("console")).expect("a console file")
}

#[tokio::test]
async fn a_killed_workers_last_output_is_kept_to_the_byte() {
    if !have_kvm() {
        return;
    }
    // A state directory on a disk, and one on a tmpfs.
    for parent in [std::env::temp_dir(), PathBuf::from("/dev/shm")] {
        let dir = tempfile::tempdir_in(parent).expect("tempdir");
        let workers = Workers(vec![dir.path().join("state/run")]);
        let mut host = Host::start(dir.path(), &OPTIONS).await;
        let worker = printing(&host, dir.path()).await;
        let file = ring(dir.path(), &host.get("a").await.uid);
        assert!(file.starts_with("/dev/shm"), "not on a tmpfs: {}", file.display());
        let held = std::fs::File::open(&file).expect("readable");
        until_printed(&host, 20_000).await;
        let mut stream = attach(&host, false).await;
        let mut seen = Seen::default();
        while seen.data.len() < 10_000 {
            seen.add(stream.message().await.expect("reads").expect("goes on"));
        }
        kill(&worker);
        // Who was attached gets the rest, then the error.
        loop {
            match stream.message().await {
                Ok(piece) => seen.add(piece.expect("an error ends it")),
                Err(status) => {
                    assert_ne!(status.code(), tonic::Code::Ok);
                    break;
                }
            }
        }
        let vm = host.until("a", "FAILED", is(State::Failed)).await;
        assert_eq!((vm.reason.as_str(), vm.worker_pid), ("WORKER_DIED", 0), "{vm:?}");
        let last = history(&host).await;
        last.check();
        seen.check();
        assert_eq!((seen.from, seen.end()), (last.from, last.end()), "all that there is, for both");
        // The offset behind the guest's last byte, as the worker left it.
        let mut word = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&held, &mut word, 16).expect("read");
        assert_eq!(last.end(), u64::from_le_bytes(word));
        assert!(!file.exists(), "{} is left", file.display());
        host.delete("a").await;
        assert_eq!(host.terminate().await, 0);
        assert!(workers.alive().is_empty());
    }
}

#[tokio::test]
async fn so_is_that_of_one_which_died_while_no_daemon_looked() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().expect("tempdir");
    let workers = Workers(vec![dir.path().join("state/run")]);
    let mut host = Host::start(dir.path(), &OPTIONS).await;
    let worker = printing(&host, dir.path()).await;
    let file = ring(dir.path(), &host.get("a").await.uid);
    let before = until_printed(&host, 1000).await;
    host.kill().await;
    // It prints on, also beyond what the ring holds.
    let end = || {
        let mut word = [0; 8];
        let held = std::fs::File::open(&file).expect("readable");
        std::os::unix::fs::FileExt::read_exact_at(&held, &mut word, 16).expect("read");
        u64::from_le_bytes(word)
    };
    let begin = Instant::now();
    while end() <= before.end() + 5000 {
        assert!(begin.elapsed() < DEADLINE, "it prints no more");
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    kill(&worker);
    until_gone(&worker).await;
    let last = end();
    host.restart().await;
    let vm = host.until("a", "FAILED", is(State::Failed)).await;
    assert_eq!(vm.reason, "WORKER_DIED", "{vm:?}");
    let kept = history(&host).await;
    kept.check();
    assert_eq!(kept.end(), last);
    assert!(kept.end() > before.end() + 5000);
    assert!(!file.exists(), "{} is left", file.display());
    // A new run begins anew.
    host.start_vm("a").await;
    assert!(until_printed(&host, 0).await.from == 0);
    host.delete("a").await;
    assert_eq!(host.terminate().await, 0);
    assert!(workers.alive().is_empty());
}
