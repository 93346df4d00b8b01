//! Files: what is written is read, every damage is found, nothing half-done stays.

use std::path::Path;

use vpmu_proto::api::VirtualMachineSpec;
use vpmu_proto::worker::{SnapshotManifest, VmState};

use super::read::Snapshot;
use super::write::{Progress, sweep, write};
use super::*;
use crate::memory::GuestMemory;

const BYTES: u64 = 2 << 20;

fn manifest() -> SnapshotManifest {
    let spec = VirtualMachineSpec { vcpus: 1, memory_bytes: BYTES, ..VirtualMachineSpec::default() };
    SnapshotManifest {
        version: VERSION,
        vm_name: "a".to_owned(),
        spec: Some(spec),
        state: Some(VmState { version: 1, hypervisor: "none".to_owned(), ..VmState::default() }),
        ..SnapshotManifest::default()
    }
}

/// Pages 3, 4 and 500 hold something; page 10 was touched and is zero.
fn filled() -> GuestMemory {
    let memory = GuestMemory::new("snapshot", BYTES).expect("memory");
    for (page, byte) in [(3u64, 1u8), (4, 2), (500, 3), (10, 0)] {
        memory.write_at(page * PAGE_SIZE, &[byte; 4096]).expect("inside");
    }
    memory
}

fn written(dir: &Path) -> PathBuf {
    let path = dir.join("a");
    let written = write(&path, &manifest(), &filled(), &Progress::default()).expect("written");
    assert_eq!(written.pages, 3);
    assert_eq!(written.file_bytes, std::fs::metadata(&path).expect("there").len());
    path
}

/// Everything that a restore reads.
fn restore(path: &Path) -> Result<GuestMemory, SnapshotError> {
    let snapshot = Snapshot::open(path)?;
    let memory = GuestMemory::new("restored", BYTES).expect("memory");
    snapshot.load(&memory)?;
    Ok(memory)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .expect("list")
        .map(|e| e.expect("entry").file_name().into_string().expect("text"))
        .collect();
    names.sort();
    names
}

#[test]
fn what_was_written_is_read() {
    let dir = tempfile::tempdir().expect("directory");
    let path = written(dir.path());
    let snapshot = Snapshot::open(&path).expect("opens");
    assert_eq!(*snapshot.manifest(), manifest());
    assert_eq!(snapshot.pages().runs().collect::<Vec<_>>(), [(3, 2), (500, 1)]);
    let memory = restore(&path).expect("restored");
    assert_eq!(
        memory.crc32c(&[(0, BYTES)], 0).expect("crc"),
        filled().crc32c(&[(0, BYTES)], 0).expect("crc")
    );
    assert_eq!(names(dir.path()), ["a"]);
    let larger = GuestMemory::new("larger", 2 * BYTES).expect("memory");
    assert_eq!(snapshot.load(&larger).expect_err("refused").reason(), "SNAPSHOT_MEMORY_MISMATCH");
    // Written over: the new one or the old one, never a mix.
    let progress = Progress::default();
    progress.cancel.store(true, std::sync::atomic::Ordering::Relaxed);
    let error = write(&path, &manifest(), &filled(), &progress).expect_err("cancelled");
    assert_eq!(error.reason(), "CANCELLED");
    assert_eq!(names(dir.path()), ["a"]);
    restore(&path).expect("the one from before");
}

#[test]
fn one_flipped_bit_anywhere_is_found() {
    let dir = tempfile::tempdir().expect("directory");
    let good = std::fs::read(written(dir.path())).expect("read");
    let path = dir.path().join("bad");
    let mut seen = std::collections::BTreeMap::new();
    // Every byte of the small parts; of the header's padding and of the pages every 61st, and their ends.
    let (data, state) = (4096, 4096 + 3 * 4096);
    let everywhere =
        |at: &usize| !(64..state).contains(at) || at.is_multiple_of(61) || (data - 4..=data).contains(at);
    let places: Vec<usize> = (0..good.len()).filter(everywhere).collect();
    let within = |from: usize, to: usize| places.iter().filter(|at| (from..to).contains(at)).count();
    for &at in &places {
        let mut bad = good.clone();
        bad[at] ^= 1 << (at % 8);
        std::fs::write(&path, &bad).expect("write");
        let error = restore(&path).expect_err("found");
        let part = match &error {
            SnapshotError::Damaged { part, .. } => *part,
            other => other.reason(),
        };
        *seen.entry(part).or_insert(0) += 1;
    }
    let table = good.len() - 32;
    let expected = [
        ("SNAPSHOT_NOT_ONE", 8),
        ("SNAPSHOT_VERSION_UNSUPPORTED", 4),
        ("data", within(data, state)),
        ("header", within(12, data)),
        ("state", within(state, table)),
        ("table", 32),
    ];
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn what_is_cut_or_added_to_is_found() {
    let dir = tempfile::tempdir().expect("directory");
    let good = std::fs::read(written(dir.path())).expect("read");
    let path = dir.path().join("bad");
    for cut in [0, 4, 11, 12, 100, 4095, 4096, 5000, good.len() - 1] {
        std::fs::write(&path, &good[..cut]).expect("write");
        let reason = restore(&path).expect_err("found").reason();
        let expected = match cut {
            0..8 => "SNAPSHOT_NOT_ONE",
            _ => "SNAPSHOT_LENGTH_WRONG",
        };
        assert_eq!(reason, expected, "{cut}");
    }
    let mut longer = good;
    longer.push(0);
    std::fs::write(&path, &longer).expect("write");
    assert_eq!(restore(&path).expect_err("found").reason(), "SNAPSHOT_LENGTH_WRONG");
}

/// Checksums that match do not make sizes right.
#[test]
fn sizes_are_bounded_before_they_are_used() {
    let dir = tempfile::tempdir().expect("directory");
    let good = std::fs::read(written(dir.path())).expect("read");
    let path = dir.path().join("bad");
    let words: [(usize, u64); 8] =
        [(16, 0), (16, 4096), (16, u64::MAX), (24, !4095), (24, 4096), (32, u64::MAX), (40, !15), (40, 0)];
    for (at, value) in words {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
        let crc = crc32c::crc32c(&bad[..4092]);
        bad[4092..4096].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&path, &bad).expect("write");
        let error = restore(&path).expect_err("found");
        assert!(
            matches!(error.reason(), "SNAPSHOT_DAMAGED" | "SNAPSHOT_LENGTH_WRONG"),
            "{at} {value:#x}: {error}"
        );
    }
    // A table that is signed but points outside.
    for (first, count) in [(512u64, 1u32), (511, 2), (0, 65), (0, 0), (u64::MAX, 1)] {
        let mut bad = good.clone();
        let table = bad.len() - 32;
        bad[table..table + 8].copy_from_slice(&first.to_le_bytes());
        bad[table + 8..table + 12].copy_from_slice(&count.to_le_bytes());
        let crc = crc32c::crc32c(&bad[table..]);
        bad[52..56].copy_from_slice(&crc.to_le_bytes());
        let crc = crc32c::crc32c(&bad[..4092]);
        bad[4092..4096].copy_from_slice(&crc.to_le_bytes());
        std::fs::write(&path, &bad).expect("write");
        let error = restore(&path).expect_err("found");
        assert!(error.to_string().contains("table"), "{first} {count}: {error}");
    }
}

#[test]
fn what_cannot_be_read_or_written_is_named() {
    let dir = tempfile::tempdir().expect("directory");
    let path = written(dir.path());
    assert_eq!(restore(&dir.path().join("none")).expect_err("none").reason(), "SNAPSHOT_UNREADABLE");
    assert_eq!(restore(dir.path()).expect_err("a directory").reason(), "SNAPSHOT_NOT_ONE");
    let link = dir.path().join("link");
    std::os::unix::fs::symlink(&path, &link).expect("link");
    assert_eq!(restore(&link).expect_err("a link").reason(), "SNAPSHOT_UNREADABLE");
    let nowhere = dir.path().join("no/such/place");
    let error = write(&nowhere, &manifest(), &filled(), &Progress::default()).expect_err("refused");
    assert_eq!(error.reason(), "SNAPSHOT_UNWRITABLE");
    // A writer that lives keeps the name; what one that died left is swept away, or used again.
    let part = dir.path().join(".b.part");
    let other = std::fs::File::create(&part).expect("part");
    rustix::fs::flock(&other, rustix::fs::FlockOperation::LockExclusive).expect("lock");
    let error = write(&dir.path().join("b"), &manifest(), &filled(), &Progress::default()).expect_err("busy");
    assert_eq!(error.reason(), "SNAPSHOT_BUSY");
    sweep(dir.path()).expect("swept");
    assert!(part.exists(), "it is being written");
    drop(other);
    sweep(dir.path()).expect("swept");
    assert_eq!(names(dir.path()), ["a", "link"]);
}
