//! One virtual machine.

pub mod bitmap;
pub mod boot;
pub mod dataplane;
pub mod hypervisor;
pub mod memory;
pub mod probe;
