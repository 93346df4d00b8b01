//! The journal's files: appending, rotating, compacting.
//!
//! ```text
//!   0000000000000007.seg   current: frames, then zeros
//!   0000000000000008.seg   spare: zeros, so that a full disk cannot stop a decision
//!
//!   append ─▶ write + fdatasync ──ok──▶ index, acknowledged
//!                   │ error
//!                   ▼
//!             same group into the spare ──ok──▶ index, acknowledged
//!                   │ error
//!                   ▼
//!              in doubt: kept, and nothing else is written before it
//! ```
//!
//! Invariants: an acknowledged record was fdatasynced in a file whose entry was fsynced; a segment in which a write or
//! sync failed is never written again in this life of the process; the index holds durable records only.

use super::error::JournalError;
use super::files::{Dir, SegmentFile};
use super::frame::{Frame, MAX_FRAME, MAX_PAYLOAD, Payload, scan};
use super::index::Index;
use super::recover::{Recovered, Recovery, Scanned, recover};
use crate::handover::phase::{is_open, may_follow};
use prost::Message as _;
use std::collections::BTreeMap;
use std::io;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// Space kept for the records of one open migration, in bytes.
const RESERVE: u64 = 8 * MAX_FRAME as u64;

/// Sizes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Options {
    /// Bytes of a segment; a multiple of 8.
    pub(crate) segment_bytes: u64,
    /// Compact when there are this many segments.
    pub(crate) compact_at: usize,
}

impl Default for Options {
    fn default() -> Self {
        Self { segment_bytes: 1 << 20, compact_at: 4 }
    }
}

#[derive(Debug)]
struct Segment<F> {
    number: u64,
    file: F,
    tail: u64,
}

/// A frame that is being made durable. It keeps its lsn and content through all retries.
#[derive(Debug)]
enum Pending {
    Record(OwnershipRecord),
    Snapshot { lsn: u64, base: u64 },
}

/// The journal, used from one thread.
#[derive(Debug)]
pub(crate) struct Log<D: Dir> {
    dir: D,
    options: Options,
    current: Segment<D::File>,
    /// A write or sync of `current` failed.
    suspect: bool,
    spare: Option<Segment<D::File>>,
    /// Segments before `current`, ascending.
    older: Vec<u64>,
    durable: u64,
    pending: Vec<Pending>,
    index: Index,
    recovery: Recovery,
    syncs: u64,
}

fn name(number: u64) -> String {
    format!("{number:016x}.seg")
}

fn number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".seg").filter(|d| d.len() == 16)?;
    u64::from_str_radix(digits, 16).ok()
}

/// A new segment: zeros on disk, and its entry too.
fn create<D: Dir>(dir: &D, options: Options, number: u64) -> io::Result<Segment<D::File>> {
    let file = dir.create(&name(number))?;
    let made = zero(&file, 0, options.segment_bytes).and_then(|()| dir.sync());
    if let Err(e) = made {
        let _ = dir.remove(&name(number));
        return Err(e);
    }
    Ok(Segment { number, file, tail: 0 })
}

fn zero(file: &impl SegmentFile, from: u64, to: u64) -> io::Result<()> {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let mut at = from;
    while at < to {
        let len = (to - at).min(ZEROS.len() as u64);
        file.write_at(at, ZEROS.get(..len as usize).unwrap_or(&ZEROS))?;
        at += len;
    }
    file.sync()
}

impl<D: Dir> Log<D> {
    /// Reads all segments, drops a tail that was never acknowledged, and makes durable what counts.
    pub(crate) fn open(dir: D, options: Options) -> io::Result<Self> {
        let mut numbers: Vec<u64> = dir.list()?.iter().filter_map(|n| number(n)).collect();
        numbers.sort_unstable();
        let mut files = BTreeMap::new();
        for &n in &numbers {
            let file = dir.open(&name(n))?;
            // A reader bound: a file that is larger is not ours.
            let bytes = file.read_all(options.segment_bytes.max(64 << 20))?;
            let (found, bad) = scan(&bytes);
            files.insert(n, (file, bytes, Scanned { found, bad }));
        }
        let recovered = recover(&files.values().map(|(_, _, s)| s).collect::<Vec<_>>());
        let mut segments = Vec::new();
        for (n, (file, bytes, scanned)) in files {
            let counts = |lsn: u64| lsn >= recovered.base && lsn <= recovered.last_lsn;
            let kept = scanned.found.iter().filter(|f| counts(f.frame.lsn)).map(|f| f.end).max();
            // Frames before the base are from before a compaction whose removals did not survive.
            let old = scanned.found.iter().filter(|f| f.frame.lsn < recovered.base).map(|f| f.end).max();
            let tail = kept.max(old).unwrap_or(0);
            let len = (bytes.len() as u64).max(options.segment_bytes);
            let rest = bytes.get(tail as usize..).unwrap_or_default();
            let dirty = rest.iter().any(|&b| b != 0) || (bytes.len() as u64) < options.segment_bytes;
            if dirty {
                // What does not count must not come back behind later records.
                zero(&file, tail, len)?;
            } else {
                // A record may have been read from the page cache alone; it counts from here on.
                file.sync()?;
            }
            segments.push(Segment { number: n, file, tail });
        }
        dir.sync()?;
        Self::assemble(dir, options, segments, recovered)
    }

    fn assemble(
        dir: D,
        options: Options,
        segments: Vec<Segment<D::File>>,
        recovered: Recovered,
    ) -> io::Result<Self> {
        let used = segments.iter().rposition(|s| s.tail > 0);
        let (mut current, mut spare, mut older) = (None, None, Vec::new());
        for (i, segment) in segments.into_iter().enumerate() {
            if used.is_some_and(|u| i < u) {
                older.push(segment.number);
            } else if current.is_none() {
                current = Some(segment);
            } else if spare.is_none() {
                spare = Some(segment);
            } else {
                dir.remove(&name(segment.number))?;
            }
        }
        let current = match current {
            Some(segment) => segment,
            None => create(&dir, options, 1)?,
        };
        let mut log = Self {
            dir,
            options,
            current,
            suspect: false,
            spare,
            older,
            durable: recovered.last_lsn,
            pending: Vec::new(),
            index: Index::new(recovered.latest),
            recovery: recovered.report,
            syncs: 0,
        };
        if let Err(error) = log.ensure_spare() {
            tracing::warn!(%error, "no spare journal segment: migrations are refused until there is space");
        }
        Ok(log)
    }

    pub(crate) fn index(&self) -> &Index {
        &self.index
    }

    pub(crate) fn recovery(&self) -> &Recovery {
        &self.recovery
    }

    /// Successful and failed syncs of appended groups so far.
    pub(crate) fn syncs(&self) -> u64 {
        self.syncs
    }

    /// Appends a group with one sync; one answer a record. A record equal to the one that holds is already durable.
    pub(crate) fn append(
        &mut self,
        group: Vec<OwnershipRecord>,
    ) -> Vec<Result<OwnershipRecord, JournalError>> {
        if let Err(cause) = self.settle() {
            return group.into_iter().map(|r| Err(in_doubt(&r, &cause))).collect();
        }
        let mut staged: BTreeMap<String, OwnershipRecord> = BTreeMap::new();
        let (mut records, mut ahead) = (Vec::new(), 0);
        let mut answers = Vec::with_capacity(group.len());
        for mut record in group {
            let held = staged.get(&record.vm_uid).cloned().or_else(|| self.index.latest(&record.vm_uid));
            record.lsn = held.as_ref().map_or(0, |h| h.lsn);
            if held.as_ref() == Some(&record) {
                answers.push(Ok(record));
                continue;
            }
            record.lsn = self.durable + records.len() as u64 + 1;
            let checked = check(&record)
                .and_then(|()| may_follow(held.as_ref(), &record).map_err(JournalError::from))
                .and_then(|()| self.admit(held.as_ref(), &record, ahead));
            if checked.is_ok() {
                ahead += frame_bytes(&record);
                staged.insert(record.vm_uid.clone(), record.clone());
                records.push(record.clone());
            }
            answers.push(checked.map(|()| record));
        }
        if records.is_empty() {
            return answers;
        }
        self.pending = records.into_iter().map(Pending::Record).collect();
        if let Err(cause) = self.settle() {
            for answer in &mut answers {
                match answer {
                    Ok(record) if record.lsn > self.durable => *answer = Err(in_doubt(record, &cause)),
                    _ => {}
                }
            }
        }
        answers
    }

    /// Whether the record may take space behind `ahead` bytes of its group: decisions of open migrations have theirs
    /// reserved, everything else must leave that alone.
    fn admit(
        &mut self,
        held: Option<&OwnershipRecord>,
        record: &OwnershipRecord,
        ahead: u64,
    ) -> Result<(), JournalError> {
        if held.is_some_and(|h| is_open(h.phase())) {
            return Ok(());
        }
        let opens = is_open(record.phase());
        let open = self.index.count(|r| is_open(r.phase())) + u64::from(opens);
        let needed = open * RESERVE + ahead + frame_bytes(record);
        if !opens && self.room() >= needed {
            return Ok(());
        }
        self.ensure_spare().map_err(|e| JournalError::NoSpace { cause: e.to_string() })?;
        if open == 0 || self.room().max(self.options.segment_bytes) >= needed {
            return Ok(());
        }
        Err(JournalError::NoSpace { cause: format!("{needed} bytes are needed, {open} migrations are open") })
    }

    fn room(&self) -> u64 {
        if self.suspect { 0 } else { self.options.segment_bytes.saturating_sub(self.current.tail) }
    }

    /// Makes the pending group durable, in a new segment if the current one fails.
    fn settle(&mut self) -> io::Result<()> {
        if self.pending.is_empty() {
            return Ok(());
        }
        let mut bytes = Vec::new();
        for pending in &self.pending {
            let (lsn, payload) = match pending {
                Pending::Record(record) => (record.lsn, Payload::Record(record.encode_to_vec())),
                Pending::Snapshot { lsn, base } => (*lsn, Payload::Snapshot { base: *base }),
            };
            Frame { lsn, durable: self.durable, payload }.encode(&mut bytes);
        }
        self.write(&bytes)?;
        for pending in self.pending.drain(..) {
            match pending {
                Pending::Record(record) => {
                    self.durable = record.lsn;
                    self.index.put(record);
                }
                Pending::Snapshot { lsn, .. } => self.durable = lsn,
            }
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut failed = None;
        for _ in 0..2 {
            if (bytes.len() as u64) > self.room() {
                self.rotate()?;
            }
            self.syncs += 1;
            let segment = &self.current;
            match segment.file.write_at(segment.tail, bytes).and_then(|()| segment.file.sync()) {
                Ok(()) => {
                    self.current.tail += bytes.len() as u64;
                    return Ok(());
                }
                Err(error) => {
                    tracing::error!(%error, segment = self.current.number, "journal write failed");
                    self.suspect = true;
                    failed = Some(error);
                }
            }
        }
        Err(failed.unwrap_or_else(|| io::ErrorKind::Other.into()))
    }

    fn rotate(&mut self) -> io::Result<()> {
        self.ensure_spare()?;
        let next = self.spare.take().ok_or(io::ErrorKind::StorageFull)?;
        let old = std::mem::replace(&mut self.current, next);
        self.older.push(old.number);
        self.suspect = false;
        Ok(())
    }

    fn ensure_spare(&mut self) -> io::Result<()> {
        if self.spare.is_none() {
            self.spare = Some(create(&self.dir, self.options, self.current.number + 1)?);
        }
        Ok(())
    }

    /// Work that nobody waits for: a new spare, compaction.
    pub(crate) fn maintain(&mut self) -> io::Result<()> {
        self.ensure_spare()?;
        let open = self.index.count(|r| is_open(r.phase())) > 0;
        if self.older.len() + 1 < self.options.compact_at
            || open
            || !self.recovery.whole
            || !self.pending.is_empty()
        {
            return Ok(());
        }
        self.compact()
    }

    /// Repeats the record that holds of each machine, then removes what came before. A machine that was deleted is
    /// forgotten.
    fn compact(&mut self) -> io::Result<()> {
        self.rotate()?;
        let obsolete = std::mem::take(&mut self.older);
        let base = self.durable + 1;
        let result = self.repeat_all(base);
        if let Err(e) = result {
            self.older.splice(0..0, obsolete);
            return Err(e);
        }
        // As after a restart, which finds none of these any more.
        self.index.forget(|record| record.phase() == Phase::Deleted);
        for number in obsolete {
            self.dir.remove(&name(number))?;
        }
        self.dir.sync()?;
        self.ensure_spare()
    }

    fn repeat_all(&mut self, base: u64) -> io::Result<()> {
        let kept: Vec<_> = self.index.all().into_iter().filter(|r| r.phase() != Phase::Deleted).collect();
        for chunk in kept.chunks(32) {
            let mut next = self.durable;
            self.pending = chunk
                .iter()
                .map(|record| {
                    next += 1;
                    Pending::Record(OwnershipRecord { lsn: next, ..record.clone() })
                })
                .collect();
            self.settle()?;
        }
        self.pending = vec![Pending::Snapshot { lsn: self.durable + 1, base }];
        self.settle()
    }
}

fn check(record: &OwnershipRecord) -> Result<(), JournalError> {
    if record.vm_uid.is_empty() {
        return Err(JournalError::BadField {
            field: "vm_uid",
            problem: "is empty; name the machine".to_owned(),
        });
    }
    let bytes = record.encoded_len();
    if bytes > MAX_PAYLOAD {
        let problem = format!("{bytes} bytes in all, more than {MAX_PAYLOAD}; shorten addresses and names");
        return Err(JournalError::BadField { field: "record", problem });
    }
    Ok(())
}

/// Bytes that the record takes in a segment.
fn frame_bytes(record: &OwnershipRecord) -> u64 {
    (MAX_FRAME - MAX_PAYLOAD + record.encoded_len().next_multiple_of(8)) as u64
}

fn in_doubt(record: &OwnershipRecord, cause: &io::Error) -> JournalError {
    JournalError::InDoubt { vm_uid: record.vm_uid.clone(), cause: cause.to_string() }
}
