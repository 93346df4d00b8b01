use super::*;
use std::os::unix::net::UnixStream;

const MIB: u64 = 1 << 20;

#[test]
fn sizes_are_bounded() {
    for bytes in [0, 1, MIB, 3 * MIB, MAX_BYTES + GRANULE, u64::MAX] {
        let error = GuestMemory::new("t", bytes).expect_err("refused");
        assert_eq!(error.reason(), "MEMORY_SIZE_INVALID", "{bytes}");
    }
    assert_eq!(GuestMemory::new("a\0b", 2 * MIB).expect("made").pages(), 512);
}

#[test]
fn layout_leaves_the_hole() {
    let memory = GuestMemory::new("t", 5 << 30).expect("made");
    assert_eq!(
        memory.regions(),
        [
            Region { gpa: 0, offset: 0, len: HOLE_START },
            Region { gpa: HOLE_END, offset: HOLE_START, len: 2 << 30 }
        ]
    );
    assert_eq!(memory.offset_of(HOLE_START - 8, 8), Some(HOLE_START - 8));
    assert_eq!(memory.offset_of(HOLE_START - 8, 9), None);
    assert_eq!(memory.offset_of(HOLE_START, 1), None);
    assert_eq!(memory.offset_of(HOLE_END, 4096), Some(HOLE_START));
    assert_eq!(memory.offset_of(u64::MAX, 2), None);
    assert_eq!(memory.gpa_of(HOLE_START + 5), Some(HOLE_END + 5));
    assert_eq!(memory.gpa_of(5 << 30), None);
    memory.write(HOLE_END + 100, b"high").expect("written");
    let mut back = [0; 4];
    memory.read_at(HOLE_START + 100, &mut back).expect("read");
    assert_eq!(&back, b"high");
}

#[test]
fn accesses_are_bounded() {
    let memory = GuestMemory::new("t", 2 * MIB).expect("made");
    let mut buf = [0u8; 16];
    assert!(memory.read(2 * MIB - 16, &mut buf).is_ok());
    assert!(matches!(memory.read(2 * MIB - 15, &mut buf), Err(MemoryError::OutOfRange { len: 16, .. })));
    assert!(memory.write(u64::MAX - 3, &buf).is_err());
    assert!(memory.write_at(u64::MAX, &buf).is_err());
    assert!(memory.is_zero(2 * MIB, 1).is_err());
    assert!(memory.crc32c(&[(0, 2 * MIB + 1)], 0).is_err());
    assert!(matches!(memory.load_u64(4), Err(MemoryError::Unaligned { address: 4 })));
    assert!(memory.discard(0, 4 * MIB).is_err() && memory.discard(1, 4096).is_err());
    memory.store_u64(8, 0x1122_3344_5566_7788).expect("stored");
    assert_eq!(memory.load_u64(8).expect("loaded"), 0x1122_3344_5566_7788);
    memory.read(8, &mut buf[..1]).expect("read");
    assert_eq!(buf[0], 0x88);
}

#[test]
fn zero_resident_and_discard() {
    let memory = GuestMemory::new("t", 4 * MIB).expect("made");
    assert!(memory.resident_pages().expect("tmpfs knows").is_empty());
    for (page, at) in [(3u64, 0u64), (700, 4095), (1023, 2000)] {
        memory.write_at(page * PAGE_SIZE + at, &[1]).expect("written");
        assert!(!memory.is_zero(page * PAGE_SIZE, PAGE_SIZE).expect("read"), "{page}");
    }
    let resident = memory.resident_pages().expect("tmpfs knows");
    assert!(resident.get(3) && resident.get(700) && resident.get(1023));
    assert_eq!(resident.count(), 3);
    assert!(memory.is_zero(4 * PAGE_SIZE, 100 * PAGE_SIZE).expect("read"));
    assert!(memory.is_zero(5, 0).expect("read"));
    memory.discard(700 * PAGE_SIZE, PAGE_SIZE).expect("discarded");
    assert!(memory.is_zero(700 * PAGE_SIZE, PAGE_SIZE).expect("read"));
}

#[test]
fn vectored_both_ways() {
    let source = GuestMemory::new("s", 8 * MIB).expect("made");
    let target = GuestMemory::new("t", 8 * MIB).expect("made");
    let bytes: Vec<u8> = (0..8 * MIB).map(|i| ((i * 2_654_435_761) >> 13) as u8).collect();
    source.write_at(0, &bytes).expect("written");
    // More pieces than IOV_MAX, more bytes than a socket buffer, an empty piece, and odd lengths.
    let ranges: Vec<(u64, u64)> =
        (0..1500u64).map(|i| (i * 4096 + i % 7, if i == 9 { 0 } else { 4096 - i % 5 * 3 })).collect();
    let (a, b) = UnixStream::pair().expect("pair");
    let reader = {
        let (target, ranges) = (target.clone(), ranges.clone());
        std::thread::spawn(move || {
            let mut header = [0; 5];
            std::io::Read::read_exact(&mut &b, &mut header).expect("header");
            target.recv_into(b.as_fd(), &ranges).expect("received");
            let error = target.recv_into(b.as_fd(), &[(0, 1)]).expect_err("closed");
            assert_eq!(error.kind(), std::io::ErrorKind::UnexpectedEof);
            header
        })
    };
    source.send_vectored(a.as_fd(), b"hello", &ranges).expect("sent");
    let error = source.send_vectored(a.as_fd(), b"x", &[(8 * MIB, 1)]).expect_err("bounded");
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidInput);
    drop(a);
    assert_eq!(&reader.join().expect("reader"), b"hello");
    assert_eq!(source.crc32c(&ranges, 0).expect("crc"), target.crc32c(&ranges, 0).expect("crc"));
    let mut flat = Vec::new();
    for &(offset, len) in &ranges {
        flat.extend_from_slice(&bytes[offset as usize..(offset + len) as usize]);
    }
    assert_eq!(target.crc32c(&ranges, 0).expect("crc"), crc32c::crc32c(&flat));
}

#[test]
fn another_mapping_of_the_same_memory() {
    let memory = GuestMemory::new("t", 2 * MIB).expect("made");
    let fd = memory.fd().try_clone_to_owned().expect("dup");
    let other = GuestMemory::from_fd(fd.try_clone().expect("dup"), 2 * MIB).expect("mapped");
    memory.store_u64(64, 7).expect("stored");
    assert_eq!(other.load_u64(64).expect("loaded"), 7);
    assert_eq!(GuestMemory::from_fd(fd, 4 * MIB).expect_err("size").reason(), "MEMORY_SIZE_INVALID");
}

#[test]
fn own_writes_are_noted_while_tracked() {
    let memory = GuestMemory::new("t", 2 * MIB).expect("made");
    let mut pages = PageBitmap::new(memory.pages());
    memory.write_at(0, &[1]).expect("written");
    memory.take_writes(&mut pages);
    assert!(pages.is_empty(), "not tracked yet");
    memory.track_writes(true);
    memory.write(PAGE_SIZE * 3 - 1, &[1, 2]).expect("written");
    memory.store_u64(PAGE_SIZE * 9, 1).expect("stored");
    memory.discard(PAGE_SIZE * 20, PAGE_SIZE * 2).expect("discarded");
    memory.write(77, &[]).expect("written");
    assert!(memory.write(2 * MIB, &[1]).is_err());
    memory.take_writes(&mut pages);
    assert_eq!(pages.runs().collect::<Vec<_>>(), [(2, 2), (9, 1), (20, 2)]);
    pages.clear_all();
    memory.take_writes(&mut pages);
    assert!(pages.is_empty(), "taken once");
    memory.store_u64(0, 1).expect("stored");
    memory.track_writes(false);
    memory.take_writes(&mut pages);
    assert!(pages.is_empty(), "forgotten");
}
