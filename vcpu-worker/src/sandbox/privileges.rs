//! Everything but system calls: descriptors, no_new_privs, limits, capabilities.
//!
//! | kept | why |
//! |---|---|
//! | CAP_SYS_NICE | pins threads, SCHED_FIFO, binds memory to a node |
//! | CAP_IPC_LOCK | guest memory that is locked or in huge pages |
//! | CAP_PERFMON | the perf event that interrupts a spinning guest, where perf_event_paranoid is 2 |
//! | CAP_SYS_RAWIO, in PMU mode `msr` only | `/dev/cpu/N/msr` of the core that a vCPU claims or moves to |
//!
//! A capability that the daemon does not have is not gained. Kept descriptors are 0, 1 and 2. RLIMIT_NPROC is left as it
//! is: it counts all processes of a user, so one worker's threads would use up another's; the daemon limits threads by
//! the worker's cgroup instead. RLIMIT_FSIZE is left too: the kernel holds guest memory, a memfd, against it.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

/// Open files: a vCPU, a tick and a statistics descriptor for each of 256 vCPUs, sockets, and room.
const FILES: u64 = 2048;

/// What is kept in any case.
const KEPT: CapabilitySet =
    CapabilitySet::SYS_NICE.union(CapabilitySet::IPC_LOCK).union(CapabilitySet::PERFMON);

/// `rawio` keeps CAP_SYS_RAWIO.
pub(super) fn drop_all(rawio: bool) -> io::Result<()> {
    crate::sys::confine::close_all_but_standard()?;
    rustix::thread::set_no_new_privs(true)?;
    lower(Resource::Core, 0)?;
    lower(Resource::Nofile, FILES)?;
    lower(Resource::Msgqueue, 0)?;
    capabilities(kept(rawio))
}

/// Lowers soft and hard limit; one that is lower already stays.
fn lower(resource: Resource, most: u64) -> io::Result<()> {
    let now = getrlimit(resource);
    let least = |limit: Option<u64>| Some(limit.map_or(most, |limit| limit.min(most)));
    Ok(setrlimit(resource, Rlimit { current: least(now.current), maximum: least(now.maximum) })?)
}

fn kept(rawio: bool) -> CapabilitySet {
    if rawio { KEPT.union(CapabilitySet::SYS_RAWIO) } else { KEPT }
}

fn capabilities(kept: CapabilitySet) -> io::Result<()> {
    let have = rustix::thread::capabilities(None)?;
    rustix::thread::clear_ambient_capability_set()?;
    if have.effective.contains(CapabilitySet::SETPCAP) {
        for bit in 0..64 {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            // Refused for a number that this kernel does not know.
            if rustix::thread::capability_is_in_bounding_set(one).unwrap_or(false) {
                rustix::thread::remove_capability_from_bounding_set(one)?;
            }
        }
    }
    let kept = have.permitted & kept;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    Ok(rustix::thread::set_capabilities(None, sets)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn raw_io_is_kept_for_the_msr_driver_only() {
        assert_eq!(kept(false), KEPT);
        assert!(!KEPT.contains(CapabilitySet::SYS_RAWIO));
        assert_eq!(kept(true), KEPT | CapabilitySet::SYS_RAWIO);
    }
}
