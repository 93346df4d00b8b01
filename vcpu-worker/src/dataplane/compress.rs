//! Pages smaller on the wire: LZ4 or zstd over the pages of one frame.
//!
//! The source decides frame by frame; what does not shrink goes as it is. The destination never sizes a buffer by what
//! the wire says: a frame names at most 256 pages, and unpacks to exactly that or is refused.

mod advisor;

use std::time::{Duration, Instant};

use super::error::{DataplaneError, Result};
use advisor::Advisor;

/// A way of packing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Algorithm {
    /// Fast, for fast networks.
    Lz4,
    /// Smaller, for slow ones.
    Zstd,
}

/// What is asked of a migration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Compression {
    /// Pages go as they are.
    #[default]
    None,
    /// LZ4 wherever it gains.
    Lz4,
    /// zstd wherever it gains.
    Zstd,
    /// Whichever gets pages over fastest, by measuring; none on a network that is faster than packing.
    Auto,
}

impl Compression {
    /// As it is reported.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Auto => "auto",
        }
    }
}

/// zstd's fastest ordinary level: higher ones cost more time than any network that a guest is moved over.
const ZSTD_LEVEL: i32 = 1;

/// Packs for one connection.
pub(crate) struct Packer {
    advisor: Advisor,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    out: Vec<u8>,
}

impl std::fmt::Debug for Packer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Packer").field("advisor", &self.advisor).finish_non_exhaustive()
    }
}

impl Packer {
    pub(crate) fn new(wanted: Compression) -> Self {
        Self { advisor: Advisor::new(wanted), zstd: None, out: Vec::new() }
    }

    /// Whether frames go through it at all.
    pub(crate) fn is_on(&self) -> bool {
        self.advisor.is_on()
    }

    /// Packs, if that is worth it.
    pub(crate) fn pack(&mut self, raw: &[u8]) -> Result<Option<(Algorithm, &[u8])>> {
        let Some(algorithm) = self.advisor.next() else {
            self.advisor.skipped();
            return Ok(None);
        };
        let begin = Instant::now();
        let packed = match algorithm {
            Algorithm::Lz4 => {
                self.out.resize(lz4_flex::block::get_maximum_output_size(raw.len()), 0);
                lz4_flex::block::compress_into(raw, &mut self.out).map_err(failed)?
            }
            Algorithm::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(zstd::bulk::Compressor::new(ZSTD_LEVEL).map_err(failed)?);
                }
                self.out.resize(zstd::zstd_safe::compress_bound(raw.len()), 0);
                match &mut self.zstd {
                    Some(zstd) => zstd.compress_to_buffer(raw, self.out.as_mut_slice()).map_err(failed)?,
                    None => raw.len(),
                }
            }
        };
        if self.advisor.packed(algorithm, raw.len(), packed, begin.elapsed()) {
            Ok(self.out.get(..packed).map(|out| (algorithm, out)))
        } else {
            Ok(None)
        }
    }

    /// What a frame took to be sent.
    pub(crate) fn sent(&mut self, bytes: u64, elapsed: Duration) {
        self.advisor.sent(bytes, elapsed);
    }
}

fn failed(error: impl std::fmt::Display) -> DataplaneError {
    DataplaneError::Thread(format!("compressing pages: {error}"))
}

/// Unpacks for one connection.
#[derive(Default)]
pub(crate) struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Unpacker")
    }
}

impl Unpacker {
    /// Fills `out` exactly.
    ///
    /// # Errors
    /// Damaged input, or input that unpacks to another length.
    pub(crate) fn unpack(
        &mut self,
        algorithm: Algorithm,
        packed: &[u8],
        out: &mut [u8],
    ) -> Result<(), &'static str> {
        let wrong = "the compressed pages are damaged";
        let length = match algorithm {
            Algorithm::Lz4 => lz4_flex::block::decompress_into(packed, out).map_err(|_| wrong)?,
            Algorithm::Zstd => {
                if self.zstd.is_none() {
                    self.zstd = Some(zstd::bulk::Decompressor::new().map_err(|_| "zstd could not be begun")?);
                }
                let Some(zstd) = &mut self.zstd else { return Err(wrong) };
                zstd.decompress_to_buffer(packed, out).map_err(|_| wrong)?
            }
        };
        if length == out.len() { Ok(()) } else { Err("the compressed pages have another length unpacked") }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_packed_is_unpacked_and_nothing_else() {
        let raw: Vec<u8> = (0..64 << 10).map(|i: u32| (i / 97) as u8).collect();
        for wanted in [Compression::Lz4, Compression::Zstd] {
            let mut packer = Packer::new(wanted);
            let (algorithm, packed) = packer.pack(&raw).expect("packed").expect("it shrinks");
            assert!(packed.len() < raw.len() / 8, "{wanted:?}: {} bytes", packed.len());
            let mut unpacker = Unpacker::default();
            let mut out = vec![0; raw.len()];
            unpacker.unpack(algorithm, packed, &mut out).expect("unpacked");
            assert!(out == raw);
            for length in [0, raw.len() - 1, raw.len() + 1] {
                let mut other = vec![0; length];
                assert!(unpacker.unpack(algorithm, packed, &mut other).is_err(), "{wanted:?} into {length}");
            }
            let damaged = packed.get(..packed.len() - 3).expect("a piece");
            assert!(unpacker.unpack(algorithm, damaged, &mut out).is_err());
            assert!(unpacker.unpack(algorithm, &[0xff; 100], &mut out).is_err());
        }
    }
}
