//! What the segments say after a crash: a pure function from frames to the records that hold.
//!
//! - A missing lsn that no frame claims to be durable was never acknowledged: it and all after it are dropped.
//! - A missing lsn that some frame claims to be durable is corruption: a machine whose last record lies before it may
//!   have had a later one, so it is Uncertain; one with a record after it is known.

use super::frame::{Found, Frame, Payload};
use prost::Message as _;
use std::collections::BTreeMap;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

/// One segment as read.
#[derive(Debug)]
pub(crate) struct Scanned {
    pub(crate) found: Vec<Found>,
    /// It has bytes that are no frame.
    pub(crate) bad: bool,
}

/// What was found when the journal was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recovery {
    /// No acknowledged record is missing. If false, a machine of the store without a record here is uncertain too.
    pub whole: bool,
    /// Machines whose last record may be missing, by uid.
    pub uncertain: Vec<String>,
    /// A tail that was never acknowledged was dropped.
    pub torn_tail: bool,
    /// Ranges of missing lsns, first and last.
    pub gaps: Vec<(u64, u64)>,
}

/// The outcome.
#[derive(Debug, Default)]
pub(crate) struct Recovered {
    pub(crate) report: Recovery,
    pub(crate) latest: BTreeMap<String, OwnershipRecord>,
    /// The last lsn that counts; 0 for none.
    pub(crate) last_lsn: u64,
    /// First lsn that counts.
    pub(crate) base: u64,
}

pub(crate) fn recover(segments: &[&Scanned]) -> Recovered {
    let frames = || segments.iter().flat_map(|s| &s.found).map(|f| &f.frame);
    let base = frames()
        .filter_map(|f| match f.payload {
            Payload::Snapshot { base } if base < f.lsn => Some((f.lsn, base)),
            _ => None,
        })
        .max()
        .map_or(1, |(_, base)| base);
    let durable = frames().map(|f| f.durable).max().unwrap_or(0);
    let mut by_lsn: BTreeMap<u64, &Frame> = BTreeMap::new();
    let mut out = Recovered { base, last_lsn: base.saturating_sub(1), ..Recovered::default() };
    for frame in frames().filter(|f| f.lsn >= base) {
        // A retried group lies in two segments, once each, with the same payload.
        if by_lsn.insert(frame.lsn, frame).is_some_and(|other| other.payload != frame.payload) {
            out.report.gaps.push((frame.lsn, frame.lsn));
        }
    }
    for (&lsn, frame) in &by_lsn {
        let next = out.last_lsn.saturating_add(1);
        if lsn > next {
            if durable < next {
                break;
            }
            out.report.gaps.push((next, lsn - 1));
        }
        out.last_lsn = lsn;
        if let Payload::Record(bytes) = &frame.payload {
            match OwnershipRecord::decode(bytes.as_slice()) {
                Ok(record) if record.lsn == lsn => drop(out.latest.insert(record.vm_uid.clone(), record)),
                _ => out.report.gaps.push((lsn, lsn)),
            }
        }
    }
    out.report.whole = out.report.gaps.is_empty();
    out.report.torn_tail = by_lsn.keys().next_back().is_some_and(|&l| l > out.last_lsn)
        || (out.report.whole && segments.iter().any(|s| s.bad));
    if let Some(gap) = out.report.gaps.iter().map(|(_, last)| *last).max() {
        for record in out.latest.values_mut().filter(|r| r.lsn <= gap) {
            record.set_phase(Phase::Uncertain);
            out.report.uncertain.push(record.vm_uid.clone());
        }
    }
    out
}
