//! Memory slots, and which of their pages were written: one interface over two ways of KVM's.
//!
//! - Bitmap: with manual protection (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2) reading the log changes nothing and re-arming is a
//!   second call over just the pages that were dirty; without it reading re-arms everything. Where KVM offers it, the log
//!   begins with every page dirty and is cleared piece by piece, so that no long lock is held over a large guest.
//! - Ring: each vCPU notes its pages in a ring. Entries are moved into a bitmap here whenever somebody collects and
//!   whenever a ring is full, which the vCPU's own thread sees to.
//!
//! Either way a page written after `collect` is in the next `collect`, so whoever copies pages after `collect` misses
//! nothing. What this process writes itself (devices, the probe's report page) is noted by [`GuestMemory`] and added here.
#![allow(unsafe_code)]

use kvm_bindings::*;
use kvm_ioctls::VmFd;
use parking_lot::Mutex;

use crate::bitmap::PageBitmap;
use crate::hypervisor::HvError;
use crate::memory::{GuestMemory, PAGE_SIZE, Region};
use crate::sys::{self, failed};

use super::Shared;

/// Clean words (64 pages each) between two dirty ones that one clearing call rather spans than stops at: scanning a
/// zero word costs about a nanosecond, a call several hundred.
const SPAN: usize = 64;

/// Pages cleared by one call when a log begins.
const PIECE: u64 = 1 << 16;
/// Entries of a ring: 64 KiB, whole pages of the kernel's.
const RING_ENTRIES: u32 = 4096;
/// Bytes of an entry.
const RING_ENTRY: u32 = 16;

/// How written pages are tracked.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum DirtyMode {
    /// What this host does best: the bitmap.
    #[default]
    Auto,
    /// A bitmap a memory slot.
    Bitmap,
    /// A ring a vCPU.
    Ring,
}

/// Gives the VM rings if asked to, before any vCPU is made; their entries, 0 for none.
pub(super) fn enable_rings(vm: &VmFd, mode: DirtyMode, vcpus: u32) -> Result<u32, HvError> {
    if mode != DirtyMode::Ring {
        return Ok(0);
    }
    let offered = [KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_DIRTY_LOG_RING]
        .into_iter()
        .find(|cap| vm.check_extension_raw((*cap).into()) as u32 >= RING_ENTRIES * RING_ENTRY);
    let Some(cap) = offered else {
        return Err(HvError::Unsupported {
            what: "dirty rings",
            remedy: "use dirty tracking BITMAP or AUTO on this host".to_owned(),
        });
    };
    let bytes = u64::from(RING_ENTRIES * RING_ENTRY);
    let cap = kvm_enable_cap { cap, args: [bytes, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&cap).map_err(failed("KVM_ENABLE_CAP(DIRTY_LOG_RING)"))?;
    tracing::debug!(vcpus, entries = RING_ENTRIES, "dirty rings");
    Ok(RING_ENTRIES)
}

struct Slot {
    number: u32,
    region: Region,
    host: u64,
    words: Vec<u64>,
}

struct Inner {
    slots: Vec<Slot>,
    tracking: bool,
    /// What rings held so far.
    ringed: PageBitmap,
}

/// Slots of one VM.
pub(super) struct DirtyLog {
    inner: Mutex<Inner>,
    manual: bool,
    /// A log begins with every page dirty.
    all_set: bool,
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

    /// Protects every page of a log that began with all of them dirty.
    fn arm(&mut self, vm: &VmFd) -> Result<(), HvError> {
        let mut first = 0;
        while first < self.pages() {
            let count = PIECE.min(self.pages() - first);
            let mut all = vec![u64::MAX; count.div_ceil(64) as usize];
            sys::clear_dirty_log(vm, self.number, first, count as u32, &mut all)?;
            first += count;
        }
        Ok(())
    }
}

impl DirtyLog {
    /// Gives the memory to the VM, untracked.
    pub(super) fn new(vm: &VmFd, memory: &GuestMemory, rings: bool) -> Result<Self, HvError> {
        let offers = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offers = if rings { 0 } else { u32::try_from(offers).unwrap_or(0) };
        let manual = offers & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0;
        let all_set = manual && offers & KVM_DIRTY_LOG_INITIALLY_SET != 0;
        if manual {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
                args: [
                    u64::from(offers & (KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET)),
                    0,
                    0,
                    0,
                ],
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
        let ringed = PageBitmap::new(if rings { memory.pages() } else { 0 });
        let inner = Mutex::new(Inner { slots, tracking: false, ringed });
        Ok(Self { inner, manual, all_set, memory: memory.clone() })
    }

    pub(super) fn start(&self, shared: &Shared) -> Result<(), HvError> {
        let vm = &shared.fd;
        let mut inner = self.inner.lock();
        self.memory.track_writes(true);
        for slot in &mut inner.slots {
            // Off first: a log left over from before would not be empty.
            slot.set(vm, false)?;
            slot.set(vm, true)?;
            slot.words = vec![0; slot.pages().div_ceil(64) as usize];
            if self.all_set {
                slot.arm(vm)?;
            }
        }
        if shared.ring_entries > 0 {
            // Left over from before.
            harvest(shared, &mut inner)?;
            inner.ringed.clear_all();
        }
        inner.tracking = true;
        Ok(())
    }

    pub(super) fn stop(&self, shared: &Shared) -> Result<(), HvError> {
        let vm = &shared.fd;
        let mut inner = self.inner.lock();
        inner.tracking = false;
        self.memory.track_writes(false);
        for slot in &mut inner.slots {
            slot.set(vm, false)?;
            slot.words = Vec::new();
        }
        Ok(())
    }

    /// Empties full rings.
    pub(super) fn drain(&self, shared: &Shared) -> Result<(), HvError> {
        harvest(shared, &mut self.inner.lock())
    }

    pub(super) fn collect(&self, shared: &Shared, into: &mut PageBitmap) -> Result<(), HvError> {
        let vm = &shared.fd;
        let mut inner = self.inner.lock();
        if !inner.tracking {
            return Err(HvError::Unsupported {
                what: "a dirty log at this moment",
                remedy: "call start_dirty_tracking first".to_owned(),
            });
        }
        self.memory.take_writes(into);
        if shared.ring_entries > 0 {
            harvest(shared, &mut inner)?;
            into.union(&inner.ringed);
            inner.ringed.clear_all();
            return Ok(());
        }
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

/// Moves what all rings hold into the bitmap, and gives the entries back to KVM.
fn harvest(shared: &Shared, inner: &mut Inner) -> Result<(), HvError> {
    let mut taken = 0;
    for ring in shared.rings.lock().iter_mut() {
        let (slots, pages) = (&inner.slots, &mut inner.ringed);
        taken += ring.harvest(|slot, page| {
            // The upper half of the number is an address space (SMM), of which we have one.
            if let Some(slot) = slots.iter().find(|s| s.number == slot & 0xffff) {
                pages.set(slot.region.offset / PAGE_SIZE + page);
            }
        });
    }
    if taken > 0 {
        sys::ring::reset(&shared.fd)?;
    }
    Ok(())
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
    use super::super::{KvmOptions, KvmVm};
    use super::*;
    use crate::hypervisor::Vm as _;

    /// What KVM's log of the first slot says.
    fn log(vm: &KvmVm) -> Vec<u64> {
        let pages = vm.dirty.inner.lock().slots[0].pages();
        let mut words = vec![0; pages.div_ceil(64) as usize];
        sys::get_dirty_log(&vm.shared.fd, 0, pages, &mut words).expect("a log");
        words
    }

    /// Reading changes nothing, only clearing does, and a log that begins has every page dirty.
    #[test]
    fn manual_protection_is_in_force() {
        if !crate::testing::require_kvm() {
            return;
        }
        let memory = GuestMemory::new("manual", 8 << 20).expect("memory");
        let options = |dirty| KvmOptions { vcpus: 1, dirty, ..KvmOptions::default() };
        let vm = KvmVm::new(memory.clone(), options(DirtyMode::Bitmap)).expect("vm");
        let offers = vm.shared.fd.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let offers = u32::try_from(offers).expect("flags");
        assert_eq!(vm.dirty.manual, offers & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0);
        assert_eq!(vm.dirty.all_set, vm.dirty.manual && offers & KVM_DIRTY_LOG_INITIALLY_SET != 0);
        if !vm.dirty.all_set {
            println!("skipped: this KVM offers {offers:#x} of manual protection, not both (Linux 5.8)");
            return;
        }
        // A log as KVM begins it: read again and again it stays as it is, until a piece is cleared.
        vm.dirty.inner.lock().slots[0].set(&vm.shared.fd, true).expect("on");
        let all = vec![u64::MAX; 2048 / 64];
        assert_eq!([log(&vm), log(&vm)], [all.clone(), all.clone()]);
        sys::clear_dirty_log(&vm.shared.fd, 0, 64, 64, &mut [0xff00]).expect("cleared");
        let mut rest = all;
        rest[1] = !0xff00;
        assert_eq!([log(&vm), log(&vm)], [rest.clone(), rest]);
        // As it is used: nothing is dirty at first, and what is collected is cleared.
        vm.start_dirty_tracking().expect("started");
        assert_eq!(log(&vm), vec![0; 2048 / 64]);
        vm.dirty.inner.lock().slots[0].set(&vm.shared.fd, false).expect("off");
        vm.dirty.inner.lock().slots[0].set(&vm.shared.fd, true).expect("on, all dirty again");
        let mut pages = PageBitmap::new(memory.pages());
        vm.collect_dirty(&mut pages).expect("collected");
        assert_eq!(pages.count(), memory.pages());
        assert_eq!(log(&vm), vec![0; 2048 / 64]);
        // With rings there is none of it.
        let rings = KvmVm::new(memory, options(DirtyMode::Ring)).expect("vm");
        assert!(!rings.dirty.manual && rings.shared.ring_entries > 0);
    }

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
