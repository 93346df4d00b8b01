//! A disk that fills up makes the store read-only, which is said; once there is room again, writes go on by themselves, and
//! what changed meanwhile is stored.
#![allow(missing_docs)]

mod support;

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use support::*;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

/// A small file system, gone with the test.
struct Disk(PathBuf);

impl Disk {
    /// None where this user may not mount.
    fn mount(path: &Path) -> Option<Self> {
        std::fs::create_dir_all(path).expect("made");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", "size=48m,mode=700", "tmpfs"]).arg(path).stderr(Stdio::null());
        mount.status().is_ok_and(|status| status.success()).then(|| Self(path.to_owned()))
    }

    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("filler")).expect("one more file");
        for size in [1 << 20, 4096, 1] {
            let piece = vec![0x5a; size];
            while file.write_all(&piece).is_ok() {}
        }
    }

    fn free(&self) {
        std::fs::remove_file(self.0.join("filler")).expect("removed");
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

async fn pause_and_resume(host: &Host) -> Result<(), Status> {
    let mut vms = host.vms().await;
    if host.get("a").await.observed_state() == State::Running {
        vms.pause_virtual_machine(PauseVirtualMachineRequest { name: name("a") }).await?;
    }
    vms.resume_virtual_machine(ResumeVirtualMachineRequest { name: name("a") }).await.map(drop)
}

async fn is_said(host: &Host) -> bool {
    let request = GetHostPmuCapabilitiesRequest::default();
    let host = host.pmu().await.get_host_pmu_capabilities(request).await.expect("answers").into_inner();
    host.notes.iter().any(|note| note.starts_with("the store is read-only"))
}

fn reason(status: &Status) -> String {
    status.get_error_details().error_info().map(|info| info.reason.clone()).unwrap_or_default()
}

#[tokio::test]
async fn the_store_takes_writes_again_once_there_is_room() {
    let dir = tempfile::tempdir().expect("tempdir");
    let Some(disk) = Disk::mount(&dir.path().join("state")) else {
        println!("skipped: a full disk needs a mount (root)");
        return;
    };
    let mut host = Host::start(dir.path(), &["--hypervisor", "simulated"]).await;
    host.create("a", probe_spec(1, 16)).await;
    host.create("b", probe_spec(1, 16)).await;
    host.start_vm("a").await;
    host.start_vm("b").await;
    assert!(!is_said(&host).await);

    disk.fill();
    let begin = Instant::now();
    let refused = loop {
        // What sled had room for already may still be taken.
        if let Err(refused) = pause_and_resume(&host).await {
            break refused;
        }
        assert!(begin.elapsed() < DEADLINE, "a full disk takes writes for ever");
    };
    assert!(["STORE_IO", "STORE_READ_ONLY"].contains(&reason(&refused).as_str()), "{refused:?}");
    assert!(is_said(&host).await, "vpmuctl host info tells");
    // Nothing is begun that could not be recorded; what runs goes on.
    let create = host.vms().await.create_virtual_machine(create("c", probe_spec(1, 16))).await;
    expect_error(create, Code::Unavailable, "STORE_READ_ONLY");
    let begin = Instant::now();
    while host.list().await.len() != 2 {
        // Its name is given free right after the answer.
        assert!(begin.elapsed() < DEADLINE, "a machine that was refused stays");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    host.until_counting("b").await;
    // A pause that cannot be stored is one all the same; its PMU images wait for room.
    let pause = PauseVirtualMachineRequest { name: name("b") };
    let refused = host.vms().await.pause_virtual_machine(pause).await.expect_err("not stored");
    assert_eq!(reason(&refused), "STORE_READ_ONLY", "{refused:?}");
    assert_eq!(host.get("b").await.observed_state(), State::Paused);
    let live = host.pmu().await.get_pmu(GetPmuRequest { name: format!("{}/pmu", name("b")) }).await;
    let live = live.expect("it has its worker").into_inner();
    let kept = |state: &PmuState| state.cause == "pause" && state.vcpus == live.vcpus;
    assert!(!host.stored_pmu("b").await.is_ok_and(|state| kept(&state)), "there was no room");

    disk.free();
    let begin = Instant::now();
    while is_said(&host).await {
        assert!(begin.elapsed() < DEADLINE, "it stays read-only");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    host.until_logged("the store takes writes again", 1).await;
    let begin = Instant::now();
    while !host.stored_pmu("b").await.is_ok_and(|state| kept(&state)) {
        assert!(begin.elapsed() < DEADLINE, "the images of the pause are not stored: {live:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    pause_and_resume(&host).await.expect("as before");
    host.create("c", probe_spec(1, 16)).await;
    host.start_vm("c").await;
    host.stop_vm("b").await;
    host.stored_pmu("a").await.expect("durable again");

    // All of it is on the disk: another daemon finds it.
    host.kill().await;
    host.restart().await;
    let all = host.list().await;
    let all: Vec<_> =
        all.iter().map(|vm| (vm.name.as_str(), vm.observed_state(), vm.reason.as_str())).collect();
    let restarted = (State::Stopped, "HOST_RESTARTED");
    assert_eq!(
        all,
        [
            (name("a").as_str(), restarted.0, restarted.1),
            (name("b").as_str(), State::Stopped, ""),
            (name("c").as_str(), restarted.0, restarted.1),
        ]
    );
    host.stored_pmu("a").await.expect("there");
    assert_eq!(host.terminate().await, 0);
    drop(host);
    drop(disk);
}
