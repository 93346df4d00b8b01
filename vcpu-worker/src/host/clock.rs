//! Clocks, all in nanoseconds unless said otherwise.
#![allow(unsafe_code)]

use std::sync::OnceLock;

use rustix::time::{ClockId, clock_gettime};

fn read(clock: ClockId) -> u64 {
    let at = clock_gettime(clock);
    u64::try_from(at.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(at.tv_nsec).unwrap_or(0)
}

/// CPU time of the calling thread, guest time included.
pub fn thread_cpu_ns() -> u64 {
    read(ClockId::ThreadCPUTime)
}

/// CLOCK_MONOTONIC: comparable between processes of one boot; stands still in suspend.
pub fn monotonic_ns() -> u64 {
    read(ClockId::Monotonic)
}

/// CLOCK_BOOTTIME: like monotonic, but goes on in suspend; what grants expire by.
pub fn boottime_ns() -> u64 {
    read(ClockId::Boottime)
}

/// CLOCK_REALTIME: comparable between hosts as far as their clocks are kept.
pub fn realtime_ns() -> u64 {
    read(ClockId::Realtime)
}

/// The time stamp counter.
pub fn tsc() -> u64 {
    // SAFETY: RDTSC is there on every x86-64 and has no effect on memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}

/// Both clocks at one moment. The thread may be preempted between the reads: the closest of a few tries counts.
fn both() -> (u64, u64) {
    let tries = (0..8).map(|_| {
        let (before, at, after) = (monotonic_ns(), tsc(), monotonic_ns());
        (after.saturating_sub(before), before, at)
    });
    tries.min().map_or((0, 0), |(_, ns, at)| (ns, at))
}

/// Measures the time stamp counter's frequency over 20 ms, kHz.
pub(crate) fn measure_tsc_khz() -> u32 {
    let (t0, c0) = both();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let (t1, c1) = both();
    let khz = u128::from(c1.wrapping_sub(c0)) * 1_000_000 / u128::from(t1.saturating_sub(t0).max(1));
    u32::try_from(khz).unwrap_or(0)
}

/// Random id of this boot, in the kernel's form; empty where the kernel does not tell.
pub fn boot_id() -> &'static str {
    static ID: OnceLock<String> = OnceLock::new();
    ID.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
    })
}

/// The same as 16 bytes; zeros where the kernel does not tell.
pub(crate) fn boot_id_bytes() -> [u8; 16] {
    let hex: Vec<u8> =
        boot_id().bytes().filter_map(|b| char::from(b).to_digit(16)).map(|d| d as u8).collect();
    let mut bytes = [0; 16];
    for (byte, pair) in bytes.iter_mut().zip(hex.as_chunks::<2>().0) {
        *byte = pair[0] << 4 | pair[1];
    }
    bytes
}
