//! Memories of real size over real sockets: what arrives is what was there, whatever the guest did meanwhile.

mod dataplane_support;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use dataplane_support::*;
use sha2::{Digest, Sha256};
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::{CancelFlag, DataAddress, Outgoing};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

fn whole(address: &DataAddress, connections: u16, bytes: u64, live: bool) {
    let source = GuestMemory::new("source", bytes).expect("memory");
    fill(&source, 7 + u64::from(connections), 2);
    let destination = destination(address, connections, bytes);
    let mut out = destination.connect(connections, &source);
    let stats = out.send_round(1, &PageBitmap::full(source.pages()), live).expect("round");
    assert_eq!(stats.pages + stats.zero_pages, source.pages());
    assert_eq!(out.sent_pages(), stats.pages);
    // Half of the memory, plus headers and eight bytes a range.
    assert!(stats.bytes < stats.pages * PAGE_SIZE * 1005 / 1000 + 4096, "{} bytes on the wire", stats.bytes);
    let state: Vec<u8> = (0..3 * MIB + 5).map(|i| i as u8).collect();
    let finish = out.finish(&state).expect("finish");
    let memory = destination.memory.clone();
    let mut received = destination.join().expect("received");
    assert_same(&source, &memory);
    assert!(received.state == state, "the state arrives as it was");
    assert_eq!(received.digest, <[u8; 32]>::from(Sha256::digest(&state)));
    assert_eq!(received.digest, finish.digest);
    assert_eq!((received.rounds, finish.rounds), (1, 1));
    assert_eq!(received.counts.pages, finish.pages);
    assert_eq!(received.bytes, finish.bytes, "both sides count the same bytes");
    received.acknowledge().expect("acknowledged");
    assert_eq!(received.acknowledge().expect_err("once").reason(), "DATA_USAGE");
    out.await_applied(Duration::from_secs(30)).expect("applied");
    drop(received);
    if let DataAddress::Unix(path) = address {
        assert!(!path.exists(), "the socket's path is gone");
    }
}

#[test]
fn unix_one_connection_stopped() {
    let dir = tempfile::tempdir().expect("dir");
    whole(&unix(dir.path()), 1, 128 * MIB, false);
}

#[test]
fn unix_four_connections_live() {
    let dir = tempfile::tempdir().expect("dir");
    whole(&unix(dir.path()), 4, 64 * MIB, true);
}

#[test]
fn tcp_one_connection_live() {
    whole(&tcp(), 1, 64 * MIB, true);
}

#[test]
fn tcp_two_connections_stopped() {
    whole(&tcp(), 2, 256 * MIB, false);
}

#[test]
fn tcp_four_connections_live() {
    whole(&tcp(), 4, 64 * MIB, true);
}

#[test]
fn tcp_sixteen_connections_stopped() {
    whole(&tcp(), 16, 64 * MIB, false);
}

/// A thread that writes like a guest and notes what it dirtied like KVM's log does: after the write.
struct Mutator<'a> {
    memory: &'a GuestMemory,
    dirty: Vec<AtomicU64>,
    stop: AtomicBool,
}

impl Mutator<'_> {
    fn run(&self, seed: u64) {
        let mut random = Random(seed);
        while !self.stop.load(Ordering::Acquire) {
            let page = random.below(self.memory.pages());
            match random.below(4) {
                0 => self.memory.write_at(page * PAGE_SIZE, &[0; PAGE_SIZE as usize]),
                1 => self.memory.write_at(page * PAGE_SIZE, &random.page()),
                _ => {
                    self.memory.write_at(page * PAGE_SIZE + random.below(4088), &random.next().to_le_bytes())
                }
            }
            .expect("inside memory");
            self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    fn collect(&self) -> PageBitmap {
        let mut pages = PageBitmap::new(self.memory.pages());
        let words: Vec<u64> = self.dirty.iter().map(|word| word.swap(0, Ordering::AcqRel)).collect();
        pages.or_words(0, &words);
        pages
    }
}

fn under_fire(connections: u16, rounds: u32) {
    let bytes = 64 * MIB;
    let source = GuestMemory::new("source", bytes).expect("memory");
    fill(&source, 99, 3);
    let destination = destination(&tcp(), connections, bytes);
    let mut out = destination.connect(connections, &source);
    let mutator = Mutator {
        memory: &source,
        dirty: (0..source.pages() / 64).map(|_| AtomicU64::new(0)).collect(),
        stop: AtomicBool::new(false),
    };
    let mut dirtied = 0;
    let mut zeroed = 0;
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| mutator.run(1234));
        out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round 1");
        for round in 2..=rounds {
            let pages = mutator.collect();
            dirtied += pages.count();
            let stats = out.send_round(round, &pages, true).expect("live round");
            assert_eq!(stats.pages + stats.zero_pages, pages.count());
            zeroed += stats.zero_pages;
        }
        mutator.stop.store(true, Ordering::Release);
        writer.join().expect("writer");
        out.send_round(rounds + 1, &mutator.collect(), false).expect("last round");
    });
    assert!(dirtied > 0 && zeroed > 0, "the guest wrote ({dirtied}) and zeroed ({zeroed}) pages meanwhile");
    out.finish(b"state").expect("finish");
    let memory = destination.memory.clone();
    destination.join().expect("received");
    assert_same(&source, &memory);
}

#[test]
fn live_mutation_one_connection() {
    under_fire(1, 5);
}

#[test]
fn live_mutation_four_connections() {
    under_fire(4, 8);
}

#[test]
fn untouched_memory_costs_nothing() {
    let bytes = 256 * MIB;
    let source = GuestMemory::new("source", bytes).expect("memory");
    let destination = destination(&tcp(), 2, bytes);
    let mut out = destination.connect(2, &source);
    let stats = out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round");
    assert_eq!((stats.pages, stats.zero_pages), (0, source.pages()));
    assert!(stats.bytes < 1000, "{} bytes", stats.bytes);
    assert!(source.resident_pages().expect("tmpfs").is_empty(), "looking for zero pages allocates none");
    out.finish(b"s").expect("finish");
    assert!(destination.memory.resident_pages().expect("tmpfs").is_empty());
    destination.join().expect("received");
}

#[test]
fn bandwidth_limit_holds() {
    let source = GuestMemory::new("source", 64 * MIB).expect("memory");
    fill(&source, 5, 2);
    for connections in [1, 3] {
        let destination = destination(&tcp(), connections, 64 * MIB);
        let limit = 32 * MIB;
        let deadline = Duration::from_secs(30);
        let mut out = Outgoing::connect(
            &destination.address,
            &session(),
            connections,
            source.clone(),
            limit,
            CancelFlag::new(),
            deadline,
        )
        .expect("connect");
        let begin = Instant::now();
        let stats = out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round");
        let rate = stats.bytes as f64 / begin.elapsed().as_secs_f64();
        // Above the limit never by more than 5 %; below it only as far as a loaded machine holds us up.
        assert!(rate <= limit as f64 * 1.05, "{rate} bytes/s with a limit of {limit}");
        assert!(rate >= limit as f64 * 0.25, "{rate} bytes/s with a limit of {limit}");
        out.finish(b"s").expect("finish");
        destination.join().expect("received");
    }
}
