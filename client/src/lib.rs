//! Client library of vpmud: everything `vpmuctl` does, for other programs.
//!
//! ```no_run
//! # async fn example() -> Result<(), vpmu_client::ClientError> {
//! use std::time::Duration;
//! use vpmu_client::{Client, Endpoint};
//!
//! let endpoint: Endpoint = "unix:/run/vpmud/api.sock".parse()?;
//! let client = Client::connect(&endpoint, Duration::from_secs(5)).await?;
//! for vm in client.list_vms().await? {
//!     println!("{} {:?}", vm.name, vm.observed_state());
//! }
//! # Ok(())
//! # }
//! ```
//!
//! One file an idea: [`endpoint`] says where a host is, [`client`] holds the connection, one file a service adds its
//! typed methods, [`wait`] follows long-running operations, [`error`] says what went wrong and what to do about it,
//! [`view`] has the flat forms that `--output json` prints, [`progress`] draws a migration.
#![forbid(unsafe_code)]

pub mod client;
mod console_stream;
pub mod endpoint;
pub mod error;
mod migrations;
pub mod names;
mod operations;
mod pmu;
pub mod progress;
pub mod units;
pub mod view;
mod vms;
pub mod wait;

pub use client::Client;
pub use console_stream::{ConsoleInput, ConsoleOptions, ConsoleSession};
pub use endpoint::{Endpoint, EndpointError};
pub use error::{ClientError, Refusal, Violation};
pub use tonic::Streaming;
pub use vpmu_proto::{api, longrunning};
