//! Which pages are yet to come, and which of them were asked for. Pure.

use crate::bitmap::PageBitmap;

/// Invariant: `asked` only grows; `left` is the count of `missing`.
pub(super) struct Pages {
    missing: PageBitmap,
    asked: PageBitmap,
    left: u64,
    /// Where the background goes on.
    cursor: u64,
}

impl Pages {
    pub(super) fn new(missing: PageBitmap) -> Self {
        let (left, pages) = (missing.count(), missing.pages());
        Self { missing, asked: PageBitmap::new(pages), left, cursor: 0 }
    }

    pub(super) fn left(&self) -> u64 {
        self.left
    }

    pub(super) fn missing(&self) -> &PageBitmap {
        &self.missing
    }

    pub(super) fn is_missing(&self, page: u64) -> bool {
        self.missing.get(page)
    }

    /// First run of missing pages in `from..end`.
    pub(super) fn missing_run(&self, from: u64, end: u64) -> Option<(u64, u64)> {
        let mut first = from;
        while first < end && !self.missing.get(first) {
            first += 1;
        }
        let mut last = first;
        while last < end && self.missing.get(last) {
            last += 1;
        }
        (last > first).then(|| (first, last - first))
    }

    /// Pages have arrived; how many are still missing afterwards.
    pub(super) fn there(&mut self, first: u64, pages: u64) -> u64 {
        for page in first..first + pages {
            if self.missing.get(page) {
                self.missing.clear(page);
                self.left -= 1;
            }
        }
        self.left
    }

    /// A fault: whether the page must be asked for now, by the caller.
    pub(super) fn demand(&mut self, page: u64) -> bool {
        self.cursor = page + 1;
        let ask = self.missing.get(page) && !self.asked.get(page);
        if ask {
            self.asked.set(page);
        }
        ask
    }

    /// The next run for the background, of at most `chunk` pages, from behind the last fault, around the end; it is the
    /// caller's to ask for.
    pub(super) fn claim(&mut self, chunk: u64) -> Option<(u64, u64)> {
        let first = self.wanted(self.cursor).or_else(|| self.wanted(0))?;
        let end = first.saturating_add(chunk).min(self.missing.pages());
        let mut len = 1;
        while first + len < end && self.missing.get(first + len) && !self.asked.get(first + len) {
            len += 1;
        }
        self.asked.set_range(first, len);
        self.cursor = first + len;
        Some((first, len))
    }

    /// First page at or after `from` that is missing and was not asked for.
    fn wanted(&self, from: u64) -> Option<u64> {
        let start = usize::try_from(from / 64).ok()?;
        let words = self.missing.words().iter().zip(self.asked.words()).enumerate().skip(start);
        for (at, (missing, asked)) in words {
            let mut word = missing & !asked;
            if at == start {
                word &= u64::MAX << (from % 64);
            }
            if word != 0 {
                return Some(at as u64 * 64 + u64::from(word.trailing_zeros()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_page_is_claimed_once_behind_the_last_fault_first() {
        let mut missing = PageBitmap::new(100);
        missing.set_range(10, 20);
        missing.set_range(50, 5);
        let mut pages = Pages::new(missing);
        assert!(pages.demand(51) && !pages.demand(51) && !pages.demand(5));
        assert!(pages.demand(12));
        assert_eq!(pages.claim(8), Some((13, 8)));
        assert!(!pages.demand(14), "in flight");
        assert_eq!(pages.claim(100), Some((21, 9)));
        assert_eq!(pages.claim(100), Some((50, 1)));
        assert_eq!(pages.claim(100), Some((52, 3)));
        assert_eq!(pages.claim(100), Some((10, 2)));
        assert_eq!(pages.claim(100), None);
        assert_eq!(pages.missing_run(0, 100), Some((10, 20)));
        assert_eq!((pages.there(10, 20), pages.there(10, 20)), (5, 5));
        assert_eq!(pages.missing_run(52, 54), Some((52, 2)));
        assert_eq!(pages.missing_run(55, 100), None);
        assert_eq!(pages.there(50, 5), 0);
    }
}
