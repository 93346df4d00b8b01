//! Peers that should not be there, and a peer that is authenticated and lies. Refused by type, nothing breaks, the
//! rightful source is not harmed.

mod dataplane_support;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::frame::{
    DoneTotals, ErrorBody, ErrorCode, FLAG_LZ4, FLAG_ZSTD, Frame, FrameKey, HEADER_BYTES, Header, Hello,
    Kind, PAGE_BYTES, PageRange, RoundCounts, StateChunk, encode_ranges,
};
use vcpu_worker::dataplane::{CancelFlag, DataAddress, DataplaneError, SessionId};
use vcpu_worker::memory::GuestMemory;

const MEMORY: u64 = 8 * MIB;
const PAGES: u64 = MEMORY / PAGE_BYTES;

/// A source written by hand.
struct Raw {
    stream: TcpStream,
    key: FrameKey,
    index: u16,
    sequence: u64,
}

impl Raw {
    fn open(address: &DataAddress, index: u16) -> Self {
        let DataAddress::Tcp(address) = address else { panic!("TCP") };
        let stream = TcpStream::connect(address).expect("connect");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("time-out");
        let session = session();
        Self {
            stream,
            key: FrameKey { migration_id: session.migration_id, attempt: session.attempt },
            index,
            sequence: 0,
        }
    }

    fn introduced(address: &DataAddress, connections: u16, index: u16) -> Self {
        let mut raw = Self::open(address, index);
        raw.hello(session().token, connections, MEMORY);
        assert_eq!(raw.answer().header.kind, Kind::HelloAck);
        raw
    }

    fn hello(&mut self, token: [u8; 32], connections: u16, memory_bytes: u64) {
        self.hello_of(token, connections, memory_bytes, 2);
    }

    fn hello_of(&mut self, token: [u8; 32], connections: u16, memory_bytes: u64, version: u16) {
        let hello = Hello { token, version_min: 1, version_max: version, connections, memory_bytes };
        self.send(Kind::Hello, 0, 0, &hello.encode(), &[]);
    }

    fn frame(&mut self, kind: Kind, round: u32, count: u32, meta: &[u8], data: &[u8]) -> Frame {
        let mut header = Header::new(kind, self.key, round, self.sequence, self.index);
        header.count = count;
        self.sequence += 1;
        Frame { header, meta: meta.to_vec(), data: data.to_vec() }
    }

    fn send(&mut self, kind: Kind, round: u32, count: u32, meta: &[u8], data: &[u8]) {
        let frame = self.frame(kind, round, count, meta, data);
        self.raw(&frame.to_bytes());
    }

    fn raw(&mut self, bytes: &[u8]) {
        // The other side may have hung up on us already, which is what some of these tests want.
        let _ = self.stream.write_all(bytes);
    }

    fn pages(&mut self, round: u32, ranges: &[PageRange], fill: u8) {
        let pages: u64 = ranges.iter().map(|range| range.pages).sum();
        let mut meta = Vec::new();
        encode_ranges(ranges, &mut meta);
        self.send(Kind::Pages, round, pages as u32, &meta, &vec![fill; (pages * PAGE_BYTES) as usize]);
    }

    fn round_end(&mut self, round: u32, frames: u64, pages: u64, zero_pages: u64) {
        self.send(Kind::RoundEnd, round, 0, &RoundCounts { frames, pages, zero_pages }.encode(), &[]);
    }

    fn state(&mut self, offset: u64, total: u64, data: &[u8]) {
        self.send(Kind::State, 1, 0, &StateChunk { offset, total }.encode(), data);
    }

    /// The next frame from the destination.
    fn answer(&mut self) -> Frame {
        let mut bytes = vec![0; HEADER_BYTES];
        self.stream.read_exact(&mut bytes).expect("an answer");
        let header = Header::decode(bytes.first_chunk().expect("a header")).expect("a header");
        let end = HEADER_BYTES + header.meta_len as usize + header.data_len as usize;
        bytes.resize(end, 0);
        self.stream.read_exact(&mut bytes[HEADER_BYTES..]).expect("the rest of it");
        Frame::parse(&bytes, 0).expect("a frame").0
    }

    fn refusal(&mut self) -> ErrorCode {
        let frame = self.answer();
        assert_eq!(frame.header.kind, Kind::Error);
        ErrorBody::decode(&frame.meta).expect("a reason").code
    }
}

/// What an authenticated peer does is answered with this reason and code, and the memory keeps its zeros.
fn lie(reason: &str, code: ErrorCode, act: impl FnOnce(&mut Raw)) {
    let destination = destination(&tcp(), 1, MEMORY);
    let mut raw = Raw::introduced(&destination.address, 1, 0);
    act(&mut raw);
    assert_eq!(raw.refusal(), code, "{reason}");
    let memory = destination.memory.clone();
    let error = destination.join().expect_err("refused");
    assert_eq!(error.reason(), reason, "{error}");
    assert!(memory.resident_pages().expect("tmpfs").is_empty(), "{reason}: nothing was written");
}

const ONE: PageRange = PageRange { first: 5, pages: 1 };

#[test]
fn lies_about_pages() {
    lie("FRAME_RANGE", ErrorCode::Frame, |raw| raw.pages(1, &[PageRange { first: PAGES, pages: 1 }], 1));
    lie("FRAME_RANGE", ErrorCode::Frame, |raw| raw.pages(1, &[PageRange { first: PAGES - 1, pages: 2 }], 1));
    lie("FRAME_RANGE", ErrorCode::Frame, |raw| raw.pages(1, &[ONE, ONE], 1));
    lie("FRAME_RANGE", ErrorCode::Frame, |raw| {
        let mut meta = Vec::new();
        encode_ranges(&[PageRange { first: 0, pages: 1 << 20 }], &mut meta);
        raw.send(Kind::Zero, 1, 1 << 20, &meta, &[]);
    });
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| {
        let mut meta = Vec::new();
        encode_ranges(&[PageRange { first: 0, pages: 3 }], &mut meta);
        raw.send(Kind::Pages, 1, 2, &meta, &[1; 8192]);
    });
}

/// A frame of compressed pages whose data is `data`, said to be `pages` pages.
fn packed(raw: &mut Raw, flags: u8, pages: u64, data: &[u8]) {
    let mut meta = Vec::new();
    encode_ranges(&[PageRange { first: 5, pages }], &mut meta);
    let mut frame = raw.frame(Kind::Packed, 1, pages as u32, &meta, data);
    frame.header.flags = flags;
    raw.raw(&frame.to_bytes());
}

#[test]
fn lies_about_compressed_pages() {
    let page = [7; PAGE_BYTES as usize];
    let lz4 = lz4_flex::block::compress(&page);
    let zstd = zstd::bulk::compress(&page, 1).expect("compressed");
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).expect("compressed");
    // Damaged, of another length than said, of the other algorithm, a bomb.
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4, 1, &[0xff; 200]));
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4, 2, &lz4));
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_ZSTD, 2, &zstd));
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_ZSTD, 1, &lz4));
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4, 1, &zstd));
    lie("FRAME_PACKED", ErrorCode::Frame, |raw| packed(raw, FLAG_ZSTD, 256, &bomb));
    // No algorithm, two of them, not smaller, more pages than a frame has.
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| packed(raw, 0, 1, &lz4));
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4 | FLAG_ZSTD, 1, &lz4));
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4, 1, &page));
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| packed(raw, FLAG_LZ4, 257, &lz4));
    lie("FRAME_RANGE", ErrorCode::Frame, |raw| {
        let mut meta = Vec::new();
        encode_ranges(&[PageRange { first: PAGES, pages: 1 }], &mut meta);
        let mut frame = raw.frame(Kind::Packed, 1, 1, &meta, &lz4);
        frame.header.flags = FLAG_LZ4;
        raw.raw(&frame.to_bytes());
    });
}

#[test]
fn a_peer_of_protocol_1_may_not_send_what_it_has_not() {
    let destination = destination(&tcp(), 1, MEMORY);
    let mut raw = Raw::open(&destination.address, 0);
    raw.hello_of(session().token, 1, MEMORY, 1);
    let ack = raw.answer();
    assert_eq!((ack.header.kind, ack.meta), (Kind::HelloAck, vec![1, 0]));
    packed(&mut raw, FLAG_LZ4, 1, &lz4_flex::block::compress(&[7; PAGE_BYTES as usize]));
    assert_eq!(raw.refusal(), ErrorCode::Order);
    assert_eq!(destination.join().expect_err("refused").reason(), "DATA_ORDER");
}

#[test]
fn lies_about_order() {
    lie("DATA_ORDER", ErrorCode::Order, |raw| raw.pages(2, &[ONE], 1));
    lie("DATA_ORDER", ErrorCode::Order, |raw| raw.pages(0, &[ONE], 1));
    lie("DATA_ORDER", ErrorCode::Order, |raw| raw.hello(session().token, 1, MEMORY));
    lie("DATA_ORDER", ErrorCode::Order, |raw| raw.state(0, 1, b"s"));
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.send(Kind::Done, 0, 0, &DoneTotals::default().encode(), &[]);
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| raw.send(Kind::Applied, 1, 0, &[], &[]));
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.sequence += 1;
        raw.pages(1, &[ONE], 1);
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        // The same frame again.
        let frame = raw.frame(Kind::RoundEnd, 1, 0, &RoundCounts::default().encode(), &[]).to_bytes();
        raw.raw(&frame);
        raw.raw(&frame);
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.index = 1;
        raw.pages(1, &[ONE], 1);
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.round_end(1, 0, 0, 0);
    });
}

#[test]
fn late_frames_of_another_attempt_are_not_used() {
    lie("DATA_STALE_FRAME", ErrorCode::WrongSession, |raw| {
        raw.key.attempt -= 1;
        raw.pages(1, &[ONE], 1);
    });
    lie("DATA_STALE_FRAME", ErrorCode::WrongSession, |raw| {
        raw.key.migration_id[3] ^= 1;
        raw.pages(1, &[ONE], 1);
    });
}

#[test]
fn lies_about_counts_and_state() {
    lie("DATA_COUNTS", ErrorCode::Counts, |raw| raw.round_end(1, 1, 1, 0));
    lie("DATA_COUNTS", ErrorCode::Counts, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 4, b"stat");
        let done = DoneTotals { rounds: 7, state_bytes: 4, ..DoneTotals::default() };
        raw.send(Kind::Done, 1, 0, &done.encode(), &[]);
    });
    lie("DATA_COUNTS", ErrorCode::Counts, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 9, b"stat");
        let done = DoneTotals { rounds: 1, state_bytes: 9, ..DoneTotals::default() };
        raw.send(Kind::Done, 1, 0, &done.encode(), &[]);
    });
    lie("DATA_DIGEST", ErrorCode::Checksum, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 4, b"stat");
        let done = DoneTotals { rounds: 1, state_bytes: 4, ..DoneTotals::default() };
        raw.send(Kind::Done, 1, 0, &done.encode(), &[]);
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 4, b"state");
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 8, b"stat");
        raw.state(0, 8, b"stat");
    });
    lie("DATA_ORDER", ErrorCode::Order, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, 8, b"stat");
        raw.pages(2, &[ONE], 1);
    });
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| {
        raw.round_end(1, 0, 0, 0);
        raw.state(0, (64 << 20) + 1, b"s");
    });
}

#[test]
fn lies_about_lengths_and_plain_garbage() {
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| {
        let mut header = raw.frame(Kind::State, 1, 0, &[], &[]).header;
        (header.meta_len, header.data_len) = (16, u32::MAX);
        raw.raw(&header.encode());
    });
    lie("FRAME_FIELD", ErrorCode::Frame, |raw| {
        let mut header = raw.frame(Kind::Zero, 1, 1, &[], &[]).header;
        header.meta_len = u32::MAX - 7;
        raw.raw(&header.encode());
    });
    lie("FRAME_MAGIC", ErrorCode::Frame, |raw| raw.raw(&[0xff; 200]));
    lie("FRAME_CHECKSUM", ErrorCode::Checksum, |raw| {
        let mut bytes = raw.frame(Kind::RoundEnd, 1, 0, &RoundCounts::default().encode(), &[]).to_bytes();
        bytes[30] ^= 4;
        raw.raw(&bytes);
    });
    let mut random = Random(77);
    for _ in 0..20 {
        let mut garbage = random.page();
        // Not by chance a frame.
        garbage[0] = 0;
        lie("FRAME_MAGIC", ErrorCode::Frame, |raw| raw.raw(&garbage));
    }
}

/// Any valid prefix followed by anything: an error or a wait that the hang-up ends, never a panic. With
/// `VPMU_FUZZ_SECONDS` it goes on for that long, from another seed each time.
#[test]
fn random_frames_never_panic() {
    let seconds: u64 = std::env::var("VPMU_FUZZ_SECONDS").map_or(0, |text| text.parse().expect("a number"));
    let seed = if seconds > 0 { u64::from(std::process::id()) << 20 | 1 } else { 4242 };
    println!("seed {seed}");
    let mut random = Random(seed);
    let end = Instant::now() + Duration::from_secs(seconds);
    let mut turns = 0;
    while turns < 60 || Instant::now() < end {
        turns += 1;
        let destination = destination(&tcp(), 1, MEMORY);
        let mut raw = Raw::introduced(&destination.address, 1, 0);
        for _ in 0..random.below(6) {
            let first = random.below(PAGES);
            let range = PageRange { first, pages: 1 + random.below(4) };
            let round = random.below(3) as u32;
            match random.below(6) {
                0 | 1 => raw.pages(1, &[range], 9),
                2 => raw.round_end(round, random.below(2), random.below(2), 0),
                3 => raw.state(random.below(2), random.below(3), b"x"),
                4 => raw.send(Kind::Done, round, 0, &DoneTotals::default().encode(), &[]),
                _ => {
                    let mut bytes = raw.frame(Kind::RoundAck, round, 0, &[], &[]).to_bytes();
                    let at = random.below(bytes.len() as u64) as usize;
                    bytes[at] ^= 1 << random.below(8);
                    raw.raw(&bytes);
                }
            }
        }
        drop(raw);
        destination.join().expect_err("no migration came of it");
    }
}

#[test]
fn strangers_are_told_and_the_rightful_source_gets_through() {
    let destination = destination(&tcp(), 2, MEMORY);
    let source = GuestMemory::new("source", MEMORY).expect("memory");
    fill(&source, 8, 2);
    let other = |change: fn(&mut SessionId)| {
        let mut session = session();
        change(&mut session);
        session
    };
    let refused = |session: &SessionId, connections, memory: &GuestMemory| match destination.try_connect(
        session,
        connections,
        memory,
        &CancelFlag::new(),
    ) {
        Err(DataplaneError::Refused { code, .. }) => code,
        other => panic!("refused, not {other:?}"),
    };
    // Strangers that say nothing, too little, or something else, and stay.
    let silent = Raw::open(&destination.address, 0);
    let mut half = Raw::open(&destination.address, 0);
    half.raw(&[0x56, 0x50]);
    let mut web = Raw::open(&destination.address, 0);
    web.raw(&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".repeat(10));
    let mut gone = [0; 1];
    assert_eq!(web.stream.read(&mut gone).unwrap_or(0), 0, "hung up without a word");
    drop(Raw::open(&destination.address, 1));

    assert_eq!(refused(&other(|s| s.token[31] ^= 1), 2, &source), ErrorCode::Unauthorized);
    assert_eq!(refused(&other(|s| s.attempt += 1), 2, &source), ErrorCode::WrongSession);
    assert_eq!(refused(&other(|s| s.attempt -= 1), 2, &source), ErrorCode::WrongSession);
    assert_eq!(refused(&other(|s| s.migration_id[0] ^= 1), 2, &source), ErrorCode::WrongSession);
    assert_eq!(refused(&session(), 3, &source), ErrorCode::Mismatch);
    let small = GuestMemory::new("small", MEMORY / 2).expect("memory");
    assert_eq!(refused(&session(), 2, &small), ErrorCode::Mismatch);

    let mut beyond = Raw::open(&destination.address, 2);
    beyond.hello(session().token, 2, MEMORY);
    assert_eq!(beyond.refusal(), ErrorCode::Mismatch);
    let mut future = Raw::open(&destination.address, 0);
    let hello = Hello {
        token: session().token,
        version_min: 4,
        version_max: 5,
        connections: 2,
        memory_bytes: MEMORY,
    };
    future.send(Kind::Hello, 0, 0, &hello.encode(), &[]);
    assert_eq!(future.refusal(), ErrorCode::Version);

    let mut out = destination.connect(2, &source);
    out.send_round(1, &PageBitmap::full(source.pages()), true).expect("round");
    out.finish(b"state").expect("finish");
    let memory = destination.memory.clone();
    destination.join().expect("received");
    assert_same(&source, &memory);
    drop((silent, half));
}

/// The window is full before the destination gives up: it must be told, and not be left probing.
#[test]
fn a_source_that_cannot_be_stopped_is_cut_off_and_can_read_why() {
    let destination = destination(&tcp(), 2, MEMORY);
    let mut flood = Raw::introduced(&destination.address, 2, 0);
    // Nothing is read of it before the second connection has come.
    let garbage = vec![0; 1 << 20];
    flood.stream.set_nonblocking(true).expect("an option");
    while flood.stream.write(&garbage).is_ok() {}
    flood.stream.set_nonblocking(false).expect("an option");
    flood.stream.set_write_timeout(Some(PATIENT.stall)).expect("an option");
    let other = Raw::introduced(&destination.address, 2, 1);
    let cut = loop {
        if let Err(error) = flood.stream.write(&garbage) {
            break error;
        }
    };
    assert!(
        matches!(cut.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe),
        "no time-out: {cut:?}"
    );
    assert_eq!(flood.refusal(), ErrorCode::Frame);
    assert_eq!(destination.join().expect_err("garbage").reason(), "FRAME_MAGIC");
    drop(other);
}

#[test]
fn a_second_connection_with_a_taken_index_is_refused_and_the_first_stays() {
    let destination = destination(&tcp(), 2, MEMORY);
    let mut first = Raw::introduced(&destination.address, 2, 0);
    let mut twin = Raw::open(&destination.address, 0);
    twin.hello(session().token, 2, MEMORY);
    assert_eq!(twin.refusal(), ErrorCode::DuplicateConnection);
    let mut second = Raw::introduced(&destination.address, 2, 1);
    second.round_end(1, 0, 0, 0);
    first.pages(1, &[ONE], 7);
    first.round_end(1, 1, 1, 0);
    // State on the wrong connection ends it, and both connections are told.
    second.state(0, 1, b"s");
    assert_eq!(second.refusal(), ErrorCode::Order);
    assert_eq!(first.refusal(), ErrorCode::Order);
    assert_eq!(destination.join().expect_err("refused").reason(), "DATA_ORDER");
}
