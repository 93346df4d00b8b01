//! The journal on a disk that crashes, fails, fills and rots.

use super::crash::CrashDir;
use super::error::JournalError;
use super::log::{Log, Options};
use proptest::prelude::*;
use std::collections::BTreeMap;
use vpmu_proto::store::OwnershipRecord;
use vpmu_proto::store::ownership_record::Phase;

const SMALL: Options = Options { segment_bytes: 12288, compact_at: 4 };

fn record(uid: &str, epoch: u64, phase: Phase) -> OwnershipRecord {
    OwnershipRecord {
        vm_uid: uid.to_owned(),
        epoch,
        owner_host: "host".to_owned(),
        phase: phase.into(),
        ..OwnershipRecord::default()
    }
}

fn open(dir: &CrashDir) -> Log<CrashDir> {
    Log::open(dir.clone(), SMALL).expect("the journal opens")
}

fn put(log: &mut Log<CrashDir>, record: OwnershipRecord) -> Result<OwnershipRecord, JournalError> {
    log.append(vec![record]).pop().expect("one answer a record")
}

fn epoch(log: &Log<CrashDir>, uid: &str) -> u64 {
    log.index().latest(uid).map_or(0, |r| r.epoch)
}

#[test]
fn records_survive_and_lsns_go_on() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    assert_eq!(put(&mut log, record("a", 1, Phase::Owned)).unwrap().lsn, 1);
    assert_eq!(put(&mut log, record("b", 1, Phase::Owned)).unwrap().lsn, 2);
    drop(log);
    dir.crash(&mut || false);
    let mut log = open(&dir);
    assert!(log.recovery().whole && !log.recovery().torn_tail);
    assert_eq!(put(&mut log, record("a", 2, Phase::Owned)).unwrap().lsn, 3);
    assert_eq!((epoch(&log, "a"), epoch(&log, "b")), (2, 1));
}

#[test]
fn a_group_has_one_sync_and_a_repeated_record_none() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    let before = dir.file_syncs();
    let answers = log.append((0..20).map(|n| record(&format!("vm{n}"), 1, Phase::Owned)).collect());
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!((dir.file_syncs() - before, log.syncs()), (1, 1));
    let again = put(&mut log, record("vm3", 1, Phase::Owned)).unwrap();
    assert_eq!((again.lsn, log.syncs()), (4, 1));
}

#[test]
fn what_may_not_follow_is_refused_one_by_one() {
    let mut log = open(&CrashDir::default());
    let answers = log.append(vec![
        record("a", 5, Phase::Owned),
        record("a", 4, Phase::Owned),
        record("a", 5, Phase::HandedOver),
        record("", 1, Phase::Owned),
        OwnershipRecord { peer_address: "x".repeat(2000), ..record("b", 1, Phase::Owned) },
        record("a", 5, Phase::Open),
    ]);
    let reasons: Vec<_> =
        answers.iter().map(|a| a.as_ref().map(|r| r.lsn).map_err(JournalError::reason)).collect();
    assert_eq!(
        reasons,
        [
            Ok(1),
            Err("STALE_EPOCH"),
            Err("OWNERSHIP_STEP"),
            Err("OWNERSHIP_BAD_FIELD"),
            Err("OWNERSHIP_BAD_FIELD"),
            Ok(2)
        ]
    );
}

#[test]
fn a_failed_sync_goes_to_a_new_segment() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    put(&mut log, record("a", 1, Phase::Owned)).unwrap();
    // The write succeeds, the sync fails; the spare needs two more operations, which fail too.
    dir.fail_after(Some(1));
    let doubt = put(&mut log, record("a", 2, Phase::Owned)).unwrap_err();
    assert_eq!(doubt.reason(), "DECISION_IN_DOUBT");
    assert_eq!(epoch(&log, "a"), 1, "what is in doubt does not hold");
    // Nothing overtakes it.
    assert_eq!(put(&mut log, record("b", 1, Phase::Owned)).unwrap_err().reason(), "DECISION_IN_DOUBT");
    dir.fail_after(None);
    assert_eq!(put(&mut log, record("a", 2, Phase::Owned)).unwrap().lsn, 2);
    assert_eq!(put(&mut log, record("b", 1, Phase::Owned)).unwrap().lsn, 3);
    drop(log);
    dir.crash(&mut || false);
    let log = open(&dir);
    assert!(log.recovery().whole);
    assert_eq!((epoch(&log, "a"), epoch(&log, "b")), (2, 1));
}

#[test]
fn a_full_disk_stops_new_migrations_but_no_decision() {
    let dir = CrashDir::default();
    let mut log = Log::open(dir.clone(), Options { segment_bytes: 32768, compact_at: 4 }).unwrap();
    for uid in ["a", "b"] {
        put(&mut log, record(uid, 1, Phase::Owned)).unwrap();
    }
    put(&mut log, record("a", 1, Phase::Open)).unwrap();
    dir.free(Some(0));
    // The spare is there, so one more segment's worth is sure; fill until ordinary records are refused.
    let mut incarnation = 0;
    let refused = loop {
        incarnation += 1;
        let more = OwnershipRecord { incarnation, ..record("b", 1, Phase::Owned) };
        match put(&mut log, more) {
            Ok(_) => assert!(incarnation < 10_000),
            Err(e) => break e,
        }
        let _ = log.maintain();
    };
    assert_eq!(refused.reason(), "JOURNAL_NO_SPACE");
    assert_eq!(put(&mut log, record("c", 1, Phase::Incoming)).unwrap_err().reason(), "JOURNAL_NO_SPACE");
    for (phase, epoch) in [(Phase::Quiesced, 1), (Phase::HandedOver, 2), (Phase::Released, 2)] {
        put(&mut log, record("a", epoch, phase)).unwrap();
    }
    dir.free(None);
    put(&mut log, record("c", 1, Phase::Incoming)).unwrap();
}

/// Flips a bit in the nth record of the first segment.
fn rot_record(dir: &CrashDir, nth: usize) {
    dir.rot(&dir.files()[0], |bytes| {
        let starts = (0..bytes.len()).step_by(8).filter(|&i| bytes[i..].starts_with(b"VPJR"));
        let at = starts.collect::<Vec<_>>()[nth];
        bytes[at + 40] ^= 1;
    });
}

#[test]
fn rot_in_the_middle_makes_uncertain_who_has_no_later_record() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    for (uid, epoch) in [("a", 1), ("b", 1), ("a", 2), ("c", 1)] {
        put(&mut log, record(uid, epoch, Phase::Owned)).unwrap();
    }
    drop(log);
    rot_record(&dir, 2);
    let mut log = open(&dir);
    assert_eq!(log.recovery().gaps, [(3, 3)]);
    assert_eq!(
        (log.recovery().whole, &log.recovery().uncertain[..]),
        (false, &["a".to_owned(), "b".to_owned()][..])
    );
    assert_eq!(log.index().latest("a").unwrap().phase(), Phase::Uncertain);
    assert_eq!(log.index().latest("c").unwrap().phase(), Phase::Owned, "known: its record is later");
    // Only force settles it, and that lasts.
    assert_eq!(put(&mut log, record("a", 2, Phase::Owned)).unwrap_err().reason(), "OWNERSHIP_STEP");
    put(&mut log, record("a", 3, Phase::Owned)).unwrap();
    drop(log);
    let log = open(&dir);
    assert_eq!((log.recovery().whole, &log.recovery().uncertain[..]), (false, &["b".to_owned()][..]));
    assert_eq!(epoch(&log, "a"), 3);
}

#[test]
fn rot_in_the_last_record_is_a_torn_tail() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    put(&mut log, record("a", 1, Phase::Owned)).unwrap();
    put(&mut log, record("a", 2, Phase::Owned)).unwrap();
    drop(log);
    rot_record(&dir, 1);
    let log = open(&dir);
    assert!(log.recovery().whole && log.recovery().torn_tail);
    assert_eq!(epoch(&log, "a"), 1);
}

#[test]
fn a_truncated_last_record_was_never_acknowledged() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    put(&mut log, record("a", 1, Phase::Owned)).unwrap();
    put(&mut log, record("a", 2, Phase::Owned)).unwrap();
    drop(log);
    dir.rot(&dir.files()[0], |bytes| bytes.truncate(80));
    let mut log = open(&dir);
    assert!(log.recovery().whole && log.recovery().torn_tail);
    assert_eq!(epoch(&log, "a"), 1);
    assert_eq!(put(&mut log, record("a", 3, Phase::Owned)).unwrap().lsn, 2);
    drop(log);
    assert_eq!(epoch(&open(&dir), "a"), 3);
}

#[test]
fn compaction_waits_for_open_migrations_and_keeps_what_holds() {
    let dir = CrashDir::default();
    let mut log = open(&dir);
    put(&mut log, record("gone", 1, Phase::Owned)).unwrap();
    put(&mut log, record("gone", 1, Phase::Deleted)).unwrap();
    put(&mut log, record("moving", 7, Phase::Owned)).unwrap();
    put(&mut log, record("moving", 7, Phase::Open)).unwrap();
    let fill = |log: &mut Log<CrashDir>| {
        for _ in 0..2000 {
            let next = epoch(log, "a") + 1;
            put(log, record("a", next, Phase::Owned)).unwrap();
            log.maintain().unwrap();
        }
    };
    fill(&mut log);
    assert!(dir.files().len() > 6, "{:?}", dir.files());
    assert_eq!(log.index().latest("gone").map(|r| r.phase()), Some(Phase::Deleted), "said on disk still");
    put(&mut log, record("moving", 8, Phase::Owned)).unwrap();
    fill(&mut log);
    assert!(dir.files().len() <= 5, "{:?}", dir.files());
    let uids: Vec<_> = log.index().all().into_iter().map(|r| r.vm_uid).collect();
    assert_eq!(uids, ["a", "moving"], "who has been deleted costs no memory for ever");
    drop(log);
    dir.crash(&mut || false);
    let log = open(&dir);
    assert!(log.recovery().whole, "{:?}", log.recovery());
    assert_eq!((epoch(&log, "a"), epoch(&log, "moving"), epoch(&log, "gone")), (4000, 8, 0));
}

#[derive(Debug, Clone)]
enum Act {
    Append(Vec<u8>),
    Maintain,
    FailAfter(u32),
    Heal,
    Crash,
    /// The process dies, the machine does not.
    Die,
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        8 => prop::collection::vec(0u8..5, 1..6).prop_map(Act::Append),
        3 => Just(Act::Maintain),
        2 => (0u32..8).prop_map(Act::FailAfter),
        2 => Just(Act::Heal),
        2 => Just(Act::Crash),
        1 => Just(Act::Die),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever fails and whenever it crashes: an acknowledged record is never lost, nothing that was read once after a
    /// restart is lost later, and no crash is mistaken for corruption.
    #[test]
    fn acknowledged_records_survive(acts in prop::collection::vec(act(), 1..60), seed: u64) {
        let dir = CrashDir::default();
        let mut random = seed | 1;
        let mut chance = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random & 1 == 0
        };
        let mut log = Log::open(dir.clone(), SMALL).unwrap();
        // By machine: the highest acknowledged epoch and the highest that was tried.
        let mut known: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        for act in acts {
            match act {
                Act::Append(uids) => {
                    let group: Vec<_> = uids
                        .iter()
                        .map(|n| {
                            let uid = format!("vm{n}");
                            let tried = &mut known.entry(uid.clone()).or_default().1;
                            *tried += 1;
                            record(&uid, *tried, Phase::Owned)
                        })
                        .collect();
                    for answer in log.append(group) {
                        match answer {
                            Ok(record) => {
                                let acked = &mut known.get_mut(&record.vm_uid).unwrap().0;
                                *acked = record.epoch.max(*acked);
                            }
                            Err(e) => prop_assert!(matches!(e.reason(), "DECISION_IN_DOUBT" | "JOURNAL_NO_SPACE"), "{}", e),
                        }
                    }
                }
                Act::Maintain => drop(log.maintain()),
                Act::FailAfter(n) => dir.fail_after(Some(n)),
                Act::Heal => dir.fail_after(None),
                Act::Crash | Act::Die => {
                    drop(log);
                    if matches!(act, Act::Crash) {
                        dir.crash(&mut chance);
                    }
                    dir.fail_after(None);
                    log = Log::open(dir.clone(), SMALL).unwrap();
                    prop_assert!(log.recovery().whole, "{:?}", log.recovery());
                    for (uid, (acked, tried)) in &mut known {
                        let found = log.index().latest(uid).map_or(0, |r| r.epoch);
                        prop_assert!(found >= *acked && found <= *tried, "{} {}: {} {}", uid, found, acked, tried);
                        // It was read after a restart: it counts.
                        *acked = found;
                    }
                }
            }
            for (uid, (acked, _)) in &known {
                prop_assert!(log.index().latest(uid).map_or(0, |r| r.epoch) >= *acked);
            }
        }
    }

    /// One flipped bit anywhere never makes an older record hold as if it were certain, unless it hit the last group.
    #[test]
    fn no_flipped_bit_goes_back_in_time(at in 0usize..4096 * 8) {
        let dir = CrashDir::default();
        let mut log = open(&dir);
        for uid in ["a", "b", "a", "b", "c"] {
            let next = epoch(&log, uid) + 1;
            put(&mut log, record(uid, next, Phase::Owned)).unwrap();
        }
        drop(log);
        dir.rot(&dir.files()[0], |bytes| bytes[at / 8] ^= 1 << (at % 8));
        let log = open(&dir);
        for uid in ["a", "b"] {
            let held = log.index().latest(uid);
            let sound = held.as_ref().is_some_and(|r| r.epoch == 2 || r.phase() == Phase::Uncertain);
            prop_assert!(sound, "{:?} {:?}", held, log.recovery());
        }
    }
}
