//! When a worker is nobody's any more: its runtime directory was deleted while no daemon was connected. No daemon can find
//! it again then, and one that starts takes its machine for dead and may start it anew.
//!
//! Invariant: only certainty counts. A directory that was removed has no link left (fstat of the open descriptor, so that
//! a new name does not matter), seen [`SEEN`] times in a row with nobody connected in between; an error says nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::{Connected, UdsConnectInfo};

/// Between two looks.
pub(super) const LOOK: Duration = Duration::from_secs(2);
/// Looks that must find the same.
const SEEN: u32 = 3;

/// Daemons that are connected.
#[derive(Debug, Clone, Default)]
pub(super) struct Connections(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    open: AtomicU64,
    /// Ever made: one that came and went between two looks is noticed.
    made: AtomicU64,
}

impl Connections {
    /// Counts a connection until it is dropped.
    pub(super) fn count(&self, stream: UnixStream) -> Counted {
        self.0.open.fetch_add(1, Ordering::SeqCst);
        self.0.made.fetch_add(1, Ordering::SeqCst);
        Counted { stream, counts: Arc::clone(&self.0) }
    }

    fn now(&self) -> (u64, u64) {
        (self.0.open.load(Ordering::SeqCst), self.0.made.load(Ordering::SeqCst))
    }
}

/// A connection that is counted.
pub(super) struct Counted {
    stream: UnixStream,
    counts: Arc<Counts>,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.counts.open.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Returns once the directory is gone for certain and nobody is connected.
pub(super) async fn orphaned(dir: &File, connections: &Connections, look: Duration) {
    let (mut seen, mut made) = (0, 0);
    while seen < SEEN {
        tokio::time::sleep(look).await;
        let (open, ever) = connections.now();
        let gone = dir.metadata().is_ok_and(|known| known.nlink() == 0);
        seen = if gone && open == 0 && (seen == 0 || made == ever) { seen + 1 } else { 0 };
        made = ever;
    }
}

impl Connected for Counted {
    type ConnectInfo = UdsConnectInfo;

    fn connect_info(&self) -> Self::ConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        into: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, into)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, data)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_millis(1);

    /// Many times the looks that would be enough.
    async fn does_not_return(dir: &File, connections: &Connections) {
        let long = tokio::time::timeout(SOON * 100, orphaned(dir, connections, SOON)).await;
        assert!(long.is_err(), "it is not an orphan");
    }

    #[tokio::test]
    async fn a_deleted_directory_and_no_daemon_make_an_orphan() {
        let parent = tempfile::tempdir().unwrap();
        let (first, second) = (parent.path().join("a"), parent.path().join("b"));
        std::fs::create_dir(&first).unwrap();
        let dir = File::open(&first).unwrap();
        let connections = Connections::default();
        does_not_return(&dir, &connections).await;
        // As a spare's is, when a machine takes it.
        std::fs::rename(&first, &second).unwrap();
        does_not_return(&dir, &connections).await;

        std::fs::remove_dir(&second).unwrap();
        let (stream, _other) = UnixStream::pair().unwrap();
        let connected = connections.count(stream);
        does_not_return(&dir, &connections).await;
        // Another directory of the same name is not this one.
        std::fs::create_dir(&second).unwrap();
        drop(connected);
        orphaned(&dir, &connections, SOON).await;
    }
}
