use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::frame::{
    DoneTotals, ErrorCode, FLAG_MORE, FLAG_RESUME, Frame, FrameKey, Header, HelloAck, Kind, MAX_WANTED,
    PageRange, Receipt, RoundCounts, encode_ranges,
};
use super::super::{
    CancelFlag, ConnectOptions, DataAddress, DataplaneError, Identity, Incoming, Outgoing, SessionId,
    Timeouts, Tls,
};
use super::*;
use crate::bitmap::PageBitmap;
use crate::lazy::{LazyError, LazyMemory, LazyStats};
use crate::memory::{GuestMemory, PAGE_SIZE};

const BYTES: u64 = 8 << 20;
const PATIENT: Duration = Duration::from_secs(60);

fn session() -> SessionId {
    SessionId { migration_id: [7; 16], attempt: 1, token: [9; 32] }
}

fn content(page: u64) -> Vec<u8> {
    // Every eighth page is zero: those travel by name.
    let seed = if page.is_multiple_of(8) { 0 } else { page * 31 + 1 };
    (0..PAGE_SIZE / 8).flat_map(|i| (seed * (i + 1)).to_le_bytes()).collect()
}

/// Whether userfaultfd is to be had; KVM's hosts have it.
fn possible() -> bool {
    if crate::sys::uffd::Uffd::new().is_ok() {
        return true;
    }
    let required = std::env::var_os("VPMU_REQUIRE_KVM").is_some_and(|v| v == "1");
    assert!(!required, "userfaultfd is required and not there");
    println!("skipped: no userfaultfd");
    false
}

struct Moved {
    source: GuestMemory,
    destination: GuestMemory,
    out: Outgoing,
    left: Left,
    lazy: LazyMemory,
    end: Arc<parking_lot::Mutex<Option<Result<LazyStats, LazyError>>>>,
    pager: std::thread::JoinHandle<Result<(), DataplaneError>>,
    address: DataAddress,
    options: ConnectOptions,
}

/// Moves a guest of which every odd page is left for later. `way` puts something between source and destination.
fn moved(
    tls: bool,
    bandwidth: u64,
    recover: Duration,
    way: impl FnOnce(DataAddress) -> DataAddress,
) -> Moved {
    let source = GuestMemory::new("source", BYTES).expect("memory");
    let destination = GuestMemory::new("destination", BYTES).expect("memory");
    let mut missing = PageBitmap::new(source.pages());
    let mut sent = PageBitmap::new(source.pages());
    for page in 0..source.pages() {
        source.write_at(page * PAGE_SIZE, &content(page)).expect("inside memory");
        if page % 2 == 1 || page.is_multiple_of(8) { missing.set(page) } else { sent.set(page) }
    }
    let timeouts = Timeouts { stall: PATIENT, idle: PATIENT, accept: PATIENT, hello: PATIENT, recover };
    let (ours, theirs) =
        (Arc::new(Identity::generate().expect("made")), Arc::new(Identity::generate().expect("made")));
    let listen = "tcp:127.0.0.1:0".parse().expect("address");
    let mut incoming =
        Incoming::bind(&listen, session(), 1, destination.clone()).expect("bind").with_timeouts(timeouts);
    if tls {
        incoming = incoming.with_tls(Tls::new(Arc::clone(&theirs), ours.fingerprint()));
    }
    let address = way(incoming.local_address().expect("address"));
    let receiving = std::thread::spawn(move || incoming.run(CancelFlag::new(), &AtomicU64::new(0)));
    let options = ConnectOptions {
        bandwidth,
        timeouts,
        deadline: PATIENT,
        tls: tls.then(|| Tls::new(ours, theirs.fingerprint())),
        ..ConnectOptions::default()
    };
    let mut out = Outgoing::open(&address, &session(), source.clone(), CancelFlag::new(), options.clone())
        .expect("connect");
    out.send_round(1, &sent, false).expect("round");
    out.finish(b"state").expect("finish");
    let mut received = receiving.join().expect("no panic").expect("received");
    let (conn, door, round) = received.take_pages().expect("a connection");
    let pager = Pager::new(Arc::default()).expect("a pager");
    let end = Arc::new(parking_lot::Mutex::new(None));
    let on_end = {
        let (pager, end) = (Arc::clone(&pager), Arc::clone(&end));
        Box::new(move |how: Result<LazyStats, LazyError>| {
            pager.over(how.is_ok());
            *end.lock() = Some(how);
        })
    };
    let asked: Arc<Pager> = Arc::clone(&pager);
    let lazy = LazyMemory::begin(&destination, missing.clone(), asked, None, on_end).expect("lazy memory");
    let placer = lazy.placer();
    let thread = {
        let pager = Arc::clone(&pager);
        std::thread::spawn(move || pager.run(conn, &door, round, &placer))
    };
    let mut left = Left::new(missing);
    pager.applied();
    out.serve(&mut left, Until::Applied(Instant::now() + PATIENT)).expect("applied");
    Moved { source, destination, out, left, lazy, end, pager: thread, address, options }
}

impl Moved {
    /// Serves as the worker does, while somebody reads the memory from its end.
    fn follow(mut self) -> (u32, LazyStats) {
        let mut reopened = 0;
        let reader = {
            let memory = self.destination.clone();
            std::thread::spawn(move || {
                for page in (0..memory.pages()).rev() {
                    let mut found = vec![0; PAGE_SIZE as usize];
                    memory.read_at(page * PAGE_SIZE, &mut found).expect("inside memory");
                    assert!(found == content(page), "page {page}");
                }
            })
        };
        let mut resumed = false;
        while let Err(error) = self.out.serve(&mut self.left, Until::Drained { resumed }) {
            println!("{error}");
            self.out
                .reopen(&self.address, &session(), &CancelFlag::new(), &self.options)
                .expect("the destination waits for us");
            (reopened, resumed) = (reopened + 1, true);
        }
        reader.join().expect("every page is as it was");
        assert!(self.lazy.wait(PATIENT).expect("in time").is_ok());
        self.pager.join().expect("no panic").expect("drained");
        let (mut x, mut y) = (vec![0; BYTES as usize], vec![0; BYTES as usize]);
        self.source.read_at(0, &mut x).expect("inside memory");
        self.destination.read_at(0, &mut y).expect("inside memory");
        assert!(x == y, "what followed is what was there");
        let end = self.end.lock().take().expect("the end was told").expect("all of it");
        (reopened, end)
    }
}

#[test]
fn pages_follow_on_demand_and_by_themselves() {
    if !possible() {
        return;
    }
    for tls in [false, true] {
        let (reopened, stats) = moved(tls, 0, PATIENT, |address| address).follow();
        assert_eq!((reopened, stats.missing, stats.late), (0, 0, 0), "TLS {tls}: each page once: {stats:?}");
        assert_eq!(stats.placed, BYTES / PAGE_SIZE / 2 + BYTES / PAGE_SIZE / 8);
    }
}

/// Passes bytes on and cuts the connection once, when so many have gone to the destination.
fn cutting(to: &DataAddress, after: u64) -> (DataAddress, Arc<AtomicUsize>) {
    let DataAddress::Tcp(to) = *to else { panic!("TCP") };
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(listener.local_addr().expect("address"));
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    std::thread::spawn(move || {
        while let Ok((near, _)) = listener.accept() {
            let first = count.fetch_add(1, Ordering::SeqCst) == 0;
            let far = TcpStream::connect(to).expect("connect");
            let (mut back, mut forth) = (far.try_clone().expect("clone"), near.try_clone().expect("clone"));
            std::thread::spawn(move || {
                let _ = std::io::copy(&mut back, &mut forth);
                let _ = forth.shutdown(Shutdown::Both);
            });
            std::thread::spawn(move || {
                let (mut near, mut far, mut passed) = (near, far, 0);
                let mut piece = vec![0; 16 << 10];
                while let Ok(n @ 1..) = near.read(&mut piece) {
                    passed += n as u64;
                    if (first && passed > after) || far.write_all(&piece[..n]).is_err() {
                        break;
                    }
                }
                let _ = near.shutdown(Shutdown::Both);
                let _ = far.shutdown(Shutdown::Both);
            });
        }
    });
    (address, taken)
}

#[test]
fn a_lost_connection_is_opened_anew_and_the_rest_follows() {
    if !possible() {
        return;
    }
    let mut taken = None;
    // 3 MiB go before it moves, 4 after.
    let moved = moved(true, 0, PATIENT, |address| {
        let (address, count) = cutting(&address, 5 << 20);
        taken = Some(count);
        address
    });
    let (reopened, stats) = moved.follow();
    assert_eq!((reopened, taken.map(|n| n.load(Ordering::SeqCst))), (1, Some(2)));
    assert_eq!(stats.missing, 0, "{stats:?}");
}

#[test]
fn a_source_that_does_not_come_back_is_told_to_the_guest() {
    if !possible() {
        return;
    }
    let moved = moved(false, 0, Duration::from_millis(300), |address| address);
    drop(moved.out);
    assert!(moved.lazy.wait(PATIENT).expect("in time").is_err());
    let end = moved.end.lock().take().expect("the end was told");
    assert_eq!(end.expect_err("not all of it").reason(), "LAZY_MEMORY_SOURCE_FAILED");
    assert_eq!(moved.pager.join().expect("no panic").expect_err("lost").reason(), "DATA_TIMEOUT");
}

/// Page 5, which the source is to give out later.
const LATER: PageRange = PageRange { first: 5, pages: 1 };

/// A destination written by hand.
struct Liar {
    stream: TcpStream,
    sequence: u64,
}

impl Liar {
    fn send(&mut self, kind: Kind, flags: u8, count: u32, meta: &[u8]) {
        self.send_in(2, kind, flags, count, meta);
    }

    fn send_in(&mut self, round: u32, kind: Kind, flags: u8, count: u32, meta: &[u8]) {
        let key = FrameKey { migration_id: session().migration_id, attempt: session().attempt };
        let mut header = Header::new(kind, key, round, self.sequence, 0);
        (header.flags, header.count) = (flags, count);
        self.sequence += 1;
        let frame = Frame { header, meta: meta.to_vec(), data: Vec::new() }.to_bytes();
        self.stream.write_all(&frame).expect("the source listens");
    }

    /// Takes a migration in as it should be, up to the receipt.
    fn take_in(&mut self, version: u16) {
        let (mut all, mut read, mut counts) = (Vec::new(), 0, RoundCounts::default());
        loop {
            let mut piece = vec![0; 64 << 10];
            let n = self.stream.read(&mut piece).expect("bytes");
            all.extend_from_slice(&piece[..n]);
            while let Ok((frame, length)) = Frame::parse(&all[read..], BYTES / PAGE_SIZE) {
                read += length;
                match frame.header.kind {
                    Kind::Hello => self.send_in(0, Kind::HelloAck, 0, 0, &HelloAck { version }.encode()),
                    Kind::RoundEnd => counts = RoundCounts::decode(&frame.meta).expect("counts"),
                    Kind::Done => {
                        let digest = DoneTotals::decode(&frame.meta).expect("totals").digest;
                        return self.send(Kind::Receipt, 0, 0, &Receipt { counts, digest }.encode());
                    }
                    _ => {}
                }
            }
        }
    }
}

fn meta(ranges: &[PageRange]) -> Vec<u8> {
    let mut meta = Vec::new();
    encode_ranges(ranges, &mut meta);
    meta
}

/// What a destination does instead of waiting is answered with this reason: no page is given out for it, and nothing grows.
fn lie(reason: &str, version: u16, act: impl FnOnce(&mut Liar) + Send + 'static) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(listener.local_addr().expect("address"));
    let liar = std::thread::spawn(move || {
        let mut liar = Liar { stream: listener.accept().expect("accept").0, sequence: 0 };
        liar.take_in(version);
        act(&mut liar);
        // Until the source hangs up.
        let _ = std::io::copy(&mut liar.stream, &mut std::io::sink());
    });
    let source = GuestMemory::new("source", BYTES).expect("memory");
    source.write_at(LATER.first * PAGE_SIZE, &content(LATER.first)).expect("inside memory");
    let timeouts =
        Timeouts { stall: PATIENT, idle: PATIENT, accept: PATIENT, hello: PATIENT, recover: PATIENT };
    let options = ConnectOptions { deadline: PATIENT, timeouts, ..ConnectOptions::default() };
    let mut out =
        Outgoing::open(&address, &session(), source.clone(), CancelFlag::new(), options).expect("connect");
    out.send_round(1, &PageBitmap::new(source.pages()), false).expect("round");
    out.finish(b"state").expect("finish");
    let mut missing = PageBitmap::new(source.pages());
    missing.set(LATER.first);
    let (mut left, sent) = (Left::new(missing), out.bytes());
    let error = out.serve(&mut left, Until::Applied(Instant::now() + PATIENT)).expect_err(reason);
    assert_eq!(error.reason(), reason, "{error}");
    assert!(!is_lost(&error), "a liar is not looked for again: {error}");
    assert_eq!((left.count(), out.bytes()), (1, sent), "{reason}: nothing was given out");
    assert!(out.conns.iter().all(|conn| conn.held() < 1 << 20), "{reason}");
    drop(out);
    liar.join().expect("no panic");
}

#[test]
fn lies_of_a_destination_are_refused_by_type() {
    let pages = BYTES / PAGE_SIZE;
    let want = |ranges: &[PageRange]| {
        let (meta, count) = (meta(ranges), ranges.iter().map(|r| r.pages).sum::<u64>() as u32);
        move |liar: &mut Liar| liar.send(Kind::Want, 0, count, &meta)
    };
    lie("FRAME_RANGE", 3, want(&[PageRange { first: pages, pages: 1 }]));
    lie("FRAME_RANGE", 3, want(&[PageRange { first: pages - 1, pages: 2 }]));
    lie("FRAME_RANGE", 3, want(&[PageRange { first: (1 << 44) - 1, pages: 1 }]));
    lie("FRAME_RANGE", 3, want(&[LATER, LATER]));
    lie("FRAME_FIELD", 3, want(&[PageRange { first: 0, pages: u64::from(MAX_WANTED) + 1 }]));
    lie("FRAME_FIELD", 3, want(&[]));
    lie("FRAME_FIELD", 3, |liar| liar.send(Kind::Want, 0, 1, &meta(&[LATER])[..7]));
    lie("FRAME_FIELD", 3, |liar| liar.send(Kind::Want, 0, 2, &meta(&[LATER])));
    lie("FRAME_FIELD", 3, |liar| liar.send(Kind::Want, FLAG_MORE, 1, &meta(&[LATER])));
    // Nothing was lost that there were a list of.
    lie("DATA_ORDER", 3, |liar| liar.send(Kind::Want, FLAG_RESUME, 1, &meta(&[LATER])));
    lie("DATA_ORDER", 3, |liar| liar.send_in(7, Kind::Want, 0, 1, &meta(&[LATER])));
    lie("DATA_ORDER", 3, |liar| liar.send(Kind::Drained, 0, 0, &[]));
    lie("DATA_ORDER", 3, |liar| liar.send(Kind::Zero, 0, 1, &meta(&[LATER])));
    // Versions without it do not get it by asking.
    lie("DATA_ORDER", 2, |liar| liar.send(Kind::Want, 0, 1, &meta(&[LATER])));
    lie("DATA_ORDER", 1, |liar| liar.send(Kind::Want, 0, 1, &meta(&[LATER])));
}

/// An older destination, or one that cannot wait for pages, agrees on an older protocol, which leaves none for later.
#[test]
fn older_protocols_leave_nothing_for_later() {
    for newest in [1, 2] {
        let source = GuestMemory::new("source", BYTES).expect("memory");
        let destination = GuestMemory::new("destination", BYTES).expect("memory");
        let listen = "tcp:127.0.0.1:0".parse().expect("address");
        let incoming =
            Incoming::bind(&listen, session(), 1, destination).expect("bind").with_versions(1..=newest);
        let address = incoming.local_address().expect("address");
        let receiving = std::thread::spawn(move || incoming.run(CancelFlag::new(), &AtomicU64::new(0)));
        let mut out =
            Outgoing::open(&address, &session(), source, CancelFlag::new(), ConnectOptions::default())
                .expect("connect");
        assert_eq!(out.version(), newest);
        out.send_round(1, &PageBitmap::new(BYTES / PAGE_SIZE), false).expect("round");
        out.finish(b"state").expect("finish");
        let mut received = receiving.join().expect("no panic").expect("received");
        assert_eq!(received.take_pages().expect_err("no such thing").reason(), "DATA_ORDER");
        received.reject("it left pages for later");
        let error = out.await_applied(PATIENT).expect_err("told why");
        assert!(error.to_string().contains("it left pages for later"), "{error}");
    }
}

/// The second half of the recorded stream of version 3 (see `tests/dataplane_recorded.rs`): pages that followed.
#[test]
fn what_version_3_recorded_is_read_to_the_last_page() {
    if !possible() {
        return;
    }
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/dataplane_v3.stream");
    let recorded = std::fs::read(path).expect("the recording");
    let session = SessionId { migration_id: *b"0123456789abcdef", attempt: 3, token: [0x5a; 32] };
    let destination = GuestMemory::new("destination", 2 << 20).expect("memory");
    let listen = "tcp:127.0.0.1:0".parse().expect("address");
    let incoming = Incoming::bind(&listen, session, 1, destination.clone()).expect("bind");
    let DataAddress::Tcp(address) = incoming.local_address().expect("address") else { panic!("TCP") };
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.write_all(&recorded).expect("written");
    let mut received = incoming.run(CancelFlag::new(), &AtomicU64::new(0)).expect("received");
    let (conn, door, round) = received.take_pages().expect("a connection");
    let (pager, told) = (Pager::new(Arc::default()).expect("a pager"), Arc::new(AtomicUsize::new(0)));
    let (asked, tells) = (Arc::clone(&pager), Arc::clone(&told));
    let on_end = Box::new(move |how: Result<LazyStats, LazyError>| {
        tells.store(how.expect("all of it").placed as usize, Ordering::SeqCst);
        asked.over(true);
    });
    let mut missing = PageBitmap::new(destination.pages());
    missing.set_range(5, 3);
    let source: Arc<Pager> = Arc::clone(&pager);
    let lazy = LazyMemory::begin(&destination, missing, source, None, on_end).expect("lazy memory");
    pager.applied();
    pager.run(conn, &door, round, &lazy.placer()).expect("drained");
    assert_eq!(told.load(Ordering::SeqCst), 3);
    let mut page = vec![0; PAGE_SIZE as usize];
    for (number, byte) in [(5, b'f'), (6, b'g'), (7, 0)] {
        destination.read_at(number * PAGE_SIZE, &mut page).expect("inside memory");
        assert!(page.iter().all(|found| *found == byte), "page {number}");
    }
}

#[test]
fn a_guest_that_is_given_up_is_told_to_its_source_at_once() {
    if !possible() {
        return;
    }
    // Slow, so that the source is in the middle of it.
    let Moved { mut out, mut left, lazy, pager, .. } = moved(false, 1 << 20, PATIENT, |address| address);
    let serving = std::thread::spawn(move || out.serve(&mut left, Until::Drained { resumed: false }));
    lazy.abandon("it is not wanted any more");
    let error = serving.join().expect("no panic").expect_err("told");
    assert!(matches!(error, DataplaneError::Refused { code: ErrorCode::Cancelled, .. }), "{error}");
    assert_eq!(pager.join().expect("no panic").expect_err("given up").reason(), "DATA_CANCELLED");
}
