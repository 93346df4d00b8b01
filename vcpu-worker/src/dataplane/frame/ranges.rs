//! Lists of page ranges, one 64-bit word each: first page in the low 44 bits, pages minus one in the high 20.
//!
//! Eight bytes a range is what QEMU spends a page, so a scattered dirty set costs no more here than there.

use super::FrameError;

const FIRST_BITS: u32 = 44;
const MAX_PAGES: u64 = 1 << 20;

/// Pages that follow each other in the memory's offset space.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRange {
    /// First page, below 2^44.
    pub first: u64,
    /// Pages, 1 to 2^20.
    pub pages: u64,
}

impl PageRange {
    /// First page after the range.
    pub fn end(self) -> u64 {
        self.first.saturating_add(self.pages)
    }
}

/// Appends `ranges` to `out`. Ranges longer than 2^20 pages become several words.
pub fn encode_ranges(ranges: &[PageRange], out: &mut Vec<u8>) {
    for range in ranges {
        let mut first = range.first;
        let mut left = range.pages;
        while left > 0 {
            let pages = left.min(MAX_PAGES);
            let word = (first & ((1 << FIRST_BITS) - 1)) | (pages - 1) << FIRST_BITS;
            out.extend_from_slice(&word.to_le_bytes());
            first += pages;
            left -= pages;
        }
    }
}

/// Reads the ranges of `meta` into `out` and returns how many pages they cover. They must ascend, not overlap and end
/// inside a memory of `memory_pages` pages.
///
/// # Errors
/// [`FrameError::Range`], or `Short` where `meta` is not a whole number of words.
pub fn decode_ranges(meta: &[u8], memory_pages: u64, out: &mut Vec<PageRange>) -> Result<u64, FrameError> {
    let (words, rest) = meta.as_chunks::<8>();
    if !rest.is_empty() {
        return Err(FrameError::Short { have: meta.len(), need: meta.len().next_multiple_of(8) });
    }
    let mut next_free = 0;
    let mut total = 0;
    for (index, bytes) in words.iter().enumerate() {
        let word = u64::from_le_bytes(*bytes);
        let range = PageRange { first: word & ((1 << FIRST_BITS) - 1), pages: (word >> FIRST_BITS) + 1 };
        let refuse = |problem| FrameError::Range {
            index,
            first: range.first,
            pages: range.pages,
            problem,
            memory_pages,
        };
        if range.first < next_free {
            return Err(refuse("overlaps or precedes the one before it"));
        }
        if range.end() > memory_pages {
            return Err(refuse("ends outside memory"));
        }
        next_free = range.end();
        total += range.pages;
        out.push(range);
    }
    Ok(total)
}
