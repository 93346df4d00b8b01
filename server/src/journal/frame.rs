//! Frames of the journal: how a record lies in a segment.
//!
//! ```text
//! magic u32 | len u32 | lsn u64 | durable u64 | crc32c u32 | zero u32 | payload, padded with zeros to 8 bytes
//! ```
//!
//! `durable` is the last lsn that was known to be on disk when the frame was written. It tells a torn tail (nothing
//! later claims it was durable) from corruption in the middle (something does). Zeros are the end.

/// A record.
const RECORD: u32 = u32::from_le_bytes(*b"VPJR");
/// "Everything before lsn `base` is repeated from there on."
const SNAPSHOT: u32 = u32::from_le_bytes(*b"VPJS");
const HEADER: usize = 32;
/// Largest payload in bytes.
pub(crate) const MAX_PAYLOAD: usize = 1024;
/// Largest frame in bytes.
pub(crate) const MAX_FRAME: usize = HEADER + MAX_PAYLOAD;

/// What a frame carries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Payload {
    Record(Vec<u8>),
    Snapshot { base: u64 },
}

/// One frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) lsn: u64,
    pub(crate) durable: u64,
    pub(crate) payload: Payload,
}

impl Frame {
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let base_bytes;
        let (magic, payload) = match &self.payload {
            Payload::Record(bytes) => (RECORD, bytes.as_slice()),
            Payload::Snapshot { base } => {
                base_bytes = base.to_le_bytes();
                (SNAPSHOT, base_bytes.as_slice())
            }
        };
        let start = out.len();
        out.extend_from_slice(&magic.to_le_bytes());
        out.extend_from_slice(&u32::try_from(payload.len()).unwrap_or(u32::MAX).to_le_bytes());
        out.extend_from_slice(&self.lsn.to_le_bytes());
        out.extend_from_slice(&self.durable.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&out[start..]), payload);
        out.extend_from_slice(&u64::from(crc).to_le_bytes());
        out.extend_from_slice(payload);
        out.resize(start + HEADER + payload.len().next_multiple_of(8), 0);
    }

    /// A whole, checked frame at the start of `bytes`, and its length.
    fn decode(bytes: &[u8]) -> Option<(Self, usize)> {
        let head = bytes.get(..HEADER)?;
        let u32_at = |at: usize| Some(u32::from_le_bytes(head.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?));
        let (magic, len) = (u32_at(0)?, u32_at(4)? as usize);
        if !(magic == RECORD || magic == SNAPSHOT) || len > MAX_PAYLOAD {
            return None;
        }
        let payload = bytes.get(HEADER..HEADER + len)?;
        let crc = crc32c::crc32c_append(crc32c::crc32c(&head[..24]), payload);
        let (lsn, durable) = (u64_at(8)?, u64_at(16)?);
        if u64_at(24)? != u64::from(crc) || lsn == 0 || durable >= lsn {
            return None;
        }
        let payload = if magic == RECORD {
            Payload::Record(payload.to_vec())
        } else {
            Payload::Snapshot { base: u64::from_le_bytes(payload.try_into().ok()?) }
        };
        Some((Self { lsn, durable, payload }, HEADER + len.next_multiple_of(8)))
    }
}

/// A frame and where it lies.
#[derive(Debug, Clone)]
pub(crate) struct Found {
    pub(crate) frame: Frame,
    /// Offset of the first byte after it.
    pub(crate) end: u64,
}

/// All whole frames of a segment, also those after bytes that are no frame, and whether there are such bytes.
pub(crate) fn scan(bytes: &[u8]) -> (Vec<Found>, bool) {
    let (mut found, mut bad, mut at) = (Vec::new(), false, 0);
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        if let Some((frame, len)) = Frame::decode(rest) {
            at += len;
            found.push(Found { frame, end: at as u64 });
            continue;
        }
        let step = rest.len().min(8);
        bad |= rest[..step].iter().any(|&b| b != 0);
        at += step;
    }
    (found, bad)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frames() -> Vec<Frame> {
        vec![
            Frame { lsn: 1, durable: 0, payload: Payload::Record(b"first".to_vec()) },
            Frame { lsn: 2, durable: 1, payload: Payload::Snapshot { base: 1 } },
            Frame { lsn: 3, durable: 1, payload: Payload::Record(vec![9; MAX_PAYLOAD]) },
        ]
    }

    fn segment() -> Vec<u8> {
        let mut bytes = Vec::new();
        for frame in frames() {
            frame.encode(&mut bytes);
        }
        bytes.resize(8192, 0);
        bytes
    }

    #[test]
    fn round_trip() {
        let (found, bad) = scan(&segment());
        assert_eq!(found.into_iter().map(|f| f.frame).collect::<Vec<_>>(), frames());
        assert!(!bad);
    }

    #[test]
    fn a_flipped_bit_costs_one_frame_only() {
        let good = segment();
        for bit in 0..(32 + 8) * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            let (found, seen) = scan(&bad);
            // Padding is not covered: it carries nothing.
            let padding = bit / 8 >= 32 + 5;
            assert_eq!(found.len(), if padding { 3 } else { 2 }, "bit {bit}");
            assert!(seen || padding, "bit {bit}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_scanned(bytes: Vec<u8>) {
            let (found, _) = scan(&bytes);
            prop_assert!(found.len() <= bytes.len() / HEADER);
        }
    }
}
