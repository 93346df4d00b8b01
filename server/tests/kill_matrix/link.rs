//! A way between two daemons that can be cut: it takes the place of a host's peer socket and hands connections on.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const WHOLE: u8 = 0;
const CUT: u8 = 1;
/// What comes in from whoever connects is lost.
const DEAF: u8 = 2;
/// What goes back to whoever connected is lost.
const MUTE: u8 = 3;

/// One host's peer socket behind a door.
pub struct Link {
    state: Arc<AtomicU8>,
    breaks: watch::Sender<u64>,
    door: JoinHandle<()>,
}

impl Link {
    /// Moves the socket aside and listens in its place.
    pub fn before(socket: &Path) -> io::Result<Self> {
        let real: PathBuf = socket.with_extension("real");
        std::fs::rename(socket, &real)?;
        let listener = UnixListener::bind(socket)?;
        let state = Arc::new(AtomicU8::new(WHOLE));
        let (breaks, _) = watch::channel(0);
        let (shared, broken) = (Arc::clone(&state), breaks.clone());
        let door = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if shared.load(Ordering::SeqCst) == CUT {
                    continue;
                }
                tokio::spawn(pass(stream, real.clone(), Arc::clone(&shared), broken.subscribe()));
            }
        });
        Ok(Self { state, breaks, door })
    }

    fn set(&self, state: u8) {
        self.state.store(state, Ordering::SeqCst);
    }

    /// Closes every connection and takes none.
    pub fn cut(&self) {
        self.set(CUT);
        self.breaks.send_modify(|n| *n += 1);
    }

    /// Loses what is sent to the host.
    pub fn deafen(&self) {
        self.set(DEAF);
    }

    /// Loses what the host sends back.
    pub fn mute(&self) {
        self.set(MUTE);
    }

    /// Whole again; connections with a gap in them are closed.
    pub fn heal(&self) {
        self.set(WHOLE);
        self.breaks.send_modify(|n| *n += 1);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.door.abort();
        self.breaks.send_modify(|n| *n += 1);
    }
}

async fn pass(stream: UnixStream, real: PathBuf, state: Arc<AtomicU8>, mut broken: watch::Receiver<u64>) {
    let Ok(host) = UnixStream::connect(&real).await else { return };
    let ((from, to), (host_from, host_to)) = (stream.into_split(), host.into_split());
    tokio::select! {
        () = pump(from, host_to, &state, DEAF) => {}
        () = pump(host_from, to, &state, MUTE) => {}
        _ = broken.changed() => {}
    }
}

async fn pump(
    mut from: tokio::net::unix::OwnedReadHalf,
    mut to: tokio::net::unix::OwnedWriteHalf,
    state: &AtomicU8,
    lost: u8,
) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(_) if state.load(Ordering::SeqCst) == lost => {}
            Ok(n) => {
                if to.write_all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
        }
    }
}
