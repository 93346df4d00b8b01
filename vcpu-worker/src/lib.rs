//! One virtual machine: hypervisor objects, guest memory, pinned vCPU threads with PMU switching, a serial console, and
//! the data plane that moves it to another host; commanded over `vpmu.worker.v1`.
//!
//! Map, from the outside in:
//! - [`in_process`] and [`process`] hold or serve [`service`], which fences commands ([`grant`]) and holds one [`machine`];
//! - a machine is [`memory`], a [`hypervisor`] VM, [`devices`] with a [`console`], and [`vcpu`] threads on [`cores`];
//! - [`lazy`] lets a guest run before its memory is there (userfaultfd);
//! - [`kvm_pmu`] saves and restores KVM's own vPMU (PMU mode `kvm`);
//! - [`sandbox`] confines a worker that is a process;
//! - [`snapshot`] puts a machine into a file and out of it;
//! - [`boot`] and [`probe`] fill the memory; [`migrate`] drives the [`dataplane`].
//!
//! `unsafe` is allowed only in files that say so at their head: memory, system calls, clocks, KVM's dirty log, the probe.
#![deny(unsafe_code)]

pub mod bitmap;
pub mod boot;
pub mod console;
pub mod cores;
pub mod dataplane;
pub mod devices;
pub mod error;
#[doc(hidden)]
pub mod floor;
pub mod grant;
pub mod host;
pub mod hypervisor;
pub mod in_process;
pub mod kvm_pmu;
pub mod lazy;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod pmu_glue;
pub mod probe;
pub mod process;
pub mod sandbox;
pub mod service;
pub mod snapshot;
mod sys;
#[doc(hidden)]
pub mod testing;
pub mod vcpu;
