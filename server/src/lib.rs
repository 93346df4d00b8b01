//! vpmud: the daemon on each host.
#![forbid(unsafe_code)]
