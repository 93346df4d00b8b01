//! A spare becomes a machine's worker: its runtime directory gets the name of the machine's. That may wait for a disk, and is
//! done while the worker builds the machine already.
//!
//! Invariant: until the directory has its name ([`WorkerProcess::claimed`]) and the worker its machine
//! ([`WorkerProcess::has_machine`]), the worker ends with this process: nobody would find it again.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::PoisonError;

use tokio::task::JoinHandle;

use super::{WorkerProcess, socket_of};

/// A directory that is to have another name.
pub(super) struct Claim {
    to: PathBuf,
    /// On its way there; then where the worker listens.
    renamed: Option<JoinHandle<io::Result<PathBuf>>>,
}

impl WorkerProcess {
    /// Makes a spare the worker of the machine whose runtime directory this is to be.
    pub(super) fn claim(mut self, to: PathBuf, lifeline: OwnedFd) -> Self {
        *self.claim.get_mut() = Some(Claim { to, renamed: None });
        *self.lifeline.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(lifeline);
        self
    }

    /// Makes its runtime directory the machine's.
    ///
    /// # Errors
    /// If it could not be renamed: it is where it was.
    pub async fn claimed(&self) -> io::Result<()> {
        let mut claim = self.claim.lock().await;
        let Some(Claim { to, renamed }) = claim.as_mut() else { return Ok(()) };
        let renaming = renamed.get_or_insert_with(|| {
            let (from, to) = (self.dir(), to.clone());
            tokio::task::spawn_blocking(move || {
                std::fs::rename(from, &to)?;
                Ok(socket_of(&to))
            })
        });
        let renamed = renaming.await.map_err(io::Error::other).and_then(std::convert::identity);
        if let Ok(socket) = &renamed {
            to.clone_into(&mut self.dir.lock().unwrap_or_else(PoisonError::into_inner));
            socket.clone_into(&mut self.socket.lock().unwrap_or_else(PoisonError::into_inner));
        }
        *claim = None;
        renamed.map(drop)
    }

    /// It has its machine, and [`Self::claimed`] has returned: from now on it outlives this process.
    pub fn has_machine(&self) {
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
