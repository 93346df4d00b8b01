//! vpmud: the daemon on each host.
#![forbid(unsafe_code)]

pub mod demo;
pub mod handover;
pub mod journal;
pub mod parent;
pub mod store;
