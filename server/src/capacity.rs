//! What this host has to give: memory and cores.
//!
//! Invariants: the sum of granted memory never exceeds the host's; a grant is given back when its guard is dropped.
//! Cores are handed out in turn and may be shared by several vCPUs; who runs on a core when is the core token's job.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use crate::status::ApiError;

/// The host's resources.
#[derive(Debug)]
pub struct Capacity {
    memory_bytes: u64,
    granted: Mutex<u64>,
    cores: Vec<u32>,
    next_core: AtomicUsize,
}

/// Memory and cores of one machine; given back on drop.
#[derive(Debug)]
pub struct Grant {
    capacity: Arc<Capacity>,
    memory_bytes: u64,
    /// Host core of each vCPU.
    pub cores: Vec<u32>,
}

impl Capacity {
    /// A host of `memory_bytes` and these cores (not empty).
    pub fn new(memory_bytes: u64, cores: Vec<u32>) -> Arc<Self> {
        Arc::new(Self { memory_bytes, granted: Mutex::new(0), cores, next_core: AtomicUsize::new(0) })
    }

    /// The host's memory in bytes.
    pub fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Bytes that are not granted.
    pub fn free_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(*self.granted.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Cores that vCPUs may use.
    pub fn cores(&self) -> &[u32] {
        &self.cores
    }

    /// Grants memory and one core a vCPU.
    pub fn grant(self: &Arc<Self>, memory_bytes: u64, vcpus: u32) -> Result<Grant, ApiError> {
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        let free = self.memory_bytes.saturating_sub(*granted);
        if memory_bytes > free {
            return Err(ApiError::exhausted(
                "HOST_MEMORY_EXHAUSTED",
                format!(
                    "the machine needs {memory_bytes} bytes of memory and this host has {free} left of {}; stop or move another machine",
                    self.memory_bytes
                ),
            )
            .with("needed_bytes", memory_bytes)
            .with("free_bytes", free));
        }
        *granted += memory_bytes;
        let first = self.next_core.fetch_add(vcpus as usize, Ordering::Relaxed);
        let cores =
            self.cores.iter().copied().cycle().skip(first % self.cores.len().max(1)).take(vcpus as usize);
        Ok(Grant { cores: cores.collect(), capacity: Arc::clone(self), memory_bytes })
    }
}

impl Capacity {
    /// Counts in what a machine that runs already holds; nothing is refused.
    pub fn adopt(self: &Arc<Self>, memory_bytes: u64, cores: Vec<u32>) -> Grant {
        let mut granted = self.granted.lock().unwrap_or_else(PoisonError::into_inner);
        *granted = granted.saturating_add(memory_bytes);
        Grant { capacity: Arc::clone(self), memory_bytes, cores }
    }
}

impl Drop for Grant {
    fn drop(&mut self) {
        let mut granted = self.capacity.granted.lock().unwrap_or_else(PoisonError::into_inner);
        *granted = granted.saturating_sub(self.memory_bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bounded_and_given_back() {
        let host = Capacity::new(1000, vec![0, 1]);
        let first = host.grant(600, 3).expect("fits");
        assert_eq!(first.cores, [0, 1, 0]);
        assert_eq!(host.grant(600, 1).expect_err("does not fit").reason(), "HOST_MEMORY_EXHAUSTED");
        drop(first);
        let second = host.grant(1000, 2).expect("fits again");
        assert_eq!(second.cores, [1, 0], "cores go on in turn");
        assert_eq!(host.free_bytes(), 0);
    }
}
