//! One virtual machine.

pub mod bitmap;
pub mod boot;
pub mod dataplane;
pub mod host;
pub mod hypervisor;
pub mod memory;
pub mod probe;
mod sys;
#[doc(hidden)]
pub mod testing;
