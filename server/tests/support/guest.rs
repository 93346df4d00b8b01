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

/// Worker processes that live, by their runtime directories' parents: one that was killed and is only being taken apart, which
/// executes nothing any more, does not.
pub fn alive(dirs: &[PathBuf]) -> Vec<Identity> {
    let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    let identities = entries.filter_map(|e| Identity::read(&e.path()));
    let executes = |pid| std::fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    identities.filter(|i| Identity::of(i.pid).is_ok_and(|now| now == *i) && executes(i.pid)).collect()
}

impl Drop for Workers {
    fn drop(&mut self) {
        for left in self.alive() {
            let pid = rustix::process::Pid::from_raw(left.pid.cast_signed()).expect("a pid");
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

/// Asks the keyboard controller for a reset: mov dx, 0x64; mov al, 0xfe; out dx, al; jmp $
pub const RESET: &[u8] = &[0x66, 0xba, 0x64, 0, 0xb0, 0xfe, 0xee, 0xeb, 0xfe];
/// Powers off: mov dx, 0x604; mov eax, 0x2000; out dx, ax; jmp $
pub const POWER_OFF: &[u8] = &[0x66, 0xba, 0x04, 0x06, 0xb8, 0, 0x20, 0, 0, 0x66, 0xef, 0xeb, 0xfe];
/// ud2. There is no IDT: the first exception is a triple fault.
pub const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// mov eax, 0xd0000000; jmp eax: a jump to where there is no memory cannot be emulated.
pub const NOWHERE: &[u8] = &[0xb8, 0, 0, 0, 0xd0, 0xff, 0xe0];
/// jmp $
pub const IDLE: &[u8] = &[0xeb, 0xfe];

/// A machine whose kernel is this code, in a file of that directory.
pub fn flat(dir: &std::path::Path, id: &str, code: &[u8]) -> VirtualMachineSpec {
    let kernel = dir.join(format!("{id}.flat"));
    std::fs::write(&kernel, code).expect("written");
    let boot = KernelBoot { path: kernel.display().to_string(), ..KernelBoot::default() };
    VirtualMachineSpec { boot: Some(virtual_machine_spec::Boot::Kernel(boot)), ..probe_spec(1, 16) }
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
