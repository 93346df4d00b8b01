//! The frame around each stored value, checked before anything is decoded.
//!
//! ```text
//! magic u32 | schema u16 | flags u16 | len u32 | crc32c u32 | prost bytes        (little-endian)
//! ```
//!
//! Invariants: the checksum covers schema, flags, len and the bytes; a value that does not check is reported and left
//! where it is; a newer schema is not guessed at.

use std::fmt;

/// "VPMU", little-endian.
const MAGIC: u32 = u32::from_le_bytes(*b"VPMU");
/// The schema that this version writes.
pub(crate) const SCHEMA: u16 = 1;
/// Bytes before the record.
pub(crate) const HEADER: usize = 16;

/// Why a value was not decoded.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Problem {
    /// Shorter than its header, or than its header says.
    Truncated {
        /// Bytes that should be there.
        expected: usize,
        /// Bytes that are there.
        found: usize,
    },
    /// Not a value of this store.
    BadMagic(u32),
    /// Written by a later version.
    NewerSchema(u16),
    /// The checksum differs.
    BadChecksum,
    /// The checksum is right but the bytes are no such record.
    Undecodable(String),
    /// The record belongs under another key, or the key has no known form.
    WrongKey,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Truncated { expected, found } => write!(f, "{found} bytes where {expected} are needed"),
            Self::BadMagic(magic) => write!(f, "magic {magic:#010x} is not a record of this store"),
            Self::NewerSchema(schema) => {
                write!(f, "schema {schema} is newer than {SCHEMA}; start the version that wrote it")
            }
            Self::BadChecksum => f.write_str("the checksum differs"),
            Self::Undecodable(why) => write!(f, "cannot be decoded: {why}"),
            Self::WrongKey => f.write_str("the record does not belong under this key"),
        }
    }
}

fn checksum(head: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(head), body)
}

/// Wraps encoded bytes. The caller has bounded them far below 4 GiB.
pub(crate) fn seal(body: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(HEADER + body.len());
    out.extend_from_slice(&MAGIC.to_le_bytes());
    out.extend_from_slice(&SCHEMA.to_le_bytes());
    out.extend_from_slice(&0u16.to_le_bytes());
    out.extend_from_slice(&u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    let crc = checksum(&out[4..12], body);
    out.extend_from_slice(&crc.to_le_bytes());
    out.extend_from_slice(body);
    out
}

/// Checks a value and returns the record's bytes.
pub(crate) fn open(value: &[u8]) -> Result<&[u8], Problem> {
    let truncated = |expected| Problem::Truncated { expected, found: value.len() };
    let (head, body) = value.split_at_checked(HEADER).ok_or_else(|| truncated(HEADER))?;
    let word = |at: usize| head.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes);
    if word(0) != MAGIC {
        return Err(Problem::BadMagic(word(0)));
    }
    let schema = (word(4) & 0xffff) as u16;
    let len = word(8) as usize;
    if body.len() != len {
        return Err(truncated(HEADER.saturating_add(len)));
    }
    if checksum(&head[4..12], body) != word(12) {
        return Err(Problem::BadChecksum);
    }
    if schema > SCHEMA {
        return Err(Problem::NewerSchema(schema));
    }
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        for body in [&b""[..], b"x", &[7; 5000]] {
            assert_eq!(open(&seal(body)), Ok(body));
        }
    }

    #[test]
    fn every_flipped_bit_is_seen() {
        let good = seal(b"some record");
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&bad).is_err(), "bit {bit}");
        }
    }

    #[test]
    fn every_truncation_is_seen() {
        let good = seal(b"some record");
        for len in 0..good.len() {
            assert!(open(&good[..len]).is_err(), "{len} bytes");
        }
    }

    #[test]
    fn newer_schema_is_named() {
        let mut value = seal(b"abc");
        value[4] = 9;
        let crc = checksum(&value[4..12], b"abc");
        value[12..16].copy_from_slice(&crc.to_le_bytes());
        assert_eq!(open(&value), Err(Problem::NewerSchema(9)));
    }
}
