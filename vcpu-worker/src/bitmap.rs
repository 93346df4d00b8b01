//! A bitmap of 4 KiB guest pages, numbered by their place in the memfd.
//!
//! Invariant: bits at and beyond `pages` are zero, so that counts and runs need no masking.

/// One bit a page.
#[derive(Clone, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    pages: u64,
}

impl std::fmt::Debug for PageBitmap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "PageBitmap({} of {} pages:", self.count(), self.pages)?;
        for (first, len) in self.runs().take(16) {
            write!(f, " {first}+{len}")?;
        }
        f.write_str(")")
    }
}

impl PageBitmap {
    /// All clear.
    pub fn new(pages: u64) -> Self {
        Self { words: vec![0; usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX)], pages }
    }

    /// All set.
    pub fn full(pages: u64) -> Self {
        let mut all = Self::new(pages);
        all.set_range(0, pages);
        all
    }

    /// Pages it covers, set or not.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Sets one page; pages beyond the end are ignored.
    pub fn set(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Clears one page; pages beyond the end are ignored.
    pub fn clear(&mut self, page: u64) {
        if page < self.pages {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    /// Sets `len` pages from `first`; what lies beyond the end is ignored.
    pub fn set_range(&mut self, first: u64, len: u64) {
        let end = first.saturating_add(len).min(self.pages);
        let mut page = first;
        while page < end {
            let bit = page % 64;
            let here = (64 - bit).min(end - page);
            let mask = if here == 64 { u64::MAX } else { ((1 << here) - 1) << bit };
            self.words[(page / 64) as usize] |= mask;
            page += here;
        }
    }

    /// Whether a page is set; false beyond the end.
    pub fn get(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Clears every page.
    pub fn clear_all(&mut self) {
        self.words.fill(0);
    }

    /// Ors in words whose bit 0 of word 0 is page `first_page`; any alignment; what lies beyond the end is ignored.
    pub fn or_words(&mut self, first_page: u64, words: &[u64]) {
        let shift = first_page % 64;
        let first_word = usize::try_from(first_page / 64).unwrap_or(usize::MAX);
        for (at, &word) in (first_word..self.words.len()).zip(words) {
            if word != 0 {
                self.words[at] |= word << shift;
                if shift != 0
                    && let Some(next) = self.words.get_mut(at + 1)
                {
                    *next |= word >> (64 - shift);
                }
            }
        }
        self.trim();
    }

    /// The words, bit 0 of word 0 being page 0.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Pages set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|w| u64::from(w.count_ones())).sum()
    }

    /// Whether no page is set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Ors another bitmap in; pages that only the other has are ignored.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Clears what the other has set.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// Keeps what both have set.
    pub fn intersect(&mut self, other: &Self) {
        for (at, mine) in self.words.iter_mut().enumerate() {
            *mine &= other.words.get(at).copied().unwrap_or(0);
        }
    }

    /// Runs of set pages as (first, length), ascending, each as long as it can be.
    pub fn runs(&self) -> Runs<'_> {
        Runs { bitmap: self, page: 0 }
    }

    fn trim(&mut self) {
        let tail = self.pages % 64;
        if tail != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << tail) - 1;
        }
    }

    /// First page at or after `from` whose bit equals `set`, or `pages`.
    fn next(&self, from: u64, set: bool) -> u64 {
        let mut page = from;
        while page < self.pages {
            let word = self.words[(page / 64) as usize];
            let word = (if set { word } else { !word }) >> (page % 64);
            if word != 0 {
                return (page + u64::from(word.trailing_zeros())).min(self.pages);
            }
            page = (page / 64 + 1) * 64;
        }
        self.pages
    }
}

/// Iterator of [`PageBitmap::runs`].
#[derive(Debug, Clone)]
pub struct Runs<'a> {
    bitmap: &'a PageBitmap,
    page: u64,
}

impl Iterator for Runs<'_> {
    type Item = (u64, u64);

    fn next(&mut self) -> Option<(u64, u64)> {
        let first = self.bitmap.next(self.page, true);
        if first >= self.bitmap.pages {
            self.page = first;
            return None;
        }
        let end = self.bitmap.next(first, false);
        self.page = end;
        Some((first, end - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn runs_cross_words_and_end() {
        let mut map = PageBitmap::new(200);
        map.set_range(60, 80);
        map.set(0);
        map.set_range(190, 100);
        map.set(5000);
        assert_eq!(map.runs().collect::<Vec<_>>(), [(0, 1), (60, 80), (190, 10)]);
        assert_eq!(map.count(), 91);
        assert!(map.get(139) && !map.get(140) && !map.get(5000));
        assert_eq!(PageBitmap::full(128).runs().collect::<Vec<_>>(), [(0, 128)]);
        map.clear_all();
        assert!(map.is_empty() && map.runs().next().is_none());
        assert!(PageBitmap::new(0).runs().next().is_none());
    }

    proptest! {
        #[test]
        fn like_a_set(pages in 1u64..300, picks in proptest::collection::vec((0u64..320, 0u64..90), 0..20),
                      first in 0u64..300, words in proptest::collection::vec(any::<u64>(), 0..6)) {
            let mut map = PageBitmap::new(pages);
            let mut set = BTreeSet::new();
            for (at, len) in picks {
                map.set_range(at, len);
                set.extend((at..at + len).filter(|p| *p < pages));
            }
            map.or_words(first, &words);
            for (at, word) in words.iter().enumerate() {
                set.extend((0..64).filter(|b| word >> b & 1 == 1).map(|b| first + at as u64 * 64 + b).filter(|p| *p < pages));
            }
            prop_assert_eq!(map.count(), set.len() as u64);
            let listed: BTreeSet<u64> = map.runs().flat_map(|(f, l)| f..f + l).collect();
            prop_assert_eq!(&listed, &set);
            let runs: Vec<_> = map.runs().collect();
            prop_assert!(runs.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0), "runs are as long as can be");
            let mut other = PageBitmap::new(pages);
            other.union(&map);
            prop_assert_eq!(&other, &map);
            other.subtract(&map);
            prop_assert!(other.is_empty());
        }
    }
}
