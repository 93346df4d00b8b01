//! One data connection: whole frames in and out, with deadlines, sequence numbers and the cancel flag.
//!
//! Invariants: every frame sent carries the session, this connection's index and the next sequence number; every
//! frame received is checked for the same before its parts are read. After an error the connection is not used again,
//! except to send or to look for a last `Error` frame.

mod pages;

use std::io::{self, IoSlice};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::PROTOCOL_VERSIONS;
use super::address::DataStream;
use super::cancel::{CancelFlag, Interrupt};
use super::compress::Unpacker;
use super::error::{DataplaneError, Result};
use super::frame::{ErrorBody, FrameError, FrameKey, HEADER_BYTES, Header, Kind, PageRange, check_sum};
use super::postcopy::RECOVER;

/// How long a side waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timeouts {
    /// For bytes inside a frame, and for room to write: longer and the connection is dead.
    pub stall: Duration,
    /// Between frames, where the peer may have nothing to say (a round throttled low, a control plane that thinks).
    pub idle: Duration,
    /// Destination: from the start until all connections have introduced themselves.
    pub accept: Duration,
    /// For the answer to `Hello`, and for a whole `Hello` of a stranger.
    pub hello: Duration,
    /// Post-copy, destination: how long a lost source may take to come back. The source tries for [`RECOVER`] and as
    /// long again, so that it is still there as long as anybody hopes.
    pub recover: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            stall: Duration::from_secs(10),
            idle: Duration::from_secs(60),
            accept: Duration::from_secs(60),
            hello: Duration::from_secs(5),
            recover: RECOVER,
        }
    }
}

/// What a cancel shuts down: at the source both directions, since it may be stuck writing; at the destination reading
/// only, so that the reason can still be sent.
#[derive(Debug)]
struct Waker {
    stream: Arc<DataStream>,
    how: Shutdown,
}

impl Interrupt for Waker {
    fn interrupt(&self) {
        self.stream.shutdown(self.how);
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Conn {
    stream: Arc<DataStream>,
    /// Registered with the cancel flag for as long as the connection lives.
    _waker: Arc<Waker>,
    key: FrameKey,
    index: u16,
    cancel: CancelFlag,
    timeouts: Timeouts,
    next_out: u64,
    next_in: u64,
    /// Bytes written, headers included.
    pub(crate) bytes_out: u64,
    /// Bytes read, headers included.
    pub(crate) bytes_in: u64,
    /// Header and meta of a frame about to be sent from guest memory.
    scratch: Vec<u8>,
    /// Data of the frame being received, where it does not go straight to guest memory; at most 1 MiB.
    bounce: Vec<u8>,
    /// Meta of the frame being received; never larger than its fixed bound.
    meta: Vec<u8>,
    /// What both sides speak; the oldest until it is agreed on.
    version: u16,
    /// Pages of a packed frame, unpacked; at most 1 MiB.
    unpacked: Vec<u8>,
    unpacker: Unpacker,
}

impl Conn {
    pub(crate) fn new(
        stream: DataStream,
        key: FrameKey,
        index: u16,
        cancel: CancelFlag,
        timeouts: Timeouts,
        on_cancel: Shutdown,
    ) -> Result<Self> {
        stream
            .set_timeouts(timeouts.stall, timeouts.stall)
            .map_err(|source| DataplaneError::Io { what: "setting socket time-outs", source })?;
        let stream = Arc::new(stream);
        let waker = Arc::new(Waker { stream: Arc::clone(&stream), how: on_cancel });
        cancel.register(&waker);
        Ok(Self {
            stream,
            _waker: waker,
            key,
            index,
            cancel,
            timeouts,
            next_out: 0,
            next_in: 0,
            bytes_out: 0,
            bytes_in: 0,
            scratch: Vec::new(),
            bounce: Vec::new(),
            meta: Vec::new(),
            version: *PROTOCOL_VERSIONS.start(),
            unpacked: Vec::new(),
            unpacker: Unpacker::default(),
        })
    }

    /// Both sides have agreed on a protocol.
    pub(crate) fn speak(&mut self, version: u16) {
        self.version = version;
    }

    /// What both sides speak.
    pub(crate) fn version(&self) -> u16 {
        self.version
    }

    /// Whether something to read is there, or comes within `wait`.
    pub(crate) fn is_readable(&self, wait: Duration) -> Result<bool> {
        self.stream.is_readable(wait).map_err(|error| self.io_error("waiting for the peer", error))
    }

    /// Bytes that its buffers hold.
    pub(crate) fn held(&self) -> usize {
        self.scratch.capacity() + self.bounce.capacity() + self.meta.capacity() + self.unpacked.capacity()
    }

    pub(crate) fn index(&self) -> u16 {
        self.index
    }

    pub(crate) fn stream(&self) -> &Arc<DataStream> {
        &self.stream
    }

    pub(crate) fn cancel(&self) -> &CancelFlag {
        &self.cancel
    }

    /// Notes a frame of the given size that was read elsewhere (the handshake).
    pub(crate) fn note_received(&mut self, bytes: usize) {
        self.next_in += 1;
        self.bytes_in += bytes as u64;
    }

    fn io_error(&self, what: &'static str, source: io::Error) -> DataplaneError {
        if self.cancel.is_cancelled() {
            return DataplaneError::Cancelled;
        }
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                DataplaneError::Timeout { what, after: self.timeouts.stall }
            }
            io::ErrorKind::UnexpectedEof
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::BrokenPipe
            | io::ErrorKind::NotConnected
            | io::ErrorKind::WriteZero => DataplaneError::Closed { what, connection: self.index },
            _ => DataplaneError::of_tls(source, what),
        }
    }

    /// Sends one frame; `flags` and `count` as the kind wants them. Returns its bytes on the wire.
    pub(crate) fn send(
        &mut self,
        kind: Kind,
        round: u32,
        flags: u8,
        count: u32,
        meta: &[u8],
        data: &[u8],
    ) -> Result<u64> {
        let mut header = self.next_header(kind, round);
        header.flags = flags;
        header.count = count;
        header.seal(meta, crc32c::crc32c(data), data.len() as u32);
        let fixed = header.encode();
        let mut slices = [IoSlice::new(&fixed), IoSlice::new(meta), IoSlice::new(data)];
        self.stream.write_all(&mut slices).map_err(|error| self.io_error("sending a frame", error))?;
        let bytes = (HEADER_BYTES + meta.len() + data.len()) as u64;
        self.bytes_out += bytes;
        Ok(bytes)
    }

    fn next_header(&mut self, kind: Kind, round: u32) -> Header {
        let header = Header::new(kind, self.key, round, self.next_out, self.index);
        self.next_out += 1;
        header
    }

    fn set_read_timeout(&self, what: &'static str, read: Duration) -> Result<()> {
        self.stream.set_timeouts(read, self.timeouts.stall).map_err(|error| self.io_error(what, error))
    }

    /// The next header, waiting up to `idle` for its first byte. An `Error` frame of the peer becomes its error.
    pub(crate) fn recv_header(&mut self, what: &'static str, idle: Duration) -> Result<Header> {
        let mut fixed = [0; HEADER_BYTES];
        let deadline = Instant::now() + idle;
        let stall = self.timeouts.stall;
        if idle < stall {
            // A short wait ends on time; the rest of the frame has the usual time again.
            self.set_read_timeout(what, idle)?;
        }
        let got = loop {
            match self.stream.read(&mut fixed) {
                Ok(0) => return Err(self.io_error(what, io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => break n,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.cancel.is_cancelled() {
                        return Err(DataplaneError::Cancelled);
                    }
                    if Instant::now() >= deadline {
                        return Err(DataplaneError::Timeout { what, after: idle });
                    }
                }
                Err(error) => return Err(self.io_error(what, error)),
            }
        };
        if idle < stall {
            self.set_read_timeout(what, stall)?;
        }
        self.stream.read_exact(&mut fixed[got..]).map_err(|error| self.io_error(what, error))?;
        self.bytes_in += HEADER_BYTES as u64;
        let header = Header::decode(&fixed).map_err(|source| self.frame_error(source))?;
        if header.key != self.key {
            return Err(DataplaneError::Stale { connection: self.index });
        }
        if header.connection != self.index {
            return Err(self.order(header.kind, "its connection index is another one's"));
        }
        if header.sequence != self.next_in {
            return Err(self.order(header.kind, "its sequence number is not the next one"));
        }
        if header.kind.since() > self.version {
            return Err(self.order(header.kind, "this kind is of a newer protocol than was agreed on"));
        }
        self.next_in += 1;
        if header.kind == Kind::Error {
            let body = ErrorBody::decode(self.recv_meta(&header, 0, &mut Vec::new())?)
                .map_err(|source| DataplaneError::Frame { connection: header.connection, source })?;
            return Err(DataplaneError::Refused { code: body.code, message: body.message });
        }
        Ok(header)
    }

    /// The typed part that belongs to `header`, checked; page ranges go to `ranges`.
    pub(crate) fn recv_meta(
        &mut self,
        header: &Header,
        memory_pages: u64,
        ranges: &mut Vec<PageRange>,
    ) -> Result<&[u8]> {
        // At most MAX_META_BYTES: the header was checked.
        self.meta.resize(header.meta_len as usize, 0);
        self.stream.read_exact(&mut self.meta).map_err(|error| self.io_error("receiving a frame", error))?;
        self.bytes_in += u64::from(header.meta_len);
        header.check_meta(&self.meta, memory_pages, ranges).map_err(|source| self.frame_error(source))?;
        Ok(&self.meta)
    }

    /// The bulk part, appended to `out`.
    pub(crate) fn recv_data(&mut self, header: &Header, out: &mut Vec<u8>) -> Result<()> {
        let start = out.len();
        // At most MAX_DATA_BYTES a frame.
        out.resize(start + header.data_len as usize, 0);
        self.recv_exact(header, out.get_mut(start..).unwrap_or_default())
    }

    /// The bulk part, of just this size.
    pub(super) fn recv_exact(&mut self, header: &Header, data: &mut [u8]) -> Result<()> {
        self.stream.read_exact(data).map_err(|error| self.io_error("receiving a frame", error))?;
        self.bytes_in += u64::from(header.data_len);
        check_sum("data", data, header.data_crc).map_err(|source| self.frame_error(source))
    }

    pub(crate) fn frame_error(&self, source: FrameError) -> DataplaneError {
        DataplaneError::Frame { connection: self.index, source }
    }

    pub(crate) fn order(&self, kind: Kind, problem: &'static str) -> DataplaneError {
        DataplaneError::Order { connection: self.index, kind, problem }
    }

    /// Tells the peer why this side gives up. Best effort: the connection may be the thing that broke.
    pub(crate) fn send_error(&mut self, error: &DataplaneError) {
        let message = match error {
            DataplaneError::Refused { message, .. } => message.clone(),
            other => other.to_string(),
        };
        let body = ErrorBody { code: error.wire_code(), message };
        // A peer that reads nothing must not hold us up.
        let short = Duration::from_millis(200);
        if self.stream.set_timeouts(short, short).is_ok() {
            let _ = self.send(Kind::Error, 0, 0, 0, &body.encode(), &[]);
        }
        self.stream.shutdown(Shutdown::Write);
    }

    /// After a failure: the peer's own words if they are there or arrive within `time`.
    pub(crate) fn find_refusal(&mut self, time: Duration) -> Option<DataplaneError> {
        self.timeouts.stall = time;
        self.stream.set_timeouts(time, time).ok()?;
        let deadline = Instant::now() + time;
        while Instant::now() < deadline {
            match self.recv_header("looking for the peer's reason", time) {
                // Answers that were on their way; they have no parts that matter now.
                Ok(header) if header.data_len == 0 => {
                    self.recv_meta(&header, 0, &mut Vec::new()).ok()?;
                }
                Err(error @ DataplaneError::Refused { .. }) => return Some(error),
                _ => return None,
            }
        }
        None
    }
}
