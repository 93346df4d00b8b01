//! Processes that are kept, ended, released or found again.

use super::*;
use std::process::Command;

/// A process that does not end by itself, with a runtime directory in `dir`.
fn worker(dir: &Path) -> WorkerProcess {
    let child = Command::new("sleep").arg("1000").spawn().expect("sleep");
    let home = dir.join("worker");
    std::fs::create_dir(&home).expect("mkdir");
    let pid = child.id();
    let number = rustix::process::Pid::from_child(&child);
    let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).expect("pidfd");
    let socket = home.join("worker.sock");
    WorkerProcess::new(pid, pidfd, Some(child), home, socket).expect("worker")
}

#[tokio::test]
async fn one_that_is_kept_has_not_ended_by_being_told_to() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path());
    worker.keep();
    assert!(!worker.end().await, "it lives");
    assert!(worker.is_running());
    worker.signal(Signal::KILL);
    worker.exited().await;
    assert!(worker.end().await);
    worker.reap();
}

#[tokio::test]
async fn one_that_the_kernel_did_not_end_is_gone_once_it_is_seen_to_be() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path());
    *worker.ending.lock().await = true;
    assert!(!worker.end().await, "SIGKILL was in vain");
    assert!(worker.is_running() && worker.dir().exists());
    worker.signal(Signal::KILL);
    worker.exited().await;
    assert!(worker.end().await);
    assert!(!worker.dir().exists(), "its directory says that it may live");
}

/// A start that fails drops what it had found of machines that run.
#[tokio::test]
async fn one_that_was_found_outlives_being_dropped() {
    let dir = tempfile::tempdir().expect("tempdir");
    let started = worker(dir.path());
    let pidfd = rustix::io::fcntl_dupfd_cloexec(started.pidfd.get_ref(), 3).expect("pidfd");
    let home = started.dir();
    let socket = started.socket.lock().expect("socket").clone();
    drop(WorkerProcess::new(started.pid, pidfd, None, home, socket).expect("found"));
    assert!(started.is_running(), "dropped, not ended");
    started.signal(Signal::KILL);
    started.exited().await;
    started.reap();
}

#[tokio::test]
async fn one_that_is_ended_is_seen_to_have_ended() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path());
    assert!(worker.end().await && !worker.is_running() && !worker.dir().exists());
    assert!(worker.end().await, "twice is no harm");
}

#[tokio::test]
async fn one_that_is_released_is_ended_though_it_does_not_listen() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path());
    worker.signal(Signal::STOP);
    // Asked to end in order, it would be waited for as long as that takes.
    let released = tokio::time::timeout(TERM / 2, worker.release()).await;
    assert!(released.expect("at once") && !worker.is_running() && !worker.dir().exists());
    assert!(worker.release().await && worker.end().await, "again is no harm");
}

#[tokio::test]
async fn one_that_is_halted_runs_no_more_and_keeps_its_place_until_it_is_released() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path());
    worker.signal(Signal::STOP);
    assert!(worker.halt(Vec::new()).await);
    assert!(departing::has_no_memory(worker.pid) || !worker.is_running(), "nothing of it can run");
    assert!(worker.dir().exists(), "it may not have ended");
    assert!(worker.release().await && !worker.is_running() && !worker.dir().exists());
    assert!(worker.halt(Vec::new()).await, "it runs less than ever");
}

/// What breaks when this process ends.
fn lifeline() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).expect("pipe")
}

/// Whether the other end is still open.
fn holds(broken: &OwnedFd) -> bool {
    let mut fds = [rustix::event::PollFd::new(broken, rustix::event::PollFlags::empty())];
    let now = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
    rustix::event::poll(&mut fds, Some(&now)).expect("poll") == 0
}

#[tokio::test]
async fn one_that_is_claimed_is_found_where_its_machine_is_looked_for() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (broken, lifeline) = lifeline();
    let (spare, home) = (worker(dir.path()), dir.path().join("uid"));
    let worker = spare.claim(home.clone(), lifeline);
    worker.claimed().await.expect("renamed");
    assert_eq!(
        (worker.dir(), worker.socket.lock().expect("socket").clone()),
        (home.clone(), home.join("worker.sock"))
    );
    assert!(home.exists() && !dir.path().join("worker").exists());
    assert!(holds(&broken), "it ends with this process until it has its machine");
    worker.claimed().await.expect("once is enough");
    worker.has_machine();
    assert!(!holds(&broken));
    assert!(worker.end().await && !home.exists());
}

#[tokio::test]
async fn one_whose_claim_fails_leaves_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let (broken, lifeline) = lifeline();
    let worker = worker(dir.path()).claim(dir.path().join("not/there"), lifeline);
    worker.claimed().await.expect_err("nowhere to go");
    worker.claimed().await.expect_err("whoever asks");
    assert!(holds(&broken));
    assert!(worker.end().await && !worker.is_running());
    assert_eq!(std::fs::read_dir(dir.path()).expect("reads").count(), 0);
}

#[tokio::test]
async fn one_that_ends_before_it_is_claimed_leaves_nothing() {
    let dir = tempfile::tempdir().expect("tempdir");
    let worker = worker(dir.path()).claim(dir.path().join("uid"), lifeline().1);
    assert!(worker.end().await);
    assert_eq!(std::fs::read_dir(dir.path()).expect("reads").count(), 0);
}
