//! Keeping the host's processors from sleeping while somebody waits for many short steps in a row.
//!
//! A migration's blackout is a chain of messages and disk writes; where each link is waited for by a processor that has
//! gone to sleep, waking it costs more than the link (measured on a virtual host: 270 us a disk request instead of 70). While
//! a [`Hold`] lives, `/dev/cpu_dma_latency` says that no wake-up may take time (Linux, Documentation/power/
//! pm_qos_interface.rst), which costs power: each hold has a bound.
//!
//! Invariants: the wish stands while any hold does and is taken back with the last; no file (not root, another system,
//! `--keep-awake off`) means no wish and no error.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::task::AbortOnDropHandle;

const FILE: &str = "/dev/cpu_dma_latency";
/// A wake-up may take this long, in microseconds: the file takes an `i32` in the host's byte order.
const AT_ONCE: i32 = 0;
/// No wish (PM_QOS_DEFAULT_VALUE).
const ANY_TIME: i32 = -1;
/// Longest that one hold lasts: a wait of this length has other causes.
const BOUND: Duration = Duration::from_secs(2);

/// Whether processors are kept awake.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum KeepAwake {
    /// For moments in which a machine stands still or a call waits, where this process may.
    #[default]
    Auto,
    /// Never.
    Off,
}

/// The host's processors; clones are the same.
#[derive(Debug, Clone)]
pub struct Awake {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    file: Option<File>,
    holds: Mutex<usize>,
}

impl Awake {
    /// Opens the kernel's file; without it nothing is kept awake.
    pub fn open(keep: KeepAwake) -> Self {
        match keep {
            KeepAwake::Auto => Self::on(Path::new(FILE)),
            KeepAwake::Off => Self::with(None),
        }
    }

    fn on(path: &Path) -> Self {
        let file = File::options().write(true).open(path);
        if let Err(error) = &file {
            tracing::debug!(path = %path.display(), %error, "processors may sleep while a machine stands still");
        }
        Self::with(file.ok())
    }

    fn with(file: Option<File>) -> Self {
        Self { inner: Arc::new(Inner { file, holds: Mutex::new(0) }) }
    }

    /// Keeps them awake until the hold is dropped, two seconds at most. Within a runtime.
    pub fn hold(&self) -> Hold {
        self.hold_for(BOUND)
    }

    fn hold_for(&self, bound: Duration) -> Hold {
        if self.inner.file.is_none() {
            return Hold { _bound: None };
        }
        let held = Held::new(&self.inner);
        let bound = tokio::spawn(async move {
            tokio::time::sleep(bound).await;
            drop(held);
        });
        Hold { _bound: Some(AbortOnDropHandle::new(bound)) }
    }
}

impl Inner {
    fn say(&self, wish: i32) {
        let Some(mut file) = self.file.as_ref() else { return };
        if let Err(error) = file.write_all(&wish.to_ne_bytes()) {
            tracing::debug!(%error, wish, "the kernel does not take a wish about its processors' sleep");
        }
    }
}

/// Until it is dropped, or its bound is over, processors stay awake.
#[derive(Debug)]
#[must_use = "dropped, it keeps nothing awake"]
pub struct Hold {
    /// The task that holds; aborted, it lets go.
    _bound: Option<AbortOnDropHandle<()>>,
}

struct Held(Arc<Inner>);

impl Held {
    fn new(inner: &Arc<Inner>) -> Self {
        let mut holds = inner.holds.lock().unwrap_or_else(PoisonError::into_inner);
        *holds += 1;
        if *holds == 1 {
            inner.say(AT_ONCE);
        }
        Self(Arc::clone(inner))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut holds = self.0.holds.lock().unwrap_or_else(PoisonError::into_inner);
        *holds = holds.saturating_sub(1);
        if *holds == 0 {
            self.0.say(ANY_TIME);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(path: &Path) -> Vec<i32> {
        let bytes = std::fs::read(path).expect("the file");
        bytes.chunks(4).map(|b| i32::from_ne_bytes(b.try_into().expect("whole words"))).collect()
    }

    #[tokio::test]
    async fn the_wish_stands_while_any_hold_does() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("latency");
        std::fs::write(&path, b"").expect("made");
        let awake = Awake::on(&path);
        assert!(said(&path).is_empty(), "open, it wishes nothing");
        let (one, two) = (awake.hold(), awake.clone().hold());
        assert_eq!(said(&path), [AT_ONCE], "once for both");
        drop(one);
        tokio::task::yield_now().await;
        assert_eq!(said(&path).len(), 1, "the other holds still");
        drop(two);
        while said(&path).len() < 2 {
            tokio::task::yield_now().await;
        }
        assert_eq!(said(&path), [AT_ONCE, ANY_TIME]);
        // One that is forgotten ends by itself.
        let forgotten = awake.hold_for(Duration::from_millis(1));
        while said(&path).len() < 4 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(said(&path), [AT_ONCE, ANY_TIME, AT_ONCE, ANY_TIME]);
        drop(forgotten);
        assert_eq!(said(&path).len(), 4);
    }

    #[tokio::test]
    async fn without_the_file_nothing_happens() {
        let dir = tempfile::tempdir().expect("a directory");
        let awake = Awake::on(&dir.path().join("none"));
        drop(awake.hold());
        drop(Awake::open(KeepAwake::Off).hold());
        assert!(!dir.path().join("none").exists());
    }
}
