//! A disk in memory that, at a crash, drops, tears and reorders everything that was not synced, and whose writes and
//! syncs can be made to fail.

use super::files::{Dir, SegmentFile};
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex};

/// Writes reach the medium in pieces of this many bytes.
const SECTOR: usize = 64;

#[derive(Debug, Clone, Default)]
struct Inode {
    /// As a reader sees it.
    cached: Vec<u8>,
    /// As it is for certain.
    durable: Vec<u8>,
    /// Pieces written since the last successful sync.
    unsynced: Vec<(usize, Vec<u8>)>,
}

#[derive(Debug, Default)]
struct Disk {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Writes and syncs that still succeed; `None` for all.
    budget: Option<u32>,
    /// Bytes that may still be allocated; `None` for any number.
    free: Option<usize>,
    syncs: u64,
}

impl Disk {
    fn spend(&mut self) -> io::Result<()> {
        match &mut self.budget {
            Some(0) => Err(io::Error::other("the disk fails")),
            Some(n) => {
                *n -= 1;
                Ok(())
            }
            None => Ok(()),
        }
    }
}

/// The directory; clones are the same one.
#[derive(Debug, Clone, Default)]
pub(super) struct CrashDir(Arc<Mutex<Disk>>);

/// Supplies decisions of a crash.
pub(super) trait Chance {
    fn yes(&mut self) -> bool;
}

impl<F: FnMut() -> bool> Chance for F {
    fn yes(&mut self) -> bool {
        self()
    }
}

impl CrashDir {
    /// Everything unsynced survives or not, piece by piece, in any order.
    pub(super) fn crash(&self, chance: &mut impl Chance) {
        let mut disk = self.0.lock().unwrap();
        for inode in &mut disk.inodes {
            for (at, piece) in std::mem::take(&mut inode.unsynced) {
                if chance.yes() {
                    apply(&mut inode.durable, at, &piece);
                }
            }
            inode.cached = inode.durable.clone();
        }
        let (now, before) = (disk.names.clone(), disk.durable_names.clone());
        let all: std::collections::BTreeSet<_> = now.keys().chain(before.keys()).cloned().collect();
        for name in all {
            let (new, old) = (now.get(&name), before.get(&name));
            let kept = if new == old || chance.yes() { new } else { old };
            match kept {
                Some(&inode) => disk.durable_names.insert(name, inode),
                None => disk.durable_names.remove(&name),
            };
        }
        disk.names = disk.durable_names.clone();
        disk.budget = None;
    }

    /// After so many more writes and syncs, all of them fail.
    pub(super) fn fail_after(&self, operations: Option<u32>) {
        self.0.lock().unwrap().budget = operations;
    }

    /// So many more bytes can be allocated.
    pub(super) fn free(&self, bytes: Option<usize>) {
        self.0.lock().unwrap().free = bytes;
    }

    pub(super) fn file_syncs(&self) -> u64 {
        self.0.lock().unwrap().syncs
    }

    pub(super) fn files(&self) -> Vec<String> {
        self.0.lock().unwrap().names.keys().cloned().collect()
    }

    /// Changes durable bytes, as a rotten medium would.
    pub(super) fn rot(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut disk = self.0.lock().unwrap();
        let inode = disk.names[name];
        change(&mut disk.inodes[inode].durable);
        disk.inodes[inode].cached = disk.inodes[inode].durable.clone();
    }
}

fn apply(bytes: &mut Vec<u8>, at: usize, piece: &[u8]) {
    let end = at + piece.len();
    if bytes.len() < end {
        bytes.resize(end, 0);
    }
    bytes[at..end].copy_from_slice(piece);
}

#[derive(Debug)]
pub(super) struct CrashFile {
    disk: Arc<Mutex<Disk>>,
    inode: usize,
}

impl Dir for CrashDir {
    type File = CrashFile;

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.files())
    }

    fn create(&self, name: &str) -> io::Result<CrashFile> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        if disk.names.contains_key(name) {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let inode = disk.inodes.len();
        disk.inodes.push(Inode::default());
        disk.names.insert(name.to_owned(), inode);
        Ok(CrashFile { disk: Arc::clone(&self.0), inode })
    }

    fn open(&self, name: &str) -> io::Result<CrashFile> {
        let inode = *self.0.lock().unwrap().names.get(name).ok_or(io::ErrorKind::NotFound)?;
        Ok(CrashFile { disk: Arc::clone(&self.0), inode })
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        disk.names.remove(name).map(|_| ()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.0.lock().unwrap();
        disk.spend()?;
        disk.durable_names = disk.names.clone();
        Ok(())
    }
}

impl SegmentFile for CrashFile {
    fn read_all(&self, max: u64) -> io::Result<Vec<u8>> {
        let disk = self.disk.lock().unwrap();
        let bytes = &disk.inodes[self.inode].cached;
        Ok(bytes[..bytes.len().min(max as usize)].to_vec())
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        let grows = (offset as usize + data.len()).saturating_sub(disk.inodes[self.inode].cached.len());
        if let Some(free) = &mut disk.free {
            *free = free.checked_sub(grows).ok_or(io::ErrorKind::StorageFull)?;
        }
        let failed = disk.spend();
        let inode = &mut disk.inodes[self.inode];
        // A failed write may have reached the medium in part.
        apply(&mut inode.cached, offset as usize, data);
        let mut at = offset as usize;
        for piece in data.chunks(SECTOR) {
            inode.unsynced.push((at, piece.to_vec()));
            at += piece.len();
        }
        failed
    }

    fn sync(&self) -> io::Result<()> {
        let mut disk = self.disk.lock().unwrap();
        disk.syncs += 1;
        disk.spend()?;
        let inode = &mut disk.inodes[self.inode];
        for (at, piece) in std::mem::take(&mut inode.unsynced) {
            apply(&mut inode.durable, at, &piece);
        }
        Ok(())
    }
}
