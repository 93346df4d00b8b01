//! Local mode: the guest's memory file itself goes to another worker on this host, and no page is copied.
//!
//! ```text
//! source                                        destination, listening on its data socket
//! hand_over --Offer + descriptor (SCM_RIGHTS)-->  receive_memory: uid, token, session, boot, size and seals are checked,
//!           <--one byte: Mapped, or why not----   then the file is mapped in the place of the own, empty one, read-only
//! then the data plane as ever, with one round without pages: state, Receipt, Applied
//! ```
//!
//! Invariants: nothing is mapped for a stranger (`SO_PEERCRED` on both sides, then the token in constant time); the file
//! can neither shrink nor grow; the destination cannot write it before its grant ([`GuestMemory::unlock`]), the source
//! does not after its seal. A source that gives up in between loses nothing: the mapping goes with the destination.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg, sockopt,
};

use super::address::{DataAddress, DataStream, wait_readable};
use super::cancel::{CancelFlag, Interrupt};
use super::error::{DataplaneError, Result};
use super::frame::{ErrorBody, ErrorCode};
use super::receiver::{Incoming, equal_in_constant_time};
use super::{SessionId, frame};
use crate::memory::GuestMemory;

const MAGIC: [u8; 8] = *b"VPMUMEM1";
const BOOT_ID: usize = 36;
/// Magic, migration, attempt, token, memory's size, boot id.
const OFFER: usize = 8 + 16 + 4 + 32 + 8 + BOOT_ID;
/// First byte of an answer.
const MAPPED: u8 = 1;
/// The same where a code and a text follow until the end of the stream.
const REFUSED: u8 = 0;

fn io(what: &'static str) -> impl Fn(std::io::Error) -> DataplaneError {
    move |source| DataplaneError::Io { what, source }
}

fn refused(code: ErrorCode, message: impl Into<String>) -> DataplaneError {
    DataplaneError::Refused { code, message: message.into() }
}

/// What comes with the descriptor.
#[derive(Debug, PartialEq, Eq)]
struct Offer {
    session: SessionId,
    memory_bytes: u64,
    boot_id: [u8; BOOT_ID],
}

fn own_boot_id() -> [u8; BOOT_ID] {
    let mut out = [0; BOOT_ID];
    for (to, from) in out.iter_mut().zip(crate::host::boot_id().bytes()) {
        *to = from;
    }
    out
}

impl Offer {
    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(OFFER);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&self.session.migration_id);
        out.extend_from_slice(&self.session.attempt.to_le_bytes());
        out.extend_from_slice(&self.session.token);
        out.extend_from_slice(&self.memory_bytes.to_le_bytes());
        out.extend_from_slice(&self.boot_id);
        out
    }

    fn decode(bytes: &[u8; OFFER]) -> Option<Self> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (migration_id, rest) = rest.split_first_chunk()?;
        let (attempt, rest) = rest.split_first_chunk()?;
        let (token, rest) = rest.split_first_chunk()?;
        let (memory_bytes, rest) = rest.split_first_chunk()?;
        let session =
            SessionId { migration_id: *migration_id, attempt: u32::from_le_bytes(*attempt), token: *token };
        Some(Self { session, memory_bytes: u64::from_le_bytes(*memory_bytes), boot_id: *rest.first_chunk()? })
    }
}

/// What a cancel shuts down.
#[derive(Debug)]
struct Waker(Arc<DataStream>);

impl Interrupt for Waker {
    fn interrupt(&self) {
        self.0.shutdown(Shutdown::Both);
    }
}

/// The other end runs as the same user; on anything but a Unix socket there is nobody to be known.
fn same_user(stream: &DataStream) -> Result<()> {
    let own = rustix::process::geteuid();
    match sockopt::socket_peercred(stream) {
        Ok(peer) if peer.uid == own => Ok(()),
        Ok(_) => Err(refused(ErrorCode::Unauthorized, "the other end belongs to another user")),
        Err(errno) => Err(io("asking who the other end is")(errno.into())),
    }
}

/// Source: gives the memory to the destination that listens at `address`; the guest goes on meanwhile. Blocks for at most
/// `within`.
///
/// # Errors
/// `Refused` with the destination's reason, `Connect`, `Io`, `Timeout`, `Cancelled`. Nothing has changed then.
pub fn hand_over(
    address: &DataAddress,
    session: &SessionId,
    memory: &GuestMemory,
    cancel: &CancelFlag,
    within: Duration,
) -> Result<()> {
    let DataAddress::Unix(_) = address else {
        return Err(refused(ErrorCode::Mismatch, "memory is handed over through a Unix socket only"));
    };
    let stream = Arc::new(DataStream::connect(address, None, Instant::now() + within, cancel)?);
    let waker = Arc::new(Waker(Arc::clone(&stream)));
    cancel.register(&waker);
    same_user(&stream)?;
    stream.set_timeouts(within, within).map_err(io("setting time-outs"))?;
    let offer =
        Offer { session: session.clone(), memory_bytes: memory.bytes(), boot_id: own_boot_id() }.encode();
    let fds = [memory.fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(&fds)) {
        return Err(DataplaneError::Usage("there is no room for a descriptor"));
    }
    // A Unix stream takes so little at once, or nothing.
    let sent = sendmsg(&*stream, &[IoSlice::new(&offer)], &mut control, SendFlags::NOSIGNAL)
        .map_err(|errno| cancelled(cancel, errno.into(), "sending the memory's descriptor"))?;
    if sent != offer.len() {
        return Err(io("sending the memory's descriptor")(std::io::ErrorKind::WriteZero.into()));
    }
    let waiting = "waiting until the destination has mapped the memory";
    let mut answer = [0];
    stream.read_exact(&mut answer).map_err(|error| cancelled(cancel, error, waiting))?;
    if answer == [MAPPED] {
        return Ok(());
    }
    let mut reason = [0; ErrorBody::MAX_BYTES];
    let mut got = 0;
    while let Some(rest) = reason.get_mut(got..).filter(|rest| !rest.is_empty()) {
        match stream.read(rest) {
            Ok(0) => break,
            Ok(n) => got += n,
            Err(error) => return Err(cancelled(cancel, error, waiting)),
        }
    }
    let body = ErrorBody::decode(reason.get(..got).unwrap_or_default())
        .map_err(|source| DataplaneError::Frame { connection: 0, source })?;
    Err(refused(body.code, body.message))
}

fn cancelled(cancel: &CancelFlag, error: std::io::Error, what: &'static str) -> DataplaneError {
    match error.kind() {
        _ if cancel.is_cancelled() => DataplaneError::Cancelled,
        std::io::ErrorKind::UnexpectedEof => DataplaneError::Closed { what, connection: 0 },
        _ => io(what)(error),
    }
}

impl Incoming {
    /// Waits for the source's memory and maps it in the place of the own. Then [`Incoming::run`] receives the state over
    /// the same listener. Blocks; a stranger costs at most the time-out for a `Hello`.
    ///
    /// # Errors
    /// What the source's offer lacked, `Timeout`, `Cancelled`, `Memory`.
    pub fn receive_memory(&self, cancel: &CancelFlag) -> Result<()> {
        let begin = Instant::now();
        loop {
            if cancel.is_cancelled() {
                return Err(DataplaneError::Cancelled);
            }
            if begin.elapsed() >= self.timeouts.accept {
                let what = "waiting for the source's memory";
                return Err(DataplaneError::Timeout { what, after: self.timeouts.accept });
            }
            wait_readable(&[self.listener.as_fd()]).map_err(io("waiting for the source's memory"))?;
            let Ok(stream) = self.listener.accept(None) else { continue };
            let stream = Arc::new(stream);
            let waker = Arc::new(Waker(Arc::clone(&stream)));
            cancel.register(&waker);
            let fd = match self.offered(&stream) {
                Ok(fd) => fd,
                Err(error) => {
                    // Whoever it was: the rightful source may still come.
                    answer(&stream, &error);
                    tracing::warn!(%error, "an offer of memory was refused");
                    continue;
                }
            };
            // From here on it is the source: what is wrong with its memory ends the migration.
            return match self.memory.take_over(fd).map_err(DataplaneError::from) {
                Ok(()) => {
                    stream.write_all(&mut [IoSlice::new(&[MAPPED])]).map_err(io("answering the source"))
                }
                Err(error) => {
                    answer(&stream, &error);
                    Err(error)
                }
            };
        }
    }

    /// Reads one offer and judges it.
    fn offered(&self, stream: &DataStream) -> Result<OwnedFd> {
        let reading = "reading an offer of memory";
        same_user(stream)?;
        stream.set_nonblocking(false).map_err(io(reading))?;
        stream.set_timeouts(self.timeouts.hello, self.timeouts.hello).map_err(io(reading))?;
        let mut bytes = [0; OFFER];
        let mut fds: Vec<OwnedFd> = Vec::new();
        let mut got = 0;
        while let Some(rest) = bytes.get_mut(got..).filter(|rest| !rest.is_empty()) {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC;
            let read = recvmsg(stream, &mut [IoSliceMut::new(rest)], &mut control, flags)
                .map_err(|errno| io(reading)(errno.into()))?;
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(received) = message {
                    // Those beyond the first are closed.
                    fds.extend(received);
                }
            }
            if read.bytes == 0 {
                return Err(DataplaneError::Closed { what: reading, connection: 0 });
            }
            got += read.bytes;
        }
        let offer =
            Offer::decode(&bytes).ok_or_else(|| refused(ErrorCode::Frame, "this is no offer of memory"))?;
        if !equal_in_constant_time(&offer.session.token, &self.session.token) {
            let text = "the token is not that of this listener's session";
            return Err(refused(ErrorCode::Unauthorized, text));
        }
        if offer.session != self.session {
            let text = "this listener waits for another migration or attempt";
            return Err(refused(ErrorCode::WrongSession, text));
        }
        if offer.boot_id != own_boot_id() {
            return Err(refused(ErrorCode::Mismatch, "the memory is of another boot of another host"));
        }
        if offer.memory_bytes != self.memory.bytes() {
            return Err(refused(ErrorCode::Mismatch, "the memory sizes differ"));
        }
        match <[OwnedFd; 1]>::try_from(fds) {
            Ok([fd]) => Ok(fd),
            Err(fds) => {
                Err(refused(ErrorCode::Mismatch, format!("{} descriptors came instead of one", fds.len())))
            }
        }
    }
}

fn answer(stream: &DataStream, error: &DataplaneError) {
    let body = ErrorBody { code: error.wire_code(), message: error.to_string() }.encode();
    // It may have gone: nobody is left to be told.
    drop(stream.write_all(&mut [IoSlice::new(&[REFUSED]), IoSlice::new(&body)]));
    stream.shutdown(Shutdown::Write);
}

// An offer and a Hello begin differently, so that neither is taken for the other.
const _: () = assert!(OFFER != frame::HEADER_BYTES);

#[cfg(test)]
mod tests;
