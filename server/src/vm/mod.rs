//! Virtual machines of this host: one actor a machine, a registry of them, and what watchers see.

pub mod actor;
pub mod command;
pub mod events;
pub mod registry;
pub mod restart;
pub mod transitions;
pub mod view;
