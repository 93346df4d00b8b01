//! The page that KVM shares with a vCPU's thread (`struct kvm_run`), read and written by copies.
//!
//! Invariant: `base..base+len` is mapped for as long as the value lives, because the vCPU that owns the mapping is part of
//! it; only the vCPU's own thread uses it, except that `immediate_exit`, an atomic byte, is also set by the signal handler
//! on that thread.

use std::mem::offset_of;
use std::ops::Deref;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::*;
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::{KVM_RUN, kick};

/// What `struct kvm_run` says after KVM_RUN returned 0.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RawExit {
    /// Port I/O of `count` elements of `size` bytes at `offset` of the page.
    Io {
        /// IN rather than OUT.
        input: bool,
        /// Port.
        port: u16,
        /// Bytes of one element.
        size: u8,
        /// Elements.
        count: u32,
        /// Where in the page.
        offset: u64,
    },
    /// Access to an address without memory.
    Mmio {
        /// Store rather than load.
        write: bool,
        /// Address.
        addr: u64,
        /// Bytes.
        size: u8,
        /// Little endian.
        data: u64,
    },
    /// RDMSR.
    RdMsr(u32),
    /// WRMSR.
    WrMsr(u32, u64),
    /// HLT.
    Hlt,
    /// Triple fault.
    Shutdown,
    /// System event of this type.
    SystemEvent(u32),
    /// KVM cannot go on.
    Internal(u32, Vec<u64>),
    /// Entry failed.
    FailEntry(u64),
    /// Dirty ring full.
    DirtyRingFull,
    /// Nothing to do but look for requests.
    Nothing,
    /// An exit that nobody asked for.
    Other(u32),
}

/// A vCPU and its run page.
pub(crate) struct RunVcpu {
    fd: VcpuFd,
    /// In the mapping that `fd` owns.
    base: NonNull<u8>,
    len: usize,
}

// SAFETY: it is moved to the vCPU's thread and used there only; the mapping is not tied to a thread.
unsafe impl Send for RunVcpu {}

impl Deref for RunVcpu {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl AsRawFd for RunVcpu {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl RunVcpu {
    /// Makes a vCPU; kvm-ioctls maps its page, as long as the VM says.
    pub(crate) fn create(vm: &VmFd, index: u64) -> Result<Self, kvm_ioctls::Error> {
        let mut fd = vm.create_vcpu(index)?;
        let len = vm.run_size();
        assert!(len >= size_of::<kvm_run>(), "KVM says how long the page is");
        // Exposed: the mapping is longer than the structure, and kvm-ioctls may make references of its own to that.
        let address = std::ptr::from_mut(fd.get_kvm_run()).expose_provenance();
        let base = NonNull::new(std::ptr::with_exposed_provenance_mut(address));
        Ok(Self { fd, base: base.ok_or_else(|| kvm_ioctls::Error::new(libc::EFAULT))?, len })
    }

    /// KVM_RUN and nothing else, as kvm-ioctls has it: what the worker's loop is measured against.
    pub(crate) fn run_bare(&mut self) -> Result<VcpuExit<'_>, kvm_ioctls::Error> {
        self.fd.run()
    }

    fn run(&self) -> *mut kvm_run {
        self.base.as_ptr().cast()
    }

    fn immediate_exit(&self) -> &AtomicU8 {
        // SAFETY: the byte is inside the mapping for as long as self lives; kernel and handler access it as a byte.
        unsafe { AtomicU8::from_ptr(self.base.as_ptr().add(offset_of!(kvm_run, immediate_exit))) }
    }

    /// Makes the next entries return at once, or not.
    pub(crate) fn set_immediate_exit(&self, on: bool) {
        self.immediate_exit().store(u8::from(on), Ordering::Relaxed);
    }

    /// KVM_RUN. None if `stop` says so after signals would be noticed, or if a signal came to this thread since the
    /// last entry; then the guest was not entered.
    pub(crate) fn enter(&mut self, stop: impl Fn() -> bool) -> Option<std::io::Result<()>> {
        // SAFETY: the page stays mapped while `published` lives: both end in this call, on this thread.
        let published =
            unsafe { kick::Published::new(self.base.as_ptr().add(offset_of!(kvm_run, immediate_exit))) };
        if kick::take_signalled() || stop() {
            return None;
        }
        // SAFETY: KVM_RUN takes no argument; KVM writes to the run page, to which no reference exists, and to guest
        // memory, which is accessed by copies only.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) };
        let result = if ret < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
        drop(published);
        Some(result)
    }

    /// KVM_RUN with immediate exit: finishes the pending instruction and does not enter the guest.
    pub(crate) fn finish(&mut self) -> std::io::Result<()> {
        let before = self.immediate_exit().swap(1, Ordering::Relaxed);
        // SAFETY: as in `enter`.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), KVM_RUN, 0) };
        let result = if ret < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) };
        self.immediate_exit().store(before, Ordering::Relaxed);
        result
    }

    /// Why KVM_RUN returned.
    #[inline]
    pub(crate) fn exit(&self) -> RawExit {
        let run = self.run();
        // SAFETY: the page is mapped and holds a kvm_run that KVM filled before KVM_RUN returned; nobody writes it
        // now but the handler, which touches immediate_exit only. Every field read is plain data, copied out; all
        // bit patterns are valid for the integers in the union.
        unsafe {
            let body = &raw const (*run).__bindgen_anon_1;
            match (&raw const (*run).exit_reason).read() {
                KVM_EXIT_IO => {
                    let io = (&raw const (*body).io).read();
                    RawExit::Io {
                        input: u32::from(io.direction) == KVM_EXIT_IO_IN,
                        port: io.port,
                        size: io.size,
                        count: io.count,
                        offset: io.data_offset,
                    }
                }
                KVM_EXIT_X86_RDMSR => RawExit::RdMsr((&raw const (*body).msr.index).read()),
                rarer => self.rarer_exit(rarer),
            }
        }
    }

    fn rarer_exit(&self, reason: u32) -> RawExit {
        let run = self.run();
        // SAFETY: as in `exit`; arrays of integers too.
        unsafe {
            let body = &raw const (*run).__bindgen_anon_1;
            match reason {
                KVM_EXIT_MMIO => {
                    let mmio = (&raw const (*body).mmio).read();
                    let size = mmio.len.min(8) as u8;
                    let mask = u64::MAX.checked_shr(64 - 8 * u32::from(size)).unwrap_or(0);
                    RawExit::Mmio {
                        write: mmio.is_write != 0,
                        addr: mmio.phys_addr,
                        size,
                        data: u64::from_le_bytes(mmio.data) & mask,
                    }
                }
                KVM_EXIT_X86_WRMSR => {
                    let msr = (&raw const (*body).msr).read();
                    RawExit::WrMsr(msr.index, msr.data)
                }
                KVM_EXIT_HLT => RawExit::Hlt,
                KVM_EXIT_SHUTDOWN => RawExit::Shutdown,
                KVM_EXIT_SYSTEM_EVENT => RawExit::SystemEvent((&raw const (*body).system_event.type_).read()),
                KVM_EXIT_INTERNAL_ERROR => {
                    let internal = (&raw const (*body).internal).read();
                    let count = (internal.ndata as usize).min(internal.data.len());
                    RawExit::Internal(internal.suberror, internal.data[..count].to_vec())
                }
                KVM_EXIT_FAIL_ENTRY => {
                    RawExit::FailEntry((&raw const (*body).fail_entry.hardware_entry_failure_reason).read())
                }
                KVM_EXIT_DIRTY_RING_FULL => RawExit::DirtyRingFull,
                KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN | KVM_EXIT_SET_TPR | KVM_EXIT_TPR_ACCESS => {
                    RawExit::Nothing
                }
                other => RawExit::Other(other),
            }
        }
    }

    /// Answers an MSR exit.
    pub(crate) fn answer_msr(&mut self, value: u64, fault: bool) {
        let run = self.run();
        // SAFETY: mapped, no references, own thread; KVM reads the fields at the next entry.
        unsafe {
            (&raw mut (*run).__bindgen_anon_1.msr.data).write(value);
            (&raw mut (*run).__bindgen_anon_1.msr.error).write(u8::from(fault));
        }
    }

    /// Answers an MMIO load.
    pub(crate) fn answer_mmio(&mut self, value: u64) {
        // SAFETY: as in `answer_msr`.
        unsafe { (&raw mut (*self.run()).__bindgen_anon_1.mmio.data).write(value.to_le_bytes()) };
    }

    /// Whether `size` bytes at `offset` are in the page.
    pub(crate) fn holds(&self, offset: u64, size: u64) -> bool {
        offset.checked_add(size).is_some_and(|end| end <= self.len as u64)
    }

    /// An element of port output of 1, 2 or 4 bytes, little endian; 0 outside of the page and of another size.
    pub(crate) fn element(&self, offset: u64, size: u8) -> u32 {
        if !self.holds(offset, u64::from(size)) {
            return 0;
        }
        // SAFETY: inside the mapping (checked for `size` bytes, of which no arm reads more).
        unsafe {
            let from = self.base.as_ptr().add(offset as usize);
            match size {
                1 => u32::from(from.read()),
                2 => u32::from(u16::from_le(from.cast::<u16>().read_unaligned())),
                4 => u32::from_le(from.cast::<u32>().read_unaligned()),
                _ => 0,
            }
        }
    }

    /// Sets an element of port input; nothing outside of the page.
    pub(crate) fn set_element(&mut self, offset: u64, size: u8, value: u32) {
        let size = size.min(4);
        if self.holds(offset, u64::from(size)) {
            // SAFETY: inside the mapping (checked), no references to it.
            unsafe {
                let to = self.base.as_ptr().add(offset as usize);
                std::ptr::copy_nonoverlapping(value.to_le_bytes().as_ptr(), to, usize::from(size));
            }
        }
    }
}
