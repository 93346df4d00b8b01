//! Without a guest: this process touches the memory.

use super::*;

const PAGES: u64 = 512;

/// Whether this process may; says so and fails where everything must run.
fn allowed() -> bool {
    if Uffd::new().is_ok() {
        return true;
    }
    println!("skipped: userfaultfd is not allowed");
    assert!(std::env::var_os("VPMU_REQUIRE_KVM").is_none_or(|v| v != "1"), "userfaultfd is not allowed");
    false
}

struct Never;

impl PageSource for Never {
    fn fetch(&self, _: u64, _: u64, _: bool, _: &Placer) -> Result<(), String> {
        Ok(())
    }
}

fn memory() -> GuestMemory {
    GuestMemory::new("lazy", PAGES * PAGE_SIZE).expect("memory")
}

fn begin(memory: &GuestMemory, missing: &[u64]) -> LazyMemory {
    let mut set = PageBitmap::new(PAGES);
    for page in missing {
        set.set(*page);
    }
    LazyMemory::begin(memory, set, Arc::new(Never), None, Box::new(|_| {})).expect("begun")
}

#[test]
fn what_is_not_missing_is_zero_or_what_it_was() {
    if !allowed() {
        return;
    }
    let memory = memory();
    memory.write_at(3 * PAGE_SIZE, &[9; 8]).expect("inside");
    let lazy = begin(&memory, &[5]);
    let mut word = [1u8; 8];
    memory.read_at(3 * PAGE_SIZE, &mut word).expect("inside");
    assert_eq!(word, [9; 8]);
    memory.read_at(4 * PAGE_SIZE, &mut word).expect("inside");
    assert_eq!(word, [0; 8]);
    // The fault is counted after whoever waited for it was woken.
    let deadline = Instant::now() + Duration::from_secs(20);
    while lazy.stats().zero == 0 {
        assert!(Instant::now() < deadline, "{lazy:?}");
        std::thread::yield_now();
    }
    let stats = lazy.stats();
    assert_eq!((stats.faults, stats.zero, stats.demanded, stats.missing), (1, 1, 0, 1));
    lazy.placer().place(5, &[7; 4096]).expect("placed");
    assert!(matches!(lazy.outcome(), Some(Ok(()))));
    memory.read_at(5 * PAGE_SIZE, &mut word).expect("inside");
    assert_eq!(word, [7; 8]);
    assert!(lazy.missing().is_empty());
}

#[test]
fn runs_are_placed_around_what_is_there() {
    if !allowed() {
        return;
    }
    let memory = memory();
    let lazy = begin(&memory, &[10, 11, 12, 14, 15]);
    let placer = lazy.placer();
    placer.place(12, &[2; 4096]).expect("placed");
    let all: Vec<u8> = (10..16u8).flat_map(|page| [page; 4096]).collect();
    placer.place(10, &all).expect("placed");
    assert!(matches!(lazy.outcome(), Some(Ok(()))));
    let stats = lazy.stats();
    assert_eq!((stats.placed, stats.late), (5, 2));
    let first_of = |page: u64| {
        let mut byte = [0u8];
        memory.read_at(page * PAGE_SIZE, &mut byte).expect("inside");
        byte[0]
    };
    assert_eq!([10, 11, 12, 13, 14, 15].map(first_of), [10, 11, 2, 0, 14, 15]);
}

#[test]
fn bad_places_are_refused_and_an_abandoned_guest_is_told_once() {
    if !allowed() {
        return;
    }
    let memory = memory();
    let (send, told) = std::sync::mpsc::channel();
    let mut set = PageBitmap::new(PAGES);
    set.set_range(0, 4);
    let on_end: OnEnd = Box::new(move |how| send.send(how).expect("told"));
    let lazy = LazyMemory::begin(&memory, set, Arc::new(Never), None, on_end).expect("begun");
    let placer = lazy.placer();
    for (first, bytes) in [(PAGES, 4096), (PAGES - 1, 8192), (u64::MAX, 4096), (0, 4095), (0, 4097)] {
        let error = placer.place(first, &vec![0; bytes]).expect_err("refused");
        assert_eq!(error.reason(), "LAZY_MEMORY_PLACE_FAILED", "{first} {bytes}");
    }
    assert_eq!(lazy.missing().count(), 4);
    placer.place_zero(0, 1).expect("placed");
    lazy.abandon("enough");
    drop(lazy);
    let error = told.recv().expect("told").expect_err("abandoned");
    assert_eq!(error.reason(), "LAZY_MEMORY_ABANDONED");
    assert!(error.to_string().contains("3 pages missing: enough"), "{error}");
    assert!(told.recv().is_err(), "once");
    placer.place(1, &[0; 4096]).expect("after the end nothing happens");
    let wrong = LazyMemory::begin(&memory, PageBitmap::new(7), Arc::new(Never), None, Box::new(|_| {}));
    assert_eq!(wrong.expect_err("refused").reason(), "LAZY_MEMORY_REFUSED");
}

#[test]
fn nothing_missing_is_complete_at_once() {
    if !allowed() {
        return;
    }
    let lazy = begin(&memory(), &[]);
    assert!(matches!(lazy.wait(Duration::ZERO), Some(Ok(()))));
}
