//! Grants, seals and terms: what runs, and what is refused.

use super::*;
use proptest::prelude::*;

#[test]
fn it_is_unused_when_the_last_thread_is_gone() {
    use std::task::{Context, Waker};
    let right = RunRight::default();
    let unused = || std::pin::pin!(right.unused()).poll(&mut Context::from_waker(Waker::noop())).is_ready();
    assert!(unused(), "nobody has come");
    let (one, other) = (right.enter(), right.enter());
    drop(one);
    assert!(!unused());
    drop(other);
    assert!(unused());
}

#[derive(Debug, Clone)]
enum Op {
    Attach(u64),
    Grant(u64, u64, u64, Option<u64>),
    Seal(u64),
    Tick(u64),
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        (0u64..6).prop_map(Op::Attach),
        (0u64..8, 0u64..6, 0u64..6, proptest::option::of(0u64..40))
            .prop_map(|(e, t, s, d)| Op::Grant(e, t, s, d)),
        (0u64..8).prop_map(Op::Seal),
        (0u64..10).prop_map(Op::Tick),
    ]
}

proptest! {
    /// Whatever is done in whatever order: a sealed epoch never runs, nothing falls, a refusal changes nothing,
    /// and the published word says what the rights say.
    #[test]
    fn a_sealed_epoch_never_runs(ops in proptest::collection::vec(op(), 0..60)) {
        let mut rights = Rights::default();
        let word = RunRight::default();
        let mut now = 0;
        let mut sealed_by_hand = 0;
        for op in ops {
            let before = rights.clone();
            match op {
                Op::Attach(term) => {
                    if rights.attach("s", "v", 1, term).is_err() {
                        prop_assert_eq!(&rights, &before);
                    }
                }
                Op::Grant(epoch, term, seq, deadline_ns) => {
                    let ok = rights.grant(Grant { epoch, term, seq, deadline_ns }, now).is_ok();
                    prop_assert!(!(ok && epoch <= sealed_by_hand));
                    if ok {
                        prop_assert_eq!(rights.may_run(now), Ok(()));
                    } else {
                        prop_assert_eq!(&rights, &before);
                    }
                }
                Op::Seal(epoch) => {
                    rights.seal(epoch);
                    sealed_by_hand = sealed_by_hand.max(epoch);
                }
                Op::Tick(by) => now += by,
            }
            word.publish(&rights);
            prop_assert_eq!(word.allows(|| now), rights.may_run(now).is_ok());
            prop_assert!(rights.sealed() >= before.sealed());
            prop_assert_eq!(rights.sealed(), sealed_by_hand);
            if rights.may_run(now).is_ok() {
                prop_assert!(rights.current().is_some_and(|g| g.epoch > sealed_by_hand));
            }
            let term = |r: &Rights| r.attached().map_or(0, |a| a.term);
            prop_assert!(term(&rights) >= term(&before));
        }
    }

    /// Only the attached term commands.
    #[test]
    fn lower_and_unknown_terms_are_refused(attached in 1u64..50, asked in 0u64..60) {
        let mut rights = Rights::default();
        rights.attach("s", "v", 3, attached).unwrap();
        let answer = rights.check("v", 3, asked);
        prop_assert_eq!(answer.is_ok(), asked == attached);
        if asked < attached {
            prop_assert_eq!(answer, Err(Refused::Fenced { term: asked, current: attached }));
        }
    }
}

#[test]
fn another_vm_incarnation_or_store_is_refused() {
    let mut rights = Rights::default();
    assert_eq!(rights.check("v", 1, 1).unwrap_err().reason(), "NOT_ATTACHED");
    rights.attach("s", "v", 1, 4).unwrap();
    assert_eq!(rights.check("w", 1, 4).unwrap_err().reason(), "OTHER_VM");
    assert_eq!(rights.check("v", 2, 4).unwrap_err().reason(), "OTHER_INCARNATION");
    assert_eq!(rights.attach("t", "v", 1, 5).unwrap_err().reason(), "OTHER_STORE");
    assert_eq!(rights.attach("s", "v", 1, 3).unwrap_err().reason(), "TERM_FENCED");
    assert_eq!(rights.attach("s", "v", 1, 0).unwrap_err().reason(), "NO_TERM");
    assert_eq!(rights.attached().map(|a| a.term), Some(4));
}

#[test]
fn a_grant_ends_at_its_deadline_and_can_be_renewed() {
    let mut rights = Rights::default();
    let grant = |seq, deadline_ns| Grant { epoch: 1, term: 1, seq, deadline_ns: Some(deadline_ns) };
    rights.grant(grant(1, 100), 0).unwrap();
    assert!(rights.may_run(99).is_ok());
    assert_eq!(rights.may_run(100).unwrap_err().reason(), "GRANT_EXPIRED");
    assert_eq!(rights.grant(grant(2, 100), 100).unwrap_err().reason(), "GRANT_EXPIRED");
    rights.grant(grant(2, 200), 100).unwrap();
    assert!(rights.may_run(150).is_ok());
    assert_eq!(rights.grant(grant(1, 300), 150).unwrap_err().reason(), "GRANT_STALE");
}
