//! What tests know of a probe guest from outside: its memory, verified by its own pattern, and its workers' processes.
#![allow(dead_code, reason = "each test file uses its part")]

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use vcpu_worker::memory::GuestMemory;
use vcpu_worker::probe::{ProbeConfig, verify_memory};
use vcpu_worker::process::Identity;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

use super::{DEADLINE, Host, name, probe_spec};

pub const MIB: u64 = 1 << 20;

/// Ends every worker process that a test leaves, also when it panics.
pub struct Workers(pub Vec<PathBuf>);

impl Workers {
    pub fn alive(&self) -> Vec<Identity> {
        alive(&self.0)
    }
}

/// Worker processes that live, by their runtime directories' parents.
pub fn alive(dirs: &[PathBuf]) -> Vec<Identity> {
    let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    let identities = entries.filter_map(|e| Identity::read(&e.path()));
    identities.filter(|i| Identity::of(i.pid).is_ok_and(|now| now == *i)).collect()
}

impl Drop for Workers {
    fn drop(&mut self) {
        for left in self.alive() {
            let pid = rustix::process::Pid::from_raw(left.pid.cast_signed()).expect("a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// A guest that has filled a part of its memory and dirties another.
pub fn filled(vcpus: u32, memory_mib: u64, fill: u64) -> VirtualMachineSpec {
    let boot = ProbeBoot {
        fill_bytes: fill * MIB,
        working_set_bytes: 4 * MIB,
        dirty_pages_per_second: 20_000,
        ..ProbeBoot::default()
    };
    VirtualMachineSpec {
        boot: Some(virtual_machine_spec::Boot::Probe(boot)),
        ..probe_spec(vcpus, memory_mib)
    }
}

/// Every mapping of guest memory of a process, by its descriptor.
pub fn memories(pid: u32, bytes: u64) -> Vec<GuestMemory> {
    let dir = PathBuf::from(format!("/proc/{pid}/fd"));
    let links = std::fs::read_dir(&dir).expect("descriptors").flatten();
    let guests = links.filter(|e| {
        let target = std::fs::read_link(e.path()).unwrap_or_default();
        target.to_string_lossy().starts_with("/memfd:")
    });
    guests
        .filter_map(|e| {
            let file = std::fs::File::options().read(true).write(true).open(e.path()).ok()?;
            GuestMemory::from_fd(OwnedFd::from(file), bytes).ok()
        })
        .filter(|memory| memory.resident_pages().is_some_and(|pages| !pages.is_empty()))
        .collect()
}

/// Stops the guest for a moment and compares all its memory with what its own report implies.
pub async fn verify(host: &Host, id: &str) {
    let vm = host.get(id).await;
    let running = vm.observed_state() == State::Running;
    if running {
        let request = PauseVirtualMachineRequest { name: name(id) };
        host.vms().await.pause_virtual_machine(request).await.expect("paused");
    }
    let spec = vm.spec.expect("spec");
    let Some(virtual_machine_spec::Boot::Probe(probe)) = &spec.boot else { panic!("the probe") };
    let config = ProbeConfig::from_boot(probe, spec.vcpus, spec.memory_bytes, 1_000_000, None);
    let pid = if vm.worker_pid == 0 { host.child.id().expect("running") } else { vm.worker_pid };
    let memories = memories(pid, spec.memory_bytes);
    assert_eq!(memories.len(), 1, "one process has one copy");
    let pages = verify_memory(&memories[0], &config).expect("the guest's pattern");
    assert!(pages * 4096 >= probe.fill_bytes, "{pages} pages");
    if running {
        let request = ResumeVirtualMachineRequest { name: name(id) };
        host.vms().await.resume_virtual_machine(request).await.expect("resumed");
    }
}

/// Waits until the guest has written all that it fills.
pub async fn until_filled(host: &Host, id: &str) {
    host.until_counting(id).await;
    let begin = Instant::now();
    loop {
        let pmu = host.live_pmu(id).await;
        if pmu.probe.expect("probe").vcpus.iter().all(|v| v.pages_dirtied > 100) {
            return;
        }
        assert!(begin.elapsed() < DEADLINE, "it does not fill its memory");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}
