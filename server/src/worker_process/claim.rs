//! A spare becomes a machine's worker: its runtime directory gets the name of the machine's. That may wait for a disk, and is
//! done while the worker builds the machine already.
//!
//! Invariants: until the directory has its name ([`WorkerProcess::claimed`]) the worker is granted nothing: it would run where
//! nobody looks for it. If this process dies before that, a worker without a machine ends, and the next daemon ends one that has
//! built it. A claim that has failed stays failed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::PoisonError;

use tokio::task::JoinHandle;

use super::{WorkerProcess, socket_of};

/// A directory that is to have another name.
pub(super) enum Claim {
    /// Nobody has begun.
    Due(PathBuf),
    /// On its way there; then where the worker listens.
    Renaming(PathBuf, JoinHandle<io::Result<PathBuf>>),
    /// It is where it was.
    Failed(String),
}

impl WorkerProcess {
    /// Makes a spare the worker of the machine whose runtime directory this is to be.
    pub(super) fn claim(mut self, to: PathBuf, lifeline: OwnedFd) -> Self {
        *self.claim.get_mut() = Some(Claim::Due(to));
        *self.lifeline.get_mut().unwrap_or_else(PoisonError::into_inner) = Some(lifeline);
        self
    }

    /// Makes its runtime directory the machine's.
    ///
    /// # Errors
    /// If it could not be renamed: it is where it was.
    pub async fn claimed(&self) -> io::Result<()> {
        let mut claim = self.claim.lock().await;
        if let Some(Claim::Due(to)) = claim.as_ref() {
            let (from, to) = (self.dir(), to.clone());
            let renaming = {
                let to = to.clone();
                tokio::task::spawn_blocking(move || {
                    std::fs::rename(from, &to)?;
                    Ok(socket_of(&to))
                })
            };
            *claim = Some(Claim::Renaming(to, renaming));
        }
        let (to, renaming) = match claim.as_mut() {
            Some(Claim::Renaming(to, renaming)) => (to, renaming),
            Some(Claim::Failed(why)) => return Err(io::Error::other(why.clone())),
            Some(Claim::Due(_)) | None => return Ok(()),
        };
        // Whoever gives this wait up leaves the renaming to the next.
        match renaming.await.map_err(io::Error::other).and_then(std::convert::identity) {
            Ok(socket) => {
                to.clone_into(&mut self.dir.lock().unwrap_or_else(PoisonError::into_inner));
                socket.clone_into(&mut self.socket.lock().unwrap_or_else(PoisonError::into_inner));
                *claim = None;
                Ok(())
            }
            Err(error) => {
                *claim = Some(Claim::Failed(error.to_string()));
                Err(error)
            }
        }
    }

    /// It has its machine, and [`Self::claimed`] has returned: from now on it outlives this process.
    pub fn has_machine(&self) {
        self.lifeline.lock().unwrap_or_else(PoisonError::into_inner).take();
    }
}
