//! Says when the threads that serve the API were held up: calls, heartbeats and deadlines waited as long, and other hosts
//! may have taken this one for gone.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// Less is what a busy host has.
const WORTH_SAYING: Duration = Duration::from_secs(1);

/// Runs until the daemon ends.
pub async fn watch(shutdown: CancellationToken) {
    let mut due = Instant::now() + LOOK;
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            () = tokio::time::sleep_until(due) => {}
        }
        let now = Instant::now();
        let late = now.duration_since(due);
        if late >= WORTH_SAYING {
            let late_ms = late.as_millis();
            tracing::warn!(
                late_ms,
                "the threads that serve the API were held up: this host or its disk is overloaded"
            );
        }
        due = now + LOOK;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl std::io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("held").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_thread_that_was_held_up_is_spoken_of_once() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let _log = tracing::subscriber::set_default(log);
        let end = CancellationToken::new();
        let watch = tokio::spawn(watch(end.clone()));
        tokio::time::sleep(LOOK * 2).await;
        std::thread::sleep(LOOK + WORTH_SAYING + LOOK);
        tokio::time::sleep(LOOK * 2).await;
        end.cancel();
        watch.await.expect("ends");
        let text = String::from_utf8(lines.0.lock().expect("held").clone()).expect("text");
        assert_eq!(text.matches("held up").count(), 1, "{text}");
    }
}
