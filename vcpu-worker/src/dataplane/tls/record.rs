//! The record layer of TLS 1.3 (RFC 8446, section 5), in place: what is to be sent is encrypted where it was gathered, and what
//! has come is decrypted where it was received. rustls makes the session and its keys; its own record layer copies every
//! byte twice on the way in and once more on the way out, which was as much work as all the rest (`vpmud bench migrate`).
//!
//! Invariants: a key encrypts no more records than its limit, and no nonce comes twice under one key, because the sequence
//! number only grows and begins anew only with a new key; nothing of a record is given out before its tag is verified.

use ring::aead::{
    AES_128_GCM, AES_256_GCM, Aad, Algorithm, CHACHA20_POLY1305, LessSafeKey, Nonce, UnboundKey,
};
use rustls::{AlertDescription, ConnectionTrafficSecrets, Error, InvalidMessage, PeerMisbehaved};

/// Most bytes of content in a record.
pub(super) const CONTENT: usize = 1 << 14;
/// Bytes before the content.
pub(super) const HEADER: usize = 5;
/// Bytes after the content: its type and the tag of each cipher of TLS 1.3.
pub(super) const TRAILER: usize = 1 + TAG;
/// Most bytes of a record that we send.
pub(super) const RECORD: usize = HEADER + CONTENT + TRAILER;
/// Most bytes of a record that may come: others may pad.
pub(super) const LARGEST: usize = HEADER + CONTENT + 256;

const TAG: usize = 16;

/// What a record holds (RFC 8446, section 5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Content {
    Alert,
    Handshake,
    Data,
}

impl Content {
    const fn wire(self) -> u8 {
        match self {
            Self::Alert => 21,
            Self::Handshake => 22,
            Self::Data => 23,
        }
    }
}

/// A key of one direction.
struct Key {
    cipher: LessSafeKey,
    iv: [u8; 12],
    sequence: u64,
}

impl Key {
    fn new((sequence, secrets): (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        let (algorithm, key, iv) = match &secrets {
            ConnectionTrafficSecrets::Aes128Gcm { key, iv } => (&AES_128_GCM, key, iv),
            ConnectionTrafficSecrets::Aes256Gcm { key, iv } => (&AES_256_GCM, key, iv),
            ConnectionTrafficSecrets::Chacha20Poly1305 { key, iv } => (&CHACHA20_POLY1305, key, iv),
            _ => return Err(Error::General("a cipher that is not known here was agreed on".into())),
        };
        Self::of(algorithm, key.as_ref(), iv.as_ref(), sequence)
    }

    fn of(algorithm: &'static Algorithm, key: &[u8], iv: &[u8], sequence: u64) -> Result<Self, Error> {
        let unfit = || Error::General("the key does not fit its cipher".into());
        let iv = iv.try_into().map_err(|_| unfit())?;
        let cipher = LessSafeKey::new(UnboundKey::new(algorithm, key).map_err(|_| unfit())?);
        Ok(Self { cipher, iv, sequence })
    }

    /// RFC 8446, section 5.3. Each is used once.
    fn nonce(&mut self) -> Result<Nonce, Error> {
        let mut nonce = self.iv;
        for (byte, counted) in nonce.iter_mut().skip(4).zip(self.sequence.to_be_bytes()) {
            *byte ^= counted;
        }
        self.sequence = self.sequence.checked_add(1).ok_or(Error::EncryptError)?;
        Ok(Nonce::assume_unique_for_key(nonce))
    }
}

/// Encrypts what is sent.
pub(super) struct Sealer {
    key: Key,
    /// Records under one key.
    limit: u64,
}

impl Sealer {
    /// `limit`: how many records one key may encrypt.
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets), limit: u64) -> Result<Self, Error> {
        Ok(Self { key: Key::new(secrets)?, limit })
    }

    /// Whether the next record must be the last under this key, which says that another follows.
    pub(super) fn is_worn(&self) -> bool {
        self.key.sequence.saturating_add(1) >= self.limit
    }

    /// For tests: wears out sooner. Whether it is worn.
    #[cfg(test)]
    pub(super) fn with_limit(&mut self, limit: u64) -> bool {
        self.limit = limit;
        self.is_worn()
    }

    /// Goes on with another key.
    pub(super) fn renew(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> Result<(), Error> {
        self.key = Key::new(secrets)?;
        Ok(())
    }

    /// Makes a record of `record`: [`HEADER`] bytes to be written, the content, [`TRAILER`] bytes to be written.
    pub(super) fn seal(&mut self, content: Content, record: &mut [u8]) -> Result<(), Error> {
        if self.key.sequence >= self.limit {
            return Err(Error::EncryptError);
        }
        let (header, body) = record.split_at_mut_checked(HEADER).ok_or(Error::EncryptError)?;
        let length = u16::try_from(body.len()).map_err(|_| Error::EncryptError)?;
        if body.len() > CONTENT + TRAILER {
            return Err(Error::EncryptError);
        }
        let [high, low] = length.to_be_bytes();
        header.copy_from_slice(&[Content::Data.wire(), 3, 3, high, low]);
        let inner = body.len().checked_sub(TAG).ok_or(Error::EncryptError)?;
        let (inner, tag) = body.split_at_mut_checked(inner).ok_or(Error::EncryptError)?;
        *inner.last_mut().ok_or(Error::EncryptError)? = content.wire();
        let nonce = self.key.nonce()?;
        let sealed = self.key.cipher.seal_in_place_separate_tag(nonce, Aad::from(&*header), inner);
        tag.copy_from_slice(sealed.map_err(|_| Error::EncryptError)?.as_ref());
        Ok(())
    }
}

/// Decrypts what has come.
pub(super) struct Opener(Key);

impl Opener {
    pub(super) fn new(secrets: (u64, ConnectionTrafficSecrets)) -> Result<Self, Error> {
        Key::new(secrets).map(Self)
    }

    /// Goes on with another key.
    pub(super) fn renew(&mut self, secrets: (u64, ConnectionTrafficSecrets)) -> Result<(), Error> {
        self.0 = Key::new(secrets)?;
        Ok(())
    }

    /// Decrypts a whole record in place: what it holds, and how many bytes of that begin at [`HEADER`].
    pub(super) fn open(&mut self, record: &mut [u8]) -> Result<(Content, usize), Error> {
        let (header, body) = record.split_at_mut_checked(HEADER).ok_or(Error::DecryptError)?;
        if header.first() != Some(&Content::Data.wire()) {
            return Err(PeerMisbehaved::IllegalMiddleboxChangeCipherSpec.into());
        }
        let nonce = self.0.nonce()?;
        let opened = self.0.cipher.open_in_place(nonce, Aad::from(&*header), body);
        let inner = opened.map_err(|_| Error::DecryptError)?;
        let end = inner.iter().rposition(|byte| *byte != 0).ok_or(PeerMisbehaved::TooManyEmptyFragments)?;
        if end > CONTENT {
            return Err(Error::PeerSentOversizedRecord);
        }
        let content = match inner.get(end) {
            Some(21) => Content::Alert,
            Some(22) => Content::Handshake,
            Some(23) => Content::Data,
            _ => return Err(InvalidMessage::InvalidContentType.into()),
        };
        Ok((content, end))
    }
}

/// Refuses what is no record of TLS, as far as it is here.
pub(super) fn check(bytes: &[u8]) -> Result<(), Error> {
    let content = bytes.first().is_none_or(|content| (20..=23).contains(content));
    let version = bytes.get(1).is_none_or(|major| *major == 3);
    if content && version { Ok(()) } else { Err(InvalidMessage::InvalidContentType.into()) }
}

/// Length of the record that begins here, header included; none before its header is whole.
pub(super) fn length(bytes: &[u8]) -> Result<Option<usize>, Error> {
    let Some([_, _, _, high, low]) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
    let whole = HEADER + usize::from(u16::from_be_bytes([*high, *low]));
    if whole > LARGEST {
        return Err(Error::PeerSentOversizedRecord);
    }
    Ok(Some(whole))
}

/// What is said before the connection is given up because of what the peer sent; [`None`] if nothing is to be said.
pub(super) fn alert_of(error: &Error) -> Option<[u8; 2]> {
    let description = match error {
        Error::AlertReceived(_) | Error::EncryptError => return None,
        Error::DecryptError => AlertDescription::BadRecordMac,
        Error::PeerSentOversizedRecord => AlertDescription::RecordOverflow,
        _ => AlertDescription::UnexpectedMessage,
    };
    Some([2, description.into()])
}

#[cfg(test)]
mod tests;
