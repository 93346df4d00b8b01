//! vpmud: the daemon on each host.
//!
//! Data flows one way: request → [`api`] (validates, translates) → VM actor ([`vm`]) → worker ([`worker_link`]) → vCPU
//! thread. What happened flows back: worker → actor → [`store`] → watchers. Migrations between hosts are driven in
//! [`migration`] under the rules of the handover (epochs, grants, seal, journal).
#![forbid(unsafe_code)]

pub mod adopt;
pub mod api;
pub mod awake;
pub mod bench;
pub mod capacity;
pub mod cgroup;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod demo;
pub mod duplex;
pub mod fence;
pub mod handover;
pub mod host_check;
pub mod housekeeping;
pub mod journal;
mod judge;
pub mod lag;
pub mod listen;
pub mod log;
pub mod migration;
pub mod names;
pub mod ops;
mod output;
pub mod parent;
pub mod peer;
pub mod placement;
pub mod pmu_mode;
pub mod pmu_view;
pub mod serve;
pub mod sharing;
pub mod spare;
pub mod status;
pub mod store;
pub mod upgrade;
pub mod validate;
pub mod vm;
pub mod worker_link;
pub mod worker_process;
