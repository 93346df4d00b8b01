//! How fast the migration data plane moves memory, beside what this machine can copy.
//!
//! `cargo run --release -p vcpu-worker --example dataplane_bench [MiB]`: source and destination in one process over
//! loopback. "first" sends to memory that was never touched, where the kernel has to find and clear pages; "again"
//! sends the same pages once more; "stopped" sends them straight from guest memory. "last 1 MiB" is what lies in a
//! blackout: 256 scattered pages and 64 KiB of state, to the receipt. Medians of five.

use std::error::Error;
use std::sync::atomic::AtomicU64;
use std::time::{Duration, Instant};

use vcpu_worker::bitmap::PageBitmap;
use vcpu_worker::dataplane::{CancelFlag, DataAddress, Incoming, Outgoing, SessionId};
use vcpu_worker::memory::{GuestMemory, PAGE_SIZE};

type Fallible<T> = Result<T, Box<dyn Error + Send + Sync>>;

const RUNS: usize = 5;

/// Times of one migration.
struct Times {
    first: Duration,
    again: Duration,
    stopped: Duration,
    last: Duration,
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

fn migrate(address: &DataAddress, connections: u16, source: &GuestMemory) -> Fallible<Times> {
    let session = SessionId { migration_id: [1; 16], attempt: 1, token: [2; 32] };
    let memory = GuestMemory::new("destination", source.bytes())?;
    let incoming = Incoming::bind(address, session.clone(), connections, memory)?;
    let address = incoming.local_address()?;
    let thread = std::thread::spawn(move || incoming.run(CancelFlag::new(), &AtomicU64::new(0)));
    let deadline = Duration::from_secs(5);
    let cancel = CancelFlag::new();
    let mut out = Outgoing::connect(&address, &session, connections, source.clone(), 0, cancel, deadline)?;
    let all = PageBitmap::full(source.pages());
    let first = out.send_round(1, &all, true)?.elapsed;
    let again = out.send_round(2, &all, true)?.elapsed;
    let begin = Instant::now();
    out.send_round(3, &all, false)?;
    // An empty live round waits until all of it has arrived.
    out.send_round(4, &PageBitmap::new(source.pages()), true)?;
    let stopped = begin.elapsed();
    let state = vec![7; 64 << 10];
    let mut few = PageBitmap::new(source.pages());
    (0..256).for_each(|n| few.set(n * 37 % source.pages()));
    let begin = Instant::now();
    out.send_round(5, &few, false)?;
    out.finish(&state)?;
    let last = begin.elapsed();
    thread.join().map_err(|_| "the destination panicked")??.acknowledge()?;
    out.await_applied(deadline)?;
    Ok(Times { first, again, stopped, last })
}

fn main() -> Fallible<()> {
    let mib: u64 = std::env::args().nth(1).map_or(Ok(256), |arg| arg.parse())?;
    let bytes = mib << 20;
    let rate = |time: Duration| mib as f64 / time.as_secs_f64();
    let source = GuestMemory::new("source", bytes)?;
    let mut word = 0x9e37_79b9_7f4a_7c15_u64;
    for page in 0..source.pages() {
        let mut content = [0; PAGE_SIZE as usize];
        for piece in content.chunks_exact_mut(8) {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            piece.copy_from_slice(&word.to_le_bytes());
        }
        source.write_at(page * PAGE_SIZE, &content)?;
    }

    let (from, mut to) = (vec![1_u8; bytes as usize], vec![2_u8; bytes as usize]);
    let copies = (0..RUNS).map(|_| {
        let begin = Instant::now();
        to.copy_from_slice(std::hint::black_box(&from));
        std::hint::black_box(&to);
        begin.elapsed()
    });
    println!("{mib} MiB, memcpy {:.0} MiB/s", rate(median(copies.collect())));
    let fresh = (0..RUNS).map(|_| -> Fallible<Duration> {
        let memory = GuestMemory::new("fresh", bytes)?;
        let begin = Instant::now();
        (0..mib).try_for_each(|at| memory.write_at(at << 20, &from[..1 << 20]))?;
        Ok(begin.elapsed())
    });
    println!("first touch of fresh memory {:.0} MiB/s", rate(median(fresh.collect::<Fallible<_>>()?)));
    println!("CRC-32C {:.0} MiB/s", {
        let begin = Instant::now();
        std::hint::black_box(crc32c::crc32c(&from));
        rate(begin.elapsed())
    });

    println!(
        "{:>9} {:>5} {:>10} {:>10} {:>10} {:>12}",
        "transport", "conns", "first", "again", "stopped", "last 1 MiB"
    );
    let dir = tempfile::tempdir()?;
    for address in ["tcp:127.0.0.1:0".parse()?, DataAddress::Unix(dir.path().join("data.sock"))] {
        for connections in [1, 2, 4] {
            let times: Vec<Times> =
                (0..RUNS).map(|_| migrate(&address, connections, &source)).collect::<Fallible<_>>()?;
            let of = |pick: fn(&Times) -> Duration| median(times.iter().map(pick).collect());
            let name = if matches!(address, DataAddress::Tcp(_)) { "tcp" } else { "unix" };
            println!(
                "{name:>9} {connections:>5} {:>10.0} {:>10.0} {:>10.0} {:>9.2} ms   (MiB/s)",
                rate(of(|t| t.first)),
                rate(of(|t| t.again)),
                rate(of(|t| t.stopped)),
                of(|t| t.last).as_secs_f64() * 1000.0,
            );
        }
    }
    Ok(())
}
