//! Back from read-only: once the disk has room again the database is opened anew.
//!
//! sled keeps its first failure for good, so that only another instance can write. What it finds is what is durable: every
//! write that was acknowledged, and of the group that failed all or nothing. View and books are made from that, as at
//! the daemon's start; nothing is taken over from the instance that failed.
//!
//! Invariant: writes are taken again only after one was flushed and fdatasynced by the new instance.

use super::books::{Books, Plan};
use super::disk::Disk;
use super::error::StoreError;
use super::keys::Key;
use super::view::View;
use super::writer::Writer;
use std::io::Write as _;
use std::path::Path;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// First wait; each is twice the one before.
const FIRST: Duration = Duration::from_millis(500);
/// Longest wait.
const MOST: Duration = Duration::from_secs(30);
/// Wait for what still reads in the one that failed; those who write wait meanwhile, and it is tried again.
const PATIENCE: Duration = Duration::from_secs(1);
/// Room that must be there, bytes: some segments of sled and of the journal.
const ROOM: usize = 4 << 20;
/// File that shows whether there is.
const PROBE: &str = "room";

/// When it is tried again.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Retry {
    since: Instant,
    next: Instant,
    wait: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        let since = Instant::now();
        Self { since, next: since + FIRST, wait: FIRST }
    }
}

impl Retry {
    pub(crate) fn next(&self) -> Instant {
        self.next
    }

    pub(crate) fn later(&mut self) {
        self.wait = (self.wait * 2).min(MOST);
        self.next = Instant::now() + self.wait;
    }
}

/// Takes room and gives it back.
fn has_room(dir: &Path) -> Result<(), StoreError> {
    let path = dir.join(PROBE);
    let filled = std::fs::File::create(&path).and_then(|mut file| {
        // Not zeros: a file system may keep those in no room at all.
        file.write_all(&vec![0x5a; ROOM])?;
        file.sync_data()
    });
    let removed = std::fs::remove_file(&path);
    filled.and(removed).map_err(|e| StoreError::io("no room to write in", &path, &e))
}

impl Writer {
    /// One attempt; says how it went.
    pub(crate) fn try_again(&mut self) {
        let since = self.retry.map_or_else(Instant::now, |retry| retry.since);
        match self.reopen() {
            Ok(()) => {
                self.retry = None;
                *self.shared.failure.write().unwrap_or_else(PoisonError::into_inner) = None;
                self.shared.recoveries.fetch_add(1, Ordering::Release);
                let seconds = since.elapsed().as_secs();
                tracing::info!(seconds, "the store takes writes again");
            }
            Err(error) => tracing::warn!(%error, "the store stays read-only"),
        }
    }

    fn reopen(&mut self) -> Result<(), StoreError> {
        has_room(&self.dir)?;
        drop(self.shared.reader.write().unwrap_or_else(PoisonError::into_inner).take());
        if let Some(failed) = self.disk.take() {
            failed.close();
        }
        let disk = Disk::open(&self.dir.join("sled"), PATIENCE)?;
        let mut loaded = disk.load()?;
        let mut damaged = std::mem::take(&mut loaded.damaged);
        let view = View::load(&loaded, &mut damaged);
        if damaged.len() > self.damaged {
            return Err(StoreError::Corrupt {
                path: self.dir.clone(),
                message: format!("{} records do not check that did before", damaged.len() - self.damaged),
            });
        }
        let parts = loaded.records.iter().map(|(key, (_, parts))| (key.clone(), *parts));
        let mut books = Books::new(&view, parts);
        let mut plan = Plan::default();
        books.write(Key::Host, &self.host, &mut plan);
        disk.commit(plan.batch)?;
        self.books = books;
        *self.shared.view.write().unwrap_or_else(PoisonError::into_inner) = view;
        *self.shared.reader.write().unwrap_or_else(PoisonError::into_inner) = Some(disk.reader());
        self.disk = Some(disk);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_a_bound() {
        let mut retry = Retry::default();
        let mut waits = Vec::new();
        for _ in 0..8 {
            retry.later();
            waits.push(retry.wait.as_millis());
        }
        assert_eq!(waits, [1000, 2000, 4000, 8000, 16_000, 30_000, 30_000, 30_000]);
    }

    #[test]
    fn room_is_given_back() {
        let dir = tempfile::tempdir().expect("tempdir");
        has_room(dir.path()).expect("room");
        assert_eq!(std::fs::read_dir(dir.path()).expect("list").count(), 0);
        assert_eq!(has_room(&dir.path().join("none")).expect_err("no directory").reason(), "STORE_IO");
    }
}
