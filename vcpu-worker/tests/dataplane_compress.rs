//! Compressed pages: what arrives is what was there, and the wire carries less where there is less to be said.

mod dataplane_support;

use std::sync::atomic::Ordering;

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::{CancelFlag, Compression, ConnectOptions, Outgoing};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

/// Pages that shrink, pages that do not, pages that are zero.
fn mixed(bytes: u64) -> GuestMemory {
    let memory = GuestMemory::new("source", bytes).expect("memory");
    let mut random = Random(77);
    for page in 0..memory.pages() {
        let content = match page / 64 % 3 {
            0 => format!("page {page:>10} ").repeat(256).into_bytes(),
            1 => random.page(),
            _ => continue,
        };
        memory.write_at(page * PAGE_SIZE, &content[..PAGE_SIZE as usize]).expect("inside memory");
    }
    memory
}

/// Returns bytes of pages before and on the wire.
fn moved(compression: Compression, connections: u16, source: &GuestMemory) -> (u64, u64) {
    let destination = destination(&tcp(), connections, source.bytes());
    let options = ConnectOptions { compression, ..options(connections) };
    let mut out =
        Outgoing::open(&destination.address, &session(), source.clone(), CancelFlag::new(), options)
            .expect("connect");
    assert_eq!(out.compression(), compression);
    // Three ways into memory: the first round, a live one, the stopped guest's.
    let first = out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round 1");
    for (round, live) in [(2, true), (3, false)] {
        let mut again = PageBitmap::new(source.pages());
        for page in (0..source.pages()).step_by(7) {
            source.write_at(page * PAGE_SIZE + 100, &[round as u8; 32]).expect("inside memory");
            again.set(page);
        }
        out.send_round(round, &again, live).expect("round");
    }
    let progress = out.progress();
    let finish = out.finish(b"state").expect("finish");
    let memory = destination.memory.clone();
    let received = destination.join().expect("received");
    assert_same(source, &memory);
    assert_eq!(received.counts.pages, finish.pages);
    assert_eq!(received.bytes, finish.bytes, "both sides count the same bytes");
    let before = progress.page_bytes.load(Ordering::Relaxed);
    assert_eq!(before, finish.pages * PAGE_SIZE);
    assert!(first.pages > 0);
    (before, progress.page_wire_bytes.load(Ordering::Relaxed))
}

#[test]
fn half_of_it_shrinks_and_the_rest_goes_as_it_is() {
    let source = mixed(24 * MIB);
    for connections in [1, 3] {
        let (raw, plain) = moved(Compression::None, connections, &source);
        assert!(plain > raw, "headers cost something");
        for compression in [Compression::Lz4, Compression::Zstd] {
            let (before, after) = moved(compression, connections, &source);
            // The other half does not shrink; how much of the first is not tried after it depends on how the
            // connections share the pages.
            assert!(after * 100 < before * 75, "{compression:?}: {before} bytes became {after}");
        }
    }
}

#[test]
fn auto_loses_nothing_and_adds_next_to_nothing() {
    let source = mixed(24 * MIB);
    let (before, after) = moved(Compression::Auto, 2, &source);
    assert!(after * 100 < before * 101, "{before} bytes became {after}");
}

#[test]
fn a_destination_of_protocol_1_gets_pages_as_they_are() {
    let source = mixed(4 * MIB);
    let destination = destination(&tcp(), 1, source.bytes());
    let options = ConnectOptions { compression: Compression::Zstd, versions: 1..=1, ..options(1) };
    let mut out =
        Outgoing::open(&destination.address, &session(), source.clone(), CancelFlag::new(), options)
            .expect("connect");
    assert_eq!((out.version(), out.compression()), (1, Compression::None));
    out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round 1");
    out.finish(b"state").expect("finish");
    let memory = destination.memory.clone();
    destination.join().expect("received");
    assert_same(&source, &memory);
}
