//! vpmud: the daemon on each host.
#![forbid(unsafe_code)]

pub mod handover;
pub mod journal;
pub mod store;
pub mod demo;
