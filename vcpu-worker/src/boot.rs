//! Puts a kernel from the host's file system into guest memory.

mod error;

pub use error::BootError;

/// Longest kernel command line in bytes (COMMAND_LINE_SIZE of x86 Linux less its terminating zero).
pub const CMDLINE_MAX: usize = 2047;
