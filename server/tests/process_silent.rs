//! A worker that says nothing while its daemon is started again in the middle of a migration: it is not dead. Nothing of
//! it is given up, nothing else waits for it, and once it answers the migration comes to one end.

mod support;

use std::time::{Duration, Instant};

use rustix::process::{Signal, kill_process};
use support::workers::*;
use support::*;
use tonic::Code;
use vcpu_worker::process::Identity;
use vpmu_proto::api::force_owner_request::Evidence;
use vpmu_proto::api::virtual_machine::State;
use vpmu_proto::api::*;

const OPTIONS: [&str; 2] = ["--isolation", "process"];
/// So that a deadline passes soon.
const SHORT: [&str; 4] = ["--isolation", "process", "--handover-timeout", "500"];

/// Two hosts, and a machine that is on its way from the first to the second. Dropped before its directory.
struct Pair {
    a: Host,
    b: Host,
    workers: [Workers; 2],
    vm: VirtualMachine,
    before: Pmu,
    _dir: tempfile::TempDir,
}

impl Pair {
    /// One of the two, the source or the destination, holds at a point.
    async fn on_the_way(source: bool, point: &str) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        let (here, there) = (dir.path().join("a"), dir.path().join("b"));
        let workers = [Workers::of(&here), Workers::of(&there)];
        let held = ["--isolation", "process", "--hold-at", point];
        let a = Host::start(&here, if source { &held } else { &OPTIONS }).await;
        let b = Host::start(&there, if source { &OPTIONS } else { &held }).await;
        a.create("vm", probe_spec(1, 16)).await;
        let vm = a.start_vm("vm").await;
        let before = a.until_counting("vm").await;
        a.migrate("vm", b.arrival()).await;
        Self { a, b, workers, vm, before, _dir: dir }
    }

    fn silence(&self, host: usize) -> Identity {
        let mut alive = self.workers[host].alive();
        let worker = alive.pop().expect("a worker");
        assert!(alive.is_empty(), "{alive:?} too");
        signal(&worker, Signal::STOP);
        worker
    }

    /// It runs there, at that epoch, in one worker that has all that it had before.
    async fn runs_in_one_place(mut self, host: usize, epoch: u64) {
        let (keeper, other) = if host == 0 { (&self.a, &self.b) } else { (&self.b, &self.a) };
        let found = keeper.until("vm", "RUNNING", is(State::Running)).await;
        assert_eq!((found.epoch, found.migration.as_str()), (epoch, ""), "{found:?}");
        until_beyond(keeper, "vm", &self.before).await;
        assert!(other.list().await.iter().all(|vm| vm.observed_state() != State::Running));
        let begin = Instant::now();
        while self.workers.iter().map(|w| w.alive().len()).sum::<usize>() != 1 {
            assert!(begin.elapsed() < DEADLINE, "two workers");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(self.workers[host].alive(), [identity(&found)]);
        keeper.delete("vm").await;
        assert!(self.workers.iter().all(|w| w.alive().is_empty()));
        assert_eq!((self.a.terminate().await, self.b.terminate().await), (0, 0));
    }
}

fn signal(worker: &Identity, signal: Signal) {
    kill_process(pid(worker.pid), signal).expect("signalled");
}

const ASKED: &str = "a worker with a copy is asked again";

/// Something else that the daemon has to do while it waits.
async fn serves(host: &Host) {
    host.create("other", probe_spec(1, 16)).await;
    host.start_vm("other").await;
    host.until_counting("other").await;
    host.delete("other").await;
}

async fn source_at(point: &str) {
    let mut pair = Pair::on_the_way(true, point).await;
    pair.a.kill_at_hold().await;
    let worker = pair.silence(0);
    pair.a.restart_with(&SHORT).await;
    pair.a.until_logged(ASKED, 2).await;
    let shown = pair.a.get("vm").await;
    assert_eq!(
        (shown.observed_state(), shown.reason.as_str()),
        (State::MigratingOut, "IN_DOUBT"),
        "{shown:?}"
    );
    serves(&pair.a).await;
    // Nor does a daemon that ends take it along.
    assert_eq!(pair.a.terminate().await, 0);
    assert!(lives(&worker), "a silent worker was ended");
    pair.a.restart().await;
    pair.a.until_logged(ASKED, 1).await;
    signal(&worker, Signal::CONT);
    // Nothing was committed: it stays, in the worker that has it.
    let back = pair.a.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!(back.worker_pid, worker.pid, "{back:?}");
    let epoch = pair.vm.epoch + 1;
    pair.runs_in_one_place(0, epoch).await;
}

#[tokio::test]
async fn a_source_that_was_quiesced_waits_for_a_worker_that_runs() {
    source_at("after:source-persist-quiesced").await;
}

#[tokio::test]
async fn a_source_that_was_quiesced_waits_for_a_worker_that_is_sealed() {
    source_at("before:source-persist-handed-over").await;
}

/// It is asked until its process is seen to end; then the destination's copy is what is left, and is committed late.
#[tokio::test]
async fn a_silent_worker_that_dies_leaves_its_machine_to_the_copy_at_the_destination() {
    let mut pair = Pair::on_the_way(true, "before:source-persist-handed-over").await;
    pair.a.kill_at_hold().await;
    let worker = pair.silence(0);
    pair.a.restart_with(&SHORT).await;
    pair.a.until_logged(ASKED, 2).await;
    signal(&worker, Signal::KILL);
    let epoch = pair.vm.epoch + 1;
    pair.a.until("vm", "MOVED", is(State::Moved)).await;
    pair.runs_in_one_place(1, epoch).await;
}

/// The migration was open: it is aborted at once, and the worker goes on when it answers.
#[tokio::test]
async fn an_open_source_takes_its_machine_back_when_its_worker_answers() {
    let mut pair = Pair::on_the_way(true, "after:source-start-copy").await;
    pair.a.kill_at_hold().await;
    let worker = pair.silence(0);
    pair.a.restart_with(&SHORT).await;
    let shown = pair.a.get("vm").await;
    assert_eq!(
        (shown.observed_state(), shown.reason.as_str()),
        (State::Failed, "WORKER_TIMEOUT"),
        "{shown:?}"
    );
    serves(&pair.a).await;
    assert!(lives(&worker), "a silent worker was ended");
    signal(&worker, Signal::CONT);
    let back = pair.a.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!(back.worker_pid, worker.pid, "{back:?}");
    let epoch = pair.vm.epoch + 1;
    pair.runs_in_one_place(0, epoch).await;
}

/// The destination's worker is silent over its daemon's restart, and the source has committed.
#[tokio::test]
async fn a_destination_keeps_a_silent_copy_until_it_can_run_it() {
    // Killed when it had said Ready: the source, held at its decision, goes on when this one is back.
    let mut pair = Pair::on_the_way(true, "before:source-persist-handed-over").await;
    pair.a.until_held().await;
    pair.b.kill().await;
    let worker = pair.silence(1);
    pair.b.restart_with(&SHORT).await;
    pair.b.until_logged(ASKED, 2).await;
    pair.a.signal(Signal::CONT);
    let begin = Instant::now();
    loop {
        let list = ListMigrationsRequest { parent: name("vm"), ..ListMigrationsRequest::default() };
        let all =
            pair.a.migrations().await.list_migrations(list).await.expect("lists").into_inner().migrations;
        if all.iter().any(|m| m.state() == migration::State::Committed) {
            break;
        }
        assert!(begin.elapsed() < DEADLINE, "it is not committed: {all:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let arriving = pair.b.get("vm").await;
    assert_eq!(arriving.observed_state(), State::Incoming, "{arriving:?}");
    serves(&pair.b).await;
    // Nor does a daemon that ends take it along.
    assert_eq!(pair.b.terminate().await, 0);
    assert!(lives(&worker), "a silent worker was ended");
    pair.b.restart().await;
    pair.b.until_logged(ASKED, 1).await;
    signal(&worker, Signal::CONT);
    let epoch = pair.vm.epoch + 1;
    let found = pair.b.until("vm", "RUNNING", is(State::Running)).await;
    assert_eq!(found.worker_pid, worker.pid, "{found:?}");
    pair.a.until("vm", "MOVED", is(State::Moved)).await;
    pair.runs_in_one_place(1, epoch).await;
}

/// A destination's worker that dies without a word: the source, which had committed, gets its machine back.
#[tokio::test]
async fn a_silent_copy_that_dies_is_given_back() {
    let mut pair = Pair::on_the_way(true, "before:source-persist-handed-over").await;
    pair.a.until_held().await;
    pair.b.kill().await;
    let worker = pair.silence(1);
    pair.b.restart_with(&SHORT).await;
    pair.b.until_logged(ASKED, 2).await;
    pair.a.signal(Signal::CONT);
    pair.b.until("vm", "INCOMING", is(State::Incoming)).await;
    signal(&worker, Signal::KILL);
    let epoch = pair.vm.epoch + 2;
    let begin = Instant::now();
    while !pair.b.list().await.is_empty() {
        assert!(begin.elapsed() < DEADLINE, "what was lost is still shown");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    pair.runs_in_one_place(0, epoch).await;
}

/// The source had handed over. Its worker was sealed before that, so that it keeps nobody waiting: the machine runs on the
/// destination, and the source hears so. It may have pages that the destination lacks, and is ended once it says no.
#[tokio::test]
async fn a_silent_worker_does_not_hold_up_what_it_was_sealed_for() {
    let mut pair = Pair::on_the_way(true, "after:source-persist-handed-over").await;
    pair.a.kill_at_hold().await;
    let worker = pair.silence(0);
    pair.a.restart_with(&SHORT).await;
    pair.b.until("vm", "RUNNING", is(State::Running)).await;
    pair.a.until_logged(ASKED, 3).await;
    assert!(lives(&worker), "a silent worker was ended");
    signal(&worker, Signal::CONT);
    until_gone(&worker).await;
    pair.a.until("vm", "MOVED", is(State::Moved)).await;
    let epoch = pair.vm.epoch + 1;
    pair.runs_in_one_place(1, epoch).await;
}

/// The destination is dead for good and the source's worker silent: whoever takes the machine by force, with the proof
/// that it never ran there, is heard at once, and it goes on in that worker when it answers.
#[tokio::test]
async fn a_machine_is_forced_while_its_worker_is_silent() {
    for (point, epochs) in [("after:source-persist-handed-over", 3), ("before:source-persist-handed-over", 2)]
    {
        let mut pair = Pair::on_the_way(true, point).await;
        pair.a.kill_at_hold().await;
        pair.b.kill().await;
        let token = fence(&pair.b.dir, &["--end-worker"]).expect("fenced");
        let worker = pair.silence(0);
        pair.a.restart_with(&SHORT).await;
        pair.a.until_logged(ASKED, 2).await;
        let request = ForceOwnerRequest {
            name: name("vm"),
            evidence: Some(Evidence::FenceToken(token)),
            reason: "it burnt".to_owned(),
        };
        // It is on its way, which is all that can be said of it yet.
        let answer = pair.a.migrations().await.force_owner(request.clone()).await;
        expect_error(answer, Code::Unavailable, "FORCE_UNDER_WAY");
        assert!(lives(&worker), "{point}: a silent worker was ended");
        signal(&worker, Signal::CONT);
        let back = pair.a.until("vm", "RUNNING", is(State::Running)).await;
        assert_eq!((back.worker_pid, back.epoch), (worker.pid, pair.vm.epoch + epochs), "{point}: {back:?}");
        until_beyond(&pair.a, "vm", &pair.before).await;
        let again =
            pair.a.migrations().await.force_owner(request).await.expect("the same again").into_inner();
        assert_eq!(again.epoch, back.epoch);
        pair.a.delete("vm").await;
        assert!(pair.workers.iter().all(|w| w.alive().is_empty()), "{point}");
        assert_eq!(pair.a.terminate().await, 0);
    }
}
