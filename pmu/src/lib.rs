//! The passthrough-PMU context switcher.
#![forbid(unsafe_code)]
