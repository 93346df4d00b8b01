//! Whole kernels on KVM: a small PVH guest, and Debian's unmodified cloud kernel.

mod worker_common;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use vpmu_proto::api::virtual_machine_spec::Boot;
use vpmu_proto::api::{self, KernelBoot};
use worker_common::*;

fn kernel(path: &Path, memory_mib: u64, cmdline: &str) -> api::VirtualMachineSpec {
    let path = path.to_str().expect("text").to_owned();
    api::VirtualMachineSpec {
        vcpus: 1,
        memory_bytes: memory_mib << 20,
        boot: Some(Boot::Kernel(KernelBoot { path, cmdline: cmdline.to_owned(), ..KernelBoot::default() })),
        ..api::VirtualMachineSpec::default()
    }
}

/// Boots it and waits until its console has said all of `words`.
async fn says(spec: api::VirtualMachineSpec, words: &[&str], within: Duration) -> String {
    let mut host = Host::new(&host_cores(), "kernel");
    host.attach().await;
    host.create("kvm", spec, false).await;
    host.grant(1, 1, true).await.expect("grant");
    let until = Instant::now() + within;
    loop {
        let said = String::from_utf8_lossy(&host.console().await).into_owned();
        if words.iter().all(|word| said.contains(word)) {
            host.shutdown().await;
            return said;
        }
        let status = host.status().await;
        assert!(Instant::now() < until, "not within {within:?}: {words:?} in\n{said}\n{status:?}");
        assert!(status.end.is_none(), "it ended: {:?} after\n{said}", status.end);
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The PVH guest that the baselines of other monitors were taken with: `A` at once, `R` when it is set up, then heartbeats.
#[tokio::test(flavor = "multi_thread")]
async fn the_baseline_payload_boots() {
    if !kvm() {
        return;
    }
    // The one that `vpmud bench migrate` runs; its source is beside it.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/src/bench/guest/payload.elf");
    let said =
        says(kernel(&path, 256, "mode=d ws=1 rate=10 hb=10000 khz=2000000"), &["A", "R", "."], PATIENCE)
            .await;
    assert!(said.starts_with('A'), "{said:?}");
}

/// `.ci/debian-kernel` fetches it.
fn debian() -> PathBuf {
    let target = std::env::var_os("CARGO_TARGET_DIR")
        .map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join("../target"), PathBuf::from);
    let kernel = target.join("debian-kernel/vmlinux");
    assert!(kernel.exists(), "{} is not there: run .ci/debian-kernel first", kernel.display());
    kernel
}

const CMDLINE: &str =
    "console=ttyS0 earlyprintk=ttyS0 panic=-1 reboot=k lpj=4000000 no_timer_check tsc=reliable";

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs .ci/debian-kernel, which .ci/run calls before it runs this"]
async fn debians_kernel_prints_its_banner_and_finds_kvm() {
    if !kvm() {
        return;
    }
    let words = ["Linux version 6.", "-cloud-amd64", "Hypervisor detected: KVM"];
    says(kernel(&debian(), 512, CMDLINE), &words, Duration::from_secs(240)).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "for hosts whose KVM carries an unmodified Linux to user space: VPMU_DEBIAN_INITRD names an initrd that says HELLO"]
async fn debians_kernel_reaches_user_space() {
    let initrd = std::env::var("VPMU_DEBIAN_INITRD").expect("VPMU_DEBIAN_INITRD names an initrd");
    let mut spec = kernel(&debian(), 512, CMDLINE);
    if let Some(Boot::Kernel(kernel)) = &mut spec.boot {
        kernel.initrd_path = initrd;
    }
    says(spec, &["Run /init as init process", "HELLO"], Duration::from_secs(600)).await;
}
