//! The two threads of lazy memory: one answers faults, one fetches in the background.
//!
//! Neither touches guest memory (it would wait for itself): pages go from a buffer to the kernel.

use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::event::{PollFd, PollFlags, poll};

use super::{LazyError, PageSource, Placer, Shared};
use crate::memory::PAGE_SIZE;
use crate::sandbox;

/// Takes from this thread what it does not need.
fn confined(shared: &Shared) -> bool {
    let entered = sandbox::enter(sandbox::Kind::Data);
    if let Err(error) = &entered {
        shared.fail(LazyError::Unsupported { problem: format!("seccomp: {error}") });
    }
    entered.is_ok()
}

/// Answers faults until the end.
pub(super) fn faults(shared: &Arc<Shared>, source: &dyn PageSource) {
    if !confined(shared) {
        return;
    }
    let placer = Placer { shared: Arc::downgrade(shared) };
    let mut addresses = Vec::with_capacity(64);
    // Also after a failure, until the memory is released: zero pages may be all that a vCPU needs to come out.
    while !*shared.ended.lock() {
        let uffd = shared.uffd.as_fd();
        let mut fds = [PollFd::new(&uffd, PollFlags::IN), PollFd::new(&shared.stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                return shared.fail(LazyError::Source { page: 0, problem: format!("poll: {error}") });
            }
        }
        addresses.clear();
        if let Err(error) = shared.uffd.read(&mut addresses) {
            return shared.fail(LazyError::Source { page: 0, problem: format!("userfaultfd: {error}") });
        }
        for &address in &addresses {
            let page = address.wrapping_sub(shared.memory.address()) / PAGE_SIZE;
            if let Err(error) = fault(shared, source, &placer, page) {
                shared.fail(error);
            }
        }
    }
}

fn fault(shared: &Shared, source: &dyn PageSource, placer: &Placer, page: u64) -> Result<(), LazyError> {
    shared.counts.faults.fetch_add(1, Ordering::Relaxed);
    let (missing, ask) = {
        let mut pages = shared.pages.lock();
        (pages.is_missing(page), pages.demand(page))
    };
    if ask && shared.end.get().is_none() {
        shared.counts.demanded.fetch_add(1, Ordering::Relaxed);
        return source.fetch(page, 1, true, placer).map_err(|problem| LazyError::Source { page, problem });
    }
    if missing {
        // On its way; its arrival wakes who waits.
        return Ok(());
    }
    // Never part of what is fetched, so zero; or placed between the fault and our look.
    let progress = shared.uffd.zero(shared.address(page), PAGE_SIZE);
    match progress.error.as_ref().and_then(std::io::Error::raw_os_error) {
        None => shared.counts.zero.fetch_add(1, Ordering::Relaxed),
        // There already, or unregistered: whoever waits looks again.
        Some(libc::EEXIST | libc::EAGAIN | libc::ENOENT) => {
            drop(shared.uffd.wake(shared.address(page), PAGE_SIZE));
            0
        }
        Some(errno) => {
            let problem = std::io::Error::from_raw_os_error(errno).to_string();
            return Err(LazyError::Place { page, problem });
        }
    };
    Ok(())
}

/// Asks for everything that nobody has asked for.
pub(super) fn prefetch(shared: &Arc<Shared>, source: &dyn PageSource, chunk: u64) {
    if !confined(shared) {
        return;
    }
    let placer = Placer { shared: Arc::downgrade(shared) };
    while shared.end.get().is_none() {
        let claimed = shared.pages.lock().claim(chunk);
        let Some((first, len)) = claimed else { return };
        shared.counts.prefetched.fetch_add(len, Ordering::Relaxed);
        if let Err(problem) = source.fetch(first, len, false, &placer) {
            return shared.fail(LazyError::Source { page: first, problem });
        }
    }
}
