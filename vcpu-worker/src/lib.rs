//! One virtual machine.

pub mod bitmap;
pub mod boot;
pub mod hypervisor;
pub mod memory;
pub mod probe;
