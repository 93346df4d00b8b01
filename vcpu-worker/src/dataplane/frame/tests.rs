//! Properties of the frame codec: what is written is read, what was changed is refused, nothing panics or grows.

use proptest::prelude::*;

use super::*;

const MEMORY_PAGES: u64 = 1 << 16;

fn key() -> FrameKey {
    FrameKey { migration_id: [7; 16], attempt: 2 }
}

/// Ascending ranges, not overlapping, inside memory, at most `most` pages together.
fn ranges(most: u64) -> impl Strategy<Value = Vec<PageRange>> {
    proptest::collection::vec((0u64..500, 1u64..40), 1..60).prop_map(move |steps| {
        let (mut at, mut total, mut out) = (0, 0, Vec::new());
        for (gap, pages) in steps {
            let first = at + gap;
            if out.is_empty() || (total + pages <= most && first + pages <= MEMORY_PAGES) {
                out.push(PageRange { first, pages });
                total += pages;
                at = first + pages;
            }
        }
        out
    })
}

fn counts() -> impl Strategy<Value = RoundCounts> {
    (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(frames, pages, zero_pages)| RoundCounts {
        frames,
        pages,
        zero_pages,
    })
}

/// Kind, flags, meta and data of any frame that this side could send.
fn parts() -> impl Strategy<Value = (Kind, u8, Vec<u8>, Vec<u8>)> {
    let none = || Just(Vec::new());
    prop_oneof![
        (any::<[u8; 32]>(), 0u16..9, 0u16..9, 1u16..=16, any::<u64>()).prop_map(
            |(token, a, b, connections, memory_bytes)| {
                let hello =
                    Hello { token, version_min: a.min(b), version_max: a.max(b), connections, memory_bytes };
                assert_eq!(Hello::decode(&hello.encode()).as_ref(), Ok(&hello));
                (Kind::Hello, 0, hello.encode(), Vec::new())
            }
        ),
        any::<u16>().prop_map(|version| (Kind::HelloAck, 0, HelloAck { version }.encode(), Vec::new())),
        (ranges(256), any::<u8>()).prop_map(|(ranges, fill)| {
            let pages: u64 = ranges.iter().map(|range| range.pages).sum();
            let mut meta = Vec::new();
            encode_ranges(&ranges, &mut meta);
            let mut back = Vec::new();
            assert_eq!(decode_ranges(&meta, MEMORY_PAGES, &mut back), Ok(pages));
            assert_eq!(back, ranges);
            (Kind::Pages, 0, meta, vec![fill; (pages * PAGE_BYTES) as usize])
        }),
        (ranges(u64::MAX), none()).prop_map(|(ranges, data)| {
            let mut meta = Vec::new();
            encode_ranges(&ranges, &mut meta);
            (Kind::Zero, 0, meta, data)
        }),
        (counts(), 0u8..=FLAG_ACK).prop_map(|(counts, flags)| {
            assert_eq!(RoundCounts::decode(&counts.encode()), Ok(counts));
            (Kind::RoundEnd, flags, counts.encode(), Vec::new())
        }),
        Just((Kind::RoundAck, 0, Vec::new(), Vec::new())),
        Just((Kind::Applied, 0, Vec::new(), Vec::new())),
        (1u64..=MAX_STATE_BYTES, any::<u64>(), proptest::collection::vec(any::<u8>(), 1..300)).prop_map(
            |(total, offset, data)| {
                let chunk = StateChunk { offset: offset % total, total };
                assert_eq!(StateChunk::decode(&chunk.encode()), Ok(chunk));
                (Kind::State, 0, chunk.encode(), data)
            }
        ),
        (counts(), any::<u32>(), 0..=MAX_STATE_BYTES, any::<[u8; 32]>()).prop_map(
            |(counts, rounds, state_bytes, digest)| {
                let done = DoneTotals { counts, rounds, state_bytes, digest };
                assert_eq!(DoneTotals::decode(&done.encode()), Ok(done));
                (Kind::Done, 0, done.encode(), Vec::new())
            }
        ),
        (counts(), any::<[u8; 32]>()).prop_map(|(counts, digest)| {
            let receipt = Receipt { counts, digest };
            assert_eq!(Receipt::decode(&receipt.encode()), Ok(receipt));
            (Kind::Receipt, 0, receipt.encode(), Vec::new())
        }),
        (any::<u16>(), ".{0,400}").prop_map(|(number, message)| {
            let code = ErrorBody::decode(&number.to_le_bytes()).expect("a code").code;
            let body = ErrorBody { code, message }.encode();
            let back = ErrorBody::decode(&body).expect("decodes");
            assert_eq!(back.code, code);
            assert!(!back.message.chars().any(char::is_control));
            (Kind::Error, 0, body, Vec::new())
        }),
    ]
}

fn frame() -> impl Strategy<Value = Frame> {
    (parts(), any::<u32>(), any::<u64>(), 0..MAX_CONNECTIONS).prop_map(
        |((kind, flags, meta, data), round, sequence, connection)| {
            let mut header = Header::new(kind, key(), round, sequence, connection);
            header.flags = flags;
            if matches!(kind, Kind::Pages | Kind::Zero) {
                header.count = decode_ranges(&meta, MEMORY_PAGES, &mut Vec::new()).expect("ranges") as u32;
            }
            header.seal(&meta, crc32c::crc32c(&data), data.len() as u32);
            Frame { header, meta, data }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn what_is_written_is_read(frame in frame(), tail in proptest::collection::vec(any::<u8>(), 0..9)) {
        let mut bytes = frame.to_bytes();
        let length = bytes.len();
        bytes.extend_from_slice(&tail);
        let (back, used) = Frame::parse(&bytes, MEMORY_PAGES).expect("parses");
        prop_assert_eq!(used, length);
        prop_assert_eq!(back, frame);
    }

    /// CRC-32C finds every single flipped bit, and no part of a frame is outside of a sum.
    #[test]
    fn a_flipped_bit_is_refused(frame in frame(), place in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = frame.to_bytes();
        let at = place.index(bytes.len());
        bytes[at] ^= 1 << bit;
        let error = Frame::parse(&bytes, MEMORY_PAGES).expect_err("refused");
        prop_assert!(error.reason().starts_with("FRAME_"));
    }

    #[test]
    fn a_cut_frame_is_short(frame in frame(), place in any::<prop::sample::Index>()) {
        let bytes = frame.to_bytes();
        let cut = place.index(bytes.len());
        let error = Frame::parse(&bytes[..cut], MEMORY_PAGES).expect_err("short");
        prop_assert!(matches!(error, FrameError::Short { .. }), "{error}");
    }

    #[test]
    fn random_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(Frame::parse(&bytes, MEMORY_PAGES).is_err());
        for pages in [0, 1, MEMORY_PAGES, u64::MAX] {
            let _ = decode_ranges(&bytes, pages, &mut Vec::new());
        }
        let _ = (Hello::decode(&bytes), HelloAck::decode(&bytes), RoundCounts::decode(&bytes));
        let _ = (StateChunk::decode(&bytes), DoneTotals::decode(&bytes), Receipt::decode(&bytes), ErrorBody::decode(&bytes));
    }

    /// A header with valid sums whose fields are hostile: refused, or within all bounds.
    #[test]
    fn hostile_headers_are_within_bounds_or_refused(
        kind in prop::sample::select(Kind::ALL.to_vec()),
        flags in any::<u8>(),
        connection in any::<u16>(),
        count in any::<u32>(),
        lengths in (any::<u32>(), any::<u32>()),
        reserved in (any::<bool>(), any::<u16>(), any::<u32>()),
    ) {
        let mut header = Header::new(kind, key(), 1, 0, connection);
        (header.flags, header.count) = (flags, count);
        (header.meta_len, header.data_len) = lengths;
        let mut bytes = header.encode();
        if reserved.0 {
            bytes[42..44].copy_from_slice(&reserved.1.to_le_bytes());
            bytes[64..68].copy_from_slice(&reserved.2.to_le_bytes());
            let crc = crc32c::crc32c(&bytes[..68]);
            bytes[68..].copy_from_slice(&crc.to_le_bytes());
        }
        if let Ok(header) = Header::decode(&bytes) {
            prop_assert!(header.meta_len <= MAX_META_BYTES && header.data_len <= MAX_DATA_BYTES);
            prop_assert!(header.connection < MAX_CONNECTIONS);
        }
    }

    /// A range list with a valid sum and hostile words: only pages inside memory are ever let through.
    #[test]
    fn hostile_ranges_stay_inside_memory(words in proptest::collection::vec(any::<u64>(), 0..20), pages in 0u64..1 << 30) {
        let meta: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut out = Vec::new();
        if let Ok(total) = decode_ranges(&meta, pages, &mut out) {
            prop_assert!(total <= pages && out.iter().all(|range| range.end() <= pages));
            prop_assert!(out.windows(2).all(|pair| pair[0].end() <= pair[1].first));
        }
    }
}

fn refused(header: &Header, meta: &[u8]) -> FrameError {
    Header::decode(&header.encode())
        .and_then(|header| header.check_meta(meta, MEMORY_PAGES, &mut Vec::new()))
        .expect_err("refused")
}

#[test]
fn pages_outside_memory_and_wrong_totals_are_refused() {
    let make = |ranges: &[PageRange], count: u32| {
        let mut meta = Vec::new();
        encode_ranges(ranges, &mut meta);
        let mut header = Header::new(Kind::Pages, key(), 1, 0, 0);
        header.count = count;
        header.seal(&meta, 0, count * PAGE_BYTES as u32);
        refused(&header, &meta)
    };
    let range = |first, pages| PageRange { first, pages };
    let outside = make(&[range(MEMORY_PAGES - 1, 2)], 2);
    assert!(matches!(outside, FrameError::Range { problem: "ends outside memory", .. }), "{outside}");
    let far = make(&[range((1 << 44) - 1, 1)], 1);
    assert!(matches!(far, FrameError::Range { .. }), "{far}");
    let overlap = make(&[range(5, 3), range(7, 1)], 4);
    assert!(matches!(overlap, FrameError::Range { index: 1, .. }), "{overlap}");
    let total = make(&[range(5, 3)], 4);
    assert!(matches!(total, FrameError::Field { field: "count", .. }), "{total}");
    let long = make(&[range(0, 257)], 257);
    assert!(matches!(long, FrameError::Field { field: "data_len", .. }), "{long}");
}

#[test]
fn other_protocols_and_versions_are_named() {
    let mut bytes = Header::new(Kind::RoundAck, key(), 1, 0, 0).encode();
    bytes[4] = 9;
    assert_eq!(Header::decode(&bytes), Err(FrameError::Version(9)));
    bytes[..4].copy_from_slice(b"GET ");
    assert!(matches!(Header::decode(&bytes), Err(FrameError::Magic(_))));
    let mut header = Header::new(Kind::Hello, key(), 0, 0, 0);
    header.seal(&[0; 47], 0, 0);
    assert!(matches!(Header::decode(&header.encode()), Err(FrameError::Field { field: "meta_len", .. })));
}

/// A recorded frame: the layout must not change under the same version.
#[test]
fn layout_of_version_1_is_fixed() {
    let mut meta = Vec::new();
    encode_ranges(&[PageRange { first: 0x123, pages: 2 }], &mut meta);
    assert_eq!(meta, (0x123u64 | 1 << 44).to_le_bytes());
    let mut header =
        Header::new(Kind::Zero, FrameKey { migration_id: *b"ABCDEFGHIJKLMNOP", attempt: 1 }, 4, 5, 6);
    header.count = 2;
    let frame = Frame { header, meta, data: Vec::new() };
    let hex = frame.to_bytes().iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().concat();
    assert_eq!(hex, RECORDED_ZERO_FRAME);
    // Every bit of it matters.
    for bit in 0..frame.to_bytes().len() * 8 {
        let mut bytes = frame.to_bytes();
        bytes[bit / 8] ^= 1 << (bit % 8);
        Frame::parse(&bytes, MEMORY_PAGES).expect_err("refused");
    }
}

const RECORDED_ZERO_FRAME: &str = concat!(
    "56504d44010004004142434445464748494a4b4c4d4e4f50010000000400000005000000000000000600000002000000",
    "08000000000000003801cd420000000000000000581a049e",
    "2301000000100000",
);
