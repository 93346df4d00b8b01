//! Where data connections go, and Unix, TCP and TLS sockets behind one type.
//!
//! Both are used blocking, on plain threads, with socket time-outs; std opens them close-on-exec. A Unix listener
//! removes its path when dropped, if the path is still its own.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use super::cancel::CancelFlag;
use super::error::{DataplaneError, Result};
use super::tls::{Tls, TlsServer, TlsStream};

/// Longest path of a Unix socket (`sun_path` less its terminator).
const MAX_UNIX_PATH: usize = 107;
/// Send buffer of Unix sockets. TCP is left to the kernel's own tuning, which a fixed size would switch off.
const UNIX_SEND_BUFFER: usize = 1 << 20;
/// A TCP peer that acknowledges nothing for this long is gone, milliseconds.
const TCP_USER_TIMEOUT_MS: u32 = 15_000;
/// How often a wait looks at the cancel flag where a shutdown cannot wake it.
const SLICE: Duration = Duration::from_millis(20);

/// Address of a data listener: `unix:PATH` or `tcp:ADDR:PORT`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum DataAddress {
    /// A path in the file system.
    Unix(PathBuf),
    /// An IP address and port; port 0 asks a listener for a free one.
    Tcp(SocketAddr),
}

impl fmt::Display for DataAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(addr) => write!(f, "tcp:{addr}"),
        }
    }
}

impl FromStr for DataAddress {
    type Err = DataplaneError;

    fn from_str(value: &str) -> Result<Self> {
        let invalid =
            |problem: &str| DataplaneError::Address { value: value.into(), problem: problem.into() };
        if let Some(path) = value.strip_prefix("unix:") {
            if path.is_empty() || path.len() > MAX_UNIX_PATH || path.contains('\0') {
                return Err(invalid("the path of a Unix socket has 1 to 107 bytes and no NUL"));
            }
            return Ok(Self::Unix(path.into()));
        }
        let Some(addr) = value.strip_prefix("tcp:") else {
            return Err(invalid("unknown kind"));
        };
        addr.parse().map(Self::Tcp).map_err(|_| invalid("not an IP address with a port"))
    }
}

/// A listener for data connections; never blocks in `accept`, wait with [`wait_readable`].
#[derive(Debug)]
pub(crate) enum DataListener {
    Unix { listener: UnixListener, path: PathBuf, inode: Option<(u64, u64)> },
    Tcp(TcpListener),
}

fn inode(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

impl DataListener {
    pub(crate) fn bind(address: &DataAddress) -> Result<Self> {
        let failed = |source| DataplaneError::Bind { address: address.clone(), source };
        match address {
            DataAddress::Unix(path) => {
                let listener = UnixListener::bind(path).map_err(failed)?;
                let this = Self::Unix { listener, path: path.clone(), inode: inode(path) };
                // The token guards the session; the mode keeps other users from even trying.
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
                this.set_nonblocking().map_err(failed)?;
                Ok(this)
            }
            DataAddress::Tcp(addr) => {
                let this = Self::Tcp(TcpListener::bind(addr).map_err(failed)?);
                this.set_nonblocking().map_err(failed)?;
                Ok(this)
            }
        }
    }

    fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix { listener, .. } => listener.set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }

    pub(crate) fn local_address(&self) -> io::Result<DataAddress> {
        match self {
            Self::Unix { path, .. } => Ok(DataAddress::Unix(path.clone())),
            Self::Tcp(listener) => listener.local_addr().map(DataAddress::Tcp),
        }
    }

    /// The next waiting connection, or `WouldBlock`. With `tls` its handshake goes on with each read.
    pub(crate) fn accept(&self, tls: Option<&TlsServer>) -> io::Result<DataStream> {
        let stream = match (self, tls) {
            (Self::Unix { listener, .. }, _) => DataStream::Unix(listener.accept()?.0),
            (Self::Tcp(listener), None) => DataStream::Tcp(listener.accept()?.0),
            (Self::Tcp(listener), Some(tls)) => {
                DataStream::Tls(Box::new(tls.accept(listener.accept()?.0).map_err(io::Error::other)?))
            }
        };
        stream.tune()?;
        Ok(stream)
    }
}

impl AsFd for DataListener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix { listener, .. } => listener.as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

impl Drop for DataListener {
    fn drop(&mut self) {
        if let Self::Unix { path, inode: own, .. } = self
            && own.is_some()
            && inode(path) == *own
        {
            // Nothing to be done if it fails; the next bind of this path will say so.
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A data connection.
#[derive(Debug)]
pub(crate) enum DataStream {
    Unix(UnixStream),
    Tcp(TcpStream),
    Tls(Box<TlsStream>),
}

impl DataStream {
    /// Connects, and with `tls` on a TCP address makes a session of its own, within `deadline`; a cancel ends the wait
    /// within 20 ms.
    pub(crate) fn connect(
        address: &DataAddress,
        tls: Option<&Tls>,
        deadline: Instant,
        cancel: &CancelFlag,
    ) -> Result<Self> {
        let failed = |source: io::Error| DataplaneError::Connect { address: address.clone(), source };
        let open = |family| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            rustix::net::socket_with(family, SocketType::STREAM, flags, None)
                .map_err(|errno| failed(errno.into()))
        };
        let (fd, attempt): (OwnedFd, rustix::io::Result<()>) = match address {
            DataAddress::Unix(path) => {
                let target = SocketAddrUnix::new(path.as_path()).map_err(|errno| failed(errno.into()))?;
                let fd = open(AddressFamily::UNIX)?;
                let mut attempt = rustix::net::connect(&fd, &target);
                // A full backlog answers EAGAIN and does not queue the connection.
                while attempt == Err(rustix::io::Errno::AGAIN) && Instant::now() < deadline {
                    if cancel.wait(SLICE) {
                        return Err(DataplaneError::Cancelled);
                    }
                    attempt = rustix::net::connect(&fd, &target);
                }
                (fd, attempt)
            }
            DataAddress::Tcp(addr) => {
                let family = if addr.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let fd = open(family)?;
                let attempt = rustix::net::connect(&fd, addr);
                (fd, attempt)
            }
        };
        match attempt {
            Ok(()) => {}
            Err(rustix::io::Errno::INPROGRESS) => {
                while !wait_one(fd.as_fd(), PollFlags::OUT, SLICE).map_err(failed)? {
                    if cancel.is_cancelled() {
                        return Err(DataplaneError::Cancelled);
                    }
                    if Instant::now() >= deadline {
                        return Err(failed(io::ErrorKind::TimedOut.into()));
                    }
                }
                sockopt::socket_error(&fd)
                    .map_err(|errno| failed(errno.into()))?
                    .map_err(|errno| failed(errno.into()))?;
            }
            Err(errno) => return Err(failed(errno.into())),
        }
        let stream = match address {
            DataAddress::Unix(_) => Self::Unix(fd.into()),
            DataAddress::Tcp(_) => match tls {
                None => Self::Tcp(fd.into()),
                Some(tls) => Self::Tls(Box::new(tls.client(fd.into())?)),
            },
        };
        stream.tune().map_err(failed)?;
        stream.shake(deadline, cancel)?;
        stream.set_nonblocking(false).map_err(failed)?;
        Ok(stream)
    }

    /// The handshake, on a socket that does not block.
    fn shake(&self, deadline: Instant, cancel: &CancelFlag) -> Result<()> {
        let Self::Tls(stream) = self else { return Ok(()) };
        loop {
            match stream.shake() {
                Ok(true) => return Ok(()),
                Ok(false) => return Err(hung_up()),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(hung_up()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(DataplaneError::of_tls(error, "making a TLS session")),
            }
            if cancel.is_cancelled() {
                return Err(DataplaneError::Cancelled);
            }
            if Instant::now() >= deadline {
                let problem = "the destination did not answer the handshake in time".into();
                return Err(DataplaneError::Tls { problem });
            }
            wait_one(stream.as_fd(), PollFlags::IN, SLICE)
                .map_err(|source| DataplaneError::Io { what: "making a TLS session", source })?;
        }
    }

    /// The socket below; none for Unix.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(stream) => Some(stream),
            Self::Tls(stream) => Some(stream.tcp()),
        }
    }

    /// "unix", "tcp" or "tcp+tls".
    pub(crate) fn transport(&self) -> &'static str {
        match self {
            Self::Unix(_) => "unix",
            Self::Tcp(_) => "tcp",
            Self::Tls(_) => "tcp+tls",
        }
    }

    /// The descriptor, where bytes may go between it and guest memory as they are.
    pub(crate) fn plain_fd(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Self::Unix(stream) => Some(stream.as_fd()),
            Self::Tcp(stream) => Some(stream.as_fd()),
            Self::Tls(_) => None,
        }
    }

    /// Options of both sides. Without `TCP_NODELAY` the last frame of a round waits for a delayed acknowledgement.
    fn tune(&self) -> io::Result<()> {
        if let Self::Unix(stream) = self {
            sockopt::set_socket_send_buffer_size(stream, UNIX_SEND_BUFFER)?;
        }
        if let Some(stream) = self.tcp() {
            stream.set_nodelay(true)?;
            sockopt::set_socket_keepalive(stream, true)?;
            sockopt::set_tcp_user_timeout(stream, TCP_USER_TIMEOUT_MS)?;
        }
        Ok(())
    }

    pub(crate) fn set_nonblocking(&self, on: bool) -> io::Result<()> {
        match self {
            Self::Unix(stream) => stream.set_nonblocking(on),
            Self::Tcp(stream) => stream.set_nonblocking(on),
            Self::Tls(stream) => stream.tcp().set_nonblocking(on),
        }
    }

    /// Time-outs of each single read and write.
    pub(crate) fn set_timeouts(&self, read: Duration, write: Duration) -> io::Result<()> {
        // Zero would mean "for ever".
        let (read, write) = (Some(read.max(SLICE)), Some(write.max(SLICE)));
        match self {
            Self::Unix(stream) => {
                stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write))
            }
            Self::Tcp(stream) => stream.set_read_timeout(read).and_then(|()| stream.set_write_timeout(write)),
            Self::Tls(stream) => {
                stream.tcp().set_read_timeout(read).and_then(|()| stream.tcp().set_write_timeout(write))
            }
        }
    }

    pub(crate) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => (&mut &*stream).read(buf),
            Self::Tcp(stream) => (&mut &*stream).read(buf),
            Self::Tls(stream) => stream.read(buf),
        }
    }

    pub(crate) fn read_exact(&self, buf: &mut [u8]) -> io::Result<()> {
        match self {
            Self::Unix(stream) => (&mut &*stream).read_exact(buf),
            Self::Tcp(stream) => (&mut &*stream).read_exact(buf),
            Self::Tls(stream) => stream.read_exact(buf),
        }
    }

    /// Takes bytes off the socket to nowhere, whatever they mean.
    pub(crate) fn discard(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(stream) => (&mut &*stream).read(buf),
            Self::Tcp(stream) => (&mut &*stream).read(buf),
            Self::Tls(stream) => (&mut stream.tcp()).read(buf),
        }
    }

    /// Writes all slices, in one system call where the socket takes them.
    pub(crate) fn write_all(&self, mut slices: &mut [IoSlice<'_>]) -> io::Result<()> {
        if let Self::Tls(stream) = self {
            return stream.write_all(slices);
        }
        // Empty slices at the front would make a write of nothing look like a closed socket.
        IoSlice::advance_slices(&mut slices, 0);
        while !slices.is_empty() {
            let result = match self {
                Self::Unix(stream) => (&mut &*stream).write_vectored(slices),
                Self::Tcp(stream) => (&mut &*stream).write_vectored(slices),
                Self::Tls(_) => return Err(io::ErrorKind::Unsupported.into()),
            };
            match result {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut slices, n),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether bytes are here already that a wait for the socket would not see.
    pub(crate) fn has_buffered(&self) -> bool {
        matches!(self, Self::Tls(stream) if stream.has_buffered())
    }

    /// Whether something to read is there, or comes within `wait`.
    pub(crate) fn is_readable(&self, wait: Duration) -> io::Result<bool> {
        if self.has_buffered() { Ok(true) } else { wait_one(self.as_fd(), PollFlags::IN, wait) }
    }

    /// Closing will reset the connection, so that a peer that still sends notices. Without it one that had filled the
    /// window before we stopped reading goes on probing a socket that is gone, and is answered by the kernel, until its
    /// own time-out. What it was sent it can still read. A Unix socket tells its peer in any case.
    pub(crate) fn reset_on_close(&self) {
        if let Some(stream) = self.tcp() {
            // A socket that takes no options is dead already.
            let _ = sockopt::set_socket_linger(stream, Some(Duration::ZERO));
        }
    }

    pub(crate) fn shutdown(&self, how: Shutdown) {
        // Fails only where the peer is gone already.
        let _ = match self {
            Self::Unix(stream) => stream.shutdown(how),
            Self::Tcp(stream) => stream.shutdown(how),
            Self::Tls(stream) => stream.tcp().shutdown(how),
        };
    }
}

impl AsFd for DataStream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(stream) => stream.as_fd(),
            Self::Tcp(stream) => stream.as_fd(),
            Self::Tls(stream) => stream.as_fd(),
        }
    }
}

/// A listener without TLS, or one that does not want us.
fn hung_up() -> DataplaneError {
    DataplaneError::Tls { problem: "the destination hung up in the handshake".into() }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec { tv_sec: duration.as_secs().min(3600).cast_signed(), tv_nsec: duration.subsec_nanos().into() }
}

pub(crate) fn wait_one(fd: BorrowedFd<'_>, flags: PollFlags, timeout: Duration) -> io::Result<bool> {
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&timespec(timeout))) {
        Ok(ready) => Ok(ready > 0),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Waits until one of `fds` is readable or broken, at most 20 ms, so that the caller sees a cancel.
pub(crate) fn wait_readable(fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut polls: Vec<_> = fds.iter().map(|fd| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
    match poll(&mut polls, Some(&timespec(SLICE))) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
