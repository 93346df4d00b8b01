//! userfaultfd(2): this process answers the page faults of a piece of its own memory.
//!
//! Layouts and numbers are those of linux/userfaultfd.h, asserted below. Addresses given to [`Uffd`] are bounded by
//! its caller to a mapping that it holds; the kernel checks them against what was registered.

use std::io::{Error, Result};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};

/// Missing pages of a memfd raise faults.
pub(crate) const FEATURE_MISSING_SHMEM: u64 = 1 << 5;

const API: u64 = 0xaa;
const EVENT_PAGEFAULT: u8 = 0x12;
const REGISTER_MODE_MISSING: u64 = 1;

#[repr(C)]
struct ApiArgs {
    api: u64,
    features: u64,
    ioctls: u64,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Range {
    start: u64,
    len: u64,
}

#[repr(C)]
struct RegisterArgs {
    range: Range,
    mode: u64,
    ioctls: u64,
}

#[repr(C)]
struct CopyArgs {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

#[repr(C)]
struct ZeroArgs {
    range: Range,
    mode: u64,
    done: i64,
}

/// `struct uffd_msg` with a page fault in it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}

const fn ioc(dir: u32, nr: u32, size: usize) -> libc::c_ulong {
    assert!(size < 1 << 14);
    ((dir << 30) | ((size as u32) << 16) | (0xaa << 8) | nr) as libc::c_ulong
}

const UFFDIO_API: libc::c_ulong = ioc(3, 0x3f, size_of::<ApiArgs>());
const UFFDIO_REGISTER: libc::c_ulong = ioc(3, 0x00, size_of::<RegisterArgs>());
const UFFDIO_UNREGISTER: libc::c_ulong = ioc(2, 0x01, size_of::<Range>());
const UFFDIO_WAKE: libc::c_ulong = ioc(2, 0x02, size_of::<Range>());
const UFFDIO_COPY: libc::c_ulong = ioc(3, 0x03, size_of::<CopyArgs>());
const UFFDIO_ZEROPAGE: libc::c_ulong = ioc(3, 0x04, size_of::<ZeroArgs>());
const USERFAULTFD_IOC_NEW: libc::c_ulong = ioc(0, 0x00, 0);

const _: () = {
    assert!(UFFDIO_API == 0xc018_aa3f);
    assert!(UFFDIO_REGISTER == 0xc020_aa00);
    assert!(UFFDIO_UNREGISTER == 0x8010_aa01);
    assert!(UFFDIO_WAKE == 0x8010_aa02);
    assert!(UFFDIO_COPY == 0xc028_aa03);
    assert!(UFFDIO_ZEROPAGE == 0xc020_aa04);
    assert!(USERFAULTFD_IOC_NEW == 0xaa00);
    assert!(size_of::<Message>() == 32);
};

/// A userfaultfd of this process's memory.
#[derive(Debug)]
pub(crate) struct Uffd {
    fd: OwnedFd,
    features: u64,
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// How far a call came: `done` bytes were put, then it failed, if it did.
pub(crate) struct Progress {
    /// Bytes, from the front.
    pub(crate) done: u64,
    /// Why it stopped short.
    pub(crate) error: Option<Error>,
}

impl Uffd {
    /// Opens one, non-blocking, closed on exec. Faults of KVM count too (they come from the kernel), for which the process
    /// needs CAP_SYS_PTRACE, vm.unprivileged_userfaultfd = 1, or the right to open /dev/userfaultfd.
    pub(crate) fn new() -> Result<Self> {
        let fd = match by_call() {
            Ok(fd) => fd,
            Err(error) => by_device().map_err(|_| error)?,
        };
        let features = features(&fd)?;
        Ok(Self { fd, features })
    }

    /// Features of the kernel.
    pub(crate) fn features(&self) -> u64 {
        self.features
    }

    fn call<T>(&self, request: libc::c_ulong, args: &mut T) -> Result<()> {
        // SAFETY: `args` is the structure of `request` (sizes asserted above) and outlives the call. What the kernel
        // changes besides is page tables of registered memory, to which no reference exists (see GuestMemory).
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), request, std::ptr::from_mut(args)) };
        if ret < 0 { Err(Error::last_os_error()) } else { Ok(()) }
    }

    /// Faults of missing pages in the range come here from now on.
    pub(crate) fn register_missing(&self, start: u64, len: u64) -> Result<()> {
        let mut args = RegisterArgs { range: Range { start, len }, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        self.call(UFFDIO_REGISTER, &mut args)
    }

    /// No more; whoever waits goes on, and gets zeros where nothing was put.
    pub(crate) fn unregister(&self, start: u64, len: u64) -> Result<()> {
        self.call(UFFDIO_UNREGISTER, &mut Range { start, len })
    }

    /// Whoever waits for a page of the range looks again.
    pub(crate) fn wake(&self, start: u64, len: u64) -> Result<()> {
        self.call(UFFDIO_WAKE, &mut Range { start, len })
    }

    /// Puts pages where none are, and wakes who waits for them. EEXIST: there is one.
    pub(crate) fn copy(&self, start: u64, pages: &[u8]) -> Progress {
        let mut args =
            CopyArgs { dst: start, src: pages.as_ptr() as u64, len: pages.len() as u64, mode: 0, copy: 0 };
        // The kernel reads `pages` while the call lasts, and they are borrowed for as long.
        let error = self.call(UFFDIO_COPY, &mut args).err();
        progress(args.copy, error)
    }

    /// Puts zero pages likewise.
    pub(crate) fn zero(&self, start: u64, len: u64) -> Progress {
        let mut args = ZeroArgs { range: Range { start, len }, mode: 0, done: 0 };
        let error = self.call(UFFDIO_ZEROPAGE, &mut args).err();
        progress(args.done, error)
    }

    /// Addresses of faults that came, up to 64; none if there are none at the moment.
    pub(crate) fn read(&self, into: &mut Vec<u64>) -> Result<()> {
        let mut messages = [Message::default(); 64];
        // SAFETY: the kernel writes at most the size given of plain integers into `messages`, which is ours.
        let got =
            unsafe { libc::read(self.fd.as_raw_fd(), messages.as_mut_ptr().cast(), size_of_val(&messages)) };
        if got < 0 {
            let error = Error::last_os_error();
            return match error.kind() {
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::Interrupted => Ok(()),
                _ => Err(error),
            };
        }
        let count = got as usize / size_of::<Message>();
        into.extend(messages[..count].iter().filter(|m| m.event == EVENT_PAGEFAULT).map(|m| m.address));
        Ok(())
    }
}

/// The kernel leaves the field at 0, a count of bytes, or a negated errno that the call's result repeats.
fn progress(field: i64, error: Option<Error>) -> Progress {
    Progress { done: u64::try_from(field).unwrap_or(0), error }
}

fn by_call() -> Result<OwnedFd> {
    // SAFETY: userfaultfd takes flags only; the descriptor returned is new and nobody else has it.
    unsafe {
        let fd = libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK);
        owned(fd)
    }
}

fn by_device() -> Result<OwnedFd> {
    let device = std::fs::File::open("/dev/userfaultfd")?;
    // SAFETY: the call takes flags by value; the descriptor returned is new and nobody else has it.
    unsafe {
        let fd = libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, libc::O_CLOEXEC | libc::O_NONBLOCK);
        owned(fd.into())
    }
}

/// # Safety
/// `fd` is an error or a descriptor that nobody else owns.
unsafe fn owned(fd: libc::c_long) -> Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: the caller's promise.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(Error::last_os_error()),
    }
}

/// Hands shakes, once a descriptor; no optional feature is switched on but those that only announce themselves.
fn features(fd: &OwnedFd) -> Result<u64> {
    let mut args = ApiArgs { api: API, features: 0, ioctls: 0 };
    // SAFETY: the structure of UFFDIO_API, alive until after the call.
    let ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut args) };
    if ret < 0 { Err(Error::last_os_error()) } else { Ok(args.features) }
}
