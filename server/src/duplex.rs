//! One type for every connection between processes: Unix, TCP, and TCP under TLS, in either direction.

use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;
use tonic::transport::server::Connected;

/// A connection.
#[derive(Debug)]
pub enum Duplex {
    /// On this machine.
    Unix(UnixStream),
    /// In clear.
    Tcp(TcpStream),
    /// Under TLS, and who the certificate says is at the other end.
    Tls(Box<TlsStream<TcpStream>>, String),
}

/// What a service knows of the connection that a request came on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Caller {
    /// The address of this host that the caller reached; none over a Unix socket.
    pub local: Option<IpAddr>,
    /// The name in its certificate; none without TLS.
    pub name: Option<String>,
}

impl Duplex {
    /// The socket below TCP kinds.
    fn tcp(&self) -> Option<&TcpStream> {
        match self {
            Self::Unix(_) => None,
            Self::Tcp(stream) => Some(stream),
            Self::Tls(stream, _) => Some(stream.get_ref().0),
        }
    }

    /// This end's address; none for a Unix socket.
    pub fn local_ip(&self) -> Option<IpAddr> {
        // A socket that listens on [::] shows IPv4 in IPv6's clothes, which a data listener could not bind.
        self.tcp().and_then(|s| s.local_addr().ok()).map(|addr| addr.ip().to_canonical())
    }
}

impl Connected for Duplex {
    type ConnectInfo = Caller;

    fn connect_info(&self) -> Caller {
        let name = match self {
            Self::Tls(_, name) => Some(name.clone()),
            _ => None,
        };
        Caller { local: self.local_ip(), name }
    }
}

macro_rules! delegate {
    ($self:ident, $inner:ident => $call:expr) => {
        match $self.get_mut() {
            Duplex::Unix($inner) => $call,
            Duplex::Tcp($inner) => $call,
            Duplex::Tls($inner, _) => $call,
        }
    };
}

impl AsyncRead for Duplex {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_read(cx, buf))
    }
}

impl AsyncWrite for Duplex {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        delegate!(self, s => Pin::new(s).poll_write(cx, buf))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, s => Pin::new(s).poll_shutdown(cx))
    }
}
