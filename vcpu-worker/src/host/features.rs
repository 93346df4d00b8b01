//! What the processor can do, as libraries ask for it.
//!
//! They ask with CPUID when they are first used, which a hypervisor below this host answers in microseconds each time:
//! 100 to 200 of them in the middle of a migration. Asked ahead, the answers are there.

use sha2::Digest as _;

/// Has those asked that a migration uses.
pub fn ask() {
    // Long enough for the ways that depend on the processor.
    let block = [0; 512];
    std::hint::black_box(crc32c::crc32c(&block));
    std::hint::black_box(sha2::Sha256::digest(block));
}
