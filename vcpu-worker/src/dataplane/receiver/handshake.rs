//! Collecting the connections of a session, whatever else knocks at the door.
//!
//! One loop over non-blocking sockets: a stranger who says nothing, too little or the wrong thing costs one of
//! [`MAX_PENDING`] places for a bounded time and never holds up a rightful connection. A wrong token, another session,
//! a taken index: told so and closed, those already taken are not touched. The token is compared in constant time and
//! before anything else of the session is looked at.

use std::io;
use std::net::Shutdown;
use std::ops::RangeInclusive;
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::super::address::{DataListener, DataStream, wait_readable};
use super::super::cancel::CancelFlag;
use super::super::conn::{Conn, Timeouts};
use super::super::error::{DataplaneError, Result};
use super::super::frame::{ErrorCode, FrameKey, HEADER_BYTES, Header, Hello, HelloAck, Kind};
use super::super::tls::TlsServer;
use super::super::{PROTOCOL_VERSIONS, SessionId};
use super::REFUSAL;

const HELLO_BYTES: usize = HEADER_BYTES + Hello::BYTES;
const MAX_PENDING: usize = 64;

struct Pending {
    stream: DataStream,
    buf: [u8; HELLO_BYTES],
    got: usize,
    deadline: Instant,
    /// TLS failed; the alert that says so must not be overtaken by a reset, so the rest is read to nowhere.
    refused: bool,
}

enum Step {
    Wait,
    Complete,
    Drop,
}

impl Pending {
    fn step(&mut self) -> Step {
        loop {
            if self.refused {
                return match self.stream.discard(&mut self.buf) {
                    Ok(1..) => continue,
                    Err(error)
                        if error.kind() == io::ErrorKind::WouldBlock && Instant::now() < self.deadline =>
                    {
                        Step::Wait
                    }
                    _ => Step::Drop,
                };
            }
            let Some(rest) = self.buf.get_mut(self.got..).filter(|rest| !rest.is_empty()) else {
                return Step::Complete;
            };
            match self.stream.read(rest) {
                Ok(0) => return Step::Drop,
                Ok(n) => self.got += n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return if Instant::now() < self.deadline { Step::Wait } else { Step::Drop };
                }
                Err(error) => {
                    // The peer was told by an alert, if it speaks TLS at all.
                    let error = DataplaneError::of_tls(error, "the introduction of a data connection");
                    tracing::warn!(reason = error.reason(), %error, "data connection refused");
                    self.stream.shutdown(Shutdown::Write);
                    self.refused = true;
                    self.deadline = Instant::now() + REFUSAL;
                }
            }
        }
    }
}

/// Why a peer is refused, if it spoke the protocol well enough to be told.
struct Refusal {
    told: Option<(FrameKey, u16)>,
    code: ErrorCode,
    message: &'static str,
}

pub(crate) fn equal_in_constant_time(a: &[u8; 32], b: &[u8; 32]) -> bool {
    let differing = a.iter().zip(b).fold(0, |all, (x, y)| std::hint::black_box(all | (x ^ y)));
    std::hint::black_box(differing) == 0
}

/// Checks a `Hello`; `taken` says which indices are in use. Returns index and protocol version.
fn judge(
    bytes: &[u8; HELLO_BYTES],
    session: &SessionId,
    memory_bytes: u64,
    versions: &RangeInclusive<u16>,
    taken: &[Option<Conn>],
) -> Result<(u16, u16), Refusal> {
    let (fixed, meta) = bytes.split_at(HEADER_BYTES);
    let silent = |message| Refusal { told: None, code: ErrorCode::Frame, message };
    let fixed = fixed.first_chunk().ok_or_else(|| silent("short"))?;
    let header = Header::decode(fixed).map_err(|_| silent("not a frame"))?;
    if header.kind != Kind::Hello || header.sequence != 0 || header.round != 0 {
        return Err(silent("not a Hello"));
    }
    header.check_meta(meta, 0, &mut Vec::new()).map_err(|_| silent("damaged Hello"))?;
    let refuse = |code, message| Refusal { told: Some((header.key, header.connection)), code, message };
    let hello =
        Hello::decode(meta).map_err(|_| refuse(ErrorCode::Frame, "a field of Hello is out of range"))?;
    if !equal_in_constant_time(&hello.token, &session.token) {
        return Err(refuse(ErrorCode::Unauthorized, "the token is not that of this listener's session"));
    }
    if header.key != session.key() {
        return Err(refuse(ErrorCode::WrongSession, "this listener waits for another migration or attempt"));
    }
    if hello.memory_bytes != memory_bytes {
        return Err(refuse(ErrorCode::Mismatch, "the memory sizes differ"));
    }
    if usize::from(hello.connections) != taken.len() {
        return Err(refuse(ErrorCode::Mismatch, "the numbers of connections differ"));
    }
    let version = hello.version_max.min(*versions.end());
    if version < hello.version_min || !versions.contains(&version) {
        return Err(refuse(ErrorCode::Version, "no common version of the data protocol"));
    }
    match taken.get(usize::from(header.connection)) {
        None => Err(refuse(ErrorCode::Mismatch, "the connection index is beyond the number of connections")),
        Some(Some(_)) => Err(refuse(ErrorCode::DuplicateConnection, "this connection index is taken")),
        Some(None) => Ok((header.connection, version)),
    }
}

/// The verdict on an introduction, of which too few bytes are none; for the fuzz targets.
pub(in crate::dataplane) fn fuzzed(
    bytes: &[u8],
    session: &SessionId,
    memory_bytes: u64,
    connections: usize,
) -> Option<(u16, u16)> {
    let taken: Vec<Option<Conn>> = (0..connections).map(|_| None).collect();
    judge(bytes.first_chunk()?, session, memory_bytes, &PROTOCOL_VERSIONS, &taken).ok()
}

/// Who may come in, and where.
#[derive(Debug)]
pub(crate) struct Door {
    pub(in crate::dataplane) listener: DataListener,
    pub(in crate::dataplane) tls: Option<TlsServer>,
    pub(in crate::dataplane) session: SessionId,
    pub(in crate::dataplane) memory_bytes: u64,
    pub(in crate::dataplane) versions: RangeInclusive<u16>,
    pub(in crate::dataplane) timeouts: Timeouts,
    pub(in crate::dataplane) cancel: CancelFlag,
}

/// Waits for all connections of the session, in order of their index.
///
/// # Errors
/// `Cancelled`; `Timeout` when they did not come in time; `Io` of the listener.
pub(in crate::dataplane) fn collect(door: &Door, connections: u16, patience: Duration) -> Result<Vec<Conn>> {
    let listening = |source| DataplaneError::Io { what: "waiting for data connections", source };
    let begin = Instant::now();
    let mut taken: Vec<Option<Conn>> = (0..connections).map(|_| None).collect();
    let mut pending: Vec<Pending> = Vec::new();
    while taken.iter().any(Option::is_none) {
        if door.cancel.is_cancelled() {
            return Err(DataplaneError::Cancelled);
        }
        if begin.elapsed() >= patience {
            let what = "waiting for the source's data connections";
            return Err(DataplaneError::Timeout { what, after: patience });
        }
        let mut fds: Vec<_> = pending.iter().map(|one| one.stream.as_fd()).collect();
        if pending.len() < MAX_PENDING {
            fds.push(door.listener.as_fd());
        }
        wait_readable(&fds).map_err(listening)?;
        while pending.len() < MAX_PENDING {
            // Any error but "none waiting" (a connection that died in the queue, no descriptors left) passes; the
            // loop's deadline stands.
            let Ok(stream) = door.listener.accept(door.tls.as_ref()) else { break };
            if stream.set_nonblocking(true).is_ok() {
                let deadline = Instant::now() + door.timeouts.hello;
                pending.push(Pending { stream, buf: [0; HELLO_BYTES], got: 0, deadline, refused: false });
            }
        }
        let mut still = Vec::with_capacity(pending.len());
        for mut one in pending {
            match one.step() {
                Step::Wait => still.push(one),
                Step::Drop => {}
                Step::Complete => admit(one, door, &mut taken),
            }
        }
        pending = still;
    }
    Ok(taken.into_iter().flatten().collect())
}

fn admit(one: Pending, door: &Door, taken: &mut [Option<Conn>]) {
    let Door { session, memory_bytes, versions, timeouts, cancel, .. } = door;
    let timeouts = *timeouts;
    if one.stream.set_nonblocking(false).is_err() {
        return;
    }
    let verdict = judge(&one.buf, session, *memory_bytes, versions, taken);
    match verdict {
        Ok((index, version)) => {
            let conn = Conn::new(one.stream, session.key(), index, cancel.clone(), timeouts, Shutdown::Read);
            let Ok(mut conn) = conn else { return };
            conn.note_received(HELLO_BYTES);
            conn.speak(version);
            let ack = HelloAck { version }.encode();
            // A connection that is gone already leaves its place free.
            if conn.send(Kind::HelloAck, 0, 0, 0, &ack, &[]).is_ok()
                && let Some(place) = taken.get_mut(usize::from(index))
            {
                *place = Some(conn);
            }
        }
        Err(refusal) => {
            tracing::warn!(code = ?refusal.code, reason = refusal.message, "data connection refused");
            let Some((key, index)) = refusal.told else { return };
            let patience = Timeouts { stall: REFUSAL, ..timeouts };
            if let Ok(mut conn) = Conn::new(one.stream, key, index, cancel.clone(), patience, Shutdown::Read)
            {
                conn.send_error(&DataplaneError::Refused {
                    code: refusal.code,
                    message: refusal.message.into(),
                });
            }
        }
    }
}
