//! The probe guest: a ring-0 stub with a ring-3 workload that uses the PMU as a guest kernel would, checks its own
//! view of it, and says what it saw in a report page that the host reads.
//!
//! What each vCPU does, without end: measures the gap between two turns of its loop by its TSC, beats every
//! millisecond, reads its counters back every 50 beats (one register a turn, so that reading makes no gap), takes
//! counter-overflow interrupts, fills memory once and dirties its working set at a given rate with a pattern that
//! [`verify_memory`] understands. vCPU 0 prints progress on the serial port.
//!
//! * `layout`: addresses and offsets that loader, assembly, parser and the simulated guest share.
//! * `guest.S`, `blob`: the code, assembled by rustc.
//! * `config`, `plan`: what is wanted, and which registers that means on a given PMU (pure).
//! * `tables`, `loader`: descriptor and page tables, and everything into memory.
//! * `report`, `verify`: what the host reads back.

mod blob;
mod config;
#[cfg(test)]
pub(crate) mod harness;
pub mod layout;
mod loader;
mod plan;
mod report;
mod tables;
#[cfg(test)]
mod tests;
mod verify;

pub use config::{ProbeConfig, ProbePmu};
pub use loader::load;
pub use plan::{Check, Plan, Programmed};
pub use report::{Details, ProbeError, details, is_probe, mark_resumed, report};
pub use verify::{VerifyError, verify_memory};
