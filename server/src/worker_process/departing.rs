//! A worker whose memory is another's already ends before the kernel has taken it apart.
//!
//! ```text
//!   SIGKILL ──▶ its threads leave the kernel for the last time ──▶ the last of them unmaps its memory ──▶ pidfd readable
//!                      halt returns: none has memory, so none runs        (a page at a time: 0.1 s a GiB)
//! ```
//! A thread gives its memory up for good before what it shared is unmapped (kernel/exit.c, `exit_mm`), and KVM runs a vCPU
//! only for a thread with the memory that the VM was made in. So once no thread has any, nothing of the guest runs, writes
//! or answers, however long the unmapping takes; and where that memory is shared with the destination, it frees nothing.
//! What a thread executes (`/proc/PID/task/TID/exe`) is gone with its memory, and asking for it takes no part in that memory,
//! of which the asker's might else be the last.
//!
//! Invariants: in this daemon its runtime directory is nobody else's until the process has ended, or has taken far too long for
//! that ([`Departing::gone`]). The next daemon takes a process whose first thread is a zombie for dead and clears what it left:
//! it can do nothing any more.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use tokio_util::sync::CancellationToken;

use super::{KILL, WorkerProcess};

/// How long a process may take to be taken apart: 0.1 s a GiB, more where memory is slow.
const APART: Duration = Duration::from_secs(60);
/// How long is waited between two looks.
const PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000 };

impl WorkerProcess {
    /// Kills it and returns once nothing of it can run any more, which may be long before it has ended; says whether that
    /// is so. What the kernel still does for it is done on `cores`, if any are named. [`Self::release`] is still to be
    /// called.
    pub async fn halt(&self, cores: Vec<u32>) -> bool {
        let _ending = self.ending.lock().await;
        let pidfd = match self.pidfd.get_ref().try_clone() {
            Ok(pidfd) => pidfd,
            Err(error) => {
                tracing::warn!(pid = self.pid, %error, "a worker's end is waited for to its last");
                return false;
            }
        };
        self.will_end();
        let pid = self.pid;
        // By number: of one that has ended it may be another's.
        if !cores.is_empty() && self.is_running() {
            let moving = move || vcpu_worker::host::affinity::set_process(pid, &cores);
            if let Ok(Err(error)) = tokio::task::spawn_blocking(moving).await {
                tracing::debug!(pid, %error, "a worker ends on the cores that it had");
            }
        }
        self.signal(Signal::KILL);
        let halted = tokio::task::spawn_blocking(move || halted(pid, &pidfd, KILL)).await;
        halted.unwrap_or(false)
    }
}

/// Waits until none of a process's threads can run, `within` at most. Blocks. The process has been killed: it makes no
/// thread any more.
fn halted(pid: u32, pidfd: &OwnedFd, within: Duration) -> bool {
    let until = Instant::now() + within;
    loop {
        if has_no_memory(pid) {
            return true;
        }
        let mut fds = [PollFd::new(pidfd, PollFlags::IN)];
        if matches!(poll(&mut fds, Some(&PAUSE)), Ok(1..)) {
            return true;
        }
        if Instant::now() > until {
            return false;
        }
    }
}

/// Whether no thread of a process has memory: what cannot be read is taken for one that has. So is one that is gone between
/// list and look: the list may have ended with it, before others (fs/proc/base.c, `next_tid`). A number that another process
/// has got meanwhile may be asked: then this one is gone.
pub(super) fn has_no_memory(pid: u32) -> bool {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return false };
    let mut seen = false;
    for task in tasks {
        let Ok(task) = task.map(|task| task.path()) else { return false };
        let executes = fs::read_link(task.join("exe"));
        if !executes.is_err_and(|error| error.kind() == ErrorKind::NotFound) || !task.exists() {
            return false;
        }
        seen = true;
    }
    seen
}

/// Those that are under way, by machine.
#[derive(Debug, Clone, Default)]
pub struct Departing {
    under_way: Arc<Mutex<HashMap<uuid::Uuid, (String, CancellationToken)>>>,
}

/// One of them; gone when this is dropped.
struct Entry {
    of: Departing,
    id: uuid::Uuid,
    gone: CancellationToken,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.of.under_way.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
        self.gone.cancel();
    }
}

impl Departing {
    /// Sees a worker of this machine to its end, aside.
    pub fn see_off(&self, uid: &str, end: impl Future<Output = ()> + Send + 'static) {
        let entry = Entry { of: self.clone(), id: uuid::Uuid::new_v4(), gone: CancellationToken::new() };
        let known = (uid.to_owned(), entry.gone.clone());
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(entry.id, known);
        tokio::spawn(async move {
            let _entry = entry;
            end.await;
        });
    }

    /// Returns once those of this machine that were on their way out are gone, or all if none is named. If one takes longer
    /// than the kernel should, that is found out by who needs its place.
    pub async fn gone(&self, uid: Option<&str>) {
        let waited: Vec<_> = {
            let under_way = self.under_way.lock().unwrap_or_else(PoisonError::into_inner);
            let wanted = under_way.values().filter(|(of, _)| uid.is_none_or(|uid| uid == of));
            wanted.map(|(_, gone)| gone.clone()).collect()
        };
        let all = futures_util::future::join_all(waited.iter().map(CancellationToken::cancelled));
        if tokio::time::timeout(APART, all).await.is_err() {
            tracing::warn!(?uid, "workers whose machines are elsewhere are still being taken apart");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_has_memory_until_it_is_killed_and_waited_for() {
        assert!(!has_no_memory(std::process::id()), "this one runs");
        let mut child = Command::new("sleep").arg("600").stdin(Stdio::null()).spawn().expect("a process");
        let pid = child.id();
        let number = rustix::process::Pid::from_raw(pid.cast_signed()).expect("a pid");
        let pidfd = rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).expect("pidfd");
        assert!(!halted(pid, &pidfd, Duration::from_millis(20)), "it lives");
        child.kill().expect("killed");
        assert!(halted(pid, &pidfd, KILL));
        // A zombie is still listed, with a thread that has none.
        assert!(has_no_memory(pid));
        child.wait().expect("waited for");
        assert!(!has_no_memory(pid), "nothing is known of one that is not there");
        assert!(halted(pid, &pidfd, KILL), "but that it has ended");
    }

    #[tokio::test]
    async fn a_machine_gets_no_other_worker_before_the_one_that_departs_is_gone() {
        let dir = tempfile::tempdir().expect("tempdir");
        let processes = Arc::new(super::super::Processes::of_stopped(dir.path().to_owned()));
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        processes.departing.see_off("uid", async { drop(ended.await) });
        processes.end_unheld("other").await.expect("nothing is there");
        let waiting = {
            let processes = Arc::clone(&processes);
            tokio::spawn(async move { processes.end_unheld("uid").await })
        };
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished(), "its directory is not free");
        end.send(()).expect("heard");
        waiting.await.expect("it goes on").expect("nothing is left");
    }

    #[tokio::test]
    async fn who_asks_for_a_machine_waits_for_its_own_workers_only() {
        let departing = Departing::default();
        let (end, ended) = tokio::sync::oneshot::channel::<()>();
        departing.see_off("a", async { drop(ended.await) });
        departing.see_off("b", async { panic!("even so") });
        departing.gone(Some("b")).await;
        departing.gone(Some("c")).await;
        let waited = {
            let departing = departing.clone();
            tokio::spawn(async move { departing.gone(Some("a")).await })
        };
        tokio::task::yield_now().await;
        assert!(!waited.is_finished(), "it is on its way");
        end.send(()).expect("heard");
        waited.await.expect("gone");
        departing.gone(None).await;
        assert!(departing.under_way.lock().unwrap().is_empty());
    }
}
