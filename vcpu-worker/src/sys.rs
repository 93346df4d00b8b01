//! Raw KVM calls that kvm-ioctls lacks or wraps unsuitably, behind safe functions.
//!
//! - [`State`]: the fixed-size state structures, moved as bytes. The bytes of a piece of saved state are exactly what
//!   KVM wrote over zeroed memory, so no padding is ever uninitialised and no structure is built from outside data.
//! - [`clear_dirty_log`] and a GET_DIRTY_LOG into a reused buffer.
//! - [`set_pmu_event_filter`].
//! - [`run_page`]: the shared page of a vCPU. kvm-ioctls hands out `&mut kvm_run`, which the kick's signal handler
//!   would alias.
//! - [`thread`]: a thread whose stack is part of a mapping that others share.
//! - Page faults answered by this process: [`uffd`]. Dirty rings: [`ring`]. KVM's statistics: [`stats`].
//!
//! Sizes are asserted against kvm-bindings at compile time.
#![allow(unsafe_code)]

pub(crate) mod confine;
pub(crate) mod kick;
pub(crate) mod ring;
pub(crate) mod run_page;
mod stacks;
pub(crate) mod stats;
pub(crate) mod thread;
pub(crate) mod uffd;

use std::os::fd::AsRawFd;

use kvm_bindings::*;

use crate::hypervisor::HvError;

/// The last OS error as a hypervisor error.
pub(crate) fn last_os(call: &'static str) -> HvError {
    HvError::Os { call, source: std::io::Error::last_os_error() }
}

/// Turns an error of kvm-ioctls into ours.
pub(crate) fn failed(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> HvError {
    move |e| HvError::Os { call, source: std::io::Error::from_raw_os_error(e.errno()) }
}

const READ: u32 = 2;
const WRITE: u32 = 1;

/// `_IOC(dir, 0xAE, nr, size)` of asm-generic/ioctl.h.
const fn ioc(dir: u32, nr: u32, size: usize) -> libc::c_ulong {
    assert!(size < 1 << 14);
    ((dir << 30) | ((size as u32) << 16) | (0xAE << 8) | nr) as libc::c_ulong
}

const KVM_GET_DIRTY_LOG: libc::c_ulong = ioc(WRITE, 0x42, size_of::<kvm_dirty_log>());
const KVM_CLEAR_DIRTY_LOG: libc::c_ulong = ioc(READ | WRITE, 0xc0, size_of::<kvm_clear_dirty_log>());
const KVM_GET_DEVICE_ATTR: libc::c_ulong = ioc(WRITE, 0xe2, size_of::<kvm_device_attr>());
const KVM_SET_DEVICE_ATTR: libc::c_ulong = ioc(WRITE, 0xe1, size_of::<kvm_device_attr>());
const KVM_HAS_DEVICE_ATTR: libc::c_ulong = ioc(WRITE, 0xe3, size_of::<kvm_device_attr>());
const KVM_SET_PMU_EVENT_FILTER: libc::c_ulong = ioc(WRITE, 0xb2, size_of::<kvm_pmu_event_filter>());
/// KVM_RUN.
pub(crate) const KVM_RUN: libc::c_ulong = ioc(0, 0x80, 0);

const _: () = {
    assert!(KVM_GET_DIRTY_LOG == 0x4010_ae42);
    assert!(KVM_CLEAR_DIRTY_LOG == 0xc018_aec0);
    assert!(KVM_GET_DEVICE_ATTR == 0x4018_aee2);
    assert!(KVM_SET_PMU_EVENT_FILTER == 0x4020_aeb2);
    assert!(size_of::<kvm_pmu_event_filter>() == PMU_EVENT_FILTER_HEADER);
    assert!(KVM_RUN == 0xae80);
};

/// One fixed-size structure of vCPU or VM state and the calls that get and set it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct State {
    /// Name of the piece.
    pub(crate) kind: &'static str,
    get_name: &'static str,
    set_name: &'static str,
    get: libc::c_ulong,
    set: libc::c_ulong,
    /// Bytes.
    pub(crate) size: usize,
}

macro_rules! state {
    ($name:ident, $kind:literal, $type:ty, $size:literal, $get:ident = $get_dir:expr, $get_nr:literal,
     $set:ident = $set_dir:expr, $set_nr:literal) => {
        pub(crate) const $name: State = State {
            kind: $kind,
            get_name: stringify!($get),
            set_name: stringify!($set),
            get: ioc($get_dir, $get_nr, size_of::<$type>()),
            set: ioc($set_dir, $set_nr, size_of::<$type>()),
            size: $size,
        };
        const _: () = assert!(size_of::<$type>() == $size);
    };
}

state!(REGS, "regs", kvm_regs, 144, KVM_GET_REGS = READ, 0x81, KVM_SET_REGS = WRITE, 0x82);
state!(SREGS, "sregs", kvm_sregs, 312, KVM_GET_SREGS = READ, 0x83, KVM_SET_SREGS = WRITE, 0x84);
state!(SREGS2, "sregs2", kvm_sregs2, 320, KVM_GET_SREGS2 = READ, 0xcc, KVM_SET_SREGS2 = WRITE, 0xcd);
state!(XCRS, "xcrs", kvm_xcrs, 392, KVM_GET_XCRS = READ, 0xa6, KVM_SET_XCRS = WRITE, 0xa7);
state!(XSAVE, "xsave", kvm_xsave, 4096, KVM_GET_XSAVE = READ, 0xa4, KVM_SET_XSAVE = WRITE, 0xa5);
state!(
    DEBUGREGS,
    "debugregs",
    kvm_debugregs,
    128,
    KVM_GET_DEBUGREGS = READ,
    0xa1,
    KVM_SET_DEBUGREGS = WRITE,
    0xa2
);
state!(LAPIC, "lapic", kvm_lapic_state, 1024, KVM_GET_LAPIC = READ, 0x8e, KVM_SET_LAPIC = WRITE, 0x8f);
state!(
    VCPU_EVENTS,
    "vcpu_events",
    kvm_vcpu_events,
    64,
    KVM_GET_VCPU_EVENTS = READ,
    0x9f,
    KVM_SET_VCPU_EVENTS = WRITE,
    0xa0
);
state!(MP_STATE, "mp_state", kvm_mp_state, 4, KVM_GET_MP_STATE = READ, 0x98, KVM_SET_MP_STATE = WRITE, 0x99);
// KVM_SET_IRQCHIP is _IOR in the kernel's header.
state!(
    IRQCHIP,
    "irqchip",
    kvm_irqchip,
    520,
    KVM_GET_IRQCHIP = READ | WRITE,
    0x62,
    KVM_SET_IRQCHIP = READ,
    0x63
);
state!(PIT2, "pit2", kvm_pit_state2, 112, KVM_GET_PIT2 = READ, 0x9f, KVM_SET_PIT2 = WRITE, 0xa0);
state!(CLOCK, "clock", kvm_clock_data, 48, KVM_GET_CLOCK = READ, 0x7c, KVM_SET_CLOCK = WRITE, 0x7b);
// The buffer of GET_XSAVE2 is as long as KVM_CAP_XSAVE2 says, whatever the number encodes.
const KVM_GET_XSAVE2: libc::c_ulong = ioc(READ, 0xcf, size_of::<kvm_xsave>());

/// Zeroed bytes, aligned for every KVM structure.
struct Buffer {
    words: Vec<u64>,
    len: usize,
}

impl Buffer {
    fn new(len: usize) -> Self {
        Self { words: vec![0; len.div_ceil(8)], len }
    }

    fn from_bytes(data: &[u8]) -> Self {
        let mut buffer = Self::new(data.len());
        buffer.bytes_mut().copy_from_slice(data);
        buffer
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `words` holds at least `len` initialised bytes, u8 has no alignment, and &mut self is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.words.as_mut_ptr().cast::<u8>(), self.len) }
    }

    fn into_vec(mut self) -> Vec<u8> {
        self.bytes_mut().to_vec()
    }
}

impl State {
    /// Reads it. `prefix` goes in first, for structures that say on input what is wanted (irqchip: the chip).
    pub(crate) fn read(&self, fd: &impl AsRawFd, prefix: &[u8]) -> Result<Vec<u8>, HvError> {
        let mut buffer = Buffer::new(self.size);
        for (to, from) in buffer.bytes_mut().iter_mut().zip(prefix) {
            *to = *from;
        }
        // SAFETY: the request's structure is exactly `size` bytes (asserted above), the buffer has that many and is
        // aligned to 8, and the kernel keeps no pointer.
        let ret = unsafe { libc::ioctl(fd.as_raw_fd(), self.get, buffer.words.as_mut_ptr()) };
        if ret < 0 { Err(last_os(self.get_name)) } else { Ok(buffer.into_vec()) }
    }

    /// Sets it. KVM validates the contents; a wrong length or a refusal is [`HvError::State`].
    pub(crate) fn write(&self, fd: &impl AsRawFd, kind: &str, data: &[u8]) -> Result<(), HvError> {
        self.check_len(kind, data.len(), self.size)?;
        self.write_unchecked_len(fd, kind, data)
    }

    fn check_len(&self, kind: &str, have: usize, want: usize) -> Result<(), HvError> {
        if have == want {
            return Ok(());
        }
        let problem = format!("{have} bytes where {} takes {want}", self.set_name);
        Err(HvError::State { kind: kind.to_owned(), problem })
    }

    fn write_unchecked_len(&self, fd: &impl AsRawFd, kind: &str, data: &[u8]) -> Result<(), HvError> {
        let mut buffer = Buffer::from_bytes(data);
        // SAFETY: callers checked that the buffer is at least as long as what the request's structure (or, for
        // SET_XSAVE, KVM_CAP_XSAVE2) makes the kernel read.
        let ret = unsafe { libc::ioctl(fd.as_raw_fd(), self.set, buffer.words.as_mut_ptr()) };
        if ret < 0 {
            let error = std::io::Error::last_os_error();
            return Err(HvError::State {
                kind: kind.to_owned(),
                problem: format!("{} refuses it: {error}", self.set_name),
            });
        }
        Ok(())
    }
}

/// Reads the extended state; `size` is KVM_CAP_XSAVE2 of the VM, 0 where KVM has no XSAVE2.
pub(crate) fn get_xsave(vcpu: &impl AsRawFd, size: usize) -> Result<Vec<u8>, HvError> {
    if size <= XSAVE.size {
        return XSAVE.read(vcpu, &[]);
    }
    let mut buffer = Buffer::new(size);
    // SAFETY: KVM writes KVM_CAP_XSAVE2 bytes, which is what the buffer holds; the kernel keeps no pointer.
    let ret = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_XSAVE2, buffer.words.as_mut_ptr()) };
    if ret < 0 { Err(last_os("KVM_GET_XSAVE2")) } else { Ok(buffer.into_vec()) }
}

/// Sets the extended state; see [`get_xsave`].
pub(crate) fn set_xsave(vcpu: &impl AsRawFd, size: usize, data: &[u8]) -> Result<(), HvError> {
    XSAVE.check_len(XSAVE.kind, data.len(), size.max(XSAVE.size))?;
    XSAVE.write_unchecked_len(vcpu, XSAVE.kind, data)
}

/// Reads the dirty log of a slot into `bitmap`, which must have a bit for each of its `pages`. Re-arms the pages too,
/// unless manual protection is on.
pub(crate) fn get_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    pages: u64,
    bitmap: &mut [u64],
) -> Result<(), HvError> {
    assert!(bitmap.len() as u64 * 64 >= pages, "a bit a page");
    let mut log = kvm_dirty_log { slot, padding1: 0, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: KVM writes one bit a page of the slot, rounded up to 64; the slot has `pages` pages (the caller's
    // memory region), for which the bitmap is large enough.
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_GET_DIRTY_LOG, &raw mut log) };
    if ret < 0 { Err(last_os("KVM_GET_DIRTY_LOG")) } else { Ok(()) }
}

/// Re-arms the pages of a slot that are set in `bitmap`, whose first bit is page `first`, a multiple of 64.
pub(crate) fn clear_dirty_log(
    vm: &impl AsRawFd,
    slot: u32,
    first: u64,
    pages: u32,
    bitmap: &mut [u64],
) -> Result<(), HvError> {
    assert!(bitmap.len() as u64 * 64 >= u64::from(pages), "a bit a page");
    let mut log = kvm_clear_dirty_log { slot, num_pages: pages, first_page: first, ..Default::default() };
    log.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: KVM reads one bit a page from the bitmap, which is large enough (asserted).
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_CLEAR_DIRTY_LOG, &raw mut log) };
    if ret < 0 { Err(last_os("KVM_CLEAR_DIRTY_LOG")) } else { Ok(()) }
}

/// Bytes of `struct kvm_pmu_event_filter` before its events.
pub(crate) const PMU_EVENT_FILTER_HEADER: usize = 32;

/// Sets the VM's PMU event filter. `filter` is a `struct kvm_pmu_event_filter` with its events behind it; a length that is not what its
/// count of events (bytes 4 to 7) says is refused before KVM sees it.
pub(crate) fn set_pmu_event_filter(vm: &impl AsRawFd, filter: &[u8]) -> Result<(), HvError> {
    let count = filter.get(4..).and_then(|f| f.first_chunk::<4>()).map_or(0, |c| u32::from_le_bytes(*c));
    let wanted = (count as usize).saturating_mul(8).saturating_add(PMU_EVENT_FILTER_HEADER);
    if filter.len() != wanted {
        let problem = format!("{} bytes, but {count} events make {wanted}", filter.len());
        return Err(HvError::State { kind: "PMU event filter".to_owned(), problem });
    }
    let mut buffer = Buffer::from_bytes(filter);
    // SAFETY: KVM reads the header and 8 bytes an event, which the buffer holds (checked above), aligned to 8; it keeps no pointer.
    let ret = unsafe { libc::ioctl(vm.as_raw_fd(), KVM_SET_PMU_EVENT_FILTER, buffer.words.as_mut_ptr()) };
    if ret < 0 { Err(last_os("KVM_SET_PMU_EVENT_FILTER")) } else { Ok(()) }
}

fn tsc_offset_attr(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: std::ptr::from_mut(value) as u64,
    }
}

/// The vCPU's TSC offset; None where KVM does not have the attribute.
pub(crate) fn get_tsc_offset(vcpu: &impl AsRawFd) -> Result<Option<u64>, HvError> {
    let mut value = 0u64;
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: KVM reads `attr` only.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &raw const attr) } != 0 {
        return Ok(None);
    }
    // SAFETY: KVM writes 8 bytes through `addr`, which points at `value`.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_DEVICE_ATTR, &raw const attr) } != 0 {
        return Err(last_os("KVM_GET_DEVICE_ATTR(TSC_OFFSET)"));
    }
    // SAFETY: `value` is ours; a volatile read because it was written through an integer address.
    Ok(Some(unsafe { std::ptr::read_volatile(&raw const value) }))
}

/// Sets the vCPU's TSC offset; nothing where KVM does not have the attribute.
pub(crate) fn set_tsc_offset(vcpu: &impl AsRawFd, mut value: u64) -> Result<(), HvError> {
    let attr = tsc_offset_attr(&mut value);
    // SAFETY: KVM reads `attr` only.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_HAS_DEVICE_ATTR, &raw const attr) } != 0 {
        return Ok(());
    }
    // SAFETY: KVM reads 8 bytes through `addr`, which points at `value`, alive until after the call.
    if unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_SET_DEVICE_ATTR, &raw const attr) } != 0 {
        return Err(last_os("KVM_SET_DEVICE_ATTR(TSC_OFFSET)"));
    }
    Ok(())
}
