//! The passthrough-PMU context switcher.
//!
//! A [`Core`] stands for one host core's PMU; a [`GuestPmu`] is one vCPU's. `load` and `put` move a guest's PMU between
//! its image and the core's hardware, `resume` and `pause` open and close the global control around the guest's
//! execution, and every access of the guest to a PMU register goes through `guest_rdmsr`, `guest_wrmsr` and
//! `guest_rdpmc`. No async, no KVM and no I/O but [`msr_device`]: any VMM can use it.
#![forbid(unsafe_code)]

pub mod compat;
pub mod core;
pub mod cpuid;
pub mod filter;
mod guest;
pub mod hardware;
pub mod host_check;
pub mod image;
pub mod model;
pub mod msr_device;
pub mod rates;
pub mod registers;
pub mod shape;

pub use crate::core::{AccessKind, Core, ForeignWrite, SwitchError};
pub use filter::{EventFilter, FilterError, FilterSpec};
pub use guest::{GuestAccess, GuestId, GuestPmu, Policy};
pub use hardware::{Hardware, HwError};
pub use image::{CounterView, Image, ImageError, ImportOutcome, RestorePolicy, counters};
pub use model::{CpuMode, ModelPmu};
pub use rates::{Events, RateClock, Rates};
pub use registers::{PMU_MSR_RANGES, is_pmu_msr, register_name};
pub use shape::{Shape, ShapeError, Vendor};
