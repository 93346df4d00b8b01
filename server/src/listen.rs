//! Listeners: private Unix sockets and TCP, in clear or under mutual TLS.
//!
//! A Unix socket is bound in a private directory (0700), made 0600 and only then moved to its path, so that nobody
//! can connect in between whatever the umask is; a socket file that is in the way is replaced only if nobody answers.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener as StdUnixListener, UnixStream};
use std::path::{Path, PathBuf};

use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{Stream, StreamExt as _};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;

use crate::config::Address;
use crate::duplex::Duplex;
use crate::peer::tls::{HANDSHAKE, PeerTls};

/// Handshakes at once on one listener; a caller beyond them is hung up on.
const HANDSHAKES: usize = 64;
/// Before the next try where the system gives no more connections.
const NO_MORE: Duration = Duration::from_millis(100);

/// Why a listener cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ListenError {
    /// Somebody answers there.
    #[error("{0}: another process serves there; stop it or choose another address")]
    InUse(String),
    /// Something that is no socket is in the way.
    #[error("{0}: a file that is no socket is in the way; remove it or choose another path")]
    NotASocket(String),
    /// The system refuses.
    #[error("{address}: cannot listen: {source}")]
    Io {
        /// Where.
        address: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl ListenError {
    /// Stable reason code.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::InUse(_) => "ADDRESS_IN_USE",
            Self::NotASocket(_) => "SOCKET_PATH_TAKEN",
            Self::Io { .. } => "LISTEN_FAILED",
        }
    }
}

/// An open listener; a Unix socket's file goes when it is dropped, if it is still ours.
#[derive(Debug)]
pub struct Listener {
    /// Real address (port 0 resolved).
    pub address: Address,
    /// The socket.
    pub socket: Socket,
    /// Removes the file.
    pub file: Option<SocketFile>,
}

/// The two kinds of socket.
#[derive(Debug)]
pub enum Socket {
    /// Unix.
    Unix(UnixListener),
    /// TCP.
    Tcp(TcpListener),
}

/// Connections as they come.
pub type Incoming = Pin<Box<dyn Stream<Item = io::Result<Duplex>> + Send>>;

impl Socket {
    /// Its connections, TCP ones under `tls` if there is any, until `ending`. Must be called inside the runtime.
    pub fn incoming(self, tls: Option<PeerTls>, ending: CancellationToken) -> Incoming {
        match (self, tls) {
            (Self::Unix(socket), _) => Box::pin(UnixListenerStream::new(socket).map(|s| s.map(Duplex::Unix))),
            (Self::Tcp(socket), None) => Box::pin(TcpListenerStream::new(socket).map(|stream| {
                let stream = stream?;
                stream.set_nodelay(true)?;
                Ok(Duplex::Tcp(stream))
            })),
            (Self::Tcp(socket), Some(tls)) => {
                let (to, from) = mpsc::channel(HANDSHAKES);
                tokio::spawn(shake_hands(socket, tls, to, ending));
                Box::pin(ReceiverStream::new(from).map(Ok))
            }
        }
    }
}

/// Shakes hands with everybody who comes, side by side, so that a slow or hostile one keeps nobody waiting.
async fn shake_hands(socket: TcpListener, tls: PeerTls, to: mpsc::Sender<Duplex>, ending: CancellationToken) {
    let slots = Arc::new(Semaphore::new(HANDSHAKES));
    loop {
        let accepted = tokio::select! {
            () = ending.cancelled() => return,
            () = to.closed() => return,
            accepted = socket.accept() => accepted,
        };
        let (stream, from) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a peer's connection cannot be taken");
                tokio::time::sleep(NO_MORE).await;
                continue;
            }
        };
        let Ok(slot) = Arc::clone(&slots).try_acquire_owned() else {
            tracing::warn!(%from, "hung up on a peer: {HANDSHAKES} others have not finished their handshake");
            continue;
        };
        let (tls, to, ending) = (tls.clone(), to.clone(), ending.clone());
        tokio::spawn(async move {
            let _slot = slot;
            let _ = stream.set_nodelay(true);
            tokio::select! {
                () = ending.cancelled() => {}
                shaken = tokio::time::timeout(HANDSHAKE, tls.accept(stream)) => match shaken {
                    Ok(Ok(stream)) => drop(to.send(stream).await),
                    Ok(Err(error)) => tracing::warn!(%from, %error, "refused a peer at the handshake"),
                    Err(_) => tracing::warn!(%from, "a peer did not finish the handshake within {HANDSHAKE:?}"),
                },
            }
        });
    }
}

/// A socket file of ours.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    inode: (u64, u64),
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|m| (m.dev(), m.ino()) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Opens a listener. Must be called inside the runtime.
pub async fn open(address: &Address) -> Result<Listener, ListenError> {
    let failed = |source| ListenError::Io { address: address.to_string(), source };
    match address {
        Address::Tcp(addr) => {
            let socket = TcpListener::bind(addr).await.map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => ListenError::InUse(address.to_string()),
                _ => failed(source),
            })?;
            let real = socket.local_addr().map_err(failed)?;
            Ok(Listener { address: Address::Tcp(real), socket: Socket::Tcp(socket), file: None })
        }
        Address::Unix(path) => {
            let owned = path.clone();
            let (std, file) = tokio::task::spawn_blocking(move || open_unix(&owned))
                .await
                .map_err(|e| failed(io::Error::other(e)))??;
            let socket = UnixListener::from_std(std).map_err(failed)?;
            Ok(Listener { address: address.clone(), socket: Socket::Unix(socket), file: Some(file) })
        }
    }
}

fn open_unix(path: &Path) -> Result<(StdUnixListener, SocketFile), ListenError> {
    let shown = format!("unix:{}", path.display());
    let failed = |source| ListenError::Io { address: shown.clone(), source };
    match fs::symlink_metadata(path) {
        Ok(meta) if !meta.file_type().is_socket() => return Err(ListenError::NotASocket(shown)),
        Ok(_) => match UnixStream::connect(path) {
            // A full backlog (EAGAIN) is somebody too.
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            _ => return Err(ListenError::InUse(shown)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(source) => return Err(failed(source)),
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let private = Private::make(parent).map_err(failed)?;
    let inner = private.dir.join("s");
    // Through /proc/self/fd the name is short however long the path is.
    let short = PathBuf::from(format!("/proc/self/fd/{}/s", private.fd()));
    let listener = StdUnixListener::bind(&short).map_err(failed)?;
    listener.set_nonblocking(true).map_err(failed)?;
    fs::set_permissions(&inner, fs::Permissions::from_mode(0o600)).map_err(failed)?;
    let meta = fs::symlink_metadata(&inner).map_err(failed)?;
    fs::rename(&inner, path).map_err(failed)?;
    let file = SocketFile { path: path.to_path_buf(), inode: (meta.dev(), meta.ino()) };
    Ok((listener, file))
}

/// A private directory beside the socket, gone when dropped.
struct Private {
    dir: PathBuf,
    handle: fs::File,
}

impl Private {
    fn make(parent: &Path) -> io::Result<Self> {
        let dir = parent.join(format!(".vpmud-{}", uuid::Uuid::new_v4().simple()));
        fs::DirBuilder::new().mode(0o700).create(&dir)?;
        let handle = fs::File::open(&dir).inspect_err(|_| {
            let _ = fs::remove_dir(&dir);
        })?;
        Ok(Self { dir, handle })
    }

    fn fd(&self) -> i32 {
        std::os::fd::AsRawFd::as_raw_fd(&self.handle)
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        let _ = fs::remove_file(self.dir.join("s"));
        let _ = fs::remove_dir(&self.dir);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_private_and_goes_with_its_owner() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a.sock");
        let listener = open(&Address::Unix(path.clone())).await.expect("opens");
        let mode = fs::metadata(&path).expect("there").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        let again = open(&Address::Unix(path.clone())).await.expect_err("in use");
        assert_eq!(again.reason(), "ADDRESS_IN_USE");
        drop(listener);
        assert_eq!(fs::read_dir(dir.path()).expect("list").count(), 0, "nothing is left behind");
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_file_is_not() {
        let dir = tempfile::tempdir().expect("tempdir");
        let path = dir.path().join("a.sock");
        drop(StdUnixListener::bind(&path).expect("bind"));
        assert!(path.exists());
        drop(open(&Address::Unix(path.clone())).await.expect("replaces"));
        fs::write(&path, b"precious").expect("write");
        let error = open(&Address::Unix(path.clone())).await.expect_err("refused");
        assert_eq!(error.reason(), "SOCKET_PATH_TAKEN");
        assert_eq!(fs::read(&path).expect("kept"), b"precious");
    }
}
