//! Memory slots and the dirty log of each.
//!
//! With manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) reading the log changes nothing and re-arming is a
//! second call over just the pages that were dirty; without it reading re-arms everything. Either way a page written
//! after `collect` is in the next `collect`, so whoever copies pages after `collect` misses nothing. What this process
//! writes itself (devices, the probe's report page) is noted by [`GuestMemory`] and added here.
#![allow(unsafe_code)]

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::bitmap::PageBitmap;
use crate::hypervisor::HvError;
use crate::memory::{GuestMemory, PAGE_SIZE, Region};
use crate::sys::{self, failed};

/// Clean words (64 pages each) between two dirty ones that one clearing call rather spans than stops at: scanning a
/// zero word costs about a nanosecond, a call several hundred.
const SPAN: usize = 64;

struct Slot {
    number: u32,
    region: Region,
    host: u64,
    words: Vec<u64>,
}

struct Inner {
    slots: Vec<Slot>,
    tracking: bool,
}

/// Slots of one VM.
pub(super) struct DirtyLog {
    inner: Mutex<Inner>,
    manual: bool,
    memory: GuestMemory,
}

impl Slot {
    fn set(&self, vm: &VmFd, track: bool) -> Result<(), HvError> {
        let region = kvm_userspace_memory_region {
            slot: self.number,
            flags: if track { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: self.region.gpa,
            memory_size: self.region.len,
            userspace_addr: self.host,
        };
        // SAFETY: the range is mapped by GuestMemory, a clone of which the VM holds for as long as its descriptor.
        unsafe { vm.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    fn pages(&self) -> u64 {
        self.region.len / PAGE_SIZE
    }
}

impl DirtyLog {
    /// Gives the memory to the VM, untracked.
    pub(super) fn new(vm: &VmFd, memory: &GuestMemory) -> Result<Self, HvError> {
        let offers = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let manual = offers > 0 && offers as u32 & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        if manual {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [u64::from(KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE), 0, 0, 0],
                ..Default::default()
            };
            vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(MANUAL_DIRTY_LOG_PROTECT2)"))?;
        }
        let mut slots = Vec::new();
        for (number, region) in (0u32..).zip(memory.regions()) {
            let slot = Slot { number, region: *region, host: memory.host_address(region), words: Vec::new() };
            slot.set(vm, false)?;
            slots.push(slot);
        }
        Ok(Self { inner: Mutex::new(Inner { slots, tracking: false }), manual, memory: memory.clone() })
    }

    pub(super) fn start(&self, vm: &VmFd) -> Result<(), HvError> {
        let mut inner = self.inner.lock();
        self.memory.track_writes(true);
        for slot in &mut inner.slots {
            // Off first: a log left over from before would not be empty.
            slot.set(vm, false)?;
            slot.set(vm, true)?;
            slot.words = vec![0; slot.pages().div_ceil(64) as usize];
        }
        inner.tracking = true;
        Ok(())
    }

    pub(super) fn stop(&self, vm: &VmFd) -> Result<(), HvError> {
        let mut inner = self.inner.lock();
        inner.tracking = false;
        self.memory.track_writes(false);
        for slot in &mut inner.slots {
            slot.set(vm, false)?;
            slot.words = Vec::new();
        }
        Ok(())
    }

    pub(super) fn collect(&self, vm: &VmFd, into: &mut PageBitmap) -> Result<(), HvError> {
        let mut inner = self.inner.lock();
        if !inner.tracking {
            return Err(HvError::Unsupported {
                what: "a dirty log at this moment",
                remedy: "call start_dirty_tracking first".to_owned(),
            });
        }
        self.memory.take_writes(into);
        for slot in &mut inner.slots {
            let pages = slot.pages();
            sys::get_dirty_log(vm, slot.number, pages, &mut slot.words)?;
            into.or_words(slot.region.offset / PAGE_SIZE, &slot.words);
            if !self.manual {
                continue;
            }
            let mut at = 0;
            while let Some((first, end)) = next_span(&slot.words, at) {
                let start = first as u64 * 64;
                let count = ((end - first) as u64 * 64).min(pages - start) as u32;
                sys::clear_dirty_log(vm, slot.number, start, count, &mut slot.words[first..end])?;
                at = end;
            }
        }
        Ok(())
    }
}

/// The next span of words at or after `from` that begins and ends with a dirty one, without a long clean stretch.
/// A span is bounded, because the call counts pages in 32 bits.
fn next_span(words: &[u64], from: usize) -> Option<(usize, usize)> {
    let first = from + words.get(from..)?.iter().position(|w| *w != 0)?;
    let limit = words.len().min(first + (1 << 20));
    let mut end = first + 1;
    let mut at = end;
    while at < limit && at - end < SPAN {
        if words[at] != 0 {
            end = at + 1;
        }
        at += 1;
    }
    Some((first, end))
}

#[cfg(test)]
mod tests {
    use super::next_span;

    #[test]
    fn spans_cover_every_dirty_word_once() {
        let mut words = vec![0u64; 1000];
        for at in [0, 1, 60, 200, 263, 500, 999] {
            words[at] = 1;
        }
        let mut spans = Vec::new();
        let mut at = 0;
        while let Some((first, end)) = next_span(&words, at) {
            spans.push((first, end));
            at = end;
        }
        assert_eq!(spans, [(0, 61), (200, 264), (500, 501), (999, 1000)]);
        assert_eq!(next_span(&words, 1000), None);
        assert_eq!(next_span(&[0; 5], 0), None);
    }
}
