//! Says when the threads that serve the API were held up: calls, heartbeats and deadlines waited as long, and other hosts
//! may have taken this one for gone. And when lines of the log found no room.

use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing_appender::non_blocking::ErrorCounter;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(500);
/// Less is what a busy host has.
const WORTH_SAYING: Duration = Duration::from_secs(1);

/// Runs until the daemon ends. `lost` counts the lines.
pub async fn watch(shutdown: CancellationToken, lost: ErrorCounter) {
    let (mut due, mut said) = (Instant::now() + LOOK, 0);
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
        let lines = lost.dropped_lines();
        if lines > said {
            tracing::warn!(
                lines,
                "lines of the log found no room so far: whoever reads it stands still at times"
            );
            said = lines;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::{Arc, Mutex};

    use tracing_appender::non_blocking::NonBlockingBuilder;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().expect("held").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_thread_that_was_held_up_and_lost_lines_are_spoken_of() {
        let lines = Lines::default();
        let writer = lines.clone();
        let log = tracing_subscriber::fmt().with_writer(move || writer.clone()).with_ansi(false).finish();
        let _log = tracing::subscriber::set_default(log);
        let text = || String::from_utf8(lines.0.lock().expect("held").clone()).expect("text");
        let (mut full, _writer) = NonBlockingBuilder::default().buffered_lines_limit(1).finish(Stuck);
        let end = CancellationToken::new();
        let watch = tokio::spawn(watch(end.clone(), full.error_counter()));
        tokio::time::sleep(LOOK * 2).await;
        std::thread::sleep(LOOK + WORTH_SAYING + LOOK);
        while full.error_counter().dropped_lines() == 0 {
            full.write_all(b"line").expect("never fails");
        }
        let begin = Instant::now();
        while !(text().contains("held up") && text().contains("found no room")) {
            assert!(begin.elapsed() < Duration::from_secs(30), "{}", text());
            tokio::time::sleep(LOOK).await;
        }
        end.cancel();
        watch.await.expect("ends");
    }

    /// Takes its time, for ever.
    struct Stuck;

    impl Write for Stuck {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            std::thread::sleep(Duration::from_millis(50));
            Ok(bytes.len())
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
}
