//! Client library of vpmud.
#![forbid(unsafe_code)]
