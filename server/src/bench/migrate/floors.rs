//! What no migration on this machine can go below.

use std::time::{Duration, Instant};

use serde::Serialize;
use vcpu_worker::floor::bare::BareHost;
use vcpu_worker::floor::state::save_and_restore;

use crate::bench::error::BenchError;
use crate::bench::figure::Samples;
use crate::bench::site::{Site, ms};

/// Bytes that are copied.
const COPY: usize = 256 << 20;
const RUNS: usize = 11;
/// Between two writes of a migration lie its messages, if not its rounds.
const REST: Duration = Duration::from_millis(10);

/// Of this machine, in this run.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Floors {
    /// Memory to memory, both touched before.
    pub(super) memcpy_mb_s: f64,
    /// Two decision records made durable one after the other, by a disk that has rested as long as a migration lets it.
    pub(super) two_fdatasyncs_ms: f64,
    /// A machine's state read and set into another with nothing but the ioctls.
    pub(super) save_us: f64,
    /// The second half of it.
    pub(super) restore_us: f64,
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
            std::thread::sleep(REST);
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
        let states = BareHost::open().and_then(|host| save_and_restore(&host, RUNS));
        let states = states.map_err(std::io::Error::other)?;
        let us = |time: Duration| time.as_secs_f64() * 1e6;
        Ok(Floors {
            memcpy_mb_s: copies.median(),
            two_fdatasyncs_ms: syncs.median(),
            save_us: states.iter().map(|(save, _)| us(*save)).collect::<Samples>().median(),
            restore_us: states.iter().map(|(_, restore)| us(*restore)).collect::<Samples>().median(),
        })
    });
    let measured =
        measured.await.map_err(|e| BenchError::io("measure the floors", std::io::Error::other(e)))?;
    measured.map_err(|e| BenchError::io("measure the floors", e))
}
