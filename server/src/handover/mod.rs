//! The handover: pure state machines of source, destination and recovery.

pub mod phase;
