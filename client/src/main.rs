//! vpmuctl, the command line of vpmud.
#![forbid(unsafe_code)]

fn main() {}
