//! A guest on KVM whose memory comes while it runs: 4096 pages touched in random order.

use std::collections::VecDeque;
use std::sync::mpsc;

use parking_lot::{Condvar, Mutex};

use super::*;
use crate::lazy::{LazyError, LazyMemory, LazyStats, OnEnd, PageSource, Placer};

const PAGES: u64 = 4096;
/// The lazy area begins here; the guest's own pages are below.
const AREA: u64 = 16 * MIB;
const TABLE: u64 = 0x3_0000;
const LONG: Duration = Duration::from_secs(60);

fn page_bytes(page: u64) -> Vec<u8> {
    (0..PAGE_SIZE / 8).flat_map(|word| content(page, word).to_le_bytes()).collect()
}

fn content(page: u64, word: u64) -> u64 {
    (page << 16 | word).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1
}

fn order() -> Vec<u64> {
    let mut order: Vec<u64> = (0..PAGES).collect();
    let mut x = 99u64;
    for at in (1..order.len()).rev() {
        x = x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        order.swap(at, (x >> 33) as usize % (at + 1));
    }
    order
}

/// What the guest must have in rax after `count` pages.
fn mixed(order: &[u64], first: u64, count: usize) -> u64 {
    order[..count].iter().fold(0u64, |sum, page| sum.rotate_left(7) ^ content(first + page, 1))
}

/// How a source answers.
enum Manner {
    /// At once.
    Pull,
    /// Only pages demanded before this many; then an error.
    FailAfter(u64),
    /// Never by itself: the test takes requests out of `asked`.
    Silent,
}

struct Source {
    manner: Manner,
    first: u64,
    fetched: Mutex<Vec<u32>>,
    asked: Mutex<VecDeque<u64>>,
    came: Condvar,
}

impl Source {
    fn new(manner: Manner, first: u64) -> Arc<Self> {
        Arc::new(Self {
            manner,
            first,
            fetched: Mutex::new(vec![0; PAGES as usize]),
            asked: Mutex::default(),
            came: Condvar::new(),
        })
    }

    fn next_asked(&self) -> u64 {
        let mut asked = self.asked.lock();
        while asked.is_empty() {
            assert!(!self.came.wait_for(&mut asked, LONG).timed_out(), "a page is asked for");
        }
        asked.pop_front().expect("not empty")
    }
}

impl PageSource for Source {
    fn fetch(&self, first: u64, pages: u64, _urgent: bool, into: &Placer) -> Result<(), String> {
        for page in first..first + pages {
            let mut fetched = self.fetched.lock();
            fetched[(page - self.first) as usize] += 1;
            let so_far = fetched.iter().map(|n| u64::from(*n)).sum::<u64>();
            drop(fetched);
            match self.manner {
                Manner::Pull => into.place(page, &page_bytes(page)).map_err(|e| e.to_string())?,
                Manner::FailAfter(most) if so_far > most => return Err("the other side is gone".to_owned()),
                Manner::FailAfter(_) => into.place(page, &page_bytes(page)).map_err(|e| e.to_string())?,
                Manner::Silent => {
                    self.asked.lock().push_back(page);
                    self.came.notify_all();
                }
            }
        }
        Ok(())
    }
}

struct Rig {
    memory: GuestMemory,
    first: u64,
    order: Vec<u64>,
    _vm: Arc<KvmVm>,
    vcpu: KvmVcpu,
}

/// A guest that will touch every page, and the missing set.
fn rig() -> (Rig, PageBitmap) {
    let memory = memory(64 * MIB);
    let order = order();
    for (at, page) in (0u64..).zip(&order) {
        memory.store_u64(TABLE + at * 8, *page).expect("inside");
    }
    for (at, value) in [(0, PAGES), (8, AREA), (16, TABLE)] {
        memory.store_u64(RESULT + at, value).expect("inside");
    }
    let first = AREA / PAGE_SIZE;
    // Stale content: must never be seen.
    memory.write_at(AREA, &vec![0xee; (PAGES * PAGE_SIZE) as usize]).expect("inside");
    let (vm, vcpu) = start(&memory, guest::touch(), EntryMode::LongUser);
    set_general(&vcpu, |r| (r.rax, r.rdi) = (0, 0));
    let mut missing = PageBitmap::new(memory.pages());
    missing.set_range(first, PAGES);
    (Rig { memory, first, order, _vm: vm, vcpu }, missing)
}

fn told() -> (OnEnd, mpsc::Receiver<Result<LazyStats, LazyError>>) {
    let (send, receive) = mpsc::channel();
    (Box::new(move |how| send.send(how).expect("told")), receive)
}

fn finish(rig: &mut Rig) {
    let expected = mixed(&rig.order, rig.first, rig.order.len());
    assert_eq!(
        rig.vcpu.run().expect("run"),
        Exit::MmioWrite { addr: DEVICE, size: 8, data: expected },
        "the guest read every page's content"
    );
}

fn verify_memory(rig: &Rig) {
    let mut sum = 0u64;
    for page in &rig.order {
        sum = sum.rotate_left(7) ^ content(rig.first + page, 1);
        let mut wanted = page_bytes(rig.first + page);
        wanted[16..24].copy_from_slice(&sum.to_le_bytes());
        let mut seen = vec![0; PAGE_SIZE as usize];
        rig.memory.read_at((rig.first + page) * PAGE_SIZE, &mut seen).expect("inside");
        assert!(seen == wanted, "page {page}: content, and the guest's own word");
    }
}

#[test]
fn lazy_pages_are_demanded_once_each_in_the_guests_order() {
    if !require_kvm() {
        return;
    }
    let (mut rig, missing) = rig();
    let source = Source::new(Manner::Pull, rig.first);
    let (on_end, end) = told();
    let lazy = LazyMemory::begin(&rig.memory, missing, source.clone(), None, on_end).expect("begun");
    assert_eq!(lazy.missing().count(), PAGES);
    let begin = Instant::now();
    finish(&mut rig);
    println!("{:.1} us a page", begin.elapsed().as_secs_f64() * 1e6 / PAGES as f64);
    lazy.wait(LONG).expect("ends").expect("complete");
    let stats = end.recv().expect("told once").expect("complete");
    assert_eq!(
        (stats.demanded, stats.prefetched, stats.placed, stats.late, stats.missing),
        (PAGES, 0, PAGES, 0, 0)
    );
    assert!(source.fetched.lock().iter().all(|n| *n == 1), "none twice");
    // A copy that comes too late changes nothing.
    lazy.placer().place(rig.first, &vec![0x77; 4096]).expect("ignored");
    verify_memory(&rig);
}

#[test]
fn lazy_pages_come_in_the_background_too_and_none_twice() {
    if !require_kvm() {
        return;
    }
    let (mut rig, missing) = rig();
    let source = Source::new(Manner::Pull, rig.first);
    let (on_end, end) = told();
    let lazy = LazyMemory::begin(&rig.memory, missing, source.clone(), Some(64), on_end).expect("begun");
    finish(&mut rig);
    lazy.wait(LONG).expect("ends").expect("complete");
    let stats = end.recv().expect("told once").expect("complete");
    assert_eq!((stats.demanded + stats.prefetched, stats.placed, stats.late), (PAGES, PAGES, 0));
    assert!(stats.prefetched > 0);
    assert!(source.fetched.lock().iter().all(|n| *n == 1), "none twice");
    verify_memory(&rig);
}

/// A kick gets a vCPU out of a fault that nobody answers; it goes on where it was when the page comes, from whichever
/// thread, once or twice.
#[test]
fn a_vcpu_that_waits_for_a_page_can_be_kicked() {
    if !require_kvm() {
        return;
    }
    let (mut rig, missing) = rig();
    let source = Source::new(Manner::Silent, rig.first);
    let (on_end, end) = told();
    let lazy = LazyMemory::begin(&rig.memory, missing, source.clone(), None, on_end).expect("begun");
    let (placer, kicker) = (lazy.placer(), rig.vcpu.kicker());
    let (to_kick, kicks) = mpsc::channel::<u64>();
    let (from_run, runs) = mpsc::channel::<u64>();
    let answering = {
        let (source, order, first) = (Arc::clone(&source), rig.order.clone(), rig.first);
        std::thread::spawn(move || {
            for page in &order {
                let asked = source.next_asked();
                assert_eq!(asked, first + page, "the page that the guest touches next");
                if page % 1024 == 7 {
                    kicker.kick();
                    to_kick.send(asked).expect("sent");
                    assert_eq!(runs.recv().expect("the vCPU came out"), asked);
                }
                let bytes = page_bytes(asked);
                placer.place(asked, &bytes).expect("placed");
                placer.place(asked, &[0x55; 4096]).expect("dropped");
            }
        })
    };
    let mut interrupted = 0;
    let expected = mixed(&rig.order, rig.first, rig.order.len());
    loop {
        match rig.vcpu.run().expect("run") {
            Exit::Interrupted => {
                rig.vcpu.clear_kick();
                interrupted += 1;
                from_run.send(kicks.recv().expect("a kick")).expect("sent");
            }
            exit => {
                assert_eq!(exit, Exit::MmioWrite { addr: DEVICE, size: 8, data: expected });
                break;
            }
        }
    }
    answering.join().expect("answered all");
    assert_eq!(interrupted, 4);
    lazy.wait(LONG).expect("ends").expect("complete");
    let stats = end.recv().expect("told once").expect("complete");
    assert_eq!((stats.demanded, stats.placed), (PAGES, PAGES));
    assert_eq!(stats.late, PAGES - 1, "every page came twice, the last second one after the end");
    verify_memory(&rig);
}

/// When the source is lost the vCPU comes out where it waited, without one instruction on a zero page.
#[test]
fn a_lost_source_gets_the_vcpu_out_before_the_memory_is_released() {
    if !require_kvm() {
        return;
    }
    let (mut rig, missing) = rig();
    let answered = 1000;
    let source = Source::new(Manner::FailAfter(answered), rig.first);
    let kicker = rig.vcpu.kicker();
    let (out, is_out) = mpsc::channel::<()>();
    let (told, end) = mpsc::channel();
    let on_end: OnEnd = Box::new(move |how| {
        kicker.kick();
        is_out.recv_timeout(LONG).expect("the vCPU comes out before the release");
        told.send(how).expect("told");
    });
    let lazy = LazyMemory::begin(&rig.memory, missing, source, None, on_end).expect("begun");
    assert_eq!(rig.vcpu.run().expect("run"), Exit::Interrupted);
    let regs = rig.vcpu.fd.get_regs().expect("regs");
    out.send(()).expect("sent");
    assert_eq!(regs.rdi, answered, "pages touched");
    // The page that failed is in neither the sum nor the count; rax may be rotated already for it.
    let sum = mixed(&rig.order, rig.first, answered as usize);
    assert!(regs.rax == sum || regs.rax == sum.rotate_left(7), "{:#x}", regs.rax);
    let error = lazy.wait(LONG).expect("ends").expect_err("failed");
    assert_eq!(error.reason(), "LAZY_MEMORY_SOURCE_FAILED");
    assert!(error.to_string().contains("the other side is gone"), "{error}");
    assert!(end.recv().expect("told once").is_err());
    // Nothing waits any more.
    let mut seen = [1u8; 8];
    rig.memory.read_at((rig.first + rig.order[2000]) * PAGE_SIZE, &mut seen).expect("inside");
    assert_eq!(seen, [0; 8]);
}
