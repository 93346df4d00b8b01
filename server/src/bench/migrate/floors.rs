//! What no migration on this machine can go below.

use std::time::Instant;

use serde::Serialize;

use crate::bench::error::BenchError;
use crate::bench::figure::Samples;
use crate::bench::site::{Site, ms};

/// Bytes that are copied.
const COPY: usize = 256 << 20;
const RUNS: usize = 11;

/// Of this machine, in this run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Floors {
    /// Memory to memory, both touched before.
    pub(super) memcpy_mb_s: f64,
    /// Two decision records made durable one after the other.
    pub(super) two_fdatasyncs_ms: f64,
}

pub(super) async fn measure(site: &Site) -> Result<Floors, BenchError> {
    let path = site.path().join("floor");
    let measured = tokio::task::spawn_blocking(move || -> std::io::Result<Floors> {
        let (from, mut to) = (vec![1_u8; COPY], vec![2_u8; COPY]);
        let copies: Samples = (0..RUNS)
            .map(|_| {
                let begin = Instant::now();
                to.copy_from_slice(std::hint::black_box(&from));
                std::hint::black_box(&to);
                COPY as f64 / 1e6 / begin.elapsed().as_secs_f64()
            })
            .collect();
        let file = std::fs::File::create(&path)?;
        std::os::unix::fs::FileExt::write_all_at(&file, &vec![0; 65536], 0)?;
        file.sync_all()?;
        let mut syncs = Samples::default();
        for run in 0..RUNS as u64 {
            let begin = Instant::now();
            for half in 0..2 {
                std::os::unix::fs::FileExt::write_all_at(
                    &file,
                    &[run as u8 + 1; 256],
                    run * 1024 + half * 512,
                )?;
                file.sync_data()?;
            }
            syncs.push(ms(begin.elapsed()));
        }
        std::fs::remove_file(&path)?;
        Ok(Floors { memcpy_mb_s: copies.median(), two_fdatasyncs_ms: syncs.median() })
    });
    let measured =
        measured.await.map_err(|e| BenchError::io("measure the floors", std::io::Error::other(e)))?;
    measured.map_err(|e| BenchError::io("measure the floors", e))
}
