//! Whatever way a migration ends, no thread, descriptor or socket path stays. Alone in its process: it counts.

mod dataplane_support;

use std::time::{Duration, Instant};

use dataplane_support::*;
use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::CancelFlag;
use vcpu_worker::memory::GuestMemory;

fn count(what: &str) -> usize {
    std::fs::read_dir(format!("/proc/self/{what}")).expect("procfs").count()
}

/// Joined threads leave /proc a moment after their join returns.
fn settle(what: &str, expected: usize) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while count(what) > expected {
        assert!(Instant::now() < deadline, "{} {what} where {expected} were before", count(what));
        std::thread::yield_now();
    }
}

#[test]
fn nothing_is_left_behind() {
    let source = GuestMemory::new("source", 8 * MIB).expect("memory");
    fill(&source, 1, 2);
    let all = PageBitmap::full(source.pages());
    let dir = tempfile::tempdir().expect("dir");
    let (fds, threads) = (count("fd"), count("task"));
    for turn in 0..24 {
        let address = if turn % 2 == 0 { tcp() } else { unix(dir.path()) };
        let connections = 1 + turn % 5;
        let destination = destination(&address, connections, 8 * MIB);
        let cancel = CancelFlag::new();
        let mut out = destination.try_connect(&session(), connections, &source, &cancel).expect("connect");
        out.send_round(1, &all, true).expect("round");
        match turn % 6 {
            0 => {
                out.finish(b"state").expect("finish");
                let mut received = destination.join().expect("received");
                received.acknowledge().expect("acknowledged");
                out.await_applied(Duration::from_secs(30)).expect("applied");
            }
            1 => {
                drop(out);
                destination.join().expect_err("dropped");
            }
            2 => {
                cancel.cancel();
                destination.join().expect_err("cancelled by the source");
            }
            3 => {
                destination.cancel.cancel();
                destination.join().expect_err("cancelled");
                out.send_round(2, &all, true).expect_err("gone");
            }
            4 => {
                out.abort();
                destination.join().expect_err("aborted");
            }
            _ => {
                out.finish(b"state").expect("finish");
                drop(destination.join().expect("received"));
                out.await_applied(Duration::from_secs(30)).expect_err("closed");
            }
        }
    }
    settle("task", threads);
    settle("fd", fds);
    assert_eq!(std::fs::read_dir(dir.path()).expect("dir").count(), 0, "no socket path is left");
}
