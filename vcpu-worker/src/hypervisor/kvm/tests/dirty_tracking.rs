//! Dirty tracking on real KVM: nothing missing, nothing extra, in every region and when a ring is full.

use super::*;

#[test]
fn the_dirty_log_is_exact_in_both_regions() {
    if require_kvm() {
        dirty_pages_are_exact(DirtyMode::Bitmap);
    }
}

/// The same over rings, and bursts that are larger than a ring.
#[test]
fn the_dirty_ring_is_exact_in_both_regions_and_when_it_is_full() {
    if require_kvm() {
        let full = dirty_pages_are_exact(DirtyMode::Ring);
        println!("the ring was full {full} times");
        assert!(full > 0, "bursts of more pages than a ring has entries fill it");
    }
}

/// Guest and log agree about every page; how often a ring was full.
fn dirty_pages_are_exact(mode: DirtyMode) -> u32 {
    let high = 64 * MIB;
    let memory = memory(crate::memory::HOLE_START + high);
    let regs = guest::load(&memory, guest::dirty(), EntryMode::LongUser, None);
    let options = KvmOptions { vcpus: 1, filter_pmu_msrs: true, dirty: mode, ..KvmOptions::default() };
    let vm = KvmVm::new(memory.clone(), options).expect("vm");
    let mut vcpu = vm.make_vcpu(0).expect("vcpu");
    vcpu.set_initial(&regs).expect("start state");
    let mut full = 0;
    let mut x = 12345u64;
    set_general(&vcpu, |r| r.rax = 12345);
    // Lets the guest store to `stores` pages of the `count` from `base`; which ones.
    let mut burst = |base: u64, count: u64, stores: u64| {
        for (at, value) in [(0, stores), (8, count), (16, base)] {
            memory.store_u64(RESULT + at, value).expect("inside");
        }
        let exit = loop {
            match vcpu.run().expect("run") {
                Exit::DirtyRingFull => {
                    full += 1;
                    vm.drain_dirty_rings().expect("drained");
                }
                exit => break exit,
            }
        };
        let mut written = BTreeSet::new();
        for _ in 0..stores {
            x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let page = (x >> 33) % count;
            written.insert(memory.offset_of(base, 1).expect("ram") / PAGE_SIZE + page);
        }
        assert_eq!(exit, Exit::MmioWrite { addr: DEVICE, size: 8, data: x });
        // Ours, above.
        written.insert(RESULT / PAGE_SIZE);
        written
    };
    let mut pages = PageBitmap::new(memory.pages());
    assert!(vm.collect_dirty(&mut pages).is_err(), "nothing is tracked yet");
    // KVM maps what is first read writable too and then counts it as dirty: the code and parameter pages.
    burst(64 * MIB, 1, 1);
    for cycle in 0..2 {
        vm.start_dirty_tracking().expect("started");
        for round in 0..40u64 {
            // Low region: 32 MiB from 64 MiB; high region: all of it.
            let (base, count) =
                if round % 2 == 0 { (64 * MIB, 8192u64) } else { (4 << 30, high / PAGE_SIZE) };
            // One round in twenty dirties more pages than a ring has entries.
            let stores = if round % 20 == 18 { 12_000 } else { 1 + round * 7 % 200 };
            let expected = burst(base, count, stores);
            pages.clear_all();
            vm.collect_dirty(&mut pages).expect("collected");
            let seen: BTreeSet<u64> = pages.runs().flat_map(|(first, len)| first..first + len).collect();
            let missing: Vec<_> = expected.difference(&seen).collect();
            let extra: Vec<_> = seen.difference(&expected).collect();
            assert!(
                missing.is_empty() && extra.is_empty(),
                "burst {round}: missing {missing:?} extra {extra:?}"
            );
        }
        pages.clear_all();
        vm.collect_dirty(&mut pages).expect("collected");
        assert!(pages.is_empty(), "cycle {cycle}: nothing ran: {pages:?}");
        vm.stop_dirty_tracking().expect("stopped");
        assert!(vm.collect_dirty(&mut pages).is_err());
    }
    full
}
