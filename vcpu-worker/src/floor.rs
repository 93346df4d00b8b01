//! What the bare kernel takes on this machine, measured beside what the worker takes: `vpmud bench` prints both.
//!
//! - [`bare`] makes and runs a virtual machine with nothing but the ioctls;
//! - [`loops`] compares the worker's run loop and its kick with a bare `KVM_RUN` loop and a bare signal, in one process, in
//!   turns, on the same core;
//! - [`state`] moves a machine's state with nothing but the ioctls.
//!
//! Nothing here is used by a worker that serves.

pub mod bare;
mod guests;
pub mod loops;
pub mod state;
