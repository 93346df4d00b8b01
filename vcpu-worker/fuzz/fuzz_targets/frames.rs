//! See `vcpu_worker::dataplane::fuzz::frames`.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| vcpu_worker::dataplane::fuzz::frames(data));
