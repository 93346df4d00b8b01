//! Each way through the handover, step by step: what is asked of the driver, and in which order.

use vpmu_proto::store::ownership_record::Phase;
use vpmu_server::handover::destination::{self as d, Destination};
use vpmu_server::handover::recovery::Worker;
use vpmu_server::handover::source::{self as s, Cause, Source};
use vpmu_server::handover::{Digest, Handover, PeerAnswer};

const D: Digest = [7; 32];
const OTHER: Digest = [8; 32];

fn handover(host: &str, peer: &str) -> Handover {
    Handover {
        vm_uid: "vm".to_owned(),
        migration_id: "m".to_owned(),
        epoch: 4,
        host: host.to_owned(),
        peer_host: peer.to_owned(),
        peer_address: "unix:/peer".to_owned(),
        peer_store: String::new(),
        incarnation: 1,
        run: true,
    }
}

/// Short form of effects: persists with phase and epoch, the others by name.
fn names<E: std::fmt::Debug>(effects: &[E], record: impl Fn(&E) -> Option<String>) -> Vec<String> {
    let name = |e: &E| format!("{e:?}").split([' ', '{']).next().unwrap_or_default().to_owned();
    effects.iter().map(|e| record(e).unwrap_or_else(|| name(e))).collect()
}

fn src(effects: &[s::Effect]) -> Vec<String> {
    names(effects, |e| match e {
        s::Effect::Persist(r) => Some(format!("{:?}({}, {})", r.phase(), r.epoch, r.owner_host)),
        s::Effect::Grant { epoch, .. } => Some(format!("Grant({epoch})")),
        _ => None,
    })
}

fn dst(effects: &[d::Effect]) -> Vec<String> {
    names(effects, |e| match e {
        d::Effect::Persist(r) => Some(format!("{:?}({}, {})", r.phase(), r.epoch, r.owner_host)),
        d::Effect::Grant { epoch, .. } => Some(format!("Grant({epoch})")),
        _ => None,
    })
}

fn source() -> Source {
    Source::new(handover("A", "B"))
}

fn destination() -> Destination {
    Destination::new(handover("B", "A"))
}

/// Applies events and returns the last one's effects.
fn run_source(machine: &mut Source, events: &[s::Event]) -> Vec<String> {
    events.iter().fold(Vec::new(), |_, &event| src(&machine.apply(event)))
}

fn run_destination(machine: &mut Destination, events: &[d::Event]) -> Vec<String> {
    events.iter().fold(Vec::new(), |_, &event| dst(&machine.apply(event)))
}

const TO_PRECOPY: [s::Event; 3] =
    [s::Event::Begin, s::Event::Persisted(Phase::Open), s::Event::PrepareAccepted];
const TO_STOPPING: [s::Event; 5] = [
    s::Event::Begin,
    s::Event::Persisted(Phase::Open),
    s::Event::PrepareAccepted,
    s::Event::Converged,
    s::Event::Persisted(Phase::Quiesced),
];

fn committing() -> Source {
    let mut m = source();
    run_source(&mut m, &TO_STOPPING);
    run_source(&mut m, &[s::Event::Sealed(D), s::Event::ReadyReceived(D)]);
    m
}

fn handed_over() -> Source {
    let mut m = committing();
    run_source(&mut m, &[s::Event::Persisted(Phase::HandedOver)]);
    m
}

fn ready() -> Destination {
    let mut m = destination();
    run_destination(
        &mut m,
        &[d::Event::Begin, d::Event::Persisted(Phase::Incoming), d::Event::WorkerReady(D)],
    );
    m
}

/// After a post-copy the worker is the only one that has the rest: it is ended when that has gone over, in whatever order
/// the three things that a release waits for come.
#[test]
fn source_serves_what_follows_before_it_is_released() {
    use s::Event as E;
    let needed = [E::EnteredReceived, E::PmuPersisted, E::Drained];
    for (first, second, third) in [(0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)] {
        let mut m = handed_over();
        m.postcopy = true;
        assert_eq!(run_source(&mut m, &[needed[first]]), [""; 0]);
        assert_eq!(run_source(&mut m, &[needed[second]]), [""; 0]);
        let entered = third != 0;
        assert_eq!(m.is_followed(), entered && third == 2);
        assert!(third != 2 || m.owes_pages());
        assert_eq!(run_source(&mut m, &[E::CancelRequested]), ["RefuseCancel"]);
        assert_eq!(run_source(&mut m, &[E::PeerLost, E::ReturnedReceived]).len(), usize::from(!entered));
        if !entered {
            // Until it has entered it may still come back, whole.
            continue;
        }
        assert_eq!(run_source(&mut m, &[needed[third]]), ["EndWorker"]);
        assert_eq!(run_source(&mut m, &[E::WorkerDied]), ["Released(5, B)"]);
    }
    // A worker that died with pages unserved leaves nothing to be kept, and is never granted again.
    let mut m = handed_over();
    m.postcopy = true;
    run_source(&mut m, &[E::EnteredReceived, E::PmuPersisted]);
    assert!(m.owes_pages());
    assert_eq!(run_source(&mut m, &[E::WorkerDied]), ["Released(5, B)"]);
    assert_eq!(run_source(&mut m, &[E::Persisted(Phase::Released)]), ["SendReleased", "Done(Moved)"]);
}

#[test]
fn source_moves_a_machine() {
    use s::Event as E;
    let mut m = source();
    let path = [
        (E::Begin, vec!["Open(4, A)"]),
        (E::Persisted(Phase::Open), vec!["Prepare"]),
        (E::PrepareAccepted, vec!["StartCopy"]),
        (E::Converged, vec!["Quiesced(4, A)"]),
        (E::Persisted(Phase::Quiesced), vec!["FinishCopy"]),
        (E::Sealed(D), vec!["PersistPmu"]),
        (E::ReadyReceived(D), vec!["HandedOver(5, B)"]),
        (E::Persisted(Phase::HandedOver), vec!["SendGo"]),
        (E::EnteredReceived, vec![]),
        (E::PmuPersisted, vec!["EndWorker"]),
        (E::WorkerDied, vec!["Released(5, B)"]),
        (E::Persisted(Phase::Released), vec!["SendReleased", "Done(Moved)"]),
    ];
    for (event, expected) in path {
        assert_eq!(src(&m.apply(event)), expected, "{event:?}");
    }
    assert_eq!(m.outcome(), Some(s::Outcome::Moved));
}

#[test]
fn the_order_of_sealed_and_ready_does_not_matter() {
    use s::Event as E;
    let mut m = source();
    run_source(&mut m, &TO_STOPPING);
    assert_eq!(run_source(&mut m, &[E::ReadyReceived(D)]), [""; 0]);
    assert_eq!(run_source(&mut m, &[E::Sealed(D)]), ["PersistPmu", "HandedOver(5, B)"]);
}

#[test]
fn source_aborts_until_it_commits() {
    use s::Event as E;
    let aborts = [
        (E::CancelRequested, Cause::Cancelled),
        (E::TimedOut, Cause::TimedOut),
        (E::PeerLost, Cause::PeerLost),
        (E::PeerFailed, Cause::PeerFailed),
        (E::CopyFailed, Cause::CopyFailed),
        (E::PmuFailed, Cause::StoreFailed),
    ];
    for (event, cause) in aborts {
        for prefix in [&TO_PRECOPY[..2], &TO_PRECOPY[..], &TO_STOPPING[..]] {
            let mut m = source();
            run_source(&mut m, prefix);
            assert!(m.can_cancel());
            assert_eq!(run_source(&mut m, &[event]), ["Owned(5, A)"], "{event:?}");
            assert!(!m.can_cancel());
            let granted = run_source(&mut m, &[E::Persisted(Phase::Owned)]);
            assert_eq!(granted, ["Grant(5)", "CancelCopy", "SendAbort"]);
            run_source(&mut m, &[E::Granted]);
            assert_eq!(m.outcome(), Some(s::Outcome::Aborted(cause)));
        }
        // While a record is being written, the abort waits for it.
        let mut m = source();
        assert_eq!(run_source(&mut m, &[E::Begin, event]), [""; 0]);
        assert_eq!(run_source(&mut m, &[E::Persisted(Phase::Open)]), ["Owned(5, A)"]);
        // After the decision nothing aborts.
        for mut m in [committing(), handed_over()] {
            let after = run_source(&mut m, &[event]);
            assert!(
                after.iter().all(|e| ["RefuseCancel", "AskPeer", "PersistPmu"].contains(&e.as_str())),
                "{after:?}"
            );
            assert!(m.outcome().is_none() && !m.can_cancel());
        }
    }
}

#[test]
fn different_digests_never_commit() {
    use s::Event as E;
    let mut m = source();
    run_source(&mut m, &TO_STOPPING);
    assert_eq!(run_source(&mut m, &[E::Sealed(D), E::ReadyReceived(OTHER)]), ["Owned(5, A)"]);
    let mut m = ready();
    assert_eq!(run_destination(&mut m, &[d::Event::GoReceived { epoch: 5, digest: OTHER }]), ["SealWorker"]);
    assert_eq!(run_destination(&mut m, &[d::Event::WorkerSealed]), ["Returned(6, A)"]);
}

#[test]
fn a_decision_in_doubt_is_written_again_and_nothing_follows_before() {
    use s::Event as E;
    let mut m = committing();
    for _ in 0..3 {
        assert_eq!(run_source(&mut m, &[E::PersistFailed]), ["HandedOver(5, B)"]);
    }
    assert_eq!(run_source(&mut m, &[E::Persisted(Phase::HandedOver)]), ["SendGo"]);
    let mut m = ready();
    run_destination(&mut m, &[d::Event::GoReceived { epoch: 5, digest: D }]);
    assert_eq!(run_destination(&mut m, &[d::Event::PersistFailed]), ["Entered(5, B)"]);
    assert_eq!(run_destination(&mut m, &[d::Event::Persisted(Phase::Entered)]), ["Grant(5)"]);
}

#[test]
fn a_dead_source_worker_leaves_the_decision_to_what_the_destination_has() {
    use s::Event as E;
    let stopped = |events: &[E]| {
        let mut m = source();
        run_source(&mut m, &TO_STOPPING);
        let last = run_source(&mut m, events);
        (m, last)
    };
    // (b) The copy is there: a late commit saves it.
    assert_eq!(stopped(&[E::WorkerDied]).1, ["AskPeer"]);
    assert_eq!(stopped(&[E::WorkerDied, E::PeerAnswered(PeerAnswer::Ready(D))]).1, ["HandedOver(5, B)"]);
    assert_eq!(stopped(&[E::Sealed(D), E::WorkerDied, E::ReadyReceived(D)]).1, ["HandedOver(5, B)"]);
    assert_eq!(stopped(&[E::Sealed(D), E::WorkerDied, E::ReadyReceived(OTHER)]).1, ["Owned(5, A)"]);
    // (c) No copy anywhere.
    let (mut m, last) = stopped(&[E::WorkerDied, E::PeerAnswered(PeerAnswer::Aborted)]);
    assert_eq!(last, ["Owned(5, A)"]);
    assert_eq!(run_source(&mut m, &[E::Persisted(Phase::Owned)]), ["SendAbort", "Done(Failed(WorkerDied))"]);
    // (d) No answer is no answer: neither abort nor restart, and a cancel would destroy the last copy.
    for answer in [PeerAnswer::Unreachable, PeerAnswer::Unknown, PeerAnswer::Undecided] {
        assert_eq!(stopped(&[E::WorkerDied, E::PeerAnswered(answer)]).1, ["AskPeer"]);
    }
    assert_eq!(stopped(&[E::WorkerDied, E::CancelRequested]).1, ["RefuseCancel"]);
    assert_eq!(stopped(&[E::WorkerDied, E::TimedOut]).1, [""; 0]);
}

#[test]
fn what_the_destination_gives_back_runs_at_the_source() {
    use s::Event as E;
    let mut m = handed_over();
    assert_eq!(run_source(&mut m, &[E::ReturnedReceived]), ["Owned(6, A)"]);
    assert_eq!(run_source(&mut m, &[E::Persisted(Phase::Owned)]), ["Grant(6)", "CancelCopy"]);
    run_source(&mut m, &[E::Granted]);
    assert_eq!(m.outcome(), Some(s::Outcome::Returned));
    // After Entered it cannot be given back.
    let mut m = handed_over();
    assert_eq!(run_source(&mut m, &[E::EnteredReceived, E::ReturnedReceived]), [""; 0]);
}

#[test]
fn a_lost_link_after_the_commit_is_asked_over() {
    use s::Event as E;
    let mut m = handed_over();
    assert_eq!(run_source(&mut m, &[E::PeerLost]), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[E::PeerAnswered(PeerAnswer::Unreachable)]), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[E::PeerAnswered(PeerAnswer::Unknown)]), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[E::PeerAnswered(PeerAnswer::Ready(D))]), ["SendGo"]);
    assert_eq!(
        run_source(&mut m, &[E::PmuPersisted, E::PeerAnswered(PeerAnswer::Committed(None))]),
        ["EndWorker"]
    );
}

#[test]
fn a_later_owner_is_obeyed_and_a_stale_one_is_not() {
    use s::Event as E;
    let mut m = handed_over();
    assert_eq!(run_source(&mut m, &[E::PeerAnswered(PeerAnswer::Superseded(4))]), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[E::PeerAnswered(PeerAnswer::Superseded(6))]), ["SealWorker"]);
    assert_eq!(run_source(&mut m, &[E::WorkerSealed]), ["Superseded(6, B)"]);
    let last = run_source(&mut m, &[E::Persisted(Phase::Superseded)]);
    assert_eq!(last, ["EndWorker", "Done(Superseded)"]);
}

#[test]
fn destination_takes_a_machine_in() {
    use d::Event as E;
    let mut m = destination();
    let path = [
        (E::Begin, vec!["Incoming(4, A)"]),
        (E::Persisted(Phase::Incoming), vec!["StartWorker"]),
        (E::WorkerReady(D), vec!["SendReady"]),
        (E::LeaseExpired, vec![]),
        (E::GoReceived { epoch: 5, digest: D }, vec!["Entered(5, B)"]),
        (E::Persisted(Phase::Entered), vec!["Grant(5)"]),
        (E::Granted, vec!["SendEntered"]),
        (E::GoReceived { epoch: 5, digest: D }, vec!["SendEntered"]),
        (E::ReleasedReceived, vec!["Owned(5, B)"]),
        (E::Persisted(Phase::Owned), vec!["Done(Arrived)"]),
        (E::GoReceived { epoch: 5, digest: D }, vec!["SendEntered"]),
    ];
    for (event, expected) in path {
        assert_eq!(dst(&m.apply(event)), expected, "{event:?}");
    }
}

#[test]
fn before_ready_the_destination_drops_and_after_it_keeps() {
    use d::Event as E;
    for event in [E::LeaseExpired, E::SourceLost, E::WorkerFailed, E::AbortReceived { epoch: 5 }] {
        let mut m = destination();
        run_destination(&mut m, &[E::Begin, E::Persisted(Phase::Incoming)]);
        assert_eq!(dst(&m.apply(event))[0], "EndWorker", "{event:?}");
        let last = run_destination(&mut m, &[E::WorkerDied]);
        assert!(last[0].starts_with("Aborted("), "{last:?}");
        run_destination(&mut m, &[E::Persisted(Phase::Aborted)]);
        assert_eq!(m.outcome(), Some(d::Outcome::Dropped));
    }
    let mut m = ready();
    assert_eq!(run_destination(&mut m, &[E::LeaseExpired]), [""; 0]);
    assert_eq!(run_destination(&mut m, &[E::SourceLost]), ["AskSource"]);
    for answer in [PeerAnswer::Undecided, PeerAnswer::Unreachable, PeerAnswer::Unknown] {
        assert_eq!(run_destination(&mut m, &[E::SourceAnswered(answer)]), ["AskSource"]);
    }
    assert_eq!(run_destination(&mut m, &[E::AbortReceived { epoch: 9 }]), [""; 0], "of another decision");
    let mut other = m.clone();
    assert_eq!(run_destination(&mut other, &[E::SourceAnswered(PeerAnswer::Aborted)]), ["EndWorker"]);
    assert_eq!(
        run_destination(&mut m, &[E::SourceAnswered(PeerAnswer::Committed(Some(D)))]),
        ["Entered(5, B)"]
    );
}

#[test]
fn a_copy_that_died_is_given_back_or_dropped_as_the_source_decided() {
    use d::Event as E;
    let mut m = ready();
    assert_eq!(run_destination(&mut m, &[E::WorkerDied]), ["SendFailed", "AskSource"]);
    let mut dropped = m.clone();
    assert_eq!(run_destination(&mut dropped, &[E::AbortReceived { epoch: 5 }]), ["Aborted(5, A)"]);
    assert_eq!(run_destination(&mut m, &[E::GoReceived { epoch: 5, digest: D }]), ["Returned(6, A)"]);
    let last = run_destination(&mut m, &[E::Persisted(Phase::Returned)]);
    assert_eq!(last, ["SendReturned", "EndWorker", "Done(Returned)"]);
    assert_eq!(run_destination(&mut m, &[E::GoReceived { epoch: 5, digest: D }]), ["SendReturned"]);
    // Also while Entered is on its way: it was never granted.
    let mut m = ready();
    run_destination(&mut m, &[E::GoReceived { epoch: 5, digest: D }, E::WorkerDied]);
    assert_eq!(run_destination(&mut m, &[E::Persisted(Phase::Entered)]), ["Returned(6, A)"]);
    // Once a grant is on its way it is too late for that.
    let mut m = ready();
    run_destination(&mut m, &[E::GoReceived { epoch: 5, digest: D }, E::Persisted(Phase::Entered)]);
    assert_eq!(run_destination(&mut m, &[E::WorkerDied]), ["SendEntered"]);
    run_destination(&mut m, &[E::SourceLost]);
    assert_eq!(m.outcome(), Some(d::Outcome::ArrivedDead));
}

#[test]
fn restarts_go_on_from_the_record() {
    let record = |m: &mut Source, events: &[s::Event]| {
        let effects: Vec<_> = events.iter().flat_map(|&e| m.apply(e)).collect();
        effects
            .into_iter()
            .rev()
            .find_map(|e| if let s::Effect::Persist(r) = e { Some(r) } else { None })
            .unwrap()
    };
    let quiesced = record(&mut source(), &TO_STOPPING);
    let (mut m, effects) =
        Source::recovered(handover("A", "B"), &quiesced, Worker::Sealed { epoch: 4 }).unwrap();
    assert_eq!(src(&effects), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[s::Event::PeerAnswered(PeerAnswer::Unreachable)]), ["Owned(5, A)"]);
    let (mut m, _) = Source::recovered(handover("A", "B"), &quiesced, Worker::Dead).unwrap();
    assert_eq!(run_source(&mut m, &[s::Event::PeerAnswered(PeerAnswer::Unreachable)]), ["AskPeer"]);
    assert_eq!(run_source(&mut m, &[s::Event::PeerAnswered(PeerAnswer::Ready(D))]), ["HandedOver(5, B)"]);
    // It claims a commit of which the journal here knows nothing.
    let (mut m, _) = Source::recovered(handover("A", "B"), &quiesced, Worker::Sealed { epoch: 4 }).unwrap();
    assert_eq!(run_source(&mut m, &[s::Event::PeerAnswered(PeerAnswer::Committed(None))]), ["SealWorker"]);
    assert_eq!(run_source(&mut m, &[s::Event::WorkerSealed])[0], "Uncertain(5, )");

    let mut m = source();
    run_source(&mut m, &TO_STOPPING);
    let committed = record(&mut m, &[s::Event::Sealed(D), s::Event::ReadyReceived(D)]);
    assert_eq!(Handover::of(&committed, "A", true), handover("A", "B"));
    let (mut m, effects) =
        Source::recovered(handover("A", "B"), &committed, Worker::Paused { epoch: 4 }).unwrap();
    assert_eq!(src(&effects), ["SealWorker", "AskPeer"]);
    // It was sealed before HandedOver was written: Go waits for no second seal, and that changes nothing when it comes.
    assert_eq!(run_source(&mut m, &[s::Event::PeerAnswered(PeerAnswer::Ready(D))]), ["SendGo"]);
    assert!(run_source(&mut m, &[s::Event::WorkerSealed]).is_empty());
    assert_eq!(run_source(&mut m, &[s::Event::EnteredReceived]), ["EndWorker"]);
}
