//! Keys of the store: one sled tree, a text prefix a kind, big-endian numbers.
//!
//! ```text
//! host | vm/{uid} | pmu/{uid}/ vcpu:u32 sequence:u64 | mig/{uid}/{uuid} | op/{uuid}        each followed by part:u16
//! ```
//!
//! A record above [`PART`] bytes is cut into parts, so that no leaf of the tree reaches sled's blob files.

use super::error::StoreError;

/// Bytes of one part of a record.
pub(crate) const PART: usize = 4096;
/// Largest encoded record in bytes; only records of many vCPUs come near it.
pub(crate) const MAX_RECORD: usize = 1 << 20;

/// A record's key, without its part number.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Key {
    Host,
    Vm(String),
    Pmu(String, u32, u64),
    Migration(String, String),
    Operation(String),
}

impl Key {
    pub(crate) fn encode(&self) -> Vec<u8> {
        match self {
            Self::Host => b"host".to_vec(),
            Self::Vm(uid) => format!("vm/{uid}").into_bytes(),
            Self::Pmu(uid, vcpu, sequence) => {
                let mut key = format!("pmu/{uid}/").into_bytes();
                key.extend_from_slice(&vcpu.to_be_bytes());
                key.extend_from_slice(&sequence.to_be_bytes());
                key
            }
            Self::Migration(uid, id) => format!("mig/{uid}/{id}").into_bytes(),
            Self::Operation(id) => format!("op/{id}").into_bytes(),
        }
    }

    /// The key of one part as sled has it.
    pub(crate) fn part(&self, part: u16) -> Vec<u8> {
        let mut key = self.encode();
        key.extend_from_slice(&part.to_be_bytes());
        key
    }

    pub(crate) fn decode(key: &[u8]) -> Option<Self> {
        if key == b"host" {
            return Some(Self::Host);
        }
        let slash = key.iter().position(|&b| b == b'/')?;
        let (kind, rest) = (key.get(..slash)?, key.get(slash + 1..)?);
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().filter(|t| is_id(t)).map(str::to_owned);
        match kind {
            b"vm" => Some(Self::Vm(text(rest)?)),
            b"op" => Some(Self::Operation(text(rest)?)),
            b"mig" => {
                let mut ids = rest.split(|&b| b == b'/');
                let key = Self::Migration(text(ids.next()?)?, text(ids.next()?)?);
                ids.next().is_none().then_some(key)
            }
            b"pmu" => {
                let (uid, numbers) = rest.split_at_checked(rest.len().checked_sub(13)?)?;
                let vcpu = u32::from_be_bytes(numbers.get(1..5)?.try_into().ok()?);
                let sequence = u64::from_be_bytes(numbers.get(5..13)?.try_into().ok()?);
                (numbers.first() == Some(&b'/')).then_some(())?;
                Some(Self::Pmu(text(uid)?, vcpu, sequence))
            }
            _ => None,
        }
    }
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Host => f.write_str("host"),
            Self::Vm(uid) => write!(f, "vm/{uid}"),
            Self::Pmu(uid, vcpu, sequence) => write!(f, "pmu/{uid}/{vcpu}/{sequence}"),
            Self::Migration(uid, id) => write!(f, "mig/{uid}/{id}"),
            Self::Operation(id) => write!(f, "op/{id}"),
        }
    }
}

/// Splits sled's key into a record's key and the part number.
pub(crate) fn split_part(key: &[u8]) -> Option<(&[u8], u16)> {
    let (base, part) = key.split_at_checked(key.len().checked_sub(2)?)?;
    Some((base, u16::from_be_bytes(part.try_into().ok()?)))
}

/// A key for people: printable bytes as they are, the others in hex.
pub(crate) fn printable(base: &[u8]) -> String {
    Key::decode(base).map_or_else(|| base.escape_ascii().to_string(), |key| key.to_string())
}

fn is_id(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b))
}

/// Checks an id that becomes part of a key: 1 to 128 of `[A-Za-z0-9_.-]`.
pub(crate) fn check_id(field: &'static str, id: &str) -> Result<String, StoreError> {
    if is_id(id) {
        Ok(id.to_owned())
    } else {
        Err(StoreError::bad_field(field, id, "use 1 to 128 of [A-Za-z0-9_.-]"))
    }
}

/// The last segment of a resource name.
pub(crate) fn last_segment(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn keys_round_trip(uid in "[a-z0-9-]{1,40}", id in "[a-z0-9-]{1,40}", vcpu: u32, sequence: u64, part: u16) {
            for key in [
                Key::Host,
                Key::Vm(uid.clone()),
                Key::Pmu(uid.clone(), vcpu, sequence),
                Key::Migration(uid.clone(), id.clone()),
                Key::Operation(id.clone()),
            ] {
                let bytes = key.part(part);
                let (base, p) = split_part(&bytes).expect("long enough");
                prop_assert_eq!(p, part);
                prop_assert_eq!(Key::decode(base), Some(key));
            }
        }

        #[test]
        fn any_bytes_decode_or_not(bytes: Vec<u8>) {
            let _ = Key::decode(&bytes).map(|key| assert_eq!(key.encode(), bytes));
            let _ = split_part(&bytes);
            let _ = printable(&bytes);
        }
    }
}
