//! Recorded streams of every protocol version are still understood, and this build still writes the same bytes to a peer
//! of that version.
//!
//! `VPMU_RECORD=1` writes the recordings anew; that is right only together with a new protocol version.

mod dataplane_support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::frame::{Frame, FrameKey, Header, HelloAck, Kind, Receipt, RoundCounts};
use vcpu_worker::dataplane::postcopy::{Left, Until};
use vcpu_worker::dataplane::{CancelFlag, Compression, ConnectOptions, DataAddress, Outgoing};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

const MEMORY: u64 = 2 * MIB;
const STATE: &[u8] = b"the state of a machine";

fn path(version: u16) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("tests/data/dataplane_v{version}.stream"))
}

/// Three pages, one of them zeroed in the second round; from version 2 on a fourth that shrinks, from 3 on two more, which
/// follow after the state with a third one that is zero.
fn source(version: u16) -> GuestMemory {
    let memory = GuestMemory::new("source", MEMORY).expect("memory");
    for page in [1, 2, 40] {
        memory.write_at(page * PAGE_SIZE, &Random(page).page()).expect("inside memory");
    }
    if version > 1 {
        memory.write_at(3 * PAGE_SIZE, &[b'a'; PAGE_SIZE as usize]).expect("inside memory");
    }
    if version > 2 {
        for (page, byte) in [(5, b'f'), (6, b'g')] {
            memory.write_at(page * PAGE_SIZE, &[byte; PAGE_SIZE as usize]).expect("inside memory");
        }
    }
    memory
}

/// What the source of [`source`] writes on its one connection, caught by a listener that answers as a destination would.
fn written_now(version: u16) -> Vec<u8> {
    let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
    let address = DataAddress::Tcp(listener.local_addr().expect("address"));
    let catcher = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        stream.set_read_timeout(Some(Duration::from_secs(30))).expect("time-out");
        let key = FrameKey { migration_id: session().migration_id, attempt: session().attempt };
        let mut all = Vec::new();
        let mut read_to = 0;
        let mut answers = 0;
        let mut counts = RoundCounts::default();
        loop {
            let mut piece = [0; 4096];
            let n = stream.read(&mut piece).expect("bytes");
            all.extend_from_slice(&piece[..n]);
            while let Ok((frame, length)) = Frame::parse(&all[read_to..], MEMORY / PAGE_SIZE) {
                read_to += length;
                let (kind, meta) = match frame.header.kind {
                    Kind::Hello => (Kind::HelloAck, HelloAck { version }.encode()),
                    Kind::RoundEnd => {
                        counts.add(&RoundCounts::decode(&frame.meta).expect("counts"));
                        if frame.header.flags == 0 {
                            continue;
                        }
                        (Kind::RoundAck, Vec::new())
                    }
                    Kind::Done => {
                        let digest = <sha2::Sha256 as sha2::Digest>::digest(STATE).into();
                        (Kind::Receipt, Receipt { counts, digest }.encode())
                    }
                    // The last of those that follow.
                    Kind::Zero if frame.header.round == 3 => (Kind::Drained, Vec::new()),
                    Kind::Drained => return all,
                    _ => continue,
                };
                let receipt = kind == Kind::Receipt;
                let mut answer = |kind, meta| {
                    let header = Header::new(kind, key, frame.header.round, answers, 0);
                    answers += 1;
                    stream.write_all(&Frame { header, meta, data: Vec::new() }.to_bytes()).expect("answer");
                };
                answer(kind, meta);
                if receipt && version < 3 {
                    return all;
                }
                if receipt {
                    answer(Kind::Applied, Vec::new());
                }
            }
        }
    });
    let memory = source(version);
    let compression = if version > 1 { Compression::Lz4 } else { Compression::None };
    let options = ConnectOptions { versions: version..=version, compression, ..options(1) };
    let mut out =
        Outgoing::open(&address, &session(), memory.clone(), CancelFlag::new(), options).expect("connect");
    let mut later = PageBitmap::new(memory.pages());
    if version > 2 {
        later.set_range(5, 3);
    }
    let mut first = PageBitmap::full(memory.pages());
    first.subtract(&later);
    out.send_round(1, &first, true).expect("round 1");
    memory.write_at(2 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).expect("inside memory");
    memory.write_at(40 * PAGE_SIZE, b"changed").expect("inside memory");
    let mut dirty = PageBitmap::new(memory.pages());
    dirty.set(2);
    dirty.set(40);
    out.send_round(2, &dirty, false).expect("round 2");
    out.finish(STATE).expect("finish");
    if version > 2 {
        let mut left = Left::new(later);
        let until = Until::Applied(Instant::now() + Duration::from_secs(30));
        out.serve(&mut left, until).expect("applied");
        out.serve(&mut left, Until::Drained { resumed: false }).expect("drained");
    }
    catcher.join().expect("no panic")
}

fn is_written(version: u16) {
    let now = written_now(version);
    if std::env::var_os("VPMU_RECORD").is_some() {
        std::fs::write(path(version), &now).expect("written");
    }
    let recorded = std::fs::read(path(version)).expect("the recording");
    assert!(now == recorded, "this build writes another stream than version {version}");
}

fn is_read(version: u16) {
    let recorded = std::fs::read(path(version)).expect("the recording");
    let destination = destination(&tcp(), 1, MEMORY);
    let DataAddress::Tcp(address) = destination.address else { panic!("TCP") };
    let mut stream = TcpStream::connect(address).expect("connect");
    stream.write_all(&recorded).expect("written");
    let memory = destination.memory.clone();
    let received = destination.join().expect("received");
    assert_eq!(received.state, STATE);
    // What follows is read by a test beside what reads it.
    let followed: usize = after_done(&recorded);
    assert_eq!(followed > 0, version > 2);
    let pages = if version > 1 { 5 } else { 4 };
    assert_eq!((received.rounds, received.counts.pages, received.counts.zero_pages), (2, pages, 1));
    assert_eq!(received.bytes, (recorded.len() - followed) as u64);
    let expected = source(version);
    expected.write_at(2 * PAGE_SIZE, &[0; PAGE_SIZE as usize]).expect("inside memory");
    expected.write_at(40 * PAGE_SIZE, b"changed").expect("inside memory");
    for page in 5..8 {
        expected.write_at(page * PAGE_SIZE, &[0; PAGE_SIZE as usize]).expect("inside memory");
    }
    assert_same(&expected, &memory);
}

/// Bytes of a recording that come after the state's totals.
fn after_done(recorded: &[u8]) -> usize {
    let mut rest = recorded;
    while !rest.is_empty() {
        let (frame, length) = Frame::parse(rest, MEMORY / PAGE_SIZE).expect("a frame");
        rest = &rest[length..];
        if frame.header.kind == Kind::Done {
            return rest.len();
        }
    }
    panic!("a recording without its end")
}

#[test]
fn version_1_is_written_as_recorded() {
    is_written(1);
}

#[test]
fn version_1_is_read() {
    is_read(1);
}

#[test]
fn version_2_is_written_as_recorded() {
    is_written(2);
    let frames = frames(&std::fs::read(path(2)).expect("the recording"));
    assert!(frames.contains(&Kind::Packed), "it shows what is new in it: {frames:?}");
}

#[test]
fn version_2_is_read() {
    is_read(2);
}

#[test]
fn version_3_is_written_as_recorded() {
    is_written(3);
    let frames = frames(&std::fs::read(path(3)).expect("the recording"));
    let done = frames.iter().position(|kind| *kind == Kind::Done).expect("an end");
    assert_eq!(frames[done + 1..], [Kind::Pages, Kind::Zero, Kind::Drained], "it shows what is new in it");
}

#[test]
fn version_3_is_read() {
    is_read(3);
}

fn frames(mut stream: &[u8]) -> Vec<Kind> {
    let mut kinds = Vec::new();
    while !stream.is_empty() {
        let (frame, length) = Frame::parse(stream, MEMORY / PAGE_SIZE).expect("a frame");
        kinds.push(frame.header.kind);
        stream = &stream[length..];
    }
    kinds
}
