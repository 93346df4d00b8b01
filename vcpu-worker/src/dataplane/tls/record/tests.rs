//! Records against RFC 8448 and against what no peer of good will sends.

use super::*;
use proptest::prelude::*;

fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.chars().filter_map(|c| c.to_digit(16)).map(|d| d as u8).collect();
    digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// The client's key for data in RFC 8448, section 3.
fn rfc8448() -> Key {
    let (key, iv) = (hex("17422dda596ed5d9acd890e3c63f5051"), hex("5b78923dee08579033e523d9"));
    Key::of(&AES_128_GCM, &key, &iv, 0).expect("a key")
}

fn pair() -> (Sealer, Opener) {
    let key = || Key::of(&AES_256_GCM, &[7; 32], &[9; 12], 0).expect("a key");
    (Sealer { key: key(), limit: 1 << 24 }, Opener(key()))
}

fn sealed(sealer: &mut Sealer, content: Content, data: &[u8]) -> Vec<u8> {
    let mut record = [&[0; HEADER][..], data, &[0; TRAILER]].concat();
    sealer.seal(content, &mut record).expect("sealed");
    record
}

#[test]
fn a_record_is_as_rfc_8448_has_it() {
    let data: Vec<u8> = (0..50).collect();
    let told = hex(
        "17030300 43a23f70 54b62c94 d0affafe 8228ba55 cbefacea 42f914aa 66bcab3f 2b9819a8 a5b46b39 5bd54a9a
         20441e2b 62974e1f 5a6292a2 977014bd 1e3deae6 3aeebb21 694915e4",
    );
    let mut sealer = Sealer { key: rfc8448(), limit: 1 << 24 };
    assert_eq!(sealed(&mut sealer, Content::Data, &data), told);
    let mut record = told;
    assert_eq!(length(&record), Ok(Some(record.len())));
    assert_eq!(Opener(rfc8448()).open(&mut record), Ok((Content::Data, 50)));
    assert_eq!(record[HEADER..][..50], data);
}

#[test]
fn a_key_seals_no_more_than_its_limit() {
    let (mut sealer, _) = pair();
    sealer.limit = 2;
    assert!(!sealer.is_worn());
    sealed(&mut sealer, Content::Data, b"one");
    assert!(sealer.is_worn(), "the second says that another key follows");
    sealed(&mut sealer, Content::Handshake, b"two");
    let mut third = [0; HEADER + TRAILER];
    assert_eq!(sealer.seal(Content::Data, &mut third), Err(Error::EncryptError));
}

#[test]
fn records_come_in_their_order_and_once() {
    let (mut sealer, mut opener) = pair();
    let (mut first, second) =
        (sealed(&mut sealer, Content::Data, b"first"), sealed(&mut sealer, Content::Data, b"second"));
    let again = first.clone();
    assert_eq!(pair().1.open(&mut second.clone()), Err(Error::DecryptError), "out of order");
    assert_eq!(opener.open(&mut first), Ok((Content::Data, 5)));
    assert_eq!(opener.open(&mut again.clone()), Err(Error::DecryptError), "a second time");
}

/// What a peer that has the key, or none, may send.
#[test]
fn records_that_are_none_are_refused() {
    let (mut sealer, mut opener) = pair();
    let plain = &mut [21, 3, 3, 0, 2, 2, 0];
    assert_eq!(opener.open(plain), Err(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec.into()));
    // Nothing but padding.
    let mut record = vec![0; HEADER + 9 + TAG];
    record[..HEADER].copy_from_slice(&[23, 3, 3, 0, 25]);
    let (header, body) = record.split_at_mut(HEADER);
    let nonce = sealer.key.nonce().expect("one");
    let tag = sealer
        .key
        .cipher
        .seal_in_place_separate_tag(nonce, Aad::from(&*header), &mut body[..9])
        .expect("sealed");
    body[9..].copy_from_slice(tag.as_ref());
    assert_eq!(opener.open(&mut record), Err(PeerMisbehaved::TooManyEmptyFragments.into()));
    assert_eq!(length(&[23, 3, 3, 0x41, 1]), Err(Error::PeerSentOversizedRecord));
    assert_eq!(length(&[23, 3, 3, 0x41, 0]), Ok(Some(LARGEST)));
    assert_eq!(length(&[23, 3, 3, 0]), Ok(None));
    let mut large = vec![0; HEADER + CONTENT + TRAILER + 1];
    assert_eq!(sealer.seal(Content::Data, &mut large), Err(Error::EncryptError));
}

proptest! {
    #[test]
    fn what_is_sealed_is_opened_and_nothing_else(
        data in prop::collection::vec(any::<u8>(), 0..2000), at in any::<prop::sample::Index>(), bit in 0..8_u32,
    ) {
        let (mut sealer, mut opener) = pair();
        let record = sealed(&mut sealer, Content::Data, &data);
        let mut whole = record.clone();
        prop_assert_eq!(opener.open(&mut whole), Ok((Content::Data, data.len())));
        prop_assert_eq!(&whole[HEADER..][..data.len()], &data[..]);
        let mut flipped = record.clone();
        flipped[at.index(record.len())] ^= 1 << bit;
        prop_assert!(pair().1.open(&mut flipped).is_err());
        let mut short = record[..at.index(record.len())].to_vec();
        prop_assert!(pair().1.open(&mut short).is_err());
    }
}
