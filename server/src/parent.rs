//! Ends a daemon with the process that started it: `vpmud serve --exit-with-parent`, for the demo and for tests.
//!
//! The parent holds the other end of standard input and writes nothing. The kernel closes that end however the parent
//! dies, SIGKILL included, which no handler of the parent's could do.

use std::io::Read as _;
use tokio::sync::oneshot;

/// Returns when standard input has ended; never, if `watch` is false.
pub async fn gone(watch: bool) {
    if !watch {
        return std::future::pending().await;
    }
    let (sender, receiver) = oneshot::channel();
    // A thread of its own: a read from a pipe cannot be cancelled, and the process must not wait for it at its end.
    let reader = std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        let mut buffer = [0; 64];
        while std::io::stdin().read(&mut buffer).is_ok_and(|read| read > 0) {}
        // The daemon may have ended first.
        let _ = sender.send(());
    });
    match reader {
        // Either the end has come or the sender is gone with its thread, which means the same.
        Ok(_) => drop(receiver.await),
        Err(error) => {
            tracing::error!(%error, "cannot watch for the parent's end: this daemon ends by signal only");
            std::future::pending::<()>().await;
        }
    }
}
