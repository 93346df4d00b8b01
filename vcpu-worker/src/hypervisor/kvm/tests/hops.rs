//! A computing guest moved over and over ends with the same bits in general, x87, SSE and AVX registers and memory.

use std::path::Path;

use vpmu_proto::api::VirtualMachineSpec;
use vpmu_proto::worker::{SnapshotManifest, VcpuState, VmState};

use super::*;
use crate::snapshot::read::Snapshot;
use crate::snapshot::write;

const MEMORY: u64 = 4 * MIB;
const ROUNDS: u64 = 80_000_000;
/// Where the guest's table of 4096 words is.
const TABLE: u64 = RESULT + 0x1000;
const FILE: &str = "VPMU_TEST_HOP_FILE";

/// One place where the guest is.
struct Place {
    memory: GuestMemory,
    vm: Arc<KvmVm>,
    vcpu: KvmVcpu,
}

impl Place {
    fn new() -> Self {
        let memory = memory(MEMORY);
        let vm = make_vm(&memory, 1);
        let vcpu = vm.make_vcpu(0).expect("vcpu");
        Self { memory, vm, vcpu }
    }

    fn save(&mut self) -> VmState {
        assert_eq!(self.vcpu.finish_pending().expect("finished"), None);
        let pieces = self.vcpu.save().expect("saved");
        let vcpus = vec![VcpuState { vcpu: 0, pieces, pmu: None }];
        VmState { vm: self.vm.save().expect("saved"), vcpus, ..VmState::default() }
    }

    fn restore(&mut self, state: &VmState) {
        let pieces = &state.vcpus[0].pieces;
        self.vcpu.restore(pieces).expect("restored");
        self.vm.restore(&state.vm).expect("restored");
        for (a, b) in pieces.iter().zip(self.vcpu.save().expect("saved")) {
            assert!(a.kind == "tsc" || *a == b, "piece {} reads back differently", a.kind);
        }
    }

    fn write_to(&mut self, path: &Path) {
        let spec = VirtualMachineSpec { memory_bytes: MEMORY, ..VirtualMachineSpec::default() };
        let manifest =
            SnapshotManifest { spec: Some(spec), state: Some(self.save()), ..SnapshotManifest::default() };
        write::write(path, &manifest, &self.memory, &write::Progress::default()).expect("written");
    }

    fn from_file(path: &Path) -> Self {
        let mut place = Self::new();
        let mut snapshot = Snapshot::open(path).expect("opens");
        snapshot.load(&place.memory).expect("loads");
        place.restore(&snapshot.take_state().expect("state"));
        place
    }

    /// Lets the guest run until a tick; None when it is interrupted, else its exit.
    fn turn(&mut self) -> Option<Exit> {
        match self.vcpu.run().expect("run") {
            Exit::Interrupted => {
                self.vcpu.clear_kick();
                None
            }
            exit => Some(exit),
        }
    }
}

fn ticks() -> crate::host::TickTimer {
    let mut timer = crate::host::TickTimer::new(Duration::from_millis(1)).expect("timer");
    timer.arm().expect("armed");
    timer
}

#[test]
fn state_and_memory_are_bit_exact_over_fifty_hops_and_more_through_files_and_processes() {
    if !require_kvm() {
        return;
    }
    if !std::arch::is_x86_feature_detected!("avx2") {
        println!("skipped: no AVX2");
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let file = dir.path().join("hop.vpmusnap");
    let first = memory(MEMORY);
    let seed: [u64; 8] = [3, 5, 7, 11, 0x1111_2222_3333, 0x9999_0000_1111, u64::MAX, 13];
    for (at, word) in (0u64..).zip(seed) {
        first.store_u64(RESULT + 64 + at * 8, word).expect("inside");
    }
    first.store_u64(RESULT + 128, 3).expect("inside");
    let (vm, vcpu) = start(&first, guest::lcg(), EntryMode::LongUser);
    set_general(&vcpu, |r| (r.rdi, r.rax, r.r8) = (ROUNDS, 42, 1));
    enable_avx(&vcpu);
    let mut place = Place { memory: first, vm, vcpu };
    let timer = ticks();
    let (mut here, mut through_file, mut through_process) = (0, 0, 0);
    let done = loop {
        if let Some(exit) = place.turn() {
            break exit;
        }
        match here + through_file + through_process {
            hop @ 0..58 if hop % 12 == 5 => {
                // Another process runs it for a moment.
                place.write_to(&file);
                let child = std::process::Command::new(std::env::current_exe().expect("this test"))
                    .args([
                        "--ignored",
                        "--exact",
                        "hypervisor::kvm::tests::hops::one_hop_in_another_process",
                    ])
                    .env(FILE, &file)
                    .output()
                    .expect("starts");
                let said = String::from_utf8_lossy(&child.stdout);
                assert!(child.status.success() && said.contains("1 passed"), "{said}");
                place = Place::from_file(&file);
                through_process += 1;
            }
            hop @ 0..58 if hop % 12 == 8 => {
                place.write_to(&file);
                place = Place::from_file(&file);
                through_file += 1;
            }
            0..58 => {
                let state = place.save();
                let mut next = Place::new();
                assert_eq!(next.vcpu.cpuid, place.vcpu.cpuid, "the same CPUID is set beforehand");
                let mut bytes = vec![0; MEMORY as usize];
                place.memory.read_at(0, &mut bytes).expect("inside");
                next.memory.write_at(0, &bytes).expect("inside");
                next.restore(&state);
                place = next;
                here += 1;
            }
            _ => {}
        }
    };
    drop(timer);
    assert_eq!((here, through_file, through_process), (48, 5, 5), "the guest ended too early");
    let (mut x, mut y) = (42u64, 1u64);
    let mut table = vec![0u64; 4096];
    for _ in 0..ROUNDS {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        y = y.wrapping_mul(3).wrapping_add(1);
        table[(x >> 52) as usize] ^= x;
    }
    assert_eq!(done, Exit::MmioWrite { addr: DEVICE, size: 8, data: x });
    let word = |at: u64| place.memory.load_u64(at).expect("inside");
    assert_eq!((word(RESULT), word(RESULT + 8)), (x, y));
    assert_eq!((word(RESULT + 16), word(RESULT + 24)), (seed[0], seed[1]), "xmm7");
    assert_eq!(word(RESULT + 136), 3 * ROUNDS, "st(0)");
    for lane in 0..4 {
        let expected = seed[lane].wrapping_add(seed[4 + lane].wrapping_mul(ROUNDS));
        assert_eq!(word(RESULT + 32 + lane as u64 * 8), expected, "ymm0 lane {lane}");
    }
    for (at, expected) in (0u64..).zip(&table) {
        assert_eq!(word(TABLE + at * 8), *expected, "memory word {at}");
    }
}

#[test]
#[ignore = "started by the test above, in a process of its own"]
fn one_hop_in_another_process() {
    let file = std::env::var_os(FILE).expect("VPMU_TEST_HOP_FILE names the file");
    let file = Path::new(&file);
    let mut place = Place::from_file(file);
    let _timer = ticks();
    assert_eq!(place.turn(), None, "it is not done yet");
    place.write_to(file);
}
