//! The vpmud binary.
#![forbid(unsafe_code)]

fn main() {}
