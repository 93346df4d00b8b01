//! Opens a snapshot: header, state and table are read and verified; page data is verified chunk by chunk as it is used.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use prost::Message as _;
use rustix::fs::{Mode, OFlags};
use vpmu_proto::worker::SnapshotManifest;

use super::{CHUNK_PAGES, Chunk, ENTRY, HEADER, Header, MAGIC, MAX_STATE, SnapshotError, VERSION};
use crate::bitmap::PageBitmap;
use crate::memory::{GRANULE, GuestMemory, MAX_BYTES, PAGE_SIZE};

/// An open snapshot.
#[derive(Debug)]
pub struct Snapshot {
    path: PathBuf,
    file: File,
    memory_bytes: u64,
    manifest: SnapshotManifest,
    chunks: Vec<Chunk>,
}

/// Little-endian words out of checked bytes.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..).and_then(|b| b.first_chunk::<4>()).map_or(0, |b| u32::from_le_bytes(*b))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..).and_then(|b| b.first_chunk::<8>()).map_or(0, |b| u64::from_le_bytes(*b))
}

/// Bytes up to which a file tells its schema.
const VERSION_END: usize = 12;

/// Makes errors that name the file.
struct Errors<'a>(&'a Path);

impl Errors<'_> {
    fn unreadable(&self, what: &'static str, source: std::io::Error) -> SnapshotError {
        SnapshotError::Unreadable { path: self.0.to_owned(), what, source }
    }

    fn damaged(&self, part: &'static str, problem: impl Into<String>) -> SnapshotError {
        SnapshotError::Damaged { path: self.0.to_owned(), part, problem: problem.into() }
    }

    fn not_one(&self, found: String) -> SnapshotError {
        SnapshotError::NotOne { path: self.0.to_owned(), found }
    }

    fn read(&self, file: &File, part: &'static str, at: u64, bytes: u64) -> Result<Vec<u8>, SnapshotError> {
        let mut out = vec![0; usize::try_from(bytes).unwrap_or(usize::MAX)];
        file.read_exact_at(&mut out, at).map_err(|e| self.unreadable(part, e))?;
        Ok(out)
    }

    fn header(&self, bytes: &[u8], have: u64) -> Result<Header, SnapshotError> {
        if bytes.get(..8) != Some(&MAGIC) {
            let begins = bytes.get(..8.min(bytes.len())).unwrap_or_default().escape_ascii();
            let found = if bytes.is_empty() {
                "it is empty".to_owned()
            } else {
                format!("it begins with \"{begins}\" instead of {}", MAGIC.escape_ascii())
            };
            return Err(self.not_one(found));
        }
        if bytes.len() < VERSION_END {
            return Err(SnapshotError::Length { path: self.0.to_owned(), have, want: HEADER });
        }
        let version = u32_at(bytes, 8);
        if version != VERSION {
            return Err(SnapshotError::Version { path: self.0.to_owned(), found: version });
        }
        if bytes.len() as u64 != HEADER {
            return Err(SnapshotError::Length { path: self.0.to_owned(), have, want: HEADER });
        }
        let (body, crc) = bytes.split_at(HEADER as usize - 4);
        if crc32c::crc32c(body) != u32_at(crc, 0) {
            return Err(self.damaged("header", "its checksum does not match"));
        }
        let header = Header {
            memory_bytes: u64_at(bytes, 16),
            data_bytes: u64_at(bytes, 24),
            state_bytes: u64_at(bytes, 32),
            table_bytes: u64_at(bytes, 40),
            state_crc: u32_at(bytes, 48),
            table_crc: u32_at(bytes, 52),
        };
        let bounded = header.memory_bytes > 0
            && header.memory_bytes.is_multiple_of(GRANULE)
            && header.memory_bytes <= MAX_BYTES
            && header.data_bytes <= header.memory_bytes
            && header.data_bytes.is_multiple_of(PAGE_SIZE)
            && header.state_bytes <= MAX_STATE
            && header.table_bytes.is_multiple_of(ENTRY)
            && header.table_bytes / ENTRY <= header.data_bytes / PAGE_SIZE;
        if !bounded {
            return Err(self.damaged("header", format!("sizes out of bounds: {header:?}")));
        }
        if header.file_bytes() != have {
            return Err(SnapshotError::Length { path: self.0.to_owned(), have, want: header.file_bytes() });
        }
        Ok(header)
    }

    fn table(&self, bytes: &[u8], header: &Header) -> Result<Vec<Chunk>, SnapshotError> {
        let pages = header.memory_bytes / PAGE_SIZE;
        let mut chunks = Vec::with_capacity(bytes.len() / ENTRY as usize);
        let (mut at, mut next) = (HEADER, 0);
        for entry in bytes.chunks_exact(ENTRY as usize) {
            let (first, count) = (u64_at(entry, 0), u64::from(u32_at(entry, 8)));
            let fits = first >= next
                && (1..=CHUNK_PAGES).contains(&count)
                && first.checked_add(count).is_some_and(|end| end <= pages);
            if !fits {
                return Err(self.damaged("table", format!("pages {first}+{count} are out of order or place")));
            }
            chunks.push(Chunk { first, pages: count, crc: u32_at(entry, 12), at });
            at += count * PAGE_SIZE;
            next = first + count;
        }
        if at != HEADER + header.data_bytes {
            return Err(self.damaged("table", "it does not account for all of the data"));
        }
        Ok(chunks)
    }
}

impl Snapshot {
    /// Opens and verifies everything but the pages. Blocks.
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        let errors = Errors(path);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        let file = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| errors.unreadable("opening it", e.into()))?;
        let file = File::from(file);
        let stat = file.metadata().map_err(|e| errors.unreadable("looking at it", e))?;
        if !stat.is_file() {
            return Err(errors.not_one("it is not a regular file".to_owned()));
        }
        let head = errors.read(&file, "reading the header", 0, HEADER.min(stat.len()))?;
        let header = errors.header(&head, stat.len())?;
        let state_at = HEADER + header.data_bytes;
        let state = errors.read(&file, "reading the state", state_at, header.state_bytes)?;
        if crc32c::crc32c(&state) != header.state_crc {
            return Err(errors.damaged("state", "its checksum does not match"));
        }
        let table =
            errors.read(&file, "reading the table", state_at + header.state_bytes, header.table_bytes)?;
        if crc32c::crc32c(&table) != header.table_crc {
            return Err(errors.damaged("table", "its checksum does not match"));
        }
        let manifest = SnapshotManifest::decode(state.as_slice())
            .map_err(|e| errors.damaged("state", format!("it does not decode: {e}")))?;
        let said = manifest.spec.as_ref().map_or(0, |s| s.memory_bytes);
        if manifest.state.is_none() {
            return Err(errors.damaged("state", "it is missing"));
        }
        if said != header.memory_bytes {
            let problem = format!(
                "it is of a machine of {said} bytes of memory, the header of {}",
                header.memory_bytes
            );
            return Err(errors.damaged("state", problem));
        }
        let chunks = errors.table(&table, &header)?;
        Ok(Self { path: path.to_owned(), file, memory_bytes: header.memory_bytes, manifest, chunks })
    }

    /// What it is of.
    pub fn manifest(&self) -> &SnapshotManifest {
        &self.manifest
    }

    /// The machine's state, to be set; it is not kept twice.
    pub fn take_state(&mut self) -> Option<vpmu_proto::worker::VmState> {
        self.manifest.state.take()
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Chunks of pages, ascending.
    pub fn chunks(&self) -> &[Chunk] {
        &self.chunks
    }

    /// Pages that are in it; all others are zero.
    pub fn pages(&self) -> PageBitmap {
        let mut pages = PageBitmap::new(self.memory_bytes / PAGE_SIZE);
        for chunk in &self.chunks {
            pages.set_range(chunk.first, chunk.pages);
        }
        pages
    }

    /// Reads and verifies one chunk.
    pub fn read(&self, chunk: &Chunk, into: &mut Vec<u8>) -> Result<(), SnapshotError> {
        let errors = Errors(&self.path);
        into.resize(chunk.bytes() as usize, 0);
        self.file.read_exact_at(into, chunk.at).map_err(|e| errors.unreadable("reading pages", e))?;
        if crc32c::crc32c(into) != chunk.crc {
            let problem = format!("pages {}+{} do not match their checksum", chunk.first, chunk.pages);
            return Err(errors.damaged("data", problem));
        }
        Ok(())
    }

    /// Whether it is of a machine with this memory.
    pub fn fits(&self, memory: &GuestMemory) -> Result<(), SnapshotError> {
        if memory.bytes() == self.memory_bytes {
            return Ok(());
        }
        let (path, snapshot) = (self.path.clone(), self.memory_bytes);
        Err(SnapshotError::Memory { path, snapshot, machine: memory.bytes() })
    }

    /// Fills fresh memory with all of its pages. Blocks; after an error the memory is not to be used.
    pub fn load(&self, memory: &GuestMemory) -> Result<(), SnapshotError> {
        self.fits(memory)?;
        let mut buffer = Vec::new();
        for chunk in &self.chunks {
            self.read(chunk, &mut buffer)?;
            memory.write_at(chunk.first * PAGE_SIZE, &buffer)?;
        }
        Ok(())
    }
}
