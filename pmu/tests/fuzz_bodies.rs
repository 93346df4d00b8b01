//! The bodies of the fuzz targets as property tests, on stable Rust; under libFuzzer they run from `pmu/fuzz`.
#![allow(clippy::pedantic)]

#[path = "fuzz_bodies/mod.rs"]
mod bodies;

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, ..ProptestConfig::default() })]

    #[test]
    fn image_import(data in prop::collection::vec(any::<u8>(), 0..400)) {
        bodies::image_import(&data);
    }

    #[test]
    fn cpuid(data in prop::collection::vec(any::<u8>(), 0..160)) {
        bodies::cpuid(&data);
    }
}
