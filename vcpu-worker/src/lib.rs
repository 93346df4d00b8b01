//! One virtual machine.

pub mod bitmap;
pub mod hypervisor;
pub mod memory;
