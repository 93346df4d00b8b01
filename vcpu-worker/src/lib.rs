//! One virtual machine: hypervisor objects, guest memory, pinned vCPU threads with PMU switching, a serial console, and
//! the data plane that moves it to another host; commanded over `vpmu.worker.v1`.
//!
//! Map, from the outside in:
//! - [`channel`] and the binary serve [`service`], which fences commands ([`grant`]) and holds one [`machine`];
//! - a machine is [`memory`], a [`hypervisor`] VM, [`devices`] with a [`console`], and [`vcpu`] threads on [`cores`];
//! - [`boot`] and [`probe`] fill the memory; [`migrate`] drives the [`dataplane`].
//!
//! `unsafe` is allowed in few files only, each of which says so: memory, system calls, host facts, KVM, the probe's code.
#![deny(unsafe_code)]

pub mod bitmap;
pub mod boot;
pub mod channel;
pub mod console;
pub mod cores;
pub mod dataplane;
pub mod devices;
pub mod error;
pub mod grant;
#[allow(unsafe_code)]
pub mod host;
#[allow(unsafe_code)]
pub mod hypervisor;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod pmu_glue;
pub mod probe;
pub mod service;
#[allow(unsafe_code)]
mod sys;
#[doc(hidden)]
pub mod testing;
pub mod vcpu;
