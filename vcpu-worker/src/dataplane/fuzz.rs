//! Bodies of the fuzz targets (`vcpu-worker/fuzz`), which also run here, bounded and with fixed seeds: whatever a peer
//! sends, the answer is a typed error or a copy whose counts match, never a panic and never memory beyond its bounds.
//! `VPMU_FUZZ_SECONDS=600` makes each test go on for that long with ever new input.

use std::io::Write as _;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::address::DataStream;
use super::cancel::CancelFlag;
use super::compress::{Algorithm, Unpacker};
use super::conn::{Conn, Timeouts};
use super::frame::{
    DoneTotals, FLAG_ACK, FLAG_LZ4, FLAG_ZSTD, Frame, FrameKey, HEADER_BYTES, Header, Hello, Kind,
    MAX_META_BYTES, PAGE_BYTES, PageRange, RoundCounts, StateChunk, encode_ranges,
};
use super::receiver::{fuzzed, handshake};
use super::{PROTOCOL_VERSIONS, SessionId};
use crate::memory::GuestMemory;

const PAGES: u64 = 512;

fn session() -> SessionId {
    SessionId { migration_id: [1; 16], attempt: 1, token: [2; 32] }
}

/// Takes small numbers off the input; zeros at its end.
struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn byte(&mut self) -> u8 {
        match self.0.split_first() {
            Some((first, rest)) => {
                self.0 = rest;
                *first
            }
            None => 0,
        }
    }

    fn word(&mut self) -> u64 {
        u64::from(self.byte()) << 8 | u64::from(self.byte())
    }

    fn some(&mut self, most: usize) -> Vec<u8> {
        let (here, rest) = self.0.split_at(self.0.len().min(most));
        self.0 = rest;
        here.to_vec()
    }
}

/// Bytes as frames: what parses is in bounds, and is written as it was read.
pub fn frames(mut data: &[u8]) {
    while let Ok((frame, length)) = Frame::parse(data, PAGES) {
        assert!(length <= HEADER_BYTES + MAX_META_BYTES as usize + (1 << 20));
        assert!(frame.to_bytes() == data[..length], "it is written as it was read");
        if frame.header.kind.has_ranges() {
            let mut ranges = Vec::new();
            frame.header.check_meta(&frame.meta, PAGES, &mut ranges).expect("checked");
            assert!(ranges.iter().all(|range| range.pages > 0 && range.end() <= PAGES));
            assert_eq!(ranges.iter().map(|range| range.pages).sum::<u64>(), u64::from(frame.header.count));
        }
        data = &data[length..];
    }
    // And as a packed body of its own, into a place that is never outgrown.
    let mut place = vec![0; 4 * PAGE_BYTES as usize];
    for algorithm in [Algorithm::Lz4, Algorithm::Zstd] {
        let _ = Unpacker::default().unpack(algorithm, data, &mut place);
    }
}

/// An introduction: raw, or well-formed but for some fields. Only the right token of the right session gets in.
pub fn handshake(data: &[u8]) {
    let mut bytes = Bytes(data);
    let session = session();
    let mut key = session.key();
    let mut hello = Hello {
        token: session.token,
        version_min: *PROTOCOL_VERSIONS.start(),
        version_max: *PROTOCOL_VERSIONS.end(),
        connections: 2,
        memory_bytes: PAGES * PAGE_BYTES,
    };
    let what = bytes.byte();
    let mut honest = true;
    if what & 1 != 0 {
        let flip = bytes.byte();
        hello.token[usize::from(bytes.byte()) % 32] ^= flip;
        honest &= flip == 0;
    }
    if what & 2 != 0 {
        key.attempt = u32::from(bytes.byte());
        honest &= key.attempt == 1;
    }
    if what & 4 != 0 {
        (hello.version_min, hello.version_max) = (u16::from(bytes.byte()), u16::from(bytes.byte()));
        let common = hello.version_max.min(*PROTOCOL_VERSIONS.end());
        honest &= hello.version_min <= hello.version_max
            && common >= hello.version_min
            && PROTOCOL_VERSIONS.contains(&common);
    }
    if what & 8 != 0 {
        (hello.connections, hello.memory_bytes) = (u16::from(bytes.byte()), bytes.word() * PAGE_BYTES);
        honest &= hello.connections == 2 && hello.memory_bytes == PAGES * PAGE_BYTES;
    }
    let index = u16::from(bytes.byte() % 20);
    honest &= index < 2;
    let header = Header::new(Kind::Hello, key, 0, 0, index);
    let mut wire = Frame { header, meta: hello.encode(), data: Vec::new() }.to_bytes();
    if what & 16 != 0 {
        let at = usize::from(bytes.byte()) % wire.len();
        let flip = bytes.byte();
        wire[at] ^= flip;
        honest &= flip == 0;
    }
    let verdict = handshake::fuzzed(&wire, &session, PAGES * PAGE_BYTES, 2);
    // A flip in the CRC-protected parts is always seen.
    assert_eq!(verdict.is_some(), honest, "{verdict:?}");
    // Whatever was left, as it is.
    handshake::fuzzed(bytes.0, &session, PAGES * PAGE_BYTES, 2);
}

/// A session with an authenticated peer that sends what it likes.
pub fn receiver(data: &[u8]) {
    let mut bytes = Bytes(data);
    let (near, mut far) = UnixStream::pair().expect("a pair of sockets");
    far.set_write_timeout(Some(Duration::from_millis(50))).expect("a time-out");
    let key = session().key();
    let mut sequence = 0;
    let mut written = 0;
    for _ in 0..24 {
        if bytes.is_empty() || written > 96 << 10 {
            break;
        }
        let wire = frame(&mut bytes, key, &mut sequence);
        written += wire.len();
        if far.write_all(&wire).is_err() {
            break;
        }
    }
    far.shutdown(Shutdown::Write).expect("shut down");
    let memory = GuestMemory::new("fuzz", PAGES * PAGE_BYTES).expect("memory");
    let timeouts = Timeouts {
        stall: Duration::from_millis(200),
        idle: Duration::from_millis(200),
        ..Timeouts::default()
    };
    let stream = DataStream::Unix(near);
    let mut conn =
        Conn::new(stream, key, 0, CancelFlag::new(), timeouts, Shutdown::Read).expect("a connection");
    conn.speak(if bytes.byte() & 1 == 0 { *PROTOCOL_VERSIONS.end() } else { *PROTOCOL_VERSIONS.start() });
    let mut conns = [conn];
    match fuzzed(&mut conns, &memory, &CancelFlag::new(), &AtomicU64::new(0), timeouts) {
        Ok(received) => assert!(!received.state.is_empty() && received.rounds > 0),
        Err(error) => assert!(!error.reason().is_empty()),
    }
    assert!(conns[0].held() <= (3 << 20) + 2 * MAX_META_BYTES as usize, "{} bytes are held", conns[0].held());
}

/// A frame that is right in most respects, so that the next layer is reached.
fn frame(bytes: &mut Bytes<'_>, key: FrameKey, sequence: &mut u64) -> Vec<u8> {
    let what = bytes.byte();
    if what == 255 {
        return bytes.some(80);
    }
    let kind = Kind::ALL[usize::from(what) % Kind::ALL.len()];
    let round = u32::from(bytes.byte() % 4);
    let mut header = Header::new(kind, key, round, *sequence, 0);
    *sequence += 1;
    let odd = bytes.byte();
    let (mut meta, mut data) = (Vec::new(), Vec::new());
    let ranges = |bytes: &mut Bytes<'_>| {
        let mut at = 0;
        let mut ranges = Vec::new();
        for _ in 0..=(bytes.byte() % 3) {
            let first = at + bytes.word() % PAGES;
            let pages = 1 + u64::from(bytes.byte() % 3);
            ranges.push(PageRange { first, pages });
            at = first + pages;
        }
        ranges
    };
    match kind {
        Kind::Pages | Kind::Packed | Kind::Zero => {
            let ranges = ranges(bytes);
            encode_ranges(&ranges, &mut meta);
            let pages = ranges.iter().map(|range| range.pages).sum::<u64>();
            header.count = pages as u32;
            let plain = vec![bytes.byte(); (pages * PAGE_BYTES) as usize];
            if kind == Kind::Pages {
                data = plain;
            } else if kind == Kind::Packed {
                header.flags = if odd & 64 == 0 { FLAG_LZ4 } else { FLAG_ZSTD };
                data = if odd & 64 == 0 {
                    lz4_flex::block::compress(&plain)
                } else {
                    zstd::bulk::compress(&plain, 1).unwrap_or_default()
                };
            }
        }
        Kind::RoundEnd => {
            header.flags = if odd & 64 == 0 { FLAG_ACK } else { 0 };
            let counts = RoundCounts {
                frames: u64::from(bytes.byte() % 4),
                pages: u64::from(bytes.byte() % 12),
                zero_pages: u64::from(bytes.byte() % 12),
            };
            meta = counts.encode();
        }
        Kind::State => {
            data = bytes.some(1 + usize::from(odd % 32));
            meta = StateChunk { offset: u64::from(bytes.byte() % 8), total: 1 + bytes.word() }.encode();
        }
        Kind::Done => {
            meta = DoneTotals { rounds: round, state_bytes: bytes.word(), ..DoneTotals::default() }.encode();
        }
        _ => meta = bytes.some(usize::from(odd % 64)),
    }
    if odd & 1 != 0 {
        header.sequence = header.sequence.wrapping_add(u64::from(bytes.byte()));
    }
    if odd & 2 != 0 {
        header.count = header.count.wrapping_add(u32::from(bytes.byte()));
    }
    if odd & 4 != 0 {
        header.flags = bytes.byte();
    }
    if odd & 8 != 0 {
        header.key.attempt = u32::from(bytes.byte());
    }
    if odd & 16 != 0 {
        header.connection = u16::from(bytes.byte());
    }
    let mut wire = Frame { header, meta, data }.to_bytes();
    if odd & 32 != 0 {
        let at = bytes.word() as usize % wire.len();
        wire[at] ^= bytes.byte();
    }
    wire
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounded(body: fn(&[u8]), runs: u64) {
        let mut random = 0x1234_5678_9abc_def1_u64;
        let mut next = || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let seconds = std::env::var("VPMU_FUZZ_SECONDS").ok().and_then(|n| n.parse().ok()).unwrap_or(0);
        let (begin, long) = (std::time::Instant::now(), Duration::from_secs(seconds));
        let mut done = 0;
        while done < runs || begin.elapsed() < long {
            done += 1;
            let length = next() as usize % 300;
            let data: Vec<u8> = (0..length).map(|_| (next() >> 24) as u8).collect();
            body(&data);
        }
        println!("{done} inputs in {:?}", begin.elapsed());
    }

    #[test]
    fn frames_of_any_kind() {
        bounded(frames, 4000);
    }

    #[test]
    fn handshakes_of_any_kind() {
        bounded(handshake, 4000);
        handshake(&[]);
    }

    #[test]
    fn sessions_of_any_kind() {
        bounded(receiver, 400);
    }
}
