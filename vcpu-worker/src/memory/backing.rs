//! What guest memory is made of: ordinary pages, huge pages set aside by the administrator (hugetlb), or huge pages that the
//! kernel makes where it can (transparent); and giving it all its memory at the start.

use std::path::Path;

use super::{GuestMemory, MemoryError, mapping};

/// Kinds of pages.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum HugePages {
    /// 4 KiB.
    #[default]
    None,
    /// 2 MiB from the host's pool (vm.nr_hugepages); all of them are set aside at once.
    Hugetlb,
    /// Whatever the kernel finds; needs transparent huge pages for shared memory.
    Transparent,
}

const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";
const SHMEM: &str = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
const HUGE: u64 = 2 << 20;
/// Threads that populate.
const MOST_THREADS: usize = 8;
/// Not worth a thread of its own.
const SHARE: u64 = 64 << 20;

/// The pool has too few pages.
pub(super) fn exhausted(bytes: u64) -> MemoryError {
    let free = std::fs::read_to_string(POOL).ok().and_then(|s| s.trim().parse().ok()).unwrap_or(0);
    MemoryError::HugePages { wanted: bytes / HUGE, free }
}

impl GuestMemory {
    /// New zeroed memory of these pages; see [`GuestMemory::new`].
    pub fn with_pages(name: &str, bytes: u64, pages: HugePages) -> Result<Self, MemoryError> {
        super::check_size(bytes)?;
        if pages == HugePages::Transparent {
            allowed(Path::new(SHMEM))?;
        }
        let fd = mapping::create_memfd(name, bytes, pages == HugePages::Hugetlb)?;
        let memory = Self::from_fd(fd, bytes)?;
        if pages == HugePages::Transparent {
            memory.inner.mapping.advise_huge()?;
        }
        Ok(memory)
    }

    /// Whether it is made of hugetlb pages.
    pub fn is_hugetlb(&self) -> bool {
        mapping::is_hugetlb(&self.inner.fd)
    }

    /// Gives every page its memory now, on several threads. Blocks.
    pub fn prefault(&self) -> Result<(), MemoryError> {
        let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let threads = (self.bytes().div_ceil(SHARE)).min(cores.min(MOST_THREADS) as u64).max(1);
        let each = self.bytes().div_ceil(threads).next_multiple_of(HUGE);
        let mapping = &self.inner.mapping;
        std::thread::scope(|scope| {
            let parts: Vec<_> = (0..threads)
                .map(|part| (part * each, (part * each + each).min(self.bytes())))
                .filter(|(from, to)| from < to)
                .map(|(from, to)| scope.spawn(move || mapping.populate(from, to - from)))
                .collect();
            let failed =
                || MemoryError::Os { call: "populating", source: std::io::Error::other("a thread panicked") };
            parts.into_iter().try_for_each(|part| part.join().unwrap_or_else(|_| Err(failed())))
        })
    }
}

/// Whether shared memory may have transparent huge pages.
fn allowed(switch: &Path) -> Result<(), MemoryError> {
    let text = std::fs::read_to_string(switch).unwrap_or_default();
    let set = text.split(['[', ']']).nth(1).unwrap_or("never").to_owned();
    if matches!(set.as_str(), "never" | "deny") {
        return Err(MemoryError::TransparentOff { set });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_that_are_not_there_are_refused_with_the_remedy() {
        let free: u64 = std::fs::read_to_string(POOL).map_or(0, |s| s.trim().parse().unwrap_or(0));
        let error =
            GuestMemory::with_pages("huge", (free + 64) * HUGE, HugePages::Hugetlb).expect_err("too many");
        assert_eq!(error.reason(), "HUGE_PAGES_EXHAUSTED", "{error}");
        assert!(error.to_string().contains("vm.nr_hugepages"), "{error}");
    }

    #[test]
    fn transparent_ones_want_the_switch() {
        let dir = tempfile::tempdir().expect("directory");
        let file = dir.path().join("switch");
        for (text, good) in [
            ("always within_size advise [never] deny force", false),
            ("always [advise] never", true),
            ("[deny]", false),
            ("", false),
        ] {
            std::fs::write(&file, text).expect("write");
            assert_eq!(allowed(&file).is_ok(), good, "{text}");
        }
        std::fs::write(&file, "[never]").expect("write");
        assert_eq!(allowed(&file).expect_err("off").reason(), "TRANSPARENT_HUGE_PAGES_OFF");
    }

    /// What the kernel notes of the mapping: `VmFlags` of /proc/self/smaps.
    fn flags(memory: &GuestMemory) -> Vec<String> {
        let start = format!("{:x}-", memory.inner.mapping.address());
        let maps = std::fs::read_to_string("/proc/self/smaps").expect("smaps");
        let mut lines = maps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("the mapping");
        flags.split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn transparent_ones_are_asked_of_the_kernel() {
        let memory = GuestMemory::new("plain", 4 << 20).expect("memory");
        assert!(!flags(&memory).iter().any(|flag| flag == "hg"), "{:?}", flags(&memory));
        if !Path::new("/sys/kernel/mm/transparent_hugepage").exists() {
            println!("skipped: this kernel has no transparent huge pages");
            return;
        }
        match GuestMemory::with_pages("advised", 4 << 20, HugePages::Transparent) {
            Ok(advised) => assert!(flags(&advised).iter().any(|flag| flag == "hg"), "{:?}", flags(&advised)),
            Err(error) => assert_eq!(error.reason(), "TRANSPARENT_HUGE_PAGES_OFF", "{error}"),
        }
        // The advice itself, whatever the switch says.
        memory.inner.mapping.advise_huge().expect("taken");
        assert!(flags(&memory).iter().any(|flag| flag == "hg"), "{:?}", flags(&memory));
    }

    #[test]
    fn prefaulting_gives_every_page() {
        let memory = GuestMemory::new("prefault", 16 << 20).expect("memory");
        memory.write_at(5000, b"kept").expect("inside");
        memory.prefault().expect("populated");
        assert_eq!(memory.resident_pages().expect("known").count(), memory.pages());
        let mut kept = [0; 4];
        memory.read_at(5000, &mut kept).expect("inside");
        assert_eq!(&kept, b"kept");
    }
}
