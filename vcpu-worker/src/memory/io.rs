//! Guest memory to and from descriptors without a copy in user space (writev, readv).
//!
//! The kernel reads and writes the pages itself; a page that the guest changes meanwhile is sent in some mixed
//! state, which the dirty log makes good in a later round.
#![allow(unsafe_code)]

use std::io::{Error, ErrorKind, Result};
use std::os::fd::{AsRawFd as _, BorrowedFd};

use super::mapping::Mapping;

/// IOV_MAX of Linux.
const MAX_PIECES: usize = 1024;

/// At most MAX_PIECES.
fn count(rest: &[libc::iovec]) -> libc::c_int {
    libc::c_int::try_from(rest.len()).unwrap_or(0)
}

fn piece(mapping: &Mapping, offset: u64, len: u64) -> Result<libc::iovec> {
    let at = mapping.pointer(offset, len).map_err(|e| Error::new(ErrorKind::InvalidInput, e.to_string()))?;
    Ok(libc::iovec { iov_base: at.cast(), iov_len: len as usize })
}

/// Drops `done` bytes from the front of the pieces.
fn advance(pieces: &mut [libc::iovec], at: &mut usize, mut done: usize) {
    while let Some(first) = pieces.get_mut(*at) {
        if first.iov_len > done {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(done).cast();
            first.iov_len -= done;
            return;
        }
        done -= first.iov_len;
        *at += 1;
    }
}

/// Calls `step` with the rest of the pieces until all are used up.
fn transfer(
    pieces: &mut [libc::iovec],
    mut step: impl FnMut(&[libc::iovec]) -> isize,
    eof: ErrorKind,
) -> Result<()> {
    let mut at = 0;
    advance(pieces, &mut at, 0);
    while at < pieces.len() {
        let end = pieces.len().min(at + MAX_PIECES);
        match step(&pieces[at..end]) {
            0 => return Err(eof.into()),
            done if done > 0 => advance(pieces, &mut at, done as usize),
            _ => {
                let error = Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

pub(super) fn send(
    mapping: &Mapping,
    fd: BorrowedFd<'_>,
    header: &[u8],
    ranges: &[(u64, u64)],
) -> Result<()> {
    let mut pieces = Vec::with_capacity(ranges.len() + 1);
    pieces.push(libc::iovec { iov_base: header.as_ptr().cast_mut().cast(), iov_len: header.len() });
    for &(offset, len) in ranges {
        pieces.push(piece(mapping, offset, len)?);
    }
    let write = |rest: &[libc::iovec]| {
        // SAFETY: every piece is `header`, which outlives the call, or inside the mapping; at most IOV_MAX of them.
        // writev only reads through them.
        unsafe { libc::writev(fd.as_raw_fd(), rest.as_ptr(), count(rest)) }
    };
    transfer(&mut pieces, write, ErrorKind::WriteZero)
}

pub(super) fn recv(mapping: &Mapping, fd: BorrowedFd<'_>, ranges: &[(u64, u64)]) -> Result<()> {
    let mut pieces = Vec::with_capacity(ranges.len());
    for &(offset, len) in ranges {
        pieces.push(piece(mapping, offset, len)?);
    }
    let read = |rest: &[libc::iovec]| {
        // SAFETY: every piece is inside the mapping, which is writable shared memory without references to it.
        unsafe { libc::readv(fd.as_raw_fd(), rest.as_ptr(), count(rest)) }
    };
    transfer(&mut pieces, read, ErrorKind::UnexpectedEof)
}
