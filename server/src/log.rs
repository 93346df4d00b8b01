//! The daemon's log: to standard error, through a thread of its own, so that a reader that stalls, or a disk, does not stop
//! the daemon.
//!
//! Invariant: what finds no room while nobody reads is dropped and counted, and the count is logged ([`crate::lag`]). What is
//! not written yet is lost by SIGKILL; an orderly end writes it, for a second at most.

use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::EnvFilter;

/// Lines that wait at most.
const LINES: usize = 8192;

/// Dropped: what waits is written.
#[derive(Debug)]
pub struct Log {
    /// Lines that found no room.
    pub lost: ErrorCounter,
    _writer: WorkerGuard,
}

impl Log {
    /// Begins; RUST_LOG chooses what is logged.
    pub fn begin() -> Self {
        let builder = NonBlockingBuilder::default().buffered_lines_limit(LINES).thread_name("log");
        let (log, writer) = builder.finish(std::io::stderr());
        let lost = log.error_counter();
        let filter = EnvFilter::try_from_default_env()
            .unwrap_or_else(|_| EnvFilter::new("info,h2=warn,hyper=warn,sled=warn"));
        // It fails where there is a log already.
        let _ = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(log)
            .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
            .try_init();
        Self { lost, _writer: writer }
    }
}
